from __future__ import annotations

import csv
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from timm_emoreg.data.ferplus import EMOTIONS, load_ferplus, majority_emotion, vote_distribution
from timm_emoreg.data.sets import DataError

HEADER = ['Usage', 'Image name', *EMOTIONS, 'unknown', 'NF']
FOLDERS = {'Training': 'FER2013Train', 'PublicTest': 'FER2013Valid', 'PrivateTest': 'FER2013Test'}


def votes(**counts):
    return [counts.get(name, 0) for name in HEADER[2:]]


HAPPY, SAD = votes(happiness=9, neutral=1), votes(sadness=6, neutral=4)
# usage, picture (equal numbers are equal pictures), votes, FER2013 label, ambiguous
ROWS = [
    ('Training', 0, HAPPY, 'happy', 0),
    ('Training', 1, SAD, 'sad', 0),
    ('Training', 1, SAD, 'sad', 0),                                  # a copy within train stays
    ('Training', 2, HAPPY, 'happy', 0),                              # a copy of a validation face
    ('Training', 3, HAPPY, 'happy', 0),                              # a copy of a test face
    ('Training', 4, votes(anger=5, fear=5), 'angry', 1),             # no majority
    ('Training', 5, votes(unknown=10), 'fear', 0),                   # neither majority nor distribution
    ('PublicTest', 2, SAD, 'sad', 0),
    ('PublicTest', 3, SAD, 'neutral', 0),                            # a copy of a test face
    ('PublicTest', 6, HAPPY, 'happy', 0),
    ('PrivateTest', 3, HAPPY, 'happy', 0),
    ('PrivateTest', 7, votes(disgust=8, NF=2), 'disgust', 0),
]


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / 'ferplus'
    for name in FOLDERS.values():
        (folder / name).mkdir(parents=True)
    table, labels = [HEADER, ['Training', '', *votes(NF=10)]], [['file', 'label', 'ambiguous']]
    for i, (usage, picture, counts, label, ambiguous) in enumerate(ROWS):
        name = f'fer{i:07d}.png'
        pixels = np.full((48, 48), 10 * picture, np.uint8)
        pixels[0, 0] = picture
        Image.fromarray(pixels).save(folder / FOLDERS[usage] / name)
        table.append([usage, name, *counts])
        labels.append([f'{FOLDERS[usage]}/{name}', label, ambiguous])
    for name, rows in (('fer2013new.csv', table), ('fer2013_labels.csv', labels)):
        with open(folder / name, 'w', newline='') as file:
            csv.writer(file).writerows(rows)
    return tmp_path


def pictures(part):
    return part.images[:, 0, 0].tolist()


@pytest.mark.parametrize(('counts', 'winner'), [
    (votes(neutral=6, anger=4), 0),
    (votes(neutral=5, anger=5), -1),
    (votes(neutral=4, anger=1, fear=1, sadness=1, disgust=1, contempt=1, surprise=1), 0),  # single votes do not count
    (votes(contempt=4, anger=4, fear=2), -1),
    (votes(contempt=6, unknown=4), 7),
    (votes(unknown=6, contempt=4), -1),
    (votes(NF=10), -1),
    (votes(neutral=1, anger=1), -1),
])
def test_majority_rule(counts, winner):
    assert majority_emotion(np.array([counts])).tolist() == [winner]


@pytest.mark.parametrize(('counts', 'shares'), [
    (votes(happiness=10), {'happiness': 1}),
    (votes(happiness=8, anger=2), {'happiness': 1}),                            # 3/4 is covered by the first
    (votes(happiness=6, anger=2, fear=1, sadness=1), {'happiness': 1}),         # exactly 3/4 of what remains
    (votes(happiness=7, anger=3), {'happiness': 0.7, 'anger': 0.3}),
    (votes(anger=5, fear=5), {'anger': 0.5, 'fear': 0.5}),
    (votes(anger=4, fear=2, sadness=2, disgust=2), None),                       # a tie makes four emotions
    (votes(anger=3, fear=3, sadness=2, disgust=2), None),
    (votes(anger=4, unknown=4, fear=2), None),                                  # half of the votes is not enough
    (votes(anger=5, unknown=5), None),
    (votes(anger=6, unknown=4), {'anger': 1}),                                  # 'unknown' ends the taking
    (votes(anger=4, fear=3, NF=3), {'anger': 4 / 7, 'fear': 3 / 7}),
    (votes(unknown=4, anger=3, fear=3), None),
    (votes(anger=6, fear=1, sadness=1, disgust=1, neutral=1), {'anger': 1}),    # single votes do not count
    (votes(anger=1, fear=1), None),
])
def test_distribution_rule(counts, shares):
    expected = [(shares or {}).get(name, 0) for name in EMOTIONS]
    assert vote_distribution(np.array([counts, HAPPY]))[0] == pytest.approx(expected)


