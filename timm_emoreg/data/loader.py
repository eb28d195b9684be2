"""Choosing a loader: the resident one for sets that fit in memory, timm's transforms in worker processes for others."""
from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .free_memory import free_host_memory
from .resident import EpochLoader, ResidentLoader, resident_bytes
from .sets import DataError, ImageSet

__all__ = ['TimmLoader', 'choose_kind', 'fits_in_memory', 'make_loader']


def fits_in_memory(
        num_images: int,
        size: tuple[int, int],
        crop_padding: int,
        device: torch.device,
        world_size: int = 1,
) -> bool:
    """Whether a set takes at most a quarter of the memory that is free: on `device`, and on the host to build it.

    Each of the `world_size` processes builds its own, and all of them may share one host.
    """
    on_device = resident_bytes(num_images, size, crop_padding)
    on_host = resident_bytes(num_images, size)
    if device.type == 'cuda':
        if on_device > torch.cuda.mem_get_info(device)[0] / 4:
            return False
    else:
        on_host += on_device
    return on_host * world_size <= free_host_memory() / 4


def leave_signals_to_the_training(training: int, worker: int) -> None:
    """`training` is the number of its process, which is not the worker's parent where a fork server starts workers.

    A signal to all processes must not end a worker before the training has written its checkpoint; the training
    itself must be able to end it, or its exit would wait for the worker for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, 'sigwaitinfo'):  # macOS, Windows: who sent a signal is not told
        return
    # a handler of Python's is not told either
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for_the_training, args=(training,), daemon=True).start()


def _end_for_the_training(training: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training:
        pass
    os._exit(0)


class _Transformed(Dataset):
    """Uint8 images (3, H, W) and targets. A key is (index, seed): what is drawn for an image depends on its seed
    alone, so any number of workers and a resumed run give the same."""

    def __init__(self, images: ImageSet, transform):
        self.images = images
        self.transform = transform

    def __getitem__(self, key: tuple[int, int]):
        index, seed = key
        image, target = self.images[index]
        state = random.getstate()
        random.seed(seed)  # what timm's random crop draws from
        image = self.transform(image)
        random.setstate(state)
        return image, target


class _Keys:
    """The keys of each batch of an epoch, for a DataLoader that outlives the epoch."""

    def __init__(self):
        self.batches: Iterable[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class TimmLoader(EpochLoader):
    """timm's transforms in worker processes, for sets that do not fit in memory.

    Order, shards, flip and cutout are those of the resident loader. In training each image is cropped at random to at
    least half its area, and resized.

    Args:
        augment: Whether to crop in training.
        workers: Worker processes, 0 to load in this one.
        The others are those of `EpochLoader`.

    Raises:
        ValueError: For an unknown flip.
        DataError: If the training set is smaller than a batch; in iteration, if an image cannot be read.
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
            augment: bool = True,
            flip: str = 'none',
            cutout: int = 0,
            seed: int = 0,
            channels_last: bool = False,
            workers: int = 2,
            rank: int = 0,
            world_size: int = 1,
    ):
        super().__init__(images, size, batch_size, mean, std, training, device, flip, cutout, seed, channels_last,
                         rank, world_size)
        from timm.data import create_transform  # here, because it imports torchvision's transforms
        # use_prefetcher: uint8 images, so that a quarter of the bytes travels; flips follow on the device
        self.data = _Transformed(images, create_transform(
            (3, *self.size), is_training=training, no_aug=not augment, use_prefetcher=True, scale=(0.5, 1.0),
            hflip=0.0, color_jitter=None, interpolation='bicubic', crop_pct=1.0, crop_mode='squash'))
        self.keys = _Keys()
        # a generator of its own: the seed of its workers would be drawn from the generator of the training otherwise
        self.loader = DataLoader(self.data, batch_sampler=self.keys, num_workers=workers,
                                 persistent_workers=workers > 0, pin_memory=self.device.type == 'cuda',
                                 generator=torch.Generator(),
                                 worker_init_fn=partial(leave_signals_to_the_training, os.getpid()))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.training:
            drawn = self._draw()
        else:
            drawn = {'order': torch.arange(self.num_images), 'seed': torch.zeros(self.num_images, dtype=torch.long)}
        # once an epoch: a copy for each batch would wait for all work that is queued on a GPU
        drawn |= {name: drawn[name].to(self.device) for name in ('flip', 'centre') if name in drawn}
        parts = list(self._slices())
        self.keys.batches = (
            list(zip(drawn['order'][part].tolist(), drawn['seed'][part].tolist(), strict=True)) for part in parts)
        pin = self.loader.pin_memory
        try:
            for part, (pixels, target) in zip(parts, self.loader, strict=True):
                pixels = pixels.to(self.device, non_blocking=pin).permute(0, 2, 3, 1).contiguous()
                if self.flip != 'none':
                    flip = drawn['flip'][part]
                    pixels = torch.where(flip[:, None, None, None], pixels.flip(2), pixels)
                centre = drawn['centre'][part] if self.cutout else None
                yield self._finish(pixels, centre), target.to(self.device, non_blocking=pin)
        except DataError as e:
            # torch prefixes an error of a worker with its traceback
            raise type(e)(str(e).rsplit(f'{type(e).__name__}: ', 1)[-1].strip()) from None


