"""Convolutions of maps smaller than the kernel: the same numbers, of less work; no test measures time."""
from __future__ import annotations

import copy
from itertools import product

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import timm_emoreg  # noqa: F401  registers the models
from timm_emoreg.training.convolution import met_weights, suit_small_maps


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
    for padding, height, width, groups in product((0, 1, 3), (1, 2, 4), (1, 2, 3), (1, 2)):
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


@pytest.mark.parametrize(('kernel', 'padding', 'side'), [(1, 0, 1), (3, 1, 1), (3, 1, 2)])
def test_the_matrix_of_a_map_has_its_gradients(kernel, padding, side):
    """Also the second ones, in autocast's type and in the memory format of the weight."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, kernel, padding=padding).double()
    suit_small_maps(conv)
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
    conv = nn.Conv2d(3, 3, 3, padding=1)
    suit_small_maps(conv)
    kernels, usual = [], F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda x, w, *rest: kernels.append(tuple(w.shape[-2:])) or usual(x, w, *rest))
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    conv(torch.randn(1, 3, 1, 1))
    assert kernels == [(3, 3)]


@pytest.mark.parametrize('padding', [{'padding': 'same'}, {'padding': 1, 'padding_mode': 'reflect'}])
def test_other_paddings_are_left_alone(padding):
    conv = nn.Conv2d(3, 3, 3, **padding)
    suit_small_maps(conv)
    assert type(conv) is nn.Conv2d


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_convnext', 'test_efficientnet', 'test_byobnet'])
def test_a_model_and_its_copies_learn_the_same(backbone):
    torch.manual_seed(0)
    model = timm.create_model('emoreg', backbone=backbone, num_classes=3).double()
    changed = copy.deepcopy(model)
    suit_small_maps(changed)
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
