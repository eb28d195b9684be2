"""Whether 16-bit autocast is used, and the probe that decides it; no test measures time."""
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from timm_emoreg.training import precision, probe
from timm_emoreg.training.precision import autocast_in, choose_precision, faster_in

CPU = torch.device('cpu')


def answer(context):
    """The type that a linear layer answers in."""
    with context():
        return torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype


@pytest.mark.parametrize(('dtype', 'faster', 'chosen'), [
    (None, True, 'float32'), ('bfloat16', True, 'bfloat16'), ('float16', True, 'float16'),
    ('bfloat16', False, 'float32'),
])
def test_16_bits_where_they_are_asked_for_and_faster(monkeypatch, dtype, faster, chosen):
    asked = []
    monkeypatch.setattr(precision, 'faster_in', lambda *args: asked.append(args) or faster)
    assert choose_precision(CPU, dtype) == chosen
    assert asked == ([] if dtype is None else [(getattr(torch, dtype), CPU)])


@pytest.mark.parametrize(('capability', 'hip', 'asked', 'chosen'), [
    ((9, 0), None, 'bfloat16', 'bfloat16'), ((8, 0), None, 'bfloat16', 'bfloat16'),
    ((7, 5), None, 'bfloat16', 'float16'), ((7, 5), None, None, 'float32'),
    ((9, 0), None, 'float16', 'float16'), ((7, 5), '6.2', 'bfloat16', 'bfloat16'),
])
def test_a_gpu_is_not_probed_but_asked_for_bfloat16(monkeypatch, capability, hip, asked, chosen):
    monkeypatch.setattr(precision, 'faster_in', lambda dtype, device: pytest.fail('probed'))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.version, 'hip', hip)
    assert choose_precision(torch.device('cuda'), asked) == chosen


@pytest.mark.parametrize('name', ['float32', 'bfloat16', 'float16'])
def test_a_context_for_each_step(name):
    context = autocast_in(CPU, name)
    for _ in range(2):
        assert answer(context) == getattr(torch, name)
    assert answer(nullcontext) == torch.float32


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
    monkeypatch.setattr(probe, 'time', SimpleNamespace(perf_counter=lambda: now))
    assert faster_in(torch.bfloat16, CPU) is faster
    assert not any(left.values())


def test_the_probe_draws_no_random_numbers():
    before = torch.get_rng_state()
    faster_in(torch.bfloat16, CPU)
    assert torch.equal(torch.get_rng_state(), before)
