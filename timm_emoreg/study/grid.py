"""The grid of a study: arms, the runs they need, and the csv of what is finished."""
from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

from ..data import CONTENT_LABELS, STIMULI, TARGETS, Splits, load_stimuli, load_target, stimuli_parts
from ..data.choices import unknown_choice
from ..data.duplicates import check_unseen
from ..files import replacing
from ..training.settings import REGULATION

__all__ = ['ARMS', 'COLUMNS', 'DUAL_HEAD_FLAGS', 'LABELS', 'RESERVED', 'STAGE_1_FLAGS', 'Arm', 'Ratings', 'Run',
           'StudyError', 'data_digests', 'images_seen', 'parse_arm', 'plan', 'rating_flags', 'read_rows', 'read_runs',
           'recipe', 'short_name', 'write_rows']


class StudyError(ValueError):
    """A study that cannot be run or evaluated as asked; the message names the value and the remedy."""


# -- arms --------------------------------------------------------------------------------------------------------------

# arm -> task of stage 2, and the labels of stage 1, None without stage 1
ARMS = {
    'plain': ('plain', None),
    'plain+': ('plain', None),
    'init': ('plain', 'affect'),
    'regulated': ('emoreg', 'affect'),
    'random': ('emoreg', None),
    'shuffled': ('emoreg', 'shuffled'),
    'content': ('emoreg', 'content'),
    'unlabelled': ('emoreg', 'unlabelled'),
}
LABELS = ('shuffled', 'content', 'unlabelled')  # controls of stage 1
METHOD = {
    'learned': ('--balance', 'learned'),
    'gate': ('--balance', 'gate'),
    'loss': ('--balanced-in', 'loss'),
    'separate': ('--separate-experience',),
    'no-modulation': ('--no-modulation',),
}
# flags of the arms that have the dual head
DUAL_HEAD_FLAGS = ('rehearsal', 'no-modulation', *(name.replace('_', '-') for name in REGULATION))
STAGE_1_FLAGS = ('experience-share',)  # of the arms that have a stage 1
# what the study itself decides for each run
RESERVED = ('model', 'task', 'seed', 'dataset', 'train-images', 'epochs', 'affect-epochs', 'experience', 'stimuli',
            'stimuli-labels', 'shuffle-stimuli-labels', 'rating-columns', 'rating-scale', 'data-dir', 'device',
            'output', 'experiment', 'resume')


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: Base and options, ``base:option,option``.
        base: A key of `ARMS`.
        task: ``'plain'`` or ``'emoreg'``, the task of stage 2.
        labels: Labels of stage 1: ``'affect'``, ``'shuffled'``, ``'content'``, ``'unlabelled'``; None without it.
        flags: What stage 2 gets from the options.
    """

    name: str
    base: str
    task: str
    labels: str | None
    flags: tuple[str, ...]

    @property
    def has_stimuli(self) -> bool:
        return self.base != 'plain'

    @property
    def options(self) -> frozenset[tuple[str, ...]]:
        """Each of the flags with its value, in no order."""
        at = [i for i, word in enumerate(self.flags) if word.startswith('--')]
        return frozenset(self.flags[i:j] for i, j in pairwise((*at, len(self.flags))))


def parse_arm(name: str) -> Arm:
    """The arm of that name.

    Raises:
        DataError: If the base or an option is unknown; the message gives the nearest name.
    """
    base, _, options = name.partition(':')
    if base not in ARMS:
        raise unknown_choice('', 'arm', base, ARMS)
    task, labels = ARMS[base]
    known = [*(METHOD if task == 'emoreg' else LABELS if base == 'init' else ()), 'name=value']
    flags: list[str] = []
    decides: dict[str, str] = {}  # what was decided by which option
    for option in options.split(',') if ':' in name else ():
        flag, equals, value = option.partition('=')
        if equals and flag and value:
            if flag in RESERVED:
                raise StudyError(f'arm {name!r}: --{flag} is set by the study. Use its own option for that.')
            if flag in DUAL_HEAD_FLAGS and task == 'plain':
                raise StudyError(f'arm {name!r}: {flag} needs the dual head. Use regulated:{option}, or its controls.')
            if flag in STAGE_1_FLAGS and labels is None:
                raise StudyError(f'arm {name!r}: {flag} needs a stage 1. Use regulated:{option} or init:{option}.')
            given = (f'--{flag}', value)
        elif option in METHOD and task == 'emoreg':
            given = METHOD[option]
        elif option in LABELS and base == 'init':
            given, labels = ('labels',), option
        else:
            raise unknown_choice(f'arm {name!r}', 'option', option, known)
        what = given[0].replace('--no-', '--')
        if what in decides:
            raise StudyError(f'arm {name!r}: {decides[what]} and {option} decide the same. Give one of them.')
        decides[what] = option
        flags += given if what != 'labels' else ()
    return Arm(name, base, task, labels, tuple(flags))


# -- plan --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One call of train.py.

    Args:
        key: Its name, and that of its folder.
        arm: Name of the arm; for stage 1 ``'affect'``, with the control after a colon.
        task: ``'affect'``, ``'plain'`` or ``'emoreg'``.
        model: Registered name of the model, or of the backbone.
        stimuli: Name of the stimuli, empty for `plain`.
        target: Name of the classification, empty for stage 1.
        train_images: How many of its training images, ``'all'``, or empty for stage 1.
        seed: Of split, order, weights and augmentation.
        epochs: Of its stage.
        flags: Of train.py, without paths and machine.
        needs: Key of its stage 1, None if it has none.
    """

    key: str
    arm: str
    task: str
    model: str
    stimuli: str
    target: str
    train_images: str
    seed: int
    epochs: int
    flags: tuple[str, ...]
    needs: str | None = None


