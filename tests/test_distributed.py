"""train.py in two processes over gloo, started as torchrun and SLURM start them."""
from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from train_module import SCRIPT
from training_process import Training, colours

from timm_emoreg.training import processes

# without batch norm, whose statistics are those of one process's images; SGD, because Adam magnifies rounding
RECIPE = ('--model', 'test_vit', '--img-size', 32, '-b', 8, '--epochs', 2, '--no-amp', '--no-aug', '--opt', 'sgd',
          '--device', 'cpu')


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return colours(tmp_path_factory.mktemp('colours'), 50, 13, 11)  # not divisible by a batch or by two processes


def environments(count=2, names=('RANK', 'WORLD_SIZE', 'LOCAL_RANK')) -> list[dict[str, object]]:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    rank, world, local = names
    return [{rank: i, world: count, local: i, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port} for i in range(count)]


def start(*argv, prepare=(None, None), **kwargs) -> list[Training]:
    return [Training(*argv, prepare=p, **e) for p, e in zip(prepare, environments(**kwargs), strict=True)]


def rows(run: Path) -> list[dict[str, float]]:
    with open(run / 'summary.csv', newline='') as file:
        return [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def report_writing(root, module):
    """Print whatever the process writes below `root`."""
    def hook(event, args):
        writes = event in ('os.mkdir', 'os.rename', 'os.remove', 'os.link')
        if event == 'open' and isinstance(args[2], int):
            writes = args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes and str(args[0]).startswith(str(root)):
            print('writes', event, args[0], flush=True)
    sys.addaudithook(hook)
    save = torch.save
    def reporting(state, path):
        print('writes', path, flush=True)
        save(state, path)
    torch.save = reporting


def signal_at_step(number, module):
    """Send SIGTERM to the process itself before one of its steps."""
    seed, calls = module.random_seed, []
    def counting(*args):  # called before each step, and once to build the model
        calls.append(args)
        if len(calls) == number + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        seed(*args)
    module.random_seed = counting


def killed_before_the_first_step(module):
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    module.train_epoch = kill


def report_statistics(module):
    """Print the running statistics of what the process evaluates."""
    evaluate = module.evaluate
    def reporting(task, *args):
        models = [module.unwrap_model(task.get_eval_model(ema=ema)) for ema in (False, True)]
        print('statistics', [[b.sum().item() for name, b in model.named_buffers() if 'running' in name]
                             for model in models], flush=True)
        return evaluate(task, *args)
    module.evaluate = reporting


def start_a_second_later(module):
    class Later(datetime):
        @classmethod
        def now(cls):
            return datetime.now() + timedelta(seconds=1)
    module.datetime = Later


@pytest.fixture(scope='module')
def two(tmp_path_factory, folder) -> Path:
    """Result of an unbroken run in two processes."""
    root = tmp_path_factory.mktemp('two')
    runs = start(*RECIPE, '--task', 'plain', '--dataset', folder, '--output', root, '--experiment', 'run',
                 prepare=(partial(report_writing, root), partial(report_writing, root)))
    (status, first), (other_status, second) = [run.end() for run in runs]
    assert (status, other_status) == (0, 0), first + second
    assert 'writes' in first
    assert second == ''  # one writer of files, one on the screen
    return root / 'run/plain'


def test_two_processes_train_and_judge_as_one_with_the_whole_batch(two, tmp_path, folder):
    status, text = Training(*RECIPE, '--task', 'plain', '--dataset', folder, '--output', tmp_path, '--experiment',
                            'run').end()
    assert status == 0, text
    one = tmp_path / 'run/plain'
    assert len(rows(one)) == len(rows(two)) == 2
    for expected, found in zip(rows(one), rows(two), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
        assert found['eval_top1'] == expected['eval_top1']
    expected, found = (json.loads((run / 'result.json').read_text())['test'] for run in (one, two))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_signal_to_one_process_stops_both_at_the_same_update(two, tmp_path, folder):
    runs = start(*RECIPE, '--task', 'plain', '--dataset', folder, '--output', tmp_path, '--experiment', 'run',
                 prepare=(None, partial(signal_at_step, 9)))
    (status, first), (other_status, second) = [run.end() for run in runs]
    assert (status, other_status) == (128 + signal.SIGTERM, 128 + signal.SIGTERM), first + second
    assert f'stopped. Go on with: torchrun --nproc-per-node 2 train.py --resume {tmp_path / "run"}' in first
    assert second == ''
    assert [p.name for p in (tmp_path / 'run/plain').glob('recovery*')] == ['recovery-1-4.pth.tar']  # one update later
    for run in start('--resume', tmp_path / 'run', '--device', 'cpu'):
        status, text = run.end()
        assert status == 0, text
    assert rows(tmp_path / 'run/plain') == rows(two)


def test_a_run_does_not_go_on_with_another_number_of_images_an_update(tmp_path, folder):
    argv = (*RECIPE, '-b', 9, '--task', 'plain', '--dataset', folder, '--output', tmp_path, '--experiment', 'run')
    assert Training(*argv, prepare=partial(signal_at_step, 3)).end()[0] == 128 + signal.SIGTERM
    for run in start('--resume', tmp_path / 'run', '--device', 'cpu'):
        status, text = run.end()
        assert status == 2, text
        assert text.endswith('recovery-0-3.pth.tar: was trained with 9 images an update, of which 2 processes would '
                             'make 8. Use as many processes as before.\n')


def test_both_processes_judge_the_same_statistics_of_batch_norm(tmp_path, folder):
    """Those of the model and of the averaged one."""
    argv = (*RECIPE, '--model', 'test_resnet', '--task', 'plain', '--dataset', folder, '--epochs', 1, '--model-ema',
            '--output', tmp_path, '--experiment', 'run')
    found = []
    for run in start(*argv, prepare=(report_statistics, report_statistics)):
        status, text = run.end()
        assert status == 0, text
        found.append(next(line for line in text.splitlines() if line.startswith('statistics')))  # after the epoch
    assert len(found[0]) > 100
    assert found[0] == found[1]
    # and the same again after a stop within the epoch
    argv = (*argv, '--experiment', 'stopped')
    for run in start(*argv, prepare=(partial(signal_at_step, 3), None)):
        assert run.end()[0] == 128 + signal.SIGTERM
    for run in start('--resume', tmp_path / 'stopped', '--device', 'cpu',
                     prepare=(report_statistics, report_statistics)):
        status, text = run.end()
        assert status == 0, text
        assert next(line for line in text.splitlines() if line.startswith('statistics')) == found[0]


@pytest.mark.slow
def test_torchrun_starts_it(two, tmp_path, folder):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, SCRIPT, *RECIPE,
               '--task', 'plain', '--dataset', folder, '--output', tmp_path, '--experiment', 'run']
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / 'run/plain') == rows(two)


