"""Attention in training on a CPU: torch's fused kernel, or the plain formula where that is faster."""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .precision import autocast_in
from .probe import fastest
from .small_image import LARGEST_SIZE

__all__ = ['choose_attention', 'fused_attentions', 'use_plain_attention']


def fused_attentions(model: nn.Module) -> list[nn.Module]:
    """The modules of timm that compute attention by torch's fused kernel."""
    return [module for module in model.modules() if getattr(module, 'fused_attn', False)]


def _train(q: Tensor, k: Tensor, v: Tensor, autocast, fused: bool) -> tuple[Tensor, ...]:
    """Forward and backward pass of attention on (B, heads, N, head size), plain as timm writes it."""
    with autocast():
        if fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return torch.autograd.grad(out.sum(), (q, k, v))


def choose_attention(device: torch.device, precision: str, img_size: int) -> str:
    """``'plain'`` where that trains faster than ``'fused'``, by a probe of some milliseconds on a few small images.

    In 16 bits the backward pass of torch's fused kernel for CPUs calls a matrix product for each small block, which
    can take longer than all the rest of a ViT. The plain formula keeps the attention weights of all layers, which are
    small for small images only.

    Args:
        device: Where the model runs; only a CPU is probed.
        precision: What `choose_precision` gave; in float32 the fused kernel stays.
        img_size: Side of the images; beyond `LARGEST_SIZE` the fused kernel stays.
    """
    if device.type != 'cpu' or precision == 'float32' or img_size > LARGEST_SIZE:
        return 'fused'
    # ones, because random numbers would be drawn from the stream of the caller
    q, k, v = (torch.ones(8, 3, 65, 64, dtype=getattr(torch, precision), requires_grad=True) for _ in range(3))
    autocast = autocast_in(device, precision)
    return fastest({kind: partial(_train, q, k, v, autocast, kind == 'fused') for kind in ('fused', 'plain')})


def use_plain_attention(model: nn.Module) -> None:
    """Compute attention by timm's plain formula."""
    for module in fused_attentions(model):
        module.fused_attn = False
