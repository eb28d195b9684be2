"""Convolutions of small maps in training on a CPU: other ways to the same numbers, of less work or in less time."""
from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from .precision import autocast_in
from .probe import fastest

__all__ = ['choose_convolution', 'met_weights', 'suit_small_maps', 'use_columns']

_WIDE = 256  # outputs of a place, from which on the columns of its weights can be the faster way
_FEW = 16  # such a convolution has one place or fewer for so many outputs, 4 x 4 for 256


def _count(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Outputs along one side of a map."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def met_weights(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, int, int]:
    """Which weights of a kernel meet a map at all, along one side.

    The others are multiplied with zeros alone: of a 3x3 kernel with padding 1 on a map of 1 x 1 all but the middle one.

    Args:
        size: Side of the map; the rest as in torch's ``conv2d``.

    Returns:
        The first of these weights, the one after the last of them, and the padding with which the kernel that has only
        these gives the same as the whole one. Where there is no such padding, the whole kernel and its own.
    """
    count = _count(size, kernel, stride, padding, dilation)
    met = [i for i in range(kernel) if any(0 <= o * stride - padding + i * dilation < size for o in range(count))]
    if met:
        first, end = met[0], met[-1] + 1
        rest = padding - first * dilation
        if rest >= 0 and _count(size, end - first, stride, rest, dilation) == count:
            return first, end, rest
    return 0, kernel, padding


class _Grid(NamedTuple):
    """Outputs of a convolution of maps of one size."""

    size: tuple[int, int]  # of the map
    outputs: tuple[int, int]
    meets: tuple[tuple[tuple[slice, slice], tuple[slice, slice]], ...]  # of each output: weights, and places of the map


@lru_cache
def _grid(size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> _Grid:
    sides = []
    for n, k, step, pad in zip(size, kernel, stride, padding, strict=True):
        side = []
        for start in range(-pad, n + pad - k + 1, step):  # of the kernel on the map
            first, end = max(0, -start), min(k, n - start)
            end = max(first, end)  # an output of padding alone meets nothing
            side.append((slice(first, end), slice(start + first, start + end)))
        sides.append(side)
    meets = tuple(((top, left), (row, column)) for top, row in sides[0] for left, column in sides[1])
    return _Grid(size, (len(sides[0]), len(sides[1])), meets)


class _Matrix(torch.autograd.Function):
    """The weight of a convolution, O x I x kH x kW, as the matrix of a whole map: outputs * O x H * W * I.

    Its own function, as autograd would fill a gradient of the whole weight for each output and add them up.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, grid: _Grid) -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(weight)
        matrix = weight.new_zeros(len(grid.meets), len(weight), *grid.size, weight.shape[1])
        for block, (weights, places) in zip(matrix, grid.meets, strict=True):
            block[(slice(None), *places)] = weight[(..., *weights)].permute(0, 2, 3, 1)
        return matrix.flatten(2).flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        grid, (weight,) = ctx.grid, ctx.saved_tensors
        whole = torch.zeros_like(weight)  # in its memory format, so that torch takes it over without a copy
        blocks = gradient.reshape(len(grid.meets), len(weight), *grid.size, weight.shape[1])
        for block, (weights, places) in zip(blocks, grid.meets, strict=True):
            whole[(..., *weights)] += block[(slice(None), *places)].permute(0, 3, 1, 2)
        return whole, None


class _Columns(torch.autograd.Function):
    """What the kernel meets at each of its places, padding included: B, I, H, W to B * places, kH * kW * I (im2col).

    Its own function, as autograd would add up the gradients of overlapping places one number at a time.
    """

    @staticmethod
    def forward(ctx, maps: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
                places: tuple[int, int]) -> Tensor:
        ctx.shape, ctx.kernel, ctx.stride, ctx.padding, ctx.places = maps.shape, kernel, stride, padding, places
        (rows, columns), (down, right) = kernel, stride
        padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
        _, height, width, inputs = padded.shape
        row, run = width * inputs, columns * inputs  # a row of the kernel meets one run of memory
        met = padded.as_strided((len(maps), *places, rows, run), (height * row, down * row, right * inputs, row, 1))
        return met.reshape(-1, rows * run)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (count, inputs, height, width), (down, right), (above, left) = ctx.shape, ctx.stride, ctx.padding
        parts = gradient.reshape(count, *ctx.places, *ctx.kernel, inputs)
        padded = gradient.new_zeros(count, height + 2 * above, width + 2 * left, inputs)
        for i, j in product(*map(range, ctx.kernel)):
            met = padded[:, i:i + down * (ctx.places[0] - 1) + 1:down, j:j + right * (ctx.places[1] - 1) + 1:right]
            met += parts[:, :, :, i, j]
        whole = padded[:, above:above + height, left:left + width]
        return whole.permute(0, 3, 1, 2), None, None, None, None


def _convolve_columns(maps: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int],
                      padding: tuple[int, int], places: tuple[int, int]) -> Tensor:
    columns = _Columns.apply(maps, tuple(weight.shape[2:]), stride, padding, places)
    outputs = F.linear(columns, weight.permute(0, 2, 3, 1).flatten(1), bias)
    return outputs.view(len(maps), *places, len(weight)).permute(0, 3, 1, 2)


class _Conv2d(nn.Conv2d):
    """torch's convolution; of maps smaller than the kernel as one multiplication, or without the weights that meet
    padding alone; of other small maps by their columns, where that is switched on."""

    columns = False

    @property
    def suits_columns(self) -> bool:
        return (self.groups == 1 and self.dilation == (1, 1) and self.kernel_size != (1, 1)
                and self.out_channels >= _WIDE)

    def is_matrix(self, size: tuple[int, int]) -> bool:
        """Whether a map of that size is multiplied as a whole: with one weight for each pair of a place and an output
        there is no more to multiply than with the kernel."""
        return (self.groups == 1 and self.dilation == (1, 1)
                and (prod(size) == 1 or prod(size) < prod(self.kernel_size)))

    def few_places(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Places of the kernel on a map of that size, if its columns are worth a trial; None if not."""
        if not self.suits_columns or self.is_matrix(size):
            return None
        places = tuple(map(_count, size, self.kernel_size, self.stride, self.padding))
        return places if min(places) > 0 and prod(places) * _FEW <= self.out_channels else None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():  # to compile what builds the matrices took minutes
            return super()._conv_forward(input, weight, bias)
        size, kernel = tuple(input.shape[-2:]), self.kernel_size
        if self.is_matrix(size):
            grid = _grid(size, kernel, self.stride, self.padding)
            if prod(grid.outputs):
                pointwise = kernel == (1, 1) and self.padding == (0, 0)  # of one place, so the weight is the matrix
                matrix = weight.flatten(1) if pointwise else _Matrix.apply(weight, grid)
                bias = None if bias is None else bias.repeat(len(grid.meets))
                outputs = F.linear(input.permute(0, 2, 3, 1).flatten(1), matrix, bias)
                return outputs.view(len(outputs), *grid.outputs, len(weight)).permute(0, 3, 1, 2)
        if self.columns and (places := self.few_places(size)):
            return _convolve_columns(input, weight, bias, self.stride, self.padding, places)
        if all(side >= k for side, k in zip(size, kernel, strict=True)):
            return super()._conv_forward(input, weight, bias)  # such a map meets all of it, unless it is dilated
        (top, bottom, rows), (left, right, columns) = map(
            met_weights, size, kernel, self.stride, self.padding, self.dilation)
        return F.conv2d(input, weight[..., top:bottom, left:right], bias, self.stride, (rows, columns), self.dilation,
                        self.groups)


def suit_small_maps(model: nn.Module) -> None:
    """Compute the convolutions of `model` on maps that are smaller than the kernel with less work.

    On images of 32 px the last maps of nets that were drawn for 224 px have a side of 1 or 2, so that most of a kernel
    meets padding. Such a map as a whole is multiplied with one matrix; where the convolution is grouped or dilated,
    what meets padding alone is left out. Outputs and gradients are the same up to rounding.

    Args:
        model: Its modules of exactly torch's ``nn.Conv2d``, padded with zeros, are changed in place; their parameters,
            names and the state dict stay as they are.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == 'zeros' and not isinstance(module.padding, str):
            module.__class__ = _Conv2d  # a replaced forward would still belong to this module in a copy of it


def _train(maps: Tensor, conv: nn.Module, autocast) -> tuple[Tensor, ...]:
    """Forward and backward pass."""
    with autocast():
        out = conv(maps)
    return torch.autograd.grad(out.sum(), (maps, conv.weight))


@torch.no_grad()
def _has_few_places(model: nn.Module, device: torch.device, img_size: int) -> bool:
    """Whether a wide convolution meets a map so small that its columns are worth a trial, seen in a forward pass."""
    wide = [module for module in model.modules() if isinstance(module, _Conv2d) and module.suits_columns]
    found = []
    hooks = [module.register_forward_pre_hook(lambda module, args: found.append(module.few_places(args[0].shape[-2:])))
             for module in wide]
    try:
        if wide:
            model.eval()(torch.zeros(1, 3, img_size, img_size, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return any(found)


def choose_convolution(model: nn.Module, device: torch.device, precision: str,
                       img_sizes: Iterable[int]) -> str | None:
    """``'columns'`` where wide convolutions of small maps train faster so than by torch, by a short probe.

    In 16 bits the backward pass of torch's convolution on CPUs can take several times as long as the same numbers of
    multiplications in one product of matrices, for which what the kernel meets is first copied side by side. For larger
    maps and fewer outputs the copies cost more than that.

    Args:
        model: A model after `suit_small_maps`, on `device`; it is in evaluation mode afterwards if it was looked at.
        device: Where it runs; only a CPU is probed.
        precision: What `choose_precision` gave; in float32 torch's way stays.
        img_sizes: Sides of the images that it is trained on.

    Returns:
        ``'columns'`` or ``'torch'``; None, without a probe, on other devices, in float32, and for a model that has no
        convolution of 256 outputs or more on such small maps.
    """
    if device.type != 'cpu' or precision == 'float32' or not any(
            _has_few_places(model, device, size) for size in img_sizes):
        return None
    # the narrowest convolution and its largest map; ones, because random numbers would be drawn from the stream of the
    # caller
    ways = {}
    for name in ('torch', 'columns'):
        conv = skip_init(nn.Conv2d, _WIDE, _WIDE, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
        nn.init.ones_(conv.weight)
        suit_small_maps(conv)
        conv.columns = name == 'columns'
        maps = torch.ones(8, _WIDE, 4, 4, dtype=getattr(torch, precision)).to(memory_format=torch.channels_last)
        ways[name] = partial(_train, maps.requires_grad_(), conv, autocast_in(device, precision))
    return fastest(ways)


def use_columns(model: nn.Module) -> None:
    """Compute wide convolutions of small maps by their columns, in a model after `suit_small_maps`."""
    for module in model.modules():
        if isinstance(module, _Conv2d):
            module.columns = True
