"""What every image set of the project gives: pictures, targets, and what the targets mean."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

__all__ = ['DataError', 'ImageError', 'ImageSet', 'Splits', 'Target', 'read_picture']


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the file, the value and the remedy."""


class ImageError(DataError):
    """An image file that cannot be read."""


@dataclass(frozen=True)
class Target:
    """The meaning of a target tensor.

    Args:
        kind: ``'class'`` (index, shape (N,), int64), ``'votes'`` (distribution over the names, shape (N, K),
            float32, each row sums to 1) or ``'ratings'`` (shape (N, D), float32, each scale mapped to [-1, 1]).
        names: Name of each class, emotion or rating, in the order of the indices.
        low: Lower end of the published rating scale, ratings only.
        high: Upper end of the published rating scale, ratings only.
    """

    kind: str
    names: tuple[str, ...]
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        if self.kind not in ('class', 'votes', 'ratings'):
            raise ValueError(f"Target kind {self.kind!r} is unknown, expected 'class', 'votes' or 'ratings'.")
        if not self.low < self.high:
            raise ValueError(f'A rating scale must rise, got {self.low} to {self.high}.')

    def __len__(self) -> int:
        return len(self.names)

    @property
    def affect_kind(self) -> str:
        """The affective state that fits: ``'emotion'`` (softmax) or ``'ratings'`` (tanh)."""
        return 'ratings' if self.kind == 'ratings' else 'emotion'

    def normalise(self, ratings: torch.Tensor) -> torch.Tensor:
        """Map ratings from their published scale to [-1, 1], shape kept."""
        return (ratings - self.low) / (self.high - self.low) * 2 - 1

    def denormalise(self, ratings: torch.Tensor) -> torch.Tensor:
        """Map ratings from [-1, 1] back to their published scale, shape kept."""
        return (ratings + 1) / 2 * (self.high - self.low) + self.low


def read_picture(path: Path, mode: str = 'RGB') -> Image.Image:
    """The image file at `path`, decoded and converted to Pillow's `mode`.

    Grey images of 16 bits are taken by their upper ones; Pillow would cut off what is above 255, which leaves white.

    Raises:
        ImageError: If the file is missing, is not an image, or has 32 bits per channel, whose range it does not tell.
    """
    try:
        with Image.open(path) as image:
            # these formats have 16 bits at most, and Pillow has given them 32
            if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
            if image.mode in ('I', 'F'):
                raise ValueError(f'mode {image.mode!r} has 32 bits per channel and no known range, expected 8 or 16')
            return image.convert(mode)
    except FileNotFoundError:
        raise ImageError(f'{path}: the image is missing. Restore it.') from None
    except MemoryError:  # no fault of the file
        raise
    except Exception as e:  # damaged bytes make Pillow's decoders raise many types, RuntimeError from AVIF among them
        raise ImageError(f'{path}: not a readable image ({e}). Put a readable one in its place.') from None


