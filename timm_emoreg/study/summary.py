"""All settings of several studies at a glance: what the regulated arm gains over its controls, one line per setting."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..drawing import save
from .grid import StudyError, read_rows, short_name
from .plots import STYLES
from .table import Comparison, Setting, compare_with_controls, interval, markdown, read_settings, spread

__all__ = ['Line', 'draw_summary', 'make_summary', 'read_summary']

ARM = 'regulated'
VERSUS = ('plain', 'init', 'shuffled', 'unlabelled')
COLUMNS = ('setting', 'folder', 'stimuli', 'target', 'train_images', 'seeds')


class Line(NamedTuple):
    """One setting: its label, its runs, and the comparison of the regulated arm to each of `VERSUS` that was run, with
    Holm's p within all of its controls."""

    label: str
    setting: Setting
    compared: dict[str, tuple[Comparison, float]]


def _seeds(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split():
        first, dash, last = part.partition('-')
        numbers += range(int(first), int(last if dash else first) + 1)
    if not numbers:
        raise ValueError('no seed')
    return numbers


def read_summary(path: Path) -> list[Line]:
    """The settings that a csv names.

    Args:
        path: A csv with the columns setting (how it is to be called), folder (of a study, relative to the csv),
            stimuli, target (of sets of one's own the path or its last part), train_images, and seeds, such as ``0-4``
            or ``0 2 5-9``; perhaps model, where a folder holds several.

    Raises:
        StudyError: If the csv lacks a column, or names a setting that is not there or has no regulated arm.
    """
    rows = read_rows(path)
    if not rows or (missing := [name for name in COLUMNS if name not in rows[0]]):
        raise StudyError(f'{path}: ' + (f'lacks the column {missing[0]}' if rows else 'is missing or names no setting')
                         + f'. It needs one row per setting, with the columns {", ".join(COLUMNS)}.')
    lines = []
    for row in rows:
        folder, where = path.parent / row['folder'], tuple(row[name] for name in ('stimuli', 'target', 'train_images'))
        try:
            seeds = _seeds(row['seeds'])
        except ValueError:
            raise StudyError(f'{path}: seeds {row["seeds"]!r} of {row["setting"]} are none. Give numbers and ranges, '
                             'such as 0-4.') from None
        there = [setting for setting in read_settings(folder, seeds) if ARM in setting.arms]
        found = [setting for setting in there if row.get('model') in (None, '', setting.model) and all(
            name in (full, short_name(full)) for name, full in zip(where, setting[1:4], strict=True))]
        if len(found) != 1:
            known = '; '.join(f'{setting.model}, {", ".join(setting[1:4])}' for setting in there) or 'none'
            by_model = len({setting.model for setting in found}) == len(found) > 1
            remedy = 'Tell them apart by a column model' if by_model else 'Correct the row'
            asked = f' of {row["model"]}' if row.get('model') else ''
            raise StudyError(f'{path}: {row["setting"]} asks {folder} for {ARM} runs{asked} on {", ".join(where)} '
                             f'training images, and that holds {len(found)} such settings. {remedy}. It holds: '
                             f'{known}.')
        if missing := sorted(set(seeds) - found[0].arms[ARM].keys()):
            raise StudyError(f'{path}: {row["setting"]} asks for seeds {row["seeds"]}, and {folder} has no finished '
                             f'{ARM} run of {", ".join(map(str, missing))}. Name those that it has, or run the others.')
        compared = {c.versus: (c, p) for c, p in compare_with_controls(folder, found[0], ARM) if c.versus in VERSUS}
        lines.append(Line(row['setting'], found[0], compared))
    return lines


def make_summary(lines: Sequence[Line]) -> str:
    """The table as markdown; bold is what is different from zero after Holm's correction within the setting,
    and (n) stands where not every seed of the regulated arm has its pair."""
    def cell(line: Line, versus: str) -> str:
        if versus not in line.compared:
            return 'not run'
        c, p = line.compared[versus]
        text = interval(c.difference) + (f' ({c.difference.n})' if c.difference.n < len(line.setting.arms[ARM]) else '')
        return f'**{text}**' if p < 0.05 else text

    rows = []
    for line in lines:
        plain = [float(row['test']) for row in line.setting.arms.get('plain', {}).values()]
        rows.append((line.label, str(len(line.setting.arms[ARM])), spread(plain) if plain else 'not run',
                     *(cell(line, versus) for versus in VERSUS)))
    header = ('stage 1 → target', 'n', 'plain', *(f'minus {versus}' for versus in VERSUS))
    return markdown(header, rows)


def _draw_differences(axis, lines: Sequence[Line], versus: str) -> None:
    colour, _, marker = STYLES[versus]
    for y, line in enumerate(lines):
        if versus not in line.compared:
            axis.text(0, y, ' not run', color='#777777', fontsize=8, va='center')
            continue
        c, p = line.compared[versus]
        d = c.difference
        if not math.isnan(d.low):
            axis.plot([d.low, d.high], [y, y], '-', color=colour, linewidth=2, marker='|', markersize=8,
                      markeredgewidth=1.6, zorder=3)
            axis.plot(c.by_seed, [y + 0.3] * d.n, 'o', markersize=2, color='#777777', zorder=2)
        axis.plot(d.mean, y, marker, markersize=5.5, color=colour, markeredgecolor='black', markeredgewidth=0.6,
                  markerfacecolor=colour if d.n > 1 else 'white', zorder=4)
        if p < 0.05:
            axis.text(d.low, y, '* ', fontsize=13, ha='right', va='center')
        if d.n < len(line.setting.arms[ARM]):  # the number beside the label is not that of these pairs
            axis.text(d.mean if math.isnan(d.high) else d.high, y, f'  ({d.n})', fontsize=8, va='center')
    axis.axvline(0, color='black', linewidth=0.9, zorder=1)
    axis.grid(axis='x', alpha=0.3)


def draw_summary(lines: Sequence[Line], picture: Path) -> None:
    """Draw the table to a PNG: one panel per control, one line per setting, small dots for the seeds, and (n) as in the
    table.

    The settings of each model are a block with a scale of its own, as small networks may differ tenfold in what moves
    them.
    """
    from matplotlib.figure import Figure

    models: dict[str, list[Line]] = {}
    for line in lines:
        models.setdefault(line.setting.model, []).append(line)
    figure = Figure(figsize=(14, 1.2 + 0.8 * len(models) + 0.42 * len(lines)), layout='constrained')
    axes = figure.subplots(len(models), len(VERSUS), sharex='row', sharey='row', squeeze=False,
                           height_ratios=[len(block) + 0.5 for block in models.values()])
    for row, (model, block) in zip(axes, models.items(), strict=True):
        for axis, versus in zip(row, VERSUS, strict=True):
            _draw_differences(axis, block, versus)
            axis.set_title(f'{model} minus {versus}', fontsize=10)
        row[0].set_yticks(range(len(block)),
                          [f'{line.label} ({len(line.setting.arms[ARM])})' for line in block], fontsize=9)
        row[0].set_ylim(len(block) - 0.4, -0.6)
    for axis in axes[-1]:
        axis.set_xlabel('points of test accuracy', fontsize=9)
    figure.suptitle('What the method gains over each control: mean and 95 % interval (number of seeds)\n'
                    "small dots: seeds; *: clear after Holm's correction within the setting; "
                    'each model has a scale of its own', fontsize=11)
    save(figure, picture)
