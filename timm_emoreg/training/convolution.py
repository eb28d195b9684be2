"""Convolutions in training on a CPU: weights that meet padding alone, on maps smaller than the kernel, are left out."""
from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ['leave_out_padding', 'met_weights']


def met_weights(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, int, int]:
    """Which weights of a kernel meet a map at all, along one side.

    The others are multiplied with zeros alone: of a 3x3 kernel with padding 1 on a map of 1 x 1 all but the middle one.

    Args:
        size: Side of the map; the rest as in torch's ``conv2d``.

    Returns:
        The first of these weights, the one after the last of them, and the padding with which the kernel that has only
        these gives the same as the whole one. Where there is no such padding, the whole kernel and its own.
    """
    count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1  # of outputs
    met = [i for i in range(kernel) if any(0 <= o * stride - padding + i * dilation < size for o in range(count))]
    if met:
        first, end = met[0], met[-1] + 1
        rest = padding - first * dilation
        if rest >= 0 and (size + 2 * rest - dilation * (end - first - 1) - 1) // stride + 1 == count:
            return first, end, rest
    return 0, kernel, padding


class _Conv2d(nn.Conv2d):
    """torch's convolution, without the weights that meet padding alone."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sides = tuple(input.shape[-2:])
        if all(side >= kernel for side, kernel in zip(sides, self.kernel_size, strict=True)):
            return super()._conv_forward(input, weight, bias)  # such a map meets all of it, unless it is dilated
        (top, bottom, rows), (left, right, columns) = map(
            met_weights, sides, self.kernel_size, self.stride, self.padding, self.dilation)
        return F.conv2d(input, weight[..., top:bottom, left:right], bias, self.stride, (rows, columns), self.dilation,
                        self.groups)


def leave_out_padding(model: nn.Module) -> None:
    """Compute the convolutions of `model` without the weights that meet padding alone.

    Outputs and gradients are the same up to rounding; such a weight has a gradient of zero either way. On images of
    32 px the last maps of nets that were drawn for 224 px have a side of 1 or 2.

    Args:
        model: Its modules of exactly torch's ``nn.Conv2d``, padded with zeros, are changed in place; their parameters,
            names and the state dict stay as they are.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == 'zeros' and not isinstance(module.padding, str):
            module.__class__ = _Conv2d  # a replaced forward would still belong to this module in a copy of it
