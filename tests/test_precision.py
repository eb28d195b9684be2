"""Whether 16-bit autocast is used, and the probe that decides it; no test measures time."""
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from timm_emoreg import precision
from timm_emoreg.precision import autocast_or_not, faster_in

CPU = torch.device('cpu')


def answer(context):
    """The type that a linear layer answers in."""
    with context():
        return torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype


@pytest.mark.parametrize('faster', [True, False])
def test_no_type_asked_for(monkeypatch, faster):
    monkeypatch.setattr(precision, 'faster_in', lambda dtype, device: faster)
    context, name = autocast_or_not(CPU, None)
    assert (context, name) == (nullcontext, 'float32')
    assert answer(context) == torch.float32


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_autocast_where_it_is_faster(monkeypatch, dtype):
    asked = []
    monkeypatch.setattr(precision, 'faster_in', lambda *args: asked.append(args) or True)
    context, name = autocast_or_not(CPU, dtype)
    assert name == dtype
    for _ in range(2):  # a factory, so that each step has a context of its own
        assert answer(context) == getattr(torch, dtype)
    assert asked == [(getattr(torch, dtype), CPU)]
    assert answer(nullcontext) == torch.float32


def test_no_autocast_where_it_is_slower(monkeypatch):
    monkeypatch.setattr(precision, 'faster_in', lambda dtype, device: False)
    context, name = autocast_or_not(CPU, 'bfloat16')
    assert (context, name) == (nullcontext, 'float32')
    assert answer(context) == torch.float32


def test_a_gpu_is_not_probed(monkeypatch):
    monkeypatch.setattr(precision, 'faster_in', lambda dtype, device: pytest.fail('probed'))
    assert autocast_or_not(torch.device('cuda'), 'float16')[1] == 'float16'


@pytest.mark.parametrize(('seconds', 'faster'), [
    ({torch.float32: [2.0] * 10, torch.bfloat16: [1.0] * 10}, True),
    ({torch.float32: [1.0] * 10, torch.bfloat16: [2.0] * 10}, False),
    ({torch.float32: [2.0] * 10, torch.bfloat16: [9.0] * 4 + [1.0] + [9.0] * 5}, True),  # the best of each counts
    ({torch.float32: [1.0] * 10, torch.bfloat16: [1.0] * 10}, False),  # 16 bits must gain something
])
def test_the_probe_compares_the_best_of_each_type(monkeypatch, seconds, faster):
    now = 0.0
    left = {dtype: list(durations) for dtype, durations in seconds.items()}

    def conv2d(images, weight):
        nonlocal now
        assert images.dtype == weight.dtype
        now += left[images.dtype].pop(0)

    monkeypatch.setattr(torch.nn.functional, 'conv2d', conv2d)
    monkeypatch.setattr(precision, 'time', SimpleNamespace(perf_counter=lambda: now))
    assert faster_in(torch.bfloat16, CPU) is faster
    assert not any(left.values())


def test_the_probe_draws_no_random_numbers():
    before = torch.get_rng_state()
    assert faster_in(torch.bfloat16, CPU) in (True, False)
    assert torch.equal(torch.get_rng_state(), before)
