"""The most memory that a process has taken."""
from __future__ import annotations

import resource
import sys

import torch

__all__ = ['peak_memory_gb']


def peak_memory_gb(device: torch.device) -> float:
    """GiB of tensors on a GPU since torch's peak was reset, else of the whole process since its start."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == 'darwin' else peak / 2**20  # macOS counts bytes, Linux kilobytes
