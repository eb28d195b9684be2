from __future__ import annotations

import csv
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_dataset

from timm_emoreg.data.own import load_csv, load_folder
from timm_emoreg.data.sets import DataError

VA = ('valence', 'arousal')


def draw(folder, count, suffix='.png'):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new('RGB', (3 + i, 4), (i, 0, 0)).save(folder / f'{i}{suffix}')


def sizes(splits):
    return len(splits.train), len(splits.validation), len(splits.test)


@pytest.fixture
def rated(tmp_path):
    """Writes a csv of ten images; `change` edits its rows (row 0 is the header)."""
    def write(change=lambda rows: None, count=10):
        draw(tmp_path / 'pics', count)
        rows = [['image', *VA], *([f'pics/{i}.png', f'{1 + i * 0.5}', '4'] for i in range(count))]
        change(rows)
        with open(tmp_path / 'own.csv', 'w', newline='') as file:
            csv.writer(file).writerows(rows)
        return tmp_path / 'own.csv'
    return write


def test_classes_are_numbered_as_timm_does(tmp_path):
    for name in ('1', '2', '10', '2b', 'Bird', 'apple', 'class10', 'Class9', '٣'):
        draw(tmp_path / name, 4)
    theirs = create_dataset('', root=str(tmp_path)).reader.class_to_idx
    assert load_folder(tmp_path).target.names == tuple(sorted(theirs, key=theirs.get)) == (
        '1', '2', '2b', '٣', '10', 'apple', 'Bird', 'Class9', 'class10')


def test_classes_may_have_digits_that_are_no_numbers(tmp_path):
    for name in ('①', '②', '10²', '9²', 'x'):
        draw(tmp_path / name, 3)
    assert load_folder(tmp_path).target.names == ('9²', '10²', 'x', '①', '②')


def test_folder_per_class_is_split_by_class(tmp_path):
    draw(tmp_path / 'joy', 50)
    draw(tmp_path / 'anger' / 'deeper', 9, '.JPG')
    draw(tmp_path / 'anger', 1)
    (tmp_path / 'joy' / 'notes.txt').touch()
    (tmp_path / 'joy' / '._0.png').touch()
    (tmp_path / '.cache').mkdir()
    (tmp_path / '__MACOSX').mkdir()
    splits = load_folder(tmp_path)
    assert splits.name == tmp_path.name
    assert splits.target.names == ('anger', 'joy')
    assert sizes(splits) == (48, 6, 6)
    for part, expected in ((splits.train, [8, 40]), (splits.validation, [1, 5]), (splits.test, [1, 5])):
        assert torch.bincount(part.targets).tolist() == expected
        for path, label in zip(part.images, part.targets.tolist(), strict=True):
            assert path.relative_to(tmp_path).parts[0] == splits.target.names[label]
    everything = {path for part in (splits.train, splits.validation, splits.test) for path in part.images}
    assert len(everything) == 60
    # one of anger, then joy: another version must not show in training what this one held out
    assert [int(path.stem) for path in splits.validation.images] == [7, 2, 41, 42, 47, 8]
    assert [int(path.stem) for path in splits.test.images] == [1, 19, 32, 34, 40, 49]
    assert load_folder(tmp_path).test.images == splits.test.images
    assert splits.train[0][0].height == 4


@pytest.mark.parametrize(('validation', 'test', 'expected'), [
    ('val', 'test', (20, 4, 6)), ('Validation', None, (18, 4, 2)), (None, 'test', (18, 2, 6)), (None, None, (16, 2, 2)),
])
def test_given_parts_are_taken_and_missing_ones_cut_from_train(tmp_path, validation, test, expected):
    for part, count in (('train', 10), (validation, 2), (test, 3)):
        if part:
            for name in ('anger', 'joy'):
                draw(tmp_path / part / name, count)
    splits = load_folder(tmp_path)
    assert sizes(splits) == expected
    if test:
        assert {path.relative_to(tmp_path).parts[0] for path in splits.test.images} == {'test'}


def test_train_beside_other_names_is_a_class(tmp_path):
    for name in ('train', 'boat'):
        draw(tmp_path / name, 4)
    assert load_folder(tmp_path).target.names == ('boat', 'train')


def test_a_folder_beside_the_parts_is_refused(tmp_path):
    for part in ('train', 'Test'):
        for name in ('anger', 'joy'):
            draw(tmp_path / part / name, 5)
    draw(tmp_path / 'extra', 3)
    with pytest.raises(DataError, match=r"'extra' lies beside the parts test, train and is none of them\. Move it"):
        load_folder(tmp_path)


def fill(root, *names):
    for name in names:
        draw(root / name, 3)
    return root


def test_parts_have_the_names_that_sets_have(tmp_path):
    splits = load_folder(fill(tmp_path, 'Training/a', 'Training/b', 'Testing/a', 'dev/b'))
    assert splits.target.names == ('a', 'b')
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [6, 3, 3]


