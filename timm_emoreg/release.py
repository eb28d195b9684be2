"""Making a release from finished runs of train.py: the 16-bit file, its record and its card."""
from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import timm_emoreg

from .cards import make_card, make_config
from .checkpoint import load_training_checkpoint
from .data import STIMULI, load_target
from .experience import find_experience
from .terms import licence_terms
from .zoo import HUB_FILE, Weight, read_records, write_records

__all__ = ['ORGANISATION', 'ROOT', 'Home', 'HubError', 'build', 'config_text', 'project_commit', 'sha256_of']

ROOT = Path(timm_emoreg.__file__).resolve().parents[1]
ORGANISATION = 'timm-emoreg'
MACHINE = ('output', 'experiment', 'resume', 'data_dir', 'device', 'workers', 'log_interval', 'seed', 'loader')
OF_STAGE_1 = ('stimuli', 'stimuli_labels', 'rating_columns', 'rating_scale', 'affect_epochs')
OF_STAGE_2 = ('dataset', 'balance', 'balanced_in', 'modulation', 'separate_experience', 'mixup', 'cutmix')


class HubError(RuntimeError):
    """Something that must not be built or published; the message says what and why."""


class Home:
    """Where records, cards and files lie in a checkout of the project."""

    def __init__(self, root: Path):
        self.records = root / 'timm_emoreg' / 'assets' / 'weights.json'
        self.embedded = root / 'timm_emoreg' / 'assets' / 'weights'
        self.cards = root / 'hub_cards'
        if not self.records.is_file():
            raise HubError(f'{self.records} does not exist: this command works in a checkout of the project.')

    def file(self, weight: Weight) -> Path:
        return self.embedded / weight.file if weight.embedded else self.cards / weight.name / HUB_FILE

    def save(self, weight: Weight) -> None:
        write_records({**read_records(self.records), weight.name: weight}, self.records)

    def find(self, name: str) -> Weight:
        records = read_records(self.records)
        if name not in records:
            raise HubError(f'{name}: there is no record of it. Known: {", ".join(records) or "none"}.')
        return records[name]

    def write_card(self, weight: Weight) -> Path:
        folder = self.cards / weight.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'config.json').write_text(config_text(weight), encoding='utf-8')
        (folder / 'README.md').write_text(make_card(weight), encoding='utf-8')
        return folder


def config_text(weight: Weight) -> str:
    """The text of a weight's ``config.json``."""
    config = make_config(weight, timm_emoreg.BACKBONES[weight.architecture])
    return json.dumps(config, indent=2, ensure_ascii=False) + '\n'


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Run:
    """One finished stage of train.py: its result, its settings, its best checkpoint."""

    def __init__(self, path: Path):
        path = path / 'result.json' if path.is_dir() else path
        try:
            self.result = json.loads(path.read_text())
            self.args = json.loads((path.parents[1] / 'args.json').read_text())
        except (OSError, ValueError) as e:
            raise HubError(f'{path}: no result of a run of train.py with its args.json one folder up ({e}).') from e
        self.path = path
        self.checkpoint = path.parent / 'model_best.pth.tar'

    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in self.args.items() if k not in (*MACHINE, 'experience')}


