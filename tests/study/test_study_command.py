"""The command of the study; fake_train.py stands for train.py, and the last test uses the real one."""
from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from timm_emoreg.study import command as study
from timm_emoreg.study import grid, runner
from timm_emoreg.study.command import main
from timm_emoreg.study.grid import StudyError, read_rows
from timm_emoreg.study.runner import Study, lock_study

FAKE = Path(__file__).parent / 'fake_train.py'
TRAIN = Path(__file__).parents[2] / 'train.py'
SMALL = ('--models', 'test_resnet', '--stimuli', 'emoji', '--train-images', '1000', '--epochs', '3')


@pytest.fixture
def run(tmp_path, capsys):
    """Call the command `run` on tmp_path/s; gives its status and what it printed."""
    def call(*argv, script=FAKE, own=()):
        status = main(['run', '--output', str(tmp_path / 's'), '--train-script', str(script), *SMALL,
                       *map(str, argv), *(('--', *own) if own else ())])
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def waiting_run(tmp_path, monkeypatch, request):
    """Name the run that is to wait for a signal; gives a function that returns when it does."""
    pipe = tmp_path / 'begun'

    def name(key):
        os.mkfifo(pipe)
        monkeypatch.setenv('FAKE_WAIT', key)
        monkeypatch.setenv('FAKE_PIPE', str(pipe))
        end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        request.addfinalizer(lambda: os.close(end))

        def has_begun():
            assert select.select([end], [], [], 120)[0], 'it did not begin'
        return has_begun
    return name


def keys(tmp_path, name='results.csv') -> list[str]:
    return [row['key'] for row in read_rows(tmp_path / 's' / name)]


def starts(tmp_path) -> dict[str, int]:
    """How often each run was started."""
    return {log.stem: sum(line.startswith('$ ') for line in log.read_text().splitlines())
            for log in (tmp_path / 's/logs').iterdir()}


def test_a_grid_is_run_once(run, tmp_path, capsys):
    arms = ('--arms', 'plain', 'regulated', 'init', '--seeds', 0, 1)
    status, out, err = run(*arms, '--jobs', 3, '--threads', 2, own=('--val-interval', '2'))
    assert (status, err) == (0, '')
    assert '8 runs to do, 0 finished before; 3 at a time' in out
    assert '[8/8]' in out
    assert ' left\n' in out
    rows = read_rows(tmp_path / 's/results.csv')
    assert len(rows) == 6
    assert sorted(keys(tmp_path, 'stage1.csv')) == [f'test_resnet_emoji_affect_s{seed}' for seed in (0, 1)]
    row = next(row for row in rows if row['key'] == 'test_resnet_emoji_cifar10_1000_regulated_s1')
    result = json.loads((tmp_path / 's/runs' / row['key'] / 'emoreg/result.json').read_text())
    assert float(row['test']) == result['test']['top1']
    assert float(row['validation']) == result['validation']
    assert (row['arm'], row['stimuli'], row['seed'], row['balance'], row['device']) == (
        'regulated', 'emoji', '1', '0.5', 'CPU, 2 threads')
    assert row['flags'].endswith('--epochs 3 --val-interval 2')
    assert float(row['seconds']) == result['seconds']
    assert (row['epochs'], row['best_epoch'], result['best_epoch']) == ('3', '2', 2)
    assert (row['commit'], row['attention'], row['convolution'], row['loader']) == (
        'abc', 'plain', 'columns', 'resident')
    assert result['experience'] == str(tmp_path / 's/runs/test_resnet_emoji_affect_s1')
    assert {row['arm']: row['precision'] for row in rows} == {
        'plain': 'float32', 'init': 'float32', 'regulated': 'bfloat16'}
    assert main(['table', '--output', str(tmp_path / 's'), '--seeds', '0', '1']) == 0
    assert ('the runs of seed 0, 1 were computed in different ways (bfloat16, float32). Run the arms'
            in capsys.readouterr().out)
    kept = {str(path.relative_to(tmp_path / 's/runs')) for path in (tmp_path / 's/runs').glob('*/*/*.pth.tar')}
    assert kept == {f'test_resnet_emoji_affect_s{seed}/affect/model_best.pth.tar' for seed in (0, 1)}

    before = (tmp_path / 's/results.csv').read_text()
    status, out, _ = run(*arms, '--arms', 'plain', 'regulated', 'init', own=('--val-interval', '2'))
    assert status == 0
    assert '0 runs to do, 8 finished before' in out
    assert (tmp_path / 's/results.csv').read_text() == before
    assert set(starts(tmp_path).values()) == {1}


