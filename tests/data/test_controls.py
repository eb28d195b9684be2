import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from timm_emoreg.data import DataError, ImageSet, Splits, Target
from timm_emoreg.data.controls import fewer_images, predict_rotation, shuffle_labels
from timm_emoreg.data.loader import make_loader


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
                                        'per class, to 100, all there are'):
        fewer_images(splits(LABELS), number, seed=0)


def test_ratings_have_no_strata():
    with pytest.raises(DataError, match='its targets are ratings, and only of classes'):
        fewer_images(splits([0.1] * 9, kind='ratings'), 5, seed=0)


@pytest.mark.parametrize('kind', ['class', 'ratings'])
def test_shuffled_labels_are_the_same_labels_on_other_images(kind):
    whole, mixed = splits(LABELS, kind=kind), shuffle_labels(splits(LABELS, kind=kind), seed=3)
    assert np.array_equal(mixed.train.images, whole.train.images)
    for part in ('train', 'validation', 'test'):
        before, after = getattr(whole, part).targets, getattr(mixed, part).targets
        assert torch.equal(before.sort(0)[0], after.sort(0)[0])
        assert not torch.equal(before, after)
    assert torch.equal(mixed.train.targets, shuffle_labels(splits(LABELS, kind=kind), seed=3).train.targets)
    assert mixed.name == 'made (shuffled labels)'


def test_pictures_of_the_same_thing_keep_one_label_when_labels_are_shuffled():
    things, ratings = torch.tensor([7, 7, 2, 5, 5, 5, 9, 9, 4]), torch.linspace(-1, 1, 10)
    images = np.zeros((len(things), 8, 8, 3), np.uint8)
    part = ImageSet(images, ratings[things][:, None], Target('ratings', ('valence',)), things)
    part = part.subset([8, 0, 1, 2, 3, 4, 5, 6, 7])
    seen = set()
    for seed in range(20):
        labels = shuffle_labels(Splits('made', part, part, part, 'none'), seed).train.targets[:, 0]
        by_thing = {int(thing): labels[part.groups == thing].unique().tolist() for thing in part.groups}
        assert all(len(found) == 1 for found in by_thing.values())
        assert sorted(found[0] for found in by_thing.values()) == pytest.approx(ratings[[2, 4, 5, 7, 9]].tolist())
        seen.add(tuple(labels.tolist()))
    assert len(seen) > 10


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


def oblong(tmp_path, draw) -> ImageSet:
    """Eight pictures of files, each turned twice to every side."""
    paths = [tmp_path / f'{i}.png' for i in range(8)]
    for path in paths:
        draw().save(path)
    part = ImageSet(paths, torch.zeros(8, dtype=torch.long), Target('class', ('a', 'b', 'c')))
    turned = predict_rotation(Splits('made', part, part, part, 'none'), seed=0).train
    assert sorted(turned.targets.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    return turned


def evaluated(images, kind):
    """All images as the loader of a kind gives them in evaluation, and their targets."""
    config = {'mean': (0., 0., 0.), 'std': (1., 1., 1.)}
    [batch] = make_loader(images, (32, 32), len(images), config, kind=kind, workers=0)
    return batch


@pytest.mark.parametrize('size', [(120, 72), (72, 120)])
@pytest.mark.parametrize('kind', ['timm', 'resident'])
def test_no_stretch_tells_how_an_oblong_picture_was_turned(size, kind, tmp_path):
    def disc():
        picture = Image.new('RGB', size)
        ImageDraw.Draw(picture).ellipse([centre + d for d in (-18, 18) for centre in (size[0] / 2, size[1] / 2)], 'red')
        return picture
    for image in evaluated(oblong(tmp_path, disc), kind)[0]:
        inside = image[0] > 0.5
        assert inside.any(0).sum() == inside.any(1).sum() == 16


@pytest.mark.parametrize('size', [(40, 24), (48, 120)])
def test_both_loaders_turn_oblong_pictures_alike(size, tmp_path):
    rng = np.random.default_rng(0)

    def noise():  # of so little contrast that no resize overshoots, which is cut off between its two directions
        return Image.fromarray(rng.integers(96, 160, (*size[::-1], 3), dtype=np.uint8))
    images = oblong(tmp_path, noise)
    (one, targets), (other, same) = evaluated(images, 'timm'), evaluated(images, 'resident')
    assert torch.equal(targets, images.targets)
    assert torch.equal(targets, same)
    assert (one - other).abs().max() <= 2 / 255


def test_rotated_pictures_are_square():
    with pytest.raises(DataError, match=r'Rotated pictures must be square, got 8x16\. Use a square size'):
        predict_rotation(splits(LABELS), seed=0).train.pixels((8, 16))


def test_rotations_are_drawn_by_the_seed_in_every_part():
    whole, parts = splits(LABELS), ('train', 'validation', 'test')
    one, again, other = ([getattr(predict_rotation(whole, seed), part) for part in parts] for seed in (0, 0, 1))
    for turned, same, another in zip(one, again, other, strict=True):
        assert len(turned.target) == 4
        assert np.bincount(turned.targets.numpy()).tolist() == [25] * 4
        assert torch.equal(turned.targets, same.targets)
        assert not torch.equal(turned.targets, another.targets)
