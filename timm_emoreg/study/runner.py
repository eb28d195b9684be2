"""Running a study: which of its runs are finished, what contradicts them, and how the others get there."""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data import DataError
from ..files import read_json, write_text
from ..training.checkpoint import BEST
from .grid import COLUMNS, Ratings, Run, StudyError, images_seen, rating_flags, read_runs, recipe, write_rows

__all__ = ['Study', 'lock_study']


@contextlib.contextmanager
def lock_study(folder: Path) -> Iterator[int]:
    """The lock of a study's folder, as a file descriptor.

    Runs inherit it: if the study is killed, they hold it until they end, so that no run is ever trained twice at once.

    Raises:
        StudyError: If another process holds it, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / 'study.lock', 'a+'))
        except OSError as e:
            raise StudyError(f'--output {folder}: cannot be written ({e.strerror}). Choose another folder.') from e
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


@dataclass
class _Queue:
    """Where the runs of one call are."""

    waiting: list[Run]
    done: set[str]  # keys of what is finished, also by earlier calls
    total: int
    count: int = 0  # of those that have ended
    running: dict[int, tuple[Run, subprocess.Popen, float]] = field(default_factory=dict)  # slot -> run, since when
    failed: dict[str, str] = field(default_factory=dict)  # key -> reason

    def ready(self) -> Run | None:
        """The next run whose stage 1 is there."""
        return next((run for run in self.waiting if run.needs is None or run.needs in self.done), None)

    def fail(self, run: Run, reason: str) -> None:
        """Note a failure, and that of all runs that need this one."""
        lost = [r for r in self.waiting if r.needs == run.key]
        self.failed |= {run.key: reason} | {r.key: f'not run, as its stage 1 failed, {run.key}' for r in lost}
        self.waiting = [r for r in self.waiting if r not in lost]
        self.count += len(lost)


class Study:
    """The runs of a folder: which are finished, and how the others get there.

    Args:
        folder: Of the study.
        script: train.py.
        devices: Assigned to the jobs in turn.
        jobs: How many runs at a time.
        threads: CPU threads of a run.
        data_dir: Data sets, None for train.py's default.
        keep_checkpoints: Otherwise only the checkpoint of each stage 1 stays.
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
            'convolution': result.get('convolution'), 'loader': result.get('loader'), 'device': result['device'],
            'seconds': result['seconds'], 'commit': settings.get('commit'), 'flags': shlex.join(run.flags)}
        name = 'stage1.csv' if run.task == 'affect' else 'results.csv'
        self.rows[name].append({k: '' if v is None else str(v) for k, v in row.items()})
        # with any column that the user has added, such as notes
        write_rows(self.folder / name, self.rows[name], [*dict.fromkeys((*COLUMNS, *self.rows[name][0]))])
        if not self.keep_checkpoints:
            for checkpoint in path.parent.glob('*.pth.tar'):
                if run.task != 'affect' or checkpoint.name != BEST:
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
        with open(log, 'a', encoding='utf-8', errors='surrogateescape') as file:
            file.write(f'$ {shlex.join(command)}\n')
            file.flush()
            # in a session of its own, so that Ctrl-C reaches it only as the SIGTERM below
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                    env={**os.environ, 'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads},
                                    pass_fds=(lock,), start_new_session=True)

    def seconds_left(self, waiting: Iterable[Run], running: Iterable[tuple[Run, float]] = ()) -> float | None:
        """Estimate from the seconds per image of the finished runs that are most alike.

        None before any run has finished, or if a set is missing and its size unknown.
        """
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
        waiting = self._waiting(runs)
        queue = _Queue(waiting, done={run.key for run in runs if self.is_finished(run)}, total=len(waiting))
        print(f'{queue.total} runs to do, {len(queue.done)} finished before; {self.jobs} at a time', flush=True)
        if self.digests:
            write_text(self.folder / 'data.json', json.dumps(self._known_data() | self.digests, indent=1))
        stopped = 0
        try:
            while queue.running or (queue.waiting and not self.signals):
                self._start_next(queue, lock)
                if len(self.signals) > stopped:
                    stopped += 1  # one a turn: two that come together are no sign of impatience
                    print('stopping: the runs write a checkpoint first' if stopped == 1 else 'killing the runs',
                          flush=True)
                    for _, process, _ in queue.running.values():
                        if stopped == 1:
                            process.terminate()
                        else:
                            process.kill()
                time.sleep(0.05)
                self._collect(queue)
        except BaseException:  # a full disk, say: no run is left behind that nobody waits for
            for _, process, _ in queue.running.values():
                process.terminate()
            for _, process, _ in queue.running.values():
                process.wait()
            raise
        if self.signals:
            left = queue.total - queue.count
            print(f'stopped with {left} run{"s" * (left != 1)} to do. The same command goes on.', flush=True)
            return 128 + self.signals[0]
        for key, reason in queue.failed.items():
            print(f'failed: {key}: {reason}', file=sys.stderr)
        return int(bool(queue.failed))

    def _waiting(self, runs: Sequence[Run]) -> list[Run]:
        """What is not finished, without each stage 1 that nothing needs.

        Raises:
            StudyError: If a stage 1 that is needed has lost its checkpoint.
        """
        known = {row['key'] for rows in self.rows.values() for row in rows}
        for run in runs:
            if run.key not in known and self._result(run).is_file():
                self._take(run)
        waiting = [run for run in runs if not self.is_finished(run)]
        needed = {run.needs: run for run in waiting if run.needs}
        for run in runs:
            checkpoint = self._result(run).with_name(BEST)
            if run.key in needed and self.is_finished(run) and not checkpoint.is_file():
                raise StudyError(f'{needed[run.key].key} needs the stage 1 {run.key}, which is finished, but '
                                 f'{checkpoint} is gone. Bring it back, or remove its row from stage1.csv and '
                                 f'{self._result(run).parents[1]}, so that it is trained again.')
        return [run for run in waiting if run.task != 'affect' or run.key in needed]

    def _start_next(self, queue: _Queue, lock: int) -> None:
        """Start what can be started, in the free slots."""
        for slot in range(self.jobs):
            run = queue.ready()
            if slot not in queue.running and run is not None and not self.signals:
                queue.waiting.remove(run)
                queue.running[slot] = run, self._start(run, slot, lock), time.monotonic()

    def _collect(self, queue: _Queue) -> None:
        """Take the rows of what has ended, or the reasons why it failed, and tell how long the rest will take."""
        for slot, (run, process, began) in list(queue.running.items()):
            if process.poll() is None:
                continue
            del queue.running[slot]
            log = self.folder / 'logs' / f'{run.key}.log'
            if self._result(run).is_file():  # the last thing a run writes; how its process ends changes nothing
                row = self._take(run)
                self.starts.append(max(time.monotonic() - began - row['seconds'], 0.0))
                queue.done.add(run.key)
                outcome = f'{row["metric"]} {row["test"]:.4g}, {row["seconds"]:.0f} s'
            elif self.signals:
                continue
            else:
                reason = log.read_text(encoding='utf-8', errors='replace').strip().splitlines()[-1]
                queue.fail(run, f'exit status {process.returncode}: {reason[:300]}\n    {log}')
                outcome = f'failed, {log}'
            queue.count += 1
            left = self.seconds_left(queue.waiting, [(r, time.monotonic() - b) for r, _, b in queue.running.values()])
            rest = '' if left is None or queue.count == queue.total else f'; {_hours(left)} left'
            print(f'[{queue.count}/{queue.total}] {run.key}: {outcome}{rest}', flush=True)
