"""The optimizer of each stage, and what timm's have no option for: a rate of some parameters, the precision of Muon."""
from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch
from timm.optim import get_optimizer_class, muon
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from ..emoreg import EmoReg

__all__ = ['MUON', 'base_optimizer', 'fuse_in_memory_order', 'fused_where_possible', 'orthogonalize_in_float32',
           'scale_affect_lr', 'usual_recipe']

# Three steps of Jordan's coefficients (github.com/KellerJordan/cifar10-airbench) take 3/5 of the time of timm's default
# five, and were better on validation data in the one short run tried.
MUON = {'ns_steps': 3, 'ns_coefficients': 'original', 'nesterov': True}
_FUSIBLE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # on CPUs as well as on GPUs


def base_optimizer(opt: str) -> str:
    """timm's name of an optimizer without that of its wrapper: sgd for lookahead_sgd."""
    return opt.split('_')[-1]


def usual_recipe(model: torch.nn.Module, task: str, opt: str | None, batch_size: int) -> dict[str, Any]:
    """What a stage is trained with where nothing else is asked for.

    Args:
        model: What is trained.
        task: 'affect', 'emoreg' or 'plain'.
        opt: timm's name of an optimizer that was asked for.
        batch_size: Images of an update.

    Returns:
        `opt`, `lr`, `weight_decay` and `opt_kwargs` of timm's ``create_optimizer_v2``.
    """
    # Short runs hardly start under SGD at the rates that suit long ones; AdamW and Muon learn at once. A ViT learned
    # stage 1 better with Muon, and ended stage 2 lower after it (hub_cards/study).
    opt = opt or ('adamw' if task == 'affect' else 'muon')
    base = base_optimizer(opt)
    if base in ('muon', 'nmuon'):
        # The length of Muon's updates depends neither on the gradient nor on the batch: 0.02 and 0.03 were best for
        # ResNet at 256 and 64 images. Without batch norm the length of the weights matters: ViT stood still at 0.02.
        lr = 0.02 if any(isinstance(m, _BatchNorm) for m in model.modules()) else 0.005
        return {'opt': opt, 'lr': lr, 'weight_decay': 0.01, 'opt_kwargs': dict(MUON)}
    is_sgd = any(name in base for name in ('sgd', 'momentum', 'nesterov'))  # timm has a dozen names for its kinds
    lr, weight_decay = (0.1, 5e-4) if is_sgd else (1e-3, 0.05)
    return {'opt': opt, 'lr': lr * batch_size / 128, 'weight_decay': weight_decay, 'opt_kwargs': {}}


def fused_where_possible(opt: str, device: torch.device, precision: str, opt_kwargs: dict[str, Any]) -> dict[str, Any]:
    """`opt_kwargs` with ``fused=True`` where torch can update all parameters in one pass and nothing else is asked for.

    The numbers are the same up to rounding. On a CPU torch's default is a slower loop over the parameters.

    Args:
        opt: timm's name of an optimizer.
        device: Where the parameters are.
        precision: What `choose_precision` gave. In float16 nothing changes: a gradient scaler may pass over the first
            update, after which torch 2.14's fused SGD takes momentum that was allocated and never written.
        opt_kwargs: What it is created with; ``fused``, ``foreach`` and ``differentiable`` in it stay as they are.
    """
    asked = any(name in opt_kwargs for name in ('fused', 'foreach', 'differentiable'))  # they exclude one another
    fusible = get_optimizer_class(base_optimizer(opt), bind_defaults=False) in _FUSIBLE
    fused = fusible and not asked and precision != 'float16' and device.type in ('cpu', 'cuda')
    return opt_kwargs | ({'fused': True} if fused else {})


class _InMemoryOrder(TorchFunctionMode):
    """Hand torch's fused updates their tensors with the dimensions in the order in which they lie in memory."""

    updates = (torch._fused_sgd_, torch._fused_adam_, torch._fused_adamw_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.updates:
            orders = [sorted(range(p.ndim), key=p.stride, reverse=True) for p in args[0]]
            args = [[t.permute(order) if t.ndim == len(order) else t  # else it is a count of steps
                     for t, order in zip(tensors, orders, strict=bool(tensors))] for tensors in args]
        return func(*args, **kwargs or {})


def fuse_in_memory_order(optimizer: Optimizer) -> None:
    """Let a fused update of parameters on a CPU take channels_last ones without a copy; others stay as they are.

    torch 2.14's kernels copy each gradient that is not contiguous, and do not use the copy: they go through parameter,
    gradient and averages in the order of memory, which is right where all have the same strides, as torch's backward
    sees to. Permuted, those in channels_last are contiguous, too.

    Args:
        optimizer: Of any kind; where its groups are not ``fused``, nothing changes.
    """
    optimizer = getattr(optimizer, '_base_optimizer', optimizer)  # within timm's Lookahead
    groups = optimizer.param_groups
    if not all(group.get('fused') and p.device.type == 'cpu' for group in groups for p in group['params']):
        return
    step = optimizer.step

    @wraps(step)
    def step_in_memory_order(*args, **kwargs):
        with _InMemoryOrder():
            return step(*args, **kwargs)

    optimizer.step = step_in_memory_order


def orthogonalize_in_float32(optimizer: Optimizer) -> None:
    """Let timm's Muon compute its Newton-Schulz iteration in float32; other optimizers stay as they are.

    timm computes it in bfloat16 (Jordan 2024, https://kellerjordan.github.io/posts/muon/), which is right for GPUs.
    Processors without 16-bit instructions emulate that: ``bench muon`` measured 28 times (vit_tiny) and 37 times
    (resnet18) as long as in float32. timm's function has the argument, its optimizer does not pass it on, so the
    function is replaced while this optimizer steps.
    """
    optimizer = getattr(optimizer, '_base_optimizer', optimizer)  # within timm's Lookahead
    if not isinstance(optimizer, muon.Muon):
        return
    step = optimizer.step

    @wraps(step)
    def step_in_float32(*args, **kwargs):
        usual = muon.zeropower_via_newtonschulz
        muon.zeropower_via_newtonschulz = partial(usual, dtype=torch.float32)
        try:
            return step(*args, **kwargs)
        finally:
            muon.zeropower_via_newtonschulz = usual

    optimizer.step = step_in_float32


def scale_affect_lr(optimizer: Optimizer, model: EmoReg, scale: float) -> None:
    """Let affect response, modulation and balance learn at `scale` times the rate of everything else.

    Muon gives each matrix an update of full length, however small its gradient is, and hands matrices with a side below
    4, as one valence or two ratings have, to NAdamW at the same rate, whose first steps are about ten times as long. At
    its usual rate the valence of every image was seen to reach the end of tanh after three epochs
    (``hub_cards/WALK.md``), where the affective state tells nothing.

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
