"""Reading the checkpoints that timm's CheckpointSaver writes."""
from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver

from ..files import replacing

__all__ = ['BEST', 'LAST', 'CheckpointError', 'judged_state', 'load_training_checkpoint', 'newest_checkpoint',
           'resume_saver']

BEST = 'model_best.pth.tar'
LAST = 'last.pth.tar'


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


def _reason(error: Exception) -> str:
    """The one line of an error of torch.load that says what is wrong."""
    text = str(error)
    if 'mmap can only be used' in text:  # what torch says of anything that is no zip file
        return 'damaged, or of another kind'
    if forbidden := re.search(r'GLOBAL (\S+)', text):
        return f'it holds a {forbidden[1]}, and only tensors and plain values are read'
    if type(error) in (RuntimeError, OSError, PermissionError, IsADirectoryError) and text:
        return text.splitlines()[0].split(' This is an internal')[0]
    return 'damaged, or of another kind'


def load_training_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """A training checkpoint (``last.pth.tar``, ``model_best.pth.tar``, ``recovery-*.pth.tar``), tensors on the CPU.

    Only tensors, plain containers and ``argparse.Namespace`` are unpickled.

    Args:
        path: The file.
        mmap: Leave the tensors in the file until they are used: cheap where only the other entries are wanted.

    Raises:
        CheckpointError: If the file is missing, damaged, or holds no ``state_dict``.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise CheckpointError(f'{path}: there is no such checkpoint. Give the folder of a run of train.py, or a '
                              f'{BEST} in it.') from None
    except Exception as e:  # damaged bytes make the unpickler raise nearly any type, KeyError and struct.error too
        raise CheckpointError(f'{path}: not a readable checkpoint ({_reason(e)}). '
                              'Use another one of the same folder, or train again.') from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('state_dict'), dict):
        raise CheckpointError(f"{path}: holds no 'state_dict', so it is no training checkpoint. Give "
                              'one that train.py wrote.')
    return checkpoint


def judged_state(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a training checkpoint on which its metric was measured: the averaged ones where there are some."""
    return checkpoint.get('state_dict_ema') or checkpoint['state_dict']


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The readable checkpoint of a run's folder from which training goes on furthest, None if there is none yet.

    The epoch in the file decides (``last``, written after epoch e, is older than ``recovery-<e + 1>-<step>``), not the
    time stamp, which copying changes. ``tmp.pth.tar`` counts where it is whole: a run killed while timm's saver
    replaced ``last`` leaves its latest state there, and may leave no ``last``.

    Raises:
        CheckpointError: If there are checkpoints, but all are damaged.
    """
    found, damaged = [], []
    for path in sorted(Path(folder).glob('*.pth.tar')):
        if path.name == 'recovery_tmp.pth.tar':  # half written, or about to get the name that tells its step
            continue
        try:
            epoch = load_training_checkpoint(path, mmap=True)['epoch']
        except (CheckpointError, KeyError):
            if path.name != 'tmp.pth.tar':
                damaged.append(path.name)
            continue
        recovery = re.fullmatch(r'recovery-\d+-(\d+)\.pth\.tar', path.name)
        position = (epoch, int(recovery[1])) if recovery else (epoch + 1, 0)
        found.append((position, path.name == LAST, path))
    if not found and damaged:
        raise CheckpointError(f'{folder}: none of its checkpoints can be read ({", ".join(damaged)}). Bring back a '
                              'copy of one, or remove this folder, and this stage begins anew, while finished ones '
                              'stay.')
    return max(found)[2] if found else None


def resume_saver(saver: CheckpointSaver, checkpoint: dict[str, Any]) -> None:
    """Let timm's saver go on from a checkpoint as if it had never stopped, also where it was killed between two writes.

    It writes ``tmp``, renames it ``last``, then writes ``checkpoint-<epoch>`` and ``model_best``, and only then counts
    the epoch as the best one. So what it remembers of the best epoch, which travels with ``last``, is older than
    ``last``, and ``model_best.pth.tar`` may be older than both.

    Args:
        saver: The saver of the folder that the checkpoint lies in.
        checkpoint: What ``load_training_checkpoint`` gave.
    """
    saver.load_state_dict(checkpoint['saver'])
    metric = checkpoint.get('metric')
    if metric is not None and (saver.best_metric is None or saver.cmp(metric, saver.best_metric)):
        saver.best_epoch, saver.best_metric = checkpoint['epoch'], metric
    if saver.best_epoch is None:
        return
    folder = Path(saver.checkpoint_dir)
    for name in (BEST, f'checkpoint-{saver.best_epoch}.pth.tar', LAST, 'tmp.pth.tar'):
        try:
            fits = load_training_checkpoint(folder / name).get('epoch') == saver.best_epoch
        except CheckpointError:
            continue
        if fits:
            if name != BEST:
                with replacing(folder / BEST) as part:
                    shutil.copyfile(folder / name, part)
            return
