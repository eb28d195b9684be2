from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from timm_emoreg import zoo
from timm_emoreg.cards import lint_card, make_card, make_config, make_table, run_snippets, snippets
from timm_emoreg.hub import check


@pytest.fixture(params=['emoji', 'ferplus', 'oasis', 'nemo', 'emoji_ft_cifar10', 'ferplus_ft_cifar100'])
def weight(request, make_record):
    stimuli, _, target = request.param.partition('_ft_')
    licence = {'emoji': 'cc-by-sa-4.0', 'nemo': 'cc-by-nc-sa-4.0'}.get(stimuli, 'other')
    changes = {}
    if stimuli in ('ferplus', 'nemo'):
        changes = {'affect_names': ('joy', 'fear'), 'stimuli_labels': 'emotion',
                   'model_args': {**make_record().model_args, 'affect_kind': 'emotion', 'num_affect': 2}}
    return make_record(stimuli=stimuli, target=target or None, licence=licence, **changes)


@pytest.mark.parametrize('name', sorted(zoo.WEIGHTS))
def test_released_weights_are_good(name):
    assert check(name) == []


def test_made_cards_are_good(weight):
    text = make_card(weight)
    assert lint_card(text, weight) == []
    card = ModelCard(text)  # what the Hub's own reader makes of it
    assert card.data.library_name == 'timm_emoreg'
    assert card.data.license == weight.licence
    assert card.data.model_name == weight.name
    assert {r.metric_value for r in card.data.eval_results} == {0.5}
    assert card.data.base_model == (weight.base and f'timm-emoreg/{weight.base}')
    for needed in (weight.sha256, weight.recipe, f'{weight.size:,} bytes', '0.450 ± 0.070' if not weight.target else
                   '0.5 ± 0.1 % (n = 2)'):
        assert needed in text, needed
    assert ('Art. 5(1)(f)' in text) == (weight.stimuli == 'ferplus')


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
    ('license: other\n', 'license: other\nlicense: mit\n', "the key 'license' stands twice"),
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


def test_stimuli_of_unknown_terms(make_record):
    with pytest.raises(ValueError, match='nothing is known of the terms'):
        make_card(make_record(stimuli='holidays'))


def test_base_model_of_timm(make_record):
    text = make_card(replace(make_record(), base='resnet18.a1_in1k'))
    assert 'base_model: timm/resnet18.a1_in1k' in text


def test_snippets_run_by_themselves():
    text = '```python\nimport math\nprint(math.pi)\n```\n\n```python\nimport timm_emoreg\nprint(HERE)\n```\n'
    assert len(snippets(text)) == 2
    assert run_snippets(text, {'HERE': '1 + 1'})[1] == '2\n'
    with pytest.raises(RuntimeError, match='snippet 2 fails: NameError'):
        run_snippets(text)
    with pytest.raises(RuntimeError, match='snippet 2 fails: NameError'):  # nothing is left from the first
        run_snippets(text, {'HERE': 'math.pi'})


def test_config_is_what_timm_reads(make_record):
    weight = make_record(target='cifar10', embedded=True, hub_commit='3' * 40)
    config = make_config(weight, 'resnet18')
    assert config['architecture'] == 'emoreg_resnet18'
    assert config['num_classes'] == 3
    assert config['model_args'] == weight.model_args
    assert config['emoreg']['sha256'] == weight.sha256
    assert not {'file', 'hf_hub_id', 'hf_hub_filename'} & config['pretrained_cfg'].keys()
    assert 'hub_commit' not in config['emoreg']  # a repository cannot know its own commit


def test_table(make_record):
    weights = [make_record(embedded=True, default=True), make_record(target='cifar10', hub_commit='4' * 40),
               make_record(stimuli='ferplus', licence='other')]
    table = make_table({w.name: w for w in weights}).splitlines()
    assert len({row.count('|') for row in table}) == 1
    assert '.emoji` (default) | 0.0 | cc-by-sa-4.0 | in the package | CCC 0.450 ± 0.070 (n = 2)' in table[2]
    assert '| Hub: `timm-emoreg/emoreg_resnet18.emoji_ft_cifar10` | accuracy 0.5 ± 0.1 % (n = 2) | 0.5 ±' in table[3]
    assert 'research-use-only-ferplus | waits for publication' in table[4]
