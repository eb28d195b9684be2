"""python -m timm_emoreg.look: what is printed, what is drawn, what is refused."""
import dataclasses
import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from timm.models import save_for_hf

import timm_emoreg  # noqa: F401  registers the models
from timm_emoreg.answers import answer, changed_answers, describe_set
from timm_emoreg.data import ImageSet, Target, load_target
from timm_emoreg.drawing import short
from timm_emoreg.look.command import main
from timm_emoreg.look.image_picture import draw_images
from timm_emoreg.look.set_picture import draw_set
from timm_emoreg.trained import Trained, released_model

WEIGHT = 'emoreg_vit_tiny.emoji'
EMOTIONS = ('neutral', 'happiness', 'surprise', 'a very long name of an emotion')
CLASSES = ('cat', 'Smileys and every other emotion of the list', 'Animals $ Nature_$2', 'dog', 'cow', 'bee', 'ape')


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / 'picture.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def build(names, kind, classes=CLASSES, balance=0.5):
    torch.manual_seed(0)
    model = timm.create_model('emoreg', backbone='test_resnet', num_classes=len(classes), num_affect=len(names),
                              affect_kind=kind, balance=balance).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # random answers that differ from image to image
            if name.startswith(('head', 'modulation', 'regulation')):
                parameter.normal_(std=0.5)
    return Trained(f'output/{"a long name of a run, " * 6}', model, (32, 32), names, classes)


def images(n):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return ImageSet(pixels, torch.arange(n) % len(CLASSES), Target('class', CLASSES))


def check_picture(path, figure):
    """A whole PNG that shows something, and texts of which no two lie on each other or leave the picture."""
    with Image.open(path) as png:
        assert png.format == 'PNG'
        pixels = np.asarray(png.convert('L'), dtype=float)
    assert pixels.std() > 10
    assert not list(path.parent.glob('*.part'))
    renderer = FigureCanvasAgg(figure).get_renderer()
    # what matplotlib keeps of an axis that is off, and of ticks beyond its limits, is not drawn
    hidden = set()
    for axes in figure.findobj(Axes):
        for axis in (axes.xaxis, axes.yaxis):
            drawn = {t for tick in axis._update_ticks() for t in tick.findobj(Text)} | {axis.label, axis.offsetText}
            hidden |= set(axis.findobj(Text)) - (drawn if axes.axison else set())
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in shown]
    height, width = pixels.shape
    for text, box in boxes:
        assert box.x0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y0 >= -1, text
        assert box.y1 <= height + 1, text
    for (a, one), (b, other) in itertools.combinations(boxes, 2):
        over_x = min(one.x1, other.x1) - max(one.x0, other.x0)
        over_y = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert over_x < 1 or over_y < 1, f'{a!r} lies on {b!r}'
    return {text for text, _ in boxes}


@pytest.mark.parametrize('classes', [CLASSES, (), ('cat', 'dog')])
@pytest.mark.parametrize(('names', 'kind'), [
    (EMOTIONS, 'emotion'), (('valence',), 'ratings'), (('valence', 'arousal'), 'ratings'),
    (('valence', 'arousal', 'dominance'), 'ratings')])
def test_images_are_drawn(tmp_path, figures, names, kind, classes):
    trained, shown = build(names, kind, classes), images(2)
    answers, slopes = answer(trained, shown, gradient=True)
    path = tmp_path / 'out.png'
    draw_images(trained, ['one.png', 'a very long $ name of an image file.png'], [shown.picture(i) for i in range(2)],
                answers, slopes, path)
    texts = check_picture(path, figures[0])
    rows = np.reshape(figures[0].axes, (3, 5 if classes else 3))  # one of headings and two of images
    for row, slope in zip(rows[1:], slopes, strict=True):
        assert np.allclose(row[-1].images[1].get_array()[..., 3], 0.85 * slope.numpy())
    assert not torch.allclose(*slopes, atol=0.1)
    if kind == 'emotion':
        assert {'neutral', f'{answers.state[0, 0]:.2f}'} <= texts
    else:
        assert f'valence {answers.state[0, 0]:+.2f}' in texts
    if classes:
        best = short(classes[answers.regulated[0].argmax()], 20)
        assert any(text.startswith(f'answer: {best}') for text in texts)
        assert any(text.startswith("z', emotional") for text in texts)
        changed = answers.non_emotional.argmax(dim=1) != answers.regulated.argmax(dim=1)
        assert any(', without regulation: ' in text for text in texts) == changed.any()


