from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from study_runs import write_run, write_runs

from timm_emoreg.marks import between_marks
from timm_emoreg.study import summary
from timm_emoreg.study.command import main
from timm_emoreg.study.grid import StudyError
from timm_emoreg.study.paired_tests import holm
from timm_emoreg.study.summary import draw_summary, make_summary, read_summary
from timm_emoreg.study.table import compare, interval, read_settings

ROOT = Path(__file__).parents[2]
HEADER = 'setting,folder,stimuli,target,train_images,seeds\n'


@pytest.fixture
def csv(tmp_path):
    """Two settings: one of three seeds, and seed 0 of another folder, which has no shuffled labels."""
    (tmp_path / 'b').mkdir()
    write_runs(tmp_path)
    for arm, test in (('plain', 50.0), ('regulated', 52.0)):
        for seed in (0, 1):
            write_run(tmp_path / 'b', arm, seed, test + seed)
    path = tmp_path / 'summary.csv'
    path.write_text(f'{HEADER}all of it,.,emoji,cifar10,1000,0-1 2\none seed,b,emoji,cifar10,1000,0\n')
    return path


def test_a_line_a_setting(csv):
    table = make_summary(read_summary(csv)).splitlines()
    assert table[0] == ('| stage 1 → target | n | plain | minus plain | minus init | minus shuffled | minus unlabelled '
                        '|')
    setting, = read_settings(csv.parent)
    plain, init, shuffled = (compare(csv.parent, setting, 'regulated', c).difference
                             for c in ('plain', 'init', 'shuffled'))
    cells = ['all of it', '3', '66.00 ± 1.00', interval(plain), interval(init), interval(shuffled), 'not run']
    assert table[2] == f'| {" | ".join(cells)} |'
    assert plain.low > 0  # and yet not bold: with four controls p is 0.11
    assert table[3] == '| one seed | 1 | 50.00 | +2.00 | not run | not run | not run |'


def test_seeds_that_are_not_there_are_not_claimed(csv):
    csv.write_text(f'{HEADER}all 17 seeds,.,emoji,cifar10,1000,0-4\n')
    with pytest.raises(StudyError, match=r'all 17 seeds asks for seeds 0-4, and .* has no finished regulated run of '
                                         r'3, 4\. Name those that it has, or run the others'):
        read_summary(csv)


def test_a_set_of_ones_own_has_the_name_that_the_table_shows(csv):
    results = csv.parent / 'b/results.csv'
    results.write_text(results.read_text().replace('cifar10', '/of/mine/things'))
    csv.write_text(f'{HEADER}short,b,emoji,things,1000,0\nfull,b,emoji,/of/mine/things,1000,0\n')
    assert [line.label for line in read_summary(csv)] == ['short', 'full']


def test_a_folder_of_several_models_is_told_apart_by_a_column(csv):
    results = csv.parent / 'b/results.csv'
    first = results.read_text()
    others = ''.join(line.replace('resnet10t', 'test_vit') for line in first.splitlines(keepends=True)[1:])
    results.write_text(first + others.replace('_1000_', '_vit_1000_'))
    row = 'x,b,emoji,cifar10,1000,0'
    csv.write_text(f'{HEADER}{row}\n')
    with pytest.raises(StudyError, match=r'holds 2 such settings\. Tell them apart by a column model\. It'):
        read_summary(csv)
    csv.write_text(f'{HEADER.strip()},model\n{row},test_vit\n{row},resnet10t\n')
    assert [line.setting.model for line in read_summary(csv)] == ['test_vit', 'resnet10t']
    csv.write_text(f'{HEADER.strip()},model\n{row},resnet18\n')
    with pytest.raises(StudyError, match=r'regulated runs of resnet18 on emoji.* 0 such settings\. Correct the row'):
        read_summary(csv)
    # two sets of one's own with the same last name are no two models
    one, two = first.replace(',cifar10,', ',a/things,'), others.replace(',cifar10,', ',b/things,')
    results.write_text(one + two.replace('test_vit', 'resnet10t').replace('_1000_', '_vit_1000_'))
    csv.write_text(f'{HEADER}x,b,emoji,things,1000,0\n')
    with pytest.raises(StudyError, match=r'holds 2 such settings\. Correct the row'):
        read_summary(csv)


def test_what_has_not_the_pairs_of_all_seeds_is_marked(csv, figures):
    for seed in (0, 1, 2):
        write_run(csv.parent / 'b', 'shuffled', seed, 51.0 - seed)
    write_run(csv.parent / 'b', 'plain', 2, 90.0)  # of no seed that was asked for
    csv.write_text(f'{HEADER}two seeds,b,emoji,cifar10,1000,0-1\n')
    (csv.parent / 'b/results.csv').write_text(''.join(
        line for line in (csv.parent / 'b/results.csv').open() if not line.startswith('shuffled_1000_s1')))
    cells = make_summary(read_summary(csv)).splitlines()[2].split(' | ')
    assert cells[1:4] == ['2', '50.50 ± 0.71', '+2.00']
    assert cells[5] == '+1.00 (1)'
    draw_summary(read_summary(csv), csv.with_suffix('.png'))
    assert [[text.get_text().strip() for text in axis.texts] for axis in figures[0].axes] == [
        [], ['not run'], ['(1)'], ['not run']]


