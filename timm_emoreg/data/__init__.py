"""Stimulus sets and classification targets behind one small interface."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .choices import unknown_choice
from .folders import default_data_dir
from .sets import DataError, ImageSet, Splits, Target

__all__ = ['CONTENT_LABELS', 'STIMULI', 'TARGETS', 'DataError', 'ImageSet', 'Splits', 'Target', 'absolute',
           'check_stimuli', 'check_target', 'default_data_dir', 'load_stimuli', 'load_target', 'stimuli_parts']

# the first label of each set is its default
STIMULI = {
    'emoji': ('valence', 'group'),
    'ferplus': ('majority', 'probability', 'fer2013'),
    'oasis': ('ratings', 'category'),
    'nemo': ('emotion', 'speaker'),
}
RATED = ('emoji', 'oasis')  # those of STIMULI whose default labels are ratings; the others' are classes
CONTENT_LABELS = {'emoji': 'group', 'oasis': 'category', 'nemo': 'speaker'}  # those of STIMULI that are no emotions
TARGETS = ('cifar10', 'cifar100', 'emoji', 'oasis')


def _own_path(name: str, what: str, known: Sequence[str], kinds: str) -> Path:
    path = os.path.expanduser(name)
    if not os.path.exists(path):  # False, not an error, for the empty name and for any that no file can have
        if name in TARGETS:
            raise DataError(f'{name}: has no affective labels. It can be a classification target; stimuli are '
                            f'{", ".join(STIMULI)}.')
        if name in STIMULI:
            raise DataError(f'{name}: has affective labels only. It can be stimuli; classification targets are '
                            f'{", ".join(TARGETS)}.')
        if os.sep in name:
            raise DataError(f'{name[:200]!r}: there is no such file or folder. Correct the path, or put back what lay '
                            'there.')
        raise unknown_choice('', what, name, known, f'Or give the path of {kinds}; there is none of that name.')
    return Path(path)


def absolute(name: str, known: Sequence[str] = ()) -> str:
    """One of the `known` names as it is, and the path of something that exists as an absolute one, so that it means
    the same in another working directory."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if name not in known and os.path.exists(path) else name


def stimuli_parts(name: str) -> tuple[str, ...]:
    """The names between the plus signs of ``'ferplus+nemo'``. A path of something that exists may hold plus signs of
    its own: as many of the pieces as lead to something belong together."""
    pieces = name.split('+')
    parts = []
    while pieces:
        many = next((n for n in range(len(pieces), 1, -1)
                     if os.path.exists(os.path.expanduser('+'.join(pieces[:n])))), 1)
        parts.append('+'.join(pieces[:many]))
        del pieces[:many]
    return tuple(parts)


def _is_table(part: str) -> bool:
    return os.path.isfile(os.path.expanduser(part))


def _check_several(name: str, parts: tuple[str, ...], labels: str | None, rating_columns: Sequence[str] | None,
                   rating_scale: tuple[float, float] | None) -> None:
    if len(set(parts)) < len(parts):
        raise DataError(f'{name}: a set is named twice. Name each once.')
    if labels is not None:
        raise DataError(f'{name}: the labels {labels!r} cannot be chosen for several sets, which are shown with their '
                        'usual ones. Leave the choice out.')
    if not any(map(_is_table, parts)) and (rating_columns is not None or rating_scale is not None):
        raise DataError(f'{name}: rating_columns and rating_scale belong to a csv file. Leave them out.')
    options = {'rating_columns': rating_columns, 'rating_scale': rating_scale}
    for part in parts:
        check_stimuli(part, **(options if _is_table(part) else {}))
    kinds = {part: 'ratings' if part in RATED or _is_table(part) else 'class' for part in parts}
    if len(set(kinds.values())) > 1:
        from .together import different_kinds
        raise different_kinds('; '.join(f'{part}: {kind}' for part, kind in kinds.items()))


