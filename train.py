#!/usr/bin/env python3
"""Train an image classifier with emotional regulation, on timm's own training parts.

    python train.py --model emoreg_resnet18 --dataset emoji       both stages on the embedded emoji
    python train.py --model emoreg_resnet50                       CIFAR-10, stage 1 on the embedded emoji
    python train.py --model emoreg_vit_tiny --stimuli ferplus --dataset cifar100 --data-dir DATA
    python train.py --model emoreg_resnet18 --task plain          the baseline: the bare backbone, same recipe
    python train.py --resume output/RUN                           go on where a run was stopped

Stage 1 (--task affect) trains backbone and affect response on stimuli; stage 2 (--task emoreg, which runs stage 1
first unless --experience names its result) trains the regulated classifier. Every flag that timm's script has, too,
has the same name here. Results go to OUTPUT/EXPERIMENT/TASK: checkpoints, summary.csv, curves.png, result.json.
"""
import argparse
import gc
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from timm.data import Mixup, resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, TrainingTask
from timm.utils import (
    CheckpointSaver,
    NativeScaler,
    dispatch_clip_grad,
    distribute_bn,
    is_primary,
    random_seed,
    unwrap_model,
    update_summary,
)
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from timm_emoreg.backbone import create_backbone
from timm_emoreg.data import TARGETS, DataError, check_stimuli, check_target, load_stimuli, load_target
from timm_emoreg.data.controls import fewer_images, predict_rotation, shuffle_labels
from timm_emoreg.data.duplicates import check_unseen
from timm_emoreg.data.loader import choose_kind, make_loader
from timm_emoreg.data.progressive import ProgressiveLoader, size_of_epoch
from timm_emoreg.data.rehearsal import RehearsalLoader
from timm_emoreg.data.sets import ImageError
from timm_emoreg.files import DamagedError, read_json, write_text
from timm_emoreg.metrics import wide_dtype
from timm_emoreg.small_image import small_image_form
from timm_emoreg.task import AffectTask, EmoRegTask
from timm_emoreg.training.arguments import NamedValues, above, at_least, compiler_backend, share, up_to, within
from timm_emoreg.training.attention import choose_attention, use_plain_attention
from timm_emoreg.training.checkpoint import (
    BEST,
    CheckpointError,
    load_training_checkpoint,
    newest_checkpoint,
    resume_saver,
)
from timm_emoreg.training.commit import project_commit
from timm_emoreg.training.convolution import choose_convolution, suit_small_maps, use_columns
from timm_emoreg.training.curves import draw_curves
from timm_emoreg.training.experience import (
    Experience,
    find_experience,
    load_backbone,
    released_experience,
    untrained_experience,
)
from timm_emoreg.training.optim import (
    MUON,
    fuse_in_memory_order,
    fused_where_possible,
    orthogonalize_in_float32,
    scale_affect_lr,
    usual_recipe,
)
from timm_emoreg.training.peak_memory import peak_memory_gb
from timm_emoreg.training.precision import autocast_in, choose_precision, emulates_bfloat16
from timm_emoreg.training.processes import (
    LaunchError,
    asked_to_stop,
    decided_by_primary,
    join_processes,
    lost_another,
    mean_over_processes,
)
from timm_emoreg.training.run_folder import (
    BusyError,
    WriteError,
    chosen_once,
    lock_run,
    make_run,
    remove_empty_run,
    trim,
    writing,
)
from timm_emoreg.training.settings import (
    SettingsError,
    backbone_args,
    batch_of_a_step,
    check_batch,
    complete_settings,
    emoreg_args,
    mixes_images,
    shapes_stage_1,
)
from timm_emoreg.training.trainable import (
    BUILD_ERRORS,
    DAMAGED_WEIGHTS,
    ModelError,
    brief,
    check_takes,
    check_takes_one,
    is_damaged,
    lacks_memory,
    reason_of,
)

