"""Look at what a model answers: its affect response, its two responses and their balance, as a picture and as numbers.

    python -m timm_emoreg.look IMAGE... --model emoreg_resnet18.emoji -o look.png        a row per image
    python -m timm_emoreg.look IMAGE... --checkpoint output/RUN -o look.png
    python -m timm_emoreg.look --dataset cifar10 --checkpoint output/RUN -o look.png     the test part of a data set

For images: the affective state e, the softmax of both responses and of y = (1 - r) z + r z', the balance r, and where
the affect response looks. For a data set: the mean affective state of each class, the balance, and the images whose
answer changes when regulation is switched on. The numbers are printed as JSON, one line per image, or one for the set.

"Without regulation" is the response z of the same model, which was trained together with the other one: for what a
plain network would have answered, train one (train.py --task plain).
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..answers import answer, check_device, describe_image, describe_set
from ..data import DataError, ImageSet, Target, load_target
from ..data.sets import read_picture
from ..trained import Trained, check_classes, need_affect, released_model, trained_model
from ..training.checkpoint import CheckpointError
from ..weights import WeightError
from .image_picture import draw_images
from .set_picture import draw_set

__all__ = ['main']

MOST_IMAGES = 64  # rows of one picture


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m timm_emoreg.look', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='*', type=Path, metavar='IMAGE')
    parser.add_argument('--model', metavar='NAME',
                        help='a released weight with its tag, local-dir:FOLDER or hf-hub:OWNER/NAME')
    parser.add_argument('--checkpoint', metavar='RUN', help='folder of a run of train.py, or one of its checkpoints')
    parser.add_argument('--experience', metavar='PATH-or-tag', help="that run's stage 1, where it lies elsewhere now")
    parser.add_argument('--dataset', help='cifar10, cifar100, emoji, oasis, or a folder per class')
    parser.add_argument('--data-dir', help='data sets (default: the one of the run, $EMOREG_DATA)')
    parser.add_argument('--limit', type=int, metavar='N', help='at most N images of the test part, evenly spread')
    parser.add_argument('-o', '--output', type=Path, default=Path('look.png'), help='the PNG (default: look.png)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser


def _check(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.checkpoint is None):
        raise DataError('Give either --model NAME, a released weight, or --checkpoint RUN, a run of train.py.')
    if bool(args.images) == (args.dataset is not None):
        raise DataError('Give either images, or --dataset with the name of one set.')
    if len(args.images) > MOST_IMAGES:
        raise DataError(f'{len(args.images)} images are too many rows for one picture. Give at most {MOST_IMAGES}, or '
                        'look at a folder per class with --dataset.')
    if args.limit is not None and (args.dataset is None or args.limit < 1):
        raise DataError(f'--limit {args.limit}: expected 1 or more, and only with --dataset.')
    if args.output.suffix.lower() != '.png':
        raise DataError(f'-o {args.output}: the picture is a PNG. Give a name that ends with .png.')
    if not args.output.parent.is_dir():
        raise DataError(f'-o {args.output}: there is no folder {args.output.parent}. Make it, or choose another.')
    check_device(args.device)
    for path in args.images:
        if path.is_dir():
            raise DataError(f'{path}: is a folder. Give its images, or a set with a folder per class by --dataset.')
        if not path.is_file():
            raise DataError(f'{path}: there is no such image. Correct the path.')


def _open(path: Path):
    try:
        picture = read_picture(path)
    except DataError:
        raise DataError(f'{path}: is not an image that can be read. Give PNG, JPEG, WebP or the like, with 8 or 16 '
                        'bits per channel.') from None
    picture.thumbnail((400, 400))  # it will be drawn at half of that
    return picture


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise DataError(f'-o {path}: cannot be written ({e.strerror}). Choose another folder, or make room.') from e


def _say(numbers: dict) -> None:
    text = json.dumps(numbers, ensure_ascii=False)
    print(text.encode('utf-8', 'replace').decode())  # names of files and folders may hold bytes that are no text


def _look_at_images(args: argparse.Namespace, trained: Trained, pictures: list) -> None:
    images = ImageSet(args.images, torch.zeros(len(args.images), dtype=torch.long), Target('class', ('unknown',)))
    answers, slopes = answer(trained, images, args.device, gradient=True)
    names = [path.name for path in args.images]
    if len(set(names)) < len(names):  # with a folder per class, the same names come again in each
        names = [f'{path.absolute().parent.name}/{path.name}' for path in args.images]
    with _writing(args.output):
        draw_images(trained, names, pictures, answers, slopes, args.output)
    for i, path in enumerate(args.images):
        _say({'image': str(path), **describe_image(trained, answers, i)})


def _look_at_set(args: argparse.Namespace, trained: Trained) -> None:
    splits = load_target(args.dataset, args.data_dir or trained.data_dir)
    names = splits.target.names
    check_classes(trained, names, f'--dataset {args.dataset}')
    images = splits.test
    if args.limit is not None and args.limit < len(images):
        images = images.subset(torch.linspace(0, len(images) - 1, args.limit).round().long())
    answers, _ = answer(trained, images, args.device)
    with _writing(args.output):
        draw_set(trained, splits.name, images, answers, args.output)
    _say({'dataset': splits.name, 'part': 'test', **describe_set(trained, answers, images.targets, names)})


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if the picture is drawn, 2 if something given cannot be used."""
    args = _parser().parse_args(argv)
    try:
        _check(args)
        pictures = [_open(path) for path in args.images]
        trained = (released_model(args.model) if args.model is not None else
                   need_affect(trained_model(args.checkpoint, args.experience)))
        if args.images:
            _look_at_images(args, trained, pictures)
        else:
            _look_at_set(args, trained)
    except (DataError, CheckpointError, WeightError, OSError) as e:
        print(f'look: {e}', file=sys.stderr)
        return 2
    return 0
