"""The picture that a training run leaves: loss, validation metric, learning rate and balance by epoch."""
from __future__ import annotations

import csv
import math
from pathlib import Path

from ..drawing import BLUE, RESPONSES, VERMILLION, save

__all__ = ['draw_curves']

# column of the csv -> name, colour, line and marker, which tell the curves apart without colour
LOSSES = {
    'train_loss': ('training', BLUE, '-', 'o'),
    'train_loss_non_emotional': ('non-emotional z', RESPONSES['non_emotional'][1], '--', 's'),
    'train_loss_emotional': ("emotional z'", RESPONSES['emotional'][1], ':', '^'),
    'eval_loss': ('validation', VERMILLION, '-', 'D'),
}


def _number(cell: str | None) -> float:
    """A cell of training; one that is missing or empty leaves a gap in the curve."""
    return float(cell) if cell else math.nan


def draw_curves(summary: str | Path, picture: str | Path, metric: str, title: str) -> None:
    """Draw ``summary.csv`` of a run to a PNG, which appears as a whole or not at all.

    Args:
        summary: The csv that timm's ``update_summary`` wrote, one row per epoch; ``eval_`` cells of an epoch without
            validation are empty.
        picture: The PNG to write.
        metric: Name of the validation metric, without its prefix ``eval_``; more is better.
        title: Heading.

    Raises:
        ValueError: If the csv holds no epoch, or not the metric.
    """
    from matplotlib.figure import Figure  # drawn without pyplot: no display, and no state of a caller's is touched
    from matplotlib.ticker import MaxNLocator

    with open(summary, newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f'{summary}: holds no epoch to draw.')
    if f'eval_{metric}' not in rows[0]:
        raise ValueError(f"{summary}: has no column 'eval_{metric}', only {', '.join(rows[0])}.")
    epochs = [int(row['epoch']) + 1 for row in rows]
    column = {name: [_number(row.get(name)) for row in rows] for name in rows[0]}
    panels = ['loss', 'metric', *(['balance'] if 'train_balance' in column else []), 'lr']
    figure = Figure(figsize=(3.8 * len(panels), 3.9), layout='constrained')
    axis = dict(zip(panels, figure.subplots(1, len(panels)), strict=True))
    size = 5 if len(epochs) <= 20 else 0  # markers on many epochs would hide the line

    def draw(panel: str, name: str, marker: str = 'o', **style) -> None:
        # --val-interval leaves epochs out, between which the curve goes on
        shown = [i for i, row in enumerate(rows) if row.get(name) or not name.startswith('eval_')]
        axis[panel].plot([epochs[i] for i in shown], [column[name][i] for i in shown], markersize=size or 5,
                         marker=marker if size or len(shown) == 1 else '', **{'color': BLUE, **style})

    for name, (label, colour, style, marker) in LOSSES.items():
        if name in column:
            draw('loss', name, marker, color=colour, linestyle=style, label=label)
    axis['loss'].set_title('loss')

    draw('metric', f'eval_{metric}')
    axis['metric'].set_title(f'validation {metric}')
    judged = [(value, -epoch) for value, epoch in zip(column[f'eval_{metric}'], epochs, strict=True)
              if not math.isnan(value)]
    if judged:
        best, epoch = max(judged)
        axis['metric'].plot(-epoch, best, marker='*', markersize=13, linestyle='', color=VERMILLION,
                            label=f'best: {best:.4g} in epoch {-epoch}')

    if 'balance' in axis:
        draw('balance', 'train_balance')
        axis['balance'].set_title('balance r')
        axis['balance'].set_ylim(-0.03, 1.03)
        axis['balance'].set_yticks([0, 0.25, 0.5, 0.75, 1], ['0: non-emotional', '0.25', '0.5', '0.75', '1: emotional'],
                                   fontsize=8)

    draw('lr', 'lr')
    axis['lr'].set_title('learning rate, end of epoch')
    axis['lr'].set_ylim(bottom=0)

    for one in axis.values():
        one.set_xlabel('epoch')
        one.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        one.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        one.grid(alpha=0.3)
        if one.get_legend_handles_labels()[1]:  # below, where it hides no curve
            one.legend(fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.2), ncols=2)
    figure.suptitle(title, fontsize=11, parse_math=False)
    save(figure, Path(picture))
