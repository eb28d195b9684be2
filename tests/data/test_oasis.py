from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from timm_emoreg.data.oasis import CATEGORIES, load_oasis
from timm_emoreg.data.sets import DataError

HEADER = ['', 'Theme', 'Category', 'Source', 'Valence_mean', 'Valence_SD', 'Arousal_mean', 'Arousal_SD']


def write(tmp_path, change=lambda rows: None, size=(128, 128), themes=20):
    images = tmp_path / 'oasis' / 'images'
    images.mkdir(parents=True)
    rows = [HEADER]
    for i in range(themes * 2):
        theme = f'{"Tt"[i % 2]}heme {"abcdefghijklmnopqrstuvwxyz"[i // 2]} {i % 2 * 11 + 1}'  # as 'Dog 1' and 'dog 12'
        Image.new('RGB', size, (i, 0, 0)).save(images / f'{theme}.jpg')
        rows.append([f'I{i + 1}', theme, CATEGORIES[i % 4].capitalize(), 'web', 1 + i * 0.1, 1, 7 - i * 0.1, 1])
    change(rows)
    with open(tmp_path / 'oasis' / 'OASIS.csv', 'w', newline='') as file:
        csv.writer(file).writerows(rows)
    return tmp_path


def row_of(part):
    """Row of each picture, from the ratings: the i-th row has valence 1 + i / 10."""
    return np.round((part.target.denormalise(part.targets)[:, 0].numpy() - 1) * 10).astype(int).tolist()


def test_ratings_by_theme(tmp_path):
    splits = load_oasis(write(tmp_path))
    assert splits.target.names == ('valence', 'arousal')
    assert (splits.target.low, splits.target.high) == (1, 7)
    parts = [row_of(part) for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in parts] == [28, 6, 6]
    assert sorted(i for part in parts for i in part) == list(range(40))
    assert sorted({i // 2 for i in parts[2]}) == [14, 16, 18]  # the published split of this version
    for part in parts:
        assert {i ^ 1 for i in part} == set(part)  # both pictures of a theme
    row = parts[0][5]
    assert splits.train.targets[5].tolist() == pytest.approx([row * 0.1 / 3 - 1, 1 - row * 0.1 / 3])
    assert splits.train.targets.dtype == torch.float32
    assert splits.train.images.shape == (28, 128, 128, 3)
    assert abs(int(splits.train.images[5, 0, 0, 0]) - row) <= 3  # jpeg


def test_category_is_another_label_of_the_same_split(tmp_path):
    ratings, category = (load_oasis(write(tmp_path), 'ratings'), load_oasis(tmp_path, 'category'))
    assert category.target.names == CATEGORIES
    for part, other in ((ratings.train, category.train), (ratings.test, category.test)):
        assert np.array_equal(part.images, other.images)
        assert other.targets.tolist() == [i % 4 for i in row_of(part)]


def test_full_size_pictures_stay_files(tmp_path):
    splits = load_oasis(write(tmp_path, size=(500, 400)))
    assert splits.train.images[0].suffix == '.jpg'
    assert splits.train[0][0].size == (500, 400)


def set_cell(row, column, value):
    def change(rows):
        rows[row][column] = value
    return change


@pytest.mark.parametrize(('labels', 'change', 'message'), [
    ('ratings', set_cell(2, 4, 7.5), r'OASIS\.csv, line 3: Valence_mean is 7\.5, outside its scale 1 to 7'),
    ('ratings', set_cell(2, 6, 'NA'), r"OASIS\.csv, line 3: Arousal_mean is 'NA', not a finite number"),
    ('ratings', set_cell(2, 1, 'Theme z 1'), r"OASIS\.csv, line 3: there is no image file 'images/Theme z 1\.jpg'"),
    ('category', set_cell(2, 2, 'Persons'), r"OASIS\.csv, line 3: Category 'Persons' is unknown.*'Person'"),
])
def test_damaged_tables_are_refused(tmp_path, labels, change, message):
    with pytest.raises(DataError, match=message):
        load_oasis(write(tmp_path, change), labels)


def test_too_few_themes(tmp_path):
    with pytest.raises(DataError, match=r"oasis: the part '\w+' holds no image"):
        load_oasis(write(tmp_path, themes=1))


def test_absent_set_and_unknown_labels(tmp_path):
    with pytest.raises(DataError, match=r"the set 'oasis' is not there\. Expected .*OASIS\.csv and images/\*\.jpg.*"
                                        r'10\.3758/s13428-016-0715-3.*--data-dir.*--stimuli emoji'):
        load_oasis(tmp_path)
    with pytest.raises(DataError, match=r"labels 'rating' is unknown.*Did you mean 'ratings'"):
        load_oasis(tmp_path, 'rating')
