"""Writing files that appear as a whole or not at all, and telling one from another."""
from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['replacing', 'sha256_of', 'write_text']


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to. It takes the place of `path` when the block has ended well, else it goes."""
    part = path.with_name(path.name + '.part')
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding='utf-8')


def sha256_of(path: Path) -> str:
    """sha256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
