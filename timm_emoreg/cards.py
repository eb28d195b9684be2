"""Model cards, made from the records, and a linter for them.

The Hub's own ``ModelCard`` accepts a wrong licence identifier, ``other`` without a name, missing metadata and keys that
stand twice; the linter does not.
"""
from __future__ import annotations

import contextlib
import io
import json
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from .emoreg import backbone_cfg
from .zoo import Weight

__all__ = ['STIMULI_TERMS', 'TARGET_TERMS', 'Terms', 'licence_terms', 'lint_card', 'make_card', 'make_config',
           'make_table', 'metric_name', 'run_snippets', 'snippets']

PAPER = 'arXiv 2606.13081'
# identifiers of the Hub that can occur here, see its list of licences
LICENCES = ('apache-2.0', 'cc-by-4.0', 'cc-by-sa-4.0', 'cc-by-nc-sa-4.0', 'mit', 'other')
PERCENT = ('top1', 'top5', 'uar')
METRICS = {'top1': ('accuracy', 'accuracy'), 'top5': ('top_5_accuracy', 'top-5 accuracy'),
           'uar': ('recall', 'mean recall'), 'ccc': ('ccc', 'CCC'),
           'pcc': ('pearsonr', 'Pearson correlation'), 'rmse': ('rmse', 'RMSE')}


@dataclass(frozen=True)
class Terms:
    """What is known of a data set, and what follows for a weight that was trained on it.

    Args:
        title: What it is.
        datasets: Its names in the metadata of a card.
        text: Its terms.
        licence: Identifier for the weight, None where the data set decides nothing.
        licence_name: Needed by the Hub where `licence` is ``other``.
        licence_link: Likewise.
        reason: Why this licence.
        faces: Whether it shows faces of people.
    """

    title: str
    datasets: tuple[str, ...]
    text: str
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    reason: str = ''
    faces: bool = False


STIMULI_TERMS = {
    'emoji': Terms(
        'drawings of emoji in three styles, rated by the tone of the tweets that used them',
        ('emoji-sentiment-ranking',),
        'Drawings: Noto Emoji (Apache-2.0), Twemoji (CC-BY 4.0), Fluent Emoji (MIT). Ratings: Emoji Sentiment Ranking '
        '1.0, Kralj Novak, Smailović, Sluban, Mozetič 2015, doi 10.1371/journal.pone.0144296 (CC BY-SA 4.0). The whole '
        'set, with its NOTICE, is in the package timm_emoreg.',
        'cc-by-sa-4.0',
        reason='The ratings, which every label comes from, are CC BY-SA 4.0. Whether a weight adapts its labels is not '
               'settled; the same licence is right either way, and the terms of the drawings allow it.'),
    'ferplus': Terms(
        'photographs of faces (FER2013) with the votes of FER+',
        ('ferplus',),
        'FER+ labels: MIT. The photographs of FER2013 were gathered by web search and have no licence.',
        'other', 'research-use-only-ferplus', 'https://github.com/microsoft/FERPlus',
        'The photographs have no licence, so the weight is for research only.', faces=True),
    'oasis': Terms(
        'photographs of scenes, objects, animals and people, rated for valence and arousal (OASIS)',
        ('oasis',),
        'OASIS, Kurdi, Lozano, Banaji 2016, doi 10.3758/s13428-016-0715-3: free to use and modify for research.',
        'other', 'research-use-only-oasis', 'https://doi.org/10.3758/s13428-016-0715-3',
        'The photographs are free for research, so the weight is for research only.'),
    'nemo': Terms(
        'log-mel spectrograms of acted Polish speech (nEMO)',
        ('amu-cai/nEMO',),
        'nEMO, Christop 2024: CC BY-NC-SA 4.0.',
        'cc-by-nc-sa-4.0',
        reason='The recordings are CC BY-NC-SA 4.0; the weight is shared alike.'),
}

