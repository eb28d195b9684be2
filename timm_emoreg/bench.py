"""Speed beside timm's, as ratios: ``python -m timm_emoreg.bench [NAME...]``, all of `BENCHES` by default."""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import nn

import timm_emoreg

from .backbone import create_backbone
from .data.folders import default_data_dir
from .data.loader import make_loader
from .data.sets import ImageSet, Target
from .files import write_text
from .fold import fold
from .small_image import LARGEST_SIZE
from .task import EmoRegTask
from .training.attention import choose_attention, fused_attentions, use_plain_attention
from .training.convolution import choose_convolution, suit_small_maps, use_columns
from .training.optim import orthogonalize_in_float32
from .training.precision import autocast_in, choose_precision

__all__ = ['BENCHES', 'Measurement', 'Skipped', 'compare', 'main', 'peak_memory', 'table']

TRAIN = Path(__file__).parents[1] / 'train.py'  # of a checkout; an installed package has none
# backbone, size, batch, small-image form
NETS = {'cpu': [('resnet18', 32, 128, True), ('vit_tiny_patch16_224', 32, 128, True)],
        'cuda': [('resnet50', 224, 128, False), ('vit_base_patch16_224', 224, 64, False)]}
STOCK_NETS = ('resnet18', 'resnet50', 'efficientnet_b0')  # drawn for 224 px
CIFAR = {'mean': (0.491, 0.482, 0.447), 'std': (0.247, 0.243, 0.262)}


class Skipped(Exception):
    """A figure that cannot be measured here; the text says why."""


@dataclass(frozen=True)
class Measurement:
    """What was measured, ours and timm's in turn.

    Args:
        name: What it is.
        unit: ``'s'``, ``'MB'`` or ``'images/s'``.
        pairs: Ours and timm's of each round, in `unit`.
        goal: What the ratio ours / timm should be.
    """

    name: str
    unit: str
    pairs: list[tuple[float, float]]
    goal: str = ''

    def row(self) -> list[str]:
        ratios = [ours / theirs for ours, theirs in self.pairs]
        middle = statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, n=4, method='inclusive') if len(ratios) > 1 else ratios * 3
        medians = (statistics.median(side) for side in zip(*self.pairs, strict=True))
        sides = (f'{value:,.0f} {self.unit}' if value >= 1000 else f'{value:.4g} {self.unit}' for value in medians)
        return [self.name, f'{middle:.3f}', f'{low:.3f} to {high:.3f}', str(len(ratios)), *sides, self.goal]


def table(figures: Iterable[Measurement]) -> str:
    """A markdown table: the ratio to timm as median and middle half of the rounds, medians of both sides."""
    rows = [['what', 'ratio', 'middle half', 'n', 'timm_emoreg', 'timm', 'goal'], ['---'] * 7,
            *(figure.row() for figure in figures)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int,
            clock: Callable[[], float] = time.perf_counter) -> list[tuple[float, float]]:
    """Seconds that two functions take, (ours, theirs) a round.

    Each runs once before, unmeasured, and who goes first alternates, so that what slows the machine for a while, or
    more and more, slows both alike.
    """
    ours()
    theirs()
    pairs = []
    for number in range(rounds):
        seconds = [0.0, 0.0]
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            start = clock()
            (ours, theirs)[side]()
            seconds[side] = clock() - start
        pairs.append((seconds[0], seconds[1]))
    return pairs


# -- step --------------------------------------------------------------------------------------------------------------


def build(emoreg: bool, backbone: str, size: int, small_image: bool, **kwargs) -> nn.Module:
    if small_image or timm.get_pretrained_cfg(backbone).fixed_input_size:
        kwargs['img_size'] = size
    kwargs.update(num_classes=10 if size <= LARGEST_SIZE else 1000, small_image=small_image)
    return timm.create_model('emoreg', backbone=backbone, **kwargs) if emoreg else create_backbone(backbone, **kwargs)


def wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def training(model: nn.Module, size: int, batch: int, args: argparse.Namespace, compiled: bool = False,
             batches: Iterable | None = None) -> Callable[[], None]:
    """A function that trains a model on `batches`, by default on one batch some times."""
    task_type = EmoRegTask if isinstance(model, timm_emoreg.EmoReg) else ClassificationTask
    task = task_type(model.to(args.device, memory_format=torch.channels_last).train(), device=args.device,
                     verbose=False)
    if compiled:
        task.compile(fullgraph=True)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=1e-3, momentum=0.9, weight_decay=5e-4)
    if batches is None:
        input = torch.randn(batch, 3, size, size, device=args.device).to(memory_format=torch.channels_last)
        batches = [(input, torch.randint(10, (batch,), device=args.device))] * args.steps

    def run() -> None:
        for input, target in batches:
            with args.autocast():
                loss = task(input, target)['loss']
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        wait(args.device)
    return run


