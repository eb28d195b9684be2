"""Paired statistics of repeated runs: t interval, Holm's correction, McNemar's test."""
from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ['Difference', 'holm', 'mcnemar', 'mean_sd', 'paired_difference']


class Difference(NamedTuple):
    """Mean of `n` paired differences, their sd, the ends of its 95 % interval, and the p of a two-sided t test.

    What a number of pairs does not give is NaN: everything for none, all but the mean for one; and interval and p where
    all differences are equal, so that there is no variation to test against.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    p: float


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (divisor n - 1); NaN where there are too few values, or one is NaN."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    mean = statistics.mean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def _scipy_stats():
    try:
        from scipy import stats
    except ImportError:
        raise ImportError("The study's intervals and tests need scipy. "
                          "Install it with: pip install 'timm_emoreg[study]'") from None
    return stats


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Student's paired t test and the 95 % interval of the mean of ``ours - theirs``.

    Args:
        ours: One value per seed.
        theirs: The value of the same seed, at the same place.

    Raises:
        ValueError: If the two differ in length.
        ImportError: Without scipy.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    n, (mean, sd) = len(differences), mean_sd(differences)
    if n < 2 or math.isnan(mean):
        return Difference(n, mean, sd, math.nan, math.nan, math.nan)
    if sd <= 1e-12 * max(map(abs, (*ours, *theirs))):  # all equal, but for the rounding of each subtraction
        return Difference(n, mean, 0.0, math.nan, math.nan, math.nan)
    test = _scipy_stats().ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    return Difference(n, mean, sd, float(low), float(high), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) for a family of tests: adjusted p, in the order given.

    NaN stays NaN and does not count as a test.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def mcnemar(won: int, lost: int) -> float:
    """McNemar's exact test of two classifiers on the same images, two-sided p.

    Args:
        won: Number of images that only the first one has right.
        lost: Number of images that only the second one has right.

    Raises:
        ImportError: Without scipy.
    """
    if won + lost == 0:
        return 1.0
    return float(_scipy_stats().binomtest(won, won + lost).pvalue)
