"""From a name or a run to a model whose outputs have names."""
import argparse
import csv
import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

import timm_emoreg  # noqa: F401  registers the models
from timm_emoreg.answers import answer, describe_set
from timm_emoreg.data import DataError, load_target
from timm_emoreg.data.loader import make_loader
from timm_emoreg.trained import need_affect, released_model, trained_model
from timm_emoreg.training.checkpoint import CheckpointError


@pytest.fixture(scope='module')
def folder(colours) -> Path:
    return colours


@pytest.fixture(scope='module')
def run(trained_run) -> Path:
    return trained_run


def test_a_run_answers_as_its_own_evaluation_said(run, folder):
    trained = trained_model(run)
    assert trained.affect_names == trained.label_names == ('blue', 'green', 'red')
    assert (trained.model.balance, trained.model.affect_kind, trained.img_size) == ('gate', 'emotion', (32, 32))
    test = load_target(str(folder)).test
    answers, _ = answer(trained, test)
    told = json.loads((run / 'emoreg/result.json').read_text())['test']['top1']
    assert describe_set(trained, answers, test.targets, test.target.names)['top1']['regulated'] == round(told, 2)


def test_what_timm_s_transforms_go_by_is_how_it_was_trained(run):
    config = timm.data.resolve_model_data_config(trained_model(run).model)
    assert timm.data.resolve_model_data_config(timm.create_model('test_resnet'))['interpolation'] == 'bilinear'
    assert (config['input_size'], config['interpolation'], config['crop_mode']) == ((3, 32, 32), 'bicubic', 'squash')


def test_stage_1_of_a_run(run):
    trained = trained_model(run / 'affect')
    assert trained.affect_names == ('blue', 'green', 'red')
    assert (trained.model.num_classes, trained.label_names) == (0, ())
    assert trained_model(run / 'affect/last.pth.tar').affect_names == trained.affect_names


def change(run, to, **args):
    """A stage-2 checkpoint by itself, with other settings."""
    state = torch.load(run / 'emoreg/model_best.pth.tar', weights_only=False)
    state['args'] = argparse.Namespace(**{**vars(state['args']), **args})
    to.mkdir(parents=True, exist_ok=True)
    torch.save(state, to / 'model_best.pth.tar')
    return to


def test_a_moved_run_is_told_its_experience(run, tmp_path):
    alone = change(run, tmp_path / 'alone')
    with pytest.raises(CheckpointError, match='what its affect response means stands in the result of its stage 1'):
        trained_model(alone)
    assert trained_model(alone, experience=str(run)).affect_names == ('blue', 'green', 'red')
    told = trained_model(change(run, tmp_path / 'told', experience=str(run), experience_share=0.2))
    assert (told.affect_names, told.experience_share) == (('blue', 'green', 'red'), 0.2)


def test_where_the_backbone_came_from_is_forgotten(run, tmp_path):
    overlay = {'pretrained_cfg_overlay': {'file': str(tmp_path / 'gone.pth'), 'num_classes': 7}}
    found = trained_model(change(run, tmp_path / 'run', experience=str(run), model_kwargs=overlay)).model
    assert not any(found.pretrained_cfg.get(name) for name in ('file', 'url', 'hf_hub_id'))
    assert found.default_cfg == found.pretrained_cfg


def test_the_form_of_the_dual_head_comes_back(run, tmp_path):
    model = timm.create_model('emoreg', backbone='test_resnet', num_classes=3, num_affect=3, small_image=True,
                              balance=0.3, modulation=False, experience='separate').eval()
    path = change(run, tmp_path, balance=0.3, experience=str(run)) / 'model_best.pth.tar'
    state = torch.load(path, weights_only=False)
    del state['state_dict_ema']
    torch.save({**state, 'state_dict': model.state_dict()}, path)
    found = trained_model(tmp_path).model
    assert (found.balance, found.modulation, found.experience) == (0.3, None, 'separate')
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(found(x), model(x))


def test_an_experience_of_another_form_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match=r'has 3 outputs, its experience names 1 \(valence\)'):
        trained_model(change(run, tmp_path), experience='emoreg_resnet18.emoji')


