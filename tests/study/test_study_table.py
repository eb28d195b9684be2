from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from study_runs import TESTS, write_run, write_runs

from timm_emoreg.data import ImageSet, Splits, Target
from timm_emoreg.data.controls import fewer_images
from timm_emoreg.study import command, table
from timm_emoreg.study.grid import COLUMNS, StudyError, read_rows, write_rows
from timm_emoreg.study.table import compare, controls, make_table, read_settings, write_table

PUBLISHED = Path(__file__).parents[2] / 'hub_cards' / 'study'


@pytest.fixture
def folder(tmp_path):
    return write_runs(tmp_path)


def tables(folder, **options):
    text, rows = make_table(folder, read_settings(folder), **options)
    write_table(folder, text, rows)
    return text


def test_arms_come_in_their_order_and_plain_belongs_to_every_setting(folder):
    write_run(folder, 'init', 0, 70.0, 'ferplus')
    emoji, ferplus = read_settings(folder)
    assert list(emoji.arms) == ['plain', 'init', 'regulated', 'regulated:learned', 'random', 'shuffled']
    assert list(ferplus.arms) == ['plain', 'init']
    assert sorted(ferplus.arms['plain']) == [0, 1, 2]
    assert ferplus.title == 'resnet10t: ferplus → cifar10, 1,000 training images, 3 epochs, seeds 0-2'


def test_plain_alone_is_a_setting(tmp_path):
    write_run(tmp_path, 'plain', 0, 66.0, images='all')
    setting, = read_settings(tmp_path)
    assert setting.title == 'resnet10t: cifar10, all training images, 3 epochs, seed 0'
    assert '| plain | 1 | 66.00 | 67.00 |  |  | 5 |' in tables(tmp_path)
    write_run(tmp_path, 'init', 0, 70.0)  # of another number of images
    assert [list(setting.arms) for setting in read_settings(tmp_path)] == [['plain'], ['init']]


def test_tables_of_some_seeds_write_nothing(folder, capsys):
    assert sorted(read_settings(folder, [1, 2, 7])[0].arms['plain']) == [1, 2]
    with pytest.raises(StudyError, match=r'results\.csv: no finished run with a seed of 7, 8 yet'):
        read_settings(folder, [7, 8])
    before = set(folder.rglob('*'))
    assert command.main(['table', '--output', str(folder), '--seeds', '2', '1']) == 0
    assert '| plain | 2 |' in capsys.readouterr().out
    assert set(folder.rglob('*')) == before


def test_nothing_finished_is_said(tmp_path):
    with pytest.raises(StudyError, match=r'nowhere: there is no such folder\. Give the --output of a study'):
        read_settings(tmp_path / 'nowhere')
    with pytest.raises(StudyError, match=r'results\.csv: no finished run yet\. Start some'):
        tables(tmp_path)


@pytest.mark.parametrize(('arm', 'expected'), [
    ('regulated', ['plain', 'init', 'random', 'unlabelled']),
    ('regulated:gate', ['plain', 'init', 'shuffled:gate']),
    ('init', ['plain', 'init:content']),
    ('random', []),
    ('init:content', []),
    # what is no option of the dual head is one of all arms
    ('regulated:lr=0.1', ['plain:lr=0.1', 'shuffled:lr=0.1']),
    ('regulated:gate,lr=0.1', ['plain:lr=0.1', 'shuffled:lr=0.1,gate']),
    ('init:lr=0.1', ['plain:lr=0.1', 'init:lr=0.1,shuffled']),
    # a share of stage 1 is one of all arms that have a stage 1
    ('regulated:experience-share=0.2',
     ['plain', 'init:experience-share=0.2', 'random', 'shuffled:experience-share=0.2']),
    ('init:experience-share=0.2', ['plain', 'init:shuffled,experience-share=0.2']),
    ('regulated:separate,no-modulation', ['plain', 'init']),
])
def test_controls_differ_in_one_thing(arm, expected):
    known = ['plain', 'init', 'init:content', 'regulated', 'random', 'unlabelled', 'shuffled:gate', 'regulated:gate',
             'plain:lr=0.1', 'regulated:lr=0.1', 'shuffled:lr=0.1', 'shuffled:lr=0.1,gate', 'init:lr=0.1,shuffled',
             'init:experience-share=0.2', 'shuffled:experience-share=0.2', 'init:shuffled,experience-share=0.2']
    assert controls(arm, known) == expected


