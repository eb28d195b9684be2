"""Test images that have a copy among the training images (Barz and Denzler 2020, "Do we train on test data?")."""
from __future__ import annotations

import numpy as np

__all__ = ['NEAR', 'copies']

NEAR = 10.0  # grey levels


def _cells(images: np.ndarray, side: int = 8) -> np.ndarray:
    """Mean of each of side x side cells: (N, side * side * colours), float32."""
    n, height, width = images.shape[:3]
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
    """
    known = {image.tobytes() for image in train}
    exact = np.array([image.tobytes() in known for image in test])
    a, b = _cells(train), _cells(test)
    squares = (a * a).sum(1)
    nearest = np.concatenate([((part * part).sum(1) + (squares - 2 * part @ a.T).min(1))
                              for part in np.split(b, range(block, len(b), block))])
    return exact, exact | (nearest <= near * near * a.shape[1])