@pytest.mark.parametrize(('names', 'expected'), [(('joy', 'fear', 'calm'), ('joy', 'fear', 'calm')),
                                                 ((), ('affect 1', 'affect 2', 'affect 3'))])
def test_a_run_without_experience(run, tmp_path, names, expected):
    changed = change(run, tmp_path, experience='none', affect_names=names, affect_kind='ratings')
    trained = trained_model(changed)
    assert (trained.affect_names, trained.model.affect_kind) == (expected, 'ratings')


def test_an_older_run_without_experience_is_refused(run, tmp_path):
    older = change(run, tmp_path, experience='none') / 'model_best.pth.tar'
    state = torch.load(older, weights_only=False)
    del state['args'].affect_kind
    torch.save(state, older)
    with pytest.raises(CheckpointError, match='--experience none, so its affect response was never taught'):
        trained_model(older)


def test_classes_keep_the_names_that_they_were_trained_under(run, tmp_path):
    """Whatever became of the pictures: their folders may be gone, or have other names today."""
    changed = change(run, tmp_path, dataset=str(tmp_path / 'gone'), data_dir='there')
    trained = trained_model(changed, experience=str(run))
    assert trained.label_names == ('blue', 'green', 'red')
    assert trained.data_dir == 'there'
    path = tmp_path / 'model_best.pth.tar'
    state = torch.load(path, weights_only=False)
    del state['args'].label_names
    torch.save(state, path)
    older = trained_model(tmp_path, experience=str(run))
    assert (older.label_names, older.label(1)) == ((), 'class 1')
    twice = dataclasses.replace(older, label_names=('crane', 'cat', 'crane'))
    assert [twice.label(i) for i in range(3)] == ['crane (0)', 'cat', 'crane (2)']


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_a_plain_run_is_the_backbone_in_its_form(folder, train, tmp_path, monkeypatch, name):
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    monkeypatch.setattr(sys, 'argv', ['train.py', '--task', 'plain', '--model', name, '--dataset', str(folder), '-b',
                                      '8', '--img-size', '32', '--epochs', '1', '--no-amp', '--output', str(tmp_path),
                                      '--experiment', 'run'])
    assert train.main() == 0
    trained = trained_model(tmp_path / 'run')
    assert (trained.label_names, trained.img_size) == (('blue', 'green', 'red'), (32, 32))
    config = timm.data.resolve_model_data_config(trained.model)
    assert (config['input_size'], config['interpolation'], config['crop_mode']) == ((3, 32, 32), 'bicubic', 'squash')
    assert not any(trained.model.pretrained_cfg.get(k) for k in ('hf_hub_id', 'url', 'tag'))
    loader = make_loader(load_target(str(folder)).test, trained.img_size, 8, config)
    with torch.no_grad():
        answers = torch.cat([trained.model(x).argmax(dim=1) for x, _ in loader]).tolist()
    with open(tmp_path / 'run/plain/predictions.csv', newline='') as file:
        assert answers == [int(row['prediction']) for row in csv.DictReader(file)]
    with pytest.raises(DataError, match='run has no affect response: it is a plain model'):
        need_affect(trained)


def test_the_stage_1_of_a_plain_run_is_not_what_it_was_for(run, tmp_path):
    shutil.copytree(run / 'affect', tmp_path / 'affect')
    assert trained_model(tmp_path).affect_names == ('blue', 'green', 'red')
    (tmp_path / 'plain').mkdir()
    with pytest.raises(CheckpointError, match=r'holds no model_best\.pth\.tar, neither itself nor in its folders'):
        trained_model(tmp_path)


def test_a_run_whose_checkpoints_are_gone_is_told_from_one_that_has_none_yet(run, tmp_path):
    (tmp_path / 'plain').mkdir()
    shutil.copy(run / 'emoreg/result.json', tmp_path / 'plain')
    with pytest.raises(CheckpointError, match=r'finished, but its checkpoints are gone\. .* with --keep-checkpoints'):
        trained_model(tmp_path)


