from __future__ import annotations

import argparse
import os
import pickle
import random
import shutil

import pytest
import torch
from timm.utils import CheckpointSaver

from timm_emoreg.training.checkpoint import CheckpointError, load_training_checkpoint, newest_checkpoint, resume_saver


class Forbidden:
    def __reduce__(self):
        return os.getcwd, ()


def save(path, epoch=0, **more):
    torch.save({'state_dict': {'w': torch.arange(2000.0)}, 'epoch': epoch, **more}, path)
    return path


@pytest.mark.parametrize('mmap', [False, True])
def test_a_checkpoint_of_timms_saver_is_read(tmp_path, mmap):
    model = torch.nn.Linear(2, 2)
    args = argparse.Namespace(model='m', sums={'loss': 0.5}, output='x', resume=None)
    saver = CheckpointSaver(model, torch.optim.AdamW(model.parameters()), args=args, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(3, metric=0.5)
    checkpoint = load_training_checkpoint(tmp_path / 'last.pth.tar', mmap=mmap)
    assert (checkpoint['epoch'], checkpoint['metric'], checkpoint['args']) == (3, 0.5, args)
    assert torch.equal(checkpoint['state_dict']['weight'], model.weight)
    assert newest_checkpoint(tmp_path).name == 'last.pth.tar'


def test_unusable_files_are_one_clear_error(tmp_path):
    path = tmp_path / 'x.pth.tar'
    whole = save(tmp_path / 'whole').read_bytes()

    def refused(match):
        with pytest.raises(CheckpointError, match=match) as caught:
            load_training_checkpoint(path)
        message = str(caught.value)
        assert message.startswith(f'{path}: ')
        assert '\n' not in message
        assert caught.value.__suppress_context__ or caught.value.__context__ is None  # one error, not a chain
        return message

    refused(r'there is no such checkpoint\. Give the folder of a run of train\.py, or a model_best\.pth\.tar in it\.$')
    path.mkdir()
    refused('not a readable checkpoint .* train again')
    path.rmdir()
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(r'not a readable checkpoint \(.*\)\. Use another one of the same folder, or train again\.')
    for text in ('hello world', '{"state_dict": 1}', '\x80', 'a' * 10_000):
        path.write_text(text)
        refused('not a readable checkpoint')
    for content in ([1], {'model': {}}, {'state_dict': None}, {'state_dict': [1]}, torch.ones(2)):
        torch.save(content, path)
        refused("holds no 'state_dict', so it is no training checkpoint")
    for content in (Forbidden(), {'state_dict': {}, 'x': Forbidden()}):
        torch.save(content, path)
        message = refused(r'it holds a \S+getcwd, and only tensors and plain values are read')
        assert 'weights_only' not in message  # torch's advice to switch the protection off
    path.write_bytes(pickle.dumps(Forbidden(), protocol=2))
    refused('not a readable checkpoint')


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_any_bytes_are_refused_alike(tmp_path):
    path, rng = tmp_path / 'x', random.Random(0)
    plain = pickle.dumps({'epoch': 1, 'values': [1, (2, 3), {'a': 'b'}]})
    for _ in range(150):
        changed = bytearray(plain)
        for _ in range(3):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(bytes(changed))
        with pytest.raises(CheckpointError):
            load_training_checkpoint(path)


def test_no_checkpoint_yet(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(str(tmp_path / 'none')) is None
    (tmp_path / 'tmp.pth.tar').write_bytes(b'half')  # killed while the first epoch was saved
    (tmp_path / 'recovery_tmp.pth.tar').write_bytes(b'half')
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(('names', 'expected'), [
    ({'last': 4, 'recovery-5-3': 5}, 'recovery-5-3'),
    ({'last': 5, 'recovery-5-3': 5}, 'last'),
    ({'last': 4, 'recovery-5-9': 5, 'recovery-5-10': 5}, 'recovery-5-10'),
    ({'recovery-9-10': 9, 'recovery-10-2': 10}, 'recovery-10-2'),
    ({'last': 7, 'model_best': 2, 'checkpoint-2': 2}, 'last'),
    ({'last': 7, 'model_best': 7, 'checkpoint-7': 7, 'tmp': 7}, 'last'),  # the same epoch: the one with the known name
    ({'model_best': 2, 'checkpoint-2': 2, 'tmp': 3}, 'tmp'),  # killed between the removal of last and its replacement
    ({'last': 4, 'recovery_tmp': 5}, 'last'),
    ({'recovery-0-1': 0}, 'recovery-0-1'),
])
def test_the_one_that_goes_on_furthest_is_newest(tmp_path, names, expected):
    for reverse in (False, True):  # time stamps say one thing, then the opposite
        for i, (name, epoch) in enumerate(sorted(names.items(), reverse=reverse)):
            path = save(tmp_path / f'{name}.pth.tar', epoch)
            os.utime(path, (1000 + i, 1000 + i))
        assert newest_checkpoint(tmp_path).name == f'{expected}.pth.tar'


def test_damaged_checkpoints_are_passed_over(tmp_path):
    save(tmp_path / 'last.pth.tar', 4)
    (tmp_path / 'recovery-5-3.pth.tar').write_bytes((tmp_path / 'last.pth.tar').read_bytes()[:-100])
    assert newest_checkpoint(tmp_path).name == 'last.pth.tar'
    shutil.copy(tmp_path / 'recovery-5-3.pth.tar', tmp_path / 'last.pth.tar')
    message = (rf'{tmp_path}: none of its checkpoints can be read \(last.pth.tar, recovery-5-3.pth.tar\). Bring back a '
               'copy of one, or remove this folder, and this stage begins anew')
    with pytest.raises(CheckpointError, match=message):  # rather than begin again in silence
        newest_checkpoint(tmp_path)
    (tmp_path / 'last.pth.tar').write_bytes(b'')
    with pytest.raises(CheckpointError, match=r'not a readable checkpoint \(damaged, or of another kind\)'):
        load_training_checkpoint(tmp_path / 'last.pth.tar', mmap=True)


def test_recovery_of_timms_saver_wins_until_the_epoch_ends(tmp_path):
    model = torch.nn.Linear(2, 2)
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=1), max_history=1,
                            checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    for save_next, expected in (
            (lambda: saver.save_recovery(0, 3), 'recovery-0-3'), (lambda: saver.save_checkpoint(0, 0.1), 'last'),
            (lambda: saver.save_recovery(1, 2), 'recovery-1-2'), (lambda: saver.save_recovery(1, 11), 'recovery-1-11'),
            (lambda: saver.save_checkpoint(1, 0.2), 'last')):
        save_next()
        assert newest_checkpoint(tmp_path).name == f'{expected}.pth.tar'


def save_epoch(saver, epoch, metric):
    """With weights that tell the epoch."""
    saver.model.weight.data.fill_(epoch)
    return saver.save_checkpoint(epoch, metric)


def epoch_of(path):
    """The epoch of a checkpoint whose weights are of that epoch, too."""
    checkpoint = load_training_checkpoint(path)
    assert bool((checkpoint['state_dict']['weight'] == checkpoint['epoch']).all())
    return checkpoint['epoch']


def saver_of(folder):
    model = torch.nn.Linear(2, 2)
    return CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=1), max_history=1,
                           checkpoint_dir=str(folder), recovery_dir=str(folder))


