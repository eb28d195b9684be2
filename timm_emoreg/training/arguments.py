"""Values on a command line that say what they should have been."""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from timm.utils import ParseKwargs

__all__ = ['NamedValues', 'above', 'at_least', 'compiler_backend', 'share', 'up_to', 'within']

LARGEST = 3.4e38  # that torch's 32-bit numbers hold


class NamedValues(ParseKwargs):
    """timm's action for ``name=value``, with an error for what has no ``=``."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if bare := next((value for value in values if value and '=' not in value), None):
            raise argparse.ArgumentError(self, f'expected name=value, got {bare}')
        super().__call__(parser, namespace, values, option_string)


def _number(text: str, kind: type, fits: Callable[[float], bool], expected: str):
    try:
        value = kind(text)
        if not (math.isfinite(value) and abs(value) < LARGEST and fits(value)):
            raise ValueError
    except (OverflowError, ValueError):
        raise argparse.ArgumentTypeError(f'expected {expected}, got {text[:40]}') from None
    return value


def at_least(least: int | float) -> Callable[[str], int | float]:
    """A type for argparse: finite numbers of `least` or more, whole ones where `least` is an int."""
    kind = type(least)
    noun = 'a whole number' if kind is int else 'a number'
    return lambda text: _number(text, kind, lambda value: value >= least, f'{noun}, {least} or more')


def above(bound: float) -> Callable[[str], float]:
    """A type for argparse: finite numbers above `bound`."""
    return lambda text: _number(text, float, lambda value: value > bound, f'a number above {bound:g}')


def share(text: str) -> float:
    """A type for argparse: numbers above 0, up to 1."""
    return _number(text, float, lambda value: 0 < value <= 1, 'a number above 0, up to 1')


def within(low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: numbers from `low` to below `high`."""
    return lambda text: _number(text, float, lambda value: low <= value < high,
                                f'a number from {low:g} to below {high:g}')


def up_to(high: float) -> Callable[[str], float]:
    """A type for argparse: numbers from 0 to `high`, both of them included."""
    return lambda text: _number(text, float, lambda value: 0 <= value <= high, f'a number from 0 to {high:g}')


def compiler_backend(text: str) -> str:
    """A type for argparse: the backends that torch.compile has here."""
    from torch.compiler import list_backends  # takes a second: only where one is named

    if text not in list_backends(exclude_tags=()):
        raise argparse.ArgumentTypeError(f'expected a backend of torch.compile ({", ".join(list_backends())}; eager or '
                                         f'aot_eager to compile no kernels), got {text[:40]}')
    return text
