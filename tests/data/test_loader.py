from __future__ import annotations

import multiprocessing
import random
import signal
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from timm_emoreg.data import loader as loader_module
from timm_emoreg.data.loader import TimmLoader, fits_in_memory, make_loader
from timm_emoreg.data.resident import ResidentLoader, resident_bytes
from timm_emoreg.data.sets import DataError, ImageError, ImageSet, Target

CONFIG = {'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.25, 0.3)}
SIZE = (12, 16)
CPU = torch.device('cpu')
TARGETS = {
    'class': torch.arange(10),
    'votes': torch.linspace(0, 1, 10)[:, None] * torch.tensor([[1.0, -1.0]]) + torch.tensor([[0.0, 1.0]]),
    'ratings': torch.linspace(-1, 1, 10)[:, None],
}


def image_set(kind='class', size=SIZE, count=10):
    images = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    targets = TARGETS[kind][:count]
    names = tuple(map(str, range(10 if kind == 'class' else targets.shape[1])))
    return ImageSet(images, targets, Target(kind, names))


def make(images=None, batch_size=4, kind='timm', workers=0, **kwargs):
    return make_loader(image_set() if images is None else images, SIZE, batch_size, CONFIG, kind=kind, workers=workers,
                       **kwargs)


def epoch(loader, number=0, first_batch=0):
    loader.set_epoch(number, first_batch)
    batches = list(loader)
    return [x for x, _ in batches], [t for _, t in batches]


def assert_equal(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_resident_where_the_set_fits(monkeypatch):
    asked = []

    def fits(*args):
        asked.append(args)
        return answer

    monkeypatch.setattr(loader_module, 'fits_in_memory', fits)
    answer = True
    assert type(make(kind='auto')) is ResidentLoader
    answer = False
    assert type(make(kind='auto')) is TimmLoader
    make(kind='auto', training=True, world_size=2)
    make(kind='auto', training=True, augment=False)
    assert asked[1:] == [(10, SIZE, 0, CPU, 1), (10, SIZE, 1, CPU, 2), (10, SIZE, 0, CPU, 1)]
    assert type(make(kind='resident')) is ResidentLoader  # asked for, memory or not
    with pytest.raises(ValueError, match="kind='ram' is unknown, expected 'auto', 'resident' or 'timm'"):
        make(kind='ram')


def test_a_quarter_of_the_free_memory_may_be_taken(monkeypatch):
    on_device, on_host = resident_bytes(10, SIZE, 2), resident_bytes(10, SIZE)
    free = 4 * (on_device + on_host)
    monkeypatch.setattr(loader_module, 'free_host_memory', lambda: free)
    assert fits_in_memory(10, SIZE, 2, CPU)
    assert not fits_in_memory(11, SIZE, 2, CPU)
    assert not fits_in_memory(10, SIZE, 2, CPU, world_size=2)  # each process has its own on the same host
    assert fits_in_memory(5, SIZE, 2, CPU, world_size=2)

    cuda = torch.device('cuda', 0)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (4 * on_device, 10 ** 12))
    assert fits_in_memory(10, SIZE, 2, cuda)
    assert not fits_in_memory(11, SIZE, 2, cuda)
    free = 4 * on_host - 1  # too little to build it
    assert not fits_in_memory(10, SIZE, 2, cuda)


# -- both kinds alike --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['class', 'votes', 'ratings'])
@pytest.mark.parametrize('size', [SIZE, (30, 21), (5, 7)])
def test_both_give_the_same_evaluation_batches(kind, size):
    images = image_set(kind, size)
    one, other = epoch(make(images)), epoch(make(images, kind='resident'))
    assert_equal(one[0], other[0])
    assert_equal(one[1], other[1])
    assert [len(x) for x in one[0]] == [4, 4, 2]
    assert torch.equal(torch.cat(one[1]), images.targets)
    assert one[1][0].dtype == (torch.int64 if kind == 'class' else torch.float32)


@pytest.mark.parametrize('flip', ['none', 'random', 'alternate'])
def test_both_give_the_same_training_batches_but_for_the_crops(flip, monkeypatch):
    # crops aside, order, flips, cutout and what does not depend on the number of processes are the same code
    monkeypatch.setattr('timm.data.transforms.RandomResizedCropAndInterpolation.forward', lambda _, image: image,
                        raising=False)
    monkeypatch.setattr('timm.data.transforms.RandomResizedCropAndInterpolation.__call__', lambda _, image: image)
    kwargs = {'training': True, 'flip': flip, 'cutout': 5, 'seed': 2, 'channels_last': True}
    resident = ResidentLoader(image_set(), SIZE, 4, **CONFIG, **kwargs)
    assert_equal(epoch(make(**kwargs), 3)[0], epoch(resident, 3)[0])
    assert_equal(epoch(make(**kwargs), 3)[1], epoch(resident, 3)[1])


def test_without_augmentation_training_only_shuffles():
    images = image_set(size=(30, 21))
    kwargs = {'training': True, 'augment': False, 'flip': 'random', 'cutout': 5}
    plain = torch.cat(epoch(make(images, 10))[0])
    for kind in ('timm', 'resident'):
        (x,), (target,) = epoch(make(images, 10, kind=kind, **kwargs))
        assert torch.equal(x, plain[target])
        assert target.tolist() != list(range(10))


@pytest.mark.parametrize('kind', ['timm', 'resident'])
def test_too_small_a_training_set_is_refused(kind):
    with pytest.raises(DataError, match=r'10 images to train on \(.*\) are fewer than one batch of 11'):
        make(batch_size=11, training=True, kind=kind)
    with pytest.raises(ValueError, match="flip='both' is unknown"):
        make(flip='both', kind=kind)


# -- timm's loader -----------------------------------------------------------------------------------------------------


FULL = {'training': True, 'flip': 'random', 'cutout': 3}


def test_timm_training_epochs():
    loader = make(**FULL)
    inputs, targets = epoch(loader, 1)
    assert len(loader) == len(inputs) == 2  # of ten images in fours
    assert len(set(torch.cat(targets).tolist())) == 8
    assert_equal(epoch(make(**FULL), 1)[0], inputs)
    assert not torch.equal(epoch(loader, 2)[0][0], inputs[0])
    assert not torch.equal(epoch(make(**FULL, seed=1), 1)[0][0], inputs[0])
    plain = torch.cat(epoch(make())[0])
    assert all(not torch.equal(x, plain[i]) for x, i in zip(torch.cat(inputs), torch.cat(targets), strict=True))


def test_timm_crops_at_least_half_the_area():
    gradient = np.zeros((60, 40, 40, 3), np.uint8)
    gradient[..., 0] = np.arange(0, 240, 6)[None, :, None]  # the red channel tells the row, the green one the column
    gradient[..., 1] = np.arange(0, 240, 6)[None, None, :]
    images = ImageSet(gradient, torch.zeros(60, dtype=torch.long), Target('class', ('a',)))
    (x,), _ = epoch(make(images, 60, training=True, flip='none'))
    x = x * torch.tensor(CONFIG['std']).view(3, 1, 1) + torch.tensor(CONFIG['mean']).view(3, 1, 1)
    rows = (x[:, 0, -1, 0] - x[:, 0, 0, 0]) * 255 / 6 * 12 / 11
    columns = (x[:, 1, 0, -1] - x[:, 1, 0, 0]) * 255 / 6 * 16 / 15
    area = rows * columns / 1600
    assert area.min() > 0.4
    assert area.max() > 0.8
    assert area.std() > 0.05


@pytest.mark.parametrize('workers', [0, 2])
def test_timm_resumes_within_an_epoch_with_any_number_of_workers(workers):
    inputs, targets = epoch(make(**FULL, batch_size=2), 4)
    random.seed(7)
    torch.manual_seed(7)
    for first_batch in (0, 3, 5):
        rest = epoch(make(**FULL, batch_size=2, workers=workers), 4, first_batch)
        assert_equal(rest[0], inputs[first_batch:])
        assert_equal(rest[1], targets[first_batch:])


def test_workers_outlive_an_epoch_and_one_that_was_broken_off():
    loader = make(**FULL, batch_size=2, workers=2)
    loader.set_epoch(0)
    next(iter(loader))
    workers = {worker.pid for worker in multiprocessing.active_children()}
    assert len(workers) == 2
    for number in (1, 2):
        for one, other in zip(epoch(loader, number), epoch(make(**FULL, batch_size=2), number), strict=True):
            assert_equal(one, other)
    assert {worker.pid for worker in multiprocessing.active_children()} == workers


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='the system does not tell who sent a signal')
def test_a_signal_to_all_processes_ends_no_worker():
    """As a scheduler sends it: from a process that is not the training."""
    loader = make(workers=2)
    batches = iter(loader)
    next(batches), next(batches)  # the second is of the other worker, which is ready then, too
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        subprocess.run(['kill', '-TERM', str(worker.pid)], check=True)
    assert len(list(batches)) == len(loader) - 2


