"""Settings of train.py: what contradicts what, what follows from others, and what the data must hold for them.

A wrong setting is refused before anything is trained or written.
"""
from __future__ import annotations

import difflib
import json
import re
from argparse import Namespace
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

from .. import BACKBONES
from ..data import STIMULI, TARGETS, DataError, Splits, absolute, stimuli_parts
from ..data.progressive import SMALLEST
from ..files import DamagedError, read_json
from ..regulation import check_regulation
from ..small_image import LARGEST_SIZE, has_small_image_form
from .optim import base_optimizer

__all__ = ['LABELS_OF_STAGE_1', 'REGULATION', 'SettingsError', 'backbone_args', 'batch_of_a_step', 'check_batch',
           'check_tag', 'complete_settings', 'emoreg_args', 'mixes_images', 'shapes_stage_1', 'unknown_model']

LABELS_OF_STAGE_1 = ('stimuli_labels', 'shuffle_stimuli_labels', 'rating_columns')
# arguments of a timm model that have a flag of their own
OWN_FLAGS = {'small_image': '--small-image', 'img_size': '--img-size', 'pretrained': '--pretrained-backbone',
             'drop_rate': '--drop', 'drop_path_rate': '--drop-path', 'pretrained_backbone': '--pretrained-backbone',
             'backbone': '--model', 'balance': '--balance', 'modulation': '--modulation or --no-modulation',
             'experience': '--experience or --separate-experience',
             'checkpoint_path': '--experience for what stage 1 wrote', 'device': '--device', 'dtype': '--amp-dtype'}
OF_THE_DATA = ('num_classes', 'num_affect', 'affect_kind')
# choices of the dual head and its training
REGULATION = ('balance', 'balanced_in', 'modulation', 'keep_affect', 'affect_lr_scale', 'separate_experience')
CANNOT_OPTIMIZE = (AssertionError, ImportError, RuntimeError, TypeError, ValueError)  # what timm's optimizers raise
FREE_ON_RESUME = ('device', 'data_dir', 'workers', 'log_interval')


class SettingsError(ValueError):
    """Settings that cannot be trained with."""


def flag(name: str, value: Any = None) -> str:
    """A setting as it is written on the command line, with its value if one is given."""
    if isinstance(value, bool):
        return f'--{"" if value else "no-"}{name.replace("_", "-")}'
    words = [] if value is None else [value]
    if isinstance(value, (list, tuple)):
        words = value
    elif isinstance(value, dict):
        words = [f'{key}={each}' for key, each in value.items()]
    return ' '.join((f'--{name.replace("_", "-")}', *map(str, words)))


def complete_settings(args: Namespace, given: Collection[str]) -> Namespace:
    """The settings that a run is trained with, from those of its command line.

    Args:
        args: What train.py's parser gives.
        given: The names that the command line has.

    Returns:
        Those of the saved run with ``--resume``. Otherwise `args`, with paths made absolute and the balance a number
        where it is one, and with `backbone` (timm's name of it), `img_size`, `small_image` and `experiment`.

    Raises:
        SettingsError: If one setting is out of its range, unknown or contradicts another one, or if the run to resume
            is none.
    """
    for name in ('experience', 'stimuli', 'stimuli_labels', 'dataset', 'data_dir', 'experiment', 'opt'):
        if getattr(args, name) == '':  # a variable of the shell that is not set
            raise SettingsError(f'{flag(name)}: is empty. Give a value, or leave it out.')
    for name, known in (('data_dir', ()), ('experience', ('none',)), ('stimuli', STIMULI), ('dataset', TARGETS)):
        if (value := getattr(args, name)) is not None:  # a resumed run may have another working directory
            parts = stimuli_parts(value) if name == 'stimuli' else (value,)
            setattr(args, name, '+'.join(absolute(part, known) for part in parts))
    if args.resume:
        return _of_saved_run(args, given)

    _check_method(args)
    _check_model(args)
    _check_stages(args, given)
    _check_recipe(args)
    _check_has_effect(args, given)

    args.backbone = BACKBONES.get(args.model, args.model)
    main_set = (args.stimuli or 'emoji') if args.task == 'affect' else args.dataset
    small = all(part in ('cifar10', 'cifar100', *STIMULI) for part in stimuli_parts(main_set))
    args.img_size = args.img_size or (32 if small else 224)
    if args.start_img_size is not None:
        if not SMALLEST <= args.start_img_size <= args.img_size:
            raise SettingsError(f'--start-img-size {args.start_img_size}: expected {SMALLEST} to {args.img_size}, '
                                'the --img-size.')
        if timm.get_pretrained_cfg(args.backbone).fixed_input_size:
            raise SettingsError(f'--start-img-size {args.start_img_size}: {args.backbone} takes images of one size '
                                'only. Leave it out, or use a --model that takes any, such as a ResNet.')
    if args.cutout >= args.img_size:  # smaller images of --start-img-size are shrunk with their square
        raise SettingsError(f'--cutout {args.cutout}: would leave nothing of images of {args.img_size} px. Choose a '
                            'smaller square.')
    if args.small_image is None:
        args.small_image = args.img_size <= LARGEST_SIZE and has_small_image_form(args.backbone)
    stamp = datetime.now().strftime('%Y%m%d-%H%M%S')
    args.experiment = args.experiment or f'{stamp}-{args.model}-{Path(main_set).name}'
    args.output, args.resume = str(args.output), None
    return args


