from __future__ import annotations

import numpy as np
import pytest
import torch

from timm_emoreg.data.duplicates import check_unseen, copies
from timm_emoreg.data.sets import DataError, ImageSet, Splits, Target


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize('block', [1, 7, 1000])
def test_exact_and_near_copies_are_found(images, block):
    train, test = images[:40], images[40:].copy()
    test[3] = train[17]
    test[5] = train[2] // 2 + 60
    brighter = train[30] // 2 + 69  # 9 grey levels more than the training image below
    exact, near = copies(np.concatenate([train, train[30:31] // 2 + 60]), np.concatenate([test, brighter[None]]),
                         block=block)
    assert exact.nonzero()[0].tolist() == [3]
    assert near.nonzero()[0].tolist() == [3, 20]


def test_near_is_the_root_mean_square_of_the_cells(images):
    train = images[:1] // 2
    for shift, expected in ((8, True), (12, False)):
        assert copies(train, train + np.uint8(shift))[1].tolist() == [expected]
    assert copies(train, train + np.uint8(12), near=12.01)[1].tolist() == [True]
    noise = train.copy()  # within each cell of 4x4 pixels, and so gone at 8x8
    noise[:, ::2] += 40
    noise[:, 1::2] -= np.minimum(noise[:, 1::2], 40)
    assert copies(train, train)[0].tolist() == [True]
    assert copies(train, noise)[0].tolist() == [False]


def test_a_size_that_has_no_whole_cells_is_refused(images):
    with pytest.raises(DataError, match=r'Images of 30x32 pixels .* multiples of 8'):
        copies(images[:40, :30], images[40:, :30])


def test_the_distance_is_that_of_all_pairs(images):
    train, test = images[:30], images[30:]
    cells = [x.reshape(-1, 8, 4, 8, 4, 3).mean((2, 4)).reshape(-1, 192) for x in (train, test)]
    distance = np.sqrt(((cells[1][:, None] - cells[0][None]) ** 2).mean(2)).min(1)
    limit = float(np.median(distance))
    assert copies(train, test, near=limit)[1].sum() == pytest.approx(15, abs=1)
    assert (copies(train, test, near=limit + 0.01)[1] == (distance <= limit + 0.01)).all()


def test_stage_1_may_not_show_what_stage_2_is_judged_by(tmp_path):
    link = tmp_path / 'link.png'
    link.symlink_to(tmp_path / '4.png')

    def splits(name, *parts):
        parts = [[tmp_path / f'{i}.png' if isinstance(i, int) else i for i in part] for part in parts]
        return Splits(name, *(ImageSet(part, torch.zeros(len(part), dtype=torch.long), Target('class', ('a',)))
                              for part in parts), 'free')

    target = splits('things', [0, 1], [2], [3, 4])
    check_unseen(splits('faces', [0, 5], [1], [2, 3]), target)
    check_unseen(target, target)
    check_unseen(splits('faces', [np.zeros((8, 8, 3), np.uint8)], [9], [9]), target)
    for train, validation, found in (([2], [9], '1 of the 3 files .+, .+2.png among'), ([9], [3], '1 of .+3.png'),
                                     ([link, 3], [9], '2 of .+3.png')):
        with pytest.raises(DataError, match=f'^faces, things: stage 1 would see {found}.+a column split.$'):
            check_unseen(splits('faces', train, validation, [9]), target)
