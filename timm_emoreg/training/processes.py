"""Several training processes that act as one: they find each other, agree to stop, and average what they log."""
from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from timm.utils import init_distributed_device, is_primary, reduce_tensor
from timm.utils.distributed import is_distributed_env
from torch import Tensor

from .trainable import brief

__all__ = ['LaunchError', 'asked_to_stop', 'decided_by_primary', 'join_processes', 'lost_another',
           'mean_over_processes']


class LaunchError(ValueError):
    """An environment that names several processes which cannot work together as asked."""


def join_processes(args: Namespace) -> torch.device:
    """The device of this process, which joins the others where torchrun, SLURM or MPI started several."""
    if args.sync_bn and is_distributed_env() and torch.device(args.device).type == 'cpu':
        raise LaunchError('--sync-bn needs GPUs, torch has no such layer for the CPU. Leave it out, or choose a model '
                          'without batch norm, such as emoreg_vit_tiny.')
    if 'SLURM_PROCID' in os.environ and torch.cuda.device_count() == 1:
        os.environ['LOCAL_RANK'] = '0'  # as with --gpus-per-task=1: each task sees its own GPU only, timm counts on all
    try:
        device = init_distributed_device(args)
        torch.zeros(1, device=device).item()  # which a device without numbers, meta, does not give
    except (ValueError, torch.distributed.DistError) as e:
        raise LaunchError(f'the processes cannot find each other ({str(e).splitlines()[0]}). Start them with torchrun, '
                          'or set MASTER_ADDR and MASTER_PORT, the same for all, beside what SLURM or MPI sets.') from e
    except (AssertionError, RuntimeError) as e:
        raise LaunchError(f'--device {args.device}: torch cannot compute there ({brief(e)}). Choose '
                          'another one, or install a torch for it.') from e
    # it may hold the second in which a process started
    args.experiment = decided_by_primary(lambda: args.experiment, args)
    return device


def decided_by_primary(decide: Callable[[], Any], args: Namespace) -> Any:
    """What the first process decides, for all of them.

    Args:
        decide: Called in the first process only; what it gives is pickled.
        args: Those that `join_processes` completed.
    """
    decided = [decide() if is_primary(args) else None]
    if args.distributed:
        torch.distributed.broadcast_object_list(decided)
    return decided[0]


_asked: list[Callable[[], int]] = []  # for what the processes said when they asked each other last


def _fetch(number: Tensor) -> Callable[[], int]:
    """Starts to fetch a number from a device; what it returns gives it, and waits for no work that was queued later."""
    if number.device.type != 'cuda':
        return lambda: int(number)
    here = torch.empty_like(number, device='cpu', pin_memory=True)
    here.copy_(number, non_blocking=True)
    fetched = torch.cuda.Event()
    fetched.record()

    def get() -> int:
        fetched.synchronize()  # int(number) would wait for all of the stream
        return int(here)

    return get


def asked_to_stop(args: Namespace, received: list[int]) -> bool:
    """Whether a signal has arrived in any process. All get the same answer, so they all stop at the same update.

    Several processes get the answer to the question before this one: that has been exchanged, where this one would wait
    for all the work that is queued on a GPU.

    Args:
        args: Those that `join_processes` completed.
        received: Signals of this process; one of another process is added where there is none.
    """
    if not args.distributed:
        return bool(received)
    number = torch.full((), received[0] if received else 0, device=args.device)  # filled there: no copy to wait for
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    _asked.append(_fetch(number))
    answer = _asked.pop(0)() if len(_asked) > 1 else 0
    if answer and not received:
        received.append(answer)
    return bool(answer)


def mean_over_processes(sums: dict[str, Tensor], args: Namespace) -> dict[str, float]:
    """The mean of each value over the processes."""
    names = sorted(sums)
    values = torch.stack([sums[name] for name in names])
    if args.distributed:
        values = reduce_tensor(values, args.world_size)
    return dict(zip(names, values.tolist(), strict=True))


def lost_another(error: Exception) -> bool:
    """Whether an error says that another process has ended; those of gloo have no type of their own."""
    return isinstance(error, torch.distributed.DistError) or 'gloo' in str(error)