@pytest.mark.parametrize(('make', 'error', 'message'), [
    (lambda path, run: path, CheckpointError, 'holds no model_best.pth.tar'),
    (lambda path, run: path / 'nowhere', CheckpointError, 'there is no such checkpoint'),
    (lambda path, run: torch.save({'state_dict': {}}, path / 'a.pth') or path / 'a.pth', CheckpointError,
     'train.py did not write it'),
    # as timm's own script writes it
    (lambda path, run: torch.save({'state_dict': {'head_affect.weight': torch.zeros(3, 2)},
                                   'args': argparse.Namespace(model='emoreg_resnet18', img_size=64)}, path / 'a.pth')
     or path / 'a.pth', CheckpointError, r'train\.py did not write it.*timm\.create_model\(NAME, checkpoint_path=PATH'),
    (lambda path, run: torch.save({'state_dict': {}, 'args': None}, path / 'a.pth') or path / 'a.pth', CheckpointError,
     'train.py did not write it'),
    (lambda path, run: torch.save({'state_dict': {}, 'args': argparse.Namespace()}, path / 'a.pth') or path / 'a.pth',
     DataError, 'has no affect response'),
    (lambda path, run: change(run, path, model='test_resnet.2', backbone='test_vit', experience=str(run)),
     CheckpointError, 'its tensors are not those of its settings'),
])
def test_what_is_no_run_of_a_model_with_affect_is_refused(run, tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        trained_model(make(tmp_path, run))


def test_a_released_weight_brings_its_names():
    trained = released_model('emoreg_vit_tiny.emoji')
    assert (trained.affect_names, trained.img_size, trained.label_names) == (('valence',), (32, 32), ())
    assert trained.model.affect_kind == 'ratings'
    assert not trained.model.training


def test_an_exported_run_brings_its_names_and_size(run, tmp_path):
    model = trained_model(run).model
    save_for_hf(model, tmp_path, safe_serialization=True)
    trained = released_model(f'local-dir:{tmp_path}')
    assert (trained.label_names, trained.img_size) == (('blue', 'green', 'red'), (32, 32))
    assert trained.affect_names == ('affect 1', 'affect 2', 'affect 3')
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in trained.model.state_dict().items())
    save_for_hf(model, tmp_path, model_config={'emoreg': {'affect_names': ['joy', 'fear', 'anger']}},
                safe_serialization=True)
    assert released_model(f'local-dir:{tmp_path}').affect_names == ('joy', 'fear', 'anger')
    # the backbone's own weights are under a licence, of which nothing is in these
    own = timm.create_model('test_resnet').pretrained_cfg['license']
    assert 'license' not in json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']
    started = trained_model(change(run, tmp_path, pretrained_backbone=True), str(run)).model
    assert started.pretrained_cfg['license'] == own


@pytest.mark.parametrize(('name', 'message'), [
    ('emoreg_resnet18.emojy', "Did you mean 'emoreg_resnet18.emoji'"),
    ('emoreg_resnet50', '--model emoreg_resnet50: no weight of it is released. There are weights of emoreg_resnet18, '
                       'emoreg_vit_tiny; or give a run of train.py with --checkpoint.'),
    ('emoreg', '--model emoreg: no weight of it is released.'),
    ('resnet18', '--model resnet18 has no affect response: it is a plain model'),
    ('local-dir:nowhere', '--model local-dir:nowhere: its config.json cannot be read'),
    ('hf-hub:nobody/nothing', '--model hf-hub:nobody/nothing: its config.json cannot be read'),
])
def test_a_name_that_is_no_weight_is_refused(name, message):
    with pytest.raises(DataError) as error:
        released_model(name)
    assert message in str(error.value)


@pytest.mark.parametrize('config', ['[]', '{"architecture": "emoreg"}', '{}'])
def test_a_folder_without_a_weight_is_refused(tmp_path, config):
    (tmp_path / 'config.json').write_text(config)
    with pytest.raises(DataError, match=r'timm cannot load it \(.*\)\. It should hold what timm\.models\.save_for_hf'):
        released_model(f'local-dir:{tmp_path}')