def _same_recipe(runs: list[Run]) -> None:
    for run in runs[1:]:
        first = runs[0].settings()
        other = {k: (first.get(k), v) for k, v in run.settings().items() if first.get(k) != v}
        if other or run.result['task'] != runs[0].result['task']:
            raise HubError(f'{run.path} has another recipe than {runs[0].path}: '
                           f'{other or run.result["task"]}. Only seeds may differ.')
    seeds = [run.result['seed'] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise HubError(f'Two of the runs have the same seed ({seeds}): they are no independent results.')


def _summary(runs: list[Run], names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    metrics = {}
    for metric, value in runs[0].result['test'].items():
        if metric == 'loss' or (len(names) == 1 and metric.endswith(f'_{names[0]}')):
            continue
        values = [run.result['test'][metric] for run in runs]
        metrics[metric] = {'weight': round(value, 4), 'n': len(values), 'mean': round(statistics.mean(values), 4),
                           'sd': round(statistics.stdev(values), 4) if len(values) > 1 else None}
    return metrics


def _recipe(run: Run, base: str | None) -> str:
    """The shortest command that gives the run's settings, from train.py's own defaults."""
    spec = importlib.util.spec_from_file_location('emoreg_train', ROOT / 'train.py')
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    args = dict(run.args, task=run.result['task'], experience=base if run.result['task'] == 'emoreg' else None)
    if args['experience']:
        args['stimuli'] = None  # stage 1 is named by its result
    command = ['--model', args['model'], '--task', args['task']]
    for key in ('stimuli', 'experience'):
        command += [f'--{key}', args[key]] if args[key] else []
    if args['task'] != 'affect':
        command += ['--dataset', args['dataset']]
    with mock.patch.object(sys, 'argv', ['train.py', *command]):
        given = vars(train.parse_args())
    aside = (*MACHINE, *(OF_STAGE_2 if args['task'] == 'affect' else OF_STAGE_1))
    for key, value in args.items():
        if key in aside or key not in given or given[key] == value:
            continue
        flag = '--' + key.replace('_', '-')
        if isinstance(value, bool):
            command.append(flag if value else flag.replace('--', '--no-', 1))
        elif isinstance(value, dict):
            command += [flag, *(f'{k}={v}' for k, v in value.items())]
        elif value is not None:
            command += [flag, *map(str, value if isinstance(value, list) else [value])]
    return 'python train.py ' + shlex.join([*command, '--seed', str(run.result['seed'])])


def project_commit(root: Path) -> str:
    """The checkout's commit, with ``-dirty`` if code differs from it, or ``unknown``."""
    def git(*command: str) -> str:
        return subprocess.run(('git', '-C', str(root), *command), capture_output=True, text=True, check=True).stdout

    try:
        commit = git('rev-parse', '--verify', '--quiet', 'HEAD').strip()
        dirty = git('status', '--porcelain', '--', 'train.py', 'timm_emoreg', ':!timm_emoreg/assets').strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return commit + ('-dirty' if dirty else '')


def _origin(run: Run, experience: str | None) -> tuple[str, str, tuple[str, ...], str, int]:
    """Stimuli and their labels, names and kind of the affect response, and its size."""
    if run.result['task'] == 'affect':
        state = load_training_checkpoint(run.checkpoint)['task_state']
        kind = 'ratings' if state['target_kind'] == 'ratings' else 'emotion'
        stimuli, labels, names = run.args['stimuli'] or 'emoji', run.args['stimuli_labels'], tuple(state['names'])
    else:
        source = experience or run.result['experience']
        found = find_experience(source)
        kind, names = found.affect_kind, found.names
        known = read_records().get(source)
        if known is not None:
            stimuli, labels = known.stimuli, known.stimuli_labels
        else:
            try:
                args = json.loads((Path(found.source).parents[1] / 'args.json').read_text())
            except (OSError, ValueError) as e:
                raise HubError(f'{found.source}: no args.json one folder up tells what stage 1 showed ({e}).') from e
            stimuli, labels = args['stimuli'] or 'emoji', args['stimuli_labels']
    if stimuli not in STIMULI:
        raise HubError(f'The stimuli {stimuli!r} are your own: the terms of a weight trained on them are not known '
                       f'here. Only weights of {", ".join(STIMULI)} can be built.')
    return stimuli, labels or STIMULI[stimuli][0], names, kind, len(names)


def _form(run: Run, kind: str, num_affect: int) -> dict[str, Any]:
    """The arguments of EmoReg that the run built its model with."""
    args, own = run.args, {name: p.default for name, p in inspect.signature(timm_emoreg.EmoReg).parameters.items()}
    stage_2 = run.result['task'] == 'emoreg'
    form = {'num_affect': num_affect, 'affect_kind': kind,
            'balance': args['balance'] if stage_2 else own['balance'],
            'modulation': args['modulation'] if stage_2 else own['modulation'],
            'experience': 'separate' if stage_2 and args['separate_experience'] else own['experience'],
            'small_image': args['small_image'], **args['model_kwargs']}
    backbone = timm_emoreg.BACKBONES[args['model']]
    if args['small_image'] or timm.get_pretrained_cfg(backbone).fixed_input_size:
        form['img_size'] = args['img_size']
    return form


def _half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    half = {name: (t.half() if t.is_floating_point() else t).contiguous() for name, t in state.items()}
    for name, tensor in half.items():
        if not tensor.isfinite().all():
            raise HubError(f'{name} is not finite in 16 bits (largest magnitude '
                           f'{state[name].abs().max().item():.4g}). Train again, with less of a learning rate.')
    return half


def _same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
        and torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8)) for k in a)


