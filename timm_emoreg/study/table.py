"""Tables of a study: each arm against plain, each method against its controls, and what duplicates change."""
from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data import load_target
from ..data.controls import fewer_images
from ..data.duplicates import NEAR, copies
from ..drawing import short
from ..files import write_text
from .grid import (
    ARMS,
    DUAL_HEAD_FLAGS,
    LABELS,
    STAGE_1_FLAGS,
    StudyError,
    parse_arm,
    read_rows,
    read_runs,
    short_name,
    write_rows,
)
from .paired_tests import Difference, holm, mcnemar, mean_sd, paired_difference

__all__ = ['Comparison', 'Setting', 'compare', 'compare_with_controls', 'controls', 'interval', 'make_table',
           'markdown', 'read_settings', 'spread', 'write_table']


def _ranges(seeds: Iterable[int]) -> str:
    """Seeds in words: ``seed 3``, ``seeds 0-4 7``."""
    numbers, spans = sorted(set(seeds)), []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ' '.join(str(first) if first == last else f'{first}-{last}' for first, last in spans)
    return f'seed{"s"[:len(numbers) > 1]} {text}'


class Setting(NamedTuple):
    """What is compared at a time: ``arms`` maps the name of an arm to its rows of results.csv by seed."""

    model: str
    stimuli: str
    target: str
    train_images: str
    arms: dict[str, dict[int, dict[str, str]]]

    @property
    def title(self) -> str:
        images = 'all' if self.train_images == 'all' else f'{int(self.train_images):,}'
        stimuli = f'{short_name(self.stimuli)} → ' if self.stimuli else ''
        return (f'{self.model}: {stimuli}{Path(self.target).name}, {images} training images, {self.epochs}, '
                f'{_ranges(seed for runs in self.arms.values() for seed in runs)}')

    @property
    def epochs(self) -> str:
        """Of all arms but ``plain+``, whose number follows from theirs."""
        own = {arm: runs for arm, runs in self.arms.items() if arm.partition(':')[0] != 'plain+'} or self.arms
        numbers = sorted({int(row['epochs']) for runs in own.values() for row in runs.values()})
        return ' or '.join(map(str, numbers)) + (' epoch' if numbers == [1] else ' epochs')

    @property
    def heading(self) -> str:
        """The title for a picture: on two lines, and no longer than a panel is wide."""
        model, what = self.title.split(': ', 1)
        return f'{short(model, 60)}\n{short(what, 70)}'


def _order(arm: str) -> tuple:
    base = arm.partition(':')[0]
    return list(ARMS).index(base), arm


def read_settings(folder: Path, seeds: Sequence[int] | None = None) -> list[Setting]:
    """The finished runs of a study; `plain`, which has no stimuli, is in the setting of each.

    Args:
        folder: Of the study.
        seeds: The ones to look at, None for all.

    Raises:
        StudyError: If there is no such folder or no run, or if one is of an unknown arm.
    """
    if not folder.is_dir():
        raise StudyError(f'{folder}: there is no such folder. Give the --output of a study.')
    rows = [row for row in read_runs(folder, 'results.csv') if seeds is None or int(row['seed']) in seeds]
    if not rows:
        which = '' if seeds is None else f' with a seed of {", ".join(map(str, seeds))}'
        raise StudyError(f'{folder / "results.csv"}: no finished run{which} yet. Start some: python -m '
                         'timm_emoreg.study run')
    for row in rows:
        if row['arm'].partition(':')[0] not in ARMS:
            raise StudyError(f'{folder / "results.csv"}: {row["key"]} is of the arm {row["arm"]!r}, which this version '
                             f'does not know. It knows {", ".join(ARMS)}. Update timm_emoreg, or remove the row.')
    places = {(row['model'], row['stimuli'], row['target'], row['train_images']): None for row in rows}
    with_stimuli = {(model, target, images) for model, stimuli, target, images in places if stimuli}
    settings = []
    for model, stimuli, target, images in places:
        if not stimuli and (model, target, images) in with_stimuli:
            continue
        arms: dict[str, dict[int, dict[str, str]]] = {}
        for row in rows:
            if ((row['model'], row['target'], row['train_images']) == (model, target, images)
                    and row['stimuli'] in ('', stimuli)):
                arms.setdefault(row['arm'], {})[int(row['seed'])] = row
        settings.append(Setting(model, stimuli, target, images, {arm: arms[arm] for arm in sorted(arms, key=_order)}))
    return settings


