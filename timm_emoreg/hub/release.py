"""Making a release from finished runs of train.py: the file in 16 or 8 bits, its record and its card."""
from __future__ import annotations

import inspect
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import timm_emoreg

from ..answers import answer, top1
from ..data import CONTENT_LABELS, STIMULI, TARGETS, ImageSet, Target, load_target
from ..eight_bit import from_eight_bits, to_eight_bits
from ..files import replacing, sha256_of
from ..trained import Trained
from ..training.checkpoint import judged_state, load_training_checkpoint
from ..training.commit import project_commit
from ..training.experience import find_experience, without_drop_rates
from ..training.settings import backbone_args
from ..zoo import HUB_FILE, Weight, read_records, write_records
from .cards import make_card, make_config, rounded_up
from .finished_runs import ROOT, HubError, Run, check_baseline, check_same_recipe, recipe_of, summary_of
from .terms import licence_terms

__all__ = ['ORGANISATION', 'Checkout', 'build', 'config_text']

ORGANISATION = 'timm-emoreg'
OF_YOURS = 'For a weight of yours see timm.models.save_for_hf in hub_cards/WALK.md.'


class Checkout:
    """Where records, cards and files lie in a checkout of the project."""

    def __init__(self, root: Path):
        self.records = root / 'timm_emoreg' / 'assets' / 'weights.json'
        self.embedded = root / 'timm_emoreg' / 'assets' / 'weights'
        self.cards = root / 'hub_cards'
        if not self.records.is_file() or not (root / 'train.py').is_file():  # an installed package has records, too
            raise HubError(f'{root} is no checkout of the project, and this command works in one. Give it with --home.')

    def file(self, weight: Weight) -> Path:
        return self.embedded / weight.file if weight.embedded else self.cards / weight.name / HUB_FILE

    def save(self, weight: Weight) -> None:
        write_records({**read_records(self.records), weight.name: weight}, self.records)

    def find(self, name: str) -> Weight:
        records = read_records(self.records)
        if name not in records:
            raise HubError(f'{name}: there is no record of it. Known: {", ".join(records) or "none"}.')
        return records[name]

    def take(self, weight: Weight, file: Path) -> None:
        """Put a weight's file, card and record in their places; if it is the default, it is the only one.

        The old ones stay until nothing is left to do that needs room on the disk.
        """
        records = {name: replace(other, default=other.default and not (
                       weight.default and other.architecture == weight.architecture))
                   for name, other in read_records(self.records).items()}
        new = self.file(weight)
        new.parent.mkdir(parents=True, exist_ok=True)
        with self._new_card(weight), replacing(self.records) as part:
            write_records({**records, weight.name: weight}, part)
            file.replace(new)
        for old in {self.embedded / weight.file, self.cards / weight.name / HUB_FILE} - {new}:
            old.unlink(missing_ok=True)

    def write_card(self, weight: Weight) -> Path:
        with self._new_card(weight) as folder:
            return folder

    @contextmanager
    def _new_card(self, weight: Weight) -> Iterator[Path]:
        """A card that takes its place when the block has ended well."""
        folder = self.cards / weight.name
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / 'config.json') as config, replacing(folder / 'README.md') as card:
            config.write_text(config_text(weight), encoding='utf-8')
            card.write_text(make_card(weight), encoding='utf-8')
            yield folder


def config_text(weight: Weight) -> str:
    """The text of a weight's ``config.json``."""
    config = make_config(weight, timm_emoreg.BACKBONES[weight.architecture])
    return json.dumps(config, indent=2, ensure_ascii=False) + '\n'


class Origin(NamedTuple):
    """What taught the affect response of a weight, and what its training started from."""

    stimuli: str
    labels: str
    names: tuple[str, ...]
    kind: str
    base: str | None


