"""The most memory that a process has taken."""
from __future__ import annotations

import resource
import sys

import torch

__all__ = ['peak_memory_gb']


def peak_memory_gb(device: torch.device) -> float:
    """Gigabytes (1e9 bytes): of tensors on a GPU since torch's peak was reset, else of the whole process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == 'darwin' else 1024) / 1e9  # macOS counts bytes, Linux kibibytes
