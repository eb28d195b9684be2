"""Does affective pre-training help? A grid of training runs and its evaluation: python -m timm_emoreg.study.

    python -m timm_emoreg.study run --output DIR --stimuli ferplus --train-images 1000 5000 --seeds 0 1 2 3 4
    python -m timm_emoreg.study table --output DIR
    python -m timm_emoreg.study summary SETTINGS.csv

`run` may be stopped and started again at any time: finished runs are kept, an interrupted one goes on.

The arms; S stands for stage 1 on the stimuli, whose result is shared by the arms that need the same one:
    plain        the bare backbone
    plain+       the same, longer by about as many images as S sees
    init         S, then an ordinary head
    regulated    S, then the dual head: the method
    random       the dual head without S
    shuffled     S with shuffled labels, then the dual head
    content      S with labels that are no emotions, then the dual head: OASIS category, emoji group, nEMO speaker
    unlabelled   S predicts rotations, then the dual head
S is taken as it is at its last epoch, and stage 2 at the epoch that validation chooses (--val-interval).
Each takes options after a colon, with commas between: learned, gate, loss, separate, no-modulation for the arms with
the dual head; shuffled, content, unlabelled for init; and name=value, a flag of train.py, for all. For example
regulated:learned, regulated:keep-affect=1, init:shuffled, plain:lr=0.05.
"""
from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import timm_emoreg

from ..data import STIMULI, TARGETS, DataError, absolute, stimuli_parts
from ..files import DamagedError
from ..marks import MarksError, write_between_marks
from .checks import check_flags, check_names, check_train_images
from .grid import ARMS, Ratings, StudyError, data_digests, plan
from .plots import draw_forest, draw_learning_curves
from .runner import Study, lock_study
from .summary import draw_summary, make_summary, read_summary
from .table import make_table, read_settings, write_table

__all__ = ['main']


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m timm_emoreg.study', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    run = commands.add_parser('run', help='train what is not finished; flags of train.py for all runs go after --',
                              epilog='Flags of train.py for all runs go after --, such as: -- --img-size 32')
    run.add_argument('--models', nargs='+', default=['emoreg_resnet18'],
                     help='emoreg_*, or any timm model (default: emoreg_resnet18)')
    run.add_argument('--stimuli', nargs='+', default=['emoji'], help=f'{", ".join(STIMULI)}, a folder or csv, '
                     'or several as one with + between them (default: emoji)')
    run.add_argument('--rating-columns', nargs='+', help='rating columns of a csv of stimuli')
    run.add_argument('--rating-scale', nargs=2, type=float, metavar=('LOW', 'HIGH'), help='scale of these ratings')
    run.add_argument('--targets', nargs='+', default=['cifar10'],
                     help=f'{", ".join(TARGETS)}, or a folder (default: cifar10)')
    run.add_argument('--train-images', nargs='+', default=['all'],
                     help="numbers of training images, or 'all' (default)")
    run.add_argument('--arms', nargs='+', default=list(ARMS), help='default: the eight above')
    run.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2, 3, 4], help='default: 0 to 4')
    run.add_argument('--epochs', type=int, default=20, help='of stage 2 (default: 20)')
    run.add_argument('--affect-epochs', type=int, help='of stage 1 (default: --epochs)')
    run.add_argument('--affect-flags', type=shlex.split, default=[], metavar="'FLAGS'",
                     help="flags of train.py for stage 1 alone; a single one needs '=': --affect-flags=--no-aug")
    run.add_argument('--target-flags', type=shlex.split, default=[], metavar="'FLAGS'", help='the same for stage 2')
    run.add_argument('--jobs', type=int, default=1, help='runs at a time (default: 1)')
    run.add_argument('--devices', nargs='+', help='of the jobs, in turn: cpu, cuda:0 ... (default: all GPUs, else cpu)')
    run.add_argument('--threads', type=int, help='CPU threads per run (default: the cores, shared out among the jobs)')
    run.add_argument('--train-script', type=Path, help='its parse_args checks the flags of all runs before the first '
                     'one (default: the train.py beside the package)')
    run.add_argument('--keep-checkpoints', action='store_true',
                     help="all of them; else only those of stage 1, as a ResNet-18 leaves 270 MB per run")
    run.add_argument('--dry-run', action='store_true', help='print the plan and do nothing')
    table = commands.add_parser('table', help='table.md, table.csv, forest.png and curves.png of what is finished')
    table.add_argument('--duplicates', action='store_true',
                       help='test images with a near copy among the training images, and accuracy without them')
    table.add_argument('--seeds', nargs='+', type=int, help='print the table of these seeds only, and write nothing')
    summary = commands.add_parser('summary', help='one table and one picture of settings of several studies')
    summary.add_argument('settings', type=Path, metavar='CSV', help='names them, in the columns setting, folder, '
                         'stimuli, target, train_images and seeds, and model where a folder has several; the picture '
                         'lies beside it')
    summary.add_argument('--write', type=Path, metavar='README', help='write the table between the marks of a file')
    for command in (run, table):
        command.add_argument('--output', type=Path, required=True, metavar='DIR', help="the study's folder")
        command.add_argument('--data-dir', help='data sets (default: $EMOREG_DATA, ~/.cache/emoreg-data)')
    return parser