def _refuse_control(args: dict[str, Any], where: Path | str) -> None:
    labels = args.get('stimuli_labels')
    shuffled = args.get('shuffle_stimuli_labels')
    if shuffled or labels == 'rotation' or labels in CONTENT_LABELS.values():
        raise HubError(f'{where}: its stage 1 had {"shuffled labels" if shuffled else f"the labels {labels!r}"}, so it '
                       'is a control of the study and no weight to release. Train on affective labels: leave '
                       f'--{"shuffle-" if shuffled else ""}stimuli-labels out.')


def _known_stimuli(args: dict[str, Any]) -> tuple[str, str]:
    stimuli = args['stimuli'] or 'emoji'
    if stimuli not in STIMULI:
        raise HubError(f'The stimuli {stimuli!r} are your own, or several sets: the terms of a weight trained on them '
                       f'are not known here. Only weights of one of {", ".join(STIMULI)} can be built. {OF_YOURS}')
    return stimuli, args['stimuli_labels'] or STIMULI[stimuli][0]


def _released_state(weight: Weight, place: Checkout) -> dict[str, Tensor]:
    file = place.file(weight)
    if file.is_file() and sha256_of(file) == weight.sha256:
        return load_file(file)
    return _half(find_experience(weight.name).state_dict)  # a published one need not lie in the checkout


def _origin_of_stage_1(run: Run) -> Origin:
    state = load_training_checkpoint(run.checkpoint)['task_state']
    answers = Target(state['target_kind'], tuple(state['names']))
    base = None
    if run.args.get('pretrained_backbone'):
        cfg = timm.get_pretrained_cfg(timm_emoreg.BACKBONES[run.result['model']])
        base = f'{cfg.architecture}.{cfg.tag}'
    return Origin(*_known_stimuli(run.args), answers.names, answers.affect_kind, base)


def _origin_of_stage_2(run: Run, experience: str | None, place: Checkout) -> Origin:
    if run.result['experience'] == 'none':
        raise HubError(f'{run.path}: was trained with --experience none, so it is a control of the study and no weight '
                       'to release. Train it from a released stage 1.')
    source, records = experience or run.result['experience'], read_records(place.records)
    if source in records:
        known = records[source]
        base = f'{run.result["model"]}.{known.stimuli}'
        origin = Origin(known.stimuli, known.stimuli_labels, known.affect_names, known.model_args['affect_kind'], base)
        released = source == base
    elif os.path.exists(source):
        found = find_experience(source)
        try:
            args = json.loads((Path(found.source).resolve().parent.parent / 'args.json').read_text(encoding='utf-8'))
        except (OSError, ValueError) as e:
            raise HubError(f'{found.source}: no args.json one folder up tells what stage 1 showed ({e}). Bring it '
                           'back from a copy of the run.') from e
        _refuse_control(args, found.source)
        stimuli, labels = _known_stimuli(args)
        base = f'{run.result["model"]}.{stimuli}'
        origin = Origin(stimuli, labels, found.names, found.affect_kind, base)
        released = base in records and _same_bits(_half(found.state_dict), _released_state(records[base], place))
    else:
        raise HubError(f'{run.path}: its experience {source} is neither in {place.records} nor a file or folder here. '
                       'Say with --experience where it lies now.')
    if not released:
        raise HubError(f'{run.path}: its experience {source} is not the released {base}, which its card would name. '
                       f'Release its stage 1 first: build {base} from that run, or train with --experience {base}.')
    if run.args.get('rehearsal') and run.args['stimuli'] != origin.stimuli:
        raise HubError(f'{run.path}: rehearsed the stimuli {run.args["stimuli"]!r}, and its stage 1 showed '
                       f'{origin.stimuli!r}; its card would name these only. Train with --stimuli {origin.stimuli}.')
    return origin


def _form(run: Run, kind: str, num_affect: int) -> dict[str, Any]:
    """The arguments of EmoReg that the run built its model with."""
    args, own = run.args, {name: p.default for name, p in inspect.signature(timm_emoreg.EmoReg).parameters.items()}
    stage_2 = run.result['task'] == 'emoreg'
    return {'num_affect': num_affect, 'affect_kind': kind,
            'balance': args['balance'] if stage_2 else own['balance'],
            'modulation': args['modulation'] if stage_2 else own['modulation'],
            'experience': 'separate' if stage_2 and args['separate_experience'] else own['experience'],
            **backbone_args({**args, 'model_kwargs': without_drop_rates(args['model_kwargs'])})}


