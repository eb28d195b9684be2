"""The two pictures of a study: differences with their intervals, and learning curves."""
from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..drawing import BLUE, VERMILLION, save, short
from .grid import ARMS, read_rows
from .table import Setting, compare, controls

__all__ = ['STYLES', 'draw_forest', 'draw_learning_curves']

# of Okabe and Ito's colours, told apart by colour-blind readers too; line and marker tell the arms apart without colour
STYLES = dict(zip(ARMS, (
    ('#000000', '-', 'o'), ('#999999', '--', 's'), ('#56B4E9', '-', '^'), (VERMILLION, '-', 'D'),
    ('#E69F00', '--', 'v'), (BLUE, '--', 'P'), ('#CC79A7', '-.', 'X'), ('#009E73', ':', '*')), strict=True))


def _figure(number: int, width: float, height: float):
    """A figure and its panels, at most two side by side."""
    from matplotlib.figure import Figure  # drawn without pyplot: no display, and no state of a caller's is touched

    columns = min(number, 2)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for empty in axes[number:]:
        empty.remove()
    return figure, axes[:number]


def draw_forest(folder: Path, settings: Sequence[Setting], picture: Path) -> None:
    """Draw paired differences of test accuracy with their 95 % intervals to a PNG, a panel a setting.

    Above each arm minus plain, below the regulated arm minus its controls; small dots are the seeds.
    """
    from matplotlib.figure import Figure  # drawn without pyplot: no display, and no state of a caller's is touched

    panels = []
    for setting in settings:
        groups = [('minus plain', [compare(folder, setting, arm, 'plain') for arm in setting.arms
                                   if arm != 'plain' and 'plain' in setting.arms])]
        groups += [(f'{arm} minus', [compare(folder, setting, arm, control) for control in controls(arm, setting.arms)
                                     if control != 'plain'])
                   for arm in setting.arms if arm == 'regulated']
        panels.append([(title, [c for c in group if c.difference.n]) for title, group in groups])
    heights = [1.4 + 0.3 * max(sum(len(group) + 1 for _, group in groups if group), 1) for groups in panels]
    figure = Figure(figsize=(8, sum(heights) + 0.6), layout='constrained')
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights).flatten()
    for axis, setting, groups in zip(axes, settings, panels, strict=True):
        labels, y = [], 0
        for title, group in groups:
            if not group:
                continue
            labels.append((y, short(title, 40), True))
            for c in group:
                y += 1
                d, versus_plain = c.difference, c.versus == 'plain'
                name = c.arm if versus_plain else c.versus
                colour, _, marker = STYLES[name.partition(':')[0]]
                if d.n > 1:
                    axis.plot(c.by_seed, [y + 0.22] * d.n, 'o', markersize=2.5, color='#777777', zorder=2)
                    axis.plot([d.low, d.high], [y, y], '-', color=colour, linewidth=2.2, zorder=3)
                axis.plot(d.mean, y, marker, markersize=8, color=colour, markeredgecolor='black', markeredgewidth=0.7,
                          markerfacecolor=colour if d.n > 1 else 'white', zorder=4)
                labels.append((y, f'{short(name, 32)} ({d.n})', False))
            y += 1.4
        axis.axvline(0, color='black', linewidth=0.9, zorder=1)
        axis.set_yticks([y for y, _, _ in labels], [text for _, text, _ in labels])
        for tick, (_, _, heading) in zip(axis.get_yticklabels(), labels, strict=True):
            tick.set_fontweight('bold' if heading else 'normal')
        for mark, (_, _, heading) in zip(axis.yaxis.get_ticklines()[::2], labels, strict=True):
            mark.set_visible(not heading)
        axis.set_ylim(max(y, 1) - 0.6, -0.6)
        axis.grid(axis='x', alpha=0.3)
        axis.set_title(setting.heading, fontsize=10)
        axis.set_xlabel('difference of test top1 in points')
    low, high = min(axis.get_xlim()[0] for axis in axes), max(axis.get_xlim()[1] for axis in axes)
    for axis in axes:
        axis.set_xlim(low, high)
    figure.suptitle('Paired differences with 95 % interval (number of seeds);\nsmall dots: seeds, hollow: one seed',
                    fontsize=10)
    save(figure, picture)


def draw_learning_curves(folder: Path, settings: Sequence[Setting], picture: Path) -> None:
    """Draw the validation accuracy by epoch to a PNG, a panel a setting: the mean over seeds, and for `plain` and
    `regulated` a band from the lowest to the highest seed.

    Arms without options only, so that the panels stay readable. The epochs are on a logarithmic axis where `plain+`
    is more than three times as long as the others.
    """
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure, axes = _figure(len(settings), 6.2, 5)
    for axis, setting in zip(axes, settings, strict=True):
        lengths, lines = [], []
        for arm, runs in setting.arms.items():
            if ':' in arm:
                continue
            by_epoch, drawn = defaultdict(list), set()
            for seed, row in runs.items():  # some may lie elsewhere
                for path in (folder / 'runs' / row['key']).glob('*/summary.csv'):
                    for line in read_rows(path):
                        if line.get('eval_top1'):
                            drawn.add(seed)
                            by_epoch[int(line['epoch']) + 1].append(float(line['eval_top1']))
            if not by_epoch:
                continue
            epochs = sorted(by_epoch)
            means = [statistics.mean(by_epoch[epoch]) for epoch in epochs]
            colour, style, marker = STYLES[arm]
            line, = axis.plot(epochs, means, style, color=colour, marker=marker, markersize=5.5, linewidth=1.4,
                              markevery=max(1, len(epochs) // 10), markeredgecolor='black', markeredgewidth=0.4)
            if arm in ('plain', 'regulated'):
                axis.fill_between(epochs, *([end(by_epoch[e]) for e in epochs] for end in (min, max)),
                                  color=colour, alpha=0.15, linewidth=0)
            lengths.append(epochs[-1])
            lines.append((means[-1], line, f'{arm} ({len(drawn)}): {means[-1]:.1f}'))
        if lengths and max(lengths) > 3 * min(lengths):
            axis.set_xscale('log')
            axis.xaxis.set_major_formatter(ScalarFormatter())
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        lines.sort(key=lambda entry: -entry[0])
        axis.legend([line for _, line, _ in lines], [text for _, _, text in lines], loc='lower right', fontsize=9,
                    title='arm (seeds): at the end', title_fontsize=9)
        axis.set_title(setting.heading, fontsize=10)
        axis.set_xlabel('epoch')
        axis.set_ylabel('validation top1')
        axis.grid(alpha=0.3)
    figure.suptitle('Mean over seeds; bands of plain and regulated: lowest to highest seed', fontsize=10)
    save(figure, picture)
