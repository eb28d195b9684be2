"""The commit of the project's checkout, for the records of runs and weights."""
from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ['project_commit']


def project_commit(root: Path) -> str:
    """The commit of the project's checkout; nothing is written there.

    Args:
        root: The checkout's folder, the one that holds ``timm_emoreg``.

    Returns:
        The full commit, with ``-dirty`` if code differs from it; ``unknown`` where `root` is no checkout of this
        project, such as the site-packages of an environment within another repository.
    """
    def git(*command: str) -> str:
        return subprocess.run(('git', '--no-optional-locks', '-C', str(root), *command), capture_output=True, text=True,
                              check=True).stdout

    try:
        git('ls-files', '--error-unmatch', 'timm_emoreg/__init__.py')
        commit = git('rev-parse', '--verify', '--quiet', 'HEAD').strip()
        dirty = git('status', '--porcelain', '--', 'train.py', 'timm_emoreg', ':!timm_emoreg/assets').strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return commit + ('-dirty' if dirty else '')
