"""FER+: faces with the expression votes of ten people (Barsoum, Zhang, Canton Ferrer, Zhang 2016, arXiv 1608.01041)."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .choices import unknown_choice
from .folders import find_set
from .pictures import read_pictures
from .sets import ImageSet, Splits, Target
from .table import Table, read_table

__all__ = ['EMOTIONS', 'FER2013_EMOTIONS', 'load_ferplus', 'majority_emotion', 'vote_distribution']

EMOTIONS = ('neutral', 'happiness', 'surprise', 'sadness', 'anger', 'disgust', 'fear', 'contempt')
FER2013_EMOTIONS = ('angry', 'disgust', 'fear', 'happy', 'sad', 'surprise', 'neutral')
_NO_EMOTION = ('unknown', 'NF')  # the last two vote columns: cannot tell, not a face
_PARTS = {'Training': 'FER2013Train', 'PublicTest': 'FER2013Valid', 'PrivateTest': 'FER2013Test'}
_TRAIN, _VALIDATION, _TEST = range(3)  # the order of _PARTS

_logger = logging.getLogger(__name__)


def _without_outliers(votes: np.ndarray) -> np.ndarray:
    return np.where(votes > 1, votes, 0)


def majority_emotion(votes: np.ndarray) -> np.ndarray:
    """The emotion that more than half of the votes agree on, the authors' rule for their 'majority' mode.

    A column with a single vote counts as an outlier and is set to 0 first. The winner needs more than half of the
    votes that remain, those for 'unknown' and 'NF' included; otherwise, or where one of these two wins, there is none.

    Args:
        votes: Counts, shape (N, 10): the eight emotions, unknown, NF.

    Returns:
        Index into `EMOTIONS`, -1 where there is no majority, shape (N,), int64.
    """
    votes = _without_outliers(votes)
    winner = votes.argmax(axis=1)
    agreed = votes.max(axis=1) > 0.5 * votes.sum(axis=1)
    return np.where(agreed & (winner < len(EMOTIONS)), winner, -1)


def vote_distribution(votes: np.ndarray) -> np.ndarray:
    """The share of each leading emotion, the authors' rule for their 'probability' and 'crossentropy' modes.

    A column with a single vote counts as an outlier and is set to 0 first. Then the emotions with the most votes are
    taken, ties together, until they cover 3/4 of the votes that remain, or three are taken, or 'unknown' or 'NF' would
    be next. Faces where the taken emotions have half of the votes or less, or are more than three, have none.

    Args:
        votes: Counts, shape (N, 10): the eight emotions, unknown, NF.

    Returns:
        Distribution over `EMOTIONS`, shape (N, 8), float64; each row sums to 1, or is all 0 where the rule gives none.
    """
    left = _without_outliers(votes).astype(np.float64)
    total = left.sum(axis=1)
    taken = np.zeros((len(left), len(EMOTIONS)))
    stopped = np.zeros(len(left), dtype=bool)
    for _ in range(3):
        going = ~stopped & (taken.sum(axis=1) < 0.75 * total) & ((taken > 0).sum(axis=1) < 3)
        first = (left == left.max(axis=1, keepdims=True)) & going[:, None]
        taken += np.where(first, left, 0)[:, :len(EMOTIONS)]
        left[first] = 0
        stopped |= first[:, len(EMOTIONS):].any(axis=1)
    covered = taken.sum(axis=1)
    valid = (covered > 0.5 * total) & ((taken > 0).sum(axis=1) <= 3)
    return np.where(valid[:, None], taken, 0) / np.where(valid, covered, 1)[:, None]


def _without_copies(faces: np.ndarray, part: np.ndarray) -> np.ndarray:
    """True for the faces that stay: train loses copies of both evaluation parts, validation those of test."""
    keys = [face.tobytes() for face in faces]
    keep = np.ones(len(faces), dtype=bool)
    seen: set[bytes] = set()
    for current in (_TEST, _VALIDATION, _TRAIN):
        members = np.flatnonzero(part == current)
        keep[members] = [keys[i] not in seen for i in members]
        seen.update(keys[i] for i in members)
    return keep


class _Labels(NamedTuple):
    table: Table
    files: list[str]  # relative to the set's folder, shape (N,) as all below
    part: np.ndarray  # index into _PARTS
    targets: torch.Tensor
    labelled: np.ndarray  # False where the rule gives no label
    target: Target


def _votes(folder: Path, labels: str) -> _Labels:
    table = read_table(folder / 'fer2013new.csv')
    # the authors leave the name empty for the pictures of FER2013 that they removed
    table = table.subset([i for i, name in enumerate(table.column('Image name')) if name])
    part = table.choices('Usage', list(_PARTS))
    folders = list(_PARTS.values())
    files = [f'{folders[p]}/{name}' for p, name in zip(part, table.column('Image name'), strict=True)]
    counts = np.stack([table.numbers(name, 0, 10) for name in (*EMOTIONS, *_NO_EMOTION)], axis=1)
    if labels == 'majority':
        emotion = majority_emotion(counts)
        return _Labels(table, files, part, torch.from_numpy(emotion), emotion >= 0, Target('class', EMOTIONS))
    shares = vote_distribution(counts)
    return _Labels(table, files, part, torch.from_numpy(shares).float(), shares.any(axis=1),
                   Target('votes', EMOTIONS))


def _fer2013(folder: Path) -> _Labels:
    table = read_table(folder / 'fer2013_labels.csv')
    files = table.column('file')
    folders = list(_PARTS.values())
    part = np.empty(len(files), dtype=np.int64)
    for i, name in enumerate(files):
        first = name.partition('/')[0]
        if first not in folders:
            raise unknown_choice(table.where(i), 'folder', first, folders, 'Correct the path or remove the row.')
        part[i] = folders.index(first)
    emotion = torch.from_numpy(table.choices('label', FER2013_EMOTIONS))
    certain = table.choices('ambiguous', ('0', '1')) == 0
    return _Labels(table, files, part, emotion, certain, Target('class', FER2013_EMOTIONS))


def load_ferplus(data_dir: str | Path | None = None, labels: str = 'majority') -> Splits:
    """Faces of 48x48 grey pixels in the authors' three parts: train, PublicTest as validation, PrivateTest as test.

    Training faces that are an exact copy, pixel by pixel, of any face in the two evaluation folders are left out, and
    so are validation faces that are a copy of a test face, whatever the labels; a log line gives both counts.

    Args:
        data_dir: Folder that holds ``ferplus``; None takes `default_data_dir`.
        labels: ``'majority'``, the emotion with more than half of the votes (`majority_emotion`); ``'probability'``,
            the distribution of the leading votes (`vote_distribution`), target kind 'votes'; ``'fer2013'``, the
            7 classes of the original FER2013, without the faces marked ambiguous in ``fer2013_labels.csv``.

    Returns:
        Three `ImageSet` with uint8 images of shape (N, 48, 48). Of the 35,710 faces that the published table names
        (28,558 / 3,579 / 3,573 in train / validation / test), these stay after copies and rules:
        24,443 / 3,157 / 3,152 with a majority, 27,276 / 3,461 / 3,504 with a distribution,
        27,605 / 3,518 / 3,554 with a FER2013 class.

    Raises:
        DataError: If the folder, a table or a face is missing or damaged, or `labels` is unknown.
    """
    if labels not in ('majority', 'probability', 'fer2013'):
        raise unknown_choice('ferplus', 'labels', labels, ('majority', 'probability', 'fer2013'))
    folder = find_set('ferplus', data_dir, 'FER2013Train, FER2013Valid and FER2013Test with 48x48 grey png files, '
                      'fer2013new.csv (votes) and, for the labels fer2013, fer2013_labels.csv',
                      'FER2013 (ICML 2013 challenge in representation learning, the images) and Microsoft FER+ '
                      '(arXiv 1608.01041, the votes)')
    found = _fer2013(folder) if labels == 'fer2013' else _votes(folder, labels)
    faces = read_pictures(found.table.files(found.files, folder), (48, 48), 'L')
    part, labelled = found.part, found.labelled
    unique = _without_copies(faces, part)
    _logger.info('ferplus: left out %d training and %d validation faces that are exact copies of evaluation faces; '
                 'of the others, %d have no %s label.', (~unique & (part == _TRAIN)).sum(),
                 (~unique & (part == _VALIDATION)).sum(), (unique & ~labelled).sum(), labels)
    whole = ImageSet(faces, found.targets, found.target)
    train, validation, test = (whole.subset(np.flatnonzero(unique & labelled & (part == p))) for p in range(3))
    return Splits('ferplus', train, validation, test, 'labels MIT (FER+); images without licence, research use')
