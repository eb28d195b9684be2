from __future__ import annotations

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from timm_emoreg import zoo
from timm_emoreg.hub.card_lint import lint_card
from timm_emoreg.hub.cards import make_card, make_config, make_table, rounded_up
from timm_emoreg.hub.command import check
from timm_emoreg.hub.finished_runs import ROOT
from timm_emoreg.hub.terms import licence_terms


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
    if not (ROOT / 'hub_cards').is_dir():
        pytest.skip('the cards are not part of a source distribution')
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


def test_stimuli_of_unknown_terms(make_record):
    with pytest.raises(ValueError, match='nothing is known of the terms'):
        make_card(make_record(stimuli='holidays'))


@pytest.mark.parametrize(('stimuli', 'target', 'words'), [
    ('emoji', 'oasis', 'the stimuli emoji demand cc-by-sa-4.0, the target oasis demands research-use-only-oasis'),
    ('nemo', 'oasis', 'the stimuli nemo demand cc-by-nc-sa-4.0, the target oasis demands research-use-only-oasis'),
])
def test_terms_that_contradict(make_record, stimuli, target, words):
    weight = make_record(stimuli=stimuli, target=target)
    words = f'{weight.name}: {words}. No licence is sure to fulfil both, so such a weight cannot be released.'
    with pytest.raises(ValueError, match=re.escape(words)):
        make_card(weight)


@pytest.mark.parametrize(('stimuli', 'target', 'licence'), [
    ('emoji', 'emoji', 'cc-by-sa-4.0'), ('nemo', 'cifar100', 'cc-by-nc-sa-4.0'),
    ('ferplus', 'oasis', 'research-use-only-ferplus'), ('oasis', 'oasis', 'research-use-only-oasis'),
])
def test_terms_of_stimuli_and_target(make_record, stimuli, target, licence):
    terms = licence_terms(make_record(stimuli=stimuli, target=target))
    assert (terms.licence_name or terms.licence) == licence


def test_base_model_of_timm(make_record):
    text = make_card(replace(make_record(), base='resnet18.a1_in1k'))
    assert 'base_model: timm/resnet18.a1_in1k' in text


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
               make_record(stimuli='ferplus', licence='other', precision='int8', size=5_500_000,
                           eight_bits={'images': 4, 'float32': 50.0, 'int8': 25.0, 'changed': 1})]
    table = make_table({w.name: w for w in weights}).splitlines()
    assert len({row.count('|') for row in table}) == 1
    assert '.emoji` (default) | 0.0 | cc-by-sa-4.0 | in the package | CCC 0.450 ± 0.070 (n = 2)' in table[2]
    assert '| Hub: `timm-emoreg/emoreg_resnet18.emoji_ft_cifar10` | accuracy 0.5 ± 0.1 % (n = 2) | 0.5 ±' in table[3]
    assert '| 5.5 (8 bits) | research-use-only-ferplus | waits for publication' in table[4]


def test_a_card_tells_what_was_trained_beside_the_weight(make_record):
    weight = make_record(target='cifar10')
    alone = replace(weight, baseline={})
    assert 'no control of the labels was trained beside them' in make_card(weight)
    assert 'No plain backbone was trained beside it. These' not in make_card(weight)
    assert 'No plain backbone was trained beside it. These numbers are no evidence that' in make_card(alone)
    assert 'no evidence' not in make_card(make_record())  # of stage 1, which has no classes


def test_a_card_says_what_the_weight_is_below(make_record):
    weight = make_record(target='cifar10')
    number = {'weight': 65.0, 'n': 1, 'mean': 65.0, 'sd': None}
    behind = replace(weight, metrics={'top1': number}, baseline={'top1': {**number, 'mean': 72.4}})
    assert '**It is 7.4 points below the plain backbone with the same recipe**' in make_card(behind)
    rounded = {'top1': {**number, 'mean': 64.85}}  # 64.8 in the table, and the other one 65.1
    assert '**It is 0.2 points' in make_card(replace(behind, metrics=rounded,
                                                     baseline={'top1': {**number, 'mean': 65.08}}))
    for near in (65.0, 65.04):
        assert 'below the plain' not in make_card(replace(behind, baseline={'top1': {**number, 'mean': near}}))
    faces = make_record(stimuli='ferplus', licence='other', metric='top1', metrics={'top1': number},
                        model_args={**weight.model_args, 'affect_kind': 'emotion'})
    assert "Always answering 'neutral' has an accuracy of 34.5 %." in make_card(faces)


@pytest.mark.parametrize(('recipe', 'words'), [
    ('python train.py --epochs 5 --val-interval 5 --seed 0', 'The last epoch was taken, the only one that was looked'),
    ('python train.py --epochs 10 --val-interval 5', 'The best epoch was chosen on validation data by CCC'),
    ('python train.py --epochs 1', 'The last epoch was taken, the only one that was looked'),
    ('python train.py --epochs 5 --val-interval 9', 'The last epoch was taken, the only one that was looked'),
    ('python train.py --epochs 5 --affect-epochs 15 --val-interval 5', 'The best epoch was chosen on validation data'),
    ('python train.py --epochs 15', 'The best epoch was chosen on validation data by CCC')])
def test_a_card_says_how_the_epoch_was_chosen(make_record, recipe, words):
    assert words in make_card(replace(make_record(), recipe=recipe))
    if '--affect-epochs' in recipe:  # which are not those of stage 2
        assert 'The last epoch was taken' in make_card(make_record(target='cifar10', recipe=recipe))


def test_a_card_says_which_seed_is_released(make_record):
    card = make_card(replace(make_record(), seeds=(1, 2, 0), hardware='CPU, 1 threads'))
    assert ', seeds 0, 1, 2 (released: 1, the best on validation data), 60 s per run (CPU, 1 thread) |' in card


@pytest.mark.parametrize(('value', 'text'), [
    (0.000417, '0.00042'), (0.00105, '0.0011'), (0.0061, '0.0061'), (0.006100001, '0.0062'), (0.0099999, '0.01'),
    (2e-7, '2e-07')])
def test_a_bound_is_rounded_up(value, text):
    assert rounded_up(value) == text


def test_a_bound_is_rounded_up_at_any_digit():
    # a bound that had been rounded to the nearest before would be too small
    assert rounded_up(float(rounded_up(0.006104, digits=3))) == rounded_up(0.006104) == '0.0062'


def test_a_card_tells_of_a_share_of_stage_1(make_record):
    record = replace(make_record(), base='emoreg_vit_tiny.ferplus')
    assert '| trained | from `emoreg_vit_tiny.ferplus`, project' in make_card(record)
    recipe = 'python train.py --epochs 5 --experience-share 0.2 --seed 0'
    assert ('| trained | from a share of 0.2 of `emoreg_vit_tiny.ferplus`, project commit'
            in make_card(replace(record, recipe=recipe)))
