"""train.py where it is killed, finds no room for its files, or runs for long."""
from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from training_process import Training, colours

RECIPE = ('--model', 'test_resnet', '--img-size', 32, '-b', 8, '--no-amp', '--device', 'cpu')
# where the state of a run is made, saved and read back
WATCHED = ('/train.py', '/checkpoint_saver.py', '/summary.py', '/torch/serialization.py',
           '/timm_emoreg/training/checkpoint.py', '/timm_emoreg/data/resident.py',
           '/timm_emoreg/training/run_folder.py', '/timm_emoreg/files.py')


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return colours(tmp_path_factory.mktemp('colours'), 36, 13, 11)


def results(run: Path) -> list:
    """What must not depend on interruptions."""
    return [(path.parent.name, json.loads(path.read_text())['test'], (path.parent / 'summary.csv').read_text())
            for path in sorted(run.glob('*/result.json'))]


def kill_at(call: int, module, files: tuple[str, ...] = WATCHED) -> None:
    """Kill the process before that call of a function from one of the watched files; print the number of calls."""
    calls = 0

    def profile(frame, event, arg):
        nonlocal calls
        if event in ('call', 'c_call') and frame.f_code.co_filename.endswith(files):
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

    run = module.run

    def watched(args):
        sys.setprofile(profile)
        run(args)
        sys.setprofile(None)
        print('calls', calls, flush=True)
    module.run = watched


@pytest.mark.parametrize(('kills', 'flags'), [
    pytest.param(3, ('--task', 'plain', '--epochs', 2), marks=pytest.mark.timeout(600)),
    pytest.param(20, ('--stimuli', 'same', '--epochs', 3, '--balance', 'learned'),
                 marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
])
def test_killed_at_random_moments_a_run_resumes_to_the_numbers_of_the_unbroken_one(tmp_path, folder, kills, flags):
    argv = (*RECIPE, *(folder if flag == 'same' else flag for flag in flags), '--dataset', folder, '--mixup', 0.5,
            '--model-ema', '--output', tmp_path)
    status, text = Training(*argv, '--experiment', 'unbroken', prepare=partial(kill_at, -1)).end()
    assert status == 0, text
    assert len(results(tmp_path / 'unbroken')) == 1 + ('--stimuli' in flags)
    total = int(re.search(r'^calls (\d+)$', text, re.MULTILINE)[1])
    rng = random.Random(0)
    name = resumed = 0
    while kills:
        run = tmp_path / str(name)
        resumable = (run / 'args.json').exists()
        resumed += resumable
        assert resumable or not run.exists()  # a folder is there with its settings or not at all
        call = rng.randrange(1, total)
        status, text = Training(*(('--resume', run) if resumable else (*argv, '--experiment', name)),
                                prepare=partial(kill_at, call)).end()
        assert status in (0, -signal.SIGKILL), f'{text}\nto be killed at call {call} of {total}'
        if status == 0:
            assert results(run) == results(tmp_path / 'unbroken'), f'{text}\nnot killed at call {call}'
            name += 1
        kills -= status != 0
    if status != 0:
        status, text = Training(*(('--resume', run) if run.exists() else (*argv, '--experiment', name))).end()
        assert status == 0, text
        assert results(run) == results(tmp_path / 'unbroken')
    assert resumed


@pytest.mark.parametrize('call', [2, 12, 22])
def test_a_kill_while_the_folder_is_made_leaves_it_whole_or_not_there(tmp_path, folder, call):
    argv = (*RECIPE, '--task', 'plain', '--dataset', folder, '--output', tmp_path, '--experiment', 'run')
    own = ('/timm_emoreg/training/run_folder.py', '/timm_emoreg/files.py')
    status, text = Training(*argv, prepare=partial(kill_at, call, files=own)).end()
    assert status == -signal.SIGKILL, text
    assert (tmp_path / 'run/args.json').exists() or not (tmp_path / 'run').exists()


def fill_the_disk(module) -> None:
    """No file may grow beyond some bytes, once the second epoch is over."""
    update = module.update_summary

    def full(epoch, *args, **kwargs):
        if epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        update(epoch, *args, **kwargs)
    module.update_summary = full


def test_a_full_disk_is_named_and_leaves_the_last_good_checkpoint(tmp_path, folder):
    argv = (*RECIPE, '--task', 'plain', '--dataset', folder, '--epochs', 3, '--output', tmp_path)
    assert Training(*argv, '--experiment', 'unbroken').end()[0] == 0
    status, text = Training(*argv, '--experiment', 'full', prepare=fill_the_disk).end()
    run = tmp_path / 'full/plain'
    assert status == 2
    assert 'Traceback' not in text
    message = text.splitlines()[-1]
    assert message.startswith(f'train.py: {run}: cannot be written (')
    assert f'The last good checkpoint is {run / "last.pth.tar"}: go on with: python train.py --resume' in message
    status, text = Training('--resume', tmp_path / 'full').end()
    assert status == 0, text
    assert 'going on with epoch 2, step 1' in text
    assert (run / 'summary.csv').read_text() == (tmp_path / 'unbroken/plain/summary.csv').read_text()


@pytest.mark.parametrize('kind', [
    'file',
    pytest.param('read-only', marks=pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')),
])
def test_an_output_folder_that_takes_no_file_is_named(tmp_path, folder, kind):
    output = tmp_path / 'output'
    if kind == 'file':
        output.write_text('')
    else:
        output.mkdir(mode=0o500)
    status, text = Training(*RECIPE, '--task', 'plain', '--dataset', folder, '--output', output, '--experiment',
                            'run').end()
    assert status == 2
    assert text.startswith(f'train.py: {output / "run"}: cannot be written (')
    assert text.endswith('Make room or make it writable, or choose another --output.\n')
    assert len(text.splitlines()) == 1


def report_memory(module) -> None:
    update = module.update_summary

    def reporting(epoch, *args, **kwargs):
        update(epoch, *args, **kwargs)
        if epoch + 1 in (100, 1000):
            pages = int(Path('/proc/self/statm').read_text().split()[1])
            print('resident', pages * resource.getpagesize(), flush=True)
    module.update_summary = reporting


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs Linux')
def test_a_thousand_epochs_do_not_grow_in_memory(tmp_path, folder):
    status, text = Training(*RECIPE, '--task', 'affect', '--stimuli', folder, '--epochs', 1000, '--output', tmp_path,
                            '--experiment', 'run', prepare=report_memory).end()
    assert status == 0, text
    early, late = map(int, re.findall(r'^resident (\d+)$', text, re.MULTILINE))
    assert late - early < 10e6  # a batch of 8 images that stays behind each epoch takes 88e6
