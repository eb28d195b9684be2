"""Settings that contradict each other, and what follows from those that were given."""
from __future__ import annotations

import argparse
import sys

import numpy as np
import pytest
import torch

from timm_emoreg.data import DataError, ImageSet, Splits, Target
from timm_emoreg.data.loader import make_loader
from timm_emoreg.data.progressive import ProgressiveLoader
from timm_emoreg.training.settings import batch_of_a_step


@pytest.mark.parametrize(('argv', 'message'), [
    (('--task', 'affect', '--experience', 'x'), '--task affect makes an experience and takes none'),
    (('--task', 'affect', '--train-images', '9'), '--train-images 9: is for a classification, and --task affect'),
    (('--task', 'affect', '--mixup', '0.2'), '--mixup 0.2: is for a classification'),
    (('--rating-scale', '1', '7'), '--rating-scale 1.0 7.0: is that of --rating-columns. Give both'),
    (('--model', 'emoreg_resnet18.emoji'),
     '--model emoreg_resnet18.emoji: names a weight. Give --model emoreg_resnet18, and the weight of a stage 1 by'),
    (('--val-interval', '0'), '--val-interval: expected a whole number, 1 or more, got 0'),
    (('-b', '-5'), '--batch-size: expected a whole number, 1 or more, got -5'),
    (('--epochs', 'ten'), '--epochs: expected a whole number, 1 or more, got ten'),
    (('--lr', '0'), '--lr: expected a number above 0, got 0'),
    (('--weight-decay', 'nan'), '--weight-decay: expected a number, 0.0 or more, got nan'),
    (('--sched', 'plateau'), "--sched: invalid choice: 'plateau'"),
    (('--experience', 'emoreg_resnet18.emoji', '--shuffle-stimuli-labels'),
     '--shuffle-stimuli-labels shapes stage 1, and --experience is its result already'),
    (('--experience', 'emoreg_resnet18.emoji', '--affect-epochs', '3'), '--affect-epochs shapes stage 1'),
    (('--experience', 'x', '--stimuli', 'emoji'), 'give one of them'),
    (('--balance', '1.5'), '--balance 1.5 is outside [0, 1]'),
    (('--balance', 'gate', '--balanced-in', 'loss'),
     "--balance gate cannot be balanced in the loss: (1 - r) CE(z) + r CE(z') would only teach r to pick the smaller "
     'of the two losses. Use --balanced-in prediction, or a fixed number.'),
    (('--keep-affect', '-1'), '--keep-affect -1.0 is no weight of a loss'),
    (('--keep-affect', '1', '--separate-experience'),
     '--keep-affect 1.0 has nothing to keep: with --separate-experience the affect'),
    (('--rehearsal', '-1', '--stimuli', 'emoji'), '--rehearsal -1.0 is no weight of a loss'),
    (('--rehearsal', '1', '--stimuli', 'emoji', '--grad-checkpointing'), 'would run batch norm over the stimuli twice'),
    (('--stimuli-labels', 'rotation', '--shuffle-stimuli-labels'), 'leaves nothing of --stimuli-labels rotation'),
    (('--epoch', '3'), 'unrecognized arguments: --epoch 3'),
    (('--smoothing', '1'), '--smoothing: expected a number from 0 to below 1, got 1'),
    (('--epochs', '9' * 400), '--epochs: expected a whole number, 1 or more, got 999'),
    (('--rehearsal', '1'), '--rehearsal 1.0 shows --stimuli beside the images of --task emoreg: give both'),
    (('--rehearsal', '1', '--stimuli', 'emoji', '--task', 'plain'), 'beside the images of --task emoreg'),
    (('--affect-lr-scale', '-1'), '--affect-lr-scale: expected a number, 0.0 or more, got -1'),
    (('--experience-share', '0'), '--experience-share: expected a number above 0, up to 1, got 0'),
    (('--experience-share', '0.4', '--task', 'affect'),
     '--experience-share 0.4: stage 2 starts from that share of stage 1, and --task affect has none to start from.'),
    (('--experience-share', '0.4', '--experience', 'none'), 'and --experience none has none to start from. Leave it'),
    (('--experience-share', '0.4', '--task', 'plain'),
     'and --task plain without --stimuli or --experience has none to start from. Leave it out.'),
    (('--experience-share', '0.4', '--separate-experience'),
     '--experience-share 0.4: --separate-experience keeps stage 1 as it is. Leave one of them out.'),
    (('--experience-share', '0.4', '--keep-affect', '1'),
     '--experience-share 0.4: --keep-affect 1.0 keeps the affect response of stage 1, of which a share is left.'),
    (('--lr', '1e300'), '--lr: expected a number above 0, got 1e300'),  # more than 32 bits hold
    (('--opt', 'sgd', '--momentum', '0'),
     '--opt sgd, --momentum 0: Nesterov momentum requires a momentum and zero dampening. Use another --momentum. Or '
     'use --opt momentum, which is SGD without that.'),
    (('--sched', 'step', '--min-lr', '0.1'), '--min-lr 0.1: has no effect with --sched step. Use another --sched'),
    (('--opt', 'sdg'), 'timm.optim.list_optimizers() names the optimizers. Did you mean sgd?'),
    (('--opt', 'muon', '--opt-kwargs', 'steps=3'), '--opt muon, --opt-kwargs steps=3: '),
    (('--opt-kwargs', 'ns_steps=3'), "--opt-kwargs {'ns_steps': 3}: belong to one optimizer. Give --opt, too"),
    (('--start-img-size', '4'), '--start-img-size 4: expected 8 to 32, the --img-size'),
    (('--model', 'emoreg_vit_tiny', '--start-img-size', '16'), 'vit_tiny_patch16_224 takes images of one size only'),
    (('--balance', 'half'), "--balance half: expected a number in [0, 1], 'learned' or 'gate'"),
    (('--model', 'resnet_18'), "emoreg_* are this package's. Did you mean resnet18?"),
    (('--model', 'zzz'), "--model zzz: unknown. timm.list_models() names all, emoreg_* are this package's."),
    (('--resume', 'nowhere'), 'no output folder of this script. Give that of a run, such as output/RUN.'),
    (('--experience', ''), '--experience: is empty. Give a value, or leave it out'),
    (('--data-dir', ''), '--data-dir: is empty'),
    (('--model', 'hf-hub:timm/resnet18.a1_in1k'), 'resnet18.a1_in1k: is a place of weights. Give the name'),
    (('--model', 'emoreg'), '--model emoreg: wraps a backbone. Give the name of that, such as --model convnext_atto'),
    (('--model', 'emoreg', '--model-kwargs', 'backbone=test_vit'), 'Give the name of that, such as --model test_vit.'),
    (('--seed', '4294967296'), '--seed 4294967296: expected a number below 2147483648'),
    (('--model-kwargs', 'balance=0.3'), '--model-kwargs balance=0.3: use --balance instead'),
    (('--model-kwargs', 'experience=separate'), 'experience=separate: use --experience or --separate-experience inste'),
    (('--model-kwargs', 'backbone=resnet34'), '--model-kwargs backbone=resnet34: use --model instead'),
    (('--model-kwargs', 'modulation=True'), 'use --modulation or --no-modulation instead, or leave it out'),
    (('--model-kwargs', 'num_classes=5'), '--model-kwargs num_classes=5: is what images and stimuli have. Leave it'),
    (('--experience', 'none', '--stimuli', 'emoji', '--affect-epochs', '5'),
     '--affect-epochs: is for a stage 1, and --experience none has none. Leave it out.'),
    (('--experience', 'none', '--affect-epochs', '5'), '--affect-epochs: is for a stage 1, and --experience none'),
    (('--experience', 'none', '--stimuli', 'emoji', '--shuffle-stimuli-labels'), '--shuffle-stimuli-labels: is for a'),
    (('--experience', 'none', '--task', 'plain'), '--experience none: is for the dual head, which --task plain does'),
    (('--model-ema-decay', '0.9'), '--model-ema-decay 0.9: has no effect without --model-ema. Add that, or leave it'),
    (('--clip-mode', 'agc'), '--clip-mode agc: has no effect without --clip-grad. Add that, or leave it out.'),
    (('--decay-epochs', '3'), '--decay-epochs 3.0: has no effect with --sched cosine. Use --sched step, or leave it'),
    (('--sched', 'tanh', '--decay-rate', '3'), '--decay-rate 3.0: has no effect with --sched tanh. Use --sched step'),
    (('--opt', 'adamw', '--momentum', '0.8'), '--momentum 0.8: has no effect with --opt adamw. Leave it out, or use'),
    (('--task', 'affect', '--momentum', '0.8'), '--momentum 0.8: has no effect with --opt adamw, the default of stage'),
    (('--warmup-epochs', '0', '--warmup-lr', '0.1'), '--warmup-lr 0.1: has no effect with --warmup-epochs 0. Leave on'),
    (('--no-aug', '--cutout', '8'), '--cutout 8: has no effect with --no-aug. Leave one of them out.'),
    (('--no-aug', '--hflip', 'random'), '--hflip random: has no effect with --no-aug. Leave one of them out.'),
    (('--no-modulation', '--affect-lr-scale', '0.1'),
     '--affect-lr-scale 0.1: has no effect with --no-modulation and a fixed --balance. Leave it out'),
    (('--min-lr', '5'), '--min-lr: expected a number from 0 to 1, got 5'),
    (('--warmup-lr', '1.5'), '--warmup-lr: expected a number from 0 to 1, got 1.5'),
    (('--no-amp', '--amp-dtype', 'float16'), '--amp-dtype float16: has no effect with --no-amp. Leave one of them'),
    (('--model-ema-decay', '2'), '--model-ema-decay: expected a number from 0 to below 1, got 2'),
    (('--model-kwargs', 'global_pool='), '--model-kwargs global_pool=: leaves no pooled vector for the classes'),
    (('--model-kwargs', 'drop_rate=0.5'), '--model-kwargs drop_rate=0.5: use --drop instead'),
    (('--model-kwargs', 'img_size=64'), '--model-kwargs img_size=64: use --img-size instead'),
    (('--model-kwargs', 'in_chans=1'), '--model-kwargs in_chans=1: all images are trained on as RGB'),
    (('--model-kwargs', 'x={1,2}'), '--model-kwargs x={1, 2}: cannot be kept with the settings'),
    (('--opt', 'adamw', '--opt-kwargs', 'weight_decay=0.1'), '--opt adamw, --opt-kwargs weight_decay=0.1: '),
    (('--opt', 'adamw', '--opt-kwargs', 'layer_decay=0.7'), '--opt adamw, --opt-kwargs layer_decay=0.7: '),
    (('--opt', 'sgd', '--opt-kwargs', 'param_group_fn=x'), '--opt-kwargs param_group_fn=x: param_group_fn is a '),
    (('--opt', 'muon', '--opt-kwargs', 'ns_steps=abc'), '--opt muon, --opt-kwargs ns_steps=abc: '),
    (('--opt', 'lookahed_sgd'), "--opt lookahed_sgd: timm has no wrapper 'lookahed' and would train with sgd alone. "
                                'Use sgd or lookahead_sgd.'),
    (('--opt', 'lookahead_adahessian'), 'adahessian: needs second derivatives, which train.py does not compute'),
    (('--opt', 'bnbadamw', '--device', 'cpu'), '--opt bnbadamw: '),
    (('--opt', 'bnbadamw', '--opt-kwargs', 'foo=3', '--device', 'cpu'), '. timm.optim.list_optimizers() names the'),
    (('--opt', 'lookahead_adamw', '--opt-kwargs', 'foo=3'), "'foo'. Correct --opt-kwargs."),
    (('--opt', ''), '--opt: is empty'),
    (('--opt', 'adamw', '--opt-kwargs', 'foreach'), 'argument --opt-kwargs: expected name=value, got foreach'),
    (('--model-kwargs', 'patch_drop_rate', '0.5'), 'argument --model-kwargs: expected name=value, got patch_drop_rate'),
    (('--model-kwargs', 'features_only=True'), '--model-kwargs features_only=True: gives feature maps, and no classes'),
    (('--model', 'resnet18.foo'), "--model resnet18.foo: resnet18 has no tag 'foo'. Known: a1_in1k, "),
    (('--torchcompile', 'foo'), 'argument --torchcompile: expected a backend of torch.compile (cudagraphs, inductor, '),
    (('--cutout', '32', '--img-size', '32'), '--cutout 32: would leave nothing of images of 32 px. Choose a smaller'),
    (('--layer-decay', '5'), '--layer-decay: expected a number above 0, up to 1, got 5'),
    (('--momentum', '3'), '--momentum: expected a number from 0 to below 1, got 3'),
    (('--experiment', '../x'), '--experiment ../x: names a folder in --output, and is no path'),
    (('--experiment', '..'), '--experiment ..: names a folder in --output'),
    (('--task', 'plain', '--shuffle-stimuli-labels'), '--shuffle-stimuli-labels shapes stage 1, and --task plain has'),
    (('--experience', 'none', '--stimuli-labels', 'group'), '--stimuli-labels shapes stage 1, and --experience none'),
    (('--task', 'plain', '--no-modulation'), '--no-modulation: is a choice of the dual head, which --task plain does'),
    (('--task', 'affect', '--balance', '0.5'), '--balance 0.5: is a choice of the dual head, which --task affect'),
    (('--task', 'affect', '--dataset', 'cifar10'), '--dataset cifar10: is for a classification, and --task affect'),
])
def test_flags_that_do_not_fit_are_refused(train, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(list(argv))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(('flags', 'released'), [
    ((), True), (('--balance', 'gate'), True), (('--stimuli-labels', 'group'), False),
    (('--shuffle-stimuli-labels',), False), (('--affect-epochs', '3'), False), (('--pretrained-backbone',), False),
    (('--model-kwargs', 'channels=[8,8,8,8]'), False), (('--stimuli', 'emoji'), False), (('--dataset', 'emoji'), False),
])
def test_a_released_stage_1_is_taken_where_nothing_asks_for_another(train, monkeypatch, flags, released):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--model', 'emoreg_resnet18', *flags])
    assert train.shapes_stage_1(train.parse_args()) is not released


@pytest.mark.parametrize(('images', 'shares', 'batch'), [
    ((20_000,), (1, 1), 128), ((9_999,), (1, 1), 64), ((9_999,), (2, 2), 16), ((48,), (1, 1), 48), ((47,), (1, 1), 46),
    ((47,), (2, 1), 22), ((5_000, 30), (1, 1), 30), ((1,), (1, 1), 1), ((9_999,), (3, 1), 21), ((9_999,), (1, 40), 1),
])
def test_the_usual_batch_is_none_that_a_small_set_cannot_fill(images, shares, batch):
    target = Target('class', ('a', 'b'))

    def splits(n):
        part = ImageSet(np.zeros((n, 1, 1, 3), np.uint8), torch.zeros(n, dtype=torch.long), target)
        return Splits('toy', part, part, part, 'free')

    args = argparse.Namespace(batch_size=None, world_size=shares[0], grad_accum_steps=shares[1], mixup=0, cutmix=0)
    assert batch_of_a_step(args, 'emoreg', *map(splits, images)) == batch


@pytest.mark.parametrize(('images', 'shares', 'batch', 'of_stage_1'), [
    (9_999, (3, 1), 20, 21), (9_999, (1, 3), 20, 21), (20_000, (3, 1), 42, 42), (9_999, (5, 1), 12, 12),
    (9_999, (2, 2), 16, 16), (20, (3, 1), 6, 6), (9_999, (40, 1), 2, 1),
])
@pytest.mark.parametrize('mix', ['mixup', 'cutmix'])
def test_the_usual_batch_has_pairs_to_mix_in_every_share(images, shares, batch, of_stage_1, mix):
    part = ImageSet(np.zeros((images, 1, 1, 3), np.uint8), torch.zeros(images, dtype=torch.long),
                    Target('class', ('a', 'b')))
    args = argparse.Namespace(batch_size=None, world_size=shares[0], grad_accum_steps=shares[1],
                              **{'mixup': 0, 'cutmix': 0, mix: 0.5})
    splits = Splits('toy', part, part, part, 'free')
    assert batch_of_a_step(args, 'plain', splits) == batch
    assert batch_of_a_step(args, 'affect', splits) == of_stage_1  # which mixes nothing


@pytest.mark.parametrize(('argv', 'size', 'small_image'), [
    ((), 32, True), (('--dataset', 'cifar100', '--img-size', '48'), 48, True), (('--img-size', '64'), 64, True),
    (('--img-size', '72'), 72, False), (('--no-small-image',), 32, False), (('--dataset', 'own'), 224, False),
    (('--task', 'affect'), 32, True), (('--task', 'affect', '--stimuli', 'oasis+nemo'), 32, True),
    (('--task', 'affect', '--stimuli', 'emoji+own'), 224, False), (('--stimuli', 'own'), 32, True),
    (('--model', 'test_convnext'), 32, False),
])
def test_size_and_form_follow_from_the_set_and_the_backbone(train, argv, size, small_image):
    args = train.parse_args(['--model', 'test_resnet', *argv])
    assert (args.img_size, args.small_image) == (size, small_image)


def test_no_experience_is_none_beside_a_folder_of_that_name(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'none').mkdir()
    assert train.parse_args(['--experience', 'none']).experience == 'none'


def test_a_square_is_cut_out_before_images_are_shrunk(train):
    args = train.parse_args(['--model', 'test_resnet', '--cutout', '16', '--start-img-size', '16'])
    pixels = np.full((4, 32, 32, 3), 255, np.uint8)
    images = ImageSet(pixels, torch.arange(4), Target('class', tuple('abcd')))
    loader = make_loader(images, (32, 32), 4, {'mean': (0.0,) * 3, 'std': (1.0,) * 3}, training=True, kind='resident',
                         flip='none', cutout=args.cutout)
    (x, _), = ProgressiveLoader(loader, args.start_img_size, epochs=3)
    assert x.shape[-1] == 16
    assert 0.7 < x.mean(dim=(1, 2, 3)).min() < 0.9  # a square of half the side, which takes a quarter at most


def test_rated_stimuli_of_a_rehearsal_need_two_a_step():
    def splits(target, targets):
        part = ImageSet(np.zeros((9, 1, 1, 3), np.uint8), targets, target)
        return Splits('toy', part, part, part, 'free')

    images = splits(Target('class', ('a', 'b')), torch.zeros(9, dtype=torch.long))
    stimuli = splits(Target('ratings', ('valence',)), torch.zeros(9, 1))
    args = argparse.Namespace(batch_size=1, world_size=1, grad_accum_steps=1, mixup=0, cutmix=0)
    assert batch_of_a_step(args, 'emoreg', images) == 1
    with pytest.raises(DataError, match='1 - CCC needs 2 images or more a step, --batch-size 1 gives 1'):
        batch_of_a_step(args, 'emoreg', images, stimuli)


def test_accumulation_beyond_a_small_set_is_what_is_named():
    part = ImageSet(np.zeros((9, 1, 1, 3), np.uint8), torch.zeros(9, dtype=torch.long), Target('class', ('a', 'b')))
    args = argparse.Namespace(batch_size=None, world_size=2, grad_accum_steps=10, mixup=0, cutmix=0)
    with pytest.raises(DataError, match=r'^--grad-accum-steps 10: in 2 processes they share out the 9 images that toy '
                                        r'has to train on\. Use fewer\.$'):
        batch_of_a_step(args, 'plain', Splits('toy', part, part, part, 'free'))
