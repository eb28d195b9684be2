from __future__ import annotations

import math

import pytest
from PIL import Image
from timm.utils import update_summary
from timm.utils.summary import trim_summary

from timm_emoreg.training.curves import draw_curves

PLAIN = ({'loss': 1.0}, {'loss': 0.9, 'top1': 50.0, 'top5': 90.0})
EMOREG = ({'balance': 0.4, 'loss': 1.0, 'loss_emotional': 1.1, 'loss_non_emotional': 1.2}, PLAIN[1])
AFFECT = ({'loss': 1.0}, {'loss': 0.9, 'ccc': 0.1, 'ccc_valence': 0.1, 'pcc': 0.1, 'rmse': 0.5})


def write(folder, kind, epochs=5):
    path = folder / 'summary.csv'
    for epoch in range(epochs):
        train, scores = ({k: v * (0.9 ** epoch) for k, v in part.items()} for part in kind)
        update_summary(epoch, train, scores, str(path), lr=0.1 * (1 - epoch / epochs))
    return path


@pytest.mark.parametrize(('kind', 'metric', 'titles', 'losses'), [
    (PLAIN, 'top1', ['loss', 'validation top1', 'learning rate, end of epoch'], ['training', 'validation']),
    (AFFECT, 'ccc', ['loss', 'validation ccc', 'learning rate, end of epoch'], ['training', 'validation']),
    (EMOREG, 'top1', ['loss', 'validation top1', 'balance r', 'learning rate, end of epoch'],
     ['training', 'non-emotional z', "emotional z'", 'validation']),
])
@pytest.mark.parametrize('epochs', [1, 5])
def test_what_is_drawn(tmp_path, figures, kind, metric, titles, losses, epochs):
    picture = tmp_path / 'curves.png'
    draw_curves(write(tmp_path, kind, epochs), picture, metric, 'run: task')
    with Image.open(picture) as image:
        assert image.format == 'PNG'
        assert image.width > image.height > 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ['curves.png', 'summary.csv']
    figure, = figures
    assert figure.get_suptitle() == 'run: task'
    axes = {axis.get_title(): axis for axis in figure.axes}
    assert list(axes) == titles
    lines = {line.get_label(): line for line in axes['loss'].lines}
    assert list(lines) == [text.get_text() for text in axes['loss'].get_legend().get_texts()] == losses
    assert list(lines['training'].get_xdata()) == list(range(1, epochs + 1))
    assert list(lines['validation'].get_ydata()) == pytest.approx([0.9 ** (e + 1) for e in range(epochs)])
    best = axes[f'validation {metric}'].lines[1]
    assert list(best.get_xdata()) == [1]  # the metric of these runs falls
    assert best.get_label() == f'best: {kind[1][metric]:.4g} in epoch 1'
    assert axes['learning rate, end of epoch'].get_ylim()[0] == 0
    if 'balance r' in axes:
        low, high = axes['balance r'].get_ylim()
        assert low < 0 < 1 < high
    for axis in axes.values():
        assert axis.get_xlabel() == 'epoch'
        assert axis.get_xlim() == (0.5, epochs + 0.5)
        assert all(tick == round(tick) for tick in axis.get_xticks())
        for line in axis.lines:  # a run of one epoch has no line to see, only a marker
            assert epochs > 1 or line.get_marker() not in ('', 'None', None)
    styles = {(line.get_linestyle(), line.get_marker()) for line in lines.values()}
    assert len(styles) == len(lines)  # told apart without colour


def test_missing_cells_leave_gaps(tmp_path, figures):
    summary = write(tmp_path, EMOREG)
    lines = summary.read_text().splitlines()
    header = lines[0].split(',')
    cells = lines[3].split(',')
    cells[header.index('eval_top1')] = cells[header.index('train_balance')] = ''
    lines[3], lines[4] = ','.join(cells), ','.join(lines[4].split(',')[:3])
    summary.write_text('\n'.join(lines) + '\n')
    draw_curves(summary, tmp_path / 'curves.png', 'top1', 'gaps')
    axes = {axis.get_title(): axis for axis in figures[0].axes}
    assert list(axes['validation top1'].lines[0].get_xdata()) == [1, 2, 5]  # which --val-interval may leave out
    assert [math.isnan(y) for y in axes['balance r'].lines[0].get_ydata()] == [False, False, True, False, False]


def test_a_resumed_summary_and_a_diverged_epoch(tmp_path, figures):
    summary = write(tmp_path, PLAIN, 4)
    trim_summary(str(summary), 2)
    update_summary(2, {'loss': math.nan}, {'loss': math.nan, 'top1': math.nan, 'top5': 1.0}, str(summary), lr=0.1)
    draw_curves(summary, tmp_path / 'curves.png', 'top1', 'resumed')
    metric = figures[0].axes[1]
    assert list(metric.lines[0].get_xdata()) == [1, 2, 3]
    assert list(metric.lines[1].get_xdata()) == [1]  # nan is never the best


def test_many_epochs_have_no_markers(tmp_path, figures):
    draw_curves(write(tmp_path, PLAIN, 21), tmp_path / 'curves.png', 'top1', 'long')
    assert {line.get_marker() for line in figures[0].axes[0].lines} == {''}


def test_nothing_to_draw_is_said(tmp_path):
    summary = write(tmp_path, PLAIN, 2)
    with pytest.raises(ValueError, match="has no column 'eval_ccc', only epoch, train_loss, eval_loss"):
        draw_curves(summary, tmp_path / 'curves.png', 'ccc', 'x')
    trim_summary(str(summary), 0)
    with pytest.raises(ValueError, match='holds no epoch to draw'):
        draw_curves(summary, tmp_path / 'curves.png', 'top1', 'x')
    assert not (tmp_path / 'curves.png').exists()