TARGET_TERMS = {
    'cifar10': Terms('CIFAR-10', ('uoft-cs/cifar10',),
                     'CIFAR-10, Krizhevsky 2009: its makers state no licence.'),
    'cifar100': Terms('CIFAR-100', ('uoft-cs/cifar100',),
                      'CIFAR-100, Krizhevsky 2009: its makers state no licence.'),
    'emoji': Terms('drawings of emoji that are no stimuli, by Unicode\'s group', ('emoji',),
                   'Drawings as above; the groups are Unicode\'s (Unicode License v3).'),
    'oasis': Terms('photographs of OASIS, by category', ('oasis',),
                   'OASIS: free to use and modify for research.'),
}


def licence_terms(weight: Weight) -> Terms:
    """The terms that decide the licence of a weight.

    Raises:
        ValueError: If the terms of its stimuli or its target are not known.
    """
    if weight.stimuli not in STIMULI_TERMS or (weight.target is not None and weight.target not in TARGET_TERMS):
        raise ValueError(f'{weight.name}: nothing is known of the terms of {weight.stimuli!r} and {weight.target!r}, '
                         'so no licence can be given to the weight. Only weights of '
                         f'{", ".join(STIMULI_TERMS)} can be released.')
    return STIMULI_TERMS[weight.stimuli]


# -- content -----------------------------------------------------------------------------------------------------------


def make_config(weight: Weight, backbone: str) -> dict[str, Any]:
    """The ``config.json`` that timm builds the model from; what is ours lies under ``emoreg``."""
    cfg = {**backbone_cfg(backbone, **weight.cfg()), 'architecture': weight.architecture, 'tag': weight.tag}
    cfg = {k: v for k, v in cfg.items() if v is not None and k not in ('file', 'hf_hub_id', 'hf_hub_filename')}
    own = weight.to_dict()
    for changing in ('embedded', 'default', 'hub_commit'):
        del own[changing]
    config = {'architecture': weight.architecture, 'num_classes': weight.num_classes, 'pretrained_cfg': cfg,
              'model_args': weight.model_args, 'emoreg': own}
    return json.loads(json.dumps(config))  # tuples become the lists that a reader will see


def _metadata(weight: Weight) -> dict[str, Any]:
    terms = licence_terms(weight)
    on = TARGET_TERMS[weight.target] if weight.target else terms
    data = {'library_name': 'timm_emoreg',
            'pipeline_tag': 'image-classification' if weight.target else 'image-feature-extraction',
            'tags': ['timm', 'timm_emoreg', 'affective-computing', 'emotional-regulation'],
            'license': weight.licence}
    if terms.licence == 'other':
        data |= {'license_name': terms.licence_name, 'license_link': terms.licence_link}
    data['datasets'] = list(dict.fromkeys((*terms.datasets, *(on.datasets if weight.target else ()))))
    if weight.base:
        ours = weight.base.startswith('emoreg_')
        data['base_model'] = f'{weight.hub_id.split("/")[0] if ours else "timm"}/{weight.base}'
    data['model-index'] = [{
        'name': weight.name,
        'results': [{
            'task': {'type': data['pipeline_tag']},
            'dataset': {'name': on.title, 'type': on.datasets[0], 'split': 'test'},
            'metrics': [{'type': METRICS.get(_base(name), (name,))[0], 'name': metric_name(name),
                         'value': values['weight']} for name, values in weight.metrics.items()],
        }],
    }]
    return data


def _base(metric: str) -> str:
    return metric.split('_')[0].split('/')[0]


def metric_name(metric: str) -> str:
    """A metric's name for people: ``'ccc_valence'`` becomes ``'CCC valence'``."""
    base = _base(metric)
    return METRICS.get(base, (base, base))[1] + metric.removeprefix(base).replace('_', ' ').replace('/', ' ')


def _spread(values: dict[str, Any], metric: str) -> str:
    digits = 1 if _base(metric) in PERCENT else 3
    unit = ' %' if _base(metric) in PERCENT else ''
    sd = '' if values['sd'] is None else f' ± {values["sd"]:.{digits}f}'
    return f'{values["mean"]:.{digits}f}{sd}{unit} (n = {values["n"]})'


