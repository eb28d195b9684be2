"""Stimuli beside the training images, so that stage 2 can rehearse stage 1."""
from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .progressive import ProgressiveLoader, shrink
from .resident import EpochLoader

__all__ = ['RehearsalLoader']


class RehearsalLoader:
    """The batches of a training loader, each with a batch of stimuli: (input, target, stimuli, stimuli_target).

    The stimuli come in passes of their own, each in a new order, one after the other through all epochs; which batch
    of which pass it is depends on epoch and step alone. They are shown at the size of the training images.

    Args:
        loader: The training loader.
        stimuli: A training loader of the stimuli.
    """

    def __init__(self, loader: EpochLoader | ProgressiveLoader, stimuli: EpochLoader):
        self.loader, self.stimuli = loader, stimuli
        self.first = 0

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """As `EpochLoader.set_epoch`."""
        self.loader.set_epoch(epoch, first_batch)
        self.first = epoch * len(self.loader) + first_batch

    def _stimuli(self) -> Iterator[tuple[Tensor, Tensor]]:
        number, batch = divmod(self.first, len(self.stimuli))
        while True:
            self.stimuli.set_epoch(number, batch)
            yield from self.stimuli
            number, batch = number + 1, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        for (input, target), (stimuli, stimuli_target) in zip(self.loader, self._stimuli(), strict=False):
            yield input, target, shrink(stimuli, input.shape[-1], self.stimuli.memory_format), stimuli_target
