"""The command line of train.py for those who start it or read its runs: which settings follow from which flags."""
from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

__all__ = ['parser_of']


def parser_of(script: Path) -> Callable[[list[str]], Namespace]:
    """The `parse_args` of train.py, which is no part of the package, or of a script in its place."""
    spec = importlib.util.spec_from_file_location('emoreg_train', script)
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    return train.parse_args
