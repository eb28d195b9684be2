from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from timm_emoreg.data import DataError, ImageSet, Splits, Target, check_stimuli, load_stimuli, stimuli_parts
from timm_emoreg.data.controls import predict_rotation, shuffle_labels
from timm_emoreg.data.loader import make_loader
from timm_emoreg.data.together import show_together


def splits(name, target, targets, size=(8, 8), shade=0, licence='none', flip_safe=True) -> Splits:
    """Three parts of pictures in one shade, but for the pixel that tells their part."""
    parts = []
    for number in range(3):
        images = np.full((len(targets), *size), shade, np.uint8)
        images[:, 1, 1] = number
        parts.append(ImageSet(images, torch.tensor(targets), target))
    return Splits(name, *parts, licence, flip_safe)


FACES = splits('faces', Target('class', ('neutral', 'surprise', 'anger')), [0, 1, 2, 1], shade=10, licence='a')
VOICES = splits('voices', Target('class', ('Angry', 'surprised', 'boredom')), [2, 0, 1], (6, 6, 3), 20, 'b', False)
SCENES = splits('scenes', Target('ratings', ('valence', 'arousal'), 1, 7), [[0.5, -0.25], [-1.0, 1.0]], (12, 16, 3), 30)
SIGNS = splits('signs', Target('ratings', ('dominance', 'valence')), [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], shade=40)


def test_emotions_of_the_same_meaning_become_one_class():
    both = show_together([FACES, VOICES])
    assert (both.name, both.licence, both.flip_safe) == ('faces+voices', 'a; b', False)
    assert both.target == Target('class', ('neutral', 'surprise', 'anger', 'boredom'))
    for part in (both.train, both.validation, both.test):
        assert part.targets.tolist() == [0, 1, 2, 1, 3, 2, 1]
        assert [np.array(part.picture(i))[0, 0, 0] for i in range(7)] == [10] * 4 + [20] * 3
    assert show_together([FACES, FACES]).flip_safe


def test_of_ratings_the_common_ones_are_kept():
    both = show_together([SCENES, SIGNS])
    assert both.target == Target('ratings', ('valence',))
    assert both.train.targets.flatten().tolist() == pytest.approx([0.5, -1.0, 0.2, 0.4, 0.6])


@pytest.mark.parametrize(('sets', 'message'), [
    ([FACES, SCENES], r'labels of different kinds \(faces: class: neutral, surprise, anger; scenes: ratings: valence, '
                      r'arousal\)\. Show together emotions with emotions \(ferplus, nemo, folders\)'),
    ([SCENES, splits('joy', Target('ratings', ('joy',)), [[0.1]])],
     r'no rating in common \(scenes: ratings: valence, arousal; joy: ratings: joy\)\. Rename the columns'),
])
def test_labels_that_do_not_go_together_are_refused(sets, message):
    with pytest.raises(DataError, match=message):
        show_together(sets)


@pytest.mark.parametrize('kind', ['resident', 'timm'])
@pytest.mark.parametrize('sets', [(FACES, VOICES), (FACES, FACES)])
def test_pictures_of_several_sizes_make_batches_of_one(sets, kind):
    both = show_together(sets)
    loader = make_loader(both.train, (8, 8), 4, {'mean': (0.0,) * 3, 'std': (1.0,) * 3}, kind=kind, workers=0)
    images, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert images.shape == (len(both.train), 3, 8, 8)
    assert targets.tolist() == both.train.targets.tolist()
    shades = [one.train.images.flat[0] for one in sets for _ in range(len(one.train))]
    assert (images[:, 0, 4, 4] * 255).round().tolist() == shades


def test_a_picture_of_an_evaluation_part_is_in_no_earlier_part(caplog):
    def one(name, *shades):
        sizes = {('b', 3): (4, 16)}  # as many pixels, and another picture
        parts = [ImageSet([np.full(sizes.get((name, shade), (8, 8)), shade, np.uint8) for shade in part],
                          torch.zeros(len(part)).long(), Target('class', ('joy',))) for part in shades]
        return Splits(name, *parts, 'none')

    both = show_together([one('a', [1, 2, 3], [4, 5], [6]), one('b', [4, 6, 7], [1, 6, 8], [2, 9, 3])])
    assert [[int(np.array(part.picture(i))[0, 0, 0]) for i in range(len(part))]
            for part in (both.train, both.validation, both.test)] == [[3, 7], [4, 5, 1, 8], [6, 2, 9, 3]]
    assert caplog.messages == ['a+b: left out 4 training and 1 validation pictures that are exact copies of evaluation '
                               'pictures.']
    assert caplog.records[0].levelname == 'WARNING'  # which is printed where nobody has set up logging


