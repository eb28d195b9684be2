"""Variants of a set for controlled experiments: fewer training images, shuffled labels, rotations for labels."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from .sets import DataError, ImageSet, Splits, Target

__all__ = ['ROTATIONS', 'fewer_images', 'predict_rotation', 'shuffle_labels']

ROTATIONS = ('0 degrees', '90 degrees', '180 degrees', '270 degrees')  # anticlockwise


def fewer_images(splits: Splits, number: int, seed: int) -> Splits:
    """`number` images of the training part, each class in proportion; validation and test stay whole.

    Args:
        splits: A set with class targets.
        number: How many; at least one of each class, at most all.
        seed: Seed of the choice. A larger number takes the images of a smaller one, and more.

    Raises:
        DataError: If the number does not fit the set, or the targets are no classes.
    """
    train = splits.train
    if train.target.kind != 'class':
        raise DataError(f'{splits.name}: its targets are {train.target.kind}, and only of classes can a stratified '
                        'part be taken. Use all training images.')
    if not len(train.target) <= number <= len(train):
        raise DataError(f'{splits.name}: {number:,} training images were asked for. Give a number from '
                        f'{len(train.target):,}, one per class, to {len(train):,}, all there are.')
    labels = train.targets.numpy()
    order = np.random.RandomState(seed).permutation(len(labels))
    place = np.empty(len(labels))  # 1/n, 2/n ... n/n within each class of n: the lowest ones hold each in proportion
    for label in range(len(train.target)):
        members = order[labels[order] == label]
        place[members] = np.arange(1, len(members) + 1) / max(len(members), 1)
    first = [order[labels[order] == label][0] for label in np.unique(labels)]
    place[first] = 0  # a rare class keeps one, too
    chosen = order[np.argsort(place[order], kind='stable')[:number]]
    return replace(splits, train=train.subset(np.sort(chosen)))


def shuffle_labels(splits: Splits, seed: int) -> Splits:
    """The same images and the same labels, but which has which is drawn at random within each part; images that show
    the same thing still have one label.

    What a network learns from these stimuli cannot come from what the labels mean.
    """
    generator = np.random.RandomState(seed)

    def shuffled(part: ImageSet) -> ImageSet:
        groups = np.arange(len(part)) if part.groups is None else part.groups.numpy()
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        labels = part.targets[first[generator.permutation(len(first))]]
        return ImageSet(part.images, labels[group], part.target, part.groups)

    return replace(splits, name=f'{splits.name} (shuffled labels)', train=shuffled(splits.train),
                   validation=shuffled(splits.validation), test=shuffled(splits.test))


class _SquareSet(ImageSet):
    """The centre square of each image."""

    def picture(self, index: int) -> Image.Image:
        image = super().picture(index)
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        return image.crop((left, top, left + side, top + side))


class _RotatedSet(_SquareSet):
    """Images turned by 0, 90, 180 or 270 degrees; the target is which."""

    def __init__(self, images, turns: torch.Tensor):
        super().__init__(images, turns, Target('class', ROTATIONS))

    def picture(self, index: int) -> Image.Image:
        turn = int(self.targets[index])
        image = super().picture(index)
        return image.transpose((None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180,
                                Image.Transpose.ROTATE_270)[turn]) if turn else image

    def subset(self, indices) -> _RotatedSet:
        part = super().subset(indices)
        return _RotatedSet(part.images, part.targets)

    def pixels(self, size: tuple[int, int]) -> torch.Tensor:
        if size[0] != size[1]:
            raise DataError(f'Rotated pictures must be square, got {size[0]}x{size[1]}. Use a square size.')
        upright = _SquareSet(self.images, self.targets, self.target)
        pixels = upright.pixels(size).contiguous()  # a copy where it was a view: the images stay unturned
        for turn in range(1, 4):
            turned = self.targets == turn
            pixels[turned] = pixels[turned].rot90(turn, (2, 3))
        return pixels


def predict_rotation(splits: Splits, seed: int) -> Splits:
    """The same images without their labels: each is turned by 0, 90, 180 or 270 degrees, and the class is which
    (Gidaris et al. 2018, one rotation per image so that an epoch has as many images as with labels).

    Of an oblong picture the centre square is taken: whether it is drawn together in width or in height would tell
    whether it lies on its side. Mirroring is off: a mirrored picture on its side looks like one that lies on the other.
    """
    generator = np.random.RandomState(seed)

    def rotated(part: ImageSet) -> ImageSet:
        return _RotatedSet(part.images, torch.from_numpy(generator.permutation(len(part)) % 4))

    return replace(splits, name=f'{splits.name} (rotations)', train=rotated(splits.train),
                   validation=rotated(splits.validation), test=rotated(splits.test), flip_safe=False)