def test_of_many_emotions_the_strongest_are_drawn(tmp_path, figures):
    trained, shown = build(tuple(f'emotion {i}' for i in range(28)), 'emotion', ()), images(1)
    answers, slopes = answer(trained, shown, gradient=True)
    draw_images(trained, ['one.png'], [shown.picture(0)], answers, slopes, tmp_path / 'out.png')
    texts = check_picture(tmp_path / 'out.png', figures[0])
    assert 'the strongest 12 of 28' in texts
    assert f'emotion {answers.state[0].argmax()}' in texts


def test_of_many_ratings_the_strongest_are_drawn(tmp_path, figures):
    names = tuple(f'rating {i}' for i in range(9))
    trained, shown = build(names, 'ratings', ()), images(1)
    answers, slopes = answer(trained, shown, gradient=True)
    draw_images(trained, ['one.png'], [shown.picture(0)], answers, slopes, tmp_path / 'out.png')
    texts = check_picture(tmp_path / 'out.png', figures[0])
    assert 'the strongest 5 of 9' in texts
    strongest = answers.state[0].abs().argmax()
    assert f'rating {strongest} {answers.state[0, strongest]:+.2f}' in texts


def test_a_file_name_that_is_no_text_can_be_drawn():
    assert short('\udcff.png', 20) == '?.png'


def test_more_images_make_a_longer_picture(tmp_path, figures):
    trained = build(('valence',), 'ratings', ())
    heights = []
    for n in (1, 12):
        answers, slopes = answer(trained, images(n), gradient=True)
        draw_images(trained, ['a'] * n, [images(n).picture(i) for i in range(n)], answers, slopes, tmp_path / 'o.png')
        heights.append(figures[-1].get_size_inches()[1])
        check_picture(tmp_path / 'o.png', figures[-1])
    assert heights[1] > 6 * heights[0]


@pytest.mark.parametrize(('names', 'kind', 'classes', 'balance'), [
    (EMOTIONS, 'emotion', CLASSES, 'gate'), (('valence', 'arousal'), 'ratings', CLASSES, 'learned'),
    (('valence',), 'ratings', CLASSES, 0.0), (EMOTIONS, 'emotion', (), 0.5)])
def test_a_set_is_drawn(tmp_path, figures, names, kind, classes, balance):
    trained, shown = build(names, kind, classes, balance), images(40)
    answers, _ = answer(trained, shown)
    draw_set(trained, 'a set', shown, answers, tmp_path / 'out.png')
    texts = check_picture(tmp_path / 'out.png', figures[0])
    mean = torch.stack([answers.state[shown.targets == c].mean(0) for c in range(7)])
    differences = (mean - mean.mean(0)).flatten()
    digits = 3 if differences.abs().max() < 0.1 else 2
    assert {f'{round(v, digits) + 0:+.{digits}f}' for v in differences.tolist()} <= texts
    assert {'affective state', 'class of the images'} <= texts
    noise = max(2 * describe_set(trained, answers, shown.targets, shown.target.names)['largest_standard_error'], 0.01)
    assert any('hardly tells them apart' in text for text in texts) == (differences.abs().max() < noise)
    if classes:
        changed = (answers.non_emotional.argmax(1) != answers.regulated.argmax(1)).sum()
        assert changed == 0 if balance == 0 else changed > 0
        assert f'y and z disagree: {changed} of 40' in texts
        changes = changed_answers(answers.non_emotional, answers.regulated, shown.targets)
        for kind, marks in (('repaired', '✗✓'), ('broken', '✓✗'), ('neither', '✗✗')):
            for i in getattr(changes, kind)[:8].tolist():  # as many as there is room for
                z, y, true = (short(CLASSES[c], 13) for c in (
                    answers.non_emotional[i].argmax(), answers.regulated[i].argmax(), shown.targets[i]))
                assert f'z {z} {marks[0]}\ny {y} {marks[1]}' + f'\nis {true}' * (kind == 'neither') in texts
        assert any(text.startswith(f'balance r, {"a gate" if balance == "gate" else trained.model.regulation.kind}')
                   for text in texts)


