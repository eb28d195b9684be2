"""A loader for image sets that fit in memory: one uint8 tensor on the training device, augmented a batch at a time."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .sets import DataError, ImageSet

__all__ = ['EpochLoader', 'ResidentLoader', 'resident_bytes']

FLIPS = ('none', 'random', 'alternate')


def resident_bytes(num_images: int, size: tuple[int, int], crop_padding: int = 0) -> int:
    """Memory that a set of `num_images` at `size` (H, W) takes in a `ResidentLoader`."""
    return num_images * 3 * (size[0] + 2 * crop_padding) * (size[1] + 2 * crop_padding)


def _check_fills_a_batch(images: ImageSet, batch_size: int) -> None:
    """Raise a `DataError` if a training set is smaller than a batch: there would be nothing to train on."""
    if len(images) < batch_size:
        raise DataError(f'{len(images)} images to train on ({", ".join(images.target.names[:3])} ...) are fewer '
                        f'than one batch of {batch_size}. Use a batch size of at most {len(images)}.')


class EpochLoader:
    """What the loaders share: order, shards, resuming, what is drawn at random, normalisation.

    Training (``training=True``) shuffles, augments and leaves out an incomplete last batch; evaluation gives every
    image once, in order, as it is. What an epoch draws depends on `seed` and the epoch alone, not on device or number
    of processes. Batches are float32 (B, 3, H, W), normalised, and their targets, both on the device.

    Args:
        images: The set.
        size: Input size (H, W); images of another size are resized, bicubic with antialiasing.
        batch_size: Images in a batch, of this process.
        mean: Channel means, on the scale [0, 1].
        std: Channel standard deviations.
        training: Shuffle and augment.
        device: Where the batches come out.
        flip: ``'random'``: each image mirrored with probability 1/2; ``'alternate'``: mirrored in every other epoch,
            the first time by chance (Jordan 2024, arXiv 2404.00498); ``'none'``.
        cutout: Side in pixels of the square that is set to the mean (DeVries and Taylor 2017), 0 for none. Its centre
            is uniform over the image, so a square at the border is cut by it.
        seed: Seed of all that is drawn.
        channels_last: Memory format of the batches.
        rank: Number of this process.
        world_size: Number of processes. In training each gets `batch_size` images of a batch of
            ``batch_size * world_size``; in evaluation each gets every `world_size`-th image, so that the numbers of
            batches may differ by one.

    Raises:
        ValueError: For an unknown flip.
        DataError: If the training set is smaller than a batch.
    """

    def __init__(
            self,
            images: ImageSet,
            size: tuple[int, int],
            batch_size: int,
            mean: tuple[float, ...],
            std: tuple[float, ...],
            training: bool = False,
            device: torch.device | str = 'cpu',
            flip: str = 'none',
            cutout: int = 0,
            seed: int = 0,
            channels_last: bool = False,
            rank: int = 0,
            world_size: int = 1,
    ):
        if flip not in FLIPS:
            raise ValueError(f'flip={flip!r} is unknown, expected one of {", ".join(map(repr, FLIPS))}.')
        if training:
            _check_fills_a_batch(images, batch_size * world_size)
        self.num_images = len(images)
        self.size = tuple(size)
        self.batch_size = batch_size
        self.training = training
        self.device = torch.device(device)
        self.flip = flip if training else 'none'
        self.cutout = cutout if training else 0
        self.seed = seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.first_batch = 0
        # repeated along a row of pixels, so that (B, H, 3 W) values are scaled without a stride-0 inner loop
        mean, std = torch.tensor(mean), torch.tensor(std)
        self.scale = (1 / (255 * std)).repeat(self.size[1]).to(self.device)
        self.offset = (-mean / std).repeat(self.size[1]).to(self.device)

    def __len__(self) -> int:
        if self.training:
            return self.num_images // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, self.num_images, self.world_size)) // self.batch_size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch whose order and augmentation are drawn next, and the batch to start at (for a resume)."""
        self.epoch, self.first_batch = epoch, first_batch

    def _slices(self) -> Iterator[slice]:
        """Where this process's batches lie in the order of presentation, from the first batch on that is asked for."""
        first_batch, self.first_batch = self.first_batch, 0
        for i in range(first_batch, len(self)):
            if self.training:
                start = (i * self.world_size + self.rank) * self.batch_size
                yield slice(start, start + self.batch_size)
            else:
                start = i * self.batch_size * self.world_size + self.rank
                yield slice(start, start + self.batch_size * self.world_size, self.world_size)

    def _draw(self, crop_padding: int = 0) -> dict[str, Tensor]:
        """Everything random of an epoch, for all images in their order of presentation; on the CPU, so that every
        device and every number of processes sees the same."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        n = self.num_images
        drawn = {
            'order': torch.randperm(n, generator=generator),
            'crop': torch.randint(0, 2 * crop_padding + 1, (n, 2), generator=generator),
            'flip': torch.randint(0, 2, (n,), generator=generator, dtype=torch.bool),
            'centre': torch.rand(n, 2, generator=generator),
            'seed': torch.randint(0, 2 ** 31, (n,), generator=generator),
        }
        if self.flip == 'alternate':
            # -1 is no epoch: which images start mirrored must not be correlated with any epoch's order
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 - 1)
            first = torch.randint(0, 2, (n,), generator=generator, dtype=torch.bool)
            drawn['flip'] = (first ^ bool(self.epoch % 2))[drawn['order']]
        elif self.flip == 'none':
            drawn['flip'].zero_()
        return drawn

    def _finish(self, pixels: Tensor, centre: Tensor | None = None) -> Tensor:
        """uint8 (B, H, W, 3) to normalised float32 (B, 3, H, W), with a square cut out where a `centre` is given."""
        x = torch.addcmul(self.offset, pixels.flatten(2).float(), self.scale).view(pixels.shape)
        if centre is not None:
            at = torch.arange(len(x), device=x.device)[:, None, None]
            side = torch.arange(self.cutout, device=x.device) - self.cutout // 2
            for axis, length in enumerate(self.size):
                # what lies outside falls onto the border, which belongs to the square then
                inside = ((centre[:, axis, None] * length).long() + side).clamp(0, length - 1)
                at = at * length + (inside[:, :, None] if axis == 0 else inside[:, None, :])
            x.view(-1, 3).index_fill_(0, at.flatten(), 0.0)  # the mean is 0 once normalised
        return x.permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)


class ResidentLoader(EpochLoader):
    """Batches of normalised images and their targets, without workers and without a copy to the device.

    In training each image is cropped at random from its reflect-padded self. The set is kept as uint8, padding
    included (see `resident_bytes`); what is read from files is once more in the memory of the host, without padding,
    while the set is built.

    Args:
        crop_padding: Pixels of reflection around each image for random crops, 0 for no crops.
        The others are those of `EpochLoader`.

    Raises:
        ValueError: For an unknown flip, or a padding as large as the image.
        DataError: If the training set is smaller than a batch, or an image cannot be read.
    """

    def __init__(
            self,
            images: ImageSet,
            size: tuple[int, int],
            batch_size: int,
            mean: tuple[float, ...],
            std: tuple[float, ...],
            training: bool = False,
            device: torch.device | str = 'cpu',
            crop_padding: int = 0,
            flip: str = 'none',
            cutout: int = 0,
            seed: int = 0,
            channels_last: bool = False,
            rank: int = 0,
            world_size: int = 1,
    ):
        if not 0 <= crop_padding < min(size):
            raise ValueError(f'crop_padding={crop_padding} must lie in 0..{min(size) - 1} for images of {tuple(size)}.')
        super().__init__(images, size, batch_size, mean, std, training, device, flip, cutout, seed, channels_last,
                         rank, world_size)
        self.crop_padding = p = crop_padding if training else 0
        self.targets = images.targets.to(self.device)
        height, width = (length + 2 * p for length in self.size)
        self.pixels = torch.empty(len(images), height, width, 3, dtype=torch.uint8, device=self.device)
        self.pixels[:, p:height - p, p:width - p] = images.pixels(self.size).permute(0, 2, 3, 1)
        # reflection, 2 1 | 0 1 2 3 | 2 1 for four pixels and a padding of two: first the rows, then whole columns
        mirrored = [pair for i in range(p) for pair in ((i, 2 * p - i), (-1 - i, -1 - 2 * p + i))]
        for edge, inside in mirrored:
            self.pixels[:, edge, p:width - p] = self.pixels[:, inside, p:width - p]
        for edge, inside in mirrored:
            self.pixels[:, :, edge] = self.pixels[:, :, inside]

    def _crop(self, index: Tensor, crop: Tensor, flip: Tensor) -> Tensor:
        """Each image's window, mirrored where `flip`: uint8 (B, H, W, 3)."""
        count, height, width, _ = self.pixels.shape
        # all runs of pixels as long as a window is wide, overlapping, without a copy: one is taken for each row
        runs = self.pixels.as_strided((count * height * width - self.size[1] + 1, 3 * self.size[1]), (3, 1))
        row = (index * height + crop[:, 0])[:, None] + torch.arange(self.size[0], device=self.device)
        windows = runs.index_select(0, (row * width + crop[:, 1:]).flatten()).view(-1, *self.size, 3)
        if self.flip == 'none':
            return windows
        # mirroring all and choosing is faster than mirroring some, and a GPU need not wait to learn which
        at = torch.arange(len(index), device=self.device) + len(index) * flip
        return torch.cat([windows, windows.flip(2)]).index_select(0, at)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.training:
            for part in self._slices():
                yield self._finish(self.pixels[part]), self.targets[part]
            return
        drawn = {name: value.to(self.device) for name, value in self._draw(self.crop_padding).items()}
        for part in self._slices():
            index = drawn['order'][part]
            pixels = self._crop(index, drawn['crop'][part], drawn['flip'][part])
            yield self._finish(pixels, drawn['centre'][part] if self.cutout else None), self.targets[index]
