from __future__ import annotations

import argparse
import re

import pytest
from study_runs import write_run

from timm_emoreg.data import CONTENT_LABELS, DataError
from timm_emoreg.study import grid as study_grid
from timm_emoreg.study.grid import ARMS, COLUMNS, Ratings, StudyError, parse_arm, plan


@pytest.fixture
def grid(monkeypatch):
    """Calls `plan` with a small grid; `plain+` sees sets of known sizes."""
    monkeypatch.setattr(study_grid, 'stimuli_images', lambda name, *_: {'emoji': 1300, 'ferplus': 28_000}[name])
    monkeypatch.setattr(study_grid, 'target_images', lambda name, data_dir: 45_000)

    def call(**changes):
        return plan(argparse.Namespace(**{
            'models': ['resnet10t'], 'stimuli': ['ferplus'], 'targets': ['cifar10'], 'train_images': ['1000'],
            'arms': list(ARMS), 'seeds': [0], 'epochs': 20, 'affect_epochs': 5, 'data_dir': None, 'flags': [],
            'affect_flags': [], 'target_flags': [], 'rating_columns': None, 'rating_scale': None, **changes}))
    return call


def flags(run) -> str:
    return ' '.join(run.flags)


COMMON = '--model resnet10t --seed 0'
CIFAR = '--dataset cifar10 --train-images 1000'


@pytest.mark.parametrize(('arm', 'expected', 'first'), [
    ('plain', f'{COMMON} --task plain {CIFAR} --epochs 20', None),
    ('plain+', f'{COMMON} --task plain {CIFAR} --epochs 160', None),
    ('init', f'{COMMON} --task plain {CIFAR} --epochs 20', ''),
    ('regulated', f'{COMMON} --task emoreg {CIFAR} --epochs 20', ''),
    ('random', f'{COMMON} --task emoreg {CIFAR} --experience none --stimuli ferplus --epochs 20', None),
    ('shuffled', f'{COMMON} --task emoreg {CIFAR} --epochs 20', ' --shuffle-stimuli-labels'),
    ('unlabelled', f'{COMMON} --task emoreg {CIFAR} --epochs 20', ' --stimuli-labels rotation'),
    ('init:shuffled', f'{COMMON} --task plain {CIFAR} --epochs 20', ' --shuffle-stimuli-labels'),
    ('regulated:learned', f'{COMMON} --task emoreg {CIFAR} --epochs 20 --balance learned', ''),
    ('regulated:gate', f'{COMMON} --task emoreg {CIFAR} --epochs 20 --balance gate', ''),
    ('regulated:loss', f'{COMMON} --task emoreg {CIFAR} --epochs 20 --balanced-in loss', ''),
    ('regulated:separate', f'{COMMON} --task emoreg {CIFAR} --epochs 20 --separate-experience', ''),
    ('regulated:no-modulation', f'{COMMON} --task emoreg {CIFAR} --epochs 20 --no-modulation', ''),
    ('regulated:balance=0.25,separate',
     f'{COMMON} --task emoreg {CIFAR} --epochs 20 --balance 0.25 --separate-experience', ''),
    ('regulated:rehearsal=1',
     f'{COMMON} --task emoreg {CIFAR} --stimuli ferplus --epochs 20 --rehearsal 1', ''),
    ('shuffled:rehearsal=1', f'{COMMON} --task emoreg {CIFAR} --stimuli ferplus --shuffle-stimuli-labels --epochs 20 '
                             '--rehearsal 1', ' --shuffle-stimuli-labels'),
    ('random:rehearsal=1', f'{COMMON} --task emoreg {CIFAR} --experience none --stimuli ferplus --epochs 20 '
                           '--rehearsal 1', None),
    ('plain:lr=0.05', f'{COMMON} --task plain {CIFAR} --epochs 20 --lr 0.05', None),
])
def test_what_an_arm_asks_of_the_training_script(grid, arm, expected, first):
    runs, notes = grid(arms=[arm])
    assert flags(runs[-1]) == expected
    assert (runs[-1].arm, runs[-1].task) == (arm, expected.split()[5])
    assert notes == []
    if first is None:
        assert len(runs) == 1
        assert runs[0].needs is None
    else:
        assert flags(runs[0]) == f'{COMMON} --task affect --stimuli ferplus{first} --epochs 5 --val-interval 5'
        assert [run.key for run in runs] == [runs[1].needs, runs[1].key]


@pytest.mark.parametrize(('stimuli', 'labels'), CONTENT_LABELS.items())
def test_content_is_what_the_pictures_show(grid, stimuli, labels):
    assert f'--stimuli {stimuli} --stimuli-labels {labels} ' in flags(grid(stimuli=[stimuli], arms=['content'])[0][0])


