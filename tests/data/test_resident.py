from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, chisquare
from torchvision import transforms

from timm_emoreg.data.resident import ResidentLoader, resident_bytes
from timm_emoreg.data.sets import DataError, ImageSet, Target

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZE = (6, 9)  # not square, so that no axis can be taken for the other
ONE = torch.ones(3, 1, 1)


def image_set(count=20, size=SIZE, kind='class'):
    images = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    targets = torch.arange(count) if kind == 'class' else torch.linspace(-1, 1, count * 2).view(count, 2)
    return ImageSet(images, targets, Target(kind, tuple(map(str, range(count if kind == 'class' else 2)))))


def load(images=None, batch_size=4, size=SIZE, **kwargs):
    return ResidentLoader(image_set() if images is None else images, size, batch_size, MEAN, STD, **kwargs)


def epoch(loader, number=0, first_batch=0):
    loader.set_epoch(number, first_batch)
    batches = list(loader)
    return [x for x, _ in batches], [t for _, t in batches]


def whole(loader, number=0):
    inputs, targets = epoch(loader, number)
    return torch.cat(inputs), torch.cat(targets)


def pixel_values(x):
    """The bytes that a normalised batch (B, 3, H, W) was made of."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    values = (x * std + mean) * 255
    torch.testing.assert_close(values, values.round(), atol=1e-3, rtol=0)
    return values.round().to(torch.uint8)


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('batch_size', [1, 4, 8, 20, 64])
def test_evaluation_gives_each_image_once_as_timm_normalises_it(batch_size):
    images = image_set()
    loader = load(images, batch_size, flip='random', cutout=3, crop_padding=2)  # which belong to training
    inputs, targets = epoch(loader)
    assert len(inputs) == len(loader) == -(-20 // batch_size)
    assert [len(x) for x in inputs[:-1]] == [batch_size] * (len(loader) - 1)
    assert torch.cat(targets).tolist() == list(range(20))
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(torch.tensor(MEAN), torch.tensor(STD))])
    expected = torch.stack([reference(images.picture(i)) for i in range(20)])
    torch.testing.assert_close(torch.cat(inputs), expected, atol=1e-6, rtol=1e-6)


def test_other_sizes_are_resized_once_bicubic():
    images = image_set()
    x, _ = whole(load(images, size=(5, 4)))
    resized = [np.array(images.picture(i).resize((4, 5), Image.Resampling.BICUBIC)) for i in range(20)]
    assert torch.equal(pixel_values(x), torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2))


@pytest.mark.parametrize('kind', ['votes', 'ratings'])
@pytest.mark.parametrize('training', [False, True])
def test_vector_targets_pass_through(kind, training):
    images = image_set(kind=kind)
    x, target = whole(load(images, training=training))
    assert target.dtype == torch.float32
    for one, row in zip(pixel_values(x), target, strict=True):
        index = torch.nonzero((images.targets == row).all(1)).item()
        assert torch.equal(one, images.pixels(SIZE)[index])


@pytest.mark.parametrize('training', [False, True])
def test_memory_format_device_and_dtype(training):
    for channels_last in (False, True):
        loader = load(training=training, channels_last=channels_last, device='cpu')
        for x, target in loader:
            assert (x.dtype, x.shape[1:], target.dtype) == (torch.float32, (3, *SIZE), torch.int64)
            assert x.is_contiguous(memory_format=torch.channels_last) == channels_last
            assert x.is_contiguous() != channels_last
    assert torch.equal(whole(load(training=training, channels_last=True))[0], whole(load(training=training))[0])


# -- order -------------------------------------------------------------------------------------------------------------


FULL = {'training': True, 'crop_padding': 2, 'flip': 'random', 'cutout': 3}


def test_a_training_epoch_shows_each_image_once_without_the_incomplete_batch():
    inputs, targets = epoch(load(batch_size=6, training=True))
    assert [len(x) for x in inputs] == [6, 6, 6]
    assert len(set(torch.cat(targets).tolist())) == 18
    _, targets = whole(load(training=True))
    assert sorted(targets.tolist()) == list(range(20))
    assert targets.tolist() != list(range(20))


def test_epochs_are_reproducible_and_differ():
    same, again = whole(load(**FULL, seed=3), 5), whole(load(**FULL, seed=3), 5)
    assert torch.equal(same[0], again[0])
    assert torch.equal(same[1], again[1])
    for other in (whole(load(**FULL, seed=3), 6), whole(load(**FULL, seed=4), 5)):
        assert not torch.equal(same[1], other[1])
    state = torch.get_rng_state()
    whole(load(**FULL))
    assert torch.equal(torch.get_rng_state(), state)  # what the training draws does not depend on the loader


def test_no_epoch_of_a_seed_is_one_of_another():
    orders = [tuple(whole(load(**FULL, seed=seed), number)[1].tolist()) for seed in range(4) for number in range(4)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize('first_batch', [0, 1, 3, 5])
def test_a_resumed_epoch_goes_on_with_the_batches_of_the_unbroken_one(first_batch):
    loader = load(**FULL)
    inputs, targets = epoch(loader, 2)
    resumed = load(**FULL)
    rest, rest_targets = epoch(resumed, 2, first_batch)
    assert len(rest) == 5 - first_batch
    for a, b in zip(inputs[first_batch:] + targets[first_batch:], rest + rest_targets, strict=True):
        assert torch.equal(a, b)
    assert len(list(resumed)) == 5  # the first batch holds for one epoch only


def test_ranks_share_each_batch_of_the_single_process():
    one, one_targets = epoch(load(**FULL, batch_size=6), 1)
    two = [epoch(load(**FULL, batch_size=3, rank=rank, world_size=2), 1) for rank in range(2)]
    assert len(one) == 3
    for i in range(3):
        assert torch.equal(torch.cat([inputs[i] for inputs, _ in two]), one[i])
        assert torch.equal(torch.cat([targets[i] for _, targets in two]), one_targets[i])


@pytest.mark.parametrize('world_size', [2, 3, 21])
def test_ranks_evaluate_each_image_once(world_size):
    seen = []
    for rank in range(world_size):
        loader = load(batch_size=3, rank=rank, world_size=world_size)
        inputs, targets = epoch(loader)
        assert len(inputs) == len(loader)
        seen += torch.cat(targets).tolist() if targets else []
    assert sorted(seen) == list(range(20))


# -- augmentation ------------------------------------------------------------------------------------------------------


def windows(padding, size=SIZE):
    """Every window of every reflect-padded image: (N, rows, columns, 3, H, W), by NumPy's padding."""
    padded = np.pad(image_set(size=size).images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), 'reflect')
    view = np.lib.stride_tricks.sliding_window_view(padded, size, (1, 2))
    return torch.from_numpy(view.copy())