def test_another_arm_later_takes_the_stage_1_that_is_there(run, tmp_path):
    assert run('--arms', 'regulated', '--seeds', 0)[0] == 0
    assert '1 runs to do, 2 finished before' in run('--arms', 'regulated', 'init', '--seeds', 0)[1]
    assert starts(tmp_path)['test_resnet_emoji_affect_s0'] == 1


def test_a_column_of_the_users_own_stays(run, tmp_path):
    assert run('--arms', 'plain', '--seeds', 0)[0] == 0
    path = tmp_path / 's/results.csv'
    header, row = path.read_text().splitlines()
    path.write_text(f'{header},note\n{row},mine\n')
    assert run('--arms', 'plain', '--seeds', 0, 1)[0] == 0
    assert [row['note'] for row in read_rows(path)] == ['mine', '']


def test_checkpoints_can_be_kept(run, tmp_path):
    assert run('--arms', 'plain', '--seeds', 0, '--keep-checkpoints')[0] == 0
    assert len(list((tmp_path / 's/runs').glob('*/plain/*.pth.tar'))) == 2


def test_a_result_without_a_row_gets_one(run, tmp_path):
    arms = ('--arms', 'plain', '--seeds', 0, 1)
    assert run(*arms)[0] == 0
    lines = (tmp_path / 's/results.csv').read_text().splitlines()
    (tmp_path / 's/results.csv').write_text('\n'.join(lines[:-1]) + '\n')  # killed between result and row
    assert run(*arms)[0] == 0
    assert (tmp_path / 's/results.csv').read_text().splitlines() == lines
    assert set(starts(tmp_path).values()) == {1}


def test_a_failed_run_is_reported_and_the_others_go_on(run, tmp_path, monkeypatch):
    arms = ('--arms', 'plain', 'regulated', 'random', 'shuffled', '--seeds', 0)
    monkeypatch.setenv('FAKE_FAIL', 'test_resnet_cifar10_1000_plain_s0 test_resnet_emoji_affect_s0')
    status, out, err = run(*arms)
    assert status == 1
    assert '[3/6] test_resnet_emoji_affect_s0: failed' in out
    assert '[6/6]' in out
    log = tmp_path / 's/logs/test_resnet_cifar10_1000_plain_s0.log'
    assert f'failed: test_resnet_cifar10_1000_plain_s0: exit status 1: the loss is nan\n    {log}' in err
    assert ('failed: test_resnet_emoji_cifar10_1000_regulated_s0: not run, as its stage 1 failed, '
            'test_resnet_emoji_affect_s0') in err
    assert [key.split('_')[-2] for key in keys(tmp_path)] == ['random', 'shuffled']
    monkeypatch.delenv('FAKE_FAIL')
    assert run(*arms, '--data-dir', tmp_path)[0] == 0  # tried again, where the data is now
    assert len(keys(tmp_path)) == 4
    assert 'resumed' in log.read_text()
    command = log.read_text().splitlines()[2]
    assert command.endswith(f'--resume {tmp_path / "s/runs" / log.stem} --data-dir {tmp_path}')


def test_a_run_that_has_its_result_is_finished_however_its_process_ends(run, tmp_path, monkeypatch):
    monkeypatch.setenv('FAKE_LATE', 'test_resnet_emoji_affect_s0')
    status, out, err = run('--arms', 'init', '--seeds', 0)
    assert (status, err, len(keys(tmp_path))) == (0, '', 1)
    assert '[2/2]' in out


