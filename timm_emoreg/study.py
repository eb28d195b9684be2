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
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

import timm_emoreg

from .data import STIMULI, TARGETS, DataError, absolute, stimuli_parts
from .files import write_text
from .marks import MarksError, write_between_marks
from .run_folder import DamagedError, read_json
from .study_checks import check_flags, check_names, check_train_images
from .study_grid import (
    ARMS,
    COLUMNS,
    Ratings,
    Run,
    StudyError,
    data_digests,
    images_seen,
    plan,
    rating_flags,
    read_runs,
    recipe,
    write_rows,
)
from .study_plots import draw_forest, draw_learning_curves
from .study_summary import draw_summary, make_summary, read_summary
from .study_table import make_table, read_settings, write_table

__all__ = ['Study', 'hold', 'main']


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[int]:
    """The lock of a study's folder, as a file descriptor.

    Runs inherit it: if the study is killed, they hold it until they end, so that no run is ever trained twice at once.

    Raises:
        StudyError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'study.lock', 'a+') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise StudyError(f'{folder}: process {file.read().strip()} runs this study, or a run that it left behind '
                             'is not finished. Wait for it, or end it.') from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def _differing(before: Sequence[str], now: Sequence[str]) -> tuple[str, str]:
    """What differs between two command lines, from the first flag to the last one of it."""
    start = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))
    end = next((i for i, (a, b) in enumerate(zip(reversed(before[start:]), reversed(now[start:]), strict=False))
                if a != b), min(len(before), len(now)) - start)
    while start and not (before[start:] or now[start:])[0].startswith('-'):  # a value is shown with its flag
        start -= 1
    return tuple(shlex.join(line[start:len(line) - end]) for line in (before, now))


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    if not minutes:
        return 'less than 1 min'
    return f'about {minutes // 60} h {minutes % 60:02d} min' if minutes >= 60 else f'about {minutes} min'


# -- run ---------------------------------------------------------------------------------------------------------------


class Study:
    """The runs of a folder: which are finished, and how the others get there.

    Args:
        folder: Of the study.
        script: train.py.
        devices: One a job, in turn.
        jobs: How many runs at a time.
        threads: CPU threads of a run.
        data_dir: Data sets, None for train.py's default.
        keep_checkpoints: Otherwise only the best checkpoint of stage 1 stays.
        ratings: Of a csv among the stimuli.
    """

    def __init__(self, folder: Path, script: Path, devices: Sequence[str] = ('cpu',), jobs: int = 1, threads: int = 1,
                 data_dir: str | None = None, keep_checkpoints: bool = False, ratings: Ratings | None = None):
        self.folder, self.script, self.devices, self.jobs, self.threads = folder, script, devices, jobs, threads
        self.starts: list[float] = []  # seconds of each run before it counts its own
        self.data_dir, self.keep_checkpoints, self.ratings = data_dir, keep_checkpoints, ratings or Ratings()
        self.rows = {name: read_runs(folder, name) for name in ('results.csv', 'stage1.csv')}
        self.signals: list[int] = []
        self.digests: dict[str, str] = {}

    def _recorded(self, run: Run) -> dict:
        """What an earlier call wrote about the run when it started it; nothing if it never began to train."""
        path = self.folder / 'runs' / f'{run.key}.json'
        begun = (path.with_suffix('') / 'args.json').is_file()
        return read_json(path) if begun and path.is_file() else {}

    def _record(self, run: Run) -> None:
        path = self.folder / 'runs' / f'{run.key}.json'
        write_text(path, json.dumps({'flags': run.flags}))

    def _result(self, run: Run) -> Path:
        return self.folder / 'runs' / run.key / run.task / 'result.json'

    def is_finished(self, run: Run) -> bool:
        return self._result(run).is_file() or any(row['key'] == run.key for rows in self.rows.values() for row in rows)

    def is_begun(self, run: Run) -> bool:
        """Whether its flags have been taken once and are not passed again."""
        return self.is_finished(run) or bool(self._recorded(run))

    def check(self, runs: Sequence[Run], digests: dict[str, str]) -> None:
        """Refuse runs that were made, or begun, with other flags, those of another recipe than the finished ones that
        they would be compared with, and those of a set that has changed since.

        Args:
            runs: All of them.
            digests: `data_digests` of the runs, which `execute` records.

        Raises:
            StudyError: If there is one.
        """
        before = {row['key']: row['flags'] for rows in self.rows.values() for row in rows}
        for run in runs:
            recorded = self._recorded(run)
            flags = recorded['flags'] if recorded else shlex.split(before.get(run.key, shlex.join(run.flags)))
            if flags != list(run.flags):
                then, now = _differing(flags, run.flags)
                raise StudyError(f'{run.key} was begun with other flags: "{then or "nothing"}" then, '
                                 f'"{now or "nothing"}" now. Give the same ones, or another --output.')
        self._check_recipes(runs)
        made = [row for rows in self.rows.values() for row in rows]
        used = {name for row in made for name in (row['stimuli'], row['target'])}
        used |= {name for run in runs if self._recorded(run) for name in (run.stimuli, run.target)}
        known = self._known_data()
        for name, digest in digests.items():
            if name in used and known.get(name, digest) != digest:  # what no run has used may still be mended
                raise StudyError(f'{name}: holds other images, labels or parts than when this study began. Restore it '
                                 'as it was, or give another --output.')
        self.digests = digests

    def _known_data(self) -> dict[str, str]:
        """The digests of the sets that runs were started with."""
        path = self.folder / 'data.json'
        return read_json(path) if path.is_file() else {}

    def _check_recipes(self, runs: Sequence[Run]) -> None:
        found: dict[tuple, tuple[str, object]] = {}  # what must be common -> the run that had it first, and its value

        def agree(key: str, arm: str, place: tuple[str, ...], stimuli: str, flags: Sequence[str]) -> None:
            epochs, common = recipe(flags, arm)
            # plain+ is longer, and by how much is a matter of the stimuli
            longer = ('plain+', stimuli) if arm.partition(':')[0] == 'plain+' else ()
            same = [(('flags', *place), shlex.join(common)), (('--epochs', *place, *longer), epochs)]
            if rated := rating_flags(flags):
                same.append((('ratings', stimuli), shlex.join(rated)))
            for what, value in same:
                first, before = found.setdefault(what, (key, value))
                if value != before:
                    raise StudyError(f'{key} has the {what[0]} "{value}", and {first}, which it would be compared '
                                     f'with, "{before}". Give the same ones, or another --output; what is to differ '
                                     'is an option of an arm (plain:lr=0.05).')

        for rows in self.rows.values():
            for row in rows:
                first = row['arm'].startswith('affect')
                place = ('stage 1', row['model'], row['stimuli']) if first else (
                    row['model'], row['target'], row['train_images'])
                agree(row['key'], row['arm'], place, row['stimuli'], shlex.split(row['flags']))
        for run in runs:
            place = ('stage 1', run.model, run.stimuli) if run.task == 'affect' else (
                run.model, run.target, run.train_images)
            agree(run.key, run.arm, place, run.stimuli, run.flags)

    def _take(self, run: Run) -> dict:
        """A finished run's row, written to the csv, and its checkpoints removed."""
        path = self._result(run)
        result, settings = read_json(path), read_json(path.parents[1] / 'args.json')
        row = {
            'key': run.key, 'arm': run.arm, 'model': run.model, 'stimuli': run.stimuli, 'target': run.target,
            'train_images': run.train_images, 'images': result['train_images'], 'seed': run.seed,
            'epochs': result['epochs'], 'best_epoch': result['best_epoch'], 'metric': result['metric'],
            'validation': result['validation'], 'test': result['test'][result['metric']],
            'balance': result['balance'], 'precision': result['precision'], 'attention': result.get('attention'),
            'loader': result.get('loader'), 'device': result['device'], 'seconds': result['seconds'],
            'commit': settings.get('commit'), 'flags': shlex.join(run.flags)}
        name = 'stage1.csv' if run.task == 'affect' else 'results.csv'
        self.rows[name].append({k: '' if v is None else str(v) for k, v in row.items()})
        write_rows(self.folder / name, self.rows[name], COLUMNS)
        if not self.keep_checkpoints:
            for checkpoint in path.parent.glob('*.pth.tar'):
                if run.task != 'affect' or checkpoint.name != 'model_best.pth.tar':
                    checkpoint.unlink()
        return row

    def _start(self, run: Run, slot: int, lock: int) -> subprocess.Popen:
        folder, log = self.folder / 'runs' / run.key, self.folder / 'logs' / f'{run.key}.log'
        log.parent.mkdir(exist_ok=True)
        folder.parent.mkdir(exist_ok=True)
        self._record(run)
        command = [sys.executable, str(self.script), '--device', self.devices[slot % len(self.devices)]]
        if (folder / 'args.json').is_file():
            command += ['--resume', str(folder)]
        else:
            if folder.is_dir():  # killed before it wrote its settings: nothing is lost, and train.py wants it new
                shutil.rmtree(folder)
            command += [*run.flags, '--output', str(folder.parent), '--experiment', run.key]
            if run.needs:
                command += ['--experience', str(folder.parent / run.needs)]
        if self.data_dir:
            command += ['--data-dir', self.data_dir]
        threads = str(self.threads)
        with open(log, 'a') as file:
            file.write(f'$ {shlex.join(command)}\n')
            file.flush()
            # in a session of its own, so that Ctrl-C reaches it only as the SIGTERM below
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                    env={**os.environ, 'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads},
                                    pass_fds=(lock,), start_new_session=True)

    def seconds_left(self, waiting: Iterable[Run], running: Iterable[tuple[Run, float]] = ()) -> float | None:
        """Estimate from the seconds an image of the finished runs that are most alike; None before the first one, and
        where the size of a set is not known, as it is not there."""
        pace = defaultdict(list)

        def kinds(model, arm, stimuli, target, images):
            first = arm.startswith('affect')
            return ((model, arm, stimuli, target, images), (model, first, stimuli if first else target, images),
                    (model, first), ())

        for rows in self.rows.values():
            for row in rows:
                for kind in kinds(*(row[k] for k in ('model', 'arm', 'stimuli', 'target', 'train_images'))):
                    pace[kind].append(float(row['seconds']) / (int(row['epochs']) * int(row['images'])))
        if not pace:
            return None

        def estimate(run):
            kind = next(k for k in kinds(run.model, run.arm, run.stimuli, run.target, run.train_images) if k in pace)
            return statistics.median(pace[kind]) * run.epochs * images_seen(run, self.data_dir, self.ratings)

        try:
            start = statistics.median(self.starts) if self.starts else 0.0
            total = sum(start + estimate(run) for run in waiting) + sum(
                max(start + estimate(r) - passed, 0) for r, passed in running)
        except DataError:  # the runs that need the set will fail and say so; the others go on
            return None
        return total / self.jobs

    def execute(self, runs: Sequence[Run], lock: int) -> int:
        """Train what is not finished; 0 if all is well, 1 if a run failed, 128 + the number of a signal.

        Args:
            runs: In the order of `plan`.
            lock: Descriptor of the lock, which the runs inherit.
        """
        known = {row['key'] for rows in self.rows.values() for row in rows}
        for run in runs:
            if run.key not in known and self._result(run).is_file():
                self._take(run)
        waiting = [run for run in runs if not self.is_finished(run)]
        needed = {run.needs: run for run in waiting if run.needs}
        waiting = [run for run in waiting if run.task != 'affect' or run.key in needed]
        for run in runs:
            checkpoint = self._result(run).with_name('model_best.pth.tar')
            if run.key in needed and self.is_finished(run) and not checkpoint.is_file():
                raise StudyError(f'{needed[run.key].key} needs the stage 1 {run.key}, which is finished, but '
                                 f'{checkpoint} is gone. Bring it back, or remove its row from stage1.csv and '
                                 f'{self._result(run).parents[1]}, so that it is trained again.')
        done = {run.key for run in runs if self.is_finished(run)}
        total, count = len(waiting), 0
        print(f'{total} runs to do, {len(done)} finished before; {self.jobs} at a time', flush=True)
        if self.digests:
            write_text(self.folder / 'data.json', json.dumps(self._known_data() | self.digests, indent=1))
        running: dict[int, tuple[Run, subprocess.Popen, float]] = {}
        failed: dict[str, str] = {}
        stopped = 0
        try:
            while running or (waiting and not self.signals):
                for slot in range(self.jobs):
                    run = next((r for r in waiting if r.needs is None or r.needs in done), None)
                    if slot not in running and run is not None and not self.signals:
                        waiting.remove(run)
                        running[slot] = run, self._start(run, slot, lock), time.monotonic()
                if len(self.signals) > stopped:
                    stopped += 1  # one a turn: two that come together are no sign of impatience
                    print('stopping: the runs write a checkpoint first' if stopped == 1 else 'killing the runs',
                          flush=True)
                    for _, process, _ in running.values():
                        process.terminate() if stopped == 1 else process.kill()
                time.sleep(0.05)
                for slot, (run, process, began) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    log = self.folder / 'logs' / f'{run.key}.log'
                    if process.returncode == 0 and self._result(run).is_file():
                        row = self._take(run)
                        self.starts.append(max(time.monotonic() - began - row['seconds'], 0.0))
                        done.add(run.key)
                        outcome = f'{row["metric"]} {row["test"]:.4g}, {row["seconds"]:.0f} s'
                    else:
                        if self.signals:
                            continue
                        reason = log.read_text(errors='replace').strip().splitlines()[-1]
                        failed[run.key] = f'exit status {process.returncode}: {reason[:300]}\n    {log}'
                        lost = [r for r in waiting if r.needs == run.key]
                        failed |= {r.key: f'not run, as its stage 1 failed, {run.key}' for r in lost}
                        waiting = [r for r in waiting if r not in lost]
                        count += len(lost)
                        outcome = f'failed, {log}'
                    count += 1
                    left = self.seconds_left(waiting, [(r, time.monotonic() - b) for r, _, b in running.values()])
                    rest = '' if left is None or count == total else f'; {_hours(left)} left'
                    print(f'[{count}/{total}] {run.key}: {outcome}{rest}', flush=True)
        except BaseException:  # a full disk, say: no run is left behind that nobody waits for
            for _, process, _ in running.values():
                process.terminate()
            for _, process, _ in running.values():
                process.wait()
            raise
        if self.signals:
            print(f'stopped with {total - count} runs to do. The same command goes on.', flush=True)
            return 128 + self.signals[0]
        for key, reason in failed.items():
            print(f'failed: {key}: {reason}', file=sys.stderr)
        return int(bool(failed))