def short_name(name: str) -> str:
    """The name of a set, of several as one, or the last part of a path."""
    return '+'.join(Path(part).name for part in stimuli_parts(name))


@dataclass(frozen=True)
class Ratings:
    """The ratings of a csv among the stimuli: columns and scale, empty without a csv."""

    columns: tuple[str, ...] = ()
    scale: tuple[float, ...] = ()

    @staticmethod
    def given(args: argparse.Namespace) -> Ratings:
        """Those of a command line."""
        return Ratings(tuple(args.rating_columns or ()), tuple(args.rating_scale or ()))

    def of(self, stimuli: str) -> Ratings:
        """Those of stimuli that may have no csv among them."""
        return self if any(Path(part).expanduser().is_file() for part in stimuli_parts(stimuli)) else Ratings()

    @property
    def flags(self) -> tuple[str, ...]:
        """For train.py."""
        if not self.columns:
            return ()
        return '--rating-columns', *self.columns, '--rating-scale', *(str(end).removesuffix('.0') for end in self.scale)


def rating_flags(flags: Sequence[str]) -> tuple[str, ...]:
    """Those of a run's flags that `Ratings` gave."""
    if '--rating-columns' not in flags:
        return ()
    return tuple(flags[flags.index('--rating-columns'):flags.index('--rating-scale') + 3])


def _stimuli(name: str, data_dir: str | None, ratings: Ratings) -> Splits:
    return load_stimuli(name, data_dir, rating_columns=ratings.columns or None, rating_scale=ratings.scale or None)


@functools.cache
def stimuli_images(name: str, data_dir: str | None, ratings: Ratings) -> int:
    """Number of images that an epoch of stage 1 sees."""
    return len(_stimuli(name, data_dir, ratings).train)


@functools.cache
def target_images(name: str, data_dir: str | None) -> int:
    """Number of training images of the whole classification."""
    return len(load_target(name, data_dir).train)


