"""What the names of the registry build: a weight in its form, or a model without one."""
from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from timm.models import _registry

import timm_emoreg
from timm_emoreg import emoreg_resnet, emoreg_vit, zoo
from timm_emoreg.emoreg import EmoReg
from timm_emoreg.training.experience import find_experience
from timm_emoreg.weights import NewHeadsWarning, WeightMismatch, WeightNotFound
from timm_emoreg.zoo import HUB_FILE


@pytest.fixture
def shelf(monkeypatch, make_record, tmp_path):
    """Registers tiny trained-looking weights: ``shelf('emoreg_resnet18', target=...)`` gives record and model."""
    monkeypatch.setenv('EMOREG_WEIGHTS', str(tmp_path))
    monkeypatch.setitem(emoreg_resnet.BACKBONES, 'emoreg_resnet18', 'test_resnet')
    monkeypatch.setitem(emoreg_vit.BACKBONES, 'emoreg_vit_tiny', 'test_vit')
    for name in reversed(list(zoo.WEIGHTS)):  # they come back last one first, and their order is seen elsewhere
        monkeypatch.delitem(zoo.WEIGHTS, name)

    def register(architecture='emoreg_resnet18', **changes):
        backbones = {**emoreg_resnet.BACKBONES, **emoreg_vit.BACKBONES}
        record = make_record(architecture=architecture, **changes)
        torch.manual_seed(0)
        model = EmoReg(backbones[architecture], num_classes=record.num_classes, **record.model_args)
        state = {k: (t.half() if t.is_floating_point() else t) for k, t in model.state_dict().items()}
        state = {k: t + 0.01 if 'modulation' in k else t for k, t in state.items()}
        data = save(state)
        record = make_record(data, architecture=architecture, **changes)
        (tmp_path / record.file).write_bytes(data)
        monkeypatch.setitem(zoo.WEIGHTS, record.name, record)
        cfg = timm.models.PretrainedCfg(**timm_emoreg.emoreg.backbone_cfg(backbones[architecture], **record.cfg()))
        monkeypatch.setitem(_registry._model_pretrained_cfgs, record.name,
                            replace(cfg, architecture=architecture, tag=record.tag))
        model.load_state_dict(state)
        return record, model.eval()
    return register


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_tag_gives_the_weight_in_its_form(shelf):
    record, expected = shelf(target='cifar10')
    model = timm.create_model(record.name, pretrained=True).eval()
    assert torch.equal(model(X), expected(X))
    assert torch.equal(model.forward_affect(X), expected.forward_affect(X))
    assert model.head.weight.dtype == torch.float32
    assert model.pretrained_cfg['input_size'] == (3, 32, 32)
    assert model.pretrained_cfg['label_names'] == ('cat', 'dog', 'cow')
    assert model.affect_kind == 'ratings'
    untrained = timm.create_model(record.name)
    assert untrained.num_affect == 1
    assert untrained.num_classes == 3
    assert not torch.equal(untrained.eval()(X), expected(X))


@torch.no_grad()
def test_default_weight_and_none(shelf):
    record, expected = shelf(target='cifar10', embedded=True, default=True)
    shelf(embedded=True)
    assert torch.equal(timm.create_model('emoreg_resnet18', pretrained=True).eval()(X), expected(X))
    plain = timm.create_model('emoreg_resnet18')
    assert plain.num_classes == 1000
    assert plain.affect_kind == 'emotion'
    assert plain.pretrained_cfg['input_size'] == timm.get_pretrained_cfg('test_resnet').input_size
    with pytest.raises(WeightNotFound, match='emoreg_vit_tiny: there is no such weight'):
        timm.create_model('emoreg_vit_tiny', pretrained=True)
    with pytest.raises(WeightNotFound, match=f'emoreg_resnet18.faces: .*{record.name}'):
        timm.create_model('emoreg_resnet18.faces', pretrained=True)


