"""The picture of what a model answers to single images, a row each."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..answers import Answers, top_classes
from ..drawing import BLUE, DPI, GREY, RESPONSES, VERMILLION, save, short
from ..trained import Trained

__all__ = ['bare', 'draw_images']

ROW, HEAD, FOOT = 1.9, 0.85, 0.45  # inches
MOST_EMOTIONS, MOST_RATINGS = 12, 5  # of an image, or their texts run into each other


def bare(axis) -> None:
    axis.set_xticks([])
    axis.set_yticks([])


def _strongest(axis, names: Sequence[str], state: Tensor, most: int) -> tuple[list[str], list[float]]:
    """Names and values that there is room for, in their order; the axis says what is left out."""
    strongest = sorted(state.abs().topk(min(len(names), most)).indices.tolist())
    if len(strongest) < len(names):
        axis.set_xlabel(f'the strongest {len(strongest)} of {len(names)}', fontsize=8, labelpad=1)
    return [names[i] for i in strongest], state[strongest].tolist()


def _emotions(axis, names: Sequence[str], state: Tensor) -> None:
    names, values = _strongest(axis, names, state, MOST_EMOTIONS)
    at = range(len(names))
    axis.barh(at, values, color=[VERMILLION if v == max(values) else BLUE for v in values], height=0.7)
    for y, v in zip(at, values, strict=True):
        axis.text(v + 0.02, y, f'{v:.2f}', va='center', fontsize=7)
    axis.set_yticks(at, [short(n, 16) for n in names], fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1.18)
    axis.set_xticks([0, 0.5, 1], ['0', '0.5', '1'], fontsize=7)
    axis.spines[['top', 'right']].set_visible(False)


def _plane(axis, names: Sequence[str], state: Tensor) -> None:
    x, y = state.tolist()
    axis.axhline(0, color=GREY, linewidth=1)
    axis.axvline(0, color=GREY, linewidth=1)
    axis.plot([0, x], [0, y], color=VERMILLION, linewidth=1.5)
    axis.plot(x, y, 'o', color=VERMILLION, markersize=9)
    axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect='equal')
    axis.set_xticks([-1, 0, 1], ['-1', '0', '1'], fontsize=7)
    axis.set_yticks([-1, 0, 1], ['-1', '0', '1'], fontsize=7)
    axis.set_xlabel(f'{short(names[0], 16)} {x:+.2f}', fontsize=8, labelpad=1)
    axis.set_ylabel(f'{short(names[1], 16)} {y:+.2f}', fontsize=8, labelpad=0)


def _lines(axis, names: Sequence[str], state: Tensor) -> None:
    names, values = _strongest(axis, names, state, MOST_RATINGS)
    at = range(len(names))
    axis.axvline(0, color=GREY, linewidth=1)
    axis.hlines(at, -1, 1, color=GREY, linewidth=1)
    axis.hlines(at, 0, values, color=VERMILLION, linewidth=4)
    axis.plot(values, at, 'o', color=VERMILLION, markersize=9)
    for y, (name, v) in enumerate(zip(names, values, strict=True)):
        axis.text(0, y - 0.22, f'{short(name, 20)} {v:+.2f}', ha='center', va='bottom', fontsize=9)
    axis.set(xlim=(-1.08, 1.08), ylim=(len(names) - 0.3, -0.8), yticks=[])
    axis.set_xticks([-1, 0, 1], ['-1', '0', '1'], fontsize=7)
    axis.spines[['top', 'right', 'left']].set_visible(False)


def _affect(axis, trained: Trained, state: Tensor) -> None:
    if trained.model.affect_kind == 'emotion':
        _emotions(axis, trained.affect_names, state)
    elif len(trained.affect_names) == 2:
        _plane(axis, trained.affect_names, state)
    else:
        _lines(axis, trained.affect_names, state)


def _responses(axis, trained: Trained, answers: Answers, i: int, highest: float) -> None:
    classes = top_classes(answers, i)
    p = {field: getattr(answers, field)[i].softmax(dim=0)[classes].tolist() for field in RESPONSES}
    for k, (field, (_, colour)) in enumerate(RESPONSES.items()):
        axis.barh([c + 0.27 * (k - 1) for c in range(len(classes))], p[field], height=0.25, color=colour)
    for c, (v, most) in enumerate(zip(p['regulated'], map(max, zip(*p.values(), strict=True)), strict=True)):
        axis.text(most + 0.02 * highest, c, f'y {v:.2f}' if highest > 0.1 else f'y {v:.3f}', va='center', fontsize=7)
    axis.set_yticks(range(len(classes)), [short(trained.label(c), 20) for c in classes], fontsize=8)
    axis.set_ylim(len(classes) - 0.5, -0.5)
    axis.set_xlim(0, 1.18 * highest)
    ticks = [0, highest / 2, highest]
    axis.set_xticks(ticks, [f'{t:.2g}' for t in ticks], fontsize=7)
    axis.spines[['top', 'right']].set_visible(False)
    z, y = (trained.label(getattr(answers, f)[i].argmax().item()) for f in ('non_emotional', 'regulated'))
    change = '' if z == y else f', without regulation: {short(z, 16)}'
    axis.set_title(f'answer: {short(y, 20)}{change}', fontsize=9, loc='left', color='black' if z == y else VERMILLION)


def _balance(axis, r: float) -> None:
    axis.plot([0, 0], [0, 1], color=GREY, linewidth=3, solid_capstyle='round')
    axis.plot(0, r, 'o', color='black', markersize=9)
    axis.text(0.25, r, f'{r:.2f}', va='center', fontsize=9)
    axis.text(0, 1.06, "z' alone", ha='center', va='bottom', fontsize=7)
    axis.text(0, -0.06, 'z alone', ha='center', va='top', fontsize=7)
    axis.set(xlim=(-1, 1.2), ylim=(-0.15, 1.15))
    axis.axis('off')


def _where(axis, picture: Image.Image, slope: Tensor) -> None:
    from matplotlib.colors import to_rgb

    axis.imshow(np.asarray(picture.convert('L')), cmap='gray', vmin=-60, vmax=300)
    height, width = picture.height, picture.width
    colour = np.zeros((*slope.shape, 4))
    colour[..., :3] = to_rgb(VERMILLION)  # one hue: only its strength says something
    colour[..., 3] = 0.85 * slope.numpy()
    axis.imshow(colour, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation='bilinear')
    bare(axis)


def draw_images(trained: Trained, names: Sequence[str], pictures: Sequence[Image.Image], answers: Answers,
                slopes: Tensor, path: Path) -> None:
    """Draw a row for each image: the image, its affective state, the responses, the balance, where the affect looks.

    Args:
        trained: The model.
        names: Name of each image.
        pictures: The images.
        answers: The answers to them.
        slopes: `affect_gradient` of each, (N, H, W).
        path: The PNG to write, which appears as a whole or not at all.
    """
    from matplotlib.figure import Figure  # drawn without pyplot: no display, and no state of a caller's is touched
    from matplotlib.patches import Patch

    classes = trained.model.num_classes > 0
    widths = {'image': 1.7, 'affective state e': 2.6, 'responses (softmax)': 3.3, 'balance r': 1.0,
              'where the affect\nresponse looks': 1.7}
    if not classes:
        del widths['responses (softmax)'], widths['balance r']
    figure = Figure(figsize=(sum(widths.values()) + 0.4, HEAD + ROW * len(names) + FOOT), dpi=DPI, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    # beside the legend, where there is one
    figure.suptitle(short(trained.source, 70 if classes else 90), fontsize=9, x=0.01, ha='left')
    grid = figure.subplots(1 + len(names), len(widths), squeeze=False, width_ratios=list(widths.values()),
                           height_ratios=[0.25] + [ROW] * len(names))
    for axis, heading in zip(grid[0], widths, strict=True):
        axis.axis('off')
        axis.text(0.5, 0, heading, ha='center', va='bottom', fontsize=10, fontweight='bold', transform=axis.transAxes)
    highest = 1.0
    if classes:  # one scale for all rows, which fits probabilities spread over a thousand classes, too
        most = max(getattr(answers, field).softmax(dim=1).max().item() for field in RESPONSES)
        highest = 1.0 if most > 0.5 else most
    for i, row in enumerate(grid[1:]):
        row[0].imshow(np.asarray(pictures[i]), interpolation='nearest' if pictures[i].width < 100 else None)
        row[0].set_title(short(names[i], 24), fontsize=8)
        bare(row[0])
        _affect(row[1], trained, answers.state[i])
        if classes:
            _responses(row[2], trained, answers, i, highest)
            _balance(row[3], answers.balance[i].item())
        _where(row[-1], pictures[i], slopes[i])
    if classes:
        handles = [Patch(color=colour, label=label) for label, colour in RESPONSES.values()]
        figure.legend(handles=handles, loc='outside upper right', ncols=3, fontsize=9, frameon=False)
    save(figure, path)