def data_digests(runs: Iterable[Run], data_dir: str | None, ratings: Ratings) -> dict[str, str]:
    """`Splits.digest` of each set of the runs that is no published one, but files that may change.

    Raises:
        DataError: If one cannot be used, or stage 1 would see what stage 2 is judged by.
    """
    runs = list(runs)
    targets = {name: load_target(name, data_dir) for name in dict.fromkeys(run.target for run in runs)
               if name and name not in TARGETS}
    stimuli = {name: _stimuli(name, data_dir, ratings.of(name)) for name in dict.fromkeys(run.stimuli for run in runs)
               if not set(stimuli_parts(name)) <= {'', *STIMULI}}
    for shown, judged in dict.fromkeys((run.stimuli, run.target) for run in runs):
        if shown in stimuli and judged in targets:
            check_unseen(stimuli[shown], targets[judged])
    return {name: splits.digest() for name, splits in (targets | stimuli).items()}


def images_seen(run: Run, data_dir: str | None, ratings: Ratings) -> int:
    """Number of images that an epoch of a run sees, but for a last batch that is not full."""
    if run.task == 'affect':
        return stimuli_images(run.stimuli, data_dir, ratings.of(run.stimuli))
    return target_images(run.target, data_dir) if run.train_images == 'all' else int(run.train_images)


def _name(*parts: object) -> str:
    """A readable file name; a path counts by its last part."""
    return '_'.join(short_name(str(part)).replace(':', '.') for part in parts)


