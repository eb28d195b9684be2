"""A linter for model cards, and a runner of their snippets.

The Hub's own ``ModelCard`` accepts a wrong licence identifier, ``other`` without a name, missing metadata and keys that
appear twice; this linter does not.
"""
from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from typing import Any

import torch
import yaml

from ..zoo import Weight
from .cards import PAPER
from .terms import licence_terms

__all__ = ['lint_card', 'run_snippets', 'snippets']

# identifiers of the Hub that can occur here, see its list of licences
LICENCES = ('apache-2.0', 'cc-by-4.0', 'cc-by-sa-4.0', 'cc-by-nc-sa-4.0', 'mit', 'other')


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that appears twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'the key {key!r} appears twice', node.start_mark)
        return super().construct_mapping(node, deep)


def snippets(text: str) -> list[str]:
    """The Python blocks of a card."""
    return re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


def _lint_metadata(data: dict[str, Any], weight: Weight) -> list[str]:
    problems = []
    needed = ['library_name', 'pipeline_tag', 'tags', 'license', 'datasets', 'model-index']
    needed += ['base_model'] if weight.base else []
    problems += [f'metadata: {key} is missing' for key in needed if not data.get(key)]
    if data.get('library_name') not in (None, 'timm_emoreg'):
        problems.append(f'metadata: library_name {data["library_name"]!r}; the snippet of the Hub would import that')
    if 'timm' not in (data.get('tags') or ()):
        problems.append('metadata: the tag timm is missing')
    licence = data.get('license')
    if licence is not None and licence not in LICENCES:
        problems.append(f'metadata: license {licence!r} is none of {", ".join(LICENCES)}')
    if licence == 'other':
        problems += [f'metadata: license other needs {key}' for key in ('license_name', 'license_link')
                     if not data.get(key)]
    allowed = licence_terms(weight).licence
    if licence in LICENCES and licence != allowed:
        problems.append(f'metadata: license {licence}, the stimuli {weight.stimuli} allow {allowed} only')
    try:
        results = [m for entry in data['model-index'] for r in entry['results'] for m in r['metrics']]
        numbers = [m['value'] for m in results]
    except (KeyError, TypeError):
        numbers = []
    if not numbers:
        problems.append('metadata: model-index holds no numbers')
    elif not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        problems.append('metadata: a value of model-index is not a finite number')
    elif numbers != [values['weight'] for values in weight.metrics.values()]:
        problems.append('metadata: the numbers of model-index are not those of the record')
    return problems


def lint_card(text: str, weight: Weight) -> list[str]:
    """What is wrong with a card; an empty list if nothing is."""
    match = re.match(r'---\n(.*?\n)---\n', text, re.DOTALL)
    if match is None:
        return ['the metadata between two lines of --- at its top are missing']
    try:
        data = yaml.load(match[1], _UniqueKeys)
    except yaml.YAMLError as e:
        return [f'metadata: {" ".join(str(e).split())}']
    if not isinstance(data, dict):
        return ['metadata: not a mapping']
    problems = _lint_metadata(data, weight)
    blocks = snippets(text)
    if not blocks:
        problems.append('no Python snippet')
    for number, block in enumerate(blocks, 1):
        if not block.startswith('import ') or 'import timm_emoreg' not in block:
            problems.append(f'snippet {number} does not start with the imports, timm_emoreg among them')
    for needed, why in ((PAPER, f'it does not cite {PAPER}'),
                        ('no judge of anyone', 'it does not say what the model is not'),
                        ('## Limits', 'it names no limits'),
                        ('## Training data and their terms', 'it does not name the training data and their terms')):
        if needed not in text:
            problems.append(why)
    if licence_terms(weight).faces and 'Art. 5(1)(f)' not in text:
        problems.append('it was trained on faces and does not name the prohibition of the EU AI Act, Art. 5(1)(f)')
    return problems


def run_snippets(text: str, replacing: dict[str, str] | None = None) -> list[str]:
    """Run each Python block of a card by itself and give what each printed.

    Names are a block's own; what it changes of torch, the following ones meet, as in a reader's session.

    Args:
        text: The card.
        replacing: Strings to exchange first, such as the Hub's name of a model that is not published yet.

    Raises:
        RuntimeError: If a block fails; the message names it.
    """
    printed = []
    grad = torch.is_grad_enabled()
    try:
        for number, block in enumerate(snippets(text), 1):
            for old, new in (replacing or {}).items():
                block = block.replace(old, new)
            out = io.StringIO()
            try:
                with contextlib.redirect_stdout(out), warnings.catch_warnings():
                    warnings.simplefilter('ignore')  # a snippet may ask for new heads, and says so
                    exec(compile(block, f'snippet {number}', 'exec'), {'__name__': '__main__'})
            except Exception as e:
                raise RuntimeError(f'snippet {number} fails: {type(e).__name__}: {e}') from e
            printed.append(out.getvalue())
    finally:
        torch.set_grad_enabled(grad)
    return printed
