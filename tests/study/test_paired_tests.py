from __future__ import annotations

import builtins
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from timm_emoreg.study.paired_tests import holm, mcnemar, mean_sd, paired_difference

OURS, THEIRS = [67.3, 68.1, 66.0, 69.2, 67.7], [66.0, 67.9, 66.4, 67.0, 66.1]


@pytest.mark.parametrize(('n', 'quantile', 'p'), [  # of Student's t at 0.975, and p in closed form
    (2, 12.706204736, lambda t: 1 - 2 / math.pi * math.atan(t)),
    (5, 2.776445105, lambda t: 1 - 3 / 4 * t / (1 + t ** 2 / 4) ** 0.5 * (1 - t ** 2 / (1 + t ** 2 / 4) / 12)),
])
def test_the_interval_is_that_of_the_paired_t_test(n, quantile, p):
    found = paired_difference(OURS[:n], THEIRS[:n])
    differences = [a - b for a, b in zip(OURS[:n], THEIRS[:n], strict=True)]
    mean, sd = sum(differences) / n, stats.tstd(differences)
    error = sd / n ** 0.5
    assert (found.n, found.mean, found.sd) == pytest.approx((n, mean, sd))
    assert (found.low, found.high) == pytest.approx((mean - quantile * error, mean + quantile * error))
    assert found.p == pytest.approx(p(abs(mean) / error))


def test_too_few_pairs_give_no_interval():
    none, one = paired_difference([], []), paired_difference([3.0], [1.0])
    assert none.n == 0
    assert all(map(math.isnan, none[1:]))
    assert one[:2] == (1, 2.0)
    assert all(map(math.isnan, one[2:]))


@pytest.mark.parametrize(('ours', 'theirs'), [
    ([3.0, 4.0, 5.0], [2.0, 3.0, 4.0]),
    ([58.41, 57.30, 59.07], [57.67, 56.56, 58.33]),
    ([0.0, 0.0], [0.0, 0.0]),
])
def test_equal_differences_give_no_interval_and_no_p(ours, theirs):
    found = paired_difference(ours, theirs)
    assert found[:2] == pytest.approx((len(ours), ours[0] - theirs[0]), abs=1e-9)
    assert found.sd == 0
    assert all(map(math.isnan, found[3:]))


def test_small_differences_are_no_equal_ones():
    found = paired_difference([60.01, 60.02, 60.01], [60.0, 60.0, 60.0])
    assert found.sd == pytest.approx(0.00577, rel=1e-2)
    assert 0 < found.p < 0.1


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match='zip'):
        paired_difference([1.0, 2.0], [1.0])


def test_mean_and_sd():
    assert mean_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt(7 / 3)))
    assert all(map(math.isnan, mean_sd([])))


def test_a_value_that_is_not_finite_is_not_hidden():
    assert all(map(math.isnan, mean_sd([1.0, math.nan, 2.0])))
    d = paired_difference([1.0, math.nan], [0.0, 0.5])
    assert d.n == 2
    assert all(map(math.isnan, d[1:]))


def test_holm_by_hand():
    # sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, each at least the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_leaves_out_what_is_no_test():
    found = holm([0.01, math.nan, 0.03])
    assert math.isnan(found[1])
    assert [found[0], found[2]] == pytest.approx([0.02, 0.03])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_holm_keeps_order_and_lies_between_p_and_bonferroni(p):
    found = holm(p)
    assert all(a <= b <= min(1, a * len(p)) or b == pytest.approx(a) for a, b in zip(p, found, strict=True))
    ranked = sorted(range(len(p)), key=lambda i: p[i])
    assert all(found[i] <= found[j] for i, j in pairwise(ranked))


@pytest.mark.parametrize(('won', 'lost'), [(0, 0), (9, 2), (2, 9), (5, 5), (700, 640)])
def test_mcnemar_is_a_coin_on_the_images_that_differ(won, lost):
    expected = stats.binomtest(min(won, lost), won + lost).pvalue if won + lost else 1.0
    assert mcnemar(won, lost) == pytest.approx(expected)
    assert mcnemar(9, 2) == pytest.approx(2 * (1 + 11 + 55) / 2 ** 11)


def test_scipy_is_named_where_it_is_missing(monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith('scipy'):
            raise ImportError
        return real(name, *args)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match=r"pip install 'timm_emoreg\[study\]'"):
        mcnemar(1, 2)