@pytest.mark.parametrize('architecture', ['emoreg_resnet18', 'emoreg_vit_tiny'])
def test_other_arguments_that_fit(shelf, architecture):
    record, expected = shelf(architecture, target='cifar10')
    with warnings.catch_warnings():
        warnings.simplefilter('error', NewHeadsWarning)
        grey = timm.create_model(record.name, pretrained=True, in_chans=1).eval()
        levels = timm.create_model(record.name, pretrained=True, features_only=True).eval()
        timm.create_model(record.name, pretrained=True, features_only=True, num_classes=5)  # has no heads
        headless = timm.create_model(record.name, pretrained=True, num_classes=0, drop_rate=0.1).eval()
        balanced = timm.create_model(record.name, pretrained=True, balance=0.0,
                                     pretrained_cfg_overlay={'mean': (0.5, 0.5, 0.5)}).eval()
    with torch.no_grad():
        assert torch.equal(grey.head.weight, expected.head.weight)
        assert grey(X[:, :1]).isfinite().all()
        assert len(levels(X)) > 1
        assert all(level.isfinite().all() for level in levels(X))
        assert torch.equal(headless.forward_affect(X), expected.forward_affect(X))
        assert torch.equal(balanced(X), expected.forward_responses(X).non_emotional)
    assert balanced.pretrained_cfg['mean'] == (0.5, 0.5, 0.5)
    state = levels.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in expected.state_dict().items() if k in state and 'num_b' not in k)


@torch.no_grad()
def test_another_size_of_a_vit(shelf):
    record, expected = shelf('emoreg_vit_tiny', target='cifar10')
    model = timm.create_model(record.name, pretrained=True, img_size=48).eval()
    assert model.backbone.patch_embed.patch_size == (6, 6)
    assert torch.equal(model.head.weight, expected.head.weight)
    assert model(torch.randn(1, 3, 48, 48)).isfinite().all()


@pytest.mark.parametrize(('stage', 'wanted', 'warns'), [
    ('cifar10', 5, True), ('cifar10', 3, False), ('cifar10', 0, False), (None, 5, True), (None, 0, False)])
def test_another_number_of_classes_warns_once(shelf, stage, wanted, warns):
    record, expected = shelf(target=stage)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = timm.create_model(record.name, pretrained=True, num_classes=wanted)
    caught = [w for w in caught if w.category is NewHeadsWarning]
    assert len(caught) == warns
    if warns:
        assert f'the model {wanted}: both heads are new' in str(caught[0].message)
        assert caught[0].filename == __file__
    assert model.num_classes == wanted
    assert torch.equal(model.head_affect.weight, expected.head_affect.weight)


@pytest.mark.parametrize(('arguments', 'words'), [
    ({'num_affect': 8}, r'num_affect=8: it needs num_affect=1'),
    ({'affect_kind': 'emotion'}, r"affect_kind='emotion': it needs affect_kind='ratings'"),
    ({'experience': 'separate'}, r"experience='separate': it needs experience='shared'"),
    ({'modulation': False}, r'modulation=False: it needs modulation=True'),
    ({'num_classes': 5, 'modulation': False}, r'modulation=False: it needs modulation=True'),
    ({'balance': 'gate'}, r"balance='gate': it needs balance=0.5.*set afterwards"),
    ({'num_classes': 5, 'balance': 'learned'}, r"balance='learned': it needs balance=0.5"),
])
def test_arguments_that_do_not_fit_stage_2(shelf, arguments, words):
    record, _ = shelf(target='cifar10')
    with pytest.raises(WeightMismatch, match=words) as caught:
        timm.create_model(record.name, pretrained=True, **arguments)
    assert record.name in str(caught.value)


@pytest.mark.parametrize('classes', [3, 5])
def test_stem_that_does_not_fit(shelf, classes, monkeypatch):
    monkeypatch.setitem(emoreg_resnet.BACKBONES, 'emoreg_resnet18', 'resnet10t')
    record, _ = shelf(target='cifar10')
    with pytest.warns(NewHeadsWarning) if classes == 5 else warnings.catch_warnings(), \
            pytest.raises(WeightMismatch, match='block_args'):
        timm.create_model(record.name, pretrained=True, num_classes=classes, block_args={'attn_layer': 'se'})


@pytest.mark.parametrize('target', [None, 'cifar10'])
@pytest.mark.parametrize('arguments', [{}, {'img_size': 64}])
def test_small_image_that_does_not_fit(shelf, arguments, target):
    record, _ = shelf(target=target)
    with pytest.raises(WeightMismatch, match=r'small_image=False.*: it needs small_image=True'):
        timm.create_model(record.name, pretrained=True, small_image=False, **arguments)