def _of_saved_run(args: Namespace, given: Collection[str]) -> Namespace:
    if not (args.resume / 'args.json').is_file():
        above = [folder for folder in args.resume.absolute().parents[:2] if (folder / 'args.json').is_file()]
        raise SettingsError(f'--resume {args.resume}: holds no args.json, so it is no output folder of this script. '
                            f'Give {above[0] if above else "that of a run, such as output/RUN"}.')
    if other := sorted({*given} - {'resume', *FREE_ON_RESUME}):
        raise SettingsError(f'{flag(other[0], getattr(args, other[0]))}: --resume goes on with the settings of the '
                            f'run. Only {", ".join(map(flag, FREE_ON_RESUME))} can be given beside it.'
                            + (' Move or rename the folder of the run instead.' if other[0] in ('experiment', 'output')
                               else ''))
    try:
        saved = read_json(args.resume / 'args.json')
    except DamagedError as e:
        raise SettingsError(f'--resume {e}') from e
    folder = args.resume.resolve()  # which may have been moved
    here = {name: getattr(args, name) for name in (*given, 'device')}
    here |= {'resume': str(folder), 'output': str(folder.parent), 'experiment': folder.name}
    return Namespace(**{**vars(args), **saved, **here})


def _as_flags(message: str) -> str:
    """A message about arguments of `check_regulation`, about the flags that gave them."""
    message = message.replace("experience='separate'", '--separate-experience')
    return re.sub(rf"\b({'|'.join((*REGULATION, 'rehearsal'))})=(?:'(\w+)'|([-+.\w]*\w))",
                  lambda found: f'{flag(found[1])} {found[2] or found[3]}', message)


def _check_method(args: Namespace) -> None:
    """Seed, balance and the other choices of regulation."""
    if args.seed >= 2 ** 31:
        raise SettingsError(f'--seed {args.seed}: expected a number below {2 ** 31}.')
    if args.balance not in ('learned', 'gate'):
        try:
            args.balance = float(args.balance)
        except ValueError:
            raise SettingsError(f"--balance {args.balance}: expected a number in [0, 1], 'learned' or 'gate'."
                                ) from None
    if args.task == 'emoreg':
        try:  # whatever stage 1 will give, its affect response varies
            check_regulation(args.balance, 2, 'emotion', 'separate' if args.separate_experience else 'shared',
                             args.balanced_in, args.keep_affect, args.rehearsal)
        except ValueError as e:
            raise SettingsError(_as_flags(str(e))) from e


def check_tag(model: str) -> None:
    """Refuse a tag that timm does not know of a model that it knows.

    Raises:
        SettingsError: If it is one.
    """
    name, dot, tag = model.partition('.')
    known = [found.partition('.')[2] for found in get_arch_pretrained_cfgs(name)] if dot else ()
    if dot and tag not in known:
        raise SettingsError(f'--model {model}: {name} has no tag {tag!r}. Known: {", ".join(known) or "none"}.')


