"""Memory in gigabytes, of whatever unit the system counts in."""
import sys
from types import SimpleNamespace

import pytest
import torch

from timm_emoreg.training import peak_memory


@pytest.mark.parametrize(('system', 'counted'), [('linux', 2_000_000), ('darwin', 2_048_000_000)])
def test_the_peak_of_the_process_is_in_gigabytes(monkeypatch, system, counted):
    monkeypatch.setattr(peak_memory.resource, 'getrusage', lambda who: SimpleNamespace(ru_maxrss=counted))
    monkeypatch.setattr(sys, 'platform', system)
    assert peak_memory.peak_memory_gb(torch.device('cpu')) == pytest.approx(2.048)
