from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import create_scheduler_v2

import timm_emoreg  # noqa: F401  registers the models
from timm_emoreg.training.optim import (
    MUON,
    fuse_in_memory_order,
    fused_where_possible,
    orthogonalize_in_float32,
    scale_affect_lr,
    usual_recipe,
)

AFFECT = ('head_affect.', 'modulation.', 'regulation.')


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('emoreg', backbone='test_vit', img_size=32, num_classes=3, num_affect=4, balance='gate')


def scales(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], group) for group in optimizer.param_groups for p in group['params']]
    assert len(found) == len(names) == len(dict(found))  # each parameter once
    return dict(found)


def test_names_and_scales_go_with_their_parameters(model):
    optimizer = torch.optim.AdamW([{'params': list(model.named_parameters()), 'lr_scale': 0.4}])
    scale_affect_lr(optimizer, model, 0.5)
    own = dict(model.named_parameters())
    assert [group['lr_scale'] for group in optimizer.param_groups] == [0.4, 0.2]
    for group in optimizer.param_groups:
        assert [id(own[name]) for name in group['param_names']] == [id(p) for p in group['params']]


@pytest.mark.parametrize('layer_decay', [None, 0.5])
@pytest.mark.parametrize('opt', ['sgd', 'adamw', 'muon'])
def test_only_the_affect_parameters_get_another_rate(model, opt, layer_decay):
    def make():
        return create_optimizer_v2(model, opt=opt, lr=0.1, weight_decay=0.01, layer_decay=layer_decay)

    before, optimizer = scales(model, make()), make()
    scale_affect_lr(optimizer, model, 0.25)
    after = scales(model, optimizer)
    scheduler, _ = create_scheduler_v2(optimizer, 'cosine', num_epochs=2, warmup_epochs=0, step_on_epochs=False,
                                       updates_per_epoch=5)
    scheduler.step_update(num_updates=0)
    for name, group in after.items():
        factor = 0.25 if name.startswith(AFFECT) else 1
        usual = before[name].get('lr_scale', 1.0)
        assert group.get('lr_scale', 1.0) == pytest.approx(factor * usual)
        assert group['lr'] == pytest.approx(0.1 * factor * usual)
        assert group['weight_decay'] == before[name]['weight_decay']
    assert {name for name in after if name.startswith(AFFECT)} == {
        'head_affect.weight', 'head_affect.bias', 'modulation.gain.weight', 'modulation.shift.weight',
        'regulation.gate.weight', 'regulation.gate.bias'}


def test_with_zero_they_stay_as_they_are(model):
    optimizer = create_optimizer_v2(model, opt='muon', lr=0.1, weight_decay=0.01)
    scale_affect_lr(optimizer, model, 0)
    scheduler, _ = create_scheduler_v2(optimizer, 'cosine', num_epochs=2, warmup_epochs=0, step_on_epochs=False,
                                       updates_per_epoch=5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for update in range(2):
        scheduler.step_update(num_updates=update)
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not any(name.startswith(AFFECT) for name in moved)
    assert {'head.weight', 'head_emo.weight'} < moved


def test_a_model_without_modulation_or_state_has_less_to_scale():
    model = timm.create_model('emoreg', backbone='test_resnet', num_classes=3, modulation=False)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1)
    scale_affect_lr(optimizer, model, 0.5)
    assert not any('lr_scale' in group for group in optimizer.param_groups)  # the affect response is frozen


@pytest.mark.parametrize('scale', [-0.1, float('nan')])
def test_a_negative_scale_is_refused(model, scale):
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1)
    with pytest.raises(ValueError, match=f'scale={scale!r} is no factor of a learning rate: give 0 to leave'):
        scale_affect_lr(optimizer, model, scale)


@pytest.mark.parametrize('opt', ['muon', 'adamuon', 'lookahead_muon', 'sgd'])
def test_muon_orthogonalizes_in_float32_only_while_that_optimizer_steps(opt, monkeypatch):
    usual, types = muon.zeropower_via_newtonschulz, []

    def watched(update, *args, **kwargs):
        result = usual(update, *args, **kwargs)
        types.append(result.dtype)
        return result

    monkeypatch.setattr(muon, 'zeropower_via_newtonschulz', watched)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    weight.grad = torch.randn(8, 8)
    own, other = (create_optimizer_v2([weight], opt=opt, lr=0.1) for _ in range(2))
    orthogonalize_in_float32(own)
    for optimizer in (own, other, own):
        optimizer.step()
    wide, narrow = torch.float32, torch.bfloat16
    assert types == ([] if opt == 'sgd' else [wide, narrow, wide])
    assert muon.zeropower_via_newtonschulz is watched
    with pytest.raises(ZeroDivisionError):
        own.step(lambda: 1 / 0)
    assert muon.zeropower_via_newtonschulz is watched