def unknown_model(given_by: str, model: str) -> SettingsError:
    """The error to raise for a model that timm does not know, given by a flag."""
    near = difflib.get_close_matches(model.split('.')[0], timm.list_models(), n=1)
    return SettingsError(f"{given_by} {model}: unknown. timm.list_models() names all, emoreg_* are this package's."
                         + (f' Did you mean {near[0]}?' if near else ''))


def _check_model(args: Namespace) -> None:
    if args.model == 'emoreg':
        backbone = args.model_kwargs.get('backbone', 'convnext_atto')
        raise SettingsError(f'--model emoreg: wraps a backbone. Give the name of that, such as --model {backbone}.')
    if ':' in args.model:
        raise SettingsError(f'--model {args.model}: is a place of weights. Give the name of the model, and the weights '
                            'of a stage 1 by --experience.')
    if not timm.is_model(args.model.split('.')[0]):
        raise unknown_model('--model', args.model)
    name, dot, _ = args.model.partition('.')
    if dot and name in BACKBONES:
        raise SettingsError(f'--model {args.model}: names a weight. Give --model {name}, and the weight of a stage 1 '
                            'by --experience.')
    check_tag(args.model)
    if args.model_kwargs.get('features_only'):
        raise SettingsError('--model-kwargs features_only=True: gives feature maps, and no classes. Leave it out.')
    if args.model_kwargs.get('global_pool') == '':
        raise SettingsError('--model-kwargs global_pool=: leaves no pooled vector for the classes to read. Name a '
                            'pooling, or leave it out.')
    for name, own in OWN_FLAGS.items():
        if name in args.model_kwargs:
            raise SettingsError(f'--model-kwargs {name}={args.model_kwargs[name]}: use {own} instead, or leave it out.')
    for name in OF_THE_DATA:
        if name in args.model_kwargs:
            raise SettingsError(f'--model-kwargs {name}={args.model_kwargs[name]}: is what images and stimuli have. '
                                'Leave it out.')
    if args.model_kwargs.get('in_chans', 3) != 3:
        raise SettingsError(f'--model-kwargs in_chans={args.model_kwargs["in_chans"]}: all images are trained on as '
                            'RGB. Leave it out.')


def _check_stages(args: Namespace, given: Collection[str]) -> None:
    """Which stage runs, and on what."""
    if args.experiment and (Path(args.experiment).name != args.experiment or args.experiment == '..'):
        raise SettingsError(f'--experiment {args.experiment}: names a folder in --output, and is no path. Give the '
                            'rest of it by --output.')
    _check_without_stage_1(args)
    if args.task != 'emoreg' and (late := [name for name in REGULATION if name in given]):
        raise SettingsError(f'{flag(late[0], getattr(args, late[0]))}: is a choice of the dual head, which --task '
                            f'{args.task} does not have. Leave it out.')
    if args.task == 'affect':
        _check_stage_1_alone(args, given)
    _check_rehearsal(args)
    if args.shuffle_stimuli_labels and args.stimuli_labels == 'rotation':
        raise SettingsError('--shuffle-stimuli-labels leaves nothing of --stimuli-labels rotation, which is a control '
                            'of its own. Leave one of them out.')
    if args.rating_scale and not args.rating_columns:
        raise SettingsError(f'{flag("rating_scale", args.rating_scale)}: is that of --rating-columns. Give both.')
    if args.experience not in (None, 'none'):
        _check_given_experience(args)
    if args.experience_share < 1:
        _check_share(args)


def _check_without_stage_1(args: Namespace) -> None:
    """The dual head without an experience, and a plain model without stimuli."""
    if args.experience == 'none' and args.task == 'plain':
        raise SettingsError('--experience none: is for the dual head, which --task plain does not have. Leave it out.')
    untaught = [name for name in ('affect_epochs', 'shuffle_stimuli_labels') if getattr(args, name)]
    if args.experience == 'none' and untaught and not (args.rehearsal and untaught == ['shuffle_stimuli_labels']):
        raise SettingsError(f'{flag(untaught[0])}: is for a stage 1, and --experience none has none. Leave it out.')
    without = '--experience none' if args.experience == 'none' else '--task plain' if args.task == 'plain' else ''
    early = [name for name in (*LABELS_OF_STAGE_1, 'affect_epochs') if getattr(args, name)]
    if without and early and not args.stimuli:
        raise SettingsError(f'{flag(early[0])} shapes stage 1, and {without} has no stimuli unless --stimuli names '
                            'some. Give them, or leave it out.')