def test_things_of_several_sets_stay_apart():
    part = SIGNS.train
    grouped = ImageSet(part.images, part.targets, part.target, torch.tensor([3, 3, 0]))
    both = show_together([SCENES, Splits('signs', SIGNS.train, SIGNS.validation, grouped, 'none')])
    groups = both.test.groups.tolist()
    assert both.train.groups is None
    assert groups[2] == groups[3]
    assert len({*groups}) == 4
    assert show_together([FACES, VOICES]).test.groups is None


def test_controls_of_several_sets():
    both = show_together([FACES, VOICES])
    shuffled = shuffle_labels(both, seed=0).train
    assert sorted(shuffled.targets.tolist()) == sorted(both.train.targets.tolist())
    turned = predict_rotation(both, seed=0)
    assert turned.train.pixels((8, 8)).shape == (7, 3, 8, 8)
    assert len(turned.target) == 4
    assert not turned.flip_safe


def write_folder(root, names, blue=0):
    for red, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for green in range(4):
            Image.new('RGB', (4, 4), (red, green, blue)).save(root / name / f'{green}.png')
    return root


def test_several_sets_by_name(tmp_path):
    a, b = write_folder(tmp_path / 'a', ('happy', 'sad')), write_folder(tmp_path / 'b', ('Happiness', 'fear'), 1)
    both = load_stimuli(f'{a}+{b}')
    assert both.target.names == ('happiness', 'sadness', 'fear')
    assert len(both.train) == 8
    table = tmp_path / 'r.csv'
    table.write_text('image,valence,dominance\n' + ''.join(f'a/happy/{i}.png,{i},1\n' for i in range(4)))
    felt = load_stimuli(f'emoji+{table}', rating_columns=['valence', 'dominance'], rating_scale=(0, 4))
    assert (felt.name, felt.target.names) == ('emoji+r', ('valence',))
    assert len(felt.train) == len(load_stimuli('emoji').train) + 2


def test_an_existing_path_with_a_plus_is_one_set(tmp_path):
    folder = str(write_folder(tmp_path / 'joy+fear', ('joy', 'fear')))
    assert stimuli_parts(folder) == (folder,)
    assert load_stimuli(folder).target.names == ('fear', 'joy')
    assert stimuli_parts('ferplus+nemo') == ('ferplus', 'nemo')
    assert stimuli_parts(f'{folder}+nemo+{folder}') == (folder, 'nemo', folder)
    (tmp_path / 'joy+fear+nemo').mkdir()
    assert stimuli_parts(f'{folder}+nemo+emoji') == (f'{folder}+nemo', 'emoji')  # the longest that is there
    assert stimuli_parts(f'nemo+{folder}x') == ('nemo', f'{tmp_path}/joy', 'fearx')  # nothing there of that name


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('emoji+emoji', {}, r'emoji\+emoji: a set is named twice\. Name each once'),
    ('emoji+oasys', {}, r"stimuli 'oasys' is unknown\..* Did you mean 'oasis'\?"),
    ('emoji+oasis', {'labels': 'category'}, r"emoji\+oasis: the labels 'category' cannot be chosen for several sets"),
    ('emoji+oasis', {'rating_columns': ['v']}, r'emoji\+oasis: rating_columns and rating_scale belong to a csv file'),
    ('nemo+oasis', {}, r'labels of different kinds \(nemo: class; oasis: ratings\)\. Show together emotions with emot'),
])
def test_several_sets_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(DataError, match=message):
        load_stimuli(name, **options)


def test_sets_of_one_kind_are_not_refused_by_their_names(tmp_path):
    table = tmp_path / 'r.csv'
    table.touch()
    for name in ('emoji+oasis', 'ferplus+nemo', f'ferplus+{tmp_path}'):
        check_stimuli(name)
    check_stimuli(f'oasis+{table}', rating_columns=['valence'], rating_scale=(0, 4))
