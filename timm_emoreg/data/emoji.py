"""The emoji set that travels inside the package: drawings in three styles, rated by how they are used.

Drawings: Noto Emoji, Twemoji and Fluent Emoji 3D, 64x64 pixels over mid-grey. Ratings: Emoji Sentiment Ranking 1.0
(Kralj Novak, Smailović, Sluban, Mozetič 2015, doi 10.1371/journal.pone.0144296): how often an emoji stood in tweets
that people had marked negative, neutral or positive. Object classes: Unicode's groups. `assets/NOTICE` has the
licences; `timm_emoreg.data.build_emoji` makes the file.

Which emoji go where is a fixed rule:

- Near-copies form a *family*, and a family is never divided, neither between parts nor between the two sets. A family
  is all gendered and otherwise joined variants of one base (`man running`, `woman running`; `cat`, `black cat`),
  people with the same attribute (`man cook`, `woman cook`), all clock faces, and single shapes in several colours,
  sizes or phases (hearts, circles, squares, moons); `build_emoji.family` has the details.
  What only resembles each other (faces, arrows, letters in a square) stays apart: there the difference is the meaning.
- The stimuli of stage 1 are the emoji with 5 occurrences or more, as in the published ranking, of each group that has
  20 such emoji. Flags have two, too few for a class, so stage 1 shows no flag.
- The objects of stage 2 are all emoji of the families that stage 1 never shows, which leaves more than 40 emoji in
  every group. An emoji without a usable rating in a family that stage 1 shows belongs to neither set.
"""
from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch
from PIL import Image

from .choices import unknown_choice
from .sets import DataError, ImageSet, Splits, Target
from .splitting import group_split

__all__ = ['CELL', 'SIZE', 'Emoji', 'emoji_index', 'emoji_pictures', 'load_emoji_objects', 'load_emoji_stimuli',
           'object_parts', 'stimulus_parts']

SIZE = 64
CELL = 80  # a tile and one WebP macroblock of background in the mosaics: no colour reaches the next tile
STYLES = ('noto', 'twemoji', 'fluent')
GROUPS = ('Smileys & Emotion', 'People & Body', 'Animals & Nature', 'Food & Drink', 'Travel & Places', 'Activities',
          'Objects', 'Symbols', 'Flags')  # Unicode's order
GRADES = ('negative', 'neutral', 'positive')
MIN_OCCURRENCES = 5  # the ranking's own threshold; a third of the stimuli rest on fewer than 20 tweets: noisy ratings
MIN_RATED = 20
STIMULUS_SHARES = (0.7, 0.15, 0.15)
OBJECT_SHARES = (0.6, 0.15, 0.25)  # a larger test part: it decides between methods, on about 800 pictures
SEED = 0
LICENCE = ('drawings: Apache-2.0 (Noto Emoji), CC-BY 4.0 (Twemoji), MIT (Fluent Emoji); '
           'ratings: CC BY-SA 4.0 (Emoji Sentiment Ranking 1.0); see timm_emoreg/assets/NOTICE')


@dataclass(frozen=True)
class Emoji:
    """One drawing of an emoji.

    Args:
        codepoints: Hyphenated upper-case hex, for example ``'2764-FE0F'``.
        name: Unicode's name in lower case.
        group: One of Unicode's groups.
        family: Name shared by near-copies.
        negative: Occurrences in negative tweets, 0 if the emoji is not in the ranking; likewise the next two.
        neutral: Occurrences in neutral tweets.
        positive: Occurrences in positive tweets.
        style: ``'noto'``, ``'twemoji'`` or ``'fluent'``.
    """

    codepoints: str
    name: str
    group: str
    family: str
    negative: int
    neutral: int
    positive: int
    style: str

    @property
    def text(self) -> str:
        """The emoji as a string."""
        return ''.join(chr(int(c, 16)) for c in self.codepoints.split('-'))

    @property
    def rated(self) -> bool:
        """Whether the ranking saw it at least `MIN_OCCURRENCES` times."""
        return self.negative + self.neutral + self.positive >= MIN_OCCURRENCES

    @property
    def valence(self) -> float:
        """Sentiment score, p(positive) - p(negative), in -1..1.

        The probabilities are the Laplace estimates (n + 1) / (N + 3), which the ranking's authors use for rare emoji:
        they draw a score towards 0 where it rests on few tweets.
        """
        return (self.positive - self.negative) / (self.negative + self.neutral + self.positive + len(GRADES))