def test_a_stopped_study_goes_on_where_it_was(run, tmp_path, waiting_run):
    slow = 'test_resnet_emoji_cifar10_1000_random_s0'
    arms = ('--arms', 'plain', 'random', 'init', '--seeds', 0)
    has_begun = waiting_run(slow)
    refused = []

    def stop_it():
        has_begun()
        try:
            with lock_study(tmp_path / 's'):
                pass
        except StudyError as e:
            refused.append(str(e))
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop_it, daemon=True)
    handler = signal.getsignal(signal.SIGINT)
    stopper.start()
    status, out, err = run(*arms)
    stopper.join()
    assert (status, err) == (128 + signal.SIGINT, '')
    assert signal.getsignal(signal.SIGINT) is handler
    assert 'stopped with 3 runs to do. The same command goes on.' in out
    assert refused[0].startswith(f'{tmp_path / "s"}: process {os.getpid()} runs this study')
    assert keys(tmp_path) == ['test_resnet_cifar10_1000_plain_s0']
    # which has no row yet, so that its flags are known from its beginning alone
    status, _, err = run('--arms', 'random', '--seeds', 0, own=('--lr', '0.2'))
    assert (status, err) == (2, f'study: {slow} was begun with other flags: "nothing" then, "--lr 0.2" now. Give the '
                                'same ones, or another --output.\n')
    status, _, err = run(*arms)
    assert (status, err) == (0, '')
    assert starts(tmp_path) == {'test_resnet_cifar10_1000_plain_s0': 1, 'test_resnet_emoji_affect_s0': 1, slow: 2,
                                'test_resnet_emoji_cifar10_1000_init_s0': 1}


def test_a_second_signal_kills_the_runs(tmp_path, capsys):
    class Process:
        returncode = None

        def poll(self):
            return self.returncode

        def terminate(self):
            made.signals.append(signal.SIGINT)  # the user again, while the run writes its checkpoint

        def kill(self):
            self.returncode = -9

    made, run = Study(tmp_path, FAKE), grid.Run('a', 'plain', 'plain', 'm', '', 'cifar10', 'all', 0, 1, ())
    made._waiting = lambda runs: list(runs)
    made._start = lambda *_: made.signals.append(signal.SIGINT) or Process()
    assert made.execute([run], lock=0) == 128 + signal.SIGINT
    assert capsys.readouterr().out.splitlines()[1:] == [
        'stopping: the runs write a checkpoint first', 'killing the runs',
        'stopped with 1 run to do. The same command goes on.']


@pytest.mark.parametrize(('seconds', 'text'), [(20, 'less than 1 min'), (300, 'about 5 min'),
                                               (7500, 'about 2 h 05 min')])
def test_the_time_left_is_told_in_hours_and_minutes(seconds, text):
    assert runner._hours(seconds) == text


def test_a_study_that_is_running_is_not_started_twice(run, tmp_path):
    with lock_study(tmp_path / 's'):
        status, _, err = run('--arms', 'plain')
    assert status == 2
    assert f'study: {tmp_path / "s"}: process {os.getpid()} runs this study' in err
    assert os.listdir(tmp_path / 's') == ['study.lock']
    assert run('--arms', 'plain', '--seeds', 0)[0] == 0


def test_a_row_that_another_call_writes_meanwhile_is_kept(run, tmp_path, monkeypatch):
    check = study.check_flags

    def another_call(*args):  # after this one has looked at what is finished, and before it has the lock
        monkeypatch.setattr(study, 'check_flags', check)
        assert run('--arms', 'plain', '--seeds', 1)[0] == 0
        check(*args)

    monkeypatch.setattr(study, 'check_flags', another_call)
    assert run('--arms', 'plain', '--seeds', 0)[0] == 0
    assert keys(tmp_path) == [f'test_resnet_cifar10_1000_plain_s{seed}' for seed in (1, 0)]


def test_a_run_that_was_left_behind_holds_the_lock(tmp_path, waiting_run):
    args = study._parser().parse_args(['run', '--output', 'x', *SMALL, '--affect-epochs', '1', '--arms', 'plain'])
    args.flags = []
    first = study.plan(args)[0][0]
    has_begun = waiting_run(first.key)
    (tmp_path / 's/runs').mkdir(parents=True)
    with lock_study(tmp_path / 's') as lock:
        process = Study(tmp_path / 's', FAKE)._start(first, 0, lock)
        has_begun()
    with pytest.raises(StudyError, match='a run that it left behind is not finished'), lock_study(tmp_path / 's'):
        pass
    process.terminate()
    process.wait()
    with lock_study(tmp_path / 's'):
        pass


