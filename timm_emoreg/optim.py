"""What timm's optimizers have no option for: a rate of their own for some parameters, the precision of Muon."""
from __future__ import annotations

from functools import partial

import torch
from timm.optim import muon
from torch.optim import Optimizer

from .emoreg import EmoReg

__all__ = ['orthogonalize_in_float32', 'scale_affect_lr']


def orthogonalize_in_float32(optimizer: Optimizer) -> None:
    """Let timm's Muon compute its Newton-Schulz iteration in float32; other optimizers stay as they are.

    timm computes it in bfloat16 (Jordan 2024, https://kellerjordan.github.io/posts/muon/), which is right for GPUs.
    Processors without 16-bit instructions emulate that: ``bench muon`` measured 28 times (vit_tiny) and 37 times
    (resnet18) as long as in float32. timm's function has the argument, its optimizer does not pass it on, so the
    function is replaced while this optimizer steps.
    """
    if not isinstance(optimizer, muon.Muon):
        return
    usual = muon.zeropower_via_newtonschulz

    def use(function) -> None:
        muon.zeropower_via_newtonschulz = function

    optimizer.register_step_pre_hook(lambda *_: use(partial(usual, dtype=torch.float32)))
    optimizer.register_step_post_hook(lambda *_: use(usual))


def scale_affect_lr(optimizer: Optimizer, model: EmoReg, scale: float) -> None:
    """Let affect response, modulation and balance learn at `scale` times the rate of everything else.

    Muon gives each matrix an update of full length, however small its gradient is. At its usual rate the valence of
    every image was seen to reach the end of tanh after three epochs (``hub_cards/WALK.md``), where the affective state
    tells nothing.

    Each group of the optimizer that holds some of them is split in two; the new one has timm's ``lr_scale``, by which
    timm's schedulers multiply the rate. Do it before the scheduler is created.

    Args:
        optimizer: An optimizer over the parameters of `model`, of any kind, whose groups may have scales already.
        model: The model, not wrapped.
        scale: A factor of at least 0; with 0 these parameters stay as they are.

    Raises:
        ValueError: If `scale` is negative.
    """
    if not scale >= 0:
        raise ValueError(f'scale={scale!r} is no factor of a learning rate: give 0 to leave the affect response as it '
                         'is, 1 for the rate of everything else, or what lies between them.')
    parts = (model.head_affect, model.modulation, model.regulation)
    own = {id(p) for part in parts if part is not None for p in part.parameters()}
    groups = []

    def part(group: dict, of_affect: bool) -> dict:
        chosen = [i for i, p in enumerate(group['params']) if (id(p) in own) == of_affect]
        lists = [k for k in ('params', 'param_names') if k in group]  # names, where the optimizer was given some
        return {**group, **{k: [group[k][i] for i in chosen] for k in lists}}

    for group in optimizer.param_groups:
        rest, affect = part(group, False), part(group, True)
        if rest['params']:
            groups.append(rest)
        if affect['params']:
            groups.append({**affect, 'lr_scale': scale * group.get('lr_scale', 1.0)})
    optimizer.param_groups[:] = groups