@lru_cache(maxsize=1)
def _load() -> tuple[tuple[Emoji, ...], np.ndarray]:
    """The rows and the pictures of the embedded file, one a drawing, emoji by emoji."""
    path = files('timm_emoreg') / 'assets' / 'emoji.zip'
    remedy = 'Reinstall timm_emoreg, or rebuild the file with `python -m timm_emoreg.data.build_emoji`.'
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            rows = list(csv.DictReader(io.StringIO(archive.read('index.csv').decode('utf-8'))))
            mosaics = {}
            for style in STYLES:
                with Image.open(io.BytesIO(archive.read(f'{style}.webp'))) as image:
                    mosaics[style] = np.asarray(image.convert('RGB'))
    except FileNotFoundError:
        raise DataError(f'{path}: the embedded emoji set is missing. {remedy}') from None
    except (KeyError, OSError, zipfile.BadZipFile) as e:
        raise DataError(f'{path}: the embedded emoji set is not readable ({e}). {remedy} '
                        'Pillow needs its WebP support.') from None
    index, pictures = [], []
    for i, row in enumerate(rows):
        for style in row['styles'].split():
            mosaic = mosaics[style]
            top, left = (CELL * k for k in divmod(i, mosaic.shape[1] // CELL))
            pictures.append(mosaic[top:top + SIZE, left:left + SIZE])
            index.append(Emoji(row['codepoints'], row['name'], row['group'], row['family'],
                               *(int(row[grade]) for grade in GRADES), style))
    pictures = np.stack(pictures)
    pictures.flags.writeable = False  # shared by all callers
    return tuple(index), pictures


def emoji_index() -> tuple[Emoji, ...]:
    """One record a drawing, all styles of an emoji together, in Unicode's order.

    Raises:
        DataError: If the embedded file is missing or damaged.
    """
    return _load()[0]


def emoji_pictures() -> np.ndarray:
    """The drawings in the order of `emoji_index`: uint8, shape (N, 64, 64, 3), read-only.

    Raises:
        DataError: If the embedded file is missing or damaged.
    """
    return _load()[1]


def _split(members: Sequence[int], shares: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Divide drawings by family, group by group, into sorted parts with these shares of each group's families."""
    index = emoji_index()
    home = {}  # the group whose draw decides; the rare family of two groups follows its first emoji
    for i in members:
        home.setdefault(index[i].family, index[i].group)
    parts = [[] for _ in shares]
    for group in GROUPS:
        drawings = np.array([i for i in members if home[index[i].family] == group], dtype=np.int64)
        if len(drawings):
            for part, chosen in zip(parts, group_split([index[i].family for i in drawings], shares, SEED), strict=True):
                part.append(drawings[chosen])
    parts = tuple(np.sort(np.concatenate(part)) for part in parts)
    for part in parts:
        part.flags.writeable = False
    return parts


@lru_cache(maxsize=1)
def _stimuli() -> tuple[int, ...]:
    """Positions in `emoji_index` of the drawings that stage 1 shows in one of its parts."""
    rated = Counter({e.codepoints: e.group for e in emoji_index() if e.rated}.values())
    return tuple(i for i, e in enumerate(emoji_index()) if e.rated and rated[e.group] >= MIN_RATED)


@lru_cache(maxsize=1)
def stimulus_parts() -> tuple[np.ndarray, ...]:
    """Positions in `emoji_index` of the train, validation and test images of `load_emoji_stimuli`, in their order."""
    return _split(_stimuli(), STIMULUS_SHARES)


@lru_cache(maxsize=1)
def object_parts() -> tuple[np.ndarray, ...]:
    """Positions in `emoji_index` of the train, validation and test images of `load_emoji_objects`, in their order."""
    index = emoji_index()
    shown = {index[i].family for i in _stimuli()}
    return _split([i for i, e in enumerate(index) if e.family not in shown], OBJECT_SHARES)


def _emoji_number(part: np.ndarray) -> torch.Tensor:
    """The same number for all drawings of an emoji: (N,) int64."""
    index = emoji_index()
    numbers = {codepoints: n for n, codepoints in enumerate(dict.fromkeys(e.codepoints for e in index))}
    return torch.tensor([numbers[index[i].codepoints] for i in part])


def _class_sets(parts: Sequence[np.ndarray]) -> list[ImageSet]:
    """Image sets labelled by group; the classes are the groups that occur, in Unicode's order."""
    index = emoji_index()
    occurring = {index[i].group for part in parts for i in part}
    names = tuple(group for group in GROUPS if group in occurring)
    return [ImageSet(emoji_pictures()[part], torch.tensor([names.index(index[i].group) for i in part]),
                     Target('class', names), _emoji_number(part)) for part in parts]


def load_emoji_stimuli(labels: str = 'valence') -> Splits:
    """The rated emoji, for stage 1.

    Args:
        labels: ``'valence'`` for the ratings, shape (N, 1), in -1..1; ``'group'`` for Unicode's group of the same
            pictures in the same order, a label without affect, shape (N,).

    Returns:
        Three parts, divided by family within each group; images uint8, shape (N, 64, 64, 3). The drawings of one
        emoji are one of the ``groups`` of the set.

    Raises:
        DataError: If `labels` is neither, or the embedded file is missing or damaged.
    """
    if labels == 'group':
        sets = _class_sets(stimulus_parts())
    elif labels == 'valence':
        index = emoji_index()
        sets = [ImageSet(emoji_pictures()[part], torch.tensor([[index[i].valence] for i in part]),
                         Target('ratings', ('valence',), -1.0, 1.0), _emoji_number(part)) for part in stimulus_parts()]
    else:
        raise unknown_choice('emoji', 'labels', labels, ('valence', 'group'))
    return Splits('emoji', *sets, licence=LICENCE)


def load_emoji_objects() -> Splits:
    """The emoji that no part of `load_emoji_stimuli` shows, with Unicode's group as object class, for stage 2.

    Returns:
        Three parts, divided by family within each group; images uint8, shape (N, 64, 64, 3), targets of shape (N,).
        The groups differ in size: report the mean recall over classes beside the accuracy.

    Raises:
        DataError: If the embedded file is missing or damaged.
    """
    return Splits('emoji_objects', *_class_sets(object_parts()), licence=LICENCE)