def find(one, candidates, flips=(False, True)):
    """(row, column, mirrored) of the window that an image is; there must be exactly one."""
    found = [(*at.tolist(), mirrored) for mirrored in flips
             for at in torch.nonzero((candidates == (one.flip(-1) if mirrored else one)).flatten(2).all(2))]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(('padding', 'size'), [(2, SIZE), (3, SIZE), (4, (9, 6))])
def test_each_crop_is_a_window_of_the_reflected_image(padding, size):
    candidates = windows(padding, size)
    loader = load(image_set(size=size), size=size, training=True, crop_padding=padding)
    seen = set()
    for number in range(8):
        x, targets = whole(loader, number)
        for one, index in zip(pixel_values(x), targets.tolist(), strict=True):
            seen.add(find(one, candidates[index], flips=[False])[:2])
    rows, columns = zip(*seen, strict=True)
    assert (min(rows), max(rows), min(columns), max(columns)) == (0, 2 * padding, 0, 2 * padding)


def test_crops_and_flips_are_distributed_as_torchvisions():
    padding, epochs = 1, 60
    candidates = windows(padding)
    counts = np.zeros((2, 2 * padding + 1, 2 * padding + 1, 2))
    loader = load(training=True, crop_padding=padding, flip='random')
    for number in range(epochs):
        x, targets = whole(loader, number)
        for one, index in zip(pixel_values(x), targets.tolist(), strict=True):
            counts[(0, *map(int, find(one, candidates[index])))] += 1
    reference = transforms.Compose([transforms.RandomCrop(SIZE, padding=padding, padding_mode='reflect'),
                                    transforms.RandomHorizontalFlip()])
    torch.manual_seed(0)
    pixels = image_set().pixels(SIZE)
    for _ in range(epochs):
        for index in range(20):
            counts[(1, *map(int, find(reference(pixels[index]), candidates[index])))] += 1
    assert counts.sum((1, 2, 3)).tolist() == [20 * epochs] * 2
    assert chisquare(counts[0].ravel()).pvalue > 0.01  # uniform, crop and flip independent of each other
    assert chi2_contingency(counts.reshape(2, -1)).pvalue > 0.01


def test_random_flips_are_independent_between_images_and_epochs():
    loader = load(training=True, flip='random')
    candidates = windows(0)
    flips = np.zeros((40, 20))
    for number in range(40):
        x, targets = whole(loader, number)
        for one, index in zip(pixel_values(x), targets.tolist(), strict=True):
            flips[number, index] = find(one, candidates[index])[2]
    assert 0.45 < flips.mean() < 0.55
    assert 0.4 < (flips[1:] != flips[:-1]).mean() < 0.6
    assert 0.4 < (flips[:, 1:] != flips[:, :-1]).mean() < 0.6


