"""What train.py makes of its flags: the model, its losses, the optimizer and the sets, without training them."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from timm_emoreg.data import ImageSet, Splits, Target, load_stimuli, load_target
from timm_emoreg.data.controls import fewer_images, predict_rotation, shuffle_labels
from timm_emoreg.training import convolution
from timm_emoreg.training.experience import Experience, untrained_experience

ONE = ImageSet([Path('a.png')] * 3, torch.arange(3), Target('class', ('a', 'b', 'c')))
THREE = Splits('three', ONE, ONE, ONE, 'free')


@pytest.fixture
def parsed(train):
    """The settings of a command line, of one process."""
    def call(*argv, model='test_vit'):
        args = train.parse_args(['--model', model, '--img-size', '32', *map(str, argv)])
        args.world_size, args.rank, args.distributed, args.whole_batch = 1, 0, False, 64
        return args
    return call


# The command on a card names only what differs from the defaults (`recipe_of`), and so do commands in READMEs and those
# of the study: with another default, the same command would train something else than what was published. A default
# that has to change needs these commands to be written anew.
DEFAULTS = {
    'model': 'emoreg_resnet18', 'task': 'emoreg', 'model_kwargs': {}, 'pretrained_backbone': False, 'drop': None,
    'drop_path': None, 'backbone': 'resnet18', 'small_image': True, 'img_size': 32,
    'experience': None, 'stimuli': None, 'stimuli_labels': None, 'shuffle_stimuli_labels': False,
    'rating_columns': None, 'rating_scale': None, 'affect_epochs': None, 'balance': 0.5, 'balanced_in': 'prediction',
    'modulation': True, 'keep_affect': 0.0, 'rehearsal': 0.0, 'affect_lr_scale': 1.0, 'separate_experience': False,
    'experience_share': 1.0,
    'dataset': 'cifar10', 'train_images': None, 'start_img_size': None, 'batch_size': None, 'loader': 'auto',
    'no_aug': False, 'hflip': 'random', 'cutout': 0, 'mixup': 0.0, 'cutmix': 0.0, 'smoothing': 0.1,
    'epochs': 8, 'val_interval': 1, 'opt': None, 'opt_kwargs': {}, 'lr': None, 'momentum': 0.9, 'weight_decay': None,
    'layer_decay': None, 'sched': 'cosine', 'decay_epochs': None, 'decay_rate': None, 'warmup_epochs': 1.0,
    'warmup_lr': 1e-3, 'min_lr': 1e-3, 'clip_grad': None, 'clip_mode': 'norm', 'grad_accum_steps': 1,
    'model_ema': False, 'model_ema_decay': 0.998,
    'amp': True, 'amp_dtype': 'bfloat16', 'channels_last': True, 'grad_checkpointing': False, 'torchcompile': None,
    'sync_bn': False, 'seed': 42,
}


def test_no_default_has_changed_since_recipes_were_published(train):
    of_the_machine = ('output', 'experiment', 'resume', 'data_dir', 'device', 'workers', 'log_interval')
    found = vars(train.parse_args([]))
    assert {name: value for name, value in found.items() if name not in of_the_machine} == DEFAULTS


def test_the_model_and_its_losses_are_those_that_were_asked_for(train, parsed):
    def build(*flags):
        args = parsed('--experience', 'none', '--smoothing', 0.3, *flags)
        model = train.build_model(args, 'emoreg', THREE, untrained_experience())
        return model, train.build_task(args, 'emoreg', model, THREE, torch.device('cpu'), THREE)

    model, task = build('--no-modulation', '--balance', 0.3, '--balanced-in', 'loss', '--drop', 0.25, '--drop-path',
                        0.5, '--keep-affect', 2)
    assert (model.modulation, model.balance, model.experience) == (None, 0.3, 'shared')
    assert model.backbone.head_drop.p == 0.25
    assert max(getattr(m, 'drop_prob', None) or 0 for m in model.modules()) == 0.5
    assert (task.balanced_in, task.keep_affect, task.rehearsal, task.criterion.smoothing) == ('loss', 2, 0, 0.3)
    model, task = build('--separate-experience', '--balance', 'gate')
    assert (model.experience, model.balance, model.modulation is None) == ('separate', 'gate', False)
    _, task = build('--rehearsal', 3, '--stimuli', 'emoji')
    assert (task.balanced_in, task.keep_affect, task.rehearsal) == ('prediction', 0, 3)
    assert (task.criterion.smoothing, task.affect_criterion.smoothing) == (0.3, 0.3)
    args = parsed('--task', 'affect', '--smoothing', 0.2)
    model = train.build_model(args, 'affect', THREE, None)
    task = train.build_task(args, 'affect', model, THREE, torch.device('cpu'), None)
    assert (model.num_classes, model.num_affect, task.criterion.smoothing) == (0, 3, 0.2)


def test_the_optimizer_is_the_one_that_was_asked_for(train, parsed):
    args = parsed('--experience', 'none', '--opt', 'sgd', '--lr', 0.4, '--momentum', 0.8, '--weight-decay', 0.003,
                  '--layer-decay', 0.5, '--affect-lr-scale', 0.1, '--min-lr', 0.01)
    model = train.build_model(args, 'emoreg', THREE, untrained_experience())
    recipe = train.recipe_of(args, 'emoreg', model)
    optimizer, scheduler = train.optimizer_of(args, 'emoreg', model, recipe, 2, 10, torch.device('cpu'), 'float32')
    assert {group['fused'] for group in optimizer.param_groups} == {True}
    groups = {name: group for name, p in model.named_parameters() for group in optimizer.param_groups
              if any(q is p for q in group['params'])}
    assert {group['momentum'] for group in optimizer.param_groups} == {0.8}
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.003, 0.0}
    scale = {name: group.get('lr_scale', 1.0) for name, group in groups.items()}
    assert (scale['head.weight'], scale['head_affect.weight']) == (1, pytest.approx(0.1))
    assert scale['backbone.patch_embed.proj.weight'] < scale['backbone.blocks.0.attn.qkv.weight'] < 1
    rates = []
    for update in range(21):
        scheduler.step_update(num_updates=update)
        rates.append(groups['head.weight']['lr'])
    assert (rates[0], rates[20]) == pytest.approx((0.4 * 1e-3, 0.4 * 0.01))
    assert rates.index(max(rates)) == 5  # the end of the warm-up, a quarter of these two epochs
    assert (parsed().torchcompile, parsed('--torchcompile').torchcompile) == (None, 'inductor')
    kwargs = train.recipe_of(parsed('--opt', 'muon', '--opt-kwargs', 'ns_steps=4'), 'emoreg', model)['opt_kwargs']
    assert kwargs == {**train.MUON, 'ns_steps': 4}


def test_convolutions_on_a_cpu_leave_out_what_meets_padding_alone(train, parsed):
    args = parsed('--model', 'test_resnet', '--experience', 'none')
    model = train.checked_model(args, 'emoreg', THREE, untrained_experience(), 4, 1, torch.device('cpu'), False)
    changed = {type(m) for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert changed == {convolution._Conv2d}


def test_the_stimuli_and_images_are_those_that_were_asked_for(train, parsed):
    def labels(splits):
        return [getattr(splits, part).targets.tolist() for part in ('train', 'validation', 'test')]

    emoji = load_stimuli('emoji')
    for flags, expected in ((('--shuffle-stimuli-labels',), shuffle_labels(emoji, 7)),
                            (('--stimuli-labels', 'rotation'), predict_rotation(emoji, 7)),
                            (('--stimuli-labels', 'group'), load_stimuli('emoji', labels='group'))):
        found = train.stimuli_of(parsed('--stimuli', 'emoji', '--seed', 7, *flags))
        assert (found.target, labels(found)) == (expected.target, labels(expected))
    found = train.target_of(parsed('--dataset', 'emoji', '--train-images', 100, '--seed', 7))
    expected = fewer_images(load_target('emoji'), 100, 7)
    assert labels(found) == labels(expected)
    assert all((one == other).all() for one, other in zip(found.train.images, expected.train.images, strict=True))


@pytest.mark.parametrize(('images', 'flags', 'said'), [
    (19, (), True), (5, ('--val-interval', 2), True),
    (20, (), False), (19, ('--val-interval', 3), False),
])
def test_an_epoch_that_few_images_choose_is_told(train, parsed, capsys, images, flags, said):
    few = dataclasses.replace(THREE, validation=ONE.subset([0] * images))
    chosen = {'precision': 'float32', 'loader': 'timm'}
    train.announce(parsed(*flags), 'plain', timm.create_model('test_vit'), few, None, {'opt': 'sgd', 'lr': 1.0}, chosen,
                   epochs=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'the best epoch' in line]
    assert lines == [f'three: the best epoch will be chosen on {images} images of the validation part, which is mostly '
                     'chance. Add images, or take the last epoch by --val-interval 3.'] * said


@pytest.mark.parametrize(('flags', 'lrs'), [
    (('step',), [2e-3, 2e-4, 2e-5]),
    (('step', '--decay-epochs', 2, '--decay-rate', 0.5), [0.02, 0.01, 0.01]),
    (('poly',), [2 / 150, 1 / 150, 2e-5]),
    (('poly', '--decay-rate', 2), [0.02 * 4 / 9, 0.02 / 9, 2e-5]),
    (('cosine',), [0.015, 0.005, 2e-5]),
])
def test_every_schedule_ends_lower_than_it_began(train, parsed, flags, lrs):
    args = parsed('--opt', 'sgd', '--epochs', 3, '--warmup-epochs', 0, '--lr', 0.02, '--sched', *flags)
    model = timm.create_model('test_vit')
    recipe = train.recipe_of(args, 'plain', model)
    optimizer, scheduler = train.optimizer_of(args, 'plain', model, recipe, 3, 6, torch.device('cpu'), 'float32')
    found = []
    for epoch in range(3):
        scheduler.step_update(num_updates=6 * (epoch + 1))
        found.append(max(group['lr'] for group in optimizer.param_groups))
    assert found == pytest.approx(lrs, rel=0.01)


@pytest.mark.parametrize(('flags', 'asked', 'expected'), [
    ((), [[32]], 'columns'),
    (('--model', 'emoreg_resnet18', '--start-img-size', 16), [[16, 24, 32]], 'columns'),
    (('--torchcompile',), [], None)])
def test_a_convolution_is_chosen_for_all_images(train, parsed, monkeypatch, tmp_path, flags, asked, expected):
    """The smallest may need no columns where larger ones do. Of a compiled model none, as it computes torch's own."""
    sizes = []
    monkeypatch.setattr(train, 'choose_convolution',
                        lambda model, device, precision, img_sizes: sizes.append(img_sizes) or 'columns')
    args = parsed('--loader', 'timm', '--no-amp', *flags)
    args.distributed, args.rank, args.world_size = False, 0, 1
    chosen = train.choose(args, timm.create_model('test_resnet'), THREE, None, 3, torch.device('cpu'), tmp_path)
    assert (chosen.get('convolution'), sizes) == (expected, asked)