def test_content_is_skipped_where_there_is_none(grid):
    runs, notes = grid(arms=['content', 'init:content'], seeds=[0, 1])
    assert runs == []
    assert notes == [f'{arm}: skipped for ferplus, which has only affective labels.' for arm in ('content',
                                                                                                 'init:content')]


def test_flags_of_all_and_of_each_stage(grid):
    runs, _ = grid(arms=['regulated:lr=0.2'], flags=['--smoothing', '0'], affect_flags=['--lr', '0.002'],
                   target_flags=['--lr', '0.1'])
    assert [flags(run).partition(' --epochs ')[2] for run in runs] == [
        '5 --smoothing 0 --val-interval 5 --lr 0.002', '20 --smoothing 0 --lr 0.1 --lr 0.2']  # the last one counts


def test_what_is_for_all_does_not_choose_the_epoch_of_stage_1(grid):
    runs, _ = grid(arms=['regulated'], flags=['--val-interval', '1'])
    assert flags(runs[0]).endswith('--val-interval 1 --val-interval 5')


def test_stage_1_and_plain_are_shared(grid):
    runs, _ = grid(arms=[*ARMS, 'regulated:learned', 'init:shuffled'], stimuli=['ferplus', 'emoji'], seeds=[0, 1],
                   train_images=['1000', 'all'])
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys)
    first = [run for run in runs if run.task == 'affect']
    assert len(first) == 2 * (3 + 4)  # ferplus without content
    assert sum(run.arm == 'plain' for run in runs) == 2 * 2
    assert sum(run.arm == 'plain+' for run in runs) == 2 * (2 * 2 - 1)  # none for all images and emoji, which are few
    assert len(runs) - len(first) == 2 * 2 * (1 + 8 + 9) - 2
    assert all(run.needs is None or keys.index(run.needs) < keys.index(run.key) for run in runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    sharing = {run.arm for run in runs if run.needs == 'resnet10t_emoji_affect.shuffled_s1'}
    assert sharing == {'shuffled', 'init:shuffled'}


def test_the_ratings_of_a_csv_go_to_the_runs_that_see_it(grid, tmp_path):
    table = tmp_path / 'own.csv'
    table.touch()
    rated = ('--rating-columns', 'valence', 'arousal', '--rating-scale', '1', '1234567.5')
    runs, notes = grid(arms=['plain', 'regulated', 'shuffled', 'content', 'random', 'regulated:rehearsal=1'],
                       stimuli=[str(table), 'emoji'], rating_columns=['valence', 'arousal'],
                       rating_scale=[1.0, 1234567.5])
    assert notes == [f'content: skipped for {table}, which has only affective labels.']
    seen = {run.key: study_grid.rating_flags(run.flags) for run in runs}
    assert {key for key, flags in seen.items() if flags} == {f'resnet10t_own.csv_{name}_s0' for name in (
        'affect', 'affect.shuffled', 'cifar10_1000_random', 'cifar10_1000_regulated.rehearsal=1')}
    assert {flags for flags in seen.values() if flags} == {rated}


@pytest.mark.parametrize(('stimuli', 'images', 'epochs'), [
    ('ferplus', '1000', 20 + 140), ('ferplus', 'all', 20 + 3), ('emoji', '1000', 20 + 6),
    ('emoji', '4000', 20 + 2)])  # 6.5 and 1.625: to the nearest number
def test_plain_plus_sees_as_many_images_more_as_stage_1(grid, stimuli, images, epochs):
    run, = grid(arms=['plain+'], stimuli=[stimuli], train_images=[images])[0]
    assert run.epochs == epochs
    assert f'--epochs {epochs}' in flags(run)


def test_sizes_are_those_of_the_sets():
    assert study_grid.stimuli_images('emoji', None, Ratings()) == len(study_grid.load_stimuli('emoji').train)
    assert study_grid.target_images('emoji', None) == len(study_grid.load_target('emoji').train)


@pytest.mark.parametrize(('arm', 'message'), [
    ('regulatd', "arm 'regulatd' is unknown. .*Did you mean 'regulated'?"),
    ('regulated:lerned', "arm 'regulated:lerned': option 'lerned' is unknown. .*Did you mean 'learned'?"),
    ('plain:learned', "arm 'plain:learned': option 'learned' is unknown. Known: 'name=value'"),
    ('init:shufled', "Did you mean 'shuffled'?"),
    ('regulated:', "option '' is unknown"),
])
def test_an_unknown_arm_is_named_with_what_is_near(arm, message):
    with pytest.raises(DataError, match=message):
        parse_arm(arm)


@pytest.mark.parametrize(('arm', 'message'), [
    ('init:shuffled,content', "'init:shuffled,content': shuffled and content decide the same. Give one of them"),
    ('regulated:learned,gate', 'learned and gate decide the same'),
    ('regulated:learned,balance=0.2', 'learned and balance=0.2 decide the same'),
    ('regulated:no-modulation,no-modulation', 'decide the same'),
    ('plain:rehearsal=1', "'plain:rehearsal=1': rehearsal needs the dual head. Use regulated:rehearsal=1"),
    ('init:balance=learned', "'init:balance=learned': balance needs the dual head"),
])
def test_options_that_do_not_go_together_are_refused(arm, message):
    with pytest.raises(StudyError, match=re.escape(message)):
        parse_arm(arm)


def test_a_plain_plus_that_is_plain_is_skipped(grid):
    runs, notes = grid(arms=['plain', 'plain+'], stimuli=['emoji'], train_images=['20000'])
    assert [run.arm for run in runs] == ['plain']
    assert notes == ['plain+: skipped for emoji and 20,000 images of cifar10, as stage 1 sees less than half an epoch '
                     'of these.']


def test_damaged_rows_are_named(tmp_path):
    path = tmp_path / 'results.csv'
    header = ','.join(COLUMNS)
    for text, message in (('arm,seed\nplain,0\n', 'its first line names no column key'),
                          ('key,arm\na,plain\n', 'its first line names no column model'),
                          (f'{header}\n{"," * header.count(",")}\nb\n',
                           'row 3 does not have as many cells as the first one'),
                          (f'{header}\n{"," * len(COLUMNS)}\n',
                           'row 2 does not have as many cells as the first one')):
        path.write_text(text)
        with pytest.raises(StudyError, match=f'results.csv: {message}. Restore it'):
            study_grid.read_runs(tmp_path, path.name)
    path.write_bytes(f'{header}\n'.encode() + b'caf\xe9\n')
    with pytest.raises(StudyError, match=r'results.csv: is no csv in UTF-8 \(.*0xe9.*\)\. Restore it'):
        study_grid.read_runs(tmp_path, path.name)


def test_rows_that_were_put_together_are_checked(tmp_path):
    write_run(tmp_path, 'plain', 0, 50.0)
    write_run(tmp_path, 'regulated', 0, 51.0)
    path = tmp_path / 'results.csv'
    header, *rows = path.read_text().splitlines()

    def read(*lines):
        path.write_text('\n'.join(lines) + '\n')
        return study_grid.read_runs(tmp_path, path.name)

    assert len(read(header, *rows, rows[0])) == 3  # the same run once more takes nothing away
    with pytest.raises(StudyError, match=r"results.csv: row 4 has the seed 'seed', which is no number\. .* the first "
                                         'line stays only once'):
        read(header, *rows, header, *rows)
    with pytest.raises(StudyError, match=r'row 4, plain_1000_s0, has the test result 49\.0, and an earlier row of the '
                                         r'same run 50\.0\. Keep one'):
        read(header, *rows, rows[0].replace(',50.0,', ',49.0,'))


def test_a_csv_may_begin_with_a_byte_order_mark(tmp_path):
    write_run(tmp_path, 'plain', 0, 50.0)
    path = tmp_path / 'results.csv'
    expected = study_grid.read_runs(tmp_path, path.name)
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    assert study_grid.read_runs(tmp_path, path.name) == expected


# a list of its own: a name that is missing in the other one would let an arm train something else than its row says
@pytest.mark.parametrize('flag', [
    'model', 'task', 'seed', 'dataset', 'train-images', 'epochs', 'affect-epochs', 'experience', 'stimuli',
    'stimuli-labels', 'shuffle-stimuli-labels', 'rating-columns', 'rating-scale', 'data-dir', 'device', 'output',
    'experiment', 'resume'])
def test_an_option_cannot_take_what_the_study_decides(flag):
    with pytest.raises(StudyError, match=f"arm 'regulated:{flag}=3': --{flag} is set by the study"):
        parse_arm(f'regulated:{flag}=3')


def test_two_sets_of_one_name_are_refused(grid):
    with pytest.raises(StudyError, match=r'resnet10t_set_1000_plain_s0: two runs would have that name'):
        grid(arms=['plain'], targets=['a/set', 'b/set'])


def test_several_stimuli_and_paths_have_short_names():
    assert study_grid.short_name('ferplus+/my/faces') == 'ferplus+faces'
    assert study_grid.short_name('/my/faces/') == 'faces'