def test_only_common_seeds_are_paired(folder):
    setting, = read_settings(folder)
    found = compare(folder, setting, 'regulated', 'regulated:learned')
    assert (found.by_seed, found.difference.n) == ((4.0,), 1)
    assert compare(folder, setting, 'regulated:learned', 'regulated').by_seed == (-4.0,)


def test_images_are_counted_seed_by_seed(tmp_path):
    def predict(right):
        return [(i % 3, i % 3 if i in right else 9) for i in range(6)]

    for seed, (ours, theirs) in enumerate([({0, 1, 2, 3}, {3, 4}), ({0, 1}, {0, 5})]):
        write_run(tmp_path, 'regulated', seed, 60.0, predictions=predict(ours))
        write_run(tmp_path, 'plain', seed, 50.0, predictions=predict(theirs))
    write_run(tmp_path, 'regulated', 2, 60.0, predictions=predict({0}))
    write_run(tmp_path, 'plain', 2, 50.0)  # has left none
    setting, = read_settings(tmp_path)
    found = compare(tmp_path, setting, 'regulated', 'plain')
    assert found.pairs == ((0, 3, 1), (1, 1, 1))
    assert (found.won, found.lost) == (4, 2)
    assert found.mcnemar_p == pytest.approx(stats.binomtest(4, 6).pvalue)
    assert '| plain | 3 | +10.00 | n/a | n/a | 4 : 2 (2 seeds) | 0.688 |' in tables(tmp_path)
    row = next(row for row in read_rows(tmp_path / 'table.csv') if row['versus'] == 'plain')
    assert (row['won'], row['lost'], row['won_lost_by_seed']) == ('4', '2', '0:3/1 1:1/1')


def test_arms_that_were_judged_on_other_images_are_not_compared(tmp_path):
    write_run(tmp_path, 'regulated', 0, 60.0, predictions=[(0, 0), (1, 1)])
    write_run(tmp_path, 'plain', 0, 50.0, predictions=[(1, 1), (0, 0)])
    with pytest.raises(StudyError, match=r'regulated_1000_s0 and plain_1000_s0 were judged on different test images '
                                         r'\(2 and 2 of them\).*remove its row and its folder in runs'):
        tables(tmp_path)


def test_equal_differences_are_no_certainty(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, 'plain', seed, 60.0)
        write_run(tmp_path, 'regulated', seed, 40.0)
    text = tables(tmp_path)
    assert '| plain | 2 | -20.00 | n/a | n/a | n/a | n/a |' in text
    assert 'Differences that are the same for all seeds give no interval and no t test: n/a.' in text
    assert 'single seed' not in text


def test_the_tables(folder):
    text = tables(folder)
    assert text == (folder / 'table.md').read_text()
    assert '| plain | 3 | 66.00 ± 1.00 | 67.00 ± 1.00 |  |  | 15 |' in text
    expected = stats.ttest_rel(TESTS['regulated'], TESTS['plain'])
    low, high = expected.confidence_interval()
    versus_plain = f'+3.33 [{low:+.2f}, {high:+.2f}] | {expected.pvalue:.3f}'
    assert f'| regulated | 3 | 69.33 ± 2.08 | 70.33 ± 2.08 | {versus_plain} | 15 |' in text
    assert '| regulated:learned | 1 | 66.00 | 67.00 | +0.00 | n/a | 5 |' in text
    assert 'A single seed gives no sd, no interval and no t test: n/a.' in text
    assert 'overstated and that p is optimistic' in ' '.join(text.split())
    assert text.index('| init minus | n |') < text.index('| regulated minus | n |')
    rows = read_rows(folder / 'table.csv')
    assert [row['versus'] for row in rows if row['arm'] == 'regulated'] == ['', 'plain', 'init', 'random', 'shuffled']
    family = [row for row in rows if row['arm'] == 'regulated' and row['versus']]
    smallest = min(family, key=lambda row: float(row['p']))
    assert float(smallest['holm_p']) == pytest.approx(4 * float(smallest['p']))
    assert all(float(row['holm_p']) >= float(row['p']) for row in family)
    only = next(row for row in rows if row['arm'] == 'random' and row['versus'])
    assert (only['versus'], only['holm_p'], float(only['difference'])) == ('plain', 'nan', pytest.approx(-5 / 6))