def test_a_folder_without_settings_is_begun_anew(run, tmp_path):
    folder = tmp_path / 's/runs/test_resnet_cifar10_1000_plain_s0'
    folder.mkdir(parents=True)
    (folder / 'args.json.part').touch()
    assert run('--arms', 'plain', '--seeds', 0)[0] == 0
    assert not (folder / 'args.json.part').exists()


def test_a_dry_run_writes_nothing(run, tmp_path):
    status, out, _ = run('--dry-run', '--stimuli', 'emoji', 'ferplus', '--arms', 'plain', 'content', '--seeds', 0, 1)
    assert status == 0
    assert 'content: skipped for ferplus, which has only affective labels.' in out
    assert ('to do: test_resnet_emoji_cifar10_1000_content_s1: train.py --model test_resnet --seed 1 --task emoreg '
            '--dataset cifar10 --train-images 1000 --epochs 3 --experience test_resnet_emoji_affect.content_s1') in out
    assert '6 runs: 2 of stage 1, 4 of stage 2; 0 finished' in out
    assert not (tmp_path / 's').exists()


@pytest.mark.parametrize('given', [True, False])
def test_jobs_get_their_devices_in_turn(run, tmp_path, monkeypatch, given):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    devices = ('--devices', 'cuda:0', 'cuda:1') if given else ()
    assert run('--arms', 'plain', '--seeds', 0, 1, 2, 3, '--jobs', 4, *devices)[0] == 0
    devices = [log.read_text().split('--device ')[1].split()[0] for log in (tmp_path / 's/logs').iterdir()]
    assert sorted(devices) == ['cuda:0', 'cuda:0', 'cuda:1', 'cuda:1']


def test_time_left_is_that_of_like_runs(run, tmp_path, monkeypatch):
    assert run('--arms', 'plain', 'init', '--seeds', 0)[0] == 0
    parts = Study(tmp_path / 's', FAKE, jobs=2)
    rows = {row['key']: row for rows in parts.rows.values() for row in rows}
    rows['test_resnet_cifar10_1000_plain_s0']['seconds'] = '30'
    args = study._parser().parse_args(['run', '--output', 'x', *SMALL, '--affect-epochs', '2', '--seeds', '1',
                                       '--arms', 'plain', 'init', 'random'])
    args.flags = []
    plain, first, init, random = study.plan(args)[0]
    assert parts.seconds_left([plain]) == 15  # 30 s a run, two at a time
    assert parts.seconds_left([first]) == 2 * 2 / 2
    monkeypatch.setattr(grid, 'stimuli_images', lambda name, *_: {'emoji': 1278, 'oasis': 639}[name])
    assert parts.seconds_left([dataclasses.replace(first, stimuli='oasis')]) == 2 * 2 / 2 / 2  # half the images
    assert parts.seconds_left([init]) == 3
    assert parts.seconds_left([random]) == pytest.approx(3 * (10 + 2) / 2 / 2)  # the median of the target's
    assert parts.seconds_left([init], [(plain, 20.0), (init, 100.0)]) == 3 + 5
    parts.starts = [4.0, 4.0, 90.0]  # what a run takes beside its own seconds
    assert parts.seconds_left([init], [(plain, 20.0), (init, 100.0)]) == 3 + 5 + 2 * 4 / 2
    assert Study(tmp_path / 'none', FAKE).seconds_left([plain]) is None


def test_a_place_that_takes_no_folder_is_named(run, tmp_path):
    (tmp_path / 's').write_text('a file')
    status, _, err = run('--arms', 'plain', '--seeds', 0)
    assert (status, err) == (2, f'study: --output {tmp_path / "s"}: cannot be written (File exists). Choose another '
                                'folder.\n')


def test_a_folder_whose_name_is_no_text_is_refused(run, tmp_path, colours):
    folder = tmp_path / os.fsdecode(b'caf\xe9')
    folder.symlink_to(colours)
    status, _, err = run('--targets', folder)
    assert (status, err.count('\n')) == (2, 1)
    assert r"caf\udce9': the path is no text in UTF-8, and the tables of a study are. Rename the folder" in err
    assert not (tmp_path / 's').exists()


