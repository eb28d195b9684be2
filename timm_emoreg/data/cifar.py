"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009, "Learning multiple layers of features from tiny images")."""
from __future__ import annotations

import contextlib
import http.client
import io
import socket
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from .choices import unknown_choice
from .folders import default_data_dir
from .sets import DataError, ImageSet, Splits, Target
from .splitting import stratified_split

__all__ = ['load_cifar']

_CLASSES = {'cifar10': datasets.CIFAR10, 'cifar100': datasets.CIFAR100}
_HELD_OUT = 0.1
_SEED = 0
_SILENCE = 20.0  # seconds without an answer before a download counts as failed


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    # torchvision sets no timeout, and a network that drops packets would keep the user waiting for minutes
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _download(name: str, data_dir: Path) -> None:
    """Fetch and unpack the set beside its place, then move it there, so that a failure leaves nothing behind."""
    maker = _CLASSES[name]
    folder = data_dir / maker.base_folder
    created = [path for path in (data_dir, *data_dir.parents) if not path.exists()]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.download-', dir=data_dir) as temporary:
            with _patience(_SILENCE), contextlib.redirect_stdout(io.StringIO()):  # the progress bar is on stderr
                maker(temporary, download=True)
            (Path(temporary) / maker.base_folder).rename(folder)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as e:
        if folder.is_dir():  # another process was faster; a folder that holds files cannot be replaced by a rename
            return
        raise DataError(
            f'{folder}: {name} is not there and cannot be downloaded ({e}). Put the folder {maker.base_folder!r} '
            f"of the set's python version into {data_dir}, point --data-dir (or EMOREG_DATA) to the folder "
            f'that holds it, or use the embedded set: --dataset emoji.') from None
    finally:
        if not folder.is_dir():
            with contextlib.suppress(OSError):
                for path in created:
                    path.rmdir()


def _damaged(name: str, data_dir: Path) -> DataError:
    maker = _CLASSES[name]
    folder = data_dir / maker.base_folder
    files = [*maker.train_list, *maker.test_list, (maker.meta['filename'], maker.meta['md5'])]
    for file, md5 in files:
        path = folder / file
        if not check_integrity(path, md5):
            state = 'its md5 is not the published one' if path.is_file() else 'the file is missing'
            return DataError(f'{path}: {state}. Restore the file, or remove the folder {folder} '
                             f'and let {name} be downloaded again.')
    return DataError(f'{folder}: {name} cannot be read. Remove the folder and let it be downloaded again.')


def _published(name: str, data_dir: Path, train: bool):
    """torchvision's training or test set, which checks the md5 of the files it reads and not, as its own class does,
    those of both sets each time."""
    maker = _CLASSES[name]
    return type(maker.__name__, (maker,), {'test_list' if train else 'train_list': []})(data_dir, train=train)


def _pixel_by_pixel(images: np.ndarray, rows: np.ndarray, block: int = 256) -> np.ndarray:
    """The images (N, H, W, 3) of these rows in this order, which torchvision reads as planes of one channel.

    One channel after the other, of as many images as a core's cache holds, takes a quarter of the time of
    ``np.ascontiguousarray(images[rows])``.
    """
    ordered = np.empty((len(rows), *images.shape[1:]), images.dtype)
    for start in range(0, len(rows), block):
        some = images[rows[start:start + block]]
        for channel in range(images.shape[-1]):
            ordered[start:start + block, ..., channel] = some[..., channel]
    return ordered


def load_cifar(name: str, data_dir: str | Path | None = None) -> Splits:
    """Small photographs of objects, 32x32, downloaded on first use.

    The published 50,000 training images are split 45,000 / 5,000 into train and validation, each class alike, by a
    fixed seed; the published 10,000 test images are test.

    Args:
        name: ``'cifar10'`` or ``'cifar100'`` (fine classes).
        data_dir: Folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``; None takes `default_data_dir`.

    Returns:
        Three `ImageSet` with uint8 images of shape (N, 32, 32, 3) and class targets.

    Raises:
        DataError: If a file differs from the published one, or the set is absent and cannot be downloaded.
    """
    if name not in _CLASSES:
        raise unknown_choice('', 'set', name, _CLASSES)
    data_dir = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    if not (data_dir / _CLASSES[name].base_folder).is_dir():
        _download(name, data_dir)
    try:
        published, test = (_published(name, data_dir, train) for train in (True, False))
    except OSError as e:
        raise DataError(f'{e.filename}: {name} cannot be read ({e.strerror}). Make the file readable.') from None
    except RuntimeError:
        raise _damaged(name, data_dir) from None
    target = Target('class', tuple(published.classes))
    parts = [(published, rows) for rows in stratified_split(published.targets, _HELD_OUT, _SEED)]
    train, validation, test = (
        ImageSet(_pixel_by_pixel(part.data, rows), torch.tensor(part.targets)[torch.from_numpy(rows)], target)
        for part, rows in (*parts, (test, np.arange(len(test)))))
    return Splits(name, train, validation, test, 'no licence stated by the makers; cite Krizhevsky 2009')
