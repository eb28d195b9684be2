from __future__ import annotations

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from timm_emoreg.hub.card_lint import lint_card, run_snippets, snippets
from timm_emoreg.hub.cards import make_card


def drop(key):
    return lambda data: {k: v for k, v in data.items() if k != key}


@pytest.mark.parametrize(('change', 'words'), [
    (drop('library_name'), 'library_name is missing'),
    (lambda d: {**d, 'library_name': 'timm'}, "library_name 'timm'"),
    (lambda d: {**d, 'tags': ['emotion']}, 'the tag timm is missing'),
    (drop('datasets'), 'datasets is missing'), (drop('license'), 'license is missing'),
    (drop('pipeline_tag'), 'pipeline_tag is missing'), (drop('base_model'), 'base_model is missing'),
    (lambda d: {**d, 'license': 'apache2'}, "license 'apache2' is none of"),
    (lambda d: {**d, 'license': 'mit'}, 'license mit, the stimuli ferplus allow other only'),
    (drop('license_name'), 'license other needs license_name'),
    (drop('license_link'), 'license other needs license_link'),
    (drop('model-index'), 'model-index holds no numbers'),
    (lambda d: {**d, 'model-index': [{'name': 'x', 'results': []}]}, 'model-index holds no numbers'),
])
def test_linter_finds_wrong_metadata(make_record, change, words):
    weight = make_record(stimuli='ferplus', target='cifar10', licence='other')
    front, _, rest = make_card(weight).removeprefix('---\n').partition('---\n')
    text = '---\n' + yaml.safe_dump(change(yaml.safe_load(front)), sort_keys=False) + '---\n' + rest
    ModelCard(text)  # does not mind
    assert words in '\n'.join(lint_card(text, weight))


@pytest.mark.parametrize(('old', 'new', 'words'), [
    ('license: other\n', 'license: other\nlicense: mit\n', "the key 'license' appears twice"),
    ('value: 0.5', 'value: 0.51', 'not those of the record'),
    ('value: 0.5', 'value: .nan', 'not a finite number'),
    ('value: 0.5', 'value: high', 'not a finite number'),
    ('---\nlibrary_name', 'library_name', 'the metadata between two lines'),
    ('license: other', 'license: [other', 'metadata: '),
    ('Art. 5(1)(f)', 'Art. 5', 'EU AI Act'),
    ('import timm\n', 'model = 1\nimport timm\n', 'does not start with the imports'),
    ('import timm_emoreg', 'import timm as t', 'does not start with the imports'),
    ('```python', '```', 'no Python snippet'),
    ('arXiv 2606.13081', 'a paper', 'does not cite'),
    ('no judge of anyone', 'a judge of everyone', 'what the model is not'),
    ('## Limits', '## More', 'names no limits'),
    ('## Training data and their terms', '## Data', 'training data'),
])
def test_linter_finds_wrong_text(make_record, old, new, words):
    weight = make_record(stimuli='ferplus', target='cifar10', licence='other')
    text = make_card(weight)
    assert old in text
    assert words in '\n'.join(lint_card(text.replace(old, new), weight))


def test_snippets_run_by_themselves():
    text = '```python\nimport math\nprint(math.pi)\n```\n\n```python\nimport timm_emoreg\nprint(HERE)\n```\n'
    assert len(snippets(text)) == 2
    assert run_snippets(text, {'HERE': '1 + 1'})[1] == '2\n'
    with pytest.raises(RuntimeError, match='snippet 2 fails: NameError'):
        run_snippets(text)
    with pytest.raises(RuntimeError, match='snippet 2 fails: NameError'):  # nothing is left from the first
        run_snippets(text, {'HERE': 'math.pi'})


def test_a_snippet_meets_what_those_before_it_have_changed_of_torch():
    """As in the notebook of a reader, who does not start anew between two blocks of a card."""
    text = ('```python\nimport torch\ntorch.set_grad_enabled(False)\n```\n\n'
            '```python\nimport torch\nassert torch.is_grad_enabled()\n```\n')
    with pytest.raises(RuntimeError, match='snippet 2 fails: AssertionError'):
        run_snippets(text)
    assert torch.is_grad_enabled()  # here, though
