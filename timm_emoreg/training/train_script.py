"""The command line of train.py for those who start it or read its runs: which settings follow from which flags."""
from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path

__all__ = ['load_parse_args']


def load_parse_args(script: Path) -> Callable[[list[str]], Namespace] | None:
    """The `parse_args` of train.py, which is no part of the package, or of a script in its place; None if it has none.
    """
    spec = importlib.util.spec_from_loader('emoreg_train', SourceFileLoader('emoreg_train', str(script)))
    train = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(script.resolve().parent))  # as python has it when it runs the script
    try:
        spec.loader.exec_module(train)
    finally:
        sys.path.pop(0)
    return getattr(train, 'parse_args', None)