def _check_stage_1_alone(args: Namespace, given: Collection[str]) -> None:
    if 'dataset' in given:
        raise SettingsError(f'--dataset {args.dataset}: is for a classification, and --task affect trains on '
                            '--stimuli. Name the set there, or leave it out.')
    for name in ('train_images', 'mixup', 'cutmix'):
        if getattr(args, name):
            raise SettingsError(f'{flag(name, getattr(args, name))}: is for a classification, and --task affect '
                                'trains on stimuli. Leave it out.')
    if args.experience:
        raise SettingsError('--task affect makes an experience and takes none: leave --experience out.')


def _check_rehearsal(args: Namespace) -> None:
    if args.rehearsal and (args.task != 'emoreg' or not args.stimuli):
        raise SettingsError(f'--rehearsal {args.rehearsal} shows --stimuli beside the images of --task emoreg: give '
                            'both.')
    if args.rehearsal and args.grad_checkpointing:
        raise SettingsError(f'--rehearsal {args.rehearsal}: --grad-checkpointing would run batch norm over the stimuli '
                            'twice. Leave one of them out.')


def _check_given_experience(args: Namespace) -> None:
    if args.stimuli and not args.rehearsal:
        raise SettingsError("--experience is stage 1's result and --stimuli runs stage 1: give one of them, or "
                            '--rehearsal.')
    labels = () if args.rehearsal else LABELS_OF_STAGE_1
    if late := [name for name in (*labels, 'affect_epochs') if getattr(args, name)]:
        raise SettingsError(f'{flag(late[0])} shapes stage 1, and --experience is its result already: leave one '
                            'of them out.')


def _check_share(args: Namespace) -> None:
    """A share of stage 1's backbone, which needs a stage 1 and what may change in stage 2."""
    name = flag('experience_share', args.experience_share)
    without = ('--task affect' if args.task == 'affect' else '--experience none' if args.experience == 'none' else
               '--task plain without --stimuli or --experience'
               if args.task == 'plain' and not (args.stimuli or args.experience) else '')
    if without:
        raise SettingsError(f'{name}: stage 2 starts from that share of stage 1, and {without} has none to start from. '
                            'Leave it out.')
    if args.separate_experience:
        raise SettingsError(f'{name}: --separate-experience keeps stage 1 as it is. Leave one of them out.')
    if args.keep_affect:
        raise SettingsError(f'{name}: {flag("keep_affect", args.keep_affect)} keeps the affect response of stage 1, '
                            'of which a share is left. Leave one of them out.')


def _try_optimizer(args: Namespace, device: str) -> None:
    """One step of a small matrix."""
    weight = torch.nn.Parameter(torch.ones(8, 8, device=device))
    weight.grad = torch.ones_like(weight)
    create_optimizer_v2([weight], opt=args.opt, lr=1.0, momentum=args.momentum, weight_decay=0.1,
                        layer_decay=args.layer_decay, **args.opt_kwargs).step()


