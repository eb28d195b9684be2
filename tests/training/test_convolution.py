"""Convolutions without the weights that meet padding alone: the same numbers, of less work; no test measures time."""
from __future__ import annotations

import copy
from itertools import product

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import timm_emoreg  # noqa: F401  registers the models
from timm_emoreg.training.convolution import leave_out_padding, met_weights


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
    for padding, height, width in product((0, 1, 3), (1, 2, 4), (1, 2, 3)):
        conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups=2, dtype=torch.float64)
        x = torch.randn(2, 4, height, width, dtype=torch.float64, requires_grad=True)
        if min(height, width) + 2 * padding < dilation * (kernel - 1) + 1:
            continue  # torch refuses it
        expected = conv(x)
        gradients = torch.autograd.grad(expected.square().sum(), (x, *conv.parameters()))
        leave_out_padding(conv)
        found = conv(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), (x, *conv.parameters())), gradients)


def test_a_map_too_small_for_the_kernel_is_still_refused():
    conv = nn.Conv2d(3, 3, 5)
    leave_out_padding(conv)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        conv(torch.randn(1, 3, 2, 2))


def test_less_of_the_kernel_is_multiplied(monkeypatch):
    conv = nn.Conv2d(3, 3, 3, padding=1)
    leave_out_padding(conv)
    kernels, usual = [], F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda x, w, *rest: kernels.append(tuple(w.shape[-2:])) or usual(x, w, *rest))
    for height, width in ((1, 1), (1, 2), (2, 5), (3, 3)):
        assert conv(torch.randn(1, 3, height, width)).shape == (1, 3, height, width)
    assert kernels == [(1, 1), (1, 3), (3, 3), (3, 3)]


@pytest.mark.parametrize('padding', [{'padding': 'same'}, {'padding': 1, 'padding_mode': 'reflect'}])
def test_other_paddings_are_left_alone(padding):
    conv = nn.Conv2d(3, 3, 3, **padding)
    leave_out_padding(conv)
    assert type(conv) is nn.Conv2d


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_convnext', 'test_efficientnet', 'test_byobnet'])
def test_a_model_and_its_copies_learn_the_same(backbone):
    torch.manual_seed(0)
    model = timm.create_model('emoreg', backbone=backbone, num_classes=3).double()
    changed = copy.deepcopy(model)
    leave_out_padding(changed)
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