def _half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (t.half() if t.is_floating_point() else t).contiguous() for name, t in state.items()}


def _rounded(state: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    """The state as a file holds it.

    Raises:
        HubError: If a tensor does not survive that.
    """
    rounded = to_eight_bits(state) if precision == 'int8' else _half(state)
    for name, tensor in state.items():
        if not all(t.isfinite().all() for t in (tensor, rounded[name])):
            raise HubError(f'{name} is not finite in {precision} (largest magnitude '
                           f'{tensor.abs().max().item():.4g}). Train again, with less of a learning rate.')
    return rounded


def _same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
        and torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8)) for k in a)


def _answer(model: torch.nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    x = torch.randn(32, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.eval().forward_affect(x) if model.num_classes == 0 else model.eval()(x)


class _Written(NamedTuple):
    """What was measured of a file of weights: its answer to a fixed batch, its size, and what its precision costs."""

    answer: Tensor
    difference: float
    parameters: int
    eight_bits: dict[str, float] | None


def _comparable(results: list[Path], plain: list[Path]) -> tuple[list[Run], list[Run]]:
    """The runs of a weight, the best on validation data first, and those of its plain baseline.

    Raises:
        HubError: If one card cannot speak of all of them.
    """
    runs, others = ([Run(path) for path in paths] for paths in (results, plain))
    check_same_recipe(runs)
    if runs[0].result['task'] == 'plain':
        raise HubError(f'{runs[0].path} is a plain backbone: it is the comparison (--plain), not a weight.')
    runs.sort(key=lambda run: -run.result['validation'])
    if runs[0].result['model'] not in timm_emoreg.BACKBONES:
        raise HubError(f'{runs[0].result["model"]} is no registered architecture of this package, such as '
                       f'{next(iter(timm_emoreg.BACKBONES))}. {OF_YOURS}')
    if others:
        check_same_recipe(others)
        check_baseline(others, runs[0])
    _refuse_control(runs[0].args, runs[0].path)
    return runs, others


def _write(run: Run, test: ImageSet | None, form: dict[str, Any], input_size: tuple[int, int, int], precision: str,
           file: Path) -> _Written:
    """Write the best weights of a run in 16 or 8 bits and measure what that costs, on the test part for 8 bits.

    Raises:
        HubError: If a tensor does not survive it.
    """
    state = judged_state(load_training_checkpoint(run.checkpoint))
    rounded = _rounded(state, precision)
    save_file(rounded, file, metadata={'format': 'pt'})
    file.chmod(0o644)  # safetensors lets nobody else read what it writes
    if not _same_bits(load_file(file), rounded):
        raise HubError(f'{run.path}: the file that was written does not read back bit for bit.')
    model = timm.create_model(run.result['model'], num_classes=len(test.target) if test else 0, **form)
    outputs, answers = [], []
    for tensors in (state, from_eight_bits(rounded)):
        model.load_state_dict(tensors)
        outputs.append(_answer(model, input_size))
        if precision == 'int8':
            trained = Trained(str(run.path), model, input_size[1:], (), test.target.names)
            answers.append(answer(trained, test)[0].regulated)
    eight_bits = None
    if answers:
        right = [round(top1(given, test.targets), 2) for given in answers]
        eight_bits = {'images': len(test), 'float32': right[0], 'int8': right[1],
                      'changed': int((answers[0].argmax(dim=1) != answers[1].argmax(dim=1)).sum())}
    difference = float(rounded_up((outputs[0] - outputs[1]).abs().max().item(), digits=3))
    return _Written(outputs[1], difference, sum(p.numel() for p in model.parameters()), eight_bits)


def build(name: str, results: list[Path], plain: list[Path] = (), home: Path = ROOT, embed: bool = False,
          default: bool = False, organisation: str | None = None, commit: str | None = None,
          experience: str | None = None, data_dir: str | None = None, precision: str = 'float16') -> Weight:
    """Make record, card and file of a weight from runs of train.py that differ in their seed only.

    Args:
        name: Architecture and tag that the runs must have.
        results: A ``result.json`` for each seed, or its folder; the best validation is released.
        plain: The same of ``--task plain``.
        home: The checkout.
        embed: Put the file into the package instead of ``hub_cards``.
        default: Make it the one that ``pretrained=True`` means.
        organisation: Owner of the repository on the Hub.
        commit: Commit that the runs were made with; if None, the one that the released run noted, else the
            checkout's.
        experience: Stage 1, where the run's own note of it no longer leads there.
        data_dir: Folder of the data sets, for the names of the target's classes and, in 8 bits, its test images.
        precision: 'float16', or 'int8' for a file of half the size, see `timm_emoreg.eight_bit`.

    Raises:
        HubError: If the runs do not fit each other, the name or a released stage 1, or a tensor is not finite
            in the precision, or stage 1 is asked for in int8.
        CheckpointError: If the checkpoint cannot be read.
        ValueError: If the terms of its data allow no licence.
    """
    place = Checkout(home)
    runs, others = _comparable(results, plain)
    best = runs[0]
    if best.result['task'] == 'emoreg':
        origin, target = _origin_of_stage_2(best, experience, place), best.args['dataset']
        if target not in TARGETS:
            raise HubError(f'{best.path}: its target {target!r} is your own, and released weights are of one of '
                           f'{", ".join(TARGETS)}. {OF_YOURS}')
    else:
        origin, target = _origin_of_stage_1(best), None
    tag = origin.stimuli + (f'_ft_{target}' if target else '')
    if name != f'{best.result["model"]}.{tag}':
        raise HubError(f'{name}: the runs are of {best.result["model"]}.{tag}.')
    if precision == 'int8' and not target:
        raise HubError(f'{name}: is of stage 1, which stays in 16 bits, because the stage 2 that started from it is '
                       'known by its bits. Build it without --eight-bits.')
    test = load_target(target, data_dir).test if target else None
    classes = test.target.names if test else ()
    form = _form(best, origin.kind, len(origin.names))
    input_size = (3, best.result['img_size'], best.result['img_size'])

    known = read_records(place.records).get(name)
    hub_id = f'{organisation or (known.hub_id.split("/")[0] if known else ORGANISATION)}/{name}'
    with tempfile.TemporaryDirectory(dir=home) as folder:
        file = Path(folder, HUB_FILE)
        tensors = _write(best, test, form, input_size, precision, file)
        sha256 = sha256_of(file)
        weight = Weight(
            architecture=best.result['model'], tag=tag, file=f'{name}.safetensors', sha256=sha256,
            size=file.stat().st_size, precision=precision, logit_difference=tensors.difference,
            eight_bits=tensors.eight_bits, parameters=tensors.parameters, stimuli=origin.stimuli,
            stimuli_labels=origin.labels, target=target, input_size=input_size, form=best.result['form'],
            affect_names=origin.names, label_names=classes, model_args=form, metric=best.result['metric'],
            metrics=summary_of(runs, origin.names), baseline=summary_of(others, origin.names) if others else {},
            seeds=[run.result['seed'] for run in runs],
            seconds=round(statistics.mean(run.result['seconds'] for run in runs), 1),
            hardware=best.result.get('device', 'unknown'), recipe=recipe_of(best, origin.base),
            commit=commit or best.args.get('commit') or project_commit(home), licence='', base=origin.base,
            embedded=embed, default=default,
            hub_id=hub_id,
            hub_commit=known.hub_commit if known and (known.sha256, known.hub_id) == (sha256, hub_id) else None)
        weight = replace(weight, licence=licence_terms(weight).licence)
        Path(folder, 'config.json').write_text(config_text(weight), encoding='utf-8')
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
        if not torch.equal(_answer(loaded, input_size), tensors.answer):
            raise HubError(f'{name}: the model that timm builds from the folder answers differently.')
        place.take(weight, file)
    return weight