@pytest.mark.parametrize(('step', 'most'), [(0.0001, '0.0003'), (0.00015, '0.00045')])  # 3 steps, and no less
def test_a_state_that_is_the_same_everywhere_is_said_to_be(tmp_path, figures, step, most):
    trained, shown = build(EMOTIONS, 'emotion'), images(14)
    answers, _ = answer(trained, shown)
    state = answers.state.mean(dim=0) + torch.tensor([step, -step, 0, 0]) * (shown.targets[:, None] - 3)
    draw_set(trained, 'a set', shown, dataclasses.replace(answers, state=state), tmp_path / 'out.png')
    texts = check_picture(tmp_path / 'out.png', figures[0])
    assert any(f'no class is further from the mean than {most}: the state hardly tells them apart' in t for t in texts)
    assert '+0.000' not in texts  # numbers that all are 0 would say nothing


def test_pictures_of_the_same_name_are_told_apart_by_their_folders(tmp_path, picture, figures, capsys):
    for name in ('sea', 'sky'):
        (tmp_path / name).mkdir()
        shutil.copyfile(picture, tmp_path / name / '0.png')
    paths = [str(tmp_path / name / '0.png') for name in ('sea', 'sky')]
    assert main([*paths, '--model', WEIGHT, '-o', str(tmp_path / 'out.png')]) == 0
    assert {'sea/0.png', 'sky/0.png'} <= check_picture(tmp_path / 'out.png', figures[0])


def test_the_command_looks_at_images(tmp_path, picture, capsys):
    other = tmp_path / 'grey.jpg'
    Image.new('L', (500, 200), 90).save(other)
    out = tmp_path / 'out.png'
    assert main([str(picture), str(other), '--model', WEIGHT, '-o', str(out)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line['image'] for line in lines] == [str(picture), str(other)]
    model = timm.create_model(WEIGHT, pretrained=True).eval()
    x = torch.full((1, 3, 32, 32), 90 / 255)
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ('mean', 'std'))
    with torch.no_grad():
        valence = model.forward_affect((x - mean) / std).item()
    assert lines[1]['affect_response']['valence'] == pytest.approx(valence, abs=1e-3)
    assert Image.open(out).size[1] > 300


@pytest.fixture
def classifier(tmp_path):
    """The folder of a classifier of two classes, and a data set that fits it: the name of the set is the folder's."""
    model = timm.create_model('emoreg', backbone='test_resnet', num_classes=2, balance='gate')
    save_for_hf(model, tmp_path / 'model', model_config={'label_names': ['dark', 'light']}, safe_serialization=True)
    for name, value in (('dark', 40), ('light', 200)):
        (tmp_path / 'set' / name).mkdir(parents=True)
        for i in range(40):
            Image.new('RGB', (32, 32), (value, value + i, value)).save(tmp_path / 'set' / name / f'{i}.png')
    return f'local-dir:{tmp_path}/model'


def test_the_command_looks_at_a_set(tmp_path, classifier, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr('timm_emoreg.look.command.answer', lambda trained, images, *more: (
        seen.append(images.images) or answer(trained, images, *more)))
    flags = ['--dataset', str(tmp_path / 'set'), '--model', classifier, '-o', str(tmp_path / 'out.png')]
    assert main(flags) == 0
    whole = json.loads(capsys.readouterr().out)
    assert seen == [load_target(str(tmp_path / 'set')).test.images]  # as many as those of validation, but others
    assert (whole['dataset'], whole['part'], whole['images']) == ('set', 'test', 8)
    assert set(whole['affective_state']) == {'dark', 'light'}
    assert main([*flags, '--limit', '2']) == 0  # of each class one: the parts are sorted by class
    part = json.loads(capsys.readouterr().out)
    assert (part['images'], set(part['affective_state'])) == (2, {'dark', 'light'})
    assert part['largest_standard_error'] is None


def test_classes_whose_names_are_no_text_are_printed(tmp_path, classifier, monkeypatch):
    try:
        (tmp_path / 'set/dark').rename(tmp_path / 'set' / os.fsdecode(b'd\xe9'))
    except OSError:
        pytest.skip('the file system takes no such names')
    trained = dataclasses.replace(released_model(classifier), label_names=(os.fsdecode(b'd\xe9'), 'light'))
    monkeypatch.setattr('timm_emoreg.look.command.released_model', lambda _: trained)
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='utf-8'))
    for what in (('--dataset', str(tmp_path / 'set')), (str(tmp_path / 'set/light/0.png'),)):
        assert main([*what, '--model', classifier, '-o', str(tmp_path / 'out.png')]) == 0
    sys.stdout.seek(0)
    whole, one = map(json.loads, sys.stdout)
    assert set(whole['affective_state']) == {'d?', 'light'}
    assert one['image'].endswith('light/0.png')