# -- comparisons -------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """`arm` minus `versus` over their common seeds.

    Args:
        arm: Name of the one.
        versus: Name of the other.
        by_seed: Difference of the test accuracies in points, seed by seed.
        difference: Their mean and what it is worth.
        pairs: For each common seed with predictions: seed, images that only `arm` has right, only `versus`.
    """

    arm: str
    versus: str
    by_seed: tuple[float, ...]
    difference: Difference
    pairs: tuple[tuple[int, int, int], ...]

    @property
    def won(self) -> int:
        return sum(won for _, won, _ in self.pairs)

    @property
    def lost(self) -> int:
        return sum(lost for _, _, lost in self.pairs)

    @property
    def mcnemar_p(self) -> float:
        return mcnemar(self.won, self.lost) if self.pairs else math.nan


def read_predictions(folder: Path, key: str) -> list[tuple[int, int]] | None:
    """Target and prediction of each test image of a run, in order; None if the run left none."""
    found = sorted((folder / 'runs' / key).glob('*/predictions.csv'))
    return [(int(row['target']), int(row['prediction'])) for row in read_rows(found[0])] if found else None


def compare(folder: Path, setting: Setting, arm: str, versus: str) -> Comparison:
    """Compare two arms of a setting over their common seeds.

    Raises:
        StudyError: If the runs of a seed were judged on different test images.
    """
    ours, theirs = setting.arms[arm], setting.arms[versus]
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = []
    for seed in seeds:
        a, b = (read_predictions(folder, rows[seed]['key']) for rows in (ours, theirs))
        if a is None or b is None:
            continue
        if [target for target, _ in a] != [target for target, _ in b]:
            raise StudyError(f'{folder}: {ours[seed]["key"]} and {theirs[seed]["key"]} were judged on different test '
                             f'images ({len(a)} and {len(b)} of them), so their difference tells nothing of the arms. '
                             'Train one of them again with the data of the other: remove its row and its folder in '
                             'runs.')
        right = [(x == target, y == target) for (target, x), (_, y) in zip(a, b, strict=True)]
        pairs.append((seed, sum(x and not y for x, y in right), sum(y and not x for x, y in right)))
    tests = [[float(rows[seed]['test']) for seed in seeds] for rows in (ours, theirs)]
    by_seed = tuple(a - b for a, b in zip(*tests, strict=True))
    return Comparison(arm, versus, by_seed, paired_difference(*tests), tuple(pairs))


def controls(arm: str, known: Iterable[str]) -> list[str]:
    """The arms that decide what a gain of `arm` means, among those `known`: one family for Holm's correction.

    For the regulated arms the plain ones, init, and each control, so that stage 1 is all that differs (and with it the
    number of affect outputs, where its labels are others); for `init` the plain ones and its own controls. Each has the
    options of `arm`, but for those that it cannot have: of the dual head, or of a stage 1.
    """
    own = parse_arm(arm)
    of_dual_head, of_stage_1 = (frozenset(f'--{name}' for name in names) for names in (DUAL_HEAD_FLAGS, STAGE_1_FLAGS))
    if own.base == 'regulated':
        family = [('plain', None, of_dual_head | of_stage_1), ('plain+', None, of_dual_head | of_stage_1),
                  ('init', 'affect', of_dual_head), ('random', None, of_stage_1),
                  *((labels, labels, frozenset()) for labels in LABELS)]
    elif own.base == 'init' and own.labels == 'affect':
        family = [('plain', None, of_stage_1), ('plain+', None, of_stage_1),
                  *(('init', labels, frozenset()) for labels in LABELS)]
    else:
        family = []
    there = {(a.base, a.labels, a.options): a.name for a in map(parse_arm, known)}
    wanted = [(base, labels, frozenset(option for option in own.options if option[0] not in without))
              for base, labels, without in family]
    return [there[key] for key in wanted if key in there]


def compare_with_controls(folder: Path, setting: Setting, arm: str) -> list[tuple[Comparison, float]]:
    """An arm beside each of its controls that has a seed in common with it, and Holm's p within these."""
    found = [c for c in (compare(folder, setting, arm, control) for control in controls(arm, setting.arms))
             if c.difference.n]
    return list(zip(found, holm([c.difference.p for c in found]), strict=True))


