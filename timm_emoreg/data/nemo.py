"""nEMO: acted emotional speech in Polish as spectrogram images (Christop 2024, arXiv 2404.06292)."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .choices import unknown_choice
from .folders import find_set
from .pictures import read_pictures
from .sets import ImageSet, Splits, Target
from .splitting import stratified_split
from .table import read_table

__all__ = ['EMOTIONS', 'load_nemo']

EMOTIONS = ('anger', 'fear', 'happiness', 'neutral', 'sadness', 'surprised')
_VALIDATION_SPEAKERS = ('SM0',)
_TEST_SPEAKERS = ('TP0', 'WR0')
_SEED = 0


def load_nemo(data_dir: str | Path | None = None, labels: str = 'emotion') -> Splits:
    """Log-mel spectrograms of spoken sentences, 64x64 grey.

    Emotions are split by speaker: of the nine in order of their names the last two (TP0, WR0) are test, the one before
    (SM0) is validation, the other six are train: 2,865 / 538 / 1,078 clips. Speakers, the label without emotion,
    cannot be split by speaker: of the clips of these six, and of no others, each speaker gives 5 % to test and 5 % to
    validation, by a fixed seed: 2,578 / 144 / 143 clips. All speakers say the same sentences, so this split shares
    sentences between its parts.

    Args:
        data_dir: Folder that holds ``nemo``; None takes `default_data_dir`.
        labels: ``'emotion'`` (`EMOTIONS`) or ``'speaker'`` (the sorted names of the six).

    Returns:
        Three `ImageSet` with uint8 images of shape (N, 64, 64) and class targets.

    Raises:
        DataError: If the folder, the table or a picture is missing or damaged, or `labels` is unknown.
    """
    if labels not in ('emotion', 'speaker'):
        raise unknown_choice('nemo', 'labels', labels, ('emotion', 'speaker'))
    folder = find_set('nemo', data_dir, 'metadata.csv (file, emotion, speaker) and 64x64 grey png spectrograms',
                      'Christop (nEMO, arXiv 2404.06292; clips drawn as log-mel spectrograms)')
    table = read_table(folder / 'metadata.csv')
    pictures = read_pictures(table.files(table.column('file'), folder), (64, 64), 'L')
    speakers = np.array(table.column('speaker'))
    held_out = [np.isin(speakers, names) for names in (_VALIDATION_SPEAKERS, _TEST_SPEAKERS)]
    train, validation, test = (np.flatnonzero(part) for part in (~held_out[0] & ~held_out[1], *held_out))
    if labels == 'emotion':
        names, classes = EMOTIONS, table.choices('emotion', EMOTIONS)
    else:  # as a control it shows what the emotions show in training, and nothing of their evaluation
        names, pictures = sorted({*speakers[train].tolist()}), pictures[train]
        classes = np.searchsorted(names, speakers[train])
        rest, test = stratified_split(classes, 0.05, _SEED)
        train, validation = (rest[part] for part in stratified_split(classes[rest], 0.05 / 0.95, _SEED))
    whole = ImageSet(pictures, torch.from_numpy(classes), Target('class', tuple(names)))
    return Splits('nemo', *(whole.subset(part) for part in (train, validation, test)), 'CC BY-NC-SA 4.0 (nEMO)',
                  flip_safe=False)