@pytest.mark.parametrize(('names', 'message'), [
    (('val/a', 'val/b', 'test/a', 'test/b'), 'has the parts test, val and no train'),
    (('train/a', 'train/b', 'holdout/a', 'holdout/b'), "'holdout' lies beside the parts train and is none of them"),
    (('extra', 'train/a', 'train/b'), "'extra' lies beside the parts train and is none of them"),
])
def test_parts_are_not_taken_for_classes(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        load_folder(fill(tmp_path, *names))


def test_hidden_folders_of_a_class_are_passed_over(tmp_path):
    splits = load_folder(fill(tmp_path, 'a', 'b', 'a/.ipynb_checkpoints', 'b/@eaDir', 'b/deeper'))
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 9


def test_two_links_to_one_file_are_refused(tmp_path):
    fill(tmp_path, 'a', 'b')
    (tmp_path / 'a/again.png').symlink_to('0.png')
    with pytest.raises(DataError, match=r'again\.png: is the same file as .*a/0\.png, which could land in'):
        load_folder(tmp_path)


@pytest.mark.parametrize('target', ['loop.png', 'nowhere.png'])
def test_a_link_that_leads_to_no_file_is_named(tmp_path, target):
    fill(tmp_path, 'a', 'b')
    (tmp_path / 'a/loop.png').symlink_to(target)
    with pytest.raises(DataError, match=r'a/loop\.png: is not a usable path \(\w+\)\. Correct the link or remove it'):
        load_folder(tmp_path)


def test_linked_folders_are_not_followed(tmp_path):
    for name in ('anger', 'joy'):
        draw(tmp_path / name, 5)
    (tmp_path / 'joy' / 'up').symlink_to(tmp_path, target_is_directory=True)
    assert sum(sizes(load_folder(tmp_path))) == 10


@pytest.mark.parametrize(('counts', 'message'), [
    ({}, r': 0 class folders, at least 2 are needed'),
    ({'joy': 5}, r': 1 class folders, at least 2 are needed'),
    ({'joy': 5, 'fear': 0}, r'fear: the class folder holds no image \(\.png, .*Add images or remove'),
    ({'joy': 5, 'fear': 1}, r'fear: the class has 1 image, at least 3 are needed .*Add images'),
    ({'joy': 2, 'fear': 5}, r'joy: the class has 2 images, at least 3'),
    ({'train/joy': 5, 'train/fear': 1, 'val/joy': 1, 'test/joy': 1}, r'fear: the class has 1 image, at least 2'),
    ({'train/joy': 5, 'train/fear': 5, 'test/fears': 1}, r"test: class 'fears' is unknown\. Known: 'fear', 'joy'\. "
                                                         r"Did you mean 'fear'\? Add it to .*train"),
    ({'train/joy': 5, 'train/fear': 5, 'val/joy': 1, 'valid/joy': 1}, r"'val' and 'valid' both mean the part validat"),
    ({'train/joy': 5, 'train/fear': 5, 'val': 1}, r'val: the part holds no class folder'),
])
def test_unusable_folders_are_refused(tmp_path, counts, message):
    for name, count in counts.items():
        draw(tmp_path / name, count)
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match=r'nowhere: there is no such folder'):
        load_folder(tmp_path / 'nowhere')


def test_folder_without_permission(tmp_path, monkeypatch):
    for name in ('anger', 'joy'):
        draw(tmp_path / name, 5)
    real = os.scandir

    def scandir(path):
        if str(path).endswith('joy'):
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path)

    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(DataError, match=r'joy: the folder cannot be read \(Permission denied\)\. Make it readable'):
        load_folder(tmp_path)


def test_damaged_image_of_a_folder_is_named_when_it_is_read(tmp_path):
    for name in ('anger', 'joy'):
        draw(tmp_path / name, 5)
    splits = load_folder(tmp_path)
    splits.train.images[0].write_bytes(b'\x89PNG and nothing')
    with pytest.raises(DataError, match=rf'{splits.train.images[0].name}: not a readable image'):
        splits.train[0]


def test_csv_with_ratings(rated, tmp_path):
    splits = load_csv(rated(), VA, (1, 7))
    assert splits.name == 'own'
    assert splits.target.names == VA
    assert (splits.target.kind, splits.target.low, splits.target.high) == ('ratings', 1, 7)
    assert sizes(splits) == (8, 1, 1)
    seen = []
    for part in (splits.train, splits.validation, splits.test):
        assert part.targets.dtype == torch.float32
        for path, rating in zip(part.images, part.targets, strict=True):
            assert rating.tolist() == pytest.approx([(int(path.stem) * 0.5) / 3 - 1, 0])
            seen.append(path)
    assert sorted(seen) == sorted((tmp_path / 'pics').iterdir())


def test_csv_image_column_by_name_or_first(rated):
    def other_order(rows):
        for i, row in enumerate(rows):
            row[:] = [row[1], row[0]] if i else ['valence', 'image']

    def other_name(rows):
        rows[0][0] = 'file'

    for change in (other_order, other_name):
        assert sizes(load_csv(rated(change), 'valence', (1, 7))) == (8, 1, 1)