def inference(model: nn.Module, size: int, batch: int, args: argparse.Namespace) -> Callable[[], None]:
    model = model.to(args.device, memory_format=torch.channels_last).eval()
    input = torch.randn(batch, 3, size, size, device=args.device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(args.steps):
            with args.autocast():
                model(input)
        wait(args.device)
    return run


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """The most bytes of tensors that exist at once during a call, beyond those before it."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    changes = sorted((event['ts'], event['args']['Bytes']) for event in events if event['name'] == '[memory]')
    return float(np.cumsum([size for _, size in changes]).max())


def train_anew(emoreg: bool, form: tuple, at: tuple) -> None:
    run = training(build(emoreg, *form), *at)
    run()
    run()  # with the optimizer's state


def step(args: argparse.Namespace) -> Iterator[Measurement]:
    """The dual head beside the plain model: training step, second stream, memory, folded inference."""
    for backbone, size, batch, small in NETS[args.device.type]:
        form, at, title = (backbone, size, small), (size, batch, args), f'{backbone}, {size} px, batch {batch}'
        plain = training(build(False, *form), *at)
        yield Measurement(f'training step: {title}', 's',
                          compare(training(build(True, *form), *at), plain, args.rounds), 'at most 1.02')
        separate = training(build(True, *form, experience='separate'), *at)
        yield Measurement(f'training step, separate experience: {title}', 's', compare(separate, plain, args.rounds),
                          'at most 1.4')
        peaks = [peak_memory(partial(train_anew, emoreg, form, at), args.device) / 1e6 for emoreg in (True, False)]
        yield Measurement(f'peak memory of training: {title}', 'MB', [tuple(peaks)], 'at most 1.02')
        folded = fold(build(True, *form, modulation=False))
        yield Measurement(f'inference, folded: {title}', 's',
                          compare(inference(folded, *at), inference(build(False, *form), *at), args.rounds), '1.00')


# -- loader ------------------------------------------------------------------------------------------------------------


def loader(args: argparse.Namespace) -> Iterator[Measurement]:
    """The resident loader beside timm's over random 32-px images, both with flip and a random crop.

    timm's crop resizes a part of the image, ours shifts the whole of it.
    """
    rng, batch = np.random.default_rng(0), 128
    images = rng.integers(0, 256, (args.images // batch * batch, 32, 32, 3), dtype=np.uint8)
    labels = torch.from_numpy(rng.integers(0, 10, len(images)))

    def image_set() -> ImageSet:
        return ImageSet(images, labels, Target('class', tuple('0123456789')))

    def through(batches: Iterable) -> Callable[[], None]:
        def run() -> None:
            for _ in batches:
                pass
            wait(args.device)
        return run

    resident = make_loader(image_set(), (32, 32), batch, CIFAR, training=True, kind='resident', device=args.device,
                           channels_last=True)
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    for what, workers, jitter in (('one core', 0, None), ('one core, timm with its default colour jitter', 0, 0.4),
                                  (f'{threads} threads, timm with {cores} workers', cores, None)):
        theirs = create_loader(
            image_set(), (3, 32, 32), batch, is_training=True, scale=(0.5, 1.0), color_jitter=jitter,
            num_workers=workers, persistent_workers=workers > 0, pin_memory=args.device.type == 'cuda',
            device=args.device, **CIFAR)
        torch.set_num_threads(threads if workers else 1)
        try:
            pairs = compare(through(resident), through(theirs), args.rounds)
        finally:
            torch.set_num_threads(threads)
        yield Measurement(f'loader, 32 px: {what}', 'images/s', [(len(images) / a, len(images) / b) for a, b in pairs],
                          'at least 20' if workers == 0 else '')
    if args.device.type == 'cuda':
        net = ('resnet18', 32, True)
        fed = training(build(False, *net), 32, batch, args, batches=resident)
        alone = training(build(False, *net), 32, batch, args, batches=[next(iter(resident))] * len(resident))
        yield Measurement('training steps, resnet18, 32 px: with the resident loader over without', 's',
                          compare(fed, alone, args.rounds), 'at most 1.03')


# -- muon --------------------------------------------------------------------------------------------------------------


def muon(args: argparse.Namespace) -> Iterator[Measurement]:
    """An update of Muon in float32, as train.py has it on some processors, beside timm's; both with its defaults."""
    if args.device.type != 'cpu' or args.precision != 'float32':
        raise Skipped(f'on {args.device} in {args.precision} train.py uses it as it is')
    for backbone, size, _, small in NETS['cpu']:
        updates = []
        for ours in (True, False):
            model = build(False, backbone, size, small)
            optimizer = create_optimizer_v2(model, opt='muon', lr=0.0, weight_decay=0.0)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            if ours:
                orthogonalize_in_float32(optimizer)
            updates.append(optimizer.step)
        yield Measurement(f'update of Muon without 16-bit instructions: {backbone}', 's', compare(*updates, args.runs),
                          'at most 1')


# -- attention ---------------------------------------------------------------------------------------------------------


def attention(args: argparse.Namespace) -> Iterator[Measurement]:
    """A training step with the plain attention that train.py may choose, beside timm's fused one."""
    found = False
    for backbone, size, batch, small in NETS[args.device.type]:
        plain, fused = (build(False, backbone, size, small) for _ in range(2))
        if choose_attention(fused, args.device, args.precision, size) != 'plain' or not fused_attentions(fused):
            continue
        found = True
        use_plain_attention(plain)
        calls = [training(model, size, batch, args) for model in (plain, fused)]
        yield Measurement(f'training step, plain attention: {backbone}, {size} px, batch {batch}', 's',
                          compare(*calls, args.rounds), 'at most 1')
    if not found:
        raise Skipped(f'on {args.device} in {args.precision} train.py uses attention as timm has it')


# -- convolution -------------------------------------------------------------------------------------------------------


def convolution(args: argparse.Namespace) -> Iterator[Measurement]:
    """A training step at 32 px with the convolutions that train.py has beside torch's: nets as they were drawn for
    224 px, and the one with the stem for small images."""
    if args.device.type != 'cpu':
        raise Skipped(f'on {args.device} train.py uses those of torch')
    for backbone, small in (*((name, False) for name in STOCK_NETS), (STOCK_NETS[0], True)):
        ours, usual = (build(False, backbone, 32, small) for _ in range(2))
        suit_small_maps(ours)
        if choose_convolution(ours, args.device, args.precision, [32]) == 'columns':
            use_columns(ours)
        calls = [training(model, 32, 64, args) for model in (ours, usual)]
        stem = '3x3' if small else 'stock'
        yield Measurement(f'training step, convolutions of small maps: {backbone}, {stem} stem, 32 px, batch 64', 's',
                          compare(*calls, args.rounds), 'at most 1')


# -- train, startup, import, compile: in processes of their own --------------------------------------------------------


def output(command: list[str], until: str | None = None, **environment: str) -> list[tuple[float, str]]:
    """The lines that a command prints, each with the seconds since its start.

    Args:
        command: The program and its arguments.
        until: A regular expression; the command is killed once it has printed a line that begins so.
        environment: Variables on top of those of this process.

    Raises:
        Skipped: If the command fails, with its last line, or never prints the line that is waited for.
    """
    start, lines, found = time.perf_counter(), [], False
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=os.environ | environment) as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
            if until is not None and re.match(until, line):
                found = True
                process.kill()
                break
    last = lines[-1][1] if lines else 'no output'
    name = next((part for part in command if part.endswith('.py')), command[0])
    if process.returncode and not found:
        raise Skipped(f'{name} ended with status {process.returncode}: {last}')
    if until is not None and not found:
        raise Skipped(f'{name} printed no line {until!r}, its last one was: {last}')
    return lines


