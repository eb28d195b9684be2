"""Images that are judged and were trained on: copies within a set (Barz and Denzler 2020, "Do we train on test data?"),
and files that both stages show."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from .sets import DataError, ImageSet, Splits

__all__ = ['NEAR', 'check_unseen', 'copies']

NEAR = 10.0  # grey levels


def _cells(images: np.ndarray, side: int = 8) -> np.ndarray:
    """Mean of each of side x side cells: (N, side * side * colours), float32."""
    n, height, width = images.shape[:3]
    if height % side or width % side:
        raise DataError(f'Images of {height}x{width} pixels were given, and near copies are looked for on a grid of '
                        f'{side}x{side} cells. Give a height and width that are multiples of {side}.')
    cells = images.reshape(n, side, height // side, side, width // side, -1)
    return cells.mean((2, 4), dtype=np.float32).reshape(n, -1)


def copies(train: np.ndarray, test: np.ndarray, near: float = NEAR, block: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Which test images have an exact copy, and which a near one, among the training images.

    Args:
        train: Training images, uint8, shape (N, H, W, C) with H and W multiples of 8.
        test: Test images, of the same size.
        near: Largest root mean square difference, in grey levels, of the images at 8x8 pixels.
        block: Test images that are compared at a time.

    Returns:
        Two bool arrays of shape (M,), M test images: has an exact copy, has a near one (exact ones included).

    Raises:
        DataError: If height or width are no multiples of 8.
    """
    known = {image.tobytes() for image in train}
    exact = np.array([image.tobytes() in known for image in test])
    a, b = _cells(train), _cells(test)
    squares = (a * a).sum(1)
    nearest = np.concatenate([((part * part).sum(1) + (squares - 2 * part @ a.T).min(1))
                              for part in np.split(b, range(block, len(b), block))])
    return exact, exact | (nearest <= near * near * a.shape[1])


def _files(*parts: ImageSet) -> dict[Path, Path]:
    """The image files of `parts`: the file that each leads to, and its name."""
    return {image.resolve(): image for part in parts for image in part.images if isinstance(image, Path)}


def check_unseen(stimuli: Splits, target: Splits) -> None:
    """Refuse stimuli that show in an earlier part what the target is judged by in a later one: in training what is in
    its validation or test, or in validation what is in its test.

    A folder and a csv of the same files are split each by itself. Copies under another name are not looked for.

    Raises:
        DataError: If a file is in both.
    """
    early, late = _files(stimuli.train), _files(target.validation, target.test)
    seen = {file: late[file] for file in early.keys() & late.keys()}
    early, last = _files(stimuli.validation), _files(target.test)
    seen |= {file: last[file] for file in early.keys() & last.keys()}
    if seen:
        raise DataError(
            f'{stimuli.name}, {target.name}: stage 1 would see {len(seen)} of the {len(late)} files that stage 2 is '
            f'judged by, {min(seen.values())} among them. Give both sets the same parts: folders train, val and test, '
            'and in a csv a column split.')