# -- settings ----------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    # a usage of forty lines would hide the one line that tells what is wrong with a flag
    parser = argparse.ArgumentParser(usage='%(prog)s [--flag value ...]    (%(prog)s --help lists the flags)',
                                     description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    yes_no = argparse.BooleanOptionalAction

    group = parser.add_argument_group('what to train')
    group.add_argument('--model', default='emoreg_resnet18', help='emoreg_*, or any timm model as backbone')
    group.add_argument('--task', default='emoreg', choices=('emoreg', 'affect', 'plain'))
    group.add_argument('--model-kwargs', nargs='*', default={}, action=NamedValues, help='for the backbone, name=value')
    group.add_argument('--pretrained-backbone', action='store_true', help="start from the backbone's own timm weights")
    group.add_argument('--drop', type=within(0, 1), default=None, help='dropout before the classifier')
    group.add_argument('--drop-path', type=within(0, 1), default=None, help='stochastic depth')
    group.add_argument('--small-image', action=yes_no, default=None, help='default: on up to 64 px, if there is a form')

    group = parser.add_argument_group('emotional regulation')
    group.add_argument('--experience', metavar='PATH-or-tag',
                       help="stage 1's result: checkpoint, folder or weight tag; 'none' for the dual head without it")
    group.add_argument('--experience-share', type=share, default=1.0, metavar='SHARE',
                       help="of stage 1's backbone in the one that stage 2 starts from; the rest is as without stage 1 "
                            '(shrink and perturb)')
    group.add_argument('--stimuli', help='emoji, ferplus, oasis, nemo, a folder or csv, or several with + between '
                                         'them; stage 1 runs first')
    group.add_argument('--stimuli-labels', help="which labels of the stimuli, e.g. probability for ferplus; 'rotation' "
                                                'for the label-free control')
    group.add_argument('--shuffle-stimuli-labels', action='store_true', help='control: labels without meaning')
    group.add_argument('--rating-columns', nargs='+', help='rating columns of a csv of stimuli')
    group.add_argument('--rating-scale', nargs=2, type=float, metavar=('LOW', 'HIGH'), help='scale of these ratings')
    group.add_argument('--affect-epochs', type=at_least(1), help='epochs of stage 1 (default: --epochs)')
    group.add_argument('--balance', default='0.5', help="a number in [0, 1], 'learned' or 'gate'")
    group.add_argument('--balanced-in', default='prediction', choices=('prediction', 'loss'))
    group.add_argument('--modulation', action=yes_no, default=True, help='affective state modulates the features')
    group.add_argument('--keep-affect', type=float, default=0.0, metavar='WEIGHT',
                       help="of a loss that keeps the affect response close to stage 1's")
    group.add_argument('--rehearsal', type=float, default=0.0, metavar='WEIGHT',
                       help="of stage 1's loss on a batch of --stimuli in each step of stage 2")
    group.add_argument('--affect-lr-scale', type=at_least(0.0), default=1.0, metavar='FACTOR',
                       help='learning rate of affect response, modulation and balance in stage 2, over --lr; 0 leaves '
                            'them as they are')
    group.add_argument('--separate-experience', action='store_true', help='a second, frozen, affective backbone')

    group = parser.add_argument_group('data')
    group.add_argument('--dataset', default='cifar10', help=f'{", ".join(TARGETS)}, or a folder with one per class')
    group.add_argument('--data-dir', help='data sets (default: $EMOREG_DATA, ~/.cache/emoreg-data)')
    group.add_argument('--train-images', type=at_least(1), metavar='N', help='a stratified part of N training images')
    group.add_argument('--img-size', type=at_least(1), help='default: 32, and 224 for a folder or csv')
    group.add_argument('--start-img-size', type=int, metavar='N',
                       help='progressive resizing: training images grow from N px to --img-size over 2/3 of the epochs')
    group.add_argument('-b', '--batch-size', type=at_least(1),
                       help='default: 128, for fewer than 10,000 images 64, and no more than there are')
    group.add_argument('--loader', default='auto', choices=('auto', 'resident', 'timm'))
    group.add_argument('-j', '--workers', type=at_least(0), default=2, help="of timm's loader")
    group.add_argument('--no-aug', action='store_true', help='no augmentation at all')
    group.add_argument('--hflip', default='random', choices=('random', 'alternate', 'none'))
    group.add_argument('--cutout', type=at_least(0), default=0, help='side of the cut-out square in pixels')
    group.add_argument('--mixup', type=at_least(0.0), default=0.0)
    group.add_argument('--cutmix', type=at_least(0.0), default=0.0)
    group.add_argument('--smoothing', type=within(0, 1), default=0.1, help='label smoothing')

    group = parser.add_argument_group('recipe')
    group.add_argument('--epochs', type=at_least(1), default=8)
    group.add_argument('--val-interval', type=at_least(1), default=1, metavar='N',
                       help='validate every N epochs, and after the last one')
    group.add_argument('--opt', type=str.lower,
                       help='any of timm, for both stages (default: adamw for stage 1, muon for stage 2)')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=NamedValues,
                       help='for --opt, name=value; for muon the default is '
                            + ' '.join(f'{k}={v}' for k, v in MUON.items()))
    group.add_argument('--lr', type=above(0),
                       help='of both stages (default: for muon 0.02, without batch norm 0.005; for 128 images an '
                            'update, 0.1 for the kinds of sgd, else 0.001)')
    group.add_argument('--momentum', type=within(0, 1), default=0.9)
    group.add_argument('--weight-decay', type=at_least(0.0),
                       help='default: 5e-4 for the kinds of sgd, 0.01 for muon, else 0.05')
    group.add_argument('--layer-decay', type=share, help='factor of the rate from a layer to the one before it')
    group.add_argument('--sched', default='cosine', choices=('cosine', 'tanh', 'poly', 'step'))
    group.add_argument('--decay-epochs', type=above(0), help='of --sched step (default: a third of the epochs)')
    group.add_argument('--decay-rate', type=above(0),
                       help='factor of each step (default: 0.1), or the power of --sched poly (default: 1, linear)')
    group.add_argument('--warmup-epochs', type=at_least(0.0), default=1.0, help='at most a quarter of the epochs')
    group.add_argument('--warmup-lr', type=up_to(1), default=1e-3, help='times --lr')
    group.add_argument('--min-lr', type=up_to(1), default=1e-3, help='times --lr')
    group.add_argument('--clip-grad', type=above(0))
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'))
    group.add_argument('--grad-accum-steps', type=at_least(1), default=1,
                       help='steps that share --batch-size out among them for one update; the concordance of ratings '
                            'is judged within each')
    group.add_argument('--model-ema', action='store_true', help='judge and keep averaged weights')
    group.add_argument('--model-ema-decay', type=within(0, 1), default=0.998)

    group = parser.add_argument_group('machine')
    group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    group.add_argument('--amp', action=yes_no, default=True)
    group.add_argument('--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'))
    group.add_argument('--channels-last', action=yes_no, default=True)
    group.add_argument('--grad-checkpointing', action='store_true')
    group.add_argument('--torchcompile', nargs='?', const='inductor', type=compiler_backend, metavar='BACKEND',
                       help='of torch.compile (default where none is named: inductor)')
    group.add_argument('--sync-bn', action='store_true')
    group.add_argument('--seed', type=at_least(0), default=42)

    group = parser.add_argument_group('output')
    group.add_argument('--output', type=Path, default=Path('output'))
    group.add_argument('--experiment', help='name of the folder in --output (default: date, model and data set)')
    group.add_argument('--resume', type=Path, metavar='RUN', help='output folder to continue, settings included')
    group.add_argument('--log-interval', type=at_least(1), default=50, metavar='N',
                       help='look at the loss every N steps on a GPU; a CPU looks at each')
    args = parser.parse_args(argv)
    # what is on the command line: a default is only set where there is nothing yet
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), parser))))
    given = [name for name, value in given.items() if value is not parser]
    try:
        return complete_settings(args, given)
    except SettingsError as e:
        parser.error(str(e))