def test_the_weights_of_the_backbone_are_asked_for(train, parsed, monkeypatch):
    asked = []
    monkeypatch.setattr(train, 'create_backbone', lambda *_, **kwargs: asked.append(kwargs['pretrained']))
    monkeypatch.setattr(timm, 'create_model', lambda *_, **kwargs: asked.append(kwargs['pretrained_backbone']))
    for flags in ((), ('--pretrained-backbone',)):
        train.build_model(parsed('--task', 'plain', *flags), 'plain', THREE, None)
        train.build_model(parsed(*flags), 'affect', THREE, None)
    assert asked == [False, False, True, True]


def test_weights_of_the_backbone_that_would_be_overwritten_are_not_asked_for(train, parsed, monkeypatch):
    experience, asked = Experience('here', {'backbone.x': torch.zeros(1)}, 'emotion', 8), []
    model = SimpleNamespace(load_experience=lambda *_: None)
    monkeypatch.setattr(train, 'create_backbone', lambda *_, **kwargs: asked.append(kwargs['pretrained']))
    monkeypatch.setattr(train, 'load_backbone', lambda *_: None)
    monkeypatch.setattr(timm, 'create_model',
                        lambda *_, **kwargs: asked.append(kwargs['pretrained_backbone']) or model)
    flags = ('--pretrained-backbone', '--experience', 'here')
    as_many = timm.get_pretrained_cfg('test_vit').num_classes
    thousand = Target('class', tuple(map(str, range(as_many))))
    of_a_file = ('--model-kwargs', "pretrained_cfg_overlay={'file':'a.pth','num_classes':3}")
    for call, expected in (
            (lambda: train.build_model(parsed(*flags), 'emoreg', THREE, experience), False),
            (lambda: train.build_model(parsed('--task', 'plain', *flags), 'plain', THREE, experience), False),
            (lambda: train.build_model(parsed(*flags, '--separate-experience'), 'emoreg', THREE, experience), True),
            (lambda: train.build_model(parsed(*flags, '--experience-share', 0.5), 'emoreg', THREE, experience), True),
            (lambda: train.build_model(parsed(*flags), 'emoreg', THREE, untrained_experience()), True),
            (lambda: train.build_model(parsed(*flags), 'affect', THREE, None, resumed=True), False),
            (lambda: train.build_model(parsed(*flags), 'emoreg', THREE, untrained_experience(), resumed=True), False),
            # the affect response to keep close to is that of the beginning, and in no checkpoint
            (lambda: train.build_model(parsed(*flags, '--keep-affect', 1), 'emoreg', THREE, untrained_experience(),
                                       resumed=True), True),
            (lambda: train.build_model(parsed(*flags, '--keep-affect', 1), 'affect', THREE, None, resumed=True), False),
            (lambda: train.build_model(parsed(*flags), 'emoreg', SimpleNamespace(target=thousand), experience), True),
            # the classes of a file that is named
            (lambda: train.build_model(parsed(*flags, *of_a_file), 'emoreg', THREE, experience), True),
            (lambda: train.build_model(parsed(*flags, *of_a_file), 'emoreg', SimpleNamespace(target=thousand),
                                       experience), False)):
        asked.clear()
        call()
        assert asked == [expected]