def check_stimuli(name: str, labels: str | None = None, *, rating_columns: Sequence[str] | None = None,
                  rating_scale: tuple[float, float] | None = None) -> None:
    """Refuse what `load_stimuli` cannot take, without reading any data; the arguments are those.

    Raises:
        DataError: If the name, the labels or an option do not fit.
    """
    parts = stimuli_parts(name)
    if len(parts) > 1:
        _check_several(name, parts, labels, rating_columns, rating_scale)
        return
    if name in STIMULI:
        if labels is not None and labels not in STIMULI[name]:
            raise unknown_choice(name, 'labels', labels, STIMULI[name])
    else:
        path = _own_path(name, 'stimuli', list(STIMULI), 'a folder with a subfolder per emotion, or of a csv file')
        if labels is not None:
            raise DataError(f'{name}: the labels {labels!r} cannot be chosen for own data, '
                            'which has one kind of labels. Leave the choice out.')
        if path.is_file():
            if rating_columns is None or rating_scale is None:
                raise DataError(f'{name}: a csv needs rating_columns (--rating-columns), the names of its columns with '
                                'ratings, and rating_scale (--rating-scale), their lowest and highest number. Give '
                                'both.')
            return
    if rating_columns is not None or rating_scale is not None:
        raise DataError(f'{name}: rating_columns and rating_scale belong to a csv file. Leave them out.')


def load_stimuli(name: str, data_dir: str | Path | None = None, labels: str | None = None, *,
                 rating_columns: Sequence[str] | None = None,
                 rating_scale: tuple[float, float] | None = None) -> Splits:
    """The stimuli of the affective pre-training.

    Args:
        name: A key of `STIMULI`, or the path of a folder with a subfolder per emotion, or of a csv file; or several of
            these with a plus sign between them, such as ``'ferplus+nemo'`` (see `together.show_together`).
        data_dir: Folder of all data sets; None takes `default_data_dir`. Not used for 'emoji' and for paths.
        labels: One of ``STIMULI[name]``, the first where None; there is no choice for paths and for several sets.
        rating_columns: Columns of a csv that hold the ratings; needed there, nowhere else.
        rating_scale: Lowest and highest rating of the csv; needed there, nowhere else.

    Raises:
        DataError: If the name, the labels or an option do not fit, or the data cannot be used.
    """
    options = {'rating_columns': rating_columns, 'rating_scale': rating_scale}
    check_stimuli(name, labels, **options)
    parts = stimuli_parts(name)
    if len(parts) > 1:
        from .together import show_together
        return show_together([load_stimuli(part, data_dir, **(options if _is_table(part) else {})) for part in parts])
    if name not in STIMULI:
        from .own import load_csv, load_folder
        path = Path(os.path.expanduser(name))
        return load_csv(path, rating_columns, rating_scale) if path.is_file() else load_folder(path)
    labels = labels or STIMULI[name][0]
    if name == 'emoji':
        from .emoji import load_emoji_stimuli
        return load_emoji_stimuli(labels=labels)
    if name == 'ferplus':
        from .ferplus import load_ferplus
        return load_ferplus(data_dir, labels)
    if name == 'oasis':
        from .oasis import load_oasis
        return load_oasis(data_dir, labels)
    from .nemo import load_nemo
    return load_nemo(data_dir, labels)


def check_target(name: str) -> None:
    """Refuse what `load_target` cannot take, without reading any data.

    Raises:
        DataError: If the name is unknown, or that of a file.
    """
    if name not in TARGETS and _own_path(name, 'data set', TARGETS, 'a folder with a subfolder per class').is_file():
        raise DataError(f'{name}: a file is not a classification target. '
                        'Give the path of a folder with a subfolder per class.')


def load_target(name: str, data_dir: str | Path | None = None) -> Splits:
    """The downstream classification.

    Args:
        name: One of `TARGETS` ('emoji': Unicode's groups over emoji that are no stimuli; 'oasis': the object
            category), or the path of a folder with a subfolder per class.
        data_dir: Folder of all data sets; None takes `default_data_dir`. Not used for 'emoji' and for paths.

    Raises:
        DataError: If the name is unknown, or the data cannot be used.
    """
    check_target(name)
    if name in ('cifar10', 'cifar100'):
        from .cifar import load_cifar
        return load_cifar(name, data_dir)
    if name == 'emoji':
        from .emoji import load_emoji_objects
        return load_emoji_objects()
    if name == 'oasis':
        from .oasis import load_oasis
        return load_oasis(data_dir, 'category')
    from .own import load_folder
    return load_folder(Path(os.path.expanduser(name)))