class ImageSet(Dataset):
    """One split: images with their targets, readable by timm's loader and by the resident loader.

    Args:
        images: Either decoded pictures, a uint8 array of shape (N, H, W, 3) or (N, H, W) for grey ones, or N items,
            each the path of an image file or a uint8 array of shape (H, W, 3) or (H, W).
        targets: (N,) int64, (N, K) float32 or (N, D) float32, as `target` says.
        target: The meaning of the targets.
        groups: (N,) int64, the same number for images that show the same thing and have one label; None where each
            image stands for itself.

    Raises:
        ValueError: If images and targets differ in number, or the targets do not fit `target`.
    """

    def __init__(self, images: np.ndarray | Sequence[Path | np.ndarray], targets: torch.Tensor, target: Target,
                 groups: torch.Tensor | None = None):
        if len(images) != len(targets):
            raise ValueError(f'{len(images)} images but {len(targets)} targets.')
        expected = (len(images),) if target.kind == 'class' else (len(images), len(target))
        if tuple(targets.shape) != expected:
            raise ValueError(f'Targets of kind {target.kind!r} need shape {expected}, got {tuple(targets.shape)}.')
        self.images = images
        self.targets = targets
        self.target = target
        self.groups = groups
        self.transform: Callable | None = None  # set by timm.data.create_loader

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int) -> Image.Image:
        """Image `index` as RGB.

        Raises:
            ImageError: If the file is missing or is not an image.
        """
        image = self.images[index]
        return Image.fromarray(image).convert('RGB') if isinstance(image, np.ndarray) else read_picture(image)

    def __getitem__(self, index: int):
        image = self.picture(index)
        if self.transform is not None:
            image = self.transform(image)
        target = self.targets[index]
        return image, int(target) if self.target.kind == 'class' else target

    def subset(self, indices: Sequence[int] | torch.Tensor) -> ImageSet:
        """The images and targets at `indices`, in that order."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        if isinstance(self.images, np.ndarray):
            images = self.images[indices.numpy()]
        else:
            images = [self.images[i] for i in indices.tolist()]
        groups = None if self.groups is None else self.groups[indices]
        return ImageSet(images, self.targets[indices], self.target, groups)

    def pixels(self, size: tuple[int, int]) -> torch.Tensor:
        """Every image resized to `size` (H, W), bicubic with antialiasing: uint8, shape (N, 3, H, W).

        Images that have that size already are not copied: the tensor is then a view of them, and only to be read.

        Raises:
            ImageError: If files are missing or are no images; it names several.
        """
        if isinstance(self.images, np.ndarray) and self.images.shape[1:] == (*size, 3):
            return torch.from_numpy(self.images).permute(0, 3, 1, 2)
        out = torch.empty(len(self), 3, *size, dtype=torch.uint8)
        damage: list[ImageError] = []
        for i in range(len(self)):
            try:
                image = self.picture(i)
            except ImageError as e:
                damage.append(e)
                continue
            if image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BICUBIC)
            out[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if damage:
            more = [str(e).partition(': ')[0] for e in damage[1:]]
            raise ImageError(f'{damage[0]}' + (f' Nor can {len(more)} more be read: {", ".join(more[:9])}'
                                               f'{", ..." if len(more) > 9 else "."}' if more else ''))
        return out


def _few(names: Sequence[str]) -> str:
    """All names of a list, of more than 20 the first ones and the last."""
    return ', '.join(names if len(names) <= 20 else (*names[:5], f'{len(names) - 6} more', names[-1]))


@dataclass(frozen=True)
class Splits:
    """A named set in three parts. `test` is for one look at the end; every choice is made on `validation`.

    `licence` says under which terms the set may be used. `flip_safe` says whether an image keeps its meaning when it is
    mirrored: a spectrogram does not.

    Raises:
        DataError: If a part is empty.
    """

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    licence: str
    flip_safe: bool = True

    def __post_init__(self):
        for part in ('train', 'validation', 'test'):
            if not len(getattr(self, part)):
                raise DataError(f'{self.name}: the part {part!r} holds no image. Restore the published files '
                                'or add images to it.')

    @property
    def target(self) -> Target:
        """The meaning of the targets, the same in all three parts."""
        return self.train.target

    def check_judges_ratings(self) -> None:
        """Refuse ratings by which nothing can be judged: CCC compares how predictions and ratings vary.

        Raises:
            DataError: If a rating is the same for all images of the validation or test part.
        """
        if self.target.kind != 'ratings':
            return
        for part, images in (('validation', self.validation), ('test', self.test)):
            for name, ratings in zip(self.target.names, images.targets.T, strict=True):
                if ratings.min() == ratings.max():
                    value, n = self.target.denormalise(ratings[0]), len(images)
                    raise DataError(f'{self.name}: {name} is {value:g} in all of the {part} part ({n} image'
                                    f'{"s"[:n > 1]}), and CCC, by which ratings are judged, compares how they vary. '
                                    'Add images, or leave this rating out.')

    def digest(self) -> str:
        """What a run that goes on must find again: the targets, their meaning, and which image is in which part.

        Files count by name and folder, decoded pictures by number and order, so that an image may have been changed.
        """
        digest = hashlib.sha256(repr((self.target.kind, self.target.names)).encode())
        for part in (self.train, self.validation, self.test):
            digest.update(f'{len(part)}'.encode())
            digest.update(part.targets.numpy().tobytes())
            for image in part.images:
                if not isinstance(image, np.ndarray):
                    digest.update('/'.join(Path(image).parts[-2:]).encode('utf-8', 'surrogateescape') + b'\n')
        return digest.hexdigest()

    def summary(self) -> str:
        """One line for a log: name, sizes, kind and names of the targets."""
        line = (f'{self.name}: {len(self.train):,} train, {len(self.validation):,} validation, '
                f'{len(self.test):,} test images; {self.target.kind}: {_few(self.target.names)}')
        if self.target.kind == 'class':
            for name, part in (('validation', self.validation), ('test', self.test)):
                seen = set(part.targets.tolist())
                if unseen := [label for i, label in enumerate(self.target.names) if i not in seen]:
                    line += f'; none in {name}: {_few(unseen)}'
        return line