def _check_recipe(args: Namespace) -> None:
    for name in ('model_kwargs', 'opt_kwargs'):
        try:
            json.dumps(getattr(args, name))
        except (TypeError, ValueError) as e:
            raise SettingsError(f'{flag(name, getattr(args, name))}: cannot be kept with the settings ({e}). Use '
                                'numbers, strings and lists.') from e
    if args.opt_kwargs and not args.opt:
        raise SettingsError(f'--opt-kwargs {args.opt_kwargs}: belong to one optimizer. Give --opt, too.')
    if 'param_group_fn' in args.opt_kwargs:
        raise SettingsError(f'{flag("opt_kwargs", args.opt_kwargs)}: param_group_fn is a function, which no flag can '
                            'name. Leave it out.')
    if args.opt:
        base = base_optimizer(args.opt)
        known = base in list_optimizers()
        if known and args.opt not in (base, f'lookahead_{base}'):  # timm takes any prefix and no notice of it
            raise SettingsError(f'--opt {args.opt}: timm has no wrapper {args.opt.rpartition("_")[0]!r} and would '
                                f'train with {base} alone. Use {base} or lookahead_{base}.')
        if known and get_optimizer_info(base).second_order:
            raise SettingsError(f'--opt {args.opt}: needs second derivatives, which train.py does not compute. '
                                'timm.optim.list_optimizers() names the others.')
        try:
            try:
                _try_optimizer(args, 'cpu')
            except CANNOT_OPTIMIZE:
                if not (args.device.startswith('cuda') and torch.cuda.is_available()):
                    raise
                _try_optimizer(args, args.device)  # where some need a GPU
        except CANNOT_OPTIMIZE as e:
            reason = str(e).rstrip('.') or 'it cannot be had here'  # timm asserts without a word what must be installed
            near = difflib.get_close_matches(args.opt, list_optimizers(), n=1)
            if args.opt_kwargs and _works_with(args, opt_kwargs={}):
                raise SettingsError(f'--opt {args.opt}, {flag("opt_kwargs", args.opt_kwargs)}: {reason}. Correct '
                                    '--opt-kwargs.') from e
            if not args.momentum and _works_with(args, momentum=0.9):
                other = ' Or use --opt momentum, which is SGD without that.' if 'Nesterov' in reason else ''
                raise SettingsError(f'--opt {args.opt}, --momentum 0: {reason}. Use another --momentum.{other}') from e
            raise SettingsError(f'--opt {args.opt}: {reason}. timm.optim.list_optimizers() names the optimizers.'
                                + (f' Did you mean {near[0]}?' if near and near[0] != args.opt else '')) from e


def _works_with(args: Namespace, **changed: Any) -> bool:
    try:
        _try_optimizer(Namespace(**{**vars(args), **changed}), 'cpu')
    except CANNOT_OPTIMIZE:
        return False
    return True


def _check_has_effect(args: Namespace, given: Collection[str]) -> None:
    """Refuse what was given and would change nothing, because of another flag or for want of one."""
    # of the defaults stage 2's has it, muon, and stage 1's, adamw, has not
    has_momentum = get_optimizer_info(base_optimizer(args.opt)).has_momentum if args.opt else args.task != 'affect'
    sgd = 'Leave it out, or use one that has it, such as sgd'
    for name, has_effect, remedy in (
            ('model_ema_decay', args.model_ema, 'without --model-ema. Add that, or leave it out'),
            ('clip_mode', args.clip_grad is not None, 'without --clip-grad. Add that, or leave it out'),
            ('decay_epochs', args.sched == 'step', f'with --sched {args.sched}. Use --sched step, or leave it out'),
            ('min_lr', args.sched != 'step', 'with --sched step. Use another --sched, or leave it out'),
            ('decay_rate', args.sched in ('step', 'poly'),
             f'with --sched {args.sched}. Use --sched step or poly, or leave it out'),
            ('momentum', has_momentum, f'with --opt {args.opt or "adamw, the default of stage 1"}. {sgd}'),
            ('warmup_lr', args.warmup_epochs > 0, 'with --warmup-epochs 0. Leave one of them out'),
            ('hflip', not args.no_aug or args.hflip == 'none', 'with --no-aug. Leave one of them out'),
            ('cutout', not args.no_aug or not args.cutout, 'with --no-aug. Leave one of them out'),
            ('affect_lr_scale', args.modulation or args.balance in ('gate', 'learned') or args.rehearsal
             or args.keep_affect, 'with --no-modulation and a fixed --balance. Leave it out'),
            ('amp_dtype', args.amp, 'with --no-amp. Leave one of them out')):
        if name in given and not has_effect:
            raise SettingsError(f'{flag(name, getattr(args, name))}: has no effect {remedy}.')


def shapes_stage_1(args: Namespace) -> bool:
    """Whether the settings ask for a stage 1 of their own, rather than for a released one."""
    names = ('stimuli', *LABELS_OF_STAGE_1, 'affect_epochs', 'pretrained_backbone', 'model_kwargs')
    return any(getattr(args, name) for name in names) or args.dataset == 'emoji'  # which shows both stages


