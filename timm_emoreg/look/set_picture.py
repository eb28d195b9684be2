"""The picture of what a model answers to a data set: affect by class, balance, answers that regulation changes."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..answers import Answers, Changes, changed_answers, class_affect, largest_error, top1
from ..data import ImageSet
from ..drawing import BLUE, DPI, GREY, RESPONSES, VERMILLION, save, short
from ..trained import Trained
from .image_picture import bare

__all__ = ['draw_set']

MOST_CLASSES = 100  # rows of the heat map
MOST_WRITTEN = 30  # rows and columns whose cells hold their number
GALLERY = 8  # images a row
KINDS = {'repaired': BLUE, 'broken': VERMILLION, 'neither': GREY}


def _heat_map(figure, trained: Trained, answers: Answers, images: ImageSet) -> None:
    mean, error = class_affect(answers.state, images.targets, len(images.target))
    seen = found = (~mean.isnan().any(dim=1)).nonzero()[:, 0]
    average = mean[seen].mean(dim=0)
    difference = mean - average
    if len(seen) > MOST_CLASSES:
        seen = seen[difference[seen].abs().amax(dim=1).topk(MOST_CLASSES).indices].sort().values
    shown = difference[seen].numpy()
    most_different = float(np.abs(shown).max())
    spread = largest_error(error)
    noise = max(2 * (spread or 0), 0.01)
    limit = max(most_different, noise)  # what may be chance is not drawn at full colour
    digits = max(2, 1 - math.floor(math.log10(max(most_different, 0.01))))
    axis = figure.subplots()
    drawn = axis.imshow(shown, cmap='RdBu_r', vmin=-limit, vmax=limit, aspect='auto')
    if max(shown.shape) <= MOST_WRITTEN and most_different >= 0.5 * 10 ** -digits:  # or all would be written as 0
        for (row, column), v in np.ndenumerate(shown):
            axis.text(column, row, f'{round(float(v), digits) + 0:+.{digits}f}', ha='center', va='center', fontsize=8,
                      color='white' if abs(v) > 0.6 * limit else 'black')
    axis.set_yticks(range(len(seen)), [short(images.target.names[c], 22) for c in seen],
                    fontsize=9 if len(seen) <= MOST_WRITTEN else 7)
    slanted = {'rotation': 40, 'ha': 'left'} if len(average) > 3 else {}
    axis.set_xticks(range(len(average)), [short(n, 16) for n in trained.affect_names], fontsize=9, **slanted)
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position('top')
    axis.set_xlabel('affective state', fontsize=9)
    axis.set_ylabel('class of the images', fontsize=9)
    axis.tick_params(length=0)
    below = axis.secondary_xaxis('bottom')
    below.set_xticks(range(len(average)), [f'{m:.2f}' for m in average.tolist()], fontsize=8)
    below.tick_params(length=0)
    most = f' (the {len(seen)} that differ most)' if len(seen) < len(found) else ''
    below.set_xlabel(f'mean over the classes of the affective state\ncells: each class{most} less that mean, '
                     + ('one image per class' if spread is None else f'standard error at most {spread:.2g}')
                     + (f'\nno class is further from the mean than {most_different:.2g}: the state hardly tells them '
                        'apart' if most_different < noise else ''), fontsize=8)
    bar = figure.colorbar(drawn, ax=axis, fraction=0.05, aspect=30)
    bar.ax.tick_params(labelsize=7)


def _accuracy(axis, answers: Answers, target: Tensor) -> None:
    for y, (field, (_, colour)) in enumerate(RESPONSES.items()):
        right = top1(getattr(answers, field), target)
        axis.barh(y, right, color=colour, height=0.7)
        axis.text(right + 1, y, f'{right:.1f} %', va='center', fontsize=8)
    axis.set_yticks(range(3), [label for label, _ in RESPONSES.values()], fontsize=8)
    axis.set(xlim=(0, 118), ylim=(2.5, -0.5), xticks=[])
    axis.set_title('right answers of each response', fontsize=10, loc='left')
    axis.spines[['top', 'right', 'bottom']].set_visible(False)


def _changes(axis, changes: Changes, total: int) -> None:
    counts = [len(getattr(changes, kind)) for kind in KINDS]
    for y, (colour, count) in enumerate(zip(KINDS.values(), counts, strict=True)):
        axis.barh(y, count, color=colour, height=0.7)
        axis.text(count + 0.02 * max(*counts, 1), y, f'{count:,}', va='center', fontsize=8)
    axis.set_yticks(range(3), ['repaired', 'broken', 'wrong both times'], fontsize=8)
    axis.set(xlim=(0, 1.25 * max(*counts, 1)), ylim=(2.5, -0.5), xticks=[])
    axis.set_title(f'y and z disagree: {len(changes):,} of {total:,}', fontsize=10, loc='left')
    axis.spines[['top', 'right', 'bottom']].set_visible(False)


def _balance(axis, trained: Trained, balance: Tensor) -> None:
    kind, r = trained.model.regulation.kind, balance.numpy().astype(float)
    if kind == 'gate':
        centre, half = (r.min() + r.max()) / 2, max((r.max() - r.min()) / 2, 0.02)
        axis.hist(r, bins=40, range=(max(centre - half, 0), min(centre + half, 1)), color=BLUE)
        axis.axvline(r.mean(), color=VERMILLION, linewidth=1.5)
        axis.set_title(f'balance r, a gate: mean {r.mean():.3f}, sd {r.std():.2g}', fontsize=10, loc='left')
        axis.set_ylabel('images', fontsize=8)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis='x', nbins=4)
        axis.spines[['top', 'right']].set_visible(False)
        return
    axis.plot([0, 1], [0, 0], color=GREY, linewidth=3, solid_capstyle='round')
    axis.plot(r[0], 0, 'o', color='black', markersize=9)
    axis.text(r[0], 0.25, f'{r[0]:.3f}', ha='center', va='bottom', fontsize=10)
    axis.text(0, -0.3, 'z alone', ha='center', va='top', fontsize=8)
    axis.text(1, -0.3, "z' alone", ha='center', va='top', fontsize=8)
    axis.set(xlim=(-0.15, 1.15), ylim=(-1, 1))
    axis.axis('off')
    axis.set_title(f'balance r, {kind}: the same for every image', fontsize=10, loc='left')


def _gallery(figure, answers: Answers, images: ImageSet, changes: Changes) -> None:
    shown = [kind for kind in KINDS if len(getattr(changes, kind))]
    if not shown:
        return
    before, after = answers.non_emotional.argmax(dim=1), answers.regulated.argmax(dim=1)
    grid = figure.subplots(len(shown), GALLERY, squeeze=False)
    for kind, row in zip(shown, grid, strict=True):
        indices = getattr(changes, kind)[:GALLERY].tolist()
        for axis in row:
            axis.axis('off')
        row[0].axis('on')
        bare(row[0])
        row[0].spines[:].set_visible(False)
        row[0].set_ylabel('wrong\nboth times' if kind == 'neither' else kind, fontsize=10, fontweight='bold')
        for axis, i in zip(row, indices, strict=False):
            axis.imshow(np.asarray(images.picture(i)))
            z, y, true = (short(images.target.names[c], 13) for c in (before[i], after[i], images.targets[i]))
            marks = {'repaired': '✗✓', 'broken': '✓✗', 'neither': '✗✗'}[kind]
            text = f'z {z} {marks[0]}\ny {y} {marks[1]}' + (f'\nis {true}' if kind == 'neither' else '')
            axis.set_title(text, fontsize=8, loc='left')


def draw_set(trained: Trained, name: str, images: ImageSet, answers: Answers, path: Path) -> None:
    """Draw what a model answered to a data set.

    Args:
        trained: The model; without classes only the affective state of the classes is drawn.
        name: Name of the set.
        images: Its images.
        answers: The answers to them.
        path: The PNG to write, which appears as a whole or not at all.
    """
    from matplotlib.figure import Figure

    classes = trained.model.num_classes > 0
    rows = min(len(torch.unique(images.targets)), MOST_CLASSES)
    high = max(1.9 + rows * (0.3 if rows <= MOST_WRITTEN else 0.15), 4.6)
    wide = 3.2 + 0.62 * max(len(trained.affect_names), 2)
    title = f'{short(trained.source, 60 if classes else 40)} on {len(images):,} test images of {short(name, 30)}'
    if not classes:
        figure = Figure(figsize=(max(wide, 6), high), dpi=DPI, layout='constrained')
        figure.suptitle(title, fontsize=10, x=0.01, ha='left')
        _heat_map(figure, trained, answers, images)
        save(figure, path)
        return
    changes = changed_answers(answers.non_emotional, answers.regulated, images.targets)
    kinds = sum(1 for kind in KINDS if len(getattr(changes, kind)))
    figure = Figure(figsize=(max(wide, 6.2) + 4.4, high + 1.65 * kinds + 0.2), dpi=DPI, layout='constrained')
    figure.suptitle(title, fontsize=10, x=0.01, ha='left')
    upper, lower = figure.subfigures(2, 1, height_ratios=[high, max(1.65 * kinds, 0.01)])
    left, right = upper.subfigures(1, 2, width_ratios=[max(wide, 6.2), 4.4])
    _heat_map(left, trained, answers, images)
    panels = right.subplots(4, 1, height_ratios=[1.5, 1.5, 1.5, max(high - 4.5, 0.01)])
    panels[3].axis('off')
    _balance(panels[0], trained, answers.balance)
    _accuracy(panels[1], answers, images.targets)
    _changes(panels[2], changes, len(images))
    _gallery(lower, answers, images, changes)
    save(figure, path)