def _answer(model: torch.nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    x = torch.randn(32, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.eval().forward_affect(x) if model.num_classes == 0 else model.eval()(x)


def build(name: str, results: list[Path], plain: list[Path] = (), home: Path = ROOT, embed: bool = False,
          default: bool = False, organisation: str | None = None, commit: str | None = None,
          experience: str | None = None, data_dir: str | None = None) -> Weight:
    """Make record, card and file of a weight from runs of train.py that differ in their seed only.

    Args:
        name: Architecture and tag that the runs must have.
        results: A ``result.json`` for each seed, or its folder; the best validation is released.
        plain: The same of ``--task plain``.
        home: The checkout.
        embed: Put the file into the package instead of ``hub_cards``.
        default: Make it the one that ``pretrained=True`` means.
        organisation: Owner of the repository on the Hub.
        commit: Commit that the runs were made with, the checkout's if None.
        experience: Stage 1, where the run's own note of it no longer leads there.
        data_dir: Folder of the data sets, for the names of the target's classes.

    Raises:
        HubError: If the runs do not fit each other or the name, or a tensor does not survive 16 bits.
        CheckpointError: If the checkpoint cannot be read.
    """
    place = Home(home)
    runs = [Run(path) for path in results]
    _same_recipe(runs)
    if runs[0].result['task'] == 'plain':
        raise HubError(f'{runs[0].path} is a plain backbone: it is the comparison (--plain), not a weight.')
    runs.sort(key=lambda run: -run.result['validation'])
    best = runs[0]
    if best.result['model'] not in timm_emoreg.BACKBONES:
        raise HubError(f'{best.result["model"]} is no registered architecture of this package.')
    others = [Run(path) for path in plain]
    if others:
        _same_recipe(others)
        for run in others:
            if (run.result['task'], run.result['model'], run.result['data']) != (
                    'plain', best.result['model'], best.result['data']):
                raise HubError(f'{run.path} is not the plain baseline of {best.result["model"]} on '
                               f'{best.result["data"]}: it is {run.result["task"]} on {run.result["data"]}.')
    stimuli, labels, names, kind, num_affect = _origin(best, experience)
    target = best.args['dataset'] if best.result['task'] == 'emoreg' else None
    tag = stimuli + (f'_ft_{target}' if target else '')
    if name != f'{best.result["model"]}.{tag}':
        raise HubError(f'{name}: the runs are of {best.result["model"]}.{tag}.')
    if best.args.get('pretrained_backbone'):
        plain_cfg = timm.get_pretrained_cfg(timm_emoreg.BACKBONES[best.result['model']])
        base = f'{plain_cfg.architecture}.{plain_cfg.tag}'
    else:
        base = None
    if target:
        base = f'{best.result["model"]}.{stimuli}'
    classes = load_target(target, data_dir).target.names if target else ()
    form = _form(best, kind, num_affect)
    input_size = (3, best.result['img_size'], best.result['img_size'])

    checkpoint = load_training_checkpoint(best.checkpoint)
    state = checkpoint.get('state_dict_ema') or checkpoint['state_dict']
    half = _half(state)
    model = timm.create_model(best.result['model'], num_classes=len(classes), **form)
    model.load_state_dict(state)
    full_answer = _answer(model, input_size)
    model.load_state_dict(half)
    half_answer = _answer(model, input_size)

    known = read_records(place.records).get(name)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        folder = Path(folder)
        save_file(half, folder / HUB_FILE, metadata={'format': 'pt'})
        if not _same_bits(load_file(folder / HUB_FILE), half):
            raise HubError(f'{name}: the file that was written does not read back bit for bit.')
        sha256 = sha256_of(folder / HUB_FILE)
        weight = Weight(
            architecture=best.result['model'], tag=tag, file=f'{name}.safetensors', sha256=sha256,
            size=(folder / HUB_FILE).stat().st_size, precision='float16',
            logit_difference=float(f'{(full_answer - half_answer).abs().max().item():.3g}'),
            parameters=sum(p.numel() for p in model.parameters()), stimuli=stimuli, stimuli_labels=labels,
            target=target, input_size=input_size, form=best.result['form'], affect_names=names, label_names=classes,
            model_args=form, metric=best.result['metric'], metrics=_summary(runs, names),
            baseline=_summary(others, names) if others else {}, seeds=[run.result['seed'] for run in runs],
            seconds=round(statistics.mean(run.result['seconds'] for run in runs), 1),
            hardware=best.result.get('device', 'unknown'), recipe=_recipe(best, base),
            commit=commit or project_commit(home), licence='', base=base, embedded=embed, default=default,
            hub_id=f'{organisation or (known.hub_id.split("/")[0] if known else ORGANISATION)}/{name}',
            hub_commit=known.hub_commit if known is not None and known.sha256 == sha256 else None)
        weight = replace(weight, licence=licence_terms(weight).licence)
        (folder / 'config.json').write_text(config_text(weight), encoding='utf-8')
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
        if not torch.equal(_answer(loaded, input_size), half_answer):
            raise HubError(f'{name}: the model that timm builds from the folder answers differently.')
        for old in (place.embedded / weight.file, place.cards / name / HUB_FILE):
            old.unlink(missing_ok=True)
        place.write_card(weight)
        place.file(weight).parent.mkdir(parents=True, exist_ok=True)
        (folder / HUB_FILE).chmod(0o644)  # safetensors lets nobody else read what it writes
        (folder / HUB_FILE).replace(place.file(weight))
    if default:
        for other in read_records(place.records).values():
            if other.architecture == weight.architecture and other.default and other.name != name:
                place.save(replace(other, default=False))
    place.save(weight)
    return weight
