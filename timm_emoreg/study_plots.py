"""The two pictures of a study: differences with their intervals, and learning curves."""
from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from .study_grid import ARMS, read_rows
from .study_table import Setting, compare, controls

__all__ = ['draw_forest', 'draw_learning_curves']

# Okabe and Ito's colours, told apart by colour-blind readers too; line and marker tell the arms apart without colour
STYLES = dict(zip(ARMS, (
    ('#000000', '-', 'o'), ('#999999', '--', 's'), ('#56B4E9', '-', '^'), ('#D55E00', '-', 'D'), ('#F0E442', '--', 'v'),
    ('#0072B2', '--', 'P'), ('#CC79A7', '-.', 'X'), ('#009E73', ':', '*')), strict=True))


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


def _save(figure, picture: Path) -> None:
    part = picture.with_suffix('.part')
    figure.savefig(part, dpi=120, format='png')
    part.replace(picture)


def draw_forest(folder: Path, settings: Sequence[Setting], picture: Path) -> None:
    """Draw paired differences of test accuracy with their 95 % intervals to a PNG, a panel a setting.

    Above each arm minus plain, below the regulated arm minus its controls; small dots are the seeds.
    """
    panels = []
    for setting in settings:
        groups = [('minus plain', [compare(folder, setting, arm, 'plain') for arm in setting.arms
                                   if arm != 'plain' and 'plain' in setting.arms])]
        groups += [(f'{arm} minus', [compare(folder, setting, arm, control) for control in controls(arm, setting.arms)
                                     if control != 'plain'])
                   for arm in setting.arms if arm == 'regulated']
        panels.append([(title, [c for c in group if c.difference.n]) for title, group in groups])
    lines = max(sum(len(group) + 1 for _, group in groups if group) for groups in panels)
    figure, axes = _figure(len(settings), 6.2, 1.4 + 0.3 * max(lines, 1))
    for axis, setting, groups in zip(axes, settings, panels, strict=True):
        labels, y = [], 0
        for title, group in groups:
            if not group:
                continue
            labels.append((y, title, True))
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
                labels.append((y, f'{name} ({d.n})', False))
            y += 1.4
        axis.axvline(0, color='black', linewidth=0.9, zorder=1)
        axis.set_yticks([y for y, _, _ in labels], [text for _, text, _ in labels])
        for tick, (_, _, heading) in zip(axis.get_yticklabels(), labels, strict=True):
            tick.set_fontweight('bold' if heading else 'normal')
        for mark, (_, _, heading) in zip(axis.yaxis.get_ticklines()[::2], labels, strict=True):
            mark.set_visible(not heading)
        axis.set_ylim(y - 0.6, -0.6)
        axis.grid(axis='x', alpha=0.3)
        axis.set_title(setting.title, fontsize=10)
        axis.set_xlabel('difference of test top1 in points')
    figure.suptitle('Paired differences with 95 % interval (number of seeds); small dots: seeds, hollow: one seed',
                    fontsize=10)
    _save(figure, picture)


def draw_learning_curves(folder: Path, settings: Sequence[Setting], picture: Path) -> None:
    """Draw the validation accuracy by epoch to a PNG, a panel a setting: mean over seeds, band from lowest to highest.

    Arms without options only, so that the panels stay readable. The epochs are on a logarithmic axis where `plain+`
    is more than three times as long as the others.
    """
    from matplotlib.ticker import ScalarFormatter

    figure, axes = _figure(len(settings), 6.2, 4.2)
    shown = {}
    for axis, setting in zip(axes, settings, strict=True):
        ends = []
        for arm, runs in setting.arms.items():
            by_epoch = defaultdict(list)
            for row in runs.values():
                for path in (folder / 'runs' / row['key']).glob('*/summary.csv'):
                    for line in read_rows(path):
                        if line.get('eval_top1'):
                            by_epoch[int(line['epoch']) + 1].append(float(line['eval_top1']))
            if ':' in arm or not by_epoch:
                continue
            epochs = sorted(by_epoch)
            ends.append(epochs[-1])
            colour, style, marker = STYLES[arm]
            shown[arm], = axis.plot(epochs, [statistics.mean(by_epoch[e]) for e in epochs], style, color=colour,
                                    marker=marker, markersize=5, markevery=max(1, len(epochs) // 8),
                                    markeredgecolor='black', markeredgewidth=0.4)
            axis.fill_between(epochs, [min(by_epoch[e]) for e in epochs], [max(by_epoch[e]) for e in epochs],
                              color=colour, alpha=0.12, linewidth=0)
        if ends and max(ends) > 3 * min(ends):
            axis.set_xscale('log')
            axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_title(setting.title, fontsize=10)
        axis.set_xlabel('epoch')
        axis.set_ylabel('validation top1')
        axis.grid(alpha=0.3)
    if shown:
        arms = [arm for arm in ARMS if arm in shown]
        figure.legend([shown[arm] for arm in arms], arms, loc='outside lower center', ncols=len(arms), fontsize=9)
    _save(figure, picture)
