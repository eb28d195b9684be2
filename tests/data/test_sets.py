from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_emoreg.data.sets import DataError, ImageSet, Splits, Target, read_picture

AB = Target('class', ('a', 'b'))


def colour_set(count=4):
    images = np.arange(count * 5 * 6 * 3, dtype=np.int64).astype(np.uint8).reshape(count, 5, 6, 3)
    return ImageSet(images, torch.arange(count) % 2, AB)


def test_ratings_map_to_plus_minus_one_and_back():
    target = Target('ratings', ('valence',), 1, 7)
    published = torch.tensor([[1.0], [4.0], [7.0], [2.5]])
    assert target.normalise(published).flatten().tolist() == [-1, 0, 1, -0.5]
    assert torch.equal(target.denormalise(target.normalise(published)), published)
    assert target.affect_kind == 'ratings'
    assert Target('votes', ('a',)).affect_kind == 'emotion'


@pytest.mark.parametrize(('args', 'message'), [
    (('regression', ('a',)), "'regression' is unknown"),
    (('ratings', ('a',), 3, 3), 'must rise, got 3 to 3'),
])
def test_impossible_targets_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        Target(*args)


def test_images_and_targets_must_fit():
    with pytest.raises(ValueError, match='4 images but 3 targets'):
        ImageSet(np.zeros((4, 2, 2), np.uint8), torch.zeros(3, dtype=torch.long), AB)
    with pytest.raises(ValueError, match=r"'votes' need shape \(4, 2\), got \(4,\)"):
        ImageSet(np.zeros((4, 2, 2), np.uint8), torch.zeros(4), Target('votes', ('a', 'b')))


def test_arrays_and_files_give_the_same_items(tmp_path):
    decoded = colour_set()
    paths = [tmp_path / f'{i}.png' for i in range(4)]
    for path, image in zip(paths, decoded.images, strict=True):
        Image.fromarray(image).save(path)
    files = ImageSet(paths, decoded.targets, AB)
    for i in range(4):
        (one, label), (other, other_label) = decoded[i], files[i]
        assert np.array_equal(np.array(one), np.array(other))
        assert label == other_label == i % 2
        assert type(label) is int
    assert torch.equal(decoded.pixels((5, 6)), files.pixels((5, 6)))
    assert torch.equal(decoded.pixels((5, 6))[3], torch.from_numpy(decoded.images[3]).permute(2, 0, 1))
    assert torch.equal(decoded.subset([3, 1]).pixels((8, 8)), files.subset([3, 1]).pixels((8, 8)))


def test_transform_and_vector_targets():
    data = ImageSet(np.full((1, 2, 2), 7, np.uint8), torch.tensor([[0.25, 0.75]]), Target('votes', ('a', 'b')))
    data.transform = lambda image: image.getpixel((0, 0))
    image, target = data[0]
    assert image == (7, 7, 7)  # grey became RGB
    assert target.tolist() == [0.25, 0.75]


def test_all_unreadable_pictures_are_named_at_once(tmp_path):
    paths = [tmp_path / f'{i}.png' for i in range(12)]
    Image.new('RGB', (4, 4)).save(paths[1])
    data = ImageSet(paths[:4], torch.zeros(4, dtype=torch.long), Target('class', ('a',)))
    with pytest.raises(DataError) as caught:
        data.pixels((2, 2))
    assert str(caught.value) == (f'{paths[0]}: the image is missing. Restore it. Nor can 2 more be read: {paths[2]}, '
                                 f'{paths[3]}.')
    with pytest.raises(DataError, match=r'Nor can 10 more be read: .*10\.png, \.\.\.$'):
        ImageSet(paths, torch.zeros(12, dtype=torch.long), Target('class', ('a',))).pixels((2, 2))
    paths[0].write_text('')
    with pytest.raises(DataError, match=r'0\.png: not a readable image .* Put a readable one in its place\.$'):
        data.subset([0, 1]).pixels((2, 2))


def test_unreadable_pictures_name_the_file(tmp_path):
    with pytest.raises(DataError, match=r'gone\.png: the image is missing\. Restore'):
        read_picture(tmp_path / 'gone.png')
    (tmp_path / 'text.png').write_text('no image')
    with pytest.raises(DataError, match=r'text\.png: not a readable image .* Put a readable one in its place'):
        read_picture(tmp_path / 'text.png')
    Image.new('RGB', (40, 40)).save(tmp_path / 'cut.png')
    whole = (tmp_path / 'cut.png').read_bytes()
    (tmp_path / 'cut.png').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(DataError, match=r'cut\.png: not a readable image'):
        read_picture(tmp_path / 'cut.png')


