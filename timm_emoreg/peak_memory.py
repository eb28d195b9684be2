"""The most memory that a process has taken."""
from __future__ import annotations

import sys

import torch

__all__ = ['peak_memory_gb']


def peak_memory_gb(device: torch.device) -> float | None:
    """GiB of tensors on a GPU since torch's peak was reset, else of the whole process; None where no system tells."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == 'darwin' else peak / 2**20  # macOS counts bytes, Linux kilobytes