def both_scripts(args: argparse.Namespace, folder: Path) -> tuple[list[str], list[str]]:
    """The commands of our train.py and timm's: resnet18 with its stock stem on CIFAR-10 at 32 px, the same recipe.

    Raises:
        Skipped: If a script or the data is not there.
    """
    data = Path(args.data_dir or default_data_dir())
    if not TRAIN.is_file():
        raise Skipped(f'{TRAIN} is not there; run it in a checkout of the project')
    if not (data / 'cifar-10-batches-py').is_dir():
        raise Skipped(f'{data} holds no cifar-10-batches-py; name its folder with --data-dir')
    if args.timm_train is None:
        raise Skipped("timm's own train.py is in no package; name your copy with --timm-train")
    recipe = ['--data-dir', str(data), '-b', '128', '--epochs', '3', '--opt', 'sgd', '--lr', '0.1', '--momentum', '0.9',
              '--weight-decay', '5e-4', '--warmup-epochs', '0', '--seed', '0', '--device', args.device.type,
              '--output', str(folder)]
    amp, timm_amp = ('--no-amp',), ()
    if args.precision != 'float32':
        amp, timm_amp = ('--amp',), ('--amp', '--amp-dtype', args.precision)
    # of its 30,000 images train.py evaluates the 5,000 of the validation part, timm's script 10,000 of its 60,000
    ours = [sys.executable, str(TRAIN), '--task', 'plain', '--model', 'resnet18', '--no-small-image', '--dataset',
            'cifar10', '--train-images', '25000', *amp, *recipe]
    no_jitter = folder / 'no_jitter.yaml'  # a flag can only make it 0, which still costs its time
    no_jitter.write_text('color_jitter: null')
    theirs = [sys.executable, str(args.timm_train), '-c', str(no_jitter), '--model', 'resnet18', '--num-classes', '10',
              '--input-size', '3', '32', '32', '--dataset', 'torch/cifar10', '--channels-last', '--scale', '0.5', '1.0',
              '--workers', str(os.cpu_count()), *timm_amp, *recipe]
    return ours, theirs


