"""Weights in 8 bits, for smaller files: what is loaded from them computes in floating point like any other.

A matrix or kernel w becomes int8 numbers q with a scale for each output channel, w ~ scale q, rounded to nearest in
[-127, 127] with scale = max |w| / 127 (symmetric, per channel: Krishnamoorthi 2018, arXiv 1806.08342, sections 2.2
and 3.1).
Everything else is kept in 16 bits: vectors, running statistics, position embeddings and tokens.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ['SCALE', 'eight_bit_layout', 'from_eight_bits', 'to_eight_bits']

SCALE = ':scale'  # after the name of a tensor, which never holds a colon, that of its scales (output channels,)
STEPS = 127


def _is_rounded(name: str, dimensions: int) -> bool:
    return name.endswith('.weight') and dimensions > 1


def eight_bit_layout(layout: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state in 8 bits, from those of the state."""
    scales = {name + SCALE: shape[:1] for name, shape in layout.items() if _is_rounded(name, len(shape))}
    return {**layout, **scales}


def to_eight_bits(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with its matrices and kernels in int8, their scales in float32, and the rest of it in float16, all
    contiguous, as safetensors wants it."""
    rounded = {}
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            rounded[name] = tensor.contiguous()
        elif not _is_rounded(name, tensor.ndim):
            rounded[name] = tensor.half().contiguous()
        else:
            rows = tensor.float().flatten(1)
            scale = rows.abs().amax(dim=1) / STEPS
            steps = rows / scale.masked_fill(scale == 0, 1)[:, None]  # a channel of zeros stays one
            rounded[name] = steps.round().to(torch.int8).view_as(tensor)
            rounded[name + SCALE] = scale
    return rounded


def from_eight_bits(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in floating point again, its matrices and kernels in float32; one that is not in 8 bits as it is."""
    state = {}
    for name, tensor in state_dict.items():
        if name.endswith(SCALE):
            continue
        scale = state_dict.get(name + SCALE)
        state[name] = tensor if scale is None else tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
    return state