def _results(weight: Weight) -> str:
    plain = bool(weight.baseline)
    rows = ['| test part | this weight | mean ± sd over seeds |' + (' plain backbone, same recipe |' if plain else ''),
            '|---|---|---|' + ('---|' if plain else '')]
    for name, values in weight.metrics.items():
        one = _spread({'mean': values['weight'], 'sd': None, 'n': 1}, name).split(' (')[0]
        row = f'| {metric_name(name)} | {one} | {_spread(values, name)} |'
        if plain:
            row += f' {_spread(weight.baseline[name], name)} |' if name in weight.baseline else ' |'
        rows.append(row)
    text = '\n'.join(rows)
    if not plain and weight.target is None:
        if weight.model_args['affect_kind'] == 'ratings':
            text += '\n\nFor comparison: the plain backbone gives no ratings, and any constant answer has CCC 0.'
        else:
            chance = 100 / len(weight.affect_names)
            text += ('\n\nFor comparison: the plain backbone names no emotions, and guessing has a mean recall of '
                     f'{chance:.1f} %.')
    return text


def _snippets(weight: Weight) -> tuple[str, str]:
    name = weight.name if weight.embedded else f'hf-hub:{weight.hub_id}'
    show = """
response = model.forward_affect(x)[0]"""
    if weight.model_args['affect_kind'] == 'emotion':
        show += '.softmax(dim=0)'
    show += f"""
for name, value in zip({list(weight.affect_names)}, response.tolist()):
    print(f'{{name}}: {{value:.2f}}')"""
    if weight.target:
        show = """
names = model.pretrained_cfg['label_names']
for p, i in zip(*model(x)[0].softmax(dim=0).topk(3)):
    print(f'{names[i]}: {p:.2f}')
z, z_emo, affect, balance = model.forward_responses(x)  # what the answer is made of"""
    use = f"""import timm
import timm_emoreg  # registers the models
import torch
from PIL import Image

model = timm.create_model('{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.new('RGB', (64, 64), 'orange')  # your image
x = transform(image).unsqueeze(0)
torch.set_grad_enabled(False)
{show.strip()}"""
    tune = f"""import timm
import timm_emoreg  # registers the models
import torch
from timm_emoreg.task import EmoRegTask

model = timm.create_model('{name}', pretrained=True, num_classes=5)  # with new heads
task = EmoRegTask(model)
loss = task(torch.randn(2, *model.pretrained_cfg['input_size']), torch.tensor([0, 4]))['loss']
loss.backward()"""
    return use, tune


FACES = """
**Faces.** This weight was trained on photographs of faces. The EU AI Act, Art. 5(1)(f), prohibits AI systems that infer
emotions of natural persons in the areas of workplace and education institutions, except for medical or safety reasons.
Do not use it so, there or elsewhere: votes on posed and found photographs say what raters saw, not what anyone felt.
"""