def test_accuracy_without_copies(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    images[30] = images[5]
    target = Target('class', ('cat', 'dog'))
    parts = [ImageSet(part, torch.arange(len(part)) % 2, target) for part in (images[:20], images[20:25], images[25:])]
    monkeypatch.setattr(table, 'load_target', lambda name, data_dir: Splits('cifar10', *parts, 'none'))
    labels = parts[2].targets.tolist()
    wrong = [(label, label if i != 5 else 1 - label) for i, label in enumerate(labels)]  # test image 5 is the copy
    write_run(tmp_path, 'plain', 0, 100 * 14 / 15, images='all', predictions=wrong)
    text = tables(tmp_path, duplicates=True)
    assert '| resnet10t: cifar10, all training images, 3 epochs, seed 0 | plain | 1.0 | 1.0 | 93.33 | 100.00 |' in text
    for number, other in (('4', wrong[1:]), ('6', [(1 - label, answer) for label, answer in wrong])):
        write_run(tmp_path, 'plain', 0, 60.0, images=number, predictions=other)  # of another test set
        assert f'cifar10, {number} training images, 3 epochs, seed 0 | plain | 0.0 | 0.0 | n/a | n/a |' in tables(
            tmp_path, duplicates=True)


def test_stage_1_stands_below_with_the_epoch_it_was_taken_at(folder):
    assert '## Stage 1' not in tables(folder)

    def first(arm, seed, test, taken, metric='ccc', stimuli='emoji'):
        return dict.fromkeys(COLUMNS, '') | {
            'key': f'{stimuli}_{arm}_s{seed}', 'arm': arm, 'model': 'resnet10t', 'stimuli': stimuli, 'seed': seed,
            'epochs': 15, 'best_epoch': taken, 'metric': metric, 'test': test}

    rows = [first('affect', 0, 0.25, 15), first('affect:shuffled', 0, -0.02, 3), first('affect', 1, 0.35, 12),
            first('affect', 0, 60.0, 15, 'top1', 'faces/ferplus'), first('affect', 9, 0.9, 1)]  # 9: of no run above
    write_rows(folder / 'stage1.csv', rows, COLUMNS)
    text = tables(folder)
    assert '| resnet10t: emoji | affect | 2 | ccc | 0.30 ± 0.07 | 13.5 of 15 |' in text
    assert '| resnet10t: emoji | affect:shuffled | 1 | ccc | -0.02 | 3.0 of 15 |' in text
    assert '| resnet10t: ferplus | affect | 1 | top1 | 60.00 | 15.0 of 15 |' in text
    one, _ = make_table(folder, read_settings(folder, [0]))
    assert '| resnet10t: emoji | affect | 1 | ccc | 0.25 | 15.0 of 15 |' in one


def test_runs_that_were_computed_otherwise_are_not_paired_without_a_word(folder):
    assert 'different ways' not in tables(folder)
    write_run(folder, 'unlabelled', 3, 60.0, precision='bfloat16')  # a seed of its own is paired with nothing
    assert 'different ways' not in tables(folder)
    write_run(folder, 'unlabelled', 1, 60.0, precision='bfloat16')
    assert ('Not only the arm differs: the runs of seed 1 were computed in different ways (bfloat16, float32). '
            'Run the arms of a seed on one machine, or give all of them --no-amp.') in tables(folder)


def test_runs_of_other_commits_or_devices_are_not_paired_without_a_word(folder):
    path = folder / 'results.csv'
    rows = [row | {'commit': 'aaa', 'device': 'CPU, 1 threads'} for row in read_rows(path)]
    write_rows(path, rows, COLUMNS)
    one = next(row for row in rows if row['arm'] == 'plain' and row['seed'] == '1')
    for same in ('CPU, 1 threads', 'CPU, 1 thread', 'CPU, 2 threads'):
        one['device'] = same
        write_rows(path, rows, COLUMNS)
        assert 'Not only the arm' not in tables(folder)
    one |= {'commit': 'bbb-dirty', 'device': 'NVIDIA H200'}
    write_rows(path, rows, COLUMNS)
    text = tables(folder)
    assert ('Not only the arm differs: the runs of seed 1 were made on different devices (CPU, NVIDIA H200). '
            'Run the arms of a seed on one machine.') in text
    assert ('Not only the arm differs: the runs of seed 1 were made at different commits (aaa, bbb-dirty). Make sure '
            'that nothing that these arms do has changed between them, or run the arms of a seed at one.') in text


def test_a_stage_1_that_was_computed_otherwise_is_told_too(folder):
    rows = [dict.fromkeys(COLUMNS, '') | {
        'key': f'{arm}_s{seed}', 'arm': arm, 'model': 'resnet10t', 'stimuli': 'emoji', 'seed': seed, 'epochs': 15,
        'best_epoch': 15, 'metric': 'ccc', 'test': 0.2, 'precision': precision}
        for arm, seed, precision in (('affect', 0, 'float32'), ('affect:shuffled', 0, 'float32'),
                                     ('affect', 1, 'float32'), ('affect:shuffled', 1, 'bfloat16'))]
    write_rows(folder / 'stage1.csv', rows, COLUMNS)
    assert ('the runs of seed 1 were computed in different ways in stage 1 (bfloat16, float32). Run the arms'
            in tables(folder))
    for other in ({'seed': 9}, {'stimuli': 'ferplus'}, {'model': 'resnet18'}):  # of no run above
        write_rows(folder / 'stage1.csv', rows[:-1] + [row | other for row in rows[2:]], COLUMNS)
        assert 'different ways' not in tables(folder)


def test_an_arm_of_another_version(folder):
    write_run(folder, 'tempered', 0, 60.0)
    with pytest.raises(StudyError, match=r"is of the arm 'tempered', which this version does not know.*Update"):
        read_settings(folder)


@pytest.mark.parametrize(('one', 'other', 'told'), [
    ({'attention': 'plain'}, {'attention': 'fused'}, '(fused attention, plain attention). .+--no-amp'),
    ({'convolution': 'torch'}, {'convolution': 'columns'}, '(columns convolution, torch convolution). .+--no-amp'),
    ({'loader': 'timm'}, {'loader': 'resident'}, '(resident loader, timm loader). .+--loader timm'),
    ({'attention': 'plain', 'loader': 'timm'}, {}, None),  # an older row that does not tell
])
def test_runs_of_another_kernel_or_augmentation_are_not_paired_without_a_word(folder, one, other, told):
    write_run(folder, 'unlabelled', 3, 60.0, **one)
    write_run(folder, 'content', 3, 60.0, **other)
    text = tables(folder)
    if told is None:
        assert 'different ways' not in text
    else:
        start, end = told.split('.+')
        assert f'the runs of seed 3 were computed in different ways {start}' in text
        assert f'or give all of them {end}.' in text


def copied(images, monkeypatch):
    """Gives the module `table` a set of 20 training, 5 validation and 15 test images; the labels of the latter."""
    target = Target('class', ('cat', 'dog'))
    parts = [ImageSet(part, torch.arange(len(part)) % 2, target) for part in (images[:20], images[20:25], images[25:])]
    splits = Splits('cifar10', *parts, 'none')
    monkeypatch.setattr(table, 'load_target', lambda name, data_dir: splits)
    return splits, parts[2].targets.tolist()


@pytest.mark.parametrize(('p', 'text'), [(0.0004, '< 0.001'), (0.001, '0.001'), (0.0044, '0.004')])
def test_a_small_p_is_not_made_smaller(p, text):
    assert table._p(p) == text


def test_the_accuracy_without_copies_leaves_out_near_ones_too(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(1, 255, (40, 32, 32, 3), dtype=np.uint8)
    images[30], images[31] = images[5], images[6] + 1  # test images 5 and 6
    _, labels = copied(images, monkeypatch)
    wrong = [(label, 1 - label if i == 6 else label) for i, label in enumerate(labels)]
    write_run(tmp_path, 'plain', 0, 100 * 14 / 15, images='all', predictions=wrong)
    assert 'seed 0 | plain | 1.0 | 2.0 | 93.33 | 100.00 |' in tables(tmp_path, duplicates=True)


def test_copies_are_looked_for_among_the_training_images_of_each_seed(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    splits, labels = copied(images, monkeypatch)
    first, second = ({image.tobytes() for image in fewer_images(splits, 4, seed).train.images} for seed in (0, 1))
    shown = next(i for i in range(20) if images[i].tobytes() in second - first)  # to seed 1 alone
    images[30] = images[shown]
    for seed in (0, 1):
        write_run(tmp_path, 'plain', seed, 60.0, images='4', predictions=[(label, label) for label in labels])
    write_run(tmp_path, 'plain', 0, 60.0, images='20', predictions=[(label, label) for label in labels])
    text = tables(tmp_path, duplicates=True)
    assert 'seeds 0-1 | plain | 0.5 | 0.5 | 60.00 ± 0.00 | 100.00 ± 0.00 |' in text
    assert '20 training images, 3 epochs, seed 0 | plain | 1.0 | 1.0 | 60.00 | 100.00 |' in text  # of that seed, too


@pytest.mark.parametrize('column', ['model', 'target', 'train_images'])
def test_a_run_of_another_setting_is_in_its_own_table_alone(folder, column):
    rows = read_rows(folder / 'results.csv')
    other = {'model': 'resnet18', 'target': 'cifar100', 'train_images': '5000'}[column]
    write_rows(folder / 'results.csv', [*rows, *(
        {**row, 'key': f'other_{row["key"]}', 'test': 1.0, column: other}
        for row in rows if row['arm'] in ('plain', 'init') and row['seed'] == '0')], COLUMNS)
    one, two = read_settings(folder)
    assert {arm: [float(row['test']) for row in runs.values()] for arm, runs in one.arms.items()} == {
        arm: list(tests) for arm, tests in TESTS.items()}
    assert {arm: [float(row['test']) for row in runs.values()] for arm, runs in two.arms.items()} == {
        'plain': [1.0], 'init': [1.0]}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason='the cards are not part of a source distribution')
@pytest.mark.parametrize('folder', [path.parent for path in sorted(PUBLISHED.glob('**/results.csv'))],
                         ids=lambda folder: folder.name)
def test_the_published_tables_are_those_of_the_published_runs(folder):
    """But for what is counted from predictions, which are not published."""
    settings = read_settings(folder)
    text, rows = make_table(folder, settings)
    published = read_rows(folder / 'table.csv')
    counted = ('won', 'lost', 'mcnemar_p', 'won_lost_by_seed')
    assert len(rows) == len(published)
    for row, there in zip(rows, published, strict=True):
        for name, value in there.items():
            if name not in counted:
                now = row.get(name, '')
                assert float(value) == pytest.approx(now, rel=1e-6, nan_ok=True) if isinstance(now, float) else (
                    value == str(now)), (row['arm'], name)
    shown = (folder / 'table.md').read_text(encoding='utf-8')
    for line, there in zip(text.rstrip().splitlines(), shown.rstrip().splitlines(), strict=True):
        known, counted, _ = line.partition(' | n/a')  # the images won and lost
        assert there.startswith(known) if counted else there == line, line
