import numpy as np
import pytest
import torch
from PIL import Image

from timm_emoreg.data import DataError, ImageSet, Splits, Target
from timm_emoreg.data.controls import fewer_images, predict_rotation, shuffle_labels


def splits(labels, size=(8, 8), kind='class') -> Splits:
    """Pictures whose top left pixel tells their number."""
    images = np.zeros((len(labels), *size, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels))
    if kind == 'class':
        part = ImageSet(images, torch.tensor(labels), Target('class', ('a', 'b', 'c')))
    else:
        part = ImageSet(images, torch.tensor(labels)[:, None].float(), Target('ratings', ('valence',)))
    return Splits('made', part, part, part, 'none')


LABELS = [0] * 60 + [1] * 30 + [2] * 10


@pytest.mark.parametrize('number', [3, 10, 50, 99, 100])
def test_fewer_images_keep_the_proportion_of_the_classes(number):
    part = fewer_images(splits(LABELS), number, seed=1)
    counts = np.bincount(part.train.targets.numpy(), minlength=3)
    assert counts.sum() == number
    assert (counts >= 1).all()
    assert np.abs(counts - number * np.array([0.6, 0.3, 0.1])).max() <= 1.5
    numbers = part.train.images[:, 0, 0, 0]
    assert len(set(numbers)) == number
    assert all(LABELS[n] == label for n, label in zip(numbers, part.train.targets.tolist(), strict=True))
    assert len(part.validation) == len(part.test) == 100


def test_fewer_images_depend_on_the_seed_and_grow_by_adding():
    def chosen(number, seed):
        return set(fewer_images(splits(LABELS), number, seed).train.images[:, 0, 0, 0].tolist())
    assert chosen(20, 1) == chosen(20, 1) != chosen(20, 2)
    assert chosen(20, 1) < chosen(50, 1)


@pytest.mark.parametrize('number', [2, 101])
def test_a_number_that_does_not_fit_is_named(number):
    with pytest.raises(DataError, match=rf'made: {number} training images were asked for. Give a number from 3, one '
                                        'a class, to 100'):
        fewer_images(splits(LABELS), number, seed=0)


def test_ratings_have_no_strata():
    with pytest.raises(DataError, match='its targets are ratings, and only of classes'):
        fewer_images(splits([0.1] * 9, kind='ratings'), 5, seed=0)


@pytest.mark.parametrize('kind', ['class', 'ratings'])
def test_shuffled_labels_are_the_same_labels_on_other_images(kind):
    whole, mixed = splits(LABELS, kind=kind), shuffle_labels(splits(LABELS, kind=kind), seed=3)
    assert mixed.train.images is not None
    assert np.array_equal(mixed.train.images, whole.train.images)
    for part in ('train', 'validation', 'test'):
        before, after = getattr(whole, part).targets, getattr(mixed, part).targets
        assert torch.equal(before.sort(0)[0], after.sort(0)[0])
        assert not torch.equal(before, after)
    assert torch.equal(mixed.train.targets, shuffle_labels(splits(LABELS, kind=kind), seed=3).train.targets)
    assert mixed.name == 'made (shuffled labels)'


def test_rotations_turn_the_pictures_as_the_target_says():
    whole = splits(LABELS)
    turned = predict_rotation(whole, seed=0)
    assert np.bincount(turned.train.targets.numpy()).tolist() == [25] * 4
    assert not turned.flip_safe  # a mirrored picture of one that lies left lies right
    pixels = turned.train.pixels((8, 8))
    corners = [(0, 0), (7, 0), (7, 7), (0, 7)]  # where the top left corner goes, anticlockwise
    for i in range(1, 100):
        turn = int(turned.train.targets[i])
        y, x = corners[turn]
        assert pixels[i, 0, y, x] == i
        assert turned.train.picture(i).getpixel((x, y))[0] == i
    assert turned.train.subset([5, 7]).targets.tolist() == turned.train.targets[[5, 7]].tolist()
    assert turned.train.subset([5]).pixels((8, 8)).sum() == 5
    assert turned.name == 'made (rotations)'


def test_oblong_pictures_are_resized_before_they_are_turned(tmp_path):
    paths = [tmp_path / f'{i}.png' for i in range(4)]
    for path in paths:
        picture = np.zeros((8, 32, 3), np.uint8)
        picture[:, ::8] = 255  # upright stripes, which the resize to a square draws together
        Image.fromarray(picture).save(path)
    part = ImageSet(paths, torch.zeros(4, dtype=torch.long), Target('class', ('a', 'b', 'c')))
    turned = predict_rotation(Splits('made', part, part, part, 'none'), seed=0).train
    plain = part.pixels((8, 8))
    assert turned.pixels((8, 8)).equal(torch.stack([p.rot90(int(t), (1, 2))
                                                    for p, t in zip(plain, turned.targets, strict=True)]))
    with pytest.raises(DataError, match='Rotated pictures must be square, got 8x16'):
        turned.pixels((8, 16))
