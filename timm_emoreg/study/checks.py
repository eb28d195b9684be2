"""What a study refuses before its first run: names, numbers of images, and flags that train.py would refuse."""
from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

import timm
import torch

from .. import BACKBONES
from ..answers import check_device
from ..data import STIMULI, TARGETS, DataError, check_stimuli, load_target, stimuli_parts
from ..data.choices import unknown_choice
from ..data.controls import fewer_images
from ..training.settings import SettingsError, check_batch, check_tag, unknown_model
from ..training.train_script import load_parse_args
from .grid import DUAL_HEAD_FLAGS, RESERVED, Ratings, Run, StudyError

__all__ = ['check_flags', 'check_names', 'check_train_images']


def _is_text(path: str) -> bool:
    """Whether a path can be written as UTF-8; a file system takes any bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_names(args: argparse.Namespace) -> None:
    """Refuse names and numbers that nothing has, or that the study decides itself.

    Raises:
        DataError: For a name that is unknown, or stimuli that do not go together.
        StudyError: For all else.
    """
    for model in args.models:
        name, dot, _ = model.partition('.')
        if dot and name in BACKBONES:
            raise StudyError(f'--models {model}: names a weight, and a study trains its own. Give {name}.')
        if not timm.is_model(name):
            raise StudyError(str(unknown_model('--models', model)))
        try:
            check_tag(model)
        except SettingsError as e:
            raise StudyError(str(e)) from None
    stimuli = [part for name in args.stimuli for part in stimuli_parts(name)]
    for what, names, known in (('stimuli', stimuli, STIMULI), ('target', args.targets, TARGETS)):
        for name in names:
            path = os.path.expanduser(name)
            if name not in known and not os.path.isdir(path) and not (what == 'stimuli' and os.path.isfile(path)):
                raise unknown_choice('', what, name, known, 'Or give a folder with a subfolder per class.')
            if name not in known and not _is_text(os.path.abspath(path)):
                raise StudyError(f'--{what} {name!a}: the path is no text in UTF-8, and the tables of a study '
                                 'are. Rename the folder, or give a link to it.')
    tables = [name for name in stimuli if os.path.isfile(os.path.expanduser(name))]
    if bool(tables) != bool(args.rating_columns) or bool(tables) != bool(args.rating_scale):
        raise StudyError(f'--stimuli {" ".join(args.stimuli)}: a csv needs both --rating-columns and --rating-scale, '
                         'and nothing else has them.')
    for name in args.stimuli:
        ratings = Ratings.given(args).of(name)
        check_stimuli(name, rating_columns=ratings.columns or None, rating_scale=ratings.scale or None)
    for images in args.train_images:
        if images != 'all' and not (images.isdecimal() and int(images) > 0):
            raise StudyError(f"--train-images {images}: expected a number of images, or 'all'.")
    if outside := [seed for seed in args.seeds if not 0 <= seed < 2 ** 31]:
        raise StudyError(f'--seeds {outside[0]}: expected 0 or more, below {2 ** 31}.')
    for name in ('epochs', 'affect_epochs', 'jobs', 'threads'):
        if getattr(args, name) < 1:
            raise StudyError(f'--{name.replace("_", "-")} {getattr(args, name)}: expected 1 or more.')
    for flag in (*args.flags, *args.affect_flags, *args.target_flags):
        name = flag[2:].split('=')[0] if flag.startswith('--') else ''
        if name in RESERVED:
            raise StudyError(f"{flag}: is set by the study. Use the study's own option for that, before the '--'.")
        if name in DUAL_HEAD_FLAGS:
            raise StudyError(f'{flag}: is not for every arm, as it needs the dual head. Give it to arms, such as '
                             'regulated:rehearsal=1 and its controls.')
    for device in args.devices:  # a GPU that is there is not touched: the study would hold its memory all along
        place = re.fullmatch(r'cuda(?::(\d+))?', device)
        if place is None or int(place[1] or 0) >= torch.cuda.device_count():
            check_device(device, '--devices')
    if not args.train_script.is_file():
        raise StudyError(f'{args.train_script}: there is no training script. Give the path of the '
                         "repository's train.py with --train-script.")


def check_train_images(args: argparse.Namespace) -> None:
    """Refuse a number of training images that a target has not.

    Raises:
        DataError: If there is one.
    """
    numbers = [int(images) for images in args.train_images if images != 'all']
    for target in args.targets if numbers else ():
        try:
            splits = load_target(target, args.data_dir)
        except DataError:  # the runs that need the set will fail and say so; the others go on
            continue
        for number in numbers:
            fewer_images(splits, number, seed=0)


def check_flags(runs: Iterable[Run], script: Path, device: str) -> None:
    """Refuse what train.py would refuse on the command line of a run.

    Args:
        runs: Those that have not begun: the others never pass their flags again.
        script: train.py, or one in its place.
        device: The runs' own, as some optimizers need a GPU.

    Raises:
        StudyError: If it refuses one.
    """
    parse_args = load_parse_args(script)
    if parse_args is None:
        raise StudyError(f'--train-script {script}: has no parse_args to check the flags by. Give train.py, or a '
                         'script that has the same.')
    for run in {(run.model, run.arm, run.stimuli, run.target, run.train_images): run for run in runs}.values():
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                settings = parse_args([*run.flags, '--device', device,
                                       *(('--experience', run.needs) if run.needs else ())])
            if getattr(settings, 'batch_size', None):  # a script in train.py's place may have no such flag
                settings.world_size = 1
                check_batch(settings, run.task)
        except SystemExit as e:
            if not e.code:  # --help
                raise
            reason = said.getvalue().strip().rpartition('error: ')[2] or e.code
        except DataError as e:
            reason = e
        else:
            continue
        only = ' What is for stage 2 alone goes into --target-flags.' if run.task == 'affect' else ''
        raise StudyError(f'{run.key}: train.py refuses its flags: {reason}{only}')