def train(args: argparse.Namespace) -> Iterator[Measurement]:
    """train.py beside timm's, three epochs each; the first one, with what it sets up, is not counted.

    Both train on five sixths of the images of an epoch and evaluate the rest.
    """
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = both_scripts(args, Path(folder))
        for number in range(args.runs):
            for command, end, images in ((ours, r'epoch \d/3:', 30_000), (theirs, 'Current checkpoints', 60_000)):
                lines = output([*command, '--experiment', f'{number}-{images}'])
                ends = [seconds for seconds, line in lines if re.match(end, line)]
                if len(ends) != 3:
                    raise Skipped(f'{command[1]} printed {len(ends)} lines {end!r}, expected 3')
                sides.append(images / (ends[2] - ends[0]) * 2)
    yield Measurement('train.py, images trained on and evaluated: resnet18, stock stem, CIFAR-10, 32 px', 'images/s',
                      list(zip(sides[::2], sides[1::2], strict=True)),
                      f'at least {3 if args.device.type == "cuda" else 1.5}')


def startup(args: argparse.Namespace) -> Iterator[Measurement]:
    """Seconds from the start of train.py, and of timm's, to the first update of the weights.

    Imports, data, model, the workers of timm's loader and the first batch are in it.
    """
    # what runs a script as itself, and tells when its optimizer first steps
    watched = ('import os, runpy, sys; from torch.optim.optimizer import register_optimizer_step_pre_hook as hook; '
               'hook(lambda *_: print("first update", flush=True)); '
               'sys.argv = sys.argv[1:]; sys.path[0] = os.path.dirname(sys.argv[0]); '
               'runpy.run_path(sys.argv[0], run_name="__main__")')
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        scripts = both_scripts(args, Path(folder))
        for number in range(args.rounds + 1):
            for whose, (python, *script) in zip(('ours', 'theirs'), scripts, strict=True):
                lines = output([python, '-c', watched, *script, '--experiment', f'{number}-{whose}'],
                               until='first update')
                sides.append(lines[-1][0])
    yield Measurement('train.py, from its start to the first update: resnet18, stock stem, CIFAR-10, 32 px', 's',
                      list(zip(sides[::2], sides[1::2], strict=True))[1:],  # the first ones fill the caches
                      'at most 1')


def import_(args: argparse.Namespace) -> Iterator[Measurement]:
    """What importing this package adds, in fresh interpreters."""
    code = ('import time; a = time.perf_counter(); import timm; b = time.perf_counter(); import timm_emoreg; '
            'print(time.perf_counter() - a, b - a)')
    # the first one also reads the files from the disk
    seconds = [output([sys.executable, '-c', code])[-1][1].split() for _ in range(args.rounds + 1)][1:]
    yield Measurement('import of timm and timm_emoreg over timm', 's', [(float(a), float(b)) for a, b in seconds],
                      '0.15 s more')