@pytest.mark.parametrize(('argv', 'message'), [
    (('--models', 'emoreg_resnet_18'), '--models emoreg_resnet_18: unknown. timm.list_models() names all, emoreg_*'),
    (('--models', 'tset_resnet'), 'Did you mean test_resnet?'),
    (('--devices', 'cpu', 'gpu0'), '--devices gpu0: torch cannot compute there ('),
    (('--stimuli', 'ferpuls'), "stimuli 'ferpuls' is unknown"),
    (('--stimuli', 'emoji+ferpuls'), "stimuli 'ferpuls' is unknown"),
    (('--stimuli', 'emoji+ferplus', '--arms', 'regulated'), 'different kinds (emoji: ratings; ferplus: class). Show '),
    (('--targets', 'cifar'), "target 'cifar' is unknown"),
    (('--arms', 'regulatd'), "Did you mean 'regulated'?"),
    (('--train-images', '1e3'), "--train-images 1e3: expected a number of images, or 'all'."),
    (('--jobs', '0'), '--jobs 0: expected 1 or more'),
    (('--affect-epochs', '0'), '--affect-epochs 0: expected 1 or more'),
    (('--stimuli', __file__), '.py: a csv needs both --rating-columns and --rating-scale, and nothing else has them'),
    (('--rating-columns', 'joy', '--rating-scale', '1', '7'), '--stimuli emoji: a csv needs both --rating-columns and'),
    (('--affect-flags', '--lr 1 --seed 3'), '--seed: is set by the study'),
    (('--target-flags', '--lr 1 --seed 3'), '--seed: is set by the study'),
    (('--train-script', 'nowhere.py'), 'nowhere.py: there is no training script'),
    (('--', '--epochs=3'), "--epochs=3: is set by the study. Use the study's own option for that, before the '--'."),
    (('--', '--rehearsal', '1'), '--rehearsal: is not for every arm, as it needs the dual head. Give it to arms'),
    (('--', '--no-modulation'), '--no-modulation: is not for every arm, as it needs the dual head'),
    (('--models', 'test_resnet.zz'), "--model test_resnet.zz: test_resnet has no tag 'zz'. Known: r160_in1k."),
    (('--seeds', '0', '-1'), '--seeds -1: expected 0 or more'),
    (('--seeds', '3000000000', '0'), '--seeds 3000000000: expected 0 or more, below 2147483648'),
    (('--models', 'emoreg_resnet18.emoji'), 'names a weight, and a study trains its own. Give emoreg_resnet18.'),
])
def test_what_does_not_fit_is_refused(run, tmp_path, argv, message):
    status, _, err = run(*argv)
    assert status == 2
    assert message in err
    assert not (tmp_path / 's').exists()


@pytest.mark.parametrize(('argv', 'own', 'message'), [
    ((), ('--lrr', '1'), 'study: test_resnet_cifar10_1000_plain_s0: train.py refuses its flags: unrecognized '
                         'arguments: --lrr 1\n'),
    (('--arms', 'plain:opt=sdg'), (), 'plain.opt=sdg_s0: train.py refuses its flags: --opt sdg'),
    (('--arms', 'regulated:balance=2'), (), 'balance=2_s0: train.py refuses its flags: --balance 2.0 is outside [0'),
    (('--target-flags=--cutout 40',), (), 'train.py refuses its flags: --cutout 40: would leave nothing'),
    (('--target-flags=--mixup 0.2 -b 5',), (), 'train.py refuses its flags: --mixup and --cutmix mix the images of a '),
    ((), ('-b', '2000'), 'train.py refuses its flags: --batch-size 2000: --train-images 1000 is all that there is'),
])
def test_flags_that_train_py_refuses_are_refused_before_the_first_run(run, tmp_path, argv, own, message):
    status, _, err = run('--arms', 'plain', '--seeds', 0, *argv, own=own, script=TRAIN)
    assert status == 2
    assert message in err
    assert not (tmp_path / 's').exists()


def test_what_was_begun_is_not_asked_again(run, tmp_path):
    """A train.py that has become stricter must not lock a study out."""
    assert run('--arms', 'plain', '--seeds', 0, own=('--lrr', '1'))[0] == 0
    status, out, err = run('--arms', 'plain', '--seeds', 0, '--dry-run', own=('--lrr', '1'), script=TRAIN)
    assert (status, err, '1 finished' in out) == (0, '', True)
    assert run('--arms', 'plain', '--seeds', 0, 1, '--dry-run', own=('--lrr', '1'), script=TRAIN)[0] == 2


