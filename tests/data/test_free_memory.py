"""Memory of the host, within the limits of the control groups of versions 1 and 2, on a made-up file system."""
from __future__ import annotations

import pytest

from timm_emoreg.data.free_memory import ASSUMED_FREE, free_host_memory

HAS = 5000 * 1024


@pytest.fixture
def machine(tmp_path):
    """Writes files of a machine that has 5,000 kB."""
    def write(**files):
        for name, text in {'proc/meminfo': 'MemFree: 10 kB\nMemAvailable:   5000 kB\n', **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return free_host_memory(tmp_path)
    return write


def test_without_limits(machine, tmp_path):
    assert free_host_memory(tmp_path) == ASSUMED_FREE  # no /proc: macOS
    assert machine(**{'proc/meminfo': 'MemTotal: 9000 kB\n'}) == ASSUMED_FREE
    assert machine() == HAS
    assert machine(**{'proc/self/cgroup': '0::/\n'}) == HAS
    assert machine(**{'proc/self/cgroup': 'nonsense\n'}) == HAS


@pytest.mark.parametrize(('limit', 'free'), [('max\n', HAS), ('4096\n', 3072), ('512\n', 0), (f'{10 ** 12}\n', HAS)])
def test_version_2_in_a_container(machine, limit, free):
    assert machine(**{'proc/self/cgroup': '0::/\n', 'sys/fs/cgroup/memory.max': limit,
                      'sys/fs/cgroup/memory.stat': 'anon 1024\nfile 3000\n'}) == free


def test_the_groups_above_limit_too(machine):
    job = {'proc/self/cgroup': '0::/slurm/job_7/step_0\n', 'sys/fs/cgroup/slurm/job_7/memory.max': '9000',
           'sys/fs/cgroup/slurm/job_7/memory.stat': 'anon 1000'}
    assert machine(**job) == 8000  # of the step nothing is known
    assert machine(**job, **{'sys/fs/cgroup/slurm/job_7/step_0/memory.max': '3000',
                             'sys/fs/cgroup/slurm/job_7/step_0/memory.stat': 'anon 1'}) == 2999


def test_version_1(machine):
    assert machine(**{'proc/self/cgroup': '5:devices:/\n4:cpu,memory:/docker/abc\n0::/\n',
                      'sys/fs/cgroup/memory/memory.limit_in_bytes': '4096',
                      'sys/fs/cgroup/memory/memory.stat': 'cache 9\nrss 1\ntotal_rss 96\n'}) == 4000
