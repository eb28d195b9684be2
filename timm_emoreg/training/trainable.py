"""Whether a model can be trained on images of a size and in steps of a length, seen before anything is trained."""
from __future__ import annotations

from copy import deepcopy

import torch
from safetensors import SafetensorError
from torch import nn

__all__ = ['BUILD_ERRORS', 'DAMAGED_WEIGHTS', 'DEVICE_ERRORS', 'ModelError', 'brief', 'check_takes', 'check_takes_one',
           'is_damaged', 'lacks_memory', 'reason_of']


# what timm's families raise for arguments and image sizes that they do not take
BUILD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# what readers of weights raise for a file that is cut off or empty, beside a RuntimeError
DAMAGED_WEIGHTS = (EOFError, SafetensorError)

# what is no fault of the settings that are tried; both are RuntimeErrors
DEVICE_ERRORS = (torch.AcceleratorError, torch.OutOfMemoryError)


def is_damaged(error: Exception) -> bool:
    """Whether a file of weights could not be read; of its own format torch, and timm for it, say so in a
    RuntimeError."""
    told = 'PytorchStreamReader' in str(error) or 'weights_only=True blocked' in str(error)
    return isinstance(error, DAMAGED_WEIGHTS) or told


def lacks_memory(error: Exception) -> bool:
    """Whether a device, or the machine, had no memory left; of a CPU torch says so in a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


class ModelError(ValueError):
    """Settings under which the model cannot be built or trained."""


def reason_of(error: Exception) -> str:
    """The first line of a message, or the error's type: an assertion may have none."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip('.')


def brief(error: Exception) -> str:
    """The first sentence of a message, cut where it is long: torch lists all that it was built for in one line."""
    text = reason_of(error).split('. ')[0]
    return text if len(text) <= 160 else f'{text[:159]}…'


@torch.no_grad()
def check_takes(model: nn.Module, name: str, flag: str, size: int, device: torch.device) -> None:
    """Refuse a size of images at which the model's layers leave nothing to pool.

    Args:
        model: On `device`; it is in evaluation mode afterwards.
        name: What the user calls it.
        flag: The flag that gave the size.
        size: Side of the images in pixels.
        device: Where the model is.

    Raises:
        ModelError: If the model does not take them.
    """
    try:
        model.eval()(torch.zeros(1, 3, size, size, device=device))
    except DEVICE_ERRORS:
        raise
    except BUILD_ERRORS as e:
        if lacks_memory(e):
            raise
        raise ModelError(f'{flag} {size}: {name} takes no images of that size ({reason_of(e)}). Use a larger one, or '
                         'leave it out.') from e


@torch.no_grad()
def check_takes_one(model: nn.Module, name: str, size: int, device: torch.device) -> None:
    """Refuse steps of one image for a model whose batch norm would have a single value a channel to normalise by.

    The arguments are those of `check_takes`.

    Raises:
        ModelError: If it has.
    """
    try:
        deepcopy(model).train()(torch.zeros(1, 3, size, size, device=device))  # its running statistics change
    except ValueError as e:
        raise ModelError(f'--batch-size: leaves one image a step, and batch norm of {name} has one value a channel '
                         f'there ({reason_of(e)}). Use a larger one.') from e
