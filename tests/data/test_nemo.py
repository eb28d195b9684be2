from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from timm_emoreg.data.nemo import EMOTIONS, load_nemo
from timm_emoreg.data.sets import DataError

SPEAKERS = ('EB0', 'IC0', 'KD0', 'KS0', 'MK0', 'MP0', 'SM0', 'TP0', 'WR0')


def write(tmp_path, speakers=SPEAKERS, replace=('', '')):
    folder = tmp_path / 'nemo'
    folder.mkdir()
    with open(folder / 'metadata.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['file', 'emotion', 'speaker'])
        for i, speaker in enumerate(speakers):
            for j, emotion in enumerate(EMOTIONS):
                name = f'{speaker}_{emotion}_1.png'
                Image.fromarray(np.full((64, 64), 10 * i + j, np.uint8)).save(folder / name)
                writer.writerow([name, emotion, speaker])
    text = (folder / 'metadata.csv').read_text()
    (folder / 'metadata.csv').write_text(text.replace(*replace, 1))
    return tmp_path


def test_emotions_are_split_by_speaker(tmp_path):
    splits = load_nemo(write(tmp_path))
    assert splits.target.names == EMOTIONS
    assert not splits.flip_safe  # mirrored, it is speech backwards
    for part, expected in ((splits.train, range(6)), (splits.validation, [6]), (splits.test, [7, 8])):
        assert part.images.shape[1:] == (64, 64)
        values = part.images[:, 0, 0].tolist()
        assert values == [10 * i + j for i in expected for j in range(6)]
        assert part.targets.tolist() == [value % 10 for value in values]


def test_speakers_are_in_every_part_and_nobody_of_the_emotions_evaluation(tmp_path):
    splits = load_nemo(write(tmp_path), 'speaker')
    assert splits.target.names == SPEAKERS[:6]
    clips = []
    assert splits.validation.images[:, 0, 0].tolist() == [2, 10, 21, 33, 45, 52]  # as published numbers were made
    assert splits.test.images[:, 0, 0].tolist() == [5, 11, 23, 35, 42, 53]
    for part, count in ((splits.train, 4), (splits.validation, 1), (splits.test, 1)):
        values = part.images[:, 0, 0]
        assert part.targets.tolist() == (values // 10).tolist()
        assert np.bincount(part.targets).tolist() == [count] * 6
        clips += values.tolist()
    assert sorted(clips) == [10 * i + j for i in range(6) for j in range(6)]


@pytest.mark.parametrize(('replace', 'message'), [
    ((',fear,', ',feer,'), r"metadata\.csv, line 3: emotion 'feer' is unknown.*Did you mean 'fear'"),
    (('EB0_fear_1', 'EB0_fear_2'), r"metadata\.csv, line 3: there is no image file 'EB0_fear_2\.png'"),
    (('speaker', 'voice'), r"line 1: column 'speaker' is unknown\. Known: 'file', 'emotion', 'voice'"),
])
def test_damaged_tables_are_refused(tmp_path, replace, message):
    with pytest.raises(DataError, match=message):
        load_nemo(write(tmp_path, replace=replace))


def test_absent_speakers(tmp_path):
    with pytest.raises(DataError, match="nemo: the part 'validation' holds no image"):
        load_nemo(write(tmp_path, speakers=('EB0', 'WR0')))


def test_absent_set_and_unknown_labels(tmp_path):
    with pytest.raises(DataError, match=r"the set 'nemo' is not there\. Expected .*metadata\.csv.*Christop.*"
                                        r'--data-dir.*--stimuli emoji'):
        load_nemo(tmp_path)
    with pytest.raises(DataError, match=r"labels 'speakers' is unknown.*Did you mean 'speaker'"):
        load_nemo(tmp_path, 'speakers')