def test_another_form_than_that_of_the_weight_has_its_usual_size_without_it():
    small, usual = (timm.create_model('emoreg_vit_tiny.emoji', small_image=small) for small in (None, False))
    assert [model.backbone.patch_embed.num_patches for model in (small, usual)] == [64, 196]
    assert usual.pretrained_cfg['input_size'] == (3, 224, 224)


def test_stage_1_is_open_in_what_it_did_not_train(shelf):
    record, expected = shelf()
    for arguments in ({'balance': 'gate'}, {'balance': 'learned'}, {'modulation': False}):
        with pytest.warns(NewHeadsWarning):
            model = timm.create_model(record.name, pretrained=True, num_classes=4, **arguments)
        assert torch.equal(model.head_affect.weight, expected.head_affect.weight)
        timm.create_model(record.name, pretrained=True, **arguments)
    with pytest.raises(WeightMismatch, match='experience'):
        timm.create_model(record.name, pretrained=True, experience='separate')


@torch.no_grad()
def test_sources_of_the_caller_are_not_second_guessed(shelf, tmp_path):
    record, expected = shelf(target='cifar10', embedded=True, default=True)
    own = {k: v + 1 if k == 'head.bias' else v for k, v in expected.state_dict().items()}
    save_file(own, tmp_path / 'own.safetensors')
    form = {**record.model_args, 'num_classes': 3}
    for model in (
            timm.create_model(record.name, pretrained=True, pretrained_cfg_overlay={'state_dict': own}),
            timm.create_model(record.name, pretrained=True,
                              pretrained_cfg_overlay={'file': str(tmp_path / 'own.safetensors')}),
            timm.create_model('emoreg_resnet18', checkpoint_path=str(tmp_path / 'own.safetensors'), **form),
            timm.create_model('emoreg_resnet18', pretrained=True,
                              pretrained_cfg_overlay={'state_dict': own, 'num_classes': 3}, **form)):
        assert torch.allclose(model.eval()(X), expected(X) + 0.5)


@torch.no_grad()
@pytest.mark.parametrize(('architecture', 'target', 'classes'), [
    ('emoreg_resnet18', 'cifar10', 3), ('emoreg_resnet18', 'cifar10', 7), ('emoreg_vit_tiny', None, 7)])
def test_checkpoint_of_a_weight_comes_back_by_its_tag(shelf, tmp_path, monkeypatch, architecture, target, classes):
    monkeypatch.setitem(emoreg_resnet.BACKBONES, 'emoreg_resnet18', 'resnet18')
    record, _ = shelf(architecture, target=target, embedded=True, default=True)
    with pytest.warns(NewHeadsWarning) if classes == 7 else warnings.catch_warnings():
        model = timm.create_model(architecture, pretrained=True, num_classes=classes).eval()
    path = tmp_path / 'own.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    (tmp_path / record.file).unlink()  # the name alone says the form
    for arguments in ({'model_name': record.name}, timm.models.resolve_model_input_args(record.name)):  # timm's scripts
        again = timm.create_model(**arguments, num_classes=classes, checkpoint_path=str(path)).eval()
        assert torch.equal(again(X), model(X))
        assert again.pretrained_cfg['input_size'] == (3, 32, 32)
        assert again.affect_kind == 'ratings'
    with pytest.raises(RuntimeError, match=rf"another form than the model.* by that one's name: .*{record.name}"):
        timm.create_model(architecture, num_classes=classes, checkpoint_path=str(path))


@torch.no_grad()
def test_source_on_the_hub_of_the_caller_wins_over_the_embedded_file(hub, shelf, tmp_path):
    record, expected = shelf(target='cifar10', embedded=True, default=True)
    own = {k: v + 1 if k == 'head.bias' else v for k, v in expected.state_dict().items()}
    hub.put('me/mine', {HUB_FILE: save(own)})
    model = timm.create_model(record.name, pretrained=True, cache_dir=tmp_path / 'cache', pretrained_cfg_overlay={
        'hf_hub_id': 'me/mine', 'hf_hub_filename': HUB_FILE})
    assert torch.allclose(model.eval()(X), expected(X) + 0.5)


