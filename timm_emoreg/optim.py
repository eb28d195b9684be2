"""A learning rate of their own for the parameters through which the affective state acts."""
from __future__ import annotations

from torch.optim import Optimizer

from .emoreg import EmoReg

__all__ = ['scale_affect_lr']


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
    for group in optimizer.param_groups:
        affect = [p for p in group['params'] if id(p) in own]
        if rest := [p for p in group['params'] if id(p) not in own]:
            groups.append({**group, 'params': rest})
        if affect:
            groups.append({**group, 'params': affect, 'lr_scale': scale * group.get('lr_scale', 1.0)})
    optimizer.param_groups[:] = groups