# -- data and model ----------------------------------------------------------------------------------------------------


def choice_of_stimuli(args) -> dict:
    """Name and options of the stimuli, as `load_stimuli` takes them."""
    options = {'rating_columns': args.rating_columns, 'rating_scale': args.rating_scale} if args.rating_columns else {}
    rotation = args.stimuli_labels == 'rotation'
    return {'name': args.stimuli or 'emoji', 'labels': None if rotation else args.stimuli_labels, **options}


def stimuli_of(args):
    splits = load_stimuli(data_dir=args.data_dir, **choice_of_stimuli(args))
    if args.stimuli_labels == 'rotation':
        splits = predict_rotation(splits, args.seed)
    splits.check_judges_ratings()
    return shuffle_labels(splits, args.seed) if args.shuffle_stimuli_labels else splits


def target_of(args):
    splits = load_target(args.dataset, args.data_dir)
    return fewer_images(splits, args.train_images, args.seed) if args.train_images else splits


def needs_pretrained(args, task: str, splits, experience: Experience | None, resumed: bool) -> bool:
    """Whether something is left of the backbone's own weights when a stage begins, or goes on."""
    taught = bool(experience and experience.state_dict)
    if resumed:  # the affect response that is kept close to is in no checkpoint
        return task == 'emoreg' and args.keep_affect > 0 and not taught
    overlay = args.model_kwargs.get('pretrained_cfg_overlay') or {}  # which may name a file of other classes
    own = overlay.get('num_classes', timm.get_pretrained_cfg(args.backbone).num_classes)
    classifier = len(splits.target) == own
    return classifier or not taught or args.experience_share < 1 or (task == 'emoreg' and args.separate_experience)


def build_model(args, task: str, splits, experience: Experience | None, resumed: bool = False):
    dropped = {'drop_rate': args.drop, 'drop_path_rate': args.drop_path}
    pretrained = args.pretrained_backbone and needs_pretrained(args, task, splits, experience, resumed)
    if task == 'plain':
        model = create_backbone(args.backbone, num_classes=len(splits.target), pretrained=pretrained,
                                **backbone_args(vars(args)), **dropped)
        if experience is not None:
            load_backbone(model, experience, args.experience_share)
        return model
    name, form = emoreg_args(vars(args))
    common = {**form, **dropped, 'pretrained_backbone': pretrained}
    if task == 'affect':
        return timm.create_model(name, num_classes=0, num_affect=len(splits.target),
                                 affect_kind=splits.target.affect_kind, **common)
    model = timm.create_model(name, num_classes=len(splits.target), num_affect=experience.num_affect,
                              affect_kind=experience.affect_kind, balance=args.balance, modulation=args.modulation,
                              experience='separate' if args.separate_experience else 'shared', **common)
    if experience.state_dict:
        model.load_experience(experience.state_dict, args.experience_share)
    return model


def image_sizes(args, epochs: int) -> list[int]:
    """Sides of the training images of all epochs, the smallest first, `--img-size` last."""
    if args.start_img_size is None:
        return [args.img_size]
    grown = (size_of_epoch(epoch, epochs, args.start_img_size, args.img_size) for epoch in range(epochs))
    return sorted({args.start_img_size, *grown, args.img_size})


def checked_model(args, task: str, splits, experience: Experience | None, batch_size: int, epochs: int, device,
                  resumed: bool):
    """The model on its device, if it takes images of the sizes of all epochs and so many of them at once."""
    try:
        model = build_model(args, task, splits, experience, resumed)
        if args.grad_checkpointing:
            model.set_grad_checkpointing()
    except OSError as e:
        if not args.pretrained_backbone:
            raise
        file = (args.model_kwargs.get('pretrained_cfg_overlay') or {}).get('file')
        if file and not Path(file).is_file():
            raise ModelError(f'--model-kwargs pretrained_cfg_overlay: there is no file {file}. Correct the '
                             'path.') from e
        raise ModelError(f'--pretrained-backbone: the weights of {args.backbone} cannot be had ({reason_of(e)}). Leave '
                         'it out, or try again with a connection.') from e
    except (*BUILD_ERRORS, *DAMAGED_WEIGHTS) as e:
        if lacks_memory(e):
            raise
        if args.pretrained_backbone and is_damaged(e):
            raise ModelError(f'--pretrained-backbone: the weights of {args.backbone} cannot be read ({brief(e)}). '
                             'Their file is damaged: get it anew, or leave the flag out.') from e
        if args.pretrained_backbone and str(e).startswith('No pretrained weights exist'):
            raise ModelError(f'--pretrained-backbone: timm has no weights of {args.backbone}. Leave it out, or use '
                             'another --model.') from e
        flags = [flag for flag, value in (
            ('--model-kwargs', args.model_kwargs), ('--drop', args.drop), ('--drop-path', args.drop_path),
            ('--grad-checkpointing', args.grad_checkpointing), ('--pretrained-backbone', args.pretrained_backbone),
            ('--experience', experience is not None and experience.state_dict)) if value]
        form = '--no-small-image' if args.small_image else '--small-image'
        raise ModelError(f'--model {args.model} cannot be built so: {reason_of(e)}. Change '
                         f'{", ".join((*flags, "--img-size"))} or give {form}.') from e
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    check_takes(model, args.model, '--img-size', args.img_size, device)
    start = args.start_img_size
    for size in image_sizes(args, epochs)[:-1]:
        grown = '' if size == start else f' {start}, grown to'
        check_takes(model, args.model, f'--start-img-size{grown}', size, device)
    if device.type == 'cpu':
        suit_small_maps(model)
    synced = args.sync_bn and args.distributed
    if batch_size == 1 and not synced:
        check_takes_one(model, args.model, start or args.img_size, device)
    # timm's own, which keeps the activation that many of its layers hold
    return convert_sync_batchnorm(model) if synced else model


