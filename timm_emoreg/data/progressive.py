"""Progressive resizing: training batches that start small and grow to the input size, to save time early."""
from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .resident import EpochLoader

__all__ = ['SMALLEST', 'ProgressiveLoader', 'shrink', 'size_of_epoch']

SMALLEST = 8  # px; a ResNet with the small-image stem halves three times
STEP = 4  # px


def size_of_epoch(epoch: int, epochs: int, start: int, final: int) -> int:
    """Side in pixels of the training images of an epoch, counted from 0.

    It grows linearly from `start` over the first two thirds of the epochs, in steps of 4 px, and is `final` from then
    on, in the last epoch at least: the weights must see the size that they are judged at (Touvron et al. 2019,
    arXiv 1906.06423), and batch norm needs its statistics.
    """
    growing = min(epochs * 2 / 3, epochs - 1)
    if epoch >= growing:
        return final
    return start + int((final - start) * epoch / growing) // STEP * STEP


def shrink(images: Tensor, size: int, memory_format: torch.memory_format) -> Tensor:
    """Square images (B, C, H, H) as (B, C, size, size), bilinear and antialiased; those of that size as they are."""
    if images.shape[-1] == size:
        return images
    small = F.interpolate(images, size=(size, size), mode='bilinear', antialias=True, align_corners=False)
    return small.contiguous(memory_format=memory_format)


class ProgressiveLoader:
    """The batches of a training loader, shrunk to `size_of_epoch` after crop and flip.

    Args:
        loader: The loader, whose images are square.
        start: Side in pixels of the first epoch's images, 8 to the loader's size.
        epochs: Number of epochs of the training.

    Raises:
        ValueError: For a start outside that range, or images that are not square.
    """

    def __init__(self, loader: EpochLoader, start: int, epochs: int):
        height, width = loader.size
        if height != width or not SMALLEST <= start <= height:
            raise ValueError(f'start={start} must lie in {SMALLEST}..{height}, for square images; these are '
                             f'{height}x{width}.')
        self.loader, self.start, self.epochs = loader, start, epochs
        self.size_now = size_of_epoch(0, epochs, start, height)

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """As `EpochLoader.set_epoch`; it sets the size, too."""
        self.loader.set_epoch(epoch, first_batch)
        self.size_now = size_of_epoch(epoch, self.epochs, self.start, self.loader.size[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for input, target in self.loader:
            yield shrink(input, self.size_now, self.loader.memory_format), target
