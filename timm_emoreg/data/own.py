"""Anyone's own pictures: a folder with a subfolder per emotion or class, or a csv of image paths and ratings."""
from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .choices import unknown_choice
from .sets import DataError, ImageSet, Splits, Target
from .splitting import stratified_split
from .table import Table, read_table

__all__ = ['IMAGE_SUFFIXES', 'load_csv', 'load_folder']

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.pgm', '.ppm')
_PARTS = {'train': 'train', 'training': 'train', 'validation': 'validation', 'val': 'validation', 'valid': 'validation',
          'dev': 'validation', 'test': 'test', 'testing': 'test'}
_HIDDEN = ('.', '__', '@eaDir')  # .git, __MACOSX and the like, and Synology's thumbnails
_SEED = 0
_LICENCE = "the owner's; not known to this project"


def _missing_parts(present: set[str]) -> int:
    return len({'validation', 'test'} - present)


def _complete(parts: dict[str, np.ndarray], labels: np.ndarray) -> list[np.ndarray]:
    """Train, validation and test; a part that is missing is cut from train, the same share of each label."""
    train, validation, test = (parts.get(name) for name in ('train', 'validation', 'test'))
    share = 0.1
    if test is None:
        rest, cut = stratified_split(labels[train], share, _SEED)
        train, test = train[rest], train[cut]
        share = 1 / 9  # of the nine tenths that are left
    if validation is None:
        rest, cut = stratified_split(labels[train], share, _SEED)
        train, validation = train[rest], train[cut]
    return [train, validation, test]


def _unreadable(error: OSError) -> DataError:
    return DataError(f'{error.filename}: the folder cannot be read ({error.strerror}). Make it readable.')


def _natural_key(name: str) -> list[int | str]:
    """timm's `natural_key`, which fails at digits of which `int` makes no number, such as those of 10²."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r'(\d+)', name.lower())]


def _subfolders(folder: Path) -> list[Path]:
    try:
        found = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(_HIDDEN)]
    except OSError as e:
        raise _unreadable(e) from None
    return sorted(found, key=lambda p: (_natural_key(p.name), p.name))  # timm's order: 2 before 10, a before B


def _images(folder: Path) -> list[Path]:
    def fail(error: OSError):
        raise _unreadable(error)

    found = []
    for root, folders, names in os.walk(folder, onerror=fail):  # links to folders are not followed: they may lead up
        folders[:] = [name for name in folders if not name.startswith(_HIDDEN)]
        found += [Path(root) / name for name in names
                  if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith('.')]
    if not found:
        raise DataError(f'{folder}: the class folder holds no image ({", ".join(IMAGE_SUFFIXES)}). '
                        'Add images or remove the folder.')
    return sorted(found)


def _holds_classes(folder: Path) -> bool:
    """Whether a folder has two folders or more and no image beside them, as a part of a set does."""
    return len(_subfolders(folder)) > 1 and not any(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.iterdir())


def _part_folders(root: Path) -> dict[str, Path]:
    """The folder of each part; a root without parts is all train."""
    found = _subfolders(root)
    names = {p.name.lower() for p in found}
    named = sorted(names & _PARTS.keys())
    if not named:
        return {'train': root}
    if 'train' not in {_PARTS[name] for name in named}:
        if len(named) == 1:  # a class of tests
            return {'train': root}
        raise DataError(f'{root}: has the parts {", ".join(named)} and no train. Add it, or rename these if they are '
                        'classes.')
    if others := sorted(p.name for p in found if p.name.lower() not in _PARTS):
        if len(named) == 1 and not _holds_classes(next(p for p in found if p.name.lower() == named[0])):
            return {'train': root}  # a class of trains
        raise DataError(f'{root}: {others[0]!r} lies beside the parts {", ".join(named)} and is none of them. Move it '
                        'elsewhere, or into a part if it is a class.')
    parts: dict[str, Path] = {}
    for folder in found:
        part = _PARTS[folder.name.lower()]
        if part in parts:
            raise DataError(f'{root}: {parts[part].name!r} and {folder.name!r} both mean the part {part}. '
                            'Merge them or remove one.')
        parts[part] = folder
    return parts


def load_folder(root: str | Path) -> Splits:
    """Pictures in one subfolder per emotion or class, whose sorted names become the classes.

    ``root/<class>/...`` is split 80 / 10 / 10 %, each class alike, by a fixed seed. ``root/train/<class>/...`` (or
    ``training``) with ``validation`` (or ``val``, ``valid``, ``dev``) and ``test`` (or ``testing``) beside it is taken
    as it is; of these two, one that is missing is cut from train, 10 % of each class. Files with other suffixes than
    `IMAGE_SUFFIXES`, hidden ones and those in hidden folders are passed over, case does not matter, deeper folders
    belong to their class, linked folders below a class do not.

    Returns:
        Three `ImageSet` of paths with class targets; a damaged image raises when it is read.

    Raises:
        DataError: If the folder is missing, has less than two classes, an image is a link that leads to no file, or
            a class is empty, has too few images to be in every part (3, or 2 where both other parts are given), or is
            not in train.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f'{root}: there is no such folder. Correct the path.')
    parts = _part_folders(root)
    names = tuple(p.name for p in _subfolders(parts['train']))
    if len(names) < 2:
        raise DataError(f'{parts["train"]}: {len(names)} class folders, at least 2 are needed, '
                        'one subfolder with images per class.')
    needed = max(2, 1 + _missing_parts(set(parts)))
    paths, labels, members = [], [], {}
    for part, folder in parts.items():
        start = len(paths)
        for class_folder in _subfolders(folder):
            if class_folder.name not in names:
                raise unknown_choice(str(folder), 'class', class_folder.name, names,
                                     f'Add it to {parts["train"]} or remove it.')
            images = _images(class_folder)
            if part == 'train' and len(images) < needed:
                raise DataError(f'{class_folder}: the class has {len(images)} image{"s"[:len(images) > 1]}, at least '
                                f'{needed} are needed to have it in every part. Add images or remove the folder.')
            paths += images
            labels += [names.index(class_folder.name)] * len(images)
        members[part] = np.arange(start, len(paths))
        if start == len(paths):
            raise DataError(f'{folder}: the part holds no class folder. Fill it or remove it.')
    first: dict[Path, Path] = {}
    for path in paths:
        try:
            file = path.resolve(strict=True)
        except (OSError, RuntimeError) as e:  # links that lead in a circle or nowhere
            raise DataError(f'{path}: is not a usable path ({type(e).__name__}). Correct the link or '
                            'remove it.') from None
        if (one := first.setdefault(file, path)) is not path:
            raise DataError(f'{path}: is the same file as {one}, which could land in train and test. Remove one of '
                            'these links.')
    whole = ImageSet(paths, torch.tensor(labels), Target('class', names))
    train, validation, test = (whole.subset(part) for part in _complete(members, np.array(labels)))
    return Splits(root.resolve().name, train, validation, test, _LICENCE)


