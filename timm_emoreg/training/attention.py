"""Attention in training on a CPU: torch's fused kernel, or the plain formula where that is faster."""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..small_image import GRID
from .precision import autocast_in
from .probe import fastest

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


def _patches(model: nn.Module, img_size: int) -> int:
    """The number of patches of an image; for a net without patches what patches of 4 x 4 would come to."""
    known = [getattr(module, 'num_patches', None) for module in model.modules()]
    return max((number for number in known if isinstance(number, int)), default=(img_size // 4) ** 2)


def choose_attention(model: nn.Module, device: torch.device, precision: str, img_size: int) -> str | None:
    """``'plain'`` where that trains faster than ``'fused'``, by a probe of some milliseconds.

    In 16 bits the backward pass of torch's fused kernel for CPUs calls a matrix product for each small block, which
    can take longer than all the rest of a ViT. The plain formula keeps the attention weights of all layers, which are
    small for few patches only.

    Args:
        model: A timm model, wrapped or not.
        device: Where it runs; only a CPU is probed.
        precision: What `choose_precision` gave; in float32 the fused kernel stays.
        img_size: Side of the images.

    Returns:
        None for a model without attention of that kind; ``'plain'`` also for one that was built so
        (``TIMM_FUSED_ATTN=0``); ``'fused'`` without a probe on other devices, in float32, and for more than 8 x 8
        patches.
    """
    if not any(hasattr(module, 'fused_attn') for module in model.modules()):
        return None
    if not fused_attentions(model):
        return 'plain'
    if device.type != 'cpu' or precision == 'float32' or _patches(model, img_size) > GRID ** 2:
        return 'fused'
    # ones, because random numbers would be drawn from the stream of the caller
    q, k, v = (torch.ones(8, 3, GRID ** 2 + 1, 64, dtype=getattr(torch, precision), requires_grad=True)
               for _ in range(3))
    autocast = autocast_in(device, precision)
    return fastest({kind: partial(_train, q, k, v, autocast, kind == 'fused') for kind in ('fused', 'plain')})


def use_plain_attention(model: nn.Module) -> None:
    """Compute attention by timm's plain formula."""
    for module in fused_attentions(model):
        module.fused_attn = False
