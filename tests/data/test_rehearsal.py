"""Stimuli beside the training images: which batch when, and that neither set disturbs the other."""
from itertools import chain

import numpy as np
import pytest
import torch

from timm_emoreg.data.loader import make_loader
from timm_emoreg.data.progressive import ProgressiveLoader
from timm_emoreg.data.rehearsal import RehearsalLoader
from timm_emoreg.data.sets import ImageSet, Target

CONFIG = {'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.25, 0.3)}


def make(count, seed=0, **kwargs):
    images = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    images = ImageSet(images, torch.arange(count), Target('class', tuple(map(str, range(count)))))
    return make_loader(images, (32, 32), 4, CONFIG, training=True, seed=3, **kwargs)


def batches(loader, epoch, first=0):
    loader.set_epoch(epoch, first)
    return list(loader)


@pytest.mark.parametrize('kind', ['resident', 'timm'])
@pytest.mark.parametrize('stimuli', [8, 12, 30])  # of 2, 3 and 7 batches, beside 3 of images
def test_passes_follow_each_other_through_the_epochs(kind, stimuli):
    options = {'kind': kind, 'workers': 0}
    images, shown = make(13, **options), make(stimuli, 1, **options)
    loader = RehearsalLoader(make(13, **options), make(stimuli, 1, **options))
    assert len(loader) == 3
    found = list(chain.from_iterable(batches(loader, epoch) for epoch in range(5)))
    expected = list(chain.from_iterable(batches(images, epoch) for epoch in range(5)))
    passes = list(chain.from_iterable(batches(shown, number) for number in range(8)))
    assert len(found) == 15
    for (x, target, s, s_target), (x_0, target_0), (s_0, s_target_0) in zip(found, expected, passes, strict=False):
        for one, other in ((x, x_0), (target, target_0), (s, s_0), (s_target, s_target_0)):
            assert torch.equal(one, other)


@pytest.mark.parametrize(('epoch', 'first'), [(0, 1), (1, 0), (1, 2), (4, 1)])
def test_a_resumed_epoch_goes_on_with_the_stimuli_that_were_next(epoch, first):
    whole = batches(RehearsalLoader(make(13), make(20, 1)), epoch)
    rest = batches(RehearsalLoader(make(13), make(20, 1)), epoch, first)
    assert len(rest) == len(whole) - first
    for one, other in zip(rest, whole[first:], strict=True):
        assert all(map(torch.equal, one, other))


def test_stimuli_are_as_large_as_the_images():
    loader = RehearsalLoader(ProgressiveLoader(make(13), 16, 3), make(20, 1))
    for epoch, size in enumerate((16, 24, 32)):
        for input, _, stimuli, _ in batches(loader, epoch):
            assert input.shape == stimuli.shape == (4, 3, size, size)