def _has_column(table: Table, name: str) -> bool:
    """Whether a table has a column that need not be there; one that is only spelled otherwise is an error."""
    other = next((column for column in table.columns if column.lower() == name and column != name), None)
    if other and name not in table.columns:
        raise DataError(f'{table.path}: the column {other!r} would be passed over. Call it {name!r}, or something else '
                        'if it is to be.')
    return name in table.columns


def _csv_parts(table: Table) -> dict[str, np.ndarray]:
    if not _has_column(table, 'split'):
        return {'train': np.arange(len(table))}
    aliases = list(_PARTS)
    part = np.array([_PARTS[aliases[i]] for i in table.choices('split', aliases)])
    return {name: np.flatnonzero(part == name) for name in dict.fromkeys(part.tolist())}


def load_csv(path: str | Path, rating_columns: Sequence[str], rating_scale: tuple[float, float]) -> Splits:
    """Pictures and their ratings from a comma-separated UTF-8 file with a header.

    The column ``image``, or else the first one, names the image files, relative to the folder of the csv and inside
    of it. A column ``split`` with train (or training), validation (val, valid, dev) or test (testing) in every row
    fixes the parts; of the last two, one that no row names is cut from train, 10 % by a fixed seed. Without the column
    the split is 80 / 10 / 10 %.
    Other columns are passed over.

    Args:
        path: The csv file.
        rating_columns: D columns with one number per image, such as ``('valence', 'arousal')``.
        rating_scale: Lowest and highest rating that can be given, the same for all columns.

    Returns:
        Three `ImageSet` of paths with targets of kind 'ratings', shape (N, D), mapped from the scale to [-1, 1];
        a damaged image raises when it is read.

    Raises:
        DataError: If the file is not such a table, a rating is not a number of the scale, an image is missing, lies
            outside the folder or is named twice, or there are too few rows for every part.
    """
    path = Path(path).expanduser()
    columns = (rating_columns,) if isinstance(rating_columns, str) else tuple(rating_columns)
    low, high = map(float, rating_scale)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise DataError(f'{path}: the rating scale {low:g} to {high:g} does not rise. '
                        'Give its lowest and highest number.')
    table = read_table(path)
    if not columns or len(set(columns)) < len(columns):
        raise DataError(f'{path}: the rating columns {list(columns)} are none or not distinct. '
                        f'Name each once, from {", ".join(map(repr, table.columns))}.')
    ratings = np.stack([table.numbers(name, low, high) for name in columns], axis=1)
    image_column = 'image' if _has_column(table, 'image') else table.columns[0]
    images = table.files(table.column(image_column), path.parent)
    first: dict[Path, int] = {}
    for i, image in enumerate(images):
        if image in first:
            raise DataError(f'{table.where(i)}: {table.column(image_column)[i]!r} is already on line '
                            f'{table.lines[first[image]]}. Average the ratings of one image into one row, '
                            'or it could land in train and test.')
        first[image] = i
    parts = _csv_parts(table)
    needed = 1 + _missing_parts(set(parts))
    if len(parts.get('train', ())) < needed:
        raise DataError(f'{path}: {len(parts.get("train", ()))} rows for train, at least {needed} are needed. '
                        'Add rows.')
    target = Target('ratings', columns, low, high)
    whole = ImageSet(images, target.normalise(torch.from_numpy(ratings)).float(), target)
    train, validation, test = (whole.subset(part) for part in _complete(parts, np.zeros(len(table), dtype=int)))
    return Splits(path.stem, train, validation, test, _LICENCE)
