"""Writing files that appear as a whole or not at all, reading them back, and telling one from another."""
from __future__ import annotations

import glob
import hashlib
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ['DamagedError', 'read_json', 'replacing', 'sha256_of', 'write_text']

LEFT_BEHIND = 3600  # seconds, more than any of these files takes: an older part is that of a killed writer


class DamagedError(ValueError):
    """A file that was written as a whole cannot be read."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to. It takes the place of `path` when the block has ended well, else it goes.

    Its name is the writer's own, so that none publishes what another one is half through with.
    """
    for left in path.parent.glob(f'{glob.escape(path.name)}.{"[0-9a-f]" * 8}.part'):
        with suppress(OSError):  # its writer, or another one that tidies up, may be faster
            if time.time() - left.stat().st_mtime > LEFT_BEHIND:
                left.unlink()
    part = path.with_name(f'{path.name}.{secrets.token_hex(4)}.part')
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


def read_json(path: Path) -> dict:
    """The object in a file that a run has written.

    Raises:
        DamagedError: If it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(content, dict):
            raise ValueError('no object')
    except ValueError as e:
        raise DamagedError(f'{path}: is damaged ({e}). Bring back a copy. A result.json or choices.json may be '
                           'removed, and the run goes on from its last checkpoint.') from None
    return content


def sha256_of(path: Path) -> str:
    """sha256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