@pytest.mark.parametrize(('killed', 'early'), [(0, False), (1, False), (1, True)])
def test_a_killed_process_ends_the_other_with_a_message(tmp_path, folder, killed, early):
    argv = (*RECIPE, '--task', 'plain', '--dataset', folder, '--output', tmp_path, '--experiment', 'run')
    runs = start(*argv, '--epochs', 100_000, prepare=(None, killed_before_the_first_step if early else None))
    if not early:
        runs[0].until('epoch 2/')
        runs[killed].process.kill()
    left = runs[1 - killed].process
    left.join(60)
    assert left.exitcode == 1
    last = runs[1 - killed].end()[1].splitlines()[-1]
    assert last.startswith(f'train.py: process {1 - killed} of 2 lost another one (')
    device = ' --device cpu' if torch.cuda.is_available() else ''  # which would not be taken by itself
    then = f' Go on with: torchrun --nproc-per-node 2 train.py --resume {tmp_path / "run"}{device}'
    then = '' if early else then
    assert last.endswith(f'whose own message says why.{then}')
    assert (tmp_path / 'run').exists() == (not early)  # nothing was trained
    assert 'Traceback' not in runs[1 - killed].text


def test_ratings_are_judged_within_each_process_under_slurm(tmp_path, folder):
    table = folder / 'ratings.csv'
    images = [p.relative_to(folder) for p in sorted(folder.glob('*/*/*.png'))]
    lines = [f'{p},{1 + i % 9},{p.parts[0]}' for i, p in enumerate(images)]
    table.write_text('\n'.join(['image,valence,split', *lines]))
    # next to no learning rate: each step is one look at the same net
    argv = (*RECIPE, '--task', 'affect', '--stimuli', table, '--rating-columns', 'valence', '--rating-scale', 1, 9,
            '--lr', 1e-12, '--output', tmp_path)
    loss = {}
    for batch in (4, 8):
        status, text = Training(*argv, '-b', batch, '--experiment', batch).end()
        assert status == 0, text
        loss[batch] = rows(tmp_path / str(batch) / 'affect')[0]
    before = set(tmp_path.iterdir())
    runs = start(*argv, prepare=(None, start_a_second_later), names=('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'))
    for run in runs:
        status, text = run.end()
        assert status == 0, text
    run, = set(tmp_path.iterdir()) - before  # the name holds the second of the start, of the first process
    found = rows(run / 'affect')[0]
    assert found['train_loss'] == pytest.approx(loss[4]['train_loss'], rel=1e-5)
    assert found['train_loss'] != pytest.approx(loss[8]['train_loss'], rel=1e-3)
    assert found['eval_ccc'] == pytest.approx(loss[8]['eval_ccc'], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(('flags', 'message'), [
    ((), 'the processes cannot find each other ('),
    (('--sync-bn',), '--sync-bn needs GPUs, torch has no such layer for the CPU.'),
])
def test_an_environment_that_does_not_work_is_named_and_leaves_nothing(tmp_path, folder, flags, message):
    status, text = Training(*RECIPE, *flags, '--task', 'plain', '--dataset', folder, '--output', tmp_path / 'out',
                            SLURM_NTASKS=2, SLURM_PROCID=0, SLURM_LOCALID=0).end()
    assert status == 2
    assert text.startswith(f'train.py: {message}')
    assert len(text.splitlines()) == 1
    assert not (tmp_path / 'out').exists()


def test_the_answer_is_that_of_the_question_before(monkeypatch):
    def all_reduce(number, op):
        number.fill_(max(int(number), others.pop(0)))

    monkeypatch.setattr(torch.distributed, 'all_reduce', all_reduce)
    monkeypatch.setattr(processes, '_asked', [])
    args, received = Namespace(distributed=True, device='cpu'), []
    others = [0, 15, 0, 15]  # another process got its signal after the first question
    assert [processes.asked_to_stop(args, received) for _ in range(3)] == [False, False, True]
    assert received == [15]  # this one says so from now on, too
    assert (processes.asked_to_stop(args, received), received) == (False, [15])


def test_a_number_on_a_gpu_is_read_when_its_own_copy_is_there(monkeypatch):
    done = []

    class Event:
        record = staticmethod(lambda: done.append('recorded'))
        synchronize = staticmethod(lambda: done.append('waited'))

    class Here:
        def copy_(self, number, non_blocking):
            done.append(('copied', number, non_blocking))

        def __int__(self):
            done.append('read')
            return 15

    monkeypatch.setattr(torch, 'empty_like', lambda number, device, pin_memory: Here())
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    number = SimpleNamespace(device=torch.device('cuda'))
    get = processes._fetch(number)
    assert done == [('copied', number, True), 'recorded']
    assert get() == 15
    assert done[2:] == ['waited', 'read']


@pytest.mark.parametrize(('gpus', 'local_rank'), [(1, '0'), (4, '1')])
def test_a_gpu_of_its_own_for_each_slurm_task(monkeypatch, gpus, local_rank):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr(os, 'environ', {'SLURM_PROCID': '1', 'SLURM_LOCALID': '1'})
    seen = []

    def join(args):
        seen.append(os.environ.get('LOCAL_RANK', os.environ['SLURM_LOCALID']))
        args.distributed, args.rank = False, 0
        return torch.device('cpu')
    monkeypatch.setattr(processes, 'init_distributed_device', join)
    processes.join_processes(Namespace(sync_bn=False, device='cuda', experiment='run'))
    assert seen == [local_rank]
