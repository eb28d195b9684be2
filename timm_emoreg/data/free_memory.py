"""How much memory of the host a process may still take."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ['free_host_memory']

ASSUMED_FREE = 4 * 2 ** 30  # where the system does not tell: what any machine that trains has


def _groups(root: str | Path) -> Iterator[tuple[Path, str, str]]:
    """Folder, file of the limit, and field of what is taken, of each control group that limits this process: its own
    and all above it, as a container, a SLURM job and a systemd service have them."""
    mount = Path(root, 'sys/fs/cgroup')
    for line in Path(root, 'proc/self/cgroup').read_text().splitlines():
        _, controllers, path = line.split(':', 2)
        if not controllers:  # version 2
            top, limit, taken = mount, 'memory.max', 'anon'
        elif 'memory' in controllers.split(','):
            top, limit, taken = mount / 'memory', 'memory.limit_in_bytes', 'total_rss'
        else:
            continue
        own = Path(path.lstrip('/'))  # not below `top` where the container does not see the names of its host
        for group in (own, *own.parents):
            yield top / group, limit, taken


def free_host_memory(root: str | Path = '/') -> int:
    """Bytes that can be had without swapping, page cache included, within what the limits of control groups leave.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    try:
        meminfo = Path(root, 'proc/meminfo').read_text()
        free = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith('MemAvailable:'))
    except (OSError, StopIteration):  # not Linux
        return ASSUMED_FREE
    try:
        groups = list(_groups(root))
    except (OSError, ValueError):
        return free
    for group, limit, taken in groups:
        try:
            stat = dict(line.split() for line in (group / 'memory.stat').read_text().splitlines())
            free = min(free, int((group / limit).read_text()) - int(stat.get(taken, 0)))  # the page cache gives way
        except (OSError, ValueError):  # no such group here, or 'max'
            continue
    return max(free, 0)
