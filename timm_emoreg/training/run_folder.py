"""Writing into the output folder of a run: as a whole or not at all, and with one kind of error."""
from __future__ import annotations

import csv
import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..files import read_json, replacing, write_text
from .trainable import DEVICE_ERRORS

__all__ = [
    'BusyError',
    'WriteError',
    'chosen_once',
    'lock_run',
    'make_run',
    'remove_empty_run',
    'trim',
    'writing',
]


class WriteError(OSError):
    """The output folder takes no file."""


class BusyError(RuntimeError):
    """Another process works in the output folder."""


def make_run(folder: Path, settings: dict) -> None:
    """Make a run's folder with its settings in it; a kill leaves no folder that could not be resumed.

    Raises:
        BusyError: If there is something of that name already.
        WriteError: If it cannot be made.
    """
    part = folder.with_name(f'{folder.name}.{os.getpid()}.part')  # another run may be about to take the name
    if not folder.exists():
        with writing(folder):
            try:
                part.mkdir(parents=True, exist_ok=True)  # of a killed one whose number came again, as in containers
                write_text(part / 'args.json', json.dumps(settings, indent=1))
                part.rename(folder)
                return
            except OSError:
                shutil.rmtree(part, ignore_errors=True)
                if not folder.exists():
                    raise
    if not (folder / 'args.json').is_file():
        raise BusyError(f'{folder} exists and is no run of this script. Remove it, or choose another --experiment.')
    raise BusyError(f'{folder} exists. Continue it with --resume {shlex.quote(str(folder))}, or choose another '
                    '--experiment.')


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, by a lock on its settings that ends with the process.

    Raises:
        BusyError: If another process is at work there.
        WriteError: If the settings cannot be opened for writing.
    """
    with ExitStack() as stack:
        with writing(folder):
            file = stack.enter_context(open(folder / 'args.json', 'r+'))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f'{folder}: another process trains this run. Wait for it, or end it.') from None
        yield


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """One kind of error, which names the folder, for all that can fail while files are written."""
    try:
        yield
    except DEVICE_ERRORS:
        raise
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError where the disk is full
        raise WriteError(f'{folder}: cannot be written ({str(e).splitlines()[0]}). Make room or make it writable, or '
                         'choose another --output.') from e


def chosen_once(path: Path, choose: Callable[[], dict]) -> dict:
    """What `choose` gave when it was asked first: it is kept at `path`, so that a resumed run goes by it, too."""
    if path.is_file():
        return read_json(path)
    chosen = choose()
    with writing(path.parent):
        write_text(path, json.dumps(chosen))
    return chosen


def remove_empty_run(folder: Path) -> None:
    """Remove a run's folder that holds its settings and nothing that was trained, so that its name is free again."""
    if folder.is_dir() and not any(folder.glob('*/*.pth.tar')):
        shutil.rmtree(folder, ignore_errors=True)  # where it cannot be written, that is the error to tell


def _columns(header: bytes) -> int:
    """How many columns a summary has by its first line, 0 if that is no header. The name of a rating may hold commas,
    between quotes."""
    if not header.startswith(b'epoch,'):
        return 0
    try:
        return len(next(csv.reader([header.decode(errors='replace')])))
    except csv.Error:
        return 0


def _is_row_before(line: bytes, epoch: int, columns: int) -> bool:
    """Whether a line of a summary is a whole row of an epoch before `epoch`."""
    cells = line.split(b',')
    if len(cells) != columns or not line.endswith((b'\r', b'\n')):  # the next row would go on in the same line
        return False
    try:
        numbers = [float(cell or 'nan') for cell in cells]  # those of an epoch without validation are empty
    except ValueError:
        return False
    return numbers[0] < epoch


def trim(summary: Path, epoch: int) -> None:
    """Drop the rows from `epoch` on, which a resumed run writes again, and those that cannot be read.

    timm's ``trim_summary`` fails at what a power loss has damaged, and a kill could interrupt it with the file emptied.
    Where no row is left the header goes, too, and the next row writes it.
    """
    if summary.exists():
        header, *rows = summary.read_bytes().splitlines(keepends=True) or [b'']
        columns = _columns(header)
        kept = [row for row in rows if _is_row_before(row, epoch, columns)]
        with replacing(summary) as part:
            part.write_bytes(b''.join([header, *kept] if kept else []))