def test_the_training_itself_ends_its_workers():
    """Where the loader is still held when the interpreter exits, as by a traceback, that exit waits for them."""
    batches = iter(make(workers=2))
    next(batches), next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0


def test_timm_reads_nothing_that_a_resume_skips(monkeypatch):
    read = []
    plain = ImageSet.picture
    monkeypatch.setattr(ImageSet, 'picture', lambda self, i: read.append(i) or plain(self, i))
    _, targets = epoch(make(**FULL, batch_size=2), 0, 3)
    assert read == torch.cat(targets).tolist()
    assert len(read) == 4


def test_timm_leaves_the_random_state_and_the_set_alone():
    images = image_set()
    states = random.getstate(), torch.get_rng_state()
    epoch(make(images, **FULL))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert images.transform is None  # so one set may serve for training and evaluation


def test_timm_ranks_share_the_batches_and_evaluate_each_image_once():
    one = epoch(make(**FULL, batch_size=4), 1)
    two = [epoch(make(**FULL, batch_size=2, rank=rank, world_size=2), 1) for rank in range(2)]
    for i in range(2):
        assert torch.equal(torch.cat([inputs[i] for inputs, _ in two]), one[0][i])
        assert torch.equal(torch.cat([targets[i] for _, targets in two]), one[1][i])
    seen = []
    for rank in range(3):
        loader = make(rank=rank, world_size=3)
        _, targets = epoch(loader)
        assert len(targets) == len(loader)
        seen += torch.cat(targets).tolist()
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize('channels_last', [False, True])
def test_timm_memory_format(channels_last):
    for x, _ in make(**FULL, channels_last=channels_last):
        assert (x.dtype, x.shape) == (torch.float32, (4, 3, *SIZE))
        assert x.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize('workers', [0, 1])
def test_an_unreadable_image_is_one_clear_error(tmp_path, workers):
    paths = [tmp_path / f'{i}.png' for i in range(3)]
    for path in paths:
        Image.new('RGB', (8, 8)).save(path)
    paths[1].write_text('no image')
    images = ImageSet(paths, torch.arange(3), Target('class', ('a', 'b', 'c')))
    with pytest.raises(ImageError) as caught:
        epoch(make(images, workers=workers))
    assert str(caught.value).startswith(f'{paths[1]}: not a readable image')
    assert 'Traceback' not in str(caught.value)
    with pytest.raises(ImageError, match='not a readable image'):
        make(images, kind='resident')
