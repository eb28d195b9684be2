"""Numbers on a command line that say what they should have been."""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable

__all__ = ['above', 'at_least', 'within']


def _number(text: str, kind: type, fits: Callable[[float], bool], expected: str):
    try:
        value = kind(text)
        if not (math.isfinite(value) and fits(value)):
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


def within(low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: numbers from `low` to below `high`."""
    return lambda text: _number(text, float, lambda value: low <= value < high,
                                f'a number from {low:g} to below {high:g}')
