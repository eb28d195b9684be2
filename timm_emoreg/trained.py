"""A trained model and the meaning of its outputs: a released weight, or what a run of train.py left."""
from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from timm.data import resolve_model_data_config
from torch import nn

from . import BACKBONES, EmoReg, zoo
from .backbone import create_backbone, own_terms, without_weights
from .data import DataError, Target
from .data.choices import unknown_choice
from .small_image import whole_image_cfg
from .training.checkpoint import BEST, CheckpointError, judged_state, load_training_checkpoint
from .training.experience import Experience, find_experience
from .training.settings import backbone_args, emoreg_args
from .training.trainable import BUILD_ERRORS, DAMAGED_WEIGHTS, reason_of

__all__ = ['Trained', 'check_classes', 'need_affect', 'released_model', 'trained_model']


@dataclass(frozen=True)
class Trained:
    """A model in eval mode.

    Args:
        source: Where it comes from, for headings.
        model: The model; of a run of ``--task plain`` the backbone itself.
        img_size: Height and width of its input.
        affect_names: Name of each affect output; empty for a plain model.
        label_names: Name of each class; empty if it has no classes, or if their names are not known.
        data_dir: Where its run found its data sets; None for their usual place, and for a released weight.
        dataset: What its run trained it on in stage 2; None for a released weight, and for the result of stage 1.
        experience: The result of stage 1 that its run started from, likewise; None also if that was none.
        experience_share: How much of its backbone the run started with, up to 1.
        pretrained_backbone: Whether the rest was the pretrained weights of the backbone, not random ones.
    """

    source: str
    model: EmoReg | nn.Module
    img_size: tuple[int, int]
    affect_names: tuple[str, ...]
    label_names: tuple[str, ...]
    data_dir: str | None = None
    dataset: str | None = None
    experience: str | None = None
    experience_share: float = 1.0
    pretrained_backbone: bool = False

    def label(self, index: int) -> str:
        """Name of a class, with its index where several have that name (ImageNet has two cranes)."""
        name = self.label_names[index] if self.label_names else f'class {index}'
        return f'{name} ({index})' if self.label_names.count(name) > 1 else name


def check_classes(trained: Trained, names: tuple[str, ...], what: str) -> None:
    """Refuse a set whose classes are not those that the model answers with.

    Args:
        trained: The model; one without classes is not asked.
        names: Of the classes of the set.
        what: The set, for the message.

    Raises:
        DataError: If they differ in number, or in their names where the model's are known.
    """
    def some(names: tuple[str, ...]) -> str:
        return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '') if names else 'without names'

    classes = trained.model.num_classes
    if classes and (classes != len(names) or (trained.label_names and trained.label_names != names)):
        raise DataError(f'{what}: {len(names)} classes ({some(names)}), where {trained.source} answers with {classes} '
                        f'others ({some(trained.label_names)}). Give the set that it was trained on by --dataset.')


def _no_affect(what: str) -> DataError:
    return DataError(f'{what} has no affect response: it is a plain model. Give an emoreg_* weight, or a run of '
                     '--task affect or --task emoreg.')


def need_affect(trained: Trained) -> Trained:
    """The same, unless it is a plain model.

    Raises:
        DataError: If it is.
    """
    if not trained.affect_names:
        raise _no_affect(trained.source)
    return trained


