"""Csv tables whose errors name the file, the line and the value."""
from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .choices import unknown_choice
from .sets import DataError

__all__ = ['Table', 'read_table']


@dataclass(frozen=True)
class Table:
    """The rows of a csv file, each with the line it starts on.

    Args:
        path: The file, for messages.
        columns: Name of each column, no two alike.
        lines: Line of each row, counted from 1, shape (N,).
        rows: Fields of each row without surrounding white space, shape (N, columns).
    """

    path: Path
    columns: tuple[str, ...]
    lines: tuple[int, ...]
    rows: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        """File and line of a row, the start of a message about it."""
        return f'{self.path}, line {self.lines[row]}'

    def subset(self, rows: Sequence[int]) -> Table:
        """The rows at these indices, in that order."""
        return Table(self.path, self.columns, tuple(self.lines[i] for i in rows), tuple(self.rows[i] for i in rows))

    def column(self, name: str) -> list[str]:
        """The fields of one column, shape (N,).

        Raises:
            DataError: If there is no such column.
        """
        if name not in self.columns:
            raise unknown_choice(f'{self.path}, line 1', 'column', name, self.columns,
                                 'Name one of these, or correct the header.')
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def choices(self, name: str, known: Sequence[str]) -> np.ndarray:
        """Index into `known` of each field of a column, shape (N,), int64.

        Raises:
            DataError: If there is no such column, or a field is not among the known values.
        """
        index = {value: i for i, value in enumerate(known)}
        fields = self.column(name)
        for i, value in enumerate(fields):
            if value not in index:
                raise unknown_choice(self.where(i), name, value, known, 'Correct it or remove the row.')
        return np.array([index[value] for value in fields], dtype=np.int64)

    def numbers(self, name: str, low: float, high: float) -> np.ndarray:
        """The finite numbers of a column, shape (N,), float64, each in [low, high].

        Raises:
            DataError: If there is no such column, or a field is not a number of that range.
        """
        fields = self.column(name)
        out = np.empty(len(fields))
        for i, value in enumerate(fields):
            try:
                # Python's digit separator would turn a mistyped 1_5 into 15
                out[i] = math.nan if '_' in value else float(value)
            except ValueError:
                out[i] = math.nan
            if not math.isfinite(out[i]):
                raise DataError(f'{self.where(i)}: {name} is {value[:80]!r}, not a finite number. '
                                'Correct it or remove the row.')
            if not low <= out[i] <= high:
                raise DataError(f'{self.where(i)}: {name} is {value[:80]}, outside its scale {low:g} to {high:g}. '
                                'Correct the value or the scale.')
        return out

    def files(self, names: Sequence[str], root: Path) -> list[Path]:
        """The file that each row names, shape (N,), as resolved paths under `root`.

        Args:
            names: Path of each row's file relative to `root`; symbolic links are followed before the check.
            root: The folder no path may leave.

        Raises:
            DataError: If a path is empty or unusable, leaves `root`, or no file is there; it names the
                lines of several.
        """
        root = root.resolve()
        out, missing = [], []
        for i, name in enumerate(names):
            try:
                path = (root / name).resolve()
                inside, present = path.is_relative_to(root), path.is_file()
            except (OSError, ValueError, RuntimeError) as e:  # over-long names, null characters, loops of links
                raise DataError(f'{self.where(i)}: {name[:80]!r} is not a usable path ({type(e).__name__}). '
                                'Correct it or remove the row.') from None
            if not inside:
                raise DataError(f'{self.where(i)}: {name[:80]!r} lies outside the folder {root}. '
                                'Move the image into it and name it relative to that folder.')
            if not present:
                missing.append(i)
            out.append(path)
        if missing:
            lines = [str(self.lines[i]) for i in missing[1:]]
            more = ', ...' if len(lines) > 9 else '.'
            others = f' Nor are those of line {", ".join(lines[:9])}{more}' if lines else ''
            raise DataError(f'{self.where(missing[0])}: there is no image file {names[missing[0]][:80]!r} in {root}. '
                            f'Restore it or remove the row.{others}')
        return out


def _check_separator(path: Path, text: str) -> None:
    """Raise a `DataError` if the first line of a table has another separator in the place of commas."""
    number, line = next(((i, line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()), (1, ''))
    if ',' not in line and (other := next((c for c in ';\t|' if c in line), None)):
        raise DataError(f'{path}, line {number}: the columns are separated by {other!r}. Save the file with commas '
                        'between them.')


def read_table(path: Path) -> Table:
    """Read a comma-separated UTF-8 file (with or without byte-order mark) whose first line names the columns.

    Blank lines are skipped.

    Raises:
        DataError: If the file is missing, unreadable, not UTF-8, not csv, empty or without a row, if two columns
            share a name, or if a row has more or fewer fields than the header.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f'{path}: the table cannot be read ({e.strerror}). '
                        'Restore the file or correct its path.') from None
    try:
        text = data.decode('utf-8-sig')
    except UnicodeDecodeError as e:
        # the offset counts from behind the byte-order mark, which the codec removes first
        line = e.object.count(b'\n', 0, e.start) + 1
        raise DataError(f'{path}, line {line}: byte 0x{e.object[e.start]:02x} is not UTF-8. '
                        'Save the file with UTF-8 encoding.') from None

    reader = csv.reader(io.StringIO(text, newline=''), strict=True)
    lines, rows = [], []
    start = 1
    try:
        for fields in reader:
            if fields:
                lines.append(start)
                rows.append(tuple(field.strip() for field in fields))
            start = reader.line_num + 1
    except csv.Error as e:
        _check_separator(path, text)
        raise DataError(f'{path}, line {start}: not comma-separated values ({e}). Correct the line.') from None

    if not rows:
        raise DataError(f'{path}: the table is empty. Its first line must name the columns.')
    columns = rows[0]
    if len(columns) == 1:
        _check_separator(path, text)
    for i, name in enumerate(columns):
        if name in columns[:i]:
            raise DataError(f'{path}, line {lines[0]}: columns {columns.index(name) + 1} and {i + 1} are both named '
                            f'{name[:80]!r}. Rename or remove one.')
    for line, row in zip(lines[1:], rows[1:], strict=True):
        if len(row) != len(columns):
            raise DataError(f'{path}, line {line}: {len(row)} fields where the header has {len(columns)} columns. '
                            'Correct the line; a value with a comma needs double quotes.')
    if len(rows) == 1:
        raise DataError(f'{path}: the table has a header but no row. Add one line per image.')
    return Table(path, columns, tuple(lines[1:]), tuple(rows[1:]))