def _run(args: argparse.Namespace) -> int:
    args.affect_epochs = args.epochs if args.affect_epochs is None else args.affect_epochs
    if args.threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        args.threads = max(1, cores // max(1, args.jobs))
    args.devices = args.devices or [f'cuda:{i}' for i in range(torch.cuda.device_count())] or ['cpu']
    args.train_script = args.train_script or Path(timm_emoreg.__file__).parents[1] / 'train.py'
    check_names(args)
    args.stimuli = ['+'.join(absolute(part, STIMULI) for part in stimuli_parts(name)) for name in args.stimuli]
    args.targets = [absolute(name, TARGETS) for name in args.targets]
    args.train_images = [images if images == 'all' else str(int(images)) for images in args.train_images]
    runs, notes = plan(args)
    check_train_images(args)
    print(*notes, sep='\n', end='\n' if notes else '')

    digests = data_digests(runs, args.data_dir, Ratings.given(args))

    def study() -> Study:
        made = Study(args.output.resolve(), args.train_script.resolve(), args.devices, args.jobs, args.threads,
                     args.data_dir, args.keep_checkpoints, Ratings.given(args))
        made.check(runs, digests)
        return made

    looked = study()
    check_flags((run for run in runs if not looked.is_begun(run)), args.train_script, args.devices[0])
    if args.dry_run:
        finished = [looked.is_finished(run) for run in runs]
        for run, is_finished in zip(runs, finished, strict=True):
            print(f'{"finished" if is_finished else "to do"}: {run.key}: train.py {shlex.join(run.flags)}'
                  + (f' --experience {run.needs}' if run.needs else ''))
        first = sum(run.task == 'affect' for run in runs)
        print(f'{len(runs)} runs: {first} of stage 1, {len(runs) - first} of stage 2; {sum(finished)} finished')
        return 0
    # what does not fit has been refused before anything is written
    with lock_study(args.output) as lock:
        begun = study()
        handlers = {number: signal.signal(number, lambda number, frame: begun.signals.append(number))
                    for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return begun.execute(runs, lock)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _table(args: argparse.Namespace) -> int:
    settings = read_settings(args.output, args.seeds)
    text, rows = make_table(args.output, settings, args.data_dir, args.duplicates)
    print(text)
    if args.seeds is not None:
        return 0
    if not (args.output / 'runs').is_dir():
        print('Nothing is written: the runs are not there, and without their predictions the files would say less.')
        return 0
    write_table(args.output, text, rows)
    draw_forest(args.output, settings, args.output / 'forest.png')
    draw_learning_curves(args.output, settings, args.output / 'curves.png')
    return 0


def _summary(args: argparse.Namespace) -> int:
    lines = read_summary(args.settings)
    print(make_summary(lines), end='')
    if args.write is not None:
        write_between_marks(args.write, 'study', make_summary(lines))
    draw_summary(lines, args.settings.with_suffix('.png'))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if a run failed, 2 if something was refused."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own = argv.index('--') if '--' in argv else len(argv)
    parser = _parser()
    args, unknown = parser.parse_known_args(argv[:own])
    if unknown:
        after = f' Flags of train.py go after --: -- {shlex.join(unknown)}' if args.command == 'run' else ''
        parser.error(f'unrecognized arguments: {shlex.join(unknown)}.{after}')
    args.flags = argv[own + 1:]
    try:
        return {'run': _run, 'table': _table, 'summary': _summary}[args.command](args)
    except (StudyError, DamagedError, DataError, MarksError, OSError, ImportError) as e:
        print(f'study: {e}', file=sys.stderr)
        return 2