class Killed(Exception):
    pass


def killed_at(saver, monkeypatch, moment):
    """The saver is killed when it comes to one of its steps, `last` already removed where that is replaced."""
    plain, duplicated = saver._duplicate, []

    def replace(source, target):
        os.unlink(target)
        raise Killed

    def duplicate(source, target):
        duplicated.append(target)
        if len(duplicated) == {'checkpoint': 1, 'model_best': 2}[moment]:
            raise Killed
        plain(source, target)
    monkeypatch.setattr(saver, *(('_replace', replace) if moment == 'last' else ('_duplicate', duplicate)))


@pytest.mark.parametrize('metric', [2.0, 0.5])
@pytest.mark.parametrize('moment', ['last', 'checkpoint', 'model_best'])
def test_a_kill_between_two_writes_of_the_saver_costs_no_best_epoch(tmp_path, monkeypatch, moment, metric):
    saver = saver_of(tmp_path)
    save_epoch(saver, 0, 1.0)
    killed_at(saver, monkeypatch, moment)
    if moment == 'last' or metric > 1:  # a worse epoch is written as `last` alone
        with pytest.raises(Killed):
            save_epoch(saver, 1, metric)
    else:
        save_epoch(saver, 1, metric)

    again, newest = saver_of(tmp_path), newest_checkpoint(tmp_path)
    assert newest.name == ('tmp.pth.tar' if moment == 'last' else 'last.pth.tar')
    resume_saver(again, load_training_checkpoint(newest))
    best = (1, 2.0) if metric > 1 else (0, 1.0)
    assert (again.best_epoch, again.best_metric) == best
    assert epoch_of(tmp_path / 'model_best.pth.tar') == best[0]
    assert save_epoch(again, 2, 1.5) == ((2.0, 1) if metric > 1 else (1.5, 2))


@pytest.mark.parametrize('left_behind', ['missing', 'stale', 'damaged'])
def test_the_best_checkpoint_is_restored(tmp_path, left_behind):
    saver, best = saver_of(tmp_path), tmp_path / 'model_best.pth.tar'
    save_epoch(saver, 3, 1.0)
    save_epoch(saver, 4, 0.5)
    best.unlink()
    if left_behind == 'stale':
        save(best, 1)
    elif left_behind == 'damaged':
        best.write_bytes(b'PK')
    resume_saver(saver_of(tmp_path), load_training_checkpoint(tmp_path / 'last.pth.tar'))
    assert epoch_of(best) == 3
    assert {p.name for p in tmp_path.iterdir()} == {'checkpoint-3.pth.tar', 'last.pth.tar', 'model_best.pth.tar'}


def test_without_a_judged_epoch_there_is_no_best(tmp_path):
    saver_of(tmp_path).save_recovery(0, 3)
    again = saver_of(tmp_path)
    resume_saver(again, load_training_checkpoint(newest_checkpoint(tmp_path)))
    assert again.best_epoch is None
    assert not (tmp_path / 'model_best.pth.tar').exists()