def backbone_args(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of EmoReg and of `create_backbone` that build the backbone of a run in its form.

    Args:
        settings: Those of the run, complete.
    """
    form = {**settings['model_kwargs'], 'small_image': settings['small_image']}
    if settings['small_image'] or timm.get_pretrained_cfg(settings['backbone']).fixed_input_size:
        form['img_size'] = settings['img_size']
    return form


def emoreg_args(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments by which ``timm.create_model`` builds the regulated model of a run in its form.

    Args:
        settings: Those of the run, complete.
    """
    form = backbone_args(settings)
    if settings['model'] in BACKBONES:
        return settings['model'], form
    return 'emoreg', {**form, 'backbone': settings['backbone']}


def mixes_images(args: Namespace, task: str) -> bool:
    """Whether a stage mixes images, two at a time."""
    return task != 'affect' and max(args.mixup, args.cutmix) > 0


def _share_of_a_step(args: Namespace, task: str, whole_batch: int) -> int:
    """Images per step and process, where so many make an update."""
    shares = args.world_size * args.grad_accum_steps
    batch_size = whole_batch // shares
    if not batch_size:
        raise DataError(f'--batch-size {whole_batch}: {args.world_size} processes with {args.grad_accum_steps} '
                        f'accumulation steps each share it out. Use at least {shares}, or a smaller '
                        '--grad-accum-steps.')
    if mixes_images(args, task) and batch_size % 2:
        raise DataError(f'--mixup and --cutmix mix the images of a step in pairs, --batch-size {whole_batch} gives '
                        f'{batch_size} a process and accumulation step. Use a number that makes it even.')
    return batch_size


def check_batch(args: Namespace, task: str) -> None:
    """Refuse a --batch-size that `batch_of_a_step` would refuse of any data.

    Args:
        args: The settings, with `world_size`.
        task: 'affect', 'emoreg' or 'plain'.

    Raises:
        DataError: If it is one.
    """
    if not args.batch_size:
        return
    update = _share_of_a_step(args, task, args.batch_size) * args.world_size * args.grad_accum_steps
    if args.train_images and update > args.train_images:
        raise DataError(f'--batch-size {args.batch_size}: --train-images {args.train_images} is all that there is to '
                        'train on. Use at most as many.')


def batch_of_a_step(args: Namespace, task: str, splits: Splits, stimuli: Splits | None = None) -> int:
    """Images per step and process of a stage.

    Args:
        args: The settings, with `world_size`.
        task: 'affect', 'emoreg' or 'plain'.
        splits: What the stage trains on.
        stimuli: What it rehearses.

    Raises:
        DataError: If they do not make up one update an epoch, or if their number does not suit the loss.
    """
    shares = args.world_size * args.grad_accum_steps
    fewest = min(len(shown.train) for shown in (splits, *([stimuli] if stimuli else [])))
    pairs = 2 * shares
    usual = 128 if len(splits.train) >= 10_000 else 64
    # a default must be what is wrong neither with mixing nor with a small set
    if mixes_images(args, task):
        usual = max(usual // pairs, 1) * pairs
    whole_batch = args.batch_size or min(usual, max(fewest // pairs * pairs, 1))
    if not args.batch_size and whole_batch < shares:
        raise DataError(f'--grad-accum-steps {args.grad_accum_steps}: in {args.world_size} processes they share '
                        f'out the {fewest} images that {splits.name} has to train on. Use fewer.')
    batch_size = _share_of_a_step(args, task, whole_batch)
    rated = splits if task == 'affect' else stimuli
    if rated is not None and rated.target.kind == 'ratings' and batch_size < 2:
        raise DataError(f'1 - CCC needs 2 images or more a step, --batch-size {whole_batch} gives {batch_size} a '
                        f'process and accumulation step. Use at least {pairs}.')
    for shown in (splits, *([stimuli] if stimuli else [])):
        if len(shown.train) < batch_size * args.world_size:
            raise DataError(f'--batch-size {whole_batch}: {shown.name} has {len(shown.train):,} images to train on. '
                            'Use at most as many.')
    batches = len(splits.train) // (batch_size * args.world_size)
    if batches < args.grad_accum_steps:
        raise DataError(f'--grad-accum-steps {args.grad_accum_steps}: an epoch of {splits.name} has {batches} batches, '
                        'and no update. Use fewer steps, or a smaller --batch-size.')
    return batch_size