def build_task(args, task_name: str, model, splits, device, stimuli):
    """The training task around a model, with averaged weights, compiled, for several processes, as the flags say."""
    criterion = {'smoothing': args.smoothing, 'soft_targets': max(args.mixup, args.cutmix) > 0}
    if task_name == 'affect':
        task = AffectTask(model, splits.target.kind, splits.target.names, smoothing=args.smoothing, device=device)
    elif task_name == 'emoreg':
        task = EmoRegTask(model, args.balanced_in, args.keep_affect, args.rehearsal,
                          stimuli.target.kind if stimuli else 'class', args.smoothing, criterion_kwargs=criterion,
                          device=device)
    else:
        task = ClassificationTask(model, criterion_kwargs=criterion, device=device)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=True)
    if args.torchcompile:
        task.compile(args.torchcompile)
    if args.distributed:
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None)
    return task


def choose(args, model, splits, stimuli, epochs: int, device, out: Path) -> dict[str, str]:
    """Precision, attention, convolution and loaders for this machine here and now, chosen once and kept for resumes."""
    def choices() -> dict[str, str]:
        size = (args.img_size, args.img_size)
        precision = choose_precision(device, args.amp_dtype if args.amp else None)
        attention = choose_attention(model, device, precision, args.img_size)
        # a compiler sees torch's
        convolution = None if args.torchcompile else choose_convolution(
            model, device, precision, image_sizes(args, epochs))
        kernels = {name: kind for name, kind in (('attention', attention), ('convolution', convolution)) if kind}
        shown = {'loader': splits} | ({'stimuli_loader': stimuli} if stimuli else {})
        return {'precision': precision} | kernels | {
            name: choose_kind(len(one.train), size, device, not args.no_aug, args.world_size)
            if args.loader == 'auto' else args.loader for name, one in shown.items()}

    chosen = decided_by_primary(lambda: chosen_once(out / 'choices.json', choices), args)
    if args.amp and args.amp_dtype == 'float16' and chosen['precision'] == 'float32' and device.type == 'cpu':
        say(args, '--amp-dtype float16: is no faster than float32 on this processor, so that is taken')
    return chosen


def loaders_of(args, model, splits, stimuli, batch_size: int, chosen: dict[str, str], epochs: int, device):
    """Loaders of the training, validation and test part; the first one also has the `stimuli` to rehearse."""
    def loader_of(splits, part, kind=args.loader, seed=args.seed):
        return make_loader(
            part, (args.img_size, args.img_size), batch_size, resolve_model_data_config(model),
            training=part is splits.train, kind=kind, device=device, augment=not args.no_aug,
            flip=args.hflip if splits.flip_safe else 'none', cutout=args.cutout, seed=seed,
            channels_last=args.channels_last, workers=args.workers, rank=args.rank, world_size=args.world_size)

    train = loader_of(splits, splits.train, chosen['loader'])
    validation, test = (loader_of(splits, part) for part in (splits.validation, splits.test))
    if args.start_img_size is not None:
        train = ProgressiveLoader(train, args.start_img_size, epochs)
    if stimuli is not None:
        # by a seed that no --seed is: the same one would pair as many stimuli as images alike in each epoch
        own = args.seed + 2 ** 31
        train = RehearsalLoader(train, loader_of(stimuli, stimuli.train, chosen['stimuli_loader'], own))
    return train, validation, test


def recipe_of(args, task: str, model) -> dict:
    """Optimizer, rate and decay of a stage: the usual ones of its task, unless a flag gives others."""
    recipe = {'batch_size': args.whole_batch} | usual_recipe(model, task, args.opt, args.whole_batch)
    given = {name: value for name in ('lr', 'weight_decay') if (value := getattr(args, name)) is not None}
    return recipe | given | {'opt_kwargs': recipe['opt_kwargs'] | args.opt_kwargs}


def optimizer_of(args, task: str, model, recipe: dict, epochs: int, updates: int, device, precision: str):
    """Optimizer and scheduler, `updates` of them an epoch."""
    lr, opt_kwargs = recipe['lr'], fused_where_possible(recipe['opt'], device, precision, recipe['opt_kwargs'])
    optimizer = create_optimizer_v2(model, opt=recipe['opt'], lr=lr, weight_decay=recipe['weight_decay'],
                                    momentum=args.momentum, layer_decay=args.layer_decay, **opt_kwargs)
    if task == 'emoreg' and args.affect_lr_scale != 1:
        scale_affect_lr(optimizer, unwrap_model(model), args.affect_lr_scale)
    scheduler, _ = create_scheduler_v2(
        optimizer, args.sched, num_epochs=epochs, decay_epochs=args.decay_epochs or epochs / 3,
        decay_rate=args.decay_rate or (1.0 if args.sched == 'poly' else 0.1),
        warmup_epochs=min(args.warmup_epochs, epochs / 4), warmup_lr=args.warmup_lr * lr, min_lr=args.min_lr * lr,
        step_on_epochs=False, updates_per_epoch=updates)
    return optimizer, scheduler


