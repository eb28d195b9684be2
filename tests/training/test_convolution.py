"""Convolutions of small maps: the same numbers in other ways; no test measures time."""
from __future__ import annotations

import copy
from itertools import product

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import timm_emoreg  # noqa: F401  registers the models
from timm_emoreg.training import convolution
from timm_emoreg.training.convolution import choose_convolution, met_weights, suit_small_maps, use_columns

CPU = torch.device('cpu')


@pytest.mark.parametrize(('size', 'kernel', 'stride', 'padding', 'dilation', 'expected'), [
    (1, 3, 1, 1, 1, (1, 2, 0)),  # the middle weight of ResNet's last maps at 32 px
    (2, 3, 2, 1, 1, (1, 3, 0)),
    (2, 3, 1, 1, 1, (0, 3, 1)),  # each weight meets something
    (2, 7, 1, 3, 1, (2, 5, 1)),
    (3, 7, 1, 3, 1, (1, 6, 2)),
    (1, 7, 2, 3, 1, (3, 4, 0)),
    (2, 3, 1, 2, 2, (1, 2, 0)),  # dilated: the outer weights reach over the map
    (1, 2, 1, 1, 1, (0, 2, 1)),  # two outputs, of one weight each
    (4, 3, 1, 0, 1, (0, 3, 0)),
    (1, 1, 1, 1, 1, (0, 1, 1)),  # outputs of padding alone stay
])
def test_the_weights_that_meet_a_map(size, kernel, stride, padding, dilation, expected):
    assert met_weights(size, kernel, stride, padding, dilation) == expected


@pytest.mark.parametrize(('kernel', 'stride', 'dilation'), list(product((1, 2, 3, 5, 7), (1, 2, 3), (1, 2))))
def test_every_convolution_of_a_small_map_is_the_same(kernel, stride, dilation):
    torch.manual_seed(0)
    checked, same = 0, dilation * (kernel - 1) // 2
    for padding, height, width, groups in product({0, 1, 3, same}, (1, 2, 4), (1, 2, 3), (1, 2)):
        conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, dtype=torch.float64)
        x = torch.randn(2, 4, height, width, dtype=torch.float64, requires_grad=True)
        if min(height, width) + 2 * padding < dilation * (kernel - 1) + 1:
            continue  # torch refuses it
        expected = conv(x)
        gradients = torch.autograd.grad(expected.square().sum(), (x, *conv.parameters()))
        suit_small_maps(conv)
        found = conv(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), (x, *conv.parameters())), gradients)
        checked += 1
    assert checked > 10


def test_a_map_too_small_for_the_kernel_is_still_refused():
    for kernel, side in ((5, 2), (2, 1)):
        conv = nn.Conv2d(3, 3, kernel)
        suit_small_maps(conv)
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            conv(torch.randn(1, 3, side, side))


@pytest.mark.parametrize('grouped', [False, True])
def test_less_is_multiplied(monkeypatch, grouped):
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4 if grouped else 1)
    suit_small_maps(conv)
    shapes = []
    for name in ('conv2d', 'linear'):
        usual = getattr(F, name)
        monkeypatch.setattr(
            F, name, lambda x, w, *rest, usual=usual: shapes.append(tuple(w.shape)) or usual(x, w, *rest))
    for height, width in ((1, 1), (1, 2), (2, 2), (1, 12), (3, 3)):
        assert conv(torch.randn(1, 4, height, width)).shape == (1, 4, height, width)
    assert conv(torch.randn(0, 4, 1, 1)).shape == (0, 4, 1, 1)
    shapes.pop()
    whole = (4, 1, 3, 3) if grouped else (4, 4, 3, 3)
    part = (*whole[:2], 1, 3)  # of the kernel, what meets a map of one row
    small = [(*whole[:2], 1, 1), part, whole] if grouped else [(4, 4), (8, 8), (16, 16)]
    assert shapes == [*small, part, whole]


