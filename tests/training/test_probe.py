"""The probe by an injected clock; tests/test_precision.py and tests/test_attention.py have what is probed."""
from types import SimpleNamespace

import pytest
import torch

from timm_emoreg.training import probe
from timm_emoreg.training.probe import fastest


def way(monkeypatch, now, seconds):
    """A function that takes these seconds, one after the other, by the clock of the probe."""
    monkeypatch.setattr(probe, 'time', SimpleNamespace(perf_counter=lambda: now[0]))

    def run():
        assert torch.get_num_threads() == 1
        now[0] += next(seconds)
    return run


@pytest.mark.parametrize(('first', 'second', 'winner'), [
    ([2.0] * 10, [1.0] * 10, 'second'), ([1.0] * 10, [1.0] * 10, 'first'),
    ([2.0] * 10, [9.0] * 5 + [1.0] + [9.0] * 4, 'second'),  # the best of each counts
])
def test_the_shortest_of_ten_decides_and_of_equal_ones_the_first(monkeypatch, first, second, winner):
    now, threads = [0.0], torch.get_num_threads()
    ways = {name: way(monkeypatch, now, iter(seconds)) for name, seconds in (('first', first), ('second', second))}
    assert fastest(ways) == winner
    assert torch.get_num_threads() == threads


def test_the_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            fastest({'broken': lambda: 1 / 0})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