@pytest.mark.parametrize(('name', 'task', 'opt', 'recipe'), [
    ('test_resnet', 'affect', None, ('adamw', 5e-4, 0.05, {})),  # 64 images
    ('test_resnet', 'emoreg', None, ('muon', 0.02, 0.01, MUON)),
    ('test_vit', 'plain', None, ('muon', 0.005, 0.01, MUON)),
    ('test_vit', 'affect', 'muon', ('muon', 0.005, 0.01, MUON)),
    ('test_resnet', 'plain', 'lookahead_muon', ('lookahead_muon', 0.02, 0.01, MUON)),
    ('test_resnet', 'plain', 'sgd', ('sgd', 0.05, 5e-4, {})),
    ('test_resnet', 'plain', 'momentum', ('momentum', 0.05, 5e-4, {})),
    *(('test_resnet', 'plain', name, (name, 0.05, 5e-4, {}))
      for name in ('lookahead_sgd', 'nesterov', 'nesterovw', 'sgdp', 'sgdw', 'fusedsgd')),
    ('test_resnet', 'plain', 'nmuon', ('nmuon', 0.02, 0.01, MUON)),
    ('test_resnet', 'plain', 'lamb', ('lamb', 5e-4, 0.05, {})),
])
def test_the_usual_recipe(name, task, opt, recipe):
    found = usual_recipe(timm.create_model(name), task, opt, 64)
    assert tuple(found[key] for key in ('opt', 'lr', 'weight_decay', 'opt_kwargs')) == recipe


@pytest.mark.parametrize('precision', ['bfloat16', 'float32'])
@pytest.mark.parametrize(('opt', 'device', 'given', 'fused'), [
    ('sgd', 'cpu', {}, True), ('lookahead_adamw', 'cuda', {'betas': (0.9, 0.99)}, True), ('adam', 'cpu', {}, True),
    ('sgd', 'cpu', {'foreach': True}, None), ('adamw', 'cpu', {'fused': False}, False),
    ('adam', 'cpu', {'differentiable': True}, None), ('sgd', 'mps', {}, None), ('sgdw', 'cpu', {}, None),
    ('muon', 'cpu', dict(MUON), None)])
def test_where_one_pass_updates_all_parameters(opt, device, given, fused, precision):
    before = dict(given)
    found = fused_where_possible(opt, torch.device(device), precision, given)
    assert found == before | ({} if fused is None else {'fused': fused})
    assert given == before  # it is the recipe, which is shown


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_a_scaler_may_pass_over_the_first_update(device):
    assert fused_where_possible('sgd', torch.device(device), 'float16', {}) == {}


@pytest.mark.parametrize('opt', ['sgd', 'adam', 'adamw', 'lookahead_adamw'])
def test_one_pass_over_all_parameters_gives_the_same_numbers(opt):
    images, models = torch.randn(4, 3, 32, 32).double(), []
    for fused, in_memory_order in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model = timm.create_model('test_resnet', num_classes=3).double()
        models.append(model.to(memory_format=torch.channels_last))
        optimizer = create_optimizer_v2(model, opt=opt, lr=0.01, weight_decay=0.01, momentum=0.9, fused=fused)
        assert [group['fused'] for group in optimizer.param_groups] == [fused] * 2
        if in_memory_order:
            fuse_in_memory_order(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
    usual, *others = (model.state_dict() for model in models)
    for other in others:
        torch.testing.assert_close(other, usual)


def test_in_the_order_of_memory_no_gradient_is_copied():
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight], momentum=0.9, fused=True)
    fuse_in_memory_order(optimizer)
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        with torch.autograd.profiler.profile() as profile:
            optimizer.step()
        names = [event.name for event in profile.function_events]
        assert 'aten::_fused_sgd_' in names
        assert 'aten::clone' not in names  # torch 2.14 has one there otherwise


def test_updates_that_are_not_fused_stay_as_they_are():
    optimizer = create_optimizer_v2([torch.nn.Parameter(torch.ones(2))], opt='sgd', lr=0.1)
    fuse_in_memory_order(optimizer)
    assert 'step' not in vars(optimizer)