def test_a_model_of_other_classes_is_refused(tmp_path, classifier, capsys):
    (tmp_path / 'set/light').rename(tmp_path / 'set/bright')
    assert main(['--dataset', str(tmp_path / 'set'), '--model', classifier, '-o', str(tmp_path / 'out.png')]) == 2
    err = capsys.readouterr().err
    assert ': 2 classes (bright, dark), where ' in err
    assert 'answers with 2 others (dark, light). Give the set that it was trained on by --dataset.' in err
    assert not (tmp_path / 'out.png').exists()


@pytest.mark.parametrize(('argv', 'message'), [
    (['PICTURE'], 'Give either --model NAME, a released weight, or --checkpoint RUN'),
    (['PICTURE', '--model', WEIGHT, '--checkpoint', 'x'], 'Give either --model NAME, a released weight, or'),
    (['--model', WEIGHT], 'Give either images, or --dataset with the name of one set.'),
    (['PICTURE', '--dataset', 'emoji', '--model', WEIGHT], 'Give either images, or --dataset'),
    (['nowhere.png', '--model', WEIGHT], 'nowhere.png: there is no such image. Correct the path.'),
    (['FOLDER', '--model', WEIGHT], 'is a folder. Give its images, or a set with a folder per class by --dataset.'),
    (['TEXT', '--model', WEIGHT], 'notes.txt: is not an image that can be read.'),
    (['PICTURE', '--model', 'emoreg_vit_tiny.emojy'], "Did you mean 'emoreg_vit_tiny.emoji'?"),
    (['PICTURE', '--model', 'resnet18'], 'resnet18 has no affect response'),
    (['PICTURE', '--checkpoint', 'nowhere'], 'nowhere: there is no such checkpoint. Give the folder of a run'),
    (['PICTURE', '--model', WEIGHT, '-o', 'nowhere/out.png'], '-o nowhere/out.png: there is no folder nowhere.'),
    (['PICTURE', '--model', WEIGHT, '-o', 'out.jpg'], '-o out.jpg: the picture is a PNG.'),
    (['PICTURE', '--model', WEIGHT, '--limit', '3'], '--limit 3: expected 1 or more, and only with --dataset.'),
    (['--dataset', 'emoji', '--model', WEIGHT, '--limit', '0'], '--limit 0: expected 1 or more'),
    (['--dataset', 'emojy', '--model', WEIGHT], "data set 'emojy' is unknown"),
    ([*['PICTURE'] * 65, '--model', WEIGHT], '65 images are too many rows for one picture. Give at most 64'),
    (['PICTURE', '--model', WEIGHT, '--device', 'meta'], '--device meta: torch cannot compute there ('),
    (['PICTURE', '--model', WEIGHT, '--device', 'gpu'], '--device gpu: torch cannot compute there (Expected one of'),
])
def test_what_does_not_fit_is_refused(tmp_path, picture, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'notes.txt').write_text('no picture')
    places = {'PICTURE': picture.name, 'FOLDER': str(tmp_path), 'TEXT': 'notes.txt'}
    assert main([places.get(a, a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('look: ')
    assert err.count('\n') == 1
    assert message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['notes.txt', 'picture.png']


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, picture, monkeypatch, capsys):
    def full(self, path, **kwargs):
        Path(path).write_bytes(b'half a picture')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Figure, 'savefig', full)
    assert main([str(picture), '--model', WEIGHT, '-o', str(tmp_path / 'out.png')]) == 2
    assert capsys.readouterr().err == (f'look: -o {tmp_path / "out.png"}: cannot be written (No space left on device). '
                                       'Choose another folder, or make room.\n')
    assert [p.name for p in tmp_path.iterdir()] == ['picture.png']