def compile_(args: argparse.Namespace) -> Iterator[Measurement | str]:
    """The compiled task beside timm's, each in one graph, and whether train.py compiles anything too late."""
    for backbone, size, batch, small in NETS[args.device.type]:
        calls = (training(build(emoreg, backbone, size, small), size, batch, args, compiled=True)
                 for emoreg in (True, False))
        yield Measurement(f'compiled training step: {backbone}, {size} px, batch {batch}', 's',
                          compare(*calls, args.rounds), 'at most 1.02')
    if not TRAIN.is_file():
        raise Skipped(f'{TRAIN} is not there; run it in a checkout of the project')
    with tempfile.TemporaryDirectory() as folder:
        lines = output([sys.executable, str(TRAIN), '--model', 'emoreg_resnet18', '--dataset', 'emoji', '--epochs', '2',
                        '--torchcompile', '--device', args.device.type, '--output', folder], TORCH_LOGS='recompiles')
    first_epoch, late = True, 0
    for _, line in lines:
        if match := re.match(r'epoch (\d)/2:', line):
            first_epoch = match[1] == '2'
        late += 'Recompiling function' in line and not first_epoch
    yield f'compile: train.py --torchcompile compiled {late} graphs after the first epoch of each stage (goal: 0).'


# -- the command -------------------------------------------------------------------------------------------------------

BENCHES = {'step': step, 'loader': loader, 'muon': muon, 'attention': attention, 'convolution': convolution,
           'train': train, 'startup': startup, 'import': import_, 'compile': compile_}


def machine(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        name = re.search(r'model name\s*: (.*)|$', Path('/proc/cpuinfo').read_text())[1] or name
    name += f', {torch.get_num_threads()} threads of {os.cpu_count()} cores'
    return f'{torch.cuda.get_device_name(device)}; {name}' if device.type == 'cuda' else name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m timm_emoreg.bench', description=__doc__)
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'{", ".join(BENCHES)} (default: all)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--rounds', type=int, default=25,
                        help='of each pair, after one that is not counted; muon and train have 3')
    parser.add_argument('--quick', action='store_true', help='few rounds and images: does it run, not how fast')
    parser.add_argument('--timm-train', type=Path, metavar='PATH', help="your copy of timm's train.py")
    parser.add_argument('--data-dir', metavar='DIR', help='holds CIFAR-10 (default: that of train.py)')
    parser.add_argument('--json', type=Path, metavar='OUT', help='also write every measurement to this file')
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in BENCHES:
            parser.error(f'{name}: unknown, expected one of {", ".join(BENCHES)}.')
    if args.rounds < 1:
        parser.error(f'--rounds {args.rounds}: at least 1 is needed.')
    for path in (args.timm_train, args.json and args.json.absolute().parent):
        if path is not None and not path.exists():
            parser.error(f'{path}: there is no such file or folder.')
    if args.json and args.json.is_dir():
        parser.error(f'--json {args.json}: is a folder. Give the name of a file.')
    args.rounds, args.runs, args.images = (2, 1, 1024) if args.quick else (args.rounds, 3, 8192)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU here. Leave it out, or give cpu.')
    args.device = torch.device(args.device)
    args.steps = 10 if args.device.type == 'cuda' else 1
    args.precision = choose_precision(args.device, 'bfloat16')  # once: the two sides must not differ
    args.autocast = autocast_in(args.device, args.precision)

    start = time.perf_counter()
    figures, notes, failed = [], [], 0
    for name in args.names or BENCHES:
        try:
            for found in BENCHES[name](args):
                (figures if isinstance(found, Measurement) else notes).append(found)
                print(f'measured: {getattr(found, "name", found)}', file=sys.stderr)
        except Skipped as e:
            notes.append(f'{name}: skipped, {e}.')
        except Exception as e:  # what was measured before, and what comes after, is not lost with it
            failed = 1
            notes.append(f'{name}: failed, {type(e).__name__}: {(str(e).splitlines() or [""])[0]}')
    about = (f'{machine(args.device)}; {args.precision}; torch {torch.__version__}, timm {timm.__version__}, '
             f'timm_emoreg {timm_emoreg.__version__}; {time.perf_counter() - start:.0f} s')
    print(about, *notes, sep='\n')
    if figures:
        print(f'\n{table(figures)}')
    if args.json:
        found = {'about': about, 'notes': notes, 'figures': [vars(figure) for figure in figures]}
        write_text(args.json, json.dumps(found, indent=1))
    return failed


if __name__ == '__main__':
    sys.exit(main())