def test_the_folder_of_an_embedded_weight_tells_where_that_is(tmp_path):
    folder = tmp_path / 'emoreg_resnet18.emoji'
    folder.mkdir()
    (folder / 'config.json').write_text('{"architecture": "emoreg_resnet18"}')
    with pytest.raises(DataError, match=r'of this weight is in the package: --model emoreg_resnet18\.emoji\.'):
        released_model(f'local-dir:{folder}')


@pytest.mark.parametrize(('damage', 'reason'), [
    ('another backbone', 'This is a checkpoint of another'), ('a misspelt backbone', 'Unknown backbone'),
    ('a download cut off', 'Error while deserializing')])
def test_a_folder_whose_weight_does_not_fit_is_refused(tmp_path, damage, reason):
    save_for_hf(timm.create_model('emoreg', backbone='test_resnet'), tmp_path, safe_serialization=True,
                model_args={'backbone': {'another backbone': 'test_vit'}.get(damage, 'test_resnet')})
    config, file = tmp_path / 'config.json', tmp_path / 'model.safetensors'
    if damage == 'a misspelt backbone':
        config.write_text(config.read_text().replace('"test_resnet"', '"test_resnext"'))
    if damage == 'a download cut off':
        file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(DataError, match=rf'cannot load it \({reason}'):
        released_model(f'local-dir:{tmp_path}')


def test_a_weight_that_takes_no_rgb_is_refused(tmp_path):
    save_for_hf(timm.create_model('emoreg', backbone='test_resnet', in_chans=1), tmp_path, safe_serialization=True,
                model_args={'backbone': 'test_resnet', 'in_chans': 1})
    with pytest.raises(DataError, match='takes images of 1 channels, and pictures are read as RGB'):
        released_model(f'local-dir:{tmp_path}')


def test_an_error_without_words_is_named_by_its_type(tmp_path, monkeypatch):
    (tmp_path / 'config.json').write_text('{}')

    def fail(*_, **__):
        raise RuntimeError
    monkeypatch.setattr(timm, 'create_model', fail)
    with pytest.raises(DataError, match=r'timm cannot load it \(RuntimeError\)'):
        released_model(f'local-dir:{tmp_path}')


def test_a_published_weight_brings_its_names(hub, tmp_path):
    model = timm.create_model('emoreg', backbone='test_resnet', num_affect=2, num_classes=0)
    save_for_hf(model, tmp_path, model_config={'emoreg': {'affect_names': ['joy', 'fear']}}, safe_serialization=True)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    commit = hub.put('someone/mine', files)
    assert released_model('hf-hub:someone/mine').affect_names == ('joy', 'fear')
    hub.put('someone/mine', {'config.json': files['config.json'].replace(b'joy', b'awe')})
    assert released_model(f'hf-hub:someone/mine@{commit}').affect_names == ('joy', 'fear')
    assert released_model('hf-hub:someone/mine').affect_names == ('awe', 'fear')


@pytest.mark.parametrize('model_args', [{}, {'small_image': True}])  # which timm's ResNet does not know
def test_a_folder_of_a_plain_model_is_refused(tmp_path, model_args):
    save_for_hf(timm.create_model('test_resnet'), tmp_path, safe_serialization=True, model_args=model_args)
    with pytest.raises(DataError, match='has no affect response'):
        released_model(f'local-dir:{tmp_path}')


@pytest.mark.parametrize('damage', [
    lambda folder, config: (folder / 'model.safetensors').unlink() or (folder / 'pytorch_model.bin').touch(),
    lambda folder, config: config['pretrained_cfg'].update(input_size=[3]),
    lambda folder, config: config['pretrained_cfg'].update(label_names=5),
])
def test_a_damaged_folder_is_told_in_one_line(tmp_path, damage):
    save_for_hf(timm.create_model('emoreg', backbone='test_resnet', num_classes=0), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    damage(tmp_path, config)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(DataError, match=r'timm cannot load it \(.*\)\. It should hold what timm\.models\.save_for_hf'):
        released_model(f'local-dir:{tmp_path}')