def test_alternate_flips_mirror_each_image_in_one_of_two_epochs():
    candidates = windows(0)
    flips = []
    for seed in range(3):
        loader = load(training=True, flip='alternate', seed=seed)
        for number in range(4):
            x, targets = whole(loader, number)
            shown = dict(zip(targets.tolist(), pixel_values(x), strict=True))
            flips.append([find(shown[i], candidates[i])[2] for i in range(20)])
    for i in range(0, 12, 4):
        assert flips[i] == flips[i + 2] == [not f for f in flips[i + 1]] == [not f for f in flips[i + 3]]
        assert 3 < sum(flips[i]) < 17
    assert flips[0] != flips[4]


@pytest.mark.parametrize('side', [1, 3, 4, 20])
def test_cutout_is_a_square_clipped_at_the_border(side):
    black = ImageSet(np.zeros((300, *SIZE, 3), np.uint8), torch.zeros(300, dtype=torch.long), Target('class', ('a',)))
    x, _ = whole(load(black, 50, training=True, cutout=side))
    cut = x == 0
    assert torch.equal(cut.all(1), cut.any(1))  # the same in each channel
    cut = cut.all(1)
    kept = torch.tensor(MEAN) / torch.tensor(STD)
    torch.testing.assert_close(x, torch.where(cut[:, None], 0.0, -kept.view(1, 3, 1, 1)))
    centres = set()
    for one in cut:
        rows, columns = (torch.nonzero(one.any(axis)).flatten().tolist() for axis in (1, 0))
        assert one.sum() == len(rows) * len(columns)  # a rectangle
        possible = [
            {c for c in range(length)
             if set(range(max(c - side // 2, 0), min(c - side // 2 + side, length))) == set(line)}
            for line, length in ((rows, SIZE[0]), (columns, SIZE[1]))]
        assert all(possible)
        centres.add((min(possible[0]), min(possible[1])))
    if side == 1:
        assert len(centres) > 45  # of 54 pixels
        assert (cut.sum((1, 2)) == 1).all()


# -- memory and errors -------------------------------------------------------------------------------------------------


def test_the_set_is_kept_as_bytes_and_padded_in_place(monkeypatch):
    images = image_set(20, (8, 8))
    copied = []

    def watch(name):
        plain = getattr(torch.Tensor, name)

        def watched(self, *args):
            out = plain(self, *args)
            copied.append((name, out.nbytes))
            return out
        monkeypatch.setattr(torch.Tensor, name, watched)

    for name in ('float', 'index_select', 'contiguous', 'clone', 'flip'):
        watch(name)
    loader = load(images, size=(8, 8), training=True, crop_padding=2)
    monkeypatch.undo()
    assert loader.pixels.dtype == torch.uint8
    assert loader.pixels.nbytes == resident_bytes(20, (8, 8), 2) == 20 * 3 * 12 * 12
    assert not copied
    assert load(images, size=(8, 8), crop_padding=2).pixels.nbytes == resident_bytes(20, (8, 8))  # evaluation: none


def test_reflection_of_images_that_are_not_square():
    count = 41
    images = np.random.default_rng(1).integers(0, 256, (count, 3, 4, 3), dtype=np.uint8)
    data = ImageSet(images, torch.arange(count), Target('class', tuple(map(str, range(count)))))
    loader = load(data, size=(3, 4), training=True, crop_padding=2)
    assert np.array_equal(loader.pixels.numpy(), np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), 'reflect'))


@pytest.mark.parametrize(('kwargs', 'error', 'message'), [
    ({'flip': 'both'}, ValueError, "flip='both' is unknown, expected one of 'none', 'random', 'alternate'"),
    ({'crop_padding': 6}, ValueError, r'crop_padding=6 must lie in 0\.\.5 for images of \(6, 9\)'),
    ({'crop_padding': -1}, ValueError, 'crop_padding=-1 must lie in'),
    ({'training': True, 'batch_size': 21}, DataError, r'20 images to train on \(0, 1, 2 ...\) are fewer than one'),
    ({'training': True, 'batch_size': 11, 'world_size': 2}, DataError,
     'fewer than one batch of 22. Use a batch size of at most 20'),
])
def test_impossible_settings_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        load(**kwargs)
    assert len(load(batch_size=21)) == 1  # no restriction in evaluation


def test_python_random_is_left_alone():
    state = random.getstate()
    whole(load(**FULL))
    assert random.getstate() == state