# -- markdown ----------------------------------------------------------------------------------------------------------


def _number(value: float, digits: int = 2, sign: bool = False) -> str:
    return 'n/a' if math.isnan(value) else f'{value:{"+" if sign else ""}.{digits}f}'


def _p(value: float) -> str:
    return 'n/a' if math.isnan(value) else f'{value:.3f}' if value >= 0.001 else '< 0.001'


def interval(difference: Difference) -> str:
    """The mean with its 95 % interval, the mean alone where there is none."""
    mean = _number(difference.mean, sign=True)
    if math.isnan(difference.low):
        return mean
    return f'{mean} [{_number(difference.low, sign=True)}, {_number(difference.high, sign=True)}]'


def spread(values: Sequence[float]) -> str:
    """Mean ± sd, the mean alone of one value."""
    mean, sd = mean_sd(values)
    return _number(mean) + ('' if math.isnan(sd) else f' ± {_number(sd)}')


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table: the first column to the left, numbers to the right."""
    lines = [header, ['---', *['---:'] * (len(header) - 1)], *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n'


def _images(c: Comparison) -> str:
    if not c.pairs:
        return 'n/a'
    return f'{c.won} : {c.lost}' + (f' ({len(c.pairs)} seeds)' if len(c.pairs) < c.difference.n else '')


def _column(rows: dict[int, dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows.values()]


NOTES = '''Test accuracy in percent, at the best epoch on validation, which is the last one where only that was judged.
± is the sd over seeds. Differences are paired by seed (same split, order and initial weights of backbone
and non-emotional head), in points, with the 95 % interval and p of Student's paired t test, and (n) where
not every seed has its pair. The intervals are over seeds, for these test images. Holm: p corrected for all
comparisons of that arm in its table. Images: test images that only the arm has right : only the control,
over all seeds or as many as left predictions, and McNemar's exact test on these sums. The images are the
same ones for each seed, so their number is overstated and that p is optimistic.
'''


# -- stage 1 -----------------------------------------------------------------------------------------------------------


def _stage_1(folder: Path, settings: Sequence[Setting]) -> str:
    """How well each stage 1 answers test stimuli, and the epoch at which it was taken; empty if there was none."""
    seeds = {seed for setting in settings for runs in setting.arms.values() for seed in runs}
    kinds: dict[tuple[str, ...], dict[int, dict[str, str]]] = {}
    for row in read_runs(folder, 'stage1.csv'):
        if int(row['seed']) in seeds:
            kind = tuple(row[k] for k in ('model', 'stimuli', 'arm', 'epochs', 'metric'))
            kinds.setdefault(kind, {})[int(row['seed'])] = row
    lines = []
    sets = [kind[:2] for kind in kinds]  # of one set side by side, whenever they were run
    for (model, stimuli, arm, epochs, metric), runs in sorted(kinds.items(), key=lambda item: sets.index(item[0][:2])):
        test, taken = _column(runs, 'test'), _column(runs, 'best_epoch')
        lines.append((f'{model}: {short_name(stimuli)}', arm, str(len(runs)), metric, spread(test),
                      f'{_number(statistics.mean(taken), 1)} of {epochs}'))
    header = ('stage 1', 'arm', 'n', 'metric', 'test stimuli', 'taken at epoch')
    return f'\n## Stage 1\n\n{markdown(header, lines)}' if lines else ''


# -- duplicates --------------------------------------------------------------------------------------------------------


def _duplicates(folder: Path, settings: Sequence[Setting], data_dir: str | None) -> str:
    parts = [f'## Test images with a copy among the training images\n\nNear: all three colours of all 8x8 cells '
             f'differ by at most {NEAR:g} grey levels from a training image, root mean square; exact copies are near. '
             'Mirrored and shifted copies are not found: ciFAIR, made by eye, lists more. The last column is the '
             'accuracy without near ones, and the one before it of the same runs.\n']
    found: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
    rows = []
    for setting in settings:
        splits = load_target(setting.target, data_dir)
        if not isinstance(splits.test.images, np.ndarray):
            parts.append(f'{setting.title}: not looked for, as its images are files of any size.\n')
            continue
        labels = splits.test.targets.tolist()
        for arm, runs in setting.arms.items():
            counts, tests, kept = [], [], []
            for seed, row in runs.items():
                place = setting.target, setting.train_images, None if setting.train_images == 'all' else seed
                if place not in found:
                    part = splits if place[2] is None else fewer_images(splits, int(setting.train_images), seed)
                    found[place] = copies(part.train.images, splits.test.images)
                exact, near = found[place]
                counts.append((int(exact.sum()), int(near.sum())))
                predictions = read_predictions(folder, row['key'])
                if predictions is not None and [target for target, _ in predictions] == labels:
                    right = np.array([target == prediction for target, prediction in predictions])
                    kept.append(100 * float(right[~near].mean()))
                    tests.append(float(row['test']))
            rows.append((setting.title, arm, *(_number(statistics.mean(c), 1) for c in zip(*counts, strict=True)),
                         spread(tests), spread(kept)))
    if rows:
        parts.append(markdown(('setting', 'arm', 'exact', 'near', 'test top1', 'without near'), rows))
    return '\n'.join(parts)


# -- all of it ---------------------------------------------------------------------------------------------------------

COLUMNS = ('model', 'stimuli', 'target', 'train_images', 'arm', 'versus', 'n', 'mean', 'sd', 'validation_mean',
           'validation_sd', 'seconds', 'difference', 'difference_sd', 'low', 'high', 'p', 'holm_p', 'won', 'lost',
           'mcnemar_p', 'won_lost_by_seed')


_ONE_MACHINE = 'Run the arms of a seed on one machine'
# a column of the runs, what its values are called, what is wrong if they differ within a seed, and what to do
_WAYS = (
    ('precision', '', 'computed in different ways', f'{_ONE_MACHINE}, or give all of them --no-amp'),
    ('attention', ' attention', 'computed in different ways', f'{_ONE_MACHINE}, or give all of them --no-amp'),
    ('convolution', ' convolution', 'computed in different ways', f'{_ONE_MACHINE}, or give all of them --no-amp'),
    ('loader', ' loader', 'computed in different ways', f'{_ONE_MACHINE}, or give all of them --loader timm'),
    ('device', '', 'made on different devices', _ONE_MACHINE),
    ('commit', '', 'made at different commits', 'Make sure that nothing that these arms do has changed between them, '
                                                'or run the arms of a seed at one'),
)


def _computed_otherwise(folder: Path, setting: Setting) -> list[str]:
    """Warnings for paired runs that differ in precision, attention or convolution kernel or loader, in either stage (on
    another processor, under load, or with too little memory), in the device, whatever its number of threads, or in the
    commit of the code."""
    seeds = {str(seed) for runs in setting.arms.values() for seed in runs}
    stages = {'': [row for runs in setting.arms.values() for row in runs.values()],
              ' in stage 1': [row for row in read_runs(folder, 'stage1.csv') if row['seed'] in seeds
                              and (row['model'], row['stimuli']) == (setting.model, setting.stimuli)]}
    warnings = []
    for (stage, rows), (name, unit, what, remedy) in product(stages.items(), _WAYS):
        found: dict[str, set[str]] = {}
        for row in rows:
            if value := row.get(name):  # older rows do not tell of each
                kind = re.sub(r', \d+ threads?$', '', value) if name == 'device' else value
                found.setdefault(row['seed'], set()).add(kind + unit)
        mixed = [seed for seed, values in found.items() if len(values) > 1]
        if mixed:
            values = ', '.join(sorted(set().union(*(found[seed] for seed in mixed))))
            warnings.append(f'Not only the arm differs: the runs of seed {", ".join(mixed)} were {what}{stage} '
                            f'({values}). {remedy}.\n')
    return warnings


def _setting_table(folder: Path, setting: Setting) -> tuple[str, list[dict]]:
    """A setting's markdown, and its rows for the csv: one an arm, one a comparison."""
    place = dict(zip(COLUMNS, setting[:4], strict=False))
    text, rows = [f'## {setting.title}\n'], []
    lines = []
    for arm, runs in setting.arms.items():
        test, validation = _column(runs, 'test'), _column(runs, 'validation')
        seconds = statistics.median(_column(runs, 'seconds'))
        rows.append({**place, 'arm': arm, 'n': len(test), 'seconds': seconds,
                     **dict(zip(('mean', 'sd'), mean_sd(test), strict=True)),
                     **dict(zip(('validation_mean', 'validation_sd'), mean_sd(validation), strict=True))})
        versus = ('', '')
        if arm != 'plain' and 'plain' in setting.arms:
            difference = compare(folder, setting, arm, 'plain').difference
            pairs = f' ({difference.n})' if difference.n < len(test) else ''
            versus = (interval(difference) + pairs, _p(difference.p)) if difference.n else ('no common seed', 'n/a')
        lines.append((arm, str(len(test)), spread(test), spread(validation), *versus, f'{seconds:,.0f}'))
    text.append(markdown(('arm', 'n', 'test top1', 'validation', 'minus plain', 'p', 'median s'), lines))

    for arm in setting.arms:
        compared = compare_with_controls(folder, setting, arm)
        if compared:
            text.append(markdown(
                (f'{arm} minus', 'n', 'difference', 'p', 'Holm p', 'images', 'McNemar p'),
                [(c.versus, str(c.difference.n), interval(c.difference), _p(c.difference.p), _p(p),
                  _images(c), _p(c.mcnemar_p)) for c, p in compared]))
        elif arm != 'plain' and 'plain' in setting.arms:  # its difference to plain, in no family
            compared = [(compare(folder, setting, arm, 'plain'), math.nan)]
        for c, p in compared:
            d = c.difference
            rows.append({**place, 'arm': arm, 'versus': c.versus, 'n': d.n, 'difference': d.mean,
                         'difference_sd': d.sd, 'low': d.low, 'high': d.high, 'p': d.p, 'holm_p': p, 'won': c.won,
                         'lost': c.lost, 'mcnemar_p': c.mcnemar_p,
                         'won_lost_by_seed': ' '.join(f'{seed}:{won}/{lost}' for seed, won, lost in c.pairs)})
    if any(len(runs) < 2 for runs in setting.arms.values()):
        text.append('A single seed gives no sd, no interval and no t test: n/a.\n')
    if any(row.get('difference_sd') == 0 for row in rows):
        text.append('Differences that are the same for all seeds give no interval and no t test: n/a.\n')
    text += _computed_otherwise(folder, setting)
    return '\n'.join(text), rows


def make_table(folder: Path, settings: Sequence[Setting], data_dir: str | None = None,
               duplicates: bool = False) -> tuple[str, list[dict]]:
    """The tables of a study's finished runs, as markdown and as the rows of table.csv.

    Args:
        folder: Of the study.
        settings: What `read_settings` gives.
        data_dir: Data sets, for the duplicates.
        duplicates: Report test images with a copy among the training images, too.

    Raises:
        DataError: If the data for the duplicates is not there.
        ImportError: Without scipy.
    """
    tables = [_setting_table(folder, setting) for setting in settings]
    text = '\n'.join(['# Study\n', NOTES, *(table for table, _ in tables)])
    text += _stage_1(folder, settings)
    if duplicates:
        text += '\n' + _duplicates(folder, settings, data_dir)
    return text, [row for _, rows in tables for row in rows]


def write_table(folder: Path, text: str, rows: Iterable[dict]) -> None:
    """Write table.md and table.csv."""
    write_text(folder / 'table.md', text)
    write_rows(folder / 'table.csv', rows, COLUMNS)
