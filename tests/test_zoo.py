from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
from timm.models import generate_default_cfgs

import timm_emoreg
from timm_emoreg import emoreg_resnet, emoreg_vit, zoo
from timm_emoreg.hub.cards import make_table
from timm_emoreg.marks import between_marks

ROOT = Path(timm_emoreg.__file__).parents[1]


def test_registry_shows_exactly_what_can_be_had():
    assert set(timm.list_pretrained('emoreg*')) == {w.name for w in zoo.WEIGHTS.values() if w.available}
    for weight in zoo.WEIGHTS.values():
        cfg = timm.get_pretrained_cfg(weight.name)
        assert (cfg.num_classes, cfg.input_size, cfg.license) == (weight.num_classes, weight.input_size, weight.licence)
        assert (cfg.hf_hub_id is None) == (weight.hub_commit is None)
        assert cfg.mean == timm.get_pretrained_cfg(timm_emoreg.BACKBONES[weight.architecture]).mean
        if weight.embedded:
            assert Path(cfg.file).stat().st_size == weight.size
        untagged = timm.get_pretrained_cfg(weight.architecture)  # builds the backbone's usual form, so it says that
        assert not untagged.has_weights
        assert untagged.input_size == timm.get_pretrained_cfg(timm_emoreg.BACKBONES[weight.architecture]).input_size


def test_embedded_files_are_those_of_the_records():
    files = {p.name for p in Path(str(zoo.ASSETS / 'weights')).glob('*') if p.name != '.gitkeep'}
    assert files == {w.file for w in zoo.WEIGHTS.values() if w.embedded}


def test_readme_has_the_table_of_the_records():
    readme = ROOT / 'README.md'
    if not readme.is_file():
        pytest.skip('an installed package has no README beside it')
    assert between_marks(readme, 'weights') == make_table(zoo.WEIGHTS)


@pytest.fixture
def shelf(monkeypatch, make_record):
    weights = [
        make_record(stimuli='ferplus', licence='other', target='cifar10'),  # waits
        make_record(embedded=True),
        make_record(target='cifar10', hub_commit='2' * 40, default=True),
        make_record(architecture='emoreg_vit_tiny', target='cifar10', default=True),  # waits
    ]
    monkeypatch.setattr(zoo, 'WEIGHTS', {w.name: w for w in weights})
    return weights


def registered(module):
    return generate_default_cfgs(zoo.registry_cfgs(module.BACKBONES))


def test_what_waits_is_known_and_not_advertised(shelf):
    cfgs = registered(emoreg_resnet)['emoreg_resnet18']
    assert {tag for tag, cfg in cfgs.cfgs.items() if cfg.has_weights} == {'emoji', 'emoji_ft_cifar10'}
    assert 'ferplus_ft_cifar10' in cfgs.cfgs
    assert cfgs.tags[0] == ''
    assert cfgs.is_pretrained
    vit = registered(emoreg_vit)['emoreg_vit_tiny']
    assert vit.tags[0] == ''
    assert not vit.is_pretrained


def test_cfg_of_a_weight(shelf):
    cfgs = registered(emoreg_resnet)['emoreg_resnet18'].cfgs
    online, embedded = cfgs['emoji_ft_cifar10'], cfgs['emoji']
    assert online.hf_hub_id == 'timm-emoreg/emoreg_resnet18.emoji_ft_cifar10@' + '2' * 40
    assert online.hf_hub_filename == 'model.safetensors'  # or timm would ask for a pickle, too
    assert online.file is None
    assert embedded.hf_hub_id is None
    assert embedded.file.endswith('emoreg_resnet18.emoji.safetensors')
    assert online.input_size == (3, 32, 32)
    assert online.test_input_size is None
    assert online.pool_size == (4, 4)
    assert registered(emoreg_vit)['emoreg_vit_tiny'].cfgs['emoji_ft_cifar10'].pool_size is None
    assert online.crop_pct == 1.0
    assert online.first_conv == 'backbone.conv1'
    assert online.classifier == ('head', 'head_emo')
    assert online.label_names == ('cat', 'dog', 'cow')
    assert embedded.num_classes == 0


def test_find(shelf):
    assert zoo.find('emoreg_resnet18') is shelf[2]
    assert zoo.find('emoreg_resnet18.emoji') is shelf[1]
    assert zoo.find('emoreg_resnet18.ferplus_ft_cifar10') is shelf[0]
    assert zoo.find('emoreg_vit_tiny') is None
    assert zoo.find('emoreg_resnet34') is None


@pytest.mark.parametrize(('changes', 'words'), [
    ({'tag': 'smileys'}, "tag 'smileys' does not say stimuli and target, expected 'emoji'"),
    ({'file': 'model.safetensors'}, 'not named after the weight'),
    ({'sha256': 'A' * 64}, 'sha256'),
    ({'hub_commit': 'main'}, 'no full commit'),
    ({'label_names': ('cat',)}, 'label_names and target'),
    ({'affect_names': ('valence', 'arousal')}, 'num_affect=1, affect_names name 2'),
    ({'precision': 'int8'}, 'eight_bits and precision int8 must come together'),
])
def test_records_that_cannot_be_true(make_record, changes, words):
    with pytest.raises(ValueError, match=words):
        replace(make_record(), **changes)


def test_records_survive_their_file(make_record, tmp_path):
    records = {w.name: w for w in (make_record(target='cifar10'), make_record(embedded=True))}
    path = tmp_path / 'weights.json'
    zoo.write_records(records, path)
    assert zoo.read_records(path) == records
    assert list(tmp_path.iterdir()) == [path]
    fields = json.loads(path.read_text())
    path.write_text(json.dumps([*fields, fields[0]]))
    with pytest.raises(ValueError, match='two records of one weight'):
        zoo.read_records(path)
    path.write_text(json.dumps([dict(f, default=True) for f in fields]))
    with pytest.raises(ValueError, match='two defaults of one architecture'):
        zoo.read_records(path)