def test_what_is_for_stage_2_alone_is_told_where_to_go(run):
    _, _, err = run('--arms', 'regulated', '--seeds', 0, own=('--momentum', '0.8'), script=TRAIN)
    assert 'affect_s0: train.py refuses its flags: --momentum 0.8: has no effect with --opt adamw, the default' in err
    assert err.endswith(' What is for stage 2 alone goes into --target-flags.\n')


def test_a_script_without_a_parser_is_refused(run, tmp_path):
    (tmp_path / 'other').write_text('import sys')
    status, _, err = run('--arms', 'plain', '--seeds', 0, script=tmp_path / 'other')
    assert (status, err) == (2, f'study: --train-script {tmp_path}/other: has no parse_args to check the flags by. '
                                'Give train.py, or a script that has the same.\n')


def test_more_images_than_there_are_is_refused_before_the_first_run(run, colours, tmp_path):
    status, _, err = run('--targets', colours, '--train-images', '40', '4000', '--seeds', 0)
    assert (status, err) == (2, f'study: {colours.name}: 4,000 training images were asked for. Give a number from 3, '
                                'one per class, to 48, all there are.\n')
    assert not (tmp_path / 's').exists()


def test_flags_of_train_py_go_after_two_dashes(run, capsys):
    with pytest.raises(SystemExit):
        run('--img-size', 32)
    assert 'unrecognized arguments: --img-size 32. Flags of train.py go after --: -- --img-size 32' in (
        capsys.readouterr().err)


def test_a_set_that_is_not_there_ends_no_run_of_another(run, tmp_path, monkeypatch):
    monkeypatch.setenv('EMOREG_DATA', str(tmp_path))
    status, out, err = run('--stimuli', 'emoji', 'oasis', '--arms', 'plain', 'regulated', '--seeds', 0)
    assert (status, err) == (0, '')
    assert '[5/5]' in out
    assert ' left' not in out.split('[2/5]')[0]  # nobody knows how large OASIS is


def test_stage_1_of_a_study_is_judged_at_its_end(run, tmp_path):
    assert run('--arms', 'regulated', 'shuffled', '--seeds', 0, '--affect-epochs', 7)[0] == 0
    flags = [row['flags'] for row in read_rows(tmp_path / 's/stage1.csv')]
    assert len(flags) == 2
    assert all('--epochs 7 --val-interval 7' in line for line in flags)


def test_a_table_without_runs_overwrites_nothing(run, tmp_path, capsys):
    assert run('--arms', 'plain', '--seeds', 0)[0] == 0
    shutil.rmtree(tmp_path / 's/runs')
    (tmp_path / 's/table.md').write_text('with predictions')
    assert main(['table', '--output', str(tmp_path / 's')]) == 0
    out = capsys.readouterr().out
    assert '| plain | 1 |' in out
    assert 'Nothing is written: the runs are not there' in out
    assert (tmp_path / 's/table.md').read_text() == 'with predictions'


def test_a_run_with_other_flags_is_no_run_of_this_study(run, tmp_path):
    assert run('--arms', 'plain', '--seeds', 0)[0] == 0
    status, _, err = run('--arms', 'plain', '--seeds', 0, own=('--lr', '0.2'))
    assert (status, err) == (2, 'study: test_resnet_cifar10_1000_plain_s0 was begun with other flags: "nothing" then, '
                             '"--lr 0.2" now. Give the same ones, or another --output.\n')


@pytest.mark.parametrize(('before', 'now', 'shown'), [
    ('--a 1 --b 2 --c', '--a 1 --b 3 --c', ('--b 2', '--b 3')),
    ('--a 1 --b 2', '--a 1', ('--b 2', '')),
    ('--a 1', '--a 1 2', ('--a 1', '--a 1 2')),
    ('--a 1 --b 1', '--a 2 --b 2', ('--a 1 --b 1', '--a 2 --b 2')),
    ('--a', '--a --a', ('', '--a')),
])
def test_what_differs_is_shown_with_its_flag(before, now, shown):
    assert runner._differing(before.split(), now.split()) == shown


