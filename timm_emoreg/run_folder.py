"""Writing into the output folder of a run: as a whole or not at all, and with one kind of error."""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timm.utils.summary import trim_summary

__all__ = ['WriteError', 'trim', 'write_file', 'writing']


class WriteError(OSError):
    """The output folder takes no file."""


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """One kind of error, which names the folder, for all that can fail while files are written."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError where the disk is full
        raise WriteError(f'{folder}: cannot be written ({str(e).splitlines()[0]}). Make room or make it writable, or '
                         'choose another --output.') from e


def write_file(path: Path, content: str) -> None:
    """Write a text; the file is replaced as a whole."""
    part = path.with_name(path.name + '.part')
    part.write_text(content)
    part.replace(path)


def trim(summary: Path, epoch: int) -> None:
    """Drop the rows from `epoch` on, by timm's function, which a kill could interrupt with the file emptied."""
    if summary.exists():
        part = summary.with_name('summary.part')
        shutil.copyfile(summary, part)
        trim_summary(str(part), epoch)
        part.replace(summary)