def test_csv_split_column(rated):
    def split(rows):
        for row, part in zip(rows, ['split', *['train'] * 6, 'val', 'validation', 'test', 'test'], strict=True):
            row.append(part)

    splits = load_csv(rated(split), VA, (1, 7))
    assert [path.name for path in splits.validation.images] == ['6.png', '7.png']
    assert [path.name for path in splits.test.images] == ['8.png', '9.png']
    assert len(splits.train) == 6

    def no_validation(rows):
        split(rows)
        rows[7][-1] = rows[8][-1] = 'train'

    assert sizes(load_csv(rated(no_validation), VA, (1, 7))) == (7, 1, 2)


def set_cell(row, column, value):
    def change(rows):
        rows[row][column] = value
    return change


@pytest.mark.parametrize(('change', 'message'), [
    (set_cell(3, 1, '9'), r'own\.csv, line 4: valence is 9, outside its scale 1 to 7'),
    (set_cell(3, 2, 'nan'), r"own\.csv, line 4: arousal is 'nan', not a finite number"),
    (set_cell(0, 1, 'Valence'), r"line 1: column 'valence' is unknown\. Known: 'image', 'Valence', 'arousal'"),
    (set_cell(2, 0, 'pics/99.png'), r"own\.csv, line 3: there is no image file 'pics/99.png'"),
    (set_cell(2, 0, '../x.png'), r"own\.csv, line 3: '\.\./x\.png' lies outside the folder"),
    (set_cell(2, 0, 'pics/../pics/4.png'), r"own\.csv, line 6: 'pics/4\.png' is already on line 3\. Average"),
    (set_cell(0, 2, 'Split'), r"own\.csv: the column 'Split' would be passed over\. Call it 'split', or something"),
    (set_cell(0, 0, 'IMAGE'), r"own\.csv: the column 'IMAGE' would be passed over\. Call it 'image', or something"),
    (set_cell(0, 2, 'split'), r"own\.csv, line 2: split '4' is unknown\. Known: 'train', 'training', 'validation'"),
    (lambda rows: rows.__delitem__(slice(3, None)), r'own\.csv: 2 rows for train, at least 3 are needed\. Add rows'),
])
def test_unusable_csv_is_refused(rated, change, message):
    columns = ('valence',) if 'split' in message.lower() else VA
    with pytest.raises(DataError, match=message):
        load_csv(rated(change), columns, (1, 7))


@pytest.mark.parametrize(('columns', 'scale', 'message'), [
    (VA, (7, 1), r'own\.csv: the rating scale 7 to 1 does not rise'),
    (VA, (0, float('nan')), r'the rating scale 0 to nan does not rise'),
    ((), (1, 7), r"the rating columns \[\] are none or not distinct\. Name each once, from 'image', 'valence'"),
    (('valence', 'valence'), (1, 7), r'are none or not distinct'),
])
def test_impossible_csv_options_are_refused(rated, columns, scale, message):
    with pytest.raises(DataError, match=message):
        load_csv(rated(), columns, scale)


names = st.sampled_from(['pics/0.png', 'pics/1.png', 'pics/2.png', 'pics/3.png', '../a.png', '', '/', 'x\0'])
numbers = st.one_of(st.floats(1, 7).map(repr), st.text(max_size=5))
# every example rewrites the same files; a busy disk is no failure
reusing_tmp_path = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@reusing_tmp_path
@given(st.lists(st.tuples(names, numbers, st.sampled_from(['train', 'test', 'val', 'Train'])), max_size=6),
       st.booleans(), st.binary(max_size=3))
def test_any_csv_loads_or_gives_a_data_error(tmp_path, rows, with_split, tail):
    draw(tmp_path / 'pics', 4)
    width = 3 if with_split else 2
    path = tmp_path / 'fuzz.csv'
    with open(path, 'w', newline='', encoding='utf-8', errors='surrogatepass') as file:
        csv.writer(file).writerows([('image', 'r', 'split')[:width], *(row[:width] for row in rows)])
    with open(path, 'ab') as file:
        file.write(tail)
    message = f'{path}: '
    try:
        assert load_csv(path, ('r',), (1, 7)).target.names == ('r',)
    except DataError as e:
        message = str(e)
    assert message.startswith((f'{path}: ', f'{path}, line '))


@reusing_tmp_path
@given(st.lists(st.tuples(st.floats(1, 7), st.sampled_from(['train', 'test', 'val'])), min_size=3, max_size=8),
       st.booleans())
def test_well_formed_csv_round_trips(tmp_path, rows, with_split):
    rows[:3] = [(rating, 'train') for rating, _ in rows[:3]]
    draw(tmp_path / 'pics', 8)
    path = tmp_path / 'trip.csv'
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows([('image', 'r', 'split')[:2 + with_split],
                                    *((f'pics/{i}.png', *row)[:2 + with_split] for i, row in enumerate(rows))])
    splits = load_csv(path, ('r',), (1, 7))
    assert sum(sizes(splits)) == len(rows)
    for name, part in (('train', splits.train), ('val', splits.validation), ('test', splits.test)):
        for image, rating in zip(part.images, part.targets, strict=True):
            expected, wanted = rows[int(image.stem)]
            assert np.isclose(splits.target.denormalise(rating).item(), expected, atol=1e-5)
            assert not with_split or wanted in (name, 'train')  # a part that no row names is cut from train
