"""Several sets of stimuli shown as one."""
from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .sets import DataError, ImageSet, Splits, Target

__all__ = ['different_kinds', 'show_together']

_logger = logging.getLogger(__name__)

_SAME_EMOTION = {'angry': 'anger', 'disgusted': 'disgust', 'fearful': 'fear', 'happy': 'happiness', 'sad': 'sadness',
                 'surprised': 'surprise'}


def _emotion(name: str) -> str:
    return _SAME_EMOTION.get(name.lower(), name.lower())


def different_kinds(labels: str) -> DataError:
    """The error to raise for sets that cannot be shown together, whose labels are these."""
    return DataError(f'One affect response cannot answer labels of different kinds ({labels}). Show together '
                     'emotions with emotions (ferplus, nemo, folders) or ratings with ratings (emoji, oasis, csv).')


def _common_target(sets: Sequence[Splits]) -> Target:
    kinds = {one.target.kind for one in sets}
    labels = '; '.join(f'{one.name}: {one.target.kind}: {", ".join(one.target.names)}' for one in sets)
    if kinds == {'class'}:
        return Target('class', tuple(dict.fromkeys(_emotion(name) for one in sets for name in one.target.names)))
    if kinds != {'ratings'}:
        raise different_kinds(labels)
    first, *others = (one.target.names for one in sets)
    common = tuple(name for name in first if all(name in names for names in others))
    if not common:
        raise DataError(f'These stimuli have no rating in common ({labels}). Rename the columns that mean the same, '
                        'or show the sets apart.')
    return Target('ratings', common)


def _translated(part: ImageSet, target: Target) -> Tensor:
    """The targets of `part` in the order and the number of the names of `target`."""
    if target.kind == 'class':
        return torch.tensor([target.names.index(_emotion(name)) for name in part.target.names])[part.targets]
    return part.targets[:, [part.target.names.index(name) for name in target.names]]


def _without_copies(splits: Splits) -> Splits:
    """Without training pictures that are one of validation or test, and validation pictures that are one of test.

    Two sets can share pictures, of which one has in training what the other one has in test.
    """
    def digests(part: ImageSet) -> list[bytes]:
        pictures = (part.picture(i) for i in range(len(part)))
        return [hashlib.blake2b(repr(p.size).encode() + p.tobytes(), digest_size=16).digest() for p in pictures]

    train, validation, test = (digests(part) for part in (splits.train, splits.validation, splits.test))
    kept = [[i for i, digest in enumerate(own) if digest not in others] for own, others in (
        (train, {*validation, *test}), (validation, {*test}))]
    left_out = len(train) - len(kept[0]), len(validation) - len(kept[1])
    if not any(left_out):
        return splits
    _logger.warning('%s: left out %d training and %d validation pictures that are exact copies of evaluation pictures.',
                    splits.name, *left_out)
    return replace(splits, train=splits.train.subset(kept[0]), validation=splits.validation.subset(kept[1]))


def _joined_groups(parts: Sequence[ImageSet]) -> Tensor | None:
    if all(part.groups is None for part in parts):
        return None
    groups: list[Tensor] = []
    for part in parts:
        own = torch.arange(len(part)) if part.groups is None else part.groups
        groups.append(own + 1 + max((int(other.max()) for other in groups), default=-1))
    return torch.cat(groups)


def show_together(sets: Sequence[Splits]) -> Splits:
    """The images of all sets in one, part by part: train with train, validation with validation, test with test.

    Emotions of the same name become one class, whatever their case; adjectives count as their nouns ('surprised' as
    'surprise'). Of ratings those are kept that every set has; each was mapped to [-1, 1] from its own scale. Images
    keep their sizes. They are mirrored in training only if every set may be. What is pixel by pixel a picture of a
    later part is left out of the earlier one, and a log line gives the number; copies of another size are not found.

    Raises:
        DataError: If the sets have labels of different kinds, or ratings without a common name.
    """
    target = _common_target(sets)

    def joined(name: str) -> ImageSet:
        parts = [getattr(one, name) for one in sets]
        same = {part.images.shape[1:] if isinstance(part.images, np.ndarray) else None for part in parts}
        if len(same) == 1 and None not in same:
            images = np.concatenate([part.images for part in parts])
        else:
            images = [image for part in parts for image in part.images]
        return ImageSet(images, torch.cat([_translated(part, target) for part in parts]), target,
                        _joined_groups(parts))

    return _without_copies(Splits(
        '+'.join(one.name for one in sets), joined('train'), joined('validation'), joined('test'),
        '; '.join(dict.fromkeys(one.licence for one in sets)), all(one.flip_safe for one in sets)))
