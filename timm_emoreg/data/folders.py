"""Where data sets lie on this machine."""
from __future__ import annotations

import os
from pathlib import Path

from .sets import DataError

__all__ = ['default_data_dir', 'find_set']


def default_data_dir() -> Path:
    """The folder of all data sets: ``$EMOREG_DATA``, else ``~/.cache/emoreg-data``."""
    return Path(os.environ.get('EMOREG_DATA') or Path.home() / '.cache' / 'emoreg-data').expanduser()


def find_set(name: str, data_dir: str | Path | None, layout: str, source: str) -> Path:
    """The folder of the set `name`, which nobody may download for the user.

    Args:
        name: Name of the set and of its folder.
        data_dir: Folder of all data sets; None takes `default_data_dir`.
        layout: Files the set's folder must hold, for the message.
        source: Who publishes the set, for the message.

    Raises:
        DataError: If there is no such folder.
    """
    folder = (default_data_dir() if data_dir is None else Path(data_dir).expanduser()) / name
    if not folder.is_dir():
        raise DataError(
            f'{folder}: the set {name!r} is not there. Expected in that folder: {layout}. It comes from {source}. '
            f'Point --data-dir (or EMOREG_DATA) to the folder that holds {name!r}, '
            f'or use the embedded set: --stimuli emoji.')
    return folder