def plan(args: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """The runs of a grid, seed by seed, each stage 1 before what needs it; and a line for each thing left out.

    Raises:
        DataError: If an arm is unknown, or `plain+` needs the size of a set that is not there.
        StudyError: If two runs would get the same name.
    """
    ratings = Ratings.given(args)
    runs: dict[str, Run] = {}
    notes: dict[str, None] = {}

    def add(run: Run) -> Run:
        if runs.setdefault(run.key, run) != run:
            raise StudyError(f'{run.key}: two runs would have that name. Rename one of the folders, or study them in '
                             'two calls with two --output.')
        return run

    def shown(stimuli: str, labels: str | None) -> tuple[str, ...]:
        return ('--stimuli', stimuli, *ratings.of(stimuli).flags, *{
            'shuffled': ('--shuffle-stimuli-labels',),
            'content': ('--stimuli-labels', CONTENT_LABELS.get(stimuli, '')),
            'unlabelled': ('--stimuli-labels', 'rotation')}.get(labels, ()))

    def stage_1(model: str, stimuli: str, labels: str, seed: int) -> Run:
        arm = 'affect' if labels == 'affect' else f'affect:{labels}'
        return add(Run(_name(model, stimuli, arm, f's{seed}'), arm, 'affect', model, stimuli, '', '', seed,
                       args.affect_epochs, (
                           '--model', model, '--seed', str(seed), '--task', 'affect', *shown(stimuli, labels),
                           '--epochs', str(args.affect_epochs),
                           # where labels are noise, so is the validation: its best epoch would come early, and what
                           # is to be a control of the labels would be one of the length of training, too
                           *args.flags, '--val-interval', str(args.affect_epochs), *args.affect_flags)))

    arms = [parse_arm(name) for name in args.arms]
    for seed, model, stimuli, target, images, arm in product(
            args.seeds, args.models, args.stimuli, args.targets, args.train_images, arms):
        if arm.labels == 'content' and stimuli not in CONTENT_LABELS:
            notes[f'{arm.name}: skipped for {stimuli}, which has only affective labels.'] = None
            continue
        epochs, flags = args.epochs, ()
        if arm.base == 'plain+':
            number = target_images(target, args.data_dir) if images == 'all' else int(images)
            longer = round(args.affect_epochs * stimuli_images(stimuli, args.data_dir, ratings.of(stimuli))
                           / number)
            if not longer:
                notes[f'{arm.name}: skipped for {stimuli} and {number:,} images of {target}, as stage 1 sees less than '
                      'half an epoch of these.'] = None
                continue
            epochs += longer
        elif arm.base == 'random':
            flags = ('--experience', 'none', *shown(stimuli, None))
        elif '--rehearsal' in arm.flags:
            flags = shown(stimuli, arm.labels)
        stimuli = stimuli if arm.has_stimuli else ''
        key = _name(model, *((stimuli,) if stimuli else ()), target, images, arm.name, f's{seed}')
        needs = stage_1(model, stimuli, arm.labels, seed).key if arm.labels else None
        add(Run(key, arm.name, arm.task, model, stimuli, target, images, seed, epochs, (
            '--model', model, '--seed', str(seed), '--task', arm.task, '--dataset', target,
            *(() if images == 'all' else ('--train-images', images)), *flags, '--epochs', str(epochs),
            *args.flags, *args.target_flags, *arm.flags), needs))
    return list(runs.values()), list(notes)


def recipe(flags: Sequence[str], arm: str) -> tuple[str, tuple[str, ...]]:
    """Epochs and flags of a run but for those that make its arm: what the runs of a setting must have in common.

    Args:
        flags: Of train.py, as `plan` puts them together.
        arm: Name of the arm, or of the labels of stage 1, as in `Run`.
    """
    at = list(flags).index('--epochs')
    common = tuple(flags[at + 2:])
    own = () if arm.startswith('affect') else parse_arm(arm).flags
    return flags[at + 1], common[:len(common) - len(own)] if own and common[-len(own):] == own else common


# -- files -------------------------------------------------------------------------------------------------------------

COLUMNS = ('key', 'arm', 'model', 'stimuli', 'target', 'train_images', 'images', 'seed', 'epochs', 'best_epoch',
           'metric', 'validation', 'test', 'balance', 'seconds', 'precision', 'attention', 'convolution', 'loader',
           'device', 'commit', 'flags')
_LATER = ('attention', 'convolution', 'loader', 'commit')  # which older tables lack
_NUMBERS = {'seed': int, 'epochs': int, 'test': float}


def read_rows(path: Path, remedy: str = 'Correct or restore it.') -> list[dict[str, str]]:
    """The rows of a csv, with or without byte-order mark, none if there is no such file.

    Raises:
        StudyError: If it is no csv in UTF-8, or a row does not have as many cells as the header; the message ends with
            the `remedy`.
    """
    if not path.is_file():
        return []
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as e:
        raise StudyError(f'{path}: is no csv in UTF-8 ({e}). {remedy}') from None
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise StudyError(f'{path}: row {number} does not have as many cells as the first one. {remedy}')
    return rows


def read_runs(folder: Path, name: str) -> list[dict[str, str]]:
    """The finished runs in a study's folder: of ``'results.csv'`` or ``'stage1.csv'``.

    Raises:
        StudyError: If the csv is damaged or lacks a column, or if two of its rows contradict each other.
    """
    again = 'Restore it, or remove it: a finished run whose folder is there gets its row again.'
    rows = read_rows(folder / name, again)
    needed = [column for column in COLUMNS if column not in _LATER]
    if rows and (missing := [column for column in needed if column not in rows[0]]):
        raise StudyError(f'{folder / name}: its first line names no column {missing[0]}. {again}')
    tests: dict[tuple[str, ...], str] = {}
    for number, row in enumerate(rows, start=2):
        for column, kind in _NUMBERS.items():
            try:
                kind(row[column])
            except ValueError:
                raise StudyError(f'{folder / name}: row {number} has the {column} {row[column]!r}, which is no number. '
                                 'Correct or remove the row; of csv files that are put together, the first line '
                                 'stays only once.') from None
        run = tuple(row[column] for column in ('model', 'stimuli', 'target', 'train_images', 'arm', 'seed'))
        if tests.setdefault(run, row['test']) != row['test']:
            raise StudyError(f'{folder / name}: row {number}, {row["key"]}, has the test result {row["test"]}, and an '
                             f'earlier row of the same run {tests[run]}. Keep one of them.')
    return rows


def write_rows(path: Path, rows: Iterable[dict], columns: Sequence[str]) -> None:
    """Write a csv."""
    with replacing(path) as part, open(part, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
