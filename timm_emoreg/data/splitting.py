"""Fixed splits: stratified by class, or whole groups on one side."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ['group_split', 'stratified_split']


def stratified_split(labels: Sequence[int] | np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices so that each class gives the same share to the second part.

    Args:
        labels: Class of each sample, shape (N,).
        held_out: Share of each class in the second part, between 0 and 1; rounded, at least 1 of each class
            that has 2 or more samples.
        seed: Seed of the choice; equal arguments give equal splits on every machine.

    Returns:
        Two sorted index arrays, disjoint, together 0..N-1.
    """
    labels = np.asarray(labels)
    rng = np.random.RandomState(seed)  # the legacy generator's stream is frozen by NumPy's compatibility policy
    second = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(held_out * len(members)), 1), len(members) - 1)
        second.append(rng.permutation(members)[:count])
    second = np.sort(np.concatenate(second))
    return np.setdiff1d(np.arange(len(labels)), second), second


def group_split(groups: Sequence, shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Split indices so that all members of a group land in the same part.

    Args:
        groups: Group of each sample, shape (N,), any values that sort.
        shares: Share of the groups in each part; they sum to 1.
        seed: Seed of the choice; equal arguments give equal splits on every machine.

    Returns:
        One sorted index array a part, disjoint, together 0..N-1.
    """
    groups = np.asarray(groups)
    names = np.random.RandomState(seed).permutation(np.unique(groups))
    cuts = np.round(np.cumsum(shares)[:-1] * len(names)).astype(int)
    return [np.flatnonzero(np.isin(groups, part)) for part in np.split(names, cuts)]