@pytest.mark.parametrize('suffix', ['png', 'tif', 'pgm'])
def test_grey_of_16_bits_keeps_its_shades(tmp_path, suffix):
    shades = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Image.fromarray(shades).save(tmp_path / f'a.{suffix}')
    assert np.asarray(read_picture(tmp_path / f'a.{suffix}'))[0, :, 1].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_32_bits_a_channel_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((2, 2), dtype)).save(tmp_path / 'a.tif')
    with pytest.raises(DataError, match=r'a\.tif: not a readable image \(mode .* has 32 bits per channel and no'):
        read_picture(tmp_path / 'a.tif')


def test_decoder_errors_of_any_type_become_data_errors(tmp_path, monkeypatch):
    Image.new('RGB', (2, 2)).save(tmp_path / 'a.png')

    def fail(*_):
        raise RuntimeError('reformat failed')  # what damaged AVIF files raise

    monkeypatch.setattr(Image.Image, 'convert', fail)
    with pytest.raises(DataError, match=r'a\.png: not a readable image \(reformat failed\)'):
        read_picture(tmp_path / 'a.png')


def test_that_memory_is_full_is_no_fault_of_a_file(tmp_path, monkeypatch):
    Image.new('RGB', (2, 2)).save(tmp_path / 'a.png')

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, 'convert', fail)
    with pytest.raises(MemoryError):
        read_picture(tmp_path / 'a.png')


def test_splits_summary_and_empty_part():
    data = colour_set()
    splits = Splits('toy', data, data.subset([0]), data.subset([1, 2]), 'free')
    assert splits.summary() == 'toy: 4 train, 1 validation, 2 test images; class: a, b; none in validation: b'
    assert splits.target is AB
    many = ImageSet(data.images, torch.full((4,), 20), Target('class', tuple(f'c{i}' for i in range(21))))
    assert Splits('many', many, many, many, 'free').summary().startswith(
        'many: 4 train, 4 validation, 4 test images; class: c0, c1, c2, c3, c4, 15 more, c20; none in validation: c0, ')
    more = ImageSet(data.images, torch.full((4,), 25), Target('class', tuple(f'c{i}' for i in range(26))))
    assert Splits('more', more, more, more, '').summary().endswith('; none in test: c0, c1, c2, c3, c4, 19 more, c24')
    with pytest.raises(DataError, match="toy: the part 'validation' holds no image"):
        Splits('toy', data, data.subset([]), data, 'free')


def test_a_rating_that_does_not_vary_is_no_judge():
    ratings = torch.tensor([[-1.0, 0.5], [0.0, 0.5], [1.0, 0.0]])
    data = ImageSet(np.zeros((3, 2, 2, 3), np.uint8), ratings, Target('ratings', ('valence', 'arousal'), 1, 9))
    Splits('toy', data, data, data, 'free').check_judges_ratings()
    with pytest.raises(DataError, match=r'^toy: arousal is 7 in all of the test part \(2 images\), and CCC, by which '):
        Splits('toy', data, data, data.subset([0, 1]), 'free').check_judges_ratings()
    with pytest.raises(DataError, match=r'^toy: valence is 1 in all of the validation part \(1 image\), and CCC'):
        Splits('toy', data, data.subset([0]), data, 'free').check_judges_ratings()


def test_a_digest_changes_with_all_that_a_resumed_run_must_find_again():
    def digest(files=('a/0.png', 'a/1.png', 'b/2.png'), targets=(0, 0, 1), names=('a', 'b'), kind='class', parts=None):
        targets = torch.tensor(targets) if kind == 'class' else torch.eye(2)[list(targets)]
        whole = ImageSet([Path('/data', file) for file in files], targets, Target(kind, names))
        return Splits('own', *(whole.subset(part) for part in parts or ([0], [1], [2])), 'free').digest()

    changed = {
        'nothing': digest(), 'a file': digest(files=('a/9.png', 'a/1.png', 'b/2.png')),
        'a folder': digest(files=('b/0.png', 'a/1.png', 'b/2.png')), 'a label': digest(targets=(1, 0, 1)),
        'a label of validation': digest(targets=(0, 1, 1)), 'a label of test': digest(targets=(0, 0, 0)),
        'a name': digest(names=('a', 'c')), 'the kind': digest(kind='votes'),
        'a part': digest(parts=([1], [0], [2])), 'a size': digest(parts=([0, 1], [1], [2]))}
    assert len(set(changed.values())) == len(changed), changed
    assert digest(files=('/elsewhere/data/a/0.png', 'a/1.png', 'b/2.png')) == changed['nothing']  # it may have moved
    decoded = ImageSet(np.zeros((3, 8, 8), np.uint8), torch.tensor([0, 0, 1]), Target('class', ('a', 'b')))
    borders = [Splits('own', *(decoded.subset(part) for part in parts), 'free').digest()
               for parts in (([0, 1], [1], [2]), ([0], [1, 1], [2]))]
    assert len(set(borders)) == 2