def announce(args, task_name: str, model, splits, stimuli, recipe: dict, chosen: dict[str, str], epochs: int) -> None:
    """Tell what will be trained, how, and under which terms the data may be used."""
    first = size_of_epoch(0, epochs, args.start_img_size or args.img_size, args.img_size)
    pixels = f'{first} to {args.img_size}' if first < args.img_size else args.img_size
    kernel = f'{chosen["attention"]} attention, ' if 'attention' in chosen else ''
    if chosen.get('convolution') == 'columns':
        kernel += 'small maps as columns, '
    say(args, f'{task_name}: {args.model} ({form_of(model)}, {pixels} px, '
              f'{sum(p.numel() for p in model.parameters()):,} parameters) on {splits.summary()}; {epochs} epochs, '
              f'{recipe["opt"]}, lr {recipe["lr"]:g}, batch {args.whole_batch}, {chosen["precision"]}, {kernel}'
              f'{chosen["loader"]} loader on {args.device}')
    say(args, f'terms of {splits.name}: {splits.licence}')
    if stimuli is not None:
        say(args, f'rehearsal: {stimuli.summary()}; weight {args.rehearsal:g}; terms: {stimuli.licence}')
    judging = len(splits.validation)
    if judging < 20 and args.val_interval < epochs:  # one image alone is more than 5 points of accuracy
        say(args, f'{splits.name}: the best epoch will be chosen on {judging} images of the validation part, '
                  f'which is mostly chance. Add images, or take the last epoch by --val-interval {epochs}.')


def form_of(model) -> str:
    return small_image_form(getattr(unwrap_model(model), 'backbone', unwrap_model(model)))


# -- the loop ----------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ctrl-C or SIGTERM, heeded between two updates, when a checkpoint of the moment has been written."""


received: list[int] = []  # signals since the start


def stop(args) -> None:
    if args.distributed:  # a launcher may kill the one that writes as soon as another has ended
        torch.distributed.barrier()
    raise Stop


def on_signal(number: int, args) -> None:
    """A signal is heeded at the next update; a second one ends a process that is alone at once, with what it wrote.

    A launcher sends its own beside the terminal's, so that several are no sign of impatience there.
    """
    if received and not args.distributed:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    received.append(number)


def check_finite(task, loss: float, when: str) -> None:
    """Before a checkpoint is written: the last update, whose loss the training has not seen, must not spoil it."""
    if not (math.isfinite(loss) and all(p.isfinite().all() for p in task.get_trainable_module().parameters())):
        raise FloatingPointError(f'weights or loss are not finite {when}')


class Loop(NamedTuple):
    """What the epochs of a stage have in common, beside their settings."""

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    updates: int  # of an epoch
    autocast: Callable
    scaler: NativeScaler | None
    mixup: Mixup | None
    saver: CheckpointSaver | None  # of the one process that writes


def loop_of(args, task_name: str, task, model, splits, recipe: dict, epochs: int, batches: int, precision: str, device,
            out: Path) -> Loop:
    updates = batches // args.grad_accum_steps
    optimizer, scheduler = optimizer_of(args, task_name, model, recipe, epochs, updates, device, precision)
    if (device.type == 'cpu' and precision == 'float32') or emulates_bfloat16(device):
        orthogonalize_in_float32(optimizer)
    fuse_in_memory_order(optimizer)
    scaler = NativeScaler(device.type) if precision == 'float16' else None
    mixup = saver = None
    if mixes_images(args, task_name):
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=len(splits.target))
    if is_primary(args):
        saver = CheckpointSaver(unwrap_model(model), optimizer, args=args, amp_scaler=scaler, task=task, max_history=1,
                                checkpoint_dir=str(out), recovery_dir=str(out))
    return Loop(task, optimizer, scheduler, updates, autocast_in(device, precision), scaler, mixup, saver)


def train_epoch(epoch: int, loop: Loop, loader, args) -> dict[str, float]:
    """One pass over the training set, from batch `args.first_step` on; gives the mean of each part of the loss."""
    task, optimizer, updates = loop.task, loop.optimizer, loop.updates
    first_step, accumulate = args.first_step, args.grad_accum_steps
    task.train()
    wide = wide_dtype(task.device)
    sums = {name: torch.tensor(value, dtype=wide, device=task.device) for name, value in args.sums.items()}
    loader.set_epoch(epoch, first_step)
    steps = range(first_step, updates * accumulate)
    bar = tqdm(zip(steps, loader, strict=False), desc=f'epoch {epoch + 1}', total=updates * accumulate,
               initial=first_step, leave=False, disable=None)
    for step, (input, target, *stimuli) in bar:
        # dropout, stochastic depth and mixup depend on the step alone, so a resumed run draws what an unbroken one does
        random_seed(int(np.random.SeedSequence((args.seed, epoch, step, args.rank)).generate_state(1)[0]))
        if loop.mixup is not None:
            input, target = loop.mixup(input, target)
        update = (step + 1) % accumulate == 0
        with nullcontext() if update else task.no_sync():
            with loop.autocast():
                result = task(input, target, *stimuli)
            loss = result['loss'] / accumulate
            clip = update and args.clip_grad is not None
            parameters = task.get_clip_parameters(exclude_head=args.clip_mode == 'agc') if clip else None
            if loop.scaler is not None:
                loop.scaler(loss, optimizer, args.clip_grad, args.clip_mode, parameters, need_update=update)
            else:
                loss.backward()
                if clip:
                    dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
                if update:
                    optimizer.step()
        for name in result.keys() - {'output'}:
            sums[name] = sums.get(name, 0) + result[name].detach().to(wide)
        if task.device.type == 'cpu' or step % args.log_interval == 0 or step + 1 == updates * accumulate:
            mean = sums['loss'].item() / (step + 1)
            if not math.isfinite(mean):
                raise FloatingPointError(f'the loss is {mean} in epoch {epoch + 1}, step {step + 1}')
            bar.set_postfix(loss=f'{mean:.3f}')
        if update:
            optimizer.zero_grad()
            done = epoch * updates + (step + 1) // accumulate
            task.update_ema(step=done)
            loop.scheduler.step_update(num_updates=done)
            if step + 1 < updates * accumulate and asked_to_stop(args, received):
                args.first_step, args.sums = step + 1, mean_over_processes(sums, args)
                check_finite(task, args.sums['loss'], f'in epoch {epoch + 1}, step {step + 1}')
                args.seconds = time.perf_counter() - args.start
                if loop.saver is not None:
                    with writing(loop.saver.recovery_dir):
                        loop.saver.save_recovery(epoch, step + 1)
                stop(args)
    args.first_step, args.sums = 0, {}
    return {name: value / (updates * accumulate) for name, value in mean_over_processes(sums, args).items()}