def make_card(weight: Weight) -> str:
    """The ``README.md`` of a weight, made from its record alone."""
    terms = licence_terms(weight)
    use, tune = _snippets(weight)
    target = TARGET_TERMS[weight.target] if weight.target else None
    size = 'x'.join(str(s) for s in weight.input_size[1:])
    if target:
        what = (f'A classifier for {target.title} ({weight.num_classes} classes) with emotional regulation:\n'
                'it balances a non-emotional response and one that an affect response has influenced.\n'
                f'The affect response was learnt before, from {terms.title}.')
    else:
        what = (f'A backbone with an affect response ({", ".join(weight.affect_names)}), trained on {terms.title}.\nIt '
                'is stage 1 of emotional regulation, the start for a classifier; it has no classes of its own.')
    kind = 'classifier' if target else 'model'
    trained = (f'from `{weight.base}`' if weight.base else 'from scratch') + f', project commit `{weight.commit}`'
    seeds = ', '.join(map(str, weight.seeds))
    moved = f'{weight.logit_difference:.1g}'
    data = [f'- Stimuli: {terms.title}; labels: {weight.stimuli_labels}. {terms.text}']
    if target:
        data.append(f'- Target: {target.title}. {target.text}')
    if terms.licence == 'other':
        licence = f'{terms.licence_name} ({terms.licence_link})'
    else:
        licence = weight.licence
    front = yaml.safe_dump(_metadata(weight), sort_keys=False, allow_unicode=True, width=110)
    return f"""---
{front}---
# {weight.name}

{what}

An implementation, in the package `timm_emoreg`, of the published abstract of Landi, Rodrigues, Chinnici, "Emotional
regulation improves deep learning-based image classification", {PAPER}. The formulas and numbers of the
paper were not available; no number of the paper is claimed here.

| | |
|---|---|
| model | `{weight.architecture}`, {weight.form}, {size} px, {weight.parameters:,} parameters |
| trained | {trained}, seeds {seeds}, {weight.seconds:,.0f} s a run ({weight.hardware}) |
| file | {weight.size:,} bytes, safetensors, {weight.precision}, which moves an output by at most {moved} |
| sha256 | `{weight.sha256}` |
| licence | {licence} |

## Use

```python
{use}
```

To train on classes of your own:

```python
{tune}
```

## What it is and what it is not

It is an image {kind} with an affect response: numbers that imitate labels which people gave to pictures. It
is no judge of anyone's feelings, neither of the person in a picture nor of the one who looks at it, and no ground for a
decision about a person.
{FACES if terms.faces else ''}
## Results

{_results(weight)}

The best epoch was chosen on validation data by {metric_name(weight.metric)}; the test part was looked at once.

## Training data and their terms

{chr(10).join(data)}

Licence of this weight: {licence}. {terms.reason}

Recipe:

    {weight.recipe}

## Limits

Trained at {size} px on a small data set; other sizes and other kinds of pictures lower its quality. The labels carry
the culture and the time of their raters. It was not tested for fairness between groups of people.

## Citation

```bibtex
@article{{landi2026emotional,
  title={{Emotional regulation improves deep learning-based image classification}},
  author={{Landi and Rodrigues and Chinnici}},
  journal={{arXiv preprint arXiv:2606.13081}}
}}
```
"""


def make_table(weights: dict[str, Weight]) -> str:
    """A markdown table of all weights, for the project's README."""
    rows = ['| weight | MB | licence | where | test result | plain backbone |', '|---|---|---|---|---|---|']
    for name in sorted(weights):
        weight = weights[name]
        places = ['in the package'] * weight.embedded
        if weight.hub_commit:
            places.append(f'Hub: `{weight.hub_id}`')
        where = ', '.join(places) or 'waits for publication'
        metric = weight.metric if weight.metric in weight.metrics else next(iter(weight.metrics))
        plain = _spread(weight.baseline[metric], metric) if metric in weight.baseline else ''
        star = ' (default)' * weight.default
        licence = licence_terms(weight).licence_name or weight.licence
        rows.append(f'| `{name}`{star} | {weight.size / 1e6:.1f} | {licence} | {where} | '
                    f'{metric_name(metric)} {_spread(weight.metrics[metric], metric)} | {plain} |')
    return '\n'.join(rows)


# -- linter ------------------------------------------------------------------------------------------------------------


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'the key {key!r} stands twice', node.start_mark)
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

    Args:
        text: The card.
        replacing: Strings to exchange first, such as the Hub's name of a model that is not published yet.

    Raises:
        RuntimeError: If a block fails; the message names it.
    """
    printed = []
    for number, block in enumerate(snippets(text), 1):
        for old, new in (replacing or {}).items():
            block = block.replace(old, new)
        out = io.StringIO()
        grad = torch.is_grad_enabled()
        try:
            with contextlib.redirect_stdout(out), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # a snippet may ask for new heads, and says so
                exec(compile(block, f'snippet {number}', 'exec'), {'__name__': '__main__'})
        except Exception as e:
            raise RuntimeError(f'snippet {number} fails: {type(e).__name__}: {e}') from e
        finally:
            torch.set_grad_enabled(grad)
        printed.append(out.getvalue())
    return printed
