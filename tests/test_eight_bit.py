"""Weights in 8 bits: how far they are from those before, and that timm loads them like others."""
from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_emoreg.eight_bit import eight_bit_layout, from_eight_bits, to_eight_bits


@pytest.fixture(params=['test_resnet', 'test_vit'])
def model(request):
    torch.manual_seed(3)
    return timm.create_model('emoreg', backbone=request.param, num_classes=5, balance='gate').eval()


def test_each_channel_is_off_by_at_most_half_a_step(model):
    state = model.state_dict()
    rounded = to_eight_bits(state)
    assert {name: tuple(t.shape) for name, t in rounded.items()} == eight_bit_layout(
        {name: tuple(t.shape) for name, t in state.items()})
    back = from_eight_bits(rounded)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        if name.endswith('.weight') and tensor.ndim > 1:
            assert rounded[name].dtype == torch.int8
            largest = tensor.flatten(1).abs().amax(dim=1)
            off = (back[name] - tensor).flatten(1).abs().amax(dim=1)
            assert (off <= largest / 127 * 0.5001).all()
            assert torch.equal(rounded[name].flatten(1).abs().amax(dim=1) == 127, largest > 0)
        else:
            assert torch.equal(back[name], tensor.half() if tensor.is_floating_point() else tensor)
    assert (back['modulation.gain.weight'] == 0).all()  # a channel of zeros, whose scale is zero


def test_a_state_in_floating_point_stays_as_it_is(model):
    state = model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in from_eight_bits(state).items())


def test_they_are_not_taken_for_weights(model):
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r'is in 8 bits\. timm\.create_model\(NAME, num_classes=N, pretr'):
            model.load_state_dict(to_eight_bits(model.state_dict()), strict=strict)


def test_timm_loads_a_file_of_them(model, tmp_path):
    rounded = to_eight_bits(model.state_dict())
    save_file(rounded, tmp_path / 'model.safetensors')
    kwargs = {'backbone': model.backbone.pretrained_cfg['architecture'], 'num_classes': 5, 'balance': 'gate'}
    loaded = timm.create_model('emoreg', pretrained=True, pretrained_cfg_overlay={
        'file': str(tmp_path / 'model.safetensors'), 'num_classes': 5}, **kwargs)
    expected = timm.create_model('emoreg', **kwargs)
    expected.load_state_dict(from_eight_bits(rounded))
    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), expected.eval()(x))