@pytest.fixture
def pictures(tmp_path) -> Path:
    for name in ('sea', 'sky'):
        (tmp_path / 'pictures' / name).mkdir(parents=True)
        for i in range(12):
            Image.new('RGB', (8, 8)).save(tmp_path / 'pictures' / name / f'{i}.png')
    return tmp_path / 'pictures'


def test_a_set_of_ones_own_may_be_named_in_other_words_but_must_not_change(run, tmp_path, pictures, colours,
                                                                               monkeypatch):
    own = ('--train-images', 'all', '--seeds', 0, '--arms', 'plain')
    both = ('--stimuli', pictures, '--targets', pictures, *own)
    assert run(*both)[0] == 0
    monkeypatch.chdir(tmp_path)
    both = ('--stimuli', 'pictures/', '--targets', './pictures', *own, 'random')
    assert '1 runs to do, 1 finished before' in run(*both)[1]
    assert {row['target'] for row in read_rows(tmp_path / 's/results.csv')} == {str(pictures)}
    assert run('--targets', colours, *own)[0] == 0  # a call about another set does not forget this one
    shutil.copyfile(pictures / 'sky/1.png', pictures / 'sky/new.png')
    status, _, err = run(*both, '--arms', 'init')
    assert (status, err) == (2, f'study: {pictures}: holds other images, labels or parts than when this study began. '
                             'Restore it as it was, or give another --output.\n')
    (pictures / 'sky/new.png').unlink()
    assert run(*both, '--arms', 'init')[0] == 0


def test_a_set_that_no_run_could_use_may_be_mended(run, tmp_path, pictures, monkeypatch):
    """One broken picture of the target must not cost the stage 1 that had ended before."""
    command = ('--targets', pictures, '--train-images', 'all', '--seeds', 0, '--arms', 'init')
    key = 'test_resnet_emoji_pictures_all_init_s0'
    monkeypatch.setenv('FAKE_FAIL', key)
    assert run(*command)[0] == 1
    shutil.rmtree(tmp_path / 's/runs' / key)  # as train.py leaves it where nothing was trained
    monkeypatch.delenv('FAKE_FAIL')
    (pictures / 'sky/1.png').unlink()
    status, out, err = run(*command)
    assert (status, '1 runs to do, 1 finished before' in out) == (0, True), err
    (pictures / 'sky/2.png').unlink()
    assert 'holds other images, labels or parts than' in run(*command, '--seeds', 1)[2]


def test_stimuli_of_ones_own_must_not_change(run, tmp_path, pictures):
    both = ('--stimuli', pictures, '--seeds', 0, '--arms')
    assert run(*both, 'regulated')[0] == 0
    shutil.copyfile(pictures / 'sky/1.png', pictures / 'sky/new.png')
    status, _, err = run(*both, 'regulated', 'init')
    assert (status, err.startswith(f'study: {pictures}: holds other images, labels or parts than ')) == (2, True), err


def test_runs_that_would_be_compared_have_one_recipe(run, tmp_path):
    arms = ('--arms', 'plain', 'plain:lr=0.05', 'plain+', 'regulated', '--seeds', 0)
    assert run(*arms)[0] == 0
    for change, message in ((('--epochs', 9), 'plain_s1 has the --epochs "9", and test_resnet_cifar10_1000_plain_s0, '
                                              'which it would be compared with, "3". Give the same ones, or another'),
                            (('--target-flags', '--lr 0.5'), 'plain_s1 has the flags "--lr 0.5", and '),
                            (('--affect-epochs', 9), 'plain+_s1 has the --epochs "15", and '),
                            (('--arms', 'regulated', '--affect-epochs', 9),
                             'affect_s1 has the flags "--val-interval 9", and ')):
        status, _, err = run(*arms[:-1], 1, *change)
        assert (status, message in err) == (2, True), err
    assert run(*arms[:-1], 1)[0] == 0
    assert run('--train-images', 2000, '--epochs', 9, '--affect-epochs', 3, *arms)[0] == 0  # of another setting