def choose_kind(
        num_images: int,
        size: tuple[int, int],
        device: torch.device | str = 'cpu',
        augment: bool = True,
        world_size: int = 1,
) -> str:
    """What `make_loader` takes for 'auto': ``'resident'`` where the set fits in the memory that is free now.

    Args:
        num_images: Of the split.
        size: Input size (H, W).
        device: Where the batches come out.
        augment: Whether images are cropped, as in training, from padded ones.
        world_size: Number of processes.
    """
    padding = _crop_padding(size) if augment else 0
    return 'resident' if fits_in_memory(num_images, size, padding, torch.device(device), world_size) else 'timm'


def _crop_padding(size: tuple[int, int]) -> int:
    return min(size) // 8


def make_loader(
        images: ImageSet,
        size: tuple[int, int],
        batch_size: int,
        data_config: dict[str, Any],
        training: bool = False,
        kind: str = 'auto',
        device: torch.device | str = 'cpu',
        augment: bool = True,
        flip: str = 'random',
        cutout: int = 0,
        seed: int = 0,
        channels_last: bool = False,
        workers: int = 2,
        rank: int = 0,
        world_size: int = 1,
) -> ResidentLoader | TimmLoader:
    """A loader for one split. In evaluation both kinds give the same batches.

    In training the resident loader crops at random from an image padded by an eighth of its shorter side, as is usual
    on CIFAR; timm's crops and resizes at random (at least half the area), as is usual on larger photographs.

    Args:
        images: The split.
        size: Input size (H, W); images of another size are resized, bicubic with antialiasing.
        batch_size: Images in a batch, of this process.
        data_config: ``mean`` and ``std``, as ``timm.data.resolve_model_data_config`` gives them.
        training: Shuffle and augment.
        kind: ``'resident'``, ``'timm'`` or ``'auto'``: resident where the set fits in memory.
        device: Where the batches come out.
        augment: Whether to crop, flip and cut out in training.
        flip: ``'random'``, ``'alternate'`` or ``'none'``.
        cutout: Side of the cut-out square in pixels.
        seed: Seed of order and augmentation.
        channels_last: Memory format of the batches.
        workers: Worker processes of timm's loader.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: For an unknown kind or flip.
        DataError: If the training set is smaller than a batch, or an image cannot be read.
    """
    if kind not in ('auto', 'resident', 'timm'):
        raise ValueError(f"kind={kind!r} is unknown, expected 'auto', 'resident' or 'timm'.")
    device = torch.device(device)
    if not augment:
        flip, cutout = 'none', 0
    if kind == 'auto':
        kind = choose_kind(len(images), size, device, training and augment, world_size)
    common = {
        'images': images, 'size': size, 'batch_size': batch_size, 'mean': data_config['mean'],
        'std': data_config['std'], 'training': training, 'device': device, 'flip': flip, 'cutout': cutout, 'seed': seed,
        'channels_last': channels_last, 'rank': rank, 'world_size': world_size,
    }
    if kind == 'resident':
        return ResidentLoader(crop_padding=_crop_padding(size) if training and augment else 0, **common)
    return TimmLoader(augment=augment, workers=workers, **common)
