from __future__ import annotations

import pytest
from PIL import Image
from study_runs import write_run, write_runs

from timm_emoreg.study.grid import ARMS
from timm_emoreg.study.plots import STYLES, draw_forest, draw_learning_curves
from timm_emoreg.study.table import compare, read_settings


@pytest.fixture
def folder(tmp_path):
    return write_runs(tmp_path)


def test_arms_are_told_apart_without_colour():
    assert list(STYLES) == list(ARMS)
    assert len({marker for _, _, marker in STYLES.values()}) == len({colour for colour, _, _ in STYLES.values()}) == 8


def test_the_forest_shows_each_difference_with_its_interval(folder, figures):
    write_run(folder, 'init', 0, 70.0, 'ferplus')
    settings = read_settings(folder)
    draw_forest(folder, settings, folder / 'forest.png')
    assert Image.open(folder / 'forest.png').format == 'PNG'
    emoji, ferplus = figures[0].axes
    texts = [text.get_text() for text in emoji.get_yticklabels()]
    assert texts == ['minus plain', 'init (3)', 'regulated (3)', 'regulated:learned (1)', 'random (3)', 'shuffled (3)',
                     'regulated minus', 'init (3)', 'random (3)', 'shuffled (3)']
    expected = compare(folder, settings[0], 'regulated', 'plain').difference
    y = emoji.get_yticks()[2]
    interval, = [line for line in emoji.lines if list(line.get_ydata()) == [y, y]]
    assert list(interval.get_xdata()) == [expected.low, expected.high]
    seeds, = [line for line in emoji.lines if list(line.get_ydata()) == [y + 0.22] * 3]
    assert list(seeds.get_xdata()) == [4.0, 2.0, 4.0]
    hollow = [line for line in emoji.lines if line.get_markerfacecolor() == 'white']
    assert [list(line.get_ydata()) for line in hollow] == [[emoji.get_yticks()[3]]]
    assert emoji.get_xlim() == ferplus.get_xlim()
    assert emoji.get_ylim()[0] > emoji.get_ylim()[1]  # the first arm on top


def test_the_heading_fits_above_one_panel(folder, figures):
    draw_forest(folder, read_settings(folder)[:1], folder / 'forest.png')
    heading = figures[0].texts[0].get_window_extent()
    assert heading.x0 >= 0
    assert heading.x1 <= figures[0].bbox.width


@pytest.mark.parametrize(('longest', 'scale'), [(6, 'linear'), (40, 'log')])
def test_learning_curves_are_means_over_seeds(tmp_path, figures, longest, scale):
    for arm, epochs in (('plain', 4), ('plain+', longest), ('regulated', 4), ('regulated:learned', 4)):
        for seed in (0, 1):
            write_run(tmp_path, arm, seed, 60.0, predictions=[])
            lines = [f'{epoch},{10 * epoch + seed if epoch % 2 else ""}' for epoch in range(epochs)]
            summary = tmp_path / f'runs/{arm.replace(":", ".")}_1000_s{seed}/task/summary.csv'
            summary.write_text('\n'.join(['epoch,eval_top1', *lines]) + '\n')
    write_run(tmp_path, 'plain', 2, 60.0)  # whose folder lies elsewhere
    draw_learning_curves(tmp_path, read_settings(tmp_path), tmp_path / 'curves.png')
    assert Image.open(tmp_path / 'curves.png').format == 'PNG'
    axis, = figures[0].axes
    assert axis.get_xscale() == scale
    assert len(axis.lines) == 3  # no arm with options
    plain = axis.lines[0]
    assert (list(plain.get_xdata()), list(plain.get_ydata())) == ([2, 4], [10.5, 30.5])  # epochs that were validated
    assert len(axis.collections) == 2  # bands of plain and regulated
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == [f'plain+ (2): {10 * (longest - 1) + 0.5}', 'plain (2): 30.5', 'regulated (2): 30.5']


def test_runs_without_curves_leave_an_empty_panel(folder, figures):
    draw_learning_curves(folder, read_settings(folder), folder / 'curves.png')
    assert figures[0].axes[0].lines[:] == []
