"""One error for a name that is not among the known ones."""
from __future__ import annotations

import difflib
from collections.abc import Iterable

from .sets import DataError

__all__ = ['unknown_choice']


def unknown_choice(where: str, what: str, value: str, known: Iterable[str], remedy: str = '') -> DataError:
    """The error to raise for `value`: it lists the known names and the nearest one.

    Args:
        where: What the message starts with, such as a file and a line; may be empty.
        what: What the value should have named, such as ``'column'``.
        value: The unknown name.
        known: Every name that would have been right.
        remedy: A sentence to end with, where the list is not remedy enough.
    """
    known = list(known)
    near = difflib.get_close_matches(value.lower(), known, n=1)
    start = f'{where}: ' if where else ''
    parts = [f'{start}{what} {value[:80]!r} is unknown.', f'Known: {", ".join(map(repr, known))}.']
    if near:
        parts.append(f'Did you mean {near[0]!r}?')
    if remedy:
        parts.append(remedy)
    return DataError(' '.join(parts))
