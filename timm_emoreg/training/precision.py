"""16-bit autocast where the processor gains from it."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from .probe import fastest

__all__ = ['autocast_in', 'choose_precision', 'emulates_bfloat16', 'faster_in']


def faster_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a convolution runs faster in `dtype` than in float32 on `device`, by a probe of some milliseconds.

    Processors without 16-bit instructions emulate them, many times slower; a list of names could not keep up.
    """
    # ones, because random numbers would be drawn from the stream of the caller
    operands = {kind: [torch.ones(shape, device=device).to(kind, memory_format=torch.channels_last)
                       for shape in ((2, 64, 32, 32), (64, 64, 3, 3))]
                for kind in (torch.float32, dtype)}
    # float32 first: 16 bits must gain something
    return fastest({kind: partial(torch.nn.functional.conv2d, *pair) for kind, pair in operands.items()}) == dtype


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether `device` is an NVIDIA GPU before Ampere: torch computes bfloat16 there without its units for 16 bits, and
    cuDNN has no convolutions in it; float16 has both."""
    return device.type == 'cuda' and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)


def choose_precision(device: torch.device, dtype: str | None) -> str:
    """The type to train in: ``'bfloat16'``, ``'float16'`` or ``'float32'``.

    Args:
        device: Where the model runs.
        dtype: ``'bfloat16'``, ``'float16'``, or None for float32. On a CPU it is taken only where it is faster; on a
            GPU that has no bfloat16, float16 is taken in its place.
    """
    if dtype == 'bfloat16' and emulates_bfloat16(device):
        return 'float16'
    if dtype is None or (device.type == 'cpu' and not faster_in(getattr(torch, dtype), device)):
        return 'float32'
    return dtype


def autocast_in(device: torch.device, precision: str) -> Callable[[], AbstractContextManager]:
    """A factory of autocast contexts for what `choose_precision` gave."""
    if precision == 'float32':
        return nullcontext
    return partial(torch.autocast, device.type, dtype=getattr(torch, precision))