def test_weight_from_the_hub_into_the_given_cache(hub, shelf, tmp_path, monkeypatch):
    record, expected = shelf(target='cifar10')
    data = (tmp_path / record.file).read_bytes()
    (tmp_path / record.file).unlink()
    record = replace(record, hub_commit=hub.put(record.hub_id, {HUB_FILE: data}))
    monkeypatch.setitem(zoo.WEIGHTS, record.name, record)
    model = timm.create_model(record.name, pretrained=True, cache_dir=tmp_path / 'cache').eval()
    with torch.no_grad():
        assert torch.equal(model(X), expected(X))
    assert (tmp_path / 'cache') in Path(model.pretrained_cfg['file']).parents


@torch.no_grad()
def test_export_rebuilds_the_form(shelf, tmp_path):
    record, expected = shelf(target='cifar10')
    model = timm.create_model(record.name, pretrained=True)
    timm.models.save_for_hf(model, tmp_path / 'export', safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "export"}', pretrained=True).eval()
    assert torch.equal(again(X), expected(X))
    with pytest.warns(NewHeadsWarning, match='has 3 classes, the model 7'):
        timm.create_model(f'local-dir:{tmp_path / "export"}', pretrained=True, num_classes=7)


def test_a_file_of_other_classes_warns_of_new_heads(shelf, tmp_path):
    record, _ = shelf(target='cifar10')
    file = tmp_path / 'seven.pth'
    torch.save(timm.create_model(record.name, num_classes=7).state_dict(), file)
    overlay = {'file': str(file)}
    with pytest.warns(NewHeadsWarning, match='^the file of the overlay has 3 classes, the model 7'):
        timm.create_model(record.name, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    with warnings.catch_warnings():
        warnings.simplefilter('error', NewHeadsWarning)
        model = timm.create_model(record.name, pretrained=True, pretrained_cfg_overlay={**overlay, 'num_classes': 7})
    assert torch.equal(model.head.weight, torch.load(file)['head.weight'])


def test_classes_of_an_overlay_are_new_heads_for_stage_1(shelf):
    record, _ = shelf()
    with pytest.warns(NewHeadsWarning, match='has no classes, the model 4'):
        timm.create_model(record.name, pretrained=True, pretrained_cfg_overlay={'num_classes': 4})


def test_experience_by_tag(shelf, tmp_path):
    record, expected = shelf()
    found = find_experience(record.name)
    assert (found.affect_kind, found.num_affect, found.names) == ('ratings', 1, ('valence',))
    assert torch.equal(found.state_dict['head_affect.weight'], expected.head_affect.weight)
    (tmp_path / record.file).write_bytes(b'')
    with pytest.raises(ValueError, match=r'--experience .*0 bytes'):
        find_experience(record.name)


def test_building_draws_the_same_random_numbers(shelf):
    record, _ = shelf(target='cifar10')
    drawn = []
    for pretrained in (False, True):
        torch.manual_seed(5)
        timm.create_model(record.name, pretrained=pretrained)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize('name', ['emoreg_resnet18.emoji', 'emoreg_resnet18.emoji_ft_cifar10', 'emoreg_vit_tiny.emoji'])
def test_timm_scripts_hand_over_the_whole_cfg_and_get_the_weight_in_its_form(name):
    expected = timm.create_model(name, pretrained=True)
    model = timm.create_model(**timm.models.resolve_model_input_args(name), pretrained=True)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(),
                                                 strict=True))
    architecture = name.split('.')[0]
    default = timm.create_model(**timm.models.resolve_model_input_args(architecture), pretrained=True)
    expected = timm.create_model(zoo.find(architecture).name, pretrained=True)
    assert torch.equal(default.head_affect.weight, expected.head_affect.weight)


def test_a_changed_cfg_is_taken_as_it_is():
    cfg = timm.get_pretrained_cfg('emoreg_resnet18.emoji').to_dict()
    model = timm.create_model('emoreg_resnet18', pretrained_cfg=dict(cfg, num_classes=5))
    assert model.num_affect == 8  # not the weight's 1
    assert model.pretrained_cfg['num_classes'] == 5
    untagged = timm.get_pretrained_cfg('emoreg_resnet18')
    assert timm.create_model('emoreg_resnet18', pretrained_cfg=untagged).small_image is False