def released_model(name: str) -> Trained:
    """A released weight by name and tag, a folder of one as ``local-dir:PATH``, or ``hf-hub:OWNER/NAME``, perhaps with
    ``@REVISION``.

    Raises:
        DataError: If the name is unknown, or means a model without an affect response.
        WeightError: If the weight cannot be had.
    """
    names: tuple[str, ...] = ()
    kind, colon, place = name.partition(':')
    if colon and kind in ('local-dir', 'hf-hub'):
        try:
            repository, _, revision = place.partition('@')
            path = Path(place, 'config.json') if kind == 'local-dir' else Path(
                hf_hub_download(repository, 'config.json', revision=revision or None))
            config = json.loads(path.read_text(encoding='utf-8'))
            plain = timm.is_model(config['architecture']) and config['architecture'] not in (*BACKBONES, 'emoreg')
            names = () if plain else tuple(config['emoreg']['affect_names'])
        except (KeyError, TypeError):  # a model that was exported without them, or no model
            plain = False
        except (OSError, ValueError, HfHubHTTPError) as e:
            raise DataError(f'--model {name}: its config.json cannot be read ({e}). Give the folder of a weight, such '
                            'as local-dir:hub_cards/NAME, or a repository of the Hub.') from None
    else:
        weight = zoo.find(name)
        if weight is None:
            architecture = name.split('.')[0]
            if architecture not in (*BACKBONES, 'emoreg') and timm.is_model(architecture):
                raise _no_affect(f'--model {name}')
            if name in (*BACKBONES, 'emoreg'):
                have = sorted({w.architecture for w in zoo.WEIGHTS.values() if w.at_hand})
                raise DataError(f'--model {name}: no weight of it is released. There are weights of '
                                f'{", ".join(have)}; or give a run of train.py with --checkpoint.')
            raise unknown_choice('', '--model', name, [w.name for w in zoo.WEIGHTS.values() if w.at_hand],
                                 'Or give a run of train.py with --checkpoint.')
        name, names = weight.name, weight.affect_names
    try:
        model = timm.create_model(name, pretrained=True)
        labels = tuple(model.pretrained_cfg.get('label_names') or ())
    except (*BUILD_ERRORS, *DAMAGED_WEIGHTS, OSError) as e:
        if not colon:
            raise
        if plain:  # in a form that timm's own model has no argument for, such as small_image
            raise _no_affect(f'--model {name}') from None
        weight = zoo.WEIGHTS.get(Path(place.partition('@')[0]).name)
        remedy = (f'The file of this weight is in the package: --model {weight.name}.' if weight and weight.embedded
                  else 'It should hold what timm.models.save_for_hf writes.')
        raise DataError(f'--model {name}: timm cannot load it ({reason_of(e)}). {remedy}') from e
    if not isinstance(model, EmoReg):
        raise _no_affect(f'--model {name}')
    channels = resolve_model_data_config(model)['input_size'][0]
    if channels != 3:
        raise DataError(f'--model {name}: takes images of {channels} channels, and pictures are read as RGB. Give a '
                        'weight that takes 3.')
    if len(names) != model.num_affect:
        names = _numbered(model.num_affect)
    return Trained(name, model.eval(), resolve_model_data_config(model)['input_size'][1:], names,
                   labels if len(labels) == model.num_classes else ())


def _numbered(count: int) -> tuple[str, ...]:
    """Names of affect outputs that have none."""
    return tuple(f'affect {i + 1}' for i in range(count))


def _find_checkpoint(where: Path) -> Path:
    if not where.is_dir():
        return where
    for folder in (where, where / 'emoreg', where / 'plain', where / 'affect'):
        if (folder / BEST).is_file():
            return folder / BEST
        if (folder / 'result.json').is_file():
            raise CheckpointError(f'{folder}: finished, but its checkpoints are gone. Train it again under another '
                                  'name; a study keeps those of its runs with --keep-checkpoints.')
        if folder.name == 'plain' and folder.is_dir():  # with stimuli it has a stage 1, too, which was not asked for
            break
    raise CheckpointError(f'{where}: holds no {BEST}, neither itself nor in its folders emoreg, plain and '
                          'affect. Give a run of train.py that finished an epoch, or a checkpoint.')


def _stage_1_of(checkpoint: Path, args: dict[str, Any]) -> str:
    """Where stage 1 left its result for a checkpoint of stage 2: where the settings of the run say, or beside it."""
    return args['experience'] or str(checkpoint.resolve().parent.parent / 'affect' / BEST)


def _experience_of(checkpoint: Path, args: dict[str, Any], given: str | None) -> Experience:
    source = given or _stage_1_of(checkpoint, args)
    if source == 'none':
        raise CheckpointError(f'{checkpoint}: was trained with --experience none, so its affect response was never '
                              'taught anything that could be named. Give a run with an experience.')
    try:
        return find_experience(source)
    except CheckpointError as e:
        raise CheckpointError(f'{checkpoint}: what its affect response means stands in the result of its stage 1, '
                              f'which cannot be read ({e}) Name it with --experience.') from None