def test_majority_labels_parts_and_copies(data_dir, caplog):
    with caplog.at_level(logging.INFO, 'timm_emoreg.data.ferplus'):
        splits = load_ferplus(data_dir)
    assert splits.target.kind == 'class'
    assert splits.target.names == EMOTIONS
    assert pictures(splits.train) == [0, 1, 1]
    assert pictures(splits.validation) == [2, 6]
    assert pictures(splits.test) == [3, 7]
    assert splits.train.targets.tolist() == [1, 3, 3]
    assert splits.validation.targets.tolist() == [3, 1]
    assert splits.test.targets.tolist() == [1, 5]
    assert splits.train.images.shape == (3, 48, 48)
    assert caplog.messages == ['ferplus: left out 2 training and 1 validation faces that are exact copies of '
                               'evaluation faces; of the others, 2 have no majority label.']


def test_probability_labels(data_dir):
    splits = load_ferplus(data_dir, 'probability')
    assert splits.target.kind == 'votes'
    assert pictures(splits.train) == [0, 1, 1, 4]
    assert splits.train.targets.dtype == torch.float32
    assert torch.equal(splits.train.targets.sum(dim=1), torch.ones(4))
    assert splits.train.targets[3].tolist() == [0, 0, 0, 0, 0.5, 0, 0.5, 0]
    assert splits.train.targets[1] == pytest.approx([0.4, 0, 0, 0.6, 0, 0, 0, 0])


def test_fer2013_labels(data_dir):
    splits = load_ferplus(data_dir, 'fer2013')
    assert splits.target.names == ('angry', 'disgust', 'fear', 'happy', 'sad', 'surprise', 'neutral')
    assert pictures(splits.train) == [0, 1, 1, 5]  # picture 4 is ambiguous
    assert splits.train.targets.tolist() == [3, 4, 4, 2]
    assert splits.test.targets.tolist() == [3, 1]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(('labels', 'old', 'new', 'message'), [
    ('majority', 'PublicTest', 'Public', r"fer2013new\.csv, line 10: Usage 'Public' is unknown.*Did you mean 'PublicT"),
    ('majority', ',contempt', ',scorn', r"line 1: column 'contempt' is unknown"),
    ('majority', '0000.png,1,9', '0000.png,1,19', r'new\.csv, line 3: happiness is 19, outside its scale 0 to 10'),
    ('majority', 'fer0000004', 'fer0000099', r"line 7: there is no image file 'FER2013Train/fer0000099\.png' in"),
    ('fer2013', 'happy', 'hapy', r"fer2013_labels\.csv, line 2: label 'hapy' is unknown.*Did you mean 'happy'"),
    ('fer2013', 'FER2013Train/', 'FERTrain/', r"fer2013_labels\.csv, line 2: folder 'FERTrain' is unknown"),
])
def test_damaged_tables_are_refused(data_dir, labels, old, new, message):
    edit(data_dir / 'ferplus' / ('fer2013_labels.csv' if labels == 'fer2013' else 'fer2013new.csv'), old, new)
    with pytest.raises(DataError, match=message):
        load_ferplus(data_dir, labels)


def test_damaged_faces_are_refused(data_dir):
    path = data_dir / 'ferplus' / 'FER2013Valid' / 'fer0000007.png'
    Image.new('L', (64, 48)).save(path)
    with pytest.raises(DataError, match=r'fer0000007\.png: the picture is 64x48, expected 48x48\. Restore'):
        load_ferplus(data_dir)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r'fer0000007\.png: not a readable image'):
        load_ferplus(data_dir)


def test_absent_set_and_unknown_labels(tmp_path):
    with pytest.raises(DataError, match=r"ferplus: the set 'ferplus' is not there\. Expected .*fer2013new\.csv.*"
                                        r'1608\.01041.*--data-dir.*--stimuli emoji') as e:
        load_ferplus(tmp_path)
    assert str(tmp_path) in str(e.value)
    with pytest.raises(DataError, match=r"labels 'major' is unknown.*Did you mean 'majority'"):
        load_ferplus(tmp_path, 'major')
