"""OASIS: photographs with valence and arousal ratings (Kurdi, Lozano, Banaji 2017, doi 10.3758/s13428-016-0715-3)."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from .choices import unknown_choice
from .folders import find_set
from .pictures import read_pictures
from .sets import ImageSet, Splits, Target, read_picture
from .splitting import group_split
from .table import read_table

__all__ = ['CATEGORIES', 'load_oasis']

CATEGORIES = ('animal', 'object', 'person', 'scene')
_SHARES = (0.7, 0.15, 0.15)
# themes differ in size; of the seeds 0..999 this one's parts come nearest to the shares in every category, counted
# apart below and above the median valence (smallest sum of squared errors over expected counts)
_SEED = 588


def load_oasis(data_dir: str | Path | None = None, labels: str = 'ratings') -> Splits:
    """Photographs in one fixed split by theme, the same for both kinds of labels.

    Pictures of one theme ('Acorns 1', 'Acorns 2') show nearly the same scene, so a theme, its name without the
    number, lies in one part as a whole: 70 / 15 / 15 % of the 248 themes, 647 / 116 / 137 pictures.

    Args:
        data_dir: Folder that holds ``oasis``; None takes `default_data_dir`.
        labels: ``'ratings'``, mean valence and arousal, published from 1 to 7; ``'category'``, the object category
            (`CATEGORIES`), a label without emotion for the same pictures.

    Returns:
        Three `ImageSet`; uint8 images of shape (N, 128, 128, 3) where the first file has that size; the paths of
        the files where it has another, as in the full-size release.

    Raises:
        DataError: If the folder, the table or a picture is missing or damaged, or `labels` is unknown.
    """
    if labels not in ('ratings', 'category'):
        raise unknown_choice('oasis', 'labels', labels, ('ratings', 'category'))
    folder = find_set('oasis', data_dir, 'OASIS.csv and images/*.jpg',
                      'Kurdi, Lozano and Banaji (doi 10.3758/s13428-016-0715-3)')
    table = read_table(folder / 'OASIS.csv')
    themes = table.column('Theme')
    paths = table.files([f'images/{theme}.jpg' for theme in themes], folder)
    if labels == 'ratings':
        target = Target('ratings', ('valence', 'arousal'), 1, 7)
        means = [table.numbers(column, 1, 7) for column in ('Valence_mean', 'Arousal_mean')]
        targets = target.normalise(torch.from_numpy(np.stack(means, axis=1)).float())
    else:
        target = Target('class', CATEGORIES)
        targets = torch.from_numpy(table.choices('Category', [name.capitalize() for name in CATEGORIES]))
    small = read_picture(paths[0]).size == (128, 128)
    whole = ImageSet(read_pictures(paths, (128, 128), 'RGB') if small else paths, targets, target)
    stems = [re.sub(r'\s*\d+$', '', theme).lower() for theme in themes]
    train, validation, test = (whole.subset(part) for part in group_split(stems, _SHARES, _SEED))
    return Splits('oasis', train, validation, test, 'free to use and modify for research (OASIS)')