@torch.inference_mode()
def evaluate(task, loader, autocast, args, predictions: list | None = None):
    """The metrics of the task; `predictions` gets the pairs (class, predicted class) of this process's images."""
    model = task.get_eval_model(ema=task.has_ema())
    if isinstance(model, DistributedDataParallel):
        model = model.module  # ranks may have different numbers of batches, and DDP's forward would wait for them
    model.eval()
    evaluator = task.create_evaluator()
    for input, target in loader:
        missing = loader.batch_size - len(input)
        if args.torchcompile and missing:  # one shape, or the last batch of each set would be compiled anew
            input = torch.nn.functional.pad(input, (0, 0, 0, 0, 0, 0, 0, missing))
        with autocast():
            output = model(input)[:len(target)]
        evaluator.update(output, target)
        if predictions is not None:  # as the evaluator does it: among equal logits of 16 bits argmax takes others
            best = output.float().topk(min(5, output.shape[1])).indices[:, 0]
            predictions.extend(zip(target.tolist(), best.tolist(), strict=True))
    return evaluator.compute(distributed=args.distributed)


def restore(args, path: Path, data: str, loop: Loop) -> int:
    """Take up a stopped run where the checkpoint left it; gives the epoch to go on with."""
    task, scaler, saver = loop.task, loop.scaler, loop.saver
    state = load_training_checkpoint(path)
    if getattr(state['args'], 'data_digest', args.data_digest) != args.data_digest:
        raise DataError(f'{path}: was trained on other images, labels or parts of {data}. Restore them as they '
                        'were, or start a run of its own.')
    if (before := getattr(state['args'], 'whole_batch', args.whole_batch)) != args.whole_batch:
        raise LaunchError(f'{path}: was trained with {before} images an update, of which {args.world_size} processes '
                          f'would make {args.whole_batch}. Use as many processes as before.')
    task.load_checkpoint_state(state['state_dict'], state.get('task_state'))
    if args.model_ema:
        task.load_checkpoint_state(state['state_dict_ema'], state.get('task_state_ema'), ema=True)
    loop.optimizer.load_state_dict(state['optimizer'])
    if scaler is not None and scaler.state_dict_key in state:  # not where the precision was chosen anew
        scaler.load_state_dict(state[scaler.state_dict_key])
    args.first_step, args.sums = state['args'].first_step, state['args'].sums
    args.start -= getattr(state['args'], 'seconds', 0.0)  # those of the attempts before count, too
    epoch = state['epoch'] if args.first_step else state['epoch'] + 1
    loop.scheduler.step_update(num_updates=epoch * loop.updates + args.first_step // args.grad_accum_steps)
    if saver is not None:
        with writing(path.parent):
            resume_saver(saver, state)
    return epoch


def write_result(args, out: Path, result: dict, predictions: list | None) -> None:
    with writing(out):
        if predictions is not None:
            rows = '\n'.join(f'{target},{prediction}' for target, prediction in predictions)
            write_text(out / 'predictions.csv', f'target,prediction\n{rows}\n')
        try:
            draw_curves(out / 'summary.csv', out / 'curves.png', result['metric'],
                        f'{args.experiment}: {result["task"]}')
        except (FileNotFoundError, ValueError) as e:  # a summary that was lost or damaged takes no result with it
            say(args, f'curves.png is not drawn: {e}')
        write_text(out / 'result.json', json.dumps(result, indent=1))


def train_epochs(args, loop: Loop, model, first_epoch: int, epochs: int, train_loader, validation_loader,
                 out: Path) -> None:
    """Train from `first_epoch` on, judge each epoch on the validation part, and write its checkpoint."""
    task, saver = loop.task, loop.saver
    evaluator = task.create_evaluator()
    for epoch in range(first_epoch, epochs):
        began = time.perf_counter()
        parts = train_epoch(epoch, loop, train_loader, args)
        if args.distributed:
            distribute_bn(unwrap_model(model), args.world_size, reduce=True)
            if task.has_ema():  # those of the first process, which alone are in a checkpoint of the moment
                distribute_bn(unwrap_model(task.get_eval_model(ema=True)), args.world_size, reduce=False)
        judged = (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs
        scores = evaluate(task, validation_loader, loop.autocast, args) if judged else {}
        check_finite(task, scores.get('loss', 0.0), f'after epoch {epoch + 1}')
        if saver is not None:
            with writing(out):
                lr_now = max(group['lr'] for group in loop.optimizer.param_groups)  # at the end of the epoch
                # the first row makes the header
                columns = {name: scores.get(name, '') for name in evaluator.metric_names}
                update_summary(epoch, parts, columns, str(out / 'summary.csv'), lr=lr_now)
                args.seconds = time.perf_counter() - args.start
                saver.save_checkpoint(epoch, metric=scores.get(evaluator.default_metric))
                for recovery in out.glob('recovery-*.pth.tar'):
                    recovery.unlink()
        say(args, f'epoch {epoch + 1}/{epochs}: ' + ', '.join(f'{k} {v:.4g}' for k, v in parts.items())
            + ('; validation ' if judged else '') + ', '.join(f'{k} {v:.4g}' for k, v in scores.items())
            + f'; {time.perf_counter() - began:.0f} s')
        if asked_to_stop(args, received):
            stop(args)


def device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f'CPU, {threads} thread{"s"[:threads > 1]}' if device.type == 'cpu' else str(device)


def judge(args, task_name: str, loop: Loop, splits, test_loader, experience: Experience | None, out: Path,
          settings: dict, chosen: dict[str, str], device: torch.device) -> dict:
    """Look at the test part once, with the best epoch, and write the result."""
    task = loop.task
    if args.distributed:
        torch.distributed.barrier()
    state = load_training_checkpoint(out / BEST)
    ema = task.has_ema()
    task.load_checkpoint_state(state['state_dict_ema' if ema else 'state_dict'], ema=ema)
    predictions = [] if splits.target.kind == 'class' and not args.distributed else None
    test = evaluate(task, test_loader, loop.autocast, args, predictions)
    best = unwrap_model(task.get_eval_model(ema=ema))
    result = {
        'task': task_name, 'model': args.model, 'form': form_of(best), 'img_size': args.img_size, 'data': splits.name,
        'train_images': len(splits.train), 'seed': args.seed, **settings, 'best_epoch': state['epoch'] + 1,
        'metric': task.create_evaluator().default_metric, 'validation': state['metric'], 'test': dict(test),
        'balance': best.balance if task_name == 'emoreg' else None,
        'experience': experience.source if experience else None,
        'checkpoint': str(out / BEST),
        'seconds': round(time.perf_counter() - args.start, 1),
        'peak_memory_gb': round(peak_memory_gb(device), 2), **chosen,
        'device': device_name(device),
    }
    if is_primary(args):
        write_result(args, out, result, predictions)
    return result


def run_stage(args, task_name: str, splits, device, experience: Experience | None = None, stimuli=None) -> dict:
    """Train one stage, choose its best epoch on the validation part, and look at the test part once.

    `stimuli` are those that stage 2 rehearses.
    """
    out = Path(args.output) / args.experiment / task_name
    if (out / 'result.json').is_file():
        say(args, f'{out}: finished already')
        return read_json(out / 'result.json') | {'checkpoint': str(out / BEST)}  # it may have moved
    if is_primary(args):
        with writing(out):
            out.mkdir(exist_ok=True)
    # what a checkpoint must hold beside the settings: timm's saver keeps these, and nothing else of ours
    args.start, args.seconds = time.perf_counter(), 0.0
    args.first_step, args.sums = 0, {}  # of an epoch that was stopped
    args.label_names = splits.target.names
    if task_name == 'emoreg':  # those of an untrained affect response stand nowhere else
        args.affect_names, args.affect_kind = experience.names, experience.affect_kind
    args.data_digest = [splits.digest(), stimuli.digest() if stimuli else None]
    batch_size = batch_of_a_step(args, task_name, splits, stimuli)
    args.whole_batch = batch_size * args.world_size * args.grad_accum_steps  # where it could not be divided evenly
    if device.type == 'cuda':  # what the stage before has left: memory that counts as taken, and its peak
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    found = newest_checkpoint(out)
    random_seed(args.seed)
    epochs = (args.affect_epochs or args.epochs) if task_name == 'affect' else args.epochs
    model = checked_model(args, task_name, splits, experience, batch_size, epochs, device, resumed=found is not None)
    chosen = choose(args, model, splits, stimuli, epochs, device, out)
    # before the task copies the model
    if chosen.get('attention') == 'plain':
        use_plain_attention(model)
    if chosen.get('convolution') == 'columns':
        use_columns(model)
    task = build_task(args, task_name, model, splits, device, stimuli)
    train_loader, validation_loader, test_loader = loaders_of(args, model, splits, stimuli, batch_size, chosen, epochs,
                                                              device)
    recipe = recipe_of(args, task_name, model)
    loop = loop_of(args, task_name, task, model, splits, recipe, epochs, len(train_loader), chosen['precision'], device,
                   out)
    announce(args, task_name, model, splits, stimuli, recipe, chosen, epochs)

    # where a stopped run goes on
    first_epoch = 0
    if found:
        data = splits.name + (f' or {stimuli.name}' if stimuli else '')
        first_epoch = restore(args, found, data, loop)
        say(args, f'{found}: ' + (f'going on with epoch {first_epoch + 1}, step {args.first_step + 1}'
                                  if first_epoch < epochs else 'all epochs are trained, what is left is the test part'))
    if is_primary(args):
        with writing(out):  # also without a checkpoint: the row of an epoch is written before its first one
            trim(out / 'summary.csv', first_epoch)
    train_epochs(args, loop, model, first_epoch, epochs, train_loader, validation_loader, out)
    return judge(args, task_name, loop, splits, test_loader, experience, out, {
        'epochs': epochs, 'start_img_size': args.start_img_size, 'recipe': recipe}, chosen, device)


# -- the stages --------------------------------------------------------------------------------------------------------


def say(args, text: str) -> None:
    if is_primary(args):  # a folder per class may have a name that is no text
        print(text.encode(errors='backslashreplace').decode(), flush=True)


def run(args) -> None:
    device = join_processes(args)
    args.device = str(device)
    if device.type == 'cuda':  # as timm's script has them; images of many sizes would be measured at each
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = args.start_img_size is None
    folder = Path(args.output) / args.experiment
    if args.task == 'emoreg' and not args.resume and not shapes_stage_1(args):
        args.experience = args.experience or released_experience(args.model, args.small_image, args.img_size)
    stage_1 = not args.experience and (args.task != 'plain' or args.stimuli is not None)
    # before the data is read, which takes its time
    check_batch(args, args.task)
    if args.task != 'affect':
        check_target(args.dataset)
    if stage_1 or args.stimuli:
        check_stimuli(**choice_of_stimuli(args))
    experience = None
    if args.experience and args.experience != 'none':
        experience = find_experience(args.experience)
        experience.check_form(args.backbone, args.small_image, args.model_kwargs)
    # before a folder is made: what is missing in the data must not leave one behind
    target = None if args.task == 'affect' else target_of(args)
    stimuli = stimuli_of(args) if stage_1 or args.stimuli else None
    if stimuli is not None and target is not None:
        check_unseen(stimuli, target)
    if args.experience == 'none':  # the affect response of stage 1 on these stimuli, untrained
        if args.task == 'emoreg':
            experience = untrained_experience(stimuli.target if stimuli else None)
    elif experience is not None and stimuli is not None:
        experience.check_stimuli(stimuli)
    rehearsed = stimuli if args.task == 'emoreg' and args.rehearsal else None
    # of both stages, before the first one is trained
    if stage_1:
        batch_of_a_step(args, 'affect', stimuli)
    if target is not None:
        batch_of_a_step(args, args.task, target, rehearsed)
    if args.sync_bn and not args.distributed:
        say(args, '--sync-bn: has no effect in one process; torchrun starts several')
    if is_primary(args) and not args.resume:
        args.commit = project_commit(Path(__file__).parent)
        make_run(folder, vars(args))
    if args.distributed:
        torch.distributed.barrier()

    results = []
    with lock_run(folder) if is_primary(args) else nullcontext():
        try:
            if stage_1:
                if args.task != 'affect':
                    say(args, f'experience: none given, so stage 1 runs first, on {stimuli.name}')
                results.append(run_stage(args, 'affect', stimuli, device))
                experience = find_experience(str(folder / 'affect'))
            if args.task != 'affect':
                if experience is not None:
                    say(args, f'experience: {experience.source}, affect response of {experience.num_affect} '
                              f'({", ".join(experience.names) or experience.affect_kind})' + experience.unfinished
                              + (f'; {args.experience_share:g} of its backbone' if args.experience_share < 1 else ''))
                results.append(run_stage(args, args.task, target, device, experience, rehearsed))
        except Exception:
            if is_primary(args) and not args.resume:
                remove_empty_run(folder)
            raise
    for result in results:
        say(args, json.dumps(result))
    if args.distributed:
        torch.distributed.destroy_process_group()


def resume_command(args) -> str:
    launcher = 'python'
    if args.distributed:
        each = os.environ.get('LOCAL_WORLD_SIZE', args.world_size)
        launcher = 'srun python' if 'SLURM_PROCID' in os.environ else f'torchrun --nproc-per-node {each}'
    kind, _, number = str(args.device).partition(':')
    usual = kind == ('cuda' if torch.cuda.is_available() else 'cpu') and (args.distributed or not number)
    device = '' if usual else f' --device {args.device}'
    return f'{launcher} train.py --resume {shlex.quote(str(Path(args.output) / args.experiment))}{device}'


def last_good(args) -> Path | None:
    for task in (args.task, 'affect'):
        try:
            if found := newest_checkpoint(Path(args.output) / args.experiment / task):
                return found
        except CheckpointError:  # all are damaged, which this message is not about
            continue
    return None


def main() -> int:
    args = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: on_signal(number, args))
    try:
        run(args)
    except Stop:
        if is_primary(args):
            print(f'train.py: stopped. Go on with: {resume_command(args)}', file=sys.stderr)
        return 128 + received[0]
    except FloatingPointError as e:
        good = last_good(args)
        print(f'train.py: {e}. ' + (f'The last good checkpoint is {good}. ' if good else '')
              + 'Lower --lr or add --clip-grad 1.', file=sys.stderr)
        return 1
    except WriteError as e:
        good = last_good(args)
        then = f' The last good checkpoint is {good}: go on with: {resume_command(args)}' if good else ''
        print(f'train.py: {e}{then}', file=sys.stderr)
        return 2
    except ImageError as e:
        then = f' Then go on with: {resume_command(args)} (without it the set would be another one)'
        print(f'train.py: {e}{then if last_good(args) else ""}', file=sys.stderr)
        return 2
    except (BusyError, DamagedError, DataError, CheckpointError, LaunchError, ModelError, OSError) as e:
        print(f'train.py: {e}', file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:
        if lost_another(e):
            what = str(e).split('. ')[0]
            then = f' Go on with: {resume_command(args)}' if args.resume or last_good(args) else ''
            print(f'train.py: process {args.rank} of {args.world_size} lost another one ({what}), whose own message '
                  f'says why.{then}', file=sys.stderr)
            return 1
        if not lacks_memory(e):
            raise
        then = f' With more memory, go on with: {resume_command(args)}' if last_good(args) else ''
        print(f'train.py: {args.device} has too little memory ({reason_of(e)}). Lower --batch-size, share it out with '
              f'--grad-accum-steps, add --grad-checkpointing, or lower --img-size.{then}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