@pytest.fixture
def all_as_columns(monkeypatch):
    monkeypatch.setattr(convolution, '_WIDE', 1)
    monkeypatch.setattr(convolution, '_FEW', 0)


@pytest.mark.parametrize(('kernel', 'stride'), list(product((2, 3, (3, 1), 5), (1, 2, (3, 1)))))
def test_every_convolution_by_its_columns_is_the_same(monkeypatch, all_as_columns, kernel, stride):
    torch.manual_seed(0)
    monkeypatch.setattr(F, 'conv2d', lambda *_: pytest.fail('not by columns'))
    for padding, (height, width), memory in product(
            (0, 1, (2, 0)), ((5, 5), (6, 7)), (torch.contiguous_format, torch.channels_last)):
        conv = nn.Conv2d(4, 6, kernel, stride, padding, dtype=torch.float64).to(memory_format=memory)
        x = torch.randn(2, 4, height, width, dtype=torch.float64).to(memory_format=memory).requires_grad_()
        expected = torch.conv2d(x, conv.weight, conv.bias, stride, padding)
        gradients = torch.autograd.grad(expected.square().sum(), (x, *conv.parameters()))
        suit_small_maps(conv)
        use_columns(conv)
        found = conv(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), (x, *conv.parameters())), gradients)
        assert conv(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize(('outputs', 'side', 'flags', 'by_columns'), [
    (256, 4, {}, True), (256, 5, {}, False), (512, 5, {}, True), (512, 6, {}, False), (255, 4, {}, False),
    (256, 8, {'stride': 2}, True), (256, 9, {'stride': 2}, False), (256, 4, {'groups': 2}, False),
    (256, 6, {'dilation': 2}, False), (256, 4, {'kernel_size': 1}, False), (256, 2, {}, False)])
def test_wide_convolutions_of_small_maps_have_columns(monkeypatch, outputs, side, flags, by_columns):
    """Which are those of few places for their outputs; still smaller maps are multiplied as a whole."""
    conv = nn.Conv2d(2, outputs, **{'kernel_size': 3, 'padding': 1, **flags})
    suit_small_maps(conv)
    called, usual = [], convolution._convolve_columns
    monkeypatch.setattr(convolution, '_convolve_columns', lambda *args: called.append(1) or usual(*args))
    conv(torch.randn(1, 2, side, side))
    assert called == []
    use_columns(conv)
    conv(torch.randn(1, 2, side, side))
    assert called == [1] * by_columns


@pytest.mark.parametrize(('device', 'precision', 'outputs', 'side'), [
    ('cuda', 'bfloat16', 256, 4), ('cpu', 'float32', 256, 4), ('cpu', 'bfloat16', 255, 4), ('cpu', 'bfloat16', 256, 5),
    ('cpu', 'bfloat16', 256, 2)])
def test_the_convolution_of_torch_stays_without_a_probe(monkeypatch, device, precision, outputs, side):
    monkeypatch.setattr(convolution, 'fastest', lambda ways: pytest.fail('probed'))
    model = nn.Sequential(nn.Conv2d(3, outputs, 3, padding=1), nn.Conv2d(outputs, 256, 1))
    suit_small_maps(model)
    assert choose_convolution(model, torch.device(device), precision, [side]) is None


def test_the_maps_of_a_model_depend_on_its_images(monkeypatch):
    """At 224 px, where no map of it is small enough, a log must not name columns."""
    monkeypatch.setattr(convolution, 'fastest', lambda ways: 'columns')
    model = timm.create_model('resnet18')
    suit_small_maps(model)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = {sizes: choose_convolution(model, CPU, 'bfloat16', sizes) for sizes in ((16,), (16, 32), (128,), (224,))}
    assert found == {(16,): None, (16, 32): 'columns', (128,): 'columns', (224,): None}  # of 16 px all are matrices
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize('winner', ['torch', 'columns'])
def test_the_probe_trains_both_ways_on_the_same_input(monkeypatch, winner):
    taken, called, usual = {}, [], convolution._convolve_columns
    monkeypatch.setattr(convolution, '_convolve_columns', lambda *args: called.append(1) or usual(*args))

    def fastest(ways):
        assert list(ways) == ['torch', 'columns']  # of equal ones the first is taken: columns must gain something
        for name, way in ways.items():
            taken[name] = way()
            assert called == [1] * (name == 'columns')
        return winner

    monkeypatch.setattr(convolution, 'fastest', fastest)
    model = nn.Conv2d(3, 256, 3, padding=1)
    suit_small_maps(model)
    before = torch.get_rng_state()
    assert choose_convolution(model, CPU, 'bfloat16', [4]) == winner
    assert torch.equal(torch.get_rng_state(), before)  # no random numbers are drawn from the stream of the caller
    of_maps, of_weight = taken['columns']
    assert (of_maps.dtype, of_weight.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(taken['columns'], taken['torch'], rtol=0.02, atol=0)


@pytest.mark.parametrize(('kernel', 'padding', 'side'), [(1, 0, 1), (3, 1, 1), (3, 1, 2), (3, 1, 3)])
def test_what_is_multiplied_as_a_matrix_has_its_gradients(all_as_columns, kernel, padding, side):
    """Also the second ones, in autocast's type and in the memory format of the weight."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, kernel, padding=padding).double()
    suit_small_maps(conv)
    use_columns(conv)  # of the largest map
    x = torch.randn(2, 2, side, side, dtype=torch.float64, requires_grad=True)
    both = (x, conv.weight, conv.bias)
    call = lambda x, weight, bias: conv._conv_forward(x, weight, bias)  # noqa: E731
    assert torch.autograd.gradcheck(call, both)
    assert torch.autograd.gradgradcheck(call, both)

    conv.float().to(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16):
        answers = conv(x.float())
    assert answers.dtype is torch.bfloat16
    assert answers.is_contiguous(memory_format=torch.channels_last)
    gradient, = torch.autograd.grad(answers.float().sum(), conv.weight)
    assert gradient.is_contiguous(memory_format=torch.channels_last)  # else torch copies it


def test_a_compiler_sees_the_usual_convolution(monkeypatch):
    conv = nn.Conv2d(3, 256, 3, padding=1)
    suit_small_maps(conv)
    use_columns(conv)
    kernels, usual = [], F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda x, w, *rest: kernels.append(tuple(w.shape[-2:])) or usual(x, w, *rest))
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    for side in (1, 4):
        conv(torch.randn(1, 3, side, side))
    assert kernels == [(3, 3)] * 2


@pytest.mark.parametrize('padding', [{'padding': 'same'}, {'padding': 1, 'padding_mode': 'reflect'}])
def test_other_paddings_are_left_alone(padding):
    conv = nn.Conv2d(3, 3, 3, **padding)
    suit_small_maps(conv)
    assert type(conv) is nn.Conv2d


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_convnext', 'test_efficientnet', 'test_byobnet'])
@pytest.mark.parametrize('by_columns', [False, True])
def test_a_model_and_its_copies_learn_the_same(all_as_columns, backbone, by_columns):
    torch.manual_seed(0)
    model = timm.create_model('emoreg', backbone=backbone, num_classes=3).double()
    changed = copy.deepcopy(model)
    suit_small_maps(changed)
    if by_columns:
        use_columns(changed)
    assert list(changed.state_dict()) == list(model.state_dict())
    of_copy = copy.deepcopy(changed)  # as averaged weights are: it must not compute with those of the first
    with torch.no_grad():
        for p in changed.parameters():
            p.zero_()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    answers, gradients = [], []
    for one in (model, of_copy):
        torch.manual_seed(0)  # for what is dropped
        answers.append(one(images))
        answers[-1].square().sum().backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*answers)
    torch.testing.assert_close(*gradients)