def test_bold_is_what_is_clear_after_the_correction(tmp_path, monkeypatch):
    for seed in range(5):
        write_run(tmp_path, 'plain', seed, 50.0 + seed)
        write_run(tmp_path, 'regulated', seed, 52.0 + seed + 0.1 * (seed % 2))
        write_run(tmp_path, 'shuffled', seed, 52.0 + seed + (-1) ** seed)
    (tmp_path / 'summary.csv').write_text(f'{HEADER}x,.,emoji,cifar10,1000,0-4\n')
    lines = read_summary(tmp_path / 'summary.csv')
    line = make_summary(lines).splitlines()[2].split(' | ')
    assert line[3].startswith('**+2.04 [')
    assert line[5].startswith('-0.16 [')
    figures = []
    monkeypatch.setattr(summary, 'save', lambda figure, _: figures.append(figure))
    draw_summary(lines, tmp_path / 'summary.png')
    assert [[text.get_text().strip() for text in axis.texts] for axis in figures[0].axes] == [
        ['*'], ['not run'], [], ['not run']]


def test_the_picture_has_a_panel_a_control(csv, figures):
    lines = read_summary(csv)
    draw_summary(lines, csv.with_suffix('.png'))
    assert Image.open(csv.with_suffix('.png')).format == 'PNG'
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == [
        f'resnet10t minus {versus}' for versus in ('plain', 'init', 'shuffled', 'unlabelled')]
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ['all of it (3)', 'one seed (1)']
    d = lines[0].compared['plain'][0].difference
    drawn, = [line for line in axes[0].lines if len(line.get_xdata()) == 2 and list(line.get_ydata()) == [0, 0]]
    assert list(drawn.get_xdata()) == [d.low, d.high]
    assert not axes[0].texts  # no *: what is clear by itself is not after the correction, as in the table
    assert [text.get_text().strip() for text in axes[3].texts] == ['not run'] * 2


@pytest.mark.parametrize(('row', 'message'), [
    ('', 'summary.csv: is missing or names no setting. It needs one row per setting, with the columns setting'),
    ('x,.,ferplus,cifar10,1000,0', 'for regulated runs on ferplus, cifar10, 1000 training images, and that holds '
                                   '0 such settings. Correct the row. It holds: resnet10t, emoji, cifar10, 1000.'),
    ('x,.,emoji,cifar10,1000,first', "seeds 'first' of x are none. Give numbers and ranges, such as 0-4."),
    ('x,.,emoji,cifar10,1000,4-0', "seeds '4-0' of x are none"),
    ('x,.,emoji,cifar10,1000,77', 'no finished run with a seed of 77 yet'),
])
def test_settings_that_are_not_there(csv, capsys, row, message):
    csv.write_text(HEADER + row)
    assert main(['summary', str(csv)]) == 2
    assert message in capsys.readouterr().err


def test_a_csv_without_a_column(csv):
    csv.write_text('setting,folder\na,b\n')
    with pytest.raises(StudyError, match=r'summary\.csv: lacks the column stimuli\. It needs '):
        read_summary(csv)


def test_the_command_writes_between_the_marks(csv, capsys):
    readme = csv.with_name('README.md')
    readme.write_text('before\n<!-- study -->\nold\n<!-- /study -->\nafter\n')
    assert main(['summary', str(csv), '--write', str(readme)]) == 0
    table = capsys.readouterr().out
    assert '| all of it | 3 |' in table
    assert readme.read_text() == f'before\n<!-- study -->\n{table}<!-- /study -->\nafter\n'
    assert csv.with_suffix('.png').is_file()
    readme.write_text('no marks')
    assert main(['summary', str(csv), '--write', str(readme)]) == 2
    assert 'README.md: holds no <!-- study --> ... <!-- /study --> to write between' in capsys.readouterr().err
    assert readme.read_text() == 'no marks'


def test_the_readme_has_the_table_of_the_results():
    if not (ROOT / 'hub_cards').is_dir():
        pytest.skip('the cards are not part of a source distribution')
    table = make_summary(read_summary(ROOT / 'hub_cards/study/summary.csv'))
    assert between_marks(ROOT / 'README.md', 'study') == table.rstrip('\n')


def test_the_correction_counts_every_control_and_not_only_those_shown(csv):
    setting, = read_settings(csv.parent)
    family = ('plain', 'init', 'random', 'shuffled')  # the random one has no column
    corrected = holm([compare(csv.parent, setting, 'regulated', control).difference.p for control in family])
    expected = {control: p for control, p in zip(family, corrected, strict=True) if control != 'random'}
    assert {versus: p for versus, (_, p) in read_summary(csv)[0].compared.items()} == pytest.approx(expected)
