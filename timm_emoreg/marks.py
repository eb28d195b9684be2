"""Tables that a command writes into a text, between the marks ``<!-- name -->`` and ``<!-- /name -->``."""
from __future__ import annotations

import re
from pathlib import Path

from .files import write_text

__all__ = ['MarksError', 'between_marks', 'write_between_marks']


class MarksError(ValueError):
    """A file that is not there, or has no such marks."""


def _pattern(name: str) -> re.Pattern:
    return re.compile(f'(<!-- {name} -->\n)(.*?)\n?(<!-- /{name} -->)', re.DOTALL)


def between_marks(path: Path, name: str) -> str:
    """What stands between the marks of a file, without the line ends beside them.

    Raises:
        MarksError: If the file is not there, or has no such marks.
    """
    if not path.is_file():
        raise MarksError(f'{path}: is no file. Give a text that holds <!-- {name} --> and <!-- /{name} --> already.')
    found = _pattern(name).search(path.read_text(encoding='utf-8'))
    if not found:
        raise MarksError(f'{path}: holds no <!-- {name} --> ... <!-- /{name} --> to write between.')
    return found[2]


def write_between_marks(path: Path, name: str, table: str) -> None:
    """Replace what stands there.

    Raises:
        MarksError: If the file is not there, or has no such marks.
    """
    between_marks(path, name)
    table = table.rstrip('\n')
    text = _pattern(name).sub(lambda marks: f'{marks[1]}{table}\n{marks[3]}', path.read_text(encoding='utf-8'))
    write_text(path, text)