# -- command -----------------------------------------------------------------------------------------------------------


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
    run.add_argument('--threads', type=int, help='CPU threads a run (default: the cores, shared out among the jobs)')
    run.add_argument('--train-script', type=Path, help='its parse_args checks the flags of all runs before the first '
                     'one (default: the train.py beside the package)')
    run.add_argument('--keep-checkpoints', action='store_true',
                     help="all of them; else only stage 1's best, as a ResNet-18 leaves 270 MB a run")
    run.add_argument('--dry-run', action='store_true', help='print the plan and do nothing')
    table = commands.add_parser('table', help='table.md, table.csv, forest.png and curves.png of what is finished')
    table.add_argument('--duplicates', action='store_true',
                       help='test images with a near copy among the training images, and accuracy without them')
    table.add_argument('--seeds', nargs='+', type=int, help='print the table of these seeds only, and write nothing')
    summary = commands.add_parser('summary', help='one table and one picture of settings of several studies')
    summary.add_argument('settings', type=Path, metavar='CSV', help='names them, in the columns setting, folder, '
                         'stimuli, target, train_images and seeds; the picture lies beside it')
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
    with hold(args.output) as lock:
        running = study()
        handlers = {number: signal.signal(number, lambda number, frame: running.signals.append(number))
                    for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return running.execute(runs, lock)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


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
        if args.command == 'run':
            return _run(args)
        if args.command == 'summary':
            lines = read_summary(args.settings)
            print(make_summary(lines), end='')
            if args.write is not None:
                write_between_marks(args.write, 'study', make_summary(lines))
            draw_summary(lines, args.settings.with_suffix('.png'))
            return 0
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
    except (StudyError, DamagedError, DataError, MarksError, OSError, ImportError) as e:
        print(f'study: {e}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