def _of_no_run(path: Path) -> CheckpointError:
    return CheckpointError(f'{path}: holds no settings of its run, so train.py did not write it. Give a run of '
                           "train.py; a checkpoint of timm's script is loaded by timm.create_model(NAME, "
                           'checkpoint_path=PATH).')


def trained_model(where: str | Path, experience: str | None = None) -> Trained:
    """The model of a checkpoint of train.py, of any task.

    Its tensors and settings say how it was built and what its classes are called; the names of its affect outputs come
    from stage 1.

    Args:
        where: A checkpoint, or the folder of a run, whose best stage-2 checkpoint goes before that of stage 1.
        experience: The result of stage 1, where it lies elsewhere now.

    Raises:
        CheckpointError: If there is none, or it cannot be used.
        DataError: If its model has no affect response and no run of ``--task plain`` made it.
    """
    path = _find_checkpoint(Path(where))
    checkpoint = load_training_checkpoint(path)
    if not isinstance(checkpoint.get('args'), Namespace):
        raise _of_no_run(path)
    args = vars(checkpoint['args'])
    state = judged_state(checkpoint)
    if 'head_affect.weight' not in state:
        if args.get('task') != 'plain':
            raise _no_affect(str(path))
        return _plain_model(where, path, args, state)
    if 'experience' not in args:  # timm's own script keeps its settings in the same place
        raise _of_no_run(path)
    task = checkpoint.get('task_state') or {}
    if args['experience'] == 'none' and experience is None and 'affect_kind' in args:
        names, kind = args['affect_names'], args['affect_kind']
        names = names or _numbered(len(state['head_affect.weight']))
    elif 'names' in task:
        answers = Target(task['target_kind'], tuple(task['names']))
        names, kind = answers.names, answers.affect_kind
    else:
        found = _experience_of(path, args, experience)
        names, kind = found.names, found.affect_kind
    if len(names) != len(state['head_affect.weight']):
        raise CheckpointError(f'{path}: its affect response has {len(state["head_affect.weight"])} outputs, its '
                              f'experience names {len(names)} ({", ".join(names)}). Name the right one with '
                              '--experience.')
    num_classes = len(state['head.weight']) if 'head.weight' in state else 0
    name, form = emoreg_args(args)
    model = timm.create_model(
        name, num_classes=num_classes, num_affect=len(names), affect_kind=kind,
        balance=args['balance'] if num_classes else 0.5, modulation='modulation.gain.weight' in state,
        experience='separate' if any(k.startswith('backbone_emo.') for k in state) else 'shared', **form)
    return _loaded(where, path, args, state, model, names)


def _plain_model(where: str | Path, path: Path, args: dict[str, Any], state: dict[str, Any]) -> Trained:
    model = create_backbone(args['backbone'], num_classes=len(args.get('label_names', ())), **backbone_args(args))
    return _loaded(where, path, args, state, model, ())


def _loaded(where: str | Path, path: Path, args: dict[str, Any], state: dict[str, Any], model: nn.Module,
            affect_names: tuple[str, ...]) -> Trained:
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise CheckpointError(f'{path}: its tensors are not those of its settings '
                              f'({str(e).splitlines()[-1].strip()}). Train again.') from None
    labels = tuple(args.get('label_names', ())) if model.num_classes else ()
    # what timm's transforms and an export of the model go by; where the backbone's first weights came from is not it
    model.pretrained_cfg = model.default_cfg = {
        **without_weights(model.pretrained_cfg), **whole_image_cfg((3, args['img_size'], args['img_size'])),
        'num_classes': model.num_classes, 'label_names': labels or None}
    if args.get('pretrained_backbone'):
        model.pretrained_cfg |= own_terms(args['backbone'], args['model_kwargs'].get('pretrained_cfg_overlay'))
    stage_2 = isinstance(model, EmoReg) and model.num_classes > 0
    experience = _stage_1_of(path, args) if stage_2 else 'none'
    return Trained(str(where), model.eval(), (args['img_size'],) * 2, affect_names, labels, args['data_dir'],
                   args.get('dataset') if model.num_classes else None, None if experience == 'none' else experience,
                   args.get('experience_share', 1.0), args.get('pretrained_backbone', False))