def test_a_csv_as_stimuli(run, tmp_path):
    lines = [f'{i}.png,{i % 5},{i}' for i in range(50)]
    (tmp_path / 'own.csv').write_text('\n'.join(['image,joy,age', *lines]))
    for i in range(50):
        Image.new('RGB', (8, 8)).save(tmp_path / f'{i}.png')
    csv = ('--stimuli', tmp_path / 'own.csv', '--rating-scale', 0, 50, '--rating-columns')
    assert run(*csv, 'joy', '--arms', 'regulated', 'plain+', '--affect-epochs', 25, '--seeds', 0)[0] == 0
    assert {row['epochs'] for row in read_rows(tmp_path / 's/results.csv')} == {'3', str(3 + 1)}  # 25 x 40 of 1,000
    for i in range(50):
        (tmp_path / 'things' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / f'things/{"ab"[i % 2]}/{i}.png').symlink_to(tmp_path / f'{i}.png')
    status, _, err = run(*csv, 'joy', '--targets', tmp_path / 'things', '--train-images', 'all', '--arms', 'regulated')
    assert (status, 'own, things: stage 1 would see' in err) == (2, True), err
    status, _, err = run(*csv, 'age', '--arms', 'regulated', '--affect-epochs', 25, '--seeds', 1)
    assert status == 2
    assert 'affect_s1 has the ratings "--rating-columns age --rating-scale 0 50", and ' in err


def test_flags_of_a_run_that_never_began_can_be_corrected(run, tmp_path):
    refuses = tmp_path / 'refuses.py'
    refuses.write_text("import sys\ndef parse_args(argv): pass\nif __name__ == '__main__': sys.exit('no such flag')")
    assert run('--arms', 'plain', '--seeds', 0, own=('--lrr', '0.1'), script=refuses)[0] == 1
    assert run('--arms', 'plain', '--seeds', 0, own=('--lr', '0.1'))[0] == 0


def test_a_damaged_result_is_named(run, tmp_path):
    assert run('--arms', 'plain', '--seeds', 0)[0] == 0
    (tmp_path / 's/results.csv').unlink()
    result = tmp_path / 's/runs/test_resnet_cifar10_1000_plain_s0/plain/result.json'
    result.write_text('')
    status, _, err = run('--arms', 'plain', '--seeds', 0)
    assert (status, f'{result}: is damaged (' in err) == (2, True), err


def test_a_stage_1_without_its_checkpoint_is_named(run, tmp_path):
    assert run('--arms', 'regulated', '--seeds', 0)[0] == 0
    shutil.rmtree(tmp_path / 's/runs')
    status, _, err = run('--arms', 'regulated', 'init', '--seeds', 0)
    assert status == 2
    assert 'init_s0 needs the stage 1 test_resnet_emoji_affect_s0, which is finished, but ' in err
    assert 'model_best.pth.tar is gone. Bring it back, or remove its row from stage1.csv and ' in err


def test_no_run_is_left_behind_by_an_error(run, tmp_path, monkeypatch, waiting_run):
    has_begun = waiting_run('test_resnet_emoji_cifar10_1000_random_s0')

    def full(*_):
        has_begun()
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(runner, 'write_rows', full)
    status, _, err = run('--arms', 'random', 'plain', '--seeds', 0, '--jobs', 2)
    assert (status, 'No space left on device' in err) == (2, True)
    with lock_study(tmp_path / 's'):  # nobody else has it
        pass


def test_the_real_training_script(run, colours, tmp_path, capsys):
    own = ('--img-size', '32', '-b', '16', '--no-amp')
    status, out, err = run('--stimuli', colours, '--targets', colours, '--train-images', '40', '--epochs', '1',
                           '--arms', 'plain', 'regulated', '--seeds', 0, '--jobs', 2, '--threads', 1,
                           script=TRAIN, own=own)
    assert (status, err) == (0, ''), out
    assert {row['arm']: row['images'] for row in read_rows(tmp_path / 's/results.csv')} == dict.fromkeys(
        ('plain', 'regulated'), '40')
    assert main(['table', '--output', str(tmp_path / 's')]) == 0
    text = capsys.readouterr().out
    assert f'## test_resnet: {colours.name} → {colours.name}, 40 training images' in text
    assert '| regulated minus | n |' in text
    assert {'table.md', 'table.csv', 'forest.png', 'curves.png'} <= set(os.listdir(tmp_path / 's'))
