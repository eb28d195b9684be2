"""Many picture files of one size, decoded into one array."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .sets import DataError, read_picture

__all__ = ['read_pictures']


def read_pictures(paths: Sequence[Path], size: tuple[int, int], mode: str) -> np.ndarray:
    """Decode picture files.

    Args:
        paths: N image files.
        size: Height and width that every picture must have.
        mode: ``'L'`` for grey, ``'RGB'`` for colour.

    Returns:
        uint8, shape (N, H, W) for grey or (N, H, W, 3) for colour.

    Raises:
        DataError: If a file is missing, is not an image or has another size.
    """
    out = np.empty((len(paths), *size) if mode == 'L' else (len(paths), *size, 3), dtype=np.uint8)
    for i, path in enumerate(paths):
        picture = read_picture(path, mode)
        if picture.size != size[::-1]:
            raise DataError(f'{path}: the picture is {picture.width}x{picture.height}, expected {size[1]}x{size[0]}. '
                            'Restore the published file.')
        out[i] = picture
    return out
