"""train.py as a user runs it: settings in, files and one JSON line a stage out."""
import argparse
import contextlib
import csv
import inspect
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_process import Training

from timm_emoreg.data import DataError, load_target
from timm_emoreg.data.rehearsal import RehearsalLoader
from timm_emoreg.data.resident import EpochLoader
from timm_emoreg.training.attention import fused_attentions
from timm_emoreg.training.checkpoint import CheckpointError
from timm_emoreg.training.curves import draw_curves
from timm_emoreg.training.run_folder import WriteError


@pytest.fixture(scope='module')
def folder(colours) -> Path:
    return colours


@pytest.fixture
def run(train, tmp_path, monkeypatch, capsys):
    """Call train.py's main with a tiny backbone; gives its status, its JSON lines and what it wrote to stderr."""
    # to draw takes as long as to train so little; the tests of the picture bring it back
    monkeypatch.setattr(train, 'draw_curves', lambda summary, picture, *_: picture.touch())

    def call(*argv, name='run', model='test_resnet'):
        monkeypatch.setattr(train, 'received', [])
        named = () if '--resume' in argv else (
            '--model', model, '--output', tmp_path, '--experiment', name, '--img-size', 32, '-b', 8, '--no-amp')
        monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, (*named, *argv))])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = train.main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return status, [json.loads(line) for line in out.splitlines() if line.startswith('{')], err
    return call


@pytest.fixture
def watched(train, monkeypatch):
    """The arguments by name of each call of a function of train.py."""
    def watch(name):
        plain, calls = getattr(train, name), []

        def call(*args, **kwargs):
            calls.append(inspect.signature(plain).bind(*args, **kwargs).arguments)
            return plain(*args, **kwargs)
        monkeypatch.setattr(train, name, call)
        return calls
    return watch


@pytest.mark.parametrize('error', [
    CheckpointError('x'), DataError('x'), FloatingPointError('x'), KeyError('x'), OSError('x'), RuntimeError('x'),
    torch.OutOfMemoryError('x'), WriteError('x')])
def test_an_error_before_anything_is_trained_leaves_no_run(train, run, folder, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, 'run_stage', fail)
    defect = type(error) in (KeyError, RuntimeError)  # which keeps its traceback
    with pytest.raises(type(error)) if defect else contextlib.nullcontext():
        assert run('--task', 'plain', '--dataset', folder)[0] in (1, 2)
    assert not (tmp_path / 'run').exists()


def rows(path: Path) -> list[dict]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_both_stages_on_the_embedded_emoji(run, train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'draw_curves', draw_curves)
    status, results, _ = run('--dataset', 'emoji', '--epochs', 2, '-b', 64, '--img-size', 16)
    assert status == 0
    assert [r['task'] for r in results] == ['affect', 'emoreg']
    affect, emoreg = results
    assert affect['metric'] == 'ccc'
    assert [(r['recipe']['opt'], r['recipe']['lr']) for r in results] == [('adamw', 0.0005), ('muon', 0.02)]
    assert set(affect['test']) >= {'ccc', 'pcc', 'rmse', 'ccc_valence'}
    assert emoreg['experience'] == str(tmp_path / 'run/affect/model_best.pth.tar')
    assert emoreg['test']['top1'] > 25  # the largest of the nine groups is a fifth of the test images
    for stage in ('affect', 'emoreg'):
        files = tmp_path / 'run' / stage
        assert {p.name for p in files.iterdir()} >= {
            'last.pth.tar', 'model_best.pth.tar', 'summary.csv', 'curves.png', 'result.json'}
        assert Image.open(files / 'curves.png').format == 'PNG'
    summary = rows(tmp_path / 'run/emoreg/summary.csv')
    assert [row['epoch'] for row in summary] == ['0', '1']
    assert set(summary[0]) >= {'train_loss', 'train_loss_emotional', 'train_loss_non_emotional', 'train_balance',
                               'eval_top1', 'lr'}


def test_stage_2_starts_from_the_weights_of_stage_1(run, tmp_path, folder, train, monkeypatch):
    assert run('--task', 'affect', '--stimuli', folder, '--epochs', 1, name='stage1')[0] == 0
    state = train.load_training_checkpoint(tmp_path / 'stage1/affect/model_best.pth.tar')['state_dict']
    started = {}
    build = train.build_model
    monkeypatch.setattr(train, 'build_model', lambda *a: started.setdefault('model', build(*a)))
    monkeypatch.setattr(train, 'train_epoch', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run('--experience', tmp_path / 'stage1', '--dataset', folder, '--epochs', 1)
    own = started['model'].state_dict()
    taken = [k for k in state if k.startswith(('backbone.', 'head_affect.'))]
    assert len(taken) > 20
    assert all(torch.equal(own[k], state[k]) for k in taken)


def test_rehearsed_stimuli_are_drawn_apart_from_the_images(run, folder, train, monkeypatch):
    drawn = []

    def drawing(images, stimuli):  # of one folder: as many of both
        loader = RehearsalLoader(images, stimuli)
        loader.set_epoch(0)
        drawn.extend(zip(*((target.tolist(), shown.tolist()) for _, target, _, shown in loader), strict=True))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'RehearsalLoader', drawing)
    with pytest.raises(KeyboardInterrupt):
        run('--stimuli', folder, '--dataset', folder, '--rehearsal', 1, '--epochs', 1, '--affect-epochs', 1, '-b', 8)
    images, stimuli = drawn
    assert len(images) == len(stimuli) > 1
    assert images != stimuli


@pytest.mark.parametrize('task', ['emoreg', 'plain'])
def test_stage_2_starts_from_a_share_of_stage_1(run, tmp_path, folder, train, watched, monkeypatch, task):
    assert run('--task', 'affect', '--stimuli', folder, '--epochs', 1, name='stage1')[0] == 0
    taught = train.load_training_checkpoint(tmp_path / 'stage1/affect/model_best.pth.tar')['state_dict']
    started = []
    build = train.build_model
    monkeypatch.setattr(train, 'build_model', lambda *a: started.append(build(*a)) or started[-1])
    monkeypatch.setattr(train, 'train_epoch', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    said = watched('say')
    experience = ('--experience', tmp_path / 'stage1')
    untaught = ('--experience', 'none') if task == 'emoreg' else ()
    for flags in (untaught, (*experience, '--experience-share', 0.25)):
        with pytest.raises(KeyboardInterrupt):
            run(*flags, '--task', task, '--dataset', folder, '--epochs', 1, '--seed', 3)
        shutil.rmtree(tmp_path / 'run')
    assert [call['text'].endswith('; 0.25 of its backbone') for call in said if 'affect response of' in call['text']
            and 'stage1' in call['text']] == [True]
    fresh, own = (model.state_dict() for model in started)
    prefix = 'backbone.' if task == 'emoreg' else ''
    mixed = [k for k in own if f'backbone.{k.removeprefix(prefix)}' in taught and own[k].is_floating_point()]
    assert len(mixed) > 20
    for key in mixed:
        expected = 0.25 * taught[f'backbone.{key.removeprefix(prefix)}'] + 0.75 * fresh[key]
        torch.testing.assert_close(own[key], expected)
    if task == 'emoreg':  # what reads the features keeps what it knows
        assert torch.equal(own['head_affect.weight'], taught['head_affect.weight'])


@pytest.mark.parametrize('flags', [
    ('--balance', 'learned', '--opt', 'adamw', '--layer-decay', '0.7'),
    ('--balance', 'gate', '--affect-lr-scale', '0.1', '--cutmix', '1', '--mixup', '0.5', '--clip-grad', '1'),
    ('--balance', '0.3', '--balanced-in', 'loss', '--keep-affect', '0.5', '--model-ema', '--grad-accum-steps', '2'),
    ('--separate-experience', '--opt', 'muon', '--opt-kwargs', 'ns_steps=3', 'nesterov=True', '--hflip', 'alternate',
     '--cutout', '8', '--start-img-size', '16'),
    ('--rehearsal', '0.5', '--start-img-size', '16', '--opt', 'adamw', '--grad-accum-steps', '2'),
    ('--no-modulation', '--loader', 'timm', '--workers', '0', '--grad-checkpointing', '--clip-grad', '1',
     '--clip-mode', 'agc'),
])
def test_choices_of_method_and_recipe_train(run, folder, flags):
    status, results, _ = run('--stimuli', folder, '--dataset', folder, '--epochs', 1, *flags)
    assert status == 0
    assert all(torch.isfinite(torch.tensor(list(r['test'].values()))).all() for r in results)


def test_vit_gets_the_patches_that_fit(run, folder):
    _, results, _ = run('--dataset', folder, '--task', 'plain', '--epochs', 1, model='test_vit')
    assert results[0]['form'] == 'patches of 4x4'
    assert (results[0]['recipe']['opt'], results[0]['recipe']['lr']) == ('muon', 0.005)  # a net without batch norm


def test_ratings_of_a_csv(run, tmp_path, folder):
    table = folder / 'ratings.csv'
    lines = [f'{p.relative_to(folder)},{2 if p.parent.name == "red" else 7},{5 + i % 3}'
             for i, p in enumerate(sorted(folder.glob('*/*.png')))]
    table.write_text('\n'.join(['image,valence,arousal', *lines]))
    try:
        _, results, _ = run('--task', 'affect', '--stimuli', table, '--rating-columns', 'valence', 'arousal',
                            '--rating-scale', 1, 9, '--epochs', 5, '--lr', 0.002)
        status, _, err = run('--stimuli', table, '--rating-columns', 'valence', '--rating-scale', 1, 9, '--dataset',
                             folder, name='both')
    finally:
        table.unlink()
    assert (status, (tmp_path / 'both').exists()) == (2, False)
    assert re.match(r'train\.py: ratings, colours\d: stage 1 would see \d+ of the 12 files that stage 2 is judged', err)
    assert results[0]['test']['ccc_valence'] > 0.3
    task = torch.load(tmp_path / 'run/affect/last.pth.tar', weights_only=False)['task_state']
    assert task == {'target_kind': 'ratings', 'names': ['valence', 'arousal']}


def test_several_stimuli_as_one(run, tmp_path, folder, monkeypatch):
    shutil.copytree(folder / 'red', tmp_path / 'more/Angry')
    shutil.copytree(folder / 'red', tmp_path / 'more/red')
    monkeypatch.chdir(tmp_path)
    status, results, _ = run('--stimuli', f'{folder}+more', '--dataset', folder, '--epochs', 1)
    assert status == 0
    assert results[0]['data'] == f'{folder.name}+more'
    saved = json.loads((tmp_path / 'run/args.json').read_text())
    assert saved['stimuli'] == f'{folder}+{tmp_path / "more"}'
    task = torch.load(tmp_path / 'run/affect/last.pth.tar', weights_only=False)['task_state']
    assert task['names'] == [*sorted(p.name for p in folder.iterdir()), 'anger']


def test_a_resumed_run_ends_with_the_numbers_of_an_unbroken_one(run, train, tmp_path, folder, monkeypatch):
    flags = ('--stimuli', folder, '--dataset', folder, '--epochs', 3, '--drop', 0.2, '--mixup', 0.5, '--model-ema',
             '--balance', 'learned', '--start-img-size', 24, '--rehearsal', 1)
    assert run(*flags, name='whole')[0] == 0

    steps, seed = [], train.random_seed
    def interrupt(*args):  # called before each step, and once to build each stage's model
        seed(*args)
        steps.append(args)
        if len(steps) in (5, 30):  # within the first epoch of stage 1, and in the second of stage 2
            train.received.append(signal.SIGTERM)
    monkeypatch.setattr(train, 'random_seed', interrupt)
    status, _, err = run(*flags, name='broken')
    assert status == 128 + signal.SIGTERM
    assert f'Go on with: python train.py --resume {tmp_path / "broken"}' in err
    assert list((tmp_path / 'broken/affect').glob('recovery-0-*.pth.tar'))
    assert run('--resume', tmp_path / 'broken')[0] == 128 + signal.SIGTERM
    assert list((tmp_path / 'broken/emoreg').glob('recovery-1-*.pth.tar'))
    assert run('--resume', tmp_path / 'broken')[0] == 0
    assert not list((tmp_path / 'broken').glob('*/recovery-*'))

    for stage in ('affect', 'emoreg'):
        whole, broken = tmp_path / 'whole' / stage, tmp_path / 'broken' / stage
        assert rows(whole / 'summary.csv') == rows(broken / 'summary.csv')
        assert (json.loads((whole / 'result.json').read_text())['test']
                == json.loads((broken / 'result.json').read_text())['test'])
        for kind in ('state_dict', 'state_dict_ema'):
            expected, found = (train.load_training_checkpoint(p / 'last.pth.tar')[kind] for p in (whole, broken))
            assert all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.parametrize(('amp', 'optimizers'), [('--no-amp', 1), ('--amp', 0)])
def test_muon_is_set_to_float32_where_the_run_is(run, train, folder, monkeypatch, amp, optimizers):
    monkeypatch.setattr('timm_emoreg.training.precision.faster_in', lambda *_: True)
    found = []
    monkeypatch.setattr(train, 'orthogonalize_in_float32', found.append)
    assert run('--task', 'plain', '--dataset', folder, '--epochs', 1, '--opt', 'sgd', '--img-size', 16, amp)[0] == 0
    assert len(found) == optimizers


@pytest.mark.parametrize('precision', ['bfloat16', 'float16'])
def test_16_bit_training_resumes_in_its_precision(run, train, tmp_path, folder, monkeypatch, precision):
    monkeypatch.setattr('timm_emoreg.training.precision.faster_in', lambda *_: True)
    flags = ('--task', 'plain', '--dataset', folder, '--epochs', 2, '--amp', '--amp-dtype', precision,
             '--opt', 'sgd', '--img-size', 16)  # 16 bits are slow on most processors, in Muon above all
    status, (whole,), _ = run(*flags, name='whole')
    assert (status, whole['precision'], whole['loader']) == (0, precision, 'resident')

    seen, epoch = [], train.train_epoch

    def stop_after_the_first(number, loop, *args):
        seen.append(loop.autocast)
        parts = epoch(number, loop, *args)
        if number == 0:
            train.received.append(signal.SIGTERM)
        return parts

    monkeypatch.setattr(train, 'train_epoch', stop_after_the_first)
    assert run(*flags, name='broken')[0] == 128 + signal.SIGTERM
    checkpoint = tmp_path / 'broken/plain/last.pth.tar'
    state = train.load_training_checkpoint(checkpoint)
    state['args'].seconds += 1000
    torch.save(state, checkpoint)
    # what is fast and free may have changed since
    monkeypatch.setattr('timm_emoreg.training.precision.faster_in', lambda *_: False)
    monkeypatch.setattr('timm_emoreg.data.loader.fits_in_memory', lambda *_: False)
    status, (broken,), _ = run('--resume', tmp_path / 'broken')
    assert (status, broken['precision'], broken['loader']) == (0, precision, 'resident')
    with seen[-1]():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == getattr(torch, precision)
    assert broken['test'] == whole['test']
    assert broken['seconds'] > 1000  # those of both attempts


def test_a_precision_that_is_chosen_anew_needs_no_scaler_in_the_checkpoint(run, train, tmp_path, folder, monkeypatch):
    monkeypatch.setattr('timm_emoreg.training.precision.faster_in', lambda *_: False)
    with monkeypatch.context() as stopping:
        stopping.setattr(train, 'asked_to_stop', lambda args, received: received.append(signal.SIGTERM) or True)
        assert run('--task', 'plain', '--dataset', folder, '--epochs', 1, '--amp', '--amp-dtype', 'float16', '--opt',
                   'sgd', '--img-size', 16)[0] == 128 + signal.SIGTERM
    (tmp_path / 'run/plain/choices.json').unlink()  # as the message on a damaged one advises
    monkeypatch.setattr('timm_emoreg.training.precision.faster_in', lambda *_: True)
    status, (result,), _ = run('--resume', tmp_path / 'run')
    assert (status, result['precision']) == (0, 'float16')
    assert 'amp_scaler' in train.load_training_checkpoint(tmp_path / 'run/plain/last.pth.tar')


@pytest.mark.parametrize('old', [False, True])
@pytest.mark.parametrize(('model', 'name', 'choice', 'has_it'), [
    ('test_vit', 'attention', lambda model, device, precision, img_size: 'plain',
     lambda task: not fused_attentions(task)),
    ('test_resnet', 'convolution', lambda model, device, precision, img_sizes: 'columns',
     lambda task: all(m.columns for m in task.modules() if isinstance(m, torch.nn.Conv2d)))])
def test_a_kernel_is_chosen_once_a_stage(run, train, tmp_path, folder, monkeypatch, model, name, choice, has_it, old):
    found, epoch = [], train.train_epoch

    def stop_after_the_first(number, loop, *args):
        found.append(has_it(loop.task))  # the averaged model, too
        parts = epoch(number, loop, *args)
        if number == 0:
            train.received.append(signal.SIGTERM)
        return parts

    monkeypatch.setattr(train, 'train_epoch', stop_after_the_first)
    monkeypatch.setattr(train, f'choose_{name}', choice)
    assert run('--task', 'plain', '--dataset', folder, '--epochs', 2, '--model-ema',
               model=model)[0] == 128 + signal.SIGTERM
    if old:  # a run from before it was chosen, which goes on with the usual one
        (tmp_path / 'run/plain/choices.json').write_text('{"precision": "float32", "loader": "resident"}')
    monkeypatch.setattr(train, f'choose_{name}', lambda *_: pytest.fail('chosen again'))
    status, (result,), _ = run('--resume', tmp_path / 'run')
    kind = {'attention': 'plain', 'convolution': 'columns'}[name]
    assert (status, found, result.get(name)) == (0, [True, not old], None if old else kind)


def test_the_schedule_ends_lower_than_it_began(run, tmp_path, folder):
    recipe = ('--epochs', 3, '--warmup-epochs', 0, '--lr', 0.02, '--sched', 'cosine')
    assert run('--task', 'plain', '--dataset', folder, *recipe)[0] == 0
    found = [float(row['lr']) for row in rows(tmp_path / 'run/plain/summary.csv')]
    assert found == pytest.approx([0.015, 0.005, 2e-5], rel=0.01)


def test_an_optimizer_has_its_recipe_in_any_case(run, folder):
    status, (result,), _ = run('--task', 'plain', '--dataset', folder, '--epochs', 1, '--opt', 'Muon')
    assert (status, result['recipe']['lr'], result['recipe']['opt_kwargs']['ns_steps']) == (0, 0.02, 3)


def test_a_refusal_without_words_is_named_by_its_type(run, train, folder, monkeypatch):
    def refuse(*_):
        raise AssertionError
    monkeypatch.setattr(torch.nn.BatchNorm2d, 'forward', refuse)
    status, _, err = run('--task', 'plain', '--dataset', folder, '--epochs', 1, '--start-img-size', 16)
    assert (status, 'takes no images of that size (AssertionError). Use' in err) == (2, True)


@pytest.mark.parametrize(('model', 'flags', 'message'), [
    ('test_convnext', ('--start-img-size', 16), '--start-img-size 16: test_convnext takes no images of that size ('),
    # takes both ends, and none of the sizes between them
    ('hrnet_w18_small', ('--img-size', 64, '--start-img-size', 32, '--epochs', 6),
     '--start-img-size 32, grown to 40: hrnet_w18_small takes no images of that size ('),
    ('test_convnext', ('--img-size', 8), '--img-size 8: test_convnext takes no images of that size ('),
    ('dla46x_c', ('--grad-checkpointing',), '--model dla46x_c cannot be built so: gradient checkpointing not'),
    ('vgg11', ('--drop-path', 0.1), '--model vgg11 cannot be built so: VGG.__init__() got an unexpected keyword '
                                    "argument 'drop_path_rate'. Change --drop-path, --img-size or give"),
])
def test_what_a_backbone_does_not_take_leaves_no_folder(run, tmp_path, folder, model, flags, message):
    status, _, err = run('--task', 'plain', '--dataset', folder, '--epochs', 1, *flags, model=model)
    assert (status, err.startswith(f'train.py: {message}'), (tmp_path / 'run').exists()) == (2, True, False), err


def test_a_run_without_checkpoint_is_not_removed_when_it_is_resumed(run, train, tmp_path, folder, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(train, 'run_stage', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run('--task', 'plain', '--dataset', folder, '--epochs', 1)
    (tmp_path / 'run/notes.txt').write_text('mine')
    monkeypatch.setattr(train, 'build_model', lambda *_: (_ for _ in ()).throw(ValueError('no')))
    status, _, err = run('--resume', tmp_path / 'run')
    assert (status, err.startswith('train.py: --model test_resnet cannot be built so: no. Change')) == (2, True)
    assert (tmp_path / 'run/notes.txt').read_text() == 'mine'


@pytest.mark.parametrize('given', ['plain', 'plain/last.pth.tar'])
def test_a_checkpoint_to_resume_is_answered_with_its_run(run, tmp_path, folder, capsys, given):
    assert run('--task', 'plain', '--dataset', folder, '--epochs', 1)[0] == 0
    with pytest.raises(SystemExit):
        run('--resume', tmp_path / 'run' / given)
    assert f'is no output folder of this script. Give {tmp_path}/run.' in capsys.readouterr().err


def test_a_resumed_run_asks_for_no_other_stage_1(run, train, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(train, 'released_experience', lambda *_: None)
    assert run('--dataset', folder, '--epochs', 1, '--rehearsal', 0, '-b', 48, '--img-size', 16)[0] == 0
    shutil.rmtree(tmp_path / 'run/emoreg')
    monkeypatch.setattr(train, 'released_experience', lambda *_: 'emoreg_resnet18.emoji')  # of a later version
    status, (affect, emoreg), _ = run('--resume', tmp_path / 'run')
    assert (status, affect['task'], emoreg['experience']) == (
        0, 'affect', str(tmp_path / 'run/affect/model_best.pth.tar'))


def test_a_moved_run_is_resumed_where_it_lies_now(run, train, tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link = Path('pictures')
    link.symlink_to(folder)
    with monkeypatch.context() as stopping:
        stopping.setattr(train, 'asked_to_stop', lambda args, received: received.append(signal.SIGTERM) or True)
        assert run('--task', 'plain', '--dataset', link, '--epochs', 1, '--output', 'out')[0] == 128 + signal.SIGTERM
    shutil.copytree('out/run', 'elsewhere/copy')
    Path('other').mkdir()
    monkeypatch.chdir('other')
    status, (result,), _ = run('--resume', '../elsewhere/copy', '--workers', 0)
    assert status == 0
    assert result['checkpoint'] == str(tmp_path / 'elsewhere/copy/plain/model_best.pth.tar')
    assert not (tmp_path / 'out/run/plain/result.json').exists()


@pytest.mark.parametrize('flags', [('--epochs', 30), ('--lr', 0.5), ('-b', 4), ('--no-amp',)])
def test_other_settings_beside_resume_are_refused(run, tmp_path, capsys, flags):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/args.json').write_text('{}')
    with pytest.raises(SystemExit):
        run('--resume', tmp_path / 'run', *flags)
    assert ('--resume goes on with the settings of the run. Only --device, --data-dir, --workers, --log-interval can '
            'be given beside it') in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run('--resume', tmp_path / 'run', '--output', tmp_path)
    assert 'can be given beside it. Move or rename the folder of the run instead.' in capsys.readouterr().err


def test_the_balance_of_a_result_is_that_of_the_weights_that_were_judged(run, train, tmp_path, folder):
    _, (affect, result), _ = run('--stimuli', folder, '--dataset', folder, '--epochs', 2, '--balance', 'learned',
                                 '--model-ema', '--opt', 'adamw', '--lr', 0.02)
    state = train.load_training_checkpoint(tmp_path / 'run/emoreg/model_best.pth.tar')
    rho = {ema: state[f'state_dict{ema}']['regulation.rho'] for ema in ('', '_ema')}
    assert rho[''] != rho['_ema']
    assert result['balance'] == pytest.approx(rho['_ema'].sigmoid().item())
    assert affect['balance'] is None


def test_sigterm_leaves_a_checkpoint(tmp_path, folder):
    training = Training('--model', 'test_resnet', '--task', 'plain', '--dataset', folder, '--img-size', 32, '-b', 8,
                        '--epochs', 100_000, '--no-amp', '--output', tmp_path, '--experiment', 'run')
    training.until('epoch 2/')
    training.process.terminate()
    status, text = training.end()
    assert status == 128 + signal.SIGTERM
    assert 'stopped. Go on with:' in text
    assert (tmp_path / 'run/plain/last.pth.tar').is_file()


def test_a_second_signal_ends_the_process_at_once(train, monkeypatch):
    raised = []
    monkeypatch.setattr(train, 'received', [])
    monkeypatch.setattr(signal, 'signal', lambda number, handler: raised.append((number, handler)))
    monkeypatch.setattr(signal, 'raise_signal', raised.append)
    train.on_signal(signal.SIGINT, argparse.Namespace(distributed=False))
    assert (train.received, raised) == ([signal.SIGINT], [])
    train.on_signal(signal.SIGTERM, argparse.Namespace(distributed=True))  # the launcher's beside the terminal's
    assert raised == []
    train.on_signal(signal.SIGTERM, argparse.Namespace(distributed=False))
    assert raised == [(signal.SIGTERM, signal.SIG_DFL), signal.SIGTERM]


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path, folder):
    status, _, err = run('--task', 'plain', '--dataset', folder, '--epochs', 3, '--lr', 1e30, '--warmup-epochs', 0)
    assert status == 1
    assert 'the loss is nan in epoch 1, step' in err
    assert err.endswith('. Lower --lr or add --clip-grad 1.\n')
    assert 'checkpoint' not in err  # there is none, so the folder's name is free again
    assert os.listdir(tmp_path) == []


def test_weights_that_are_not_finite_are_no_result(run, tmp_path, folder):
    status, results, err = run('--task', 'plain', '--dataset', folder, '--epochs', 1, '--opt', 'sgd', '--lr', 1e30,
                               '-b', 48, '--warmup-epochs', 0)  # one update
    assert (status, results) == (1, [])
    assert err == 'train.py: weights or loss are not finite after epoch 1. Lower --lr or add --clip-grad 1.\n'
    assert os.listdir(tmp_path) == []


def test_weights_that_are_not_finite_are_not_kept_by_a_stop(run, train, tmp_path, folder, monkeypatch):
    epoch = train.train_epoch

    def diverge(number, loop, *args):
        def signalled(*_):  # in the very step that spoils them
            next(loop.task.get_trainable_module().parameters()).data.fill_(float('inf'))
            return True
        monkeypatch.setattr(train, 'asked_to_stop', signalled)
        return epoch(number, loop, *args)

    monkeypatch.setattr(train, 'train_epoch', diverge)
    status, _, err = run('--task', 'plain', '--dataset', folder)
    assert (status, err) == (1, 'train.py: weights or loss are not finite in epoch 1, step 1. Lower --lr or add '
                                '--clip-grad 1.\n')
    assert os.listdir(tmp_path) == []


def test_weights_that_cannot_be_fetched_are_named_and_leave_the_name_free(run, train, tmp_path, folder, monkeypatch):
    def unreachable(*_):
        raise FileNotFoundError('the Hub cannot be reached.\nMore.')

    monkeypatch.setattr(train, 'build_model', unreachable)
    status, _, err = run('--task', 'plain', '--dataset', folder, '--pretrained-backbone')
    assert (status, err) == (2, 'train.py: --pretrained-backbone: the weights of test_resnet cannot be had (the Hub '
                                'cannot be reached). Leave it out, or try again with a connection.\n')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(('file', 'content', 'message'), [
    ('a.pth', None, "--model-kwargs pretrained_cfg_overlay: there is no file {}. Correct the path."),
    ('a.safetensors', b'version https://git-lfs.github.com/spec/v1', '--pretrained-backbone: the weights of '
     'test_resnet cannot be read ('),
    ('a.pth', b'', '--pretrained-backbone: the weights of test_resnet cannot be read ('),
    ('a.pth', b'version https://git-lfs.github.com/spec/v1', '--pretrained-backbone: the weights of test_resnet cannot '
     'be read ('),
    ('a.pth', b'PK\3\4' + bytes(100), '--pretrained-backbone: the weights of test_resnet cannot be read (')])
def test_a_file_of_weights_that_is_none_is_named(run, tmp_path, folder, file, content, message):
    path = folder.parent / file
    if content is not None:
        path.write_bytes(content)
    try:
        status, _, err = run('--task', 'plain', '--dataset', folder, '--pretrained-backbone', '--model-kwargs',
                             f"pretrained_cfg_overlay={{'file':'{path}','num_classes':3}}")
    finally:
        path.unlink(missing_ok=True)
    assert (status, err.count('\n')) == (2, 1)
    assert err.startswith(f'train.py: {message.format(path)}')
    assert content is None or err.endswith('). Their file is damaged: get it anew, or leave the flag out.\n')
    assert os.listdir(tmp_path) == []


def test_a_backbone_without_weights_is_told_to_have_none(run, tmp_path, folder):
    status, _, err = run('--task', 'plain', '--dataset', folder, '--pretrained-backbone', model='mnasnet_050')
    assert (status, err) == (2, 'train.py: --pretrained-backbone: timm has no weights of mnasnet_050. Leave it out, or '
                                'use another --model.\n')
    assert os.listdir(tmp_path) == []


def test_a_device_with_too_little_memory_is_named(run, train, tmp_path, folder, monkeypatch):
    epoch = train.train_epoch

    def fill(number, *args):
        if number == at:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\nMore.')
        return epoch(number, *args)

    monkeypatch.setattr(train, 'train_epoch', fill)
    at, remedies = 0, ('train.py: cpu has too little memory (CUDA out of memory. Tried to allocate 2 GiB). Lower '
                       '--batch-size, share it out with --grad-accum-steps, add --grad-checkpointing, or lower '
                       '--img-size.')
    assert run('--task', 'plain', '--dataset', folder) == (1, [], f'{remedies}\n')
    assert os.listdir(tmp_path) == []
    at = 1
    assert run('--task', 'plain', '--dataset', folder) == (
        1, [], f'{remedies} With more memory, go on with: python train.py --resume {tmp_path / "run"}\n')
    assert 'last.pth.tar' in os.listdir(tmp_path / 'run/plain')


def test_a_cpu_without_memory_is_told_the_same(run, train, folder, monkeypatch):
    def fill(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nMore.")

    monkeypatch.setattr(train, 'train_epoch', fill)
    status, _, err = run('--task', 'plain', '--dataset', folder)
    assert (status, err) == (1, "train.py: cpu has too little memory (DefaultCPUAllocator: can't allocate memory: you "
                                'tried to allocate 9 bytes). Lower --batch-size, share it out with --grad-accum-steps, '
                                'add --grad-checkpointing, or lower --img-size.\n')


def test_what_changes_nothing_here_is_said(run, train, watched, folder, monkeypatch):
    monkeypatch.setattr(train, 'choose_precision', lambda device, dtype: 'float32')
    said = watched('say')
    assert run('--task', 'plain', '--dataset', folder, '--epochs', 1, '--sync-bn', '--start-img-size', 16, '--amp',
               '--amp-dtype', 'float16')[0] == 0
    lines = [call['text'] for call in said]
    assert '--sync-bn: has no effect in one process; torchrun starts several' in lines
    assert '--amp-dtype float16: is no faster than float32 on this processor, so that is taken' in lines
    assert any(', 32 px, ' in line for line in lines)  # the one epoch has the final size
    assert f"terms of {folder.name}: the owner's; not known to this project" in lines
    said.clear()
    assert run('--task', 'plain', '--dataset', folder, '--epochs', 2, '--start-img-size', 16, name='two')[0] == 0
    assert any(', 16 to 32 px, ' in call['text'] for call in said)
    assert not any('--sync-bn' in call['text'] or '--amp-dtype' in call['text'] for call in said)


def test_a_loss_that_ends_later_names_the_last_good_checkpoint(run, train, tmp_path, folder, monkeypatch):
    epoch = train.train_epoch

    def diverge(number, *args):
        if number:
            raise FloatingPointError('the loss is nan in epoch 2, step 1')
        return epoch(number, *args)

    monkeypatch.setattr(train, 'train_epoch', diverge)
    status, _, err = run('--task', 'plain', '--dataset', folder, '--epochs', 3)
    good = tmp_path / 'run/plain/last.pth.tar'
    assert (status, good.is_file()) == (1, True)
    assert f'step 1. The last good checkpoint is {good}. Lower --lr' in err


@pytest.mark.parametrize('change', ['a class has another name', 'a picture more', 'stimuli'])
def test_a_run_does_not_go_on_with_other_data(run, train, tmp_path, folder, monkeypatch, change):
    own = tmp_path / 'own'
    shutil.copytree(folder, own)
    with monkeypatch.context() as stopping:
        stopping.setattr(train, 'asked_to_stop', lambda args, received: received.append(signal.SIGTERM) or True)
        rehearsed = ('--stimuli', own, '--rehearsal', 1, '--experience', tmp_path / 'first')
        if change == 'stimuli':
            stopping.undo()
            assert run('--task', 'affect', '--stimuli', own, '--epochs', 1, name='first')[0] == 0
            stopping.setattr(train, 'asked_to_stop', lambda args, received: received.append(signal.SIGTERM) or True)
        flags = ('--dataset', folder, *rehearsed) if change == 'stimuli' else ('--dataset', own, '--task', 'plain')
        assert run(*flags, '--epochs', 2)[0] == 128 + signal.SIGTERM
    first = sorted(p for p in own.iterdir() if p.is_dir())[0]
    if change == 'a class has another name':
        first.rename(own / 'zzz')
    else:
        one = next(p for p in first.rglob('*') if p.is_file())
        shutil.copy(one, one.with_name(f'copy{one.suffix}'))
    before = sorted((tmp_path / 'run').rglob('*'))
    status, _, err = run('--resume', tmp_path / 'run')
    assert (status, 'was trained on other images, labels or parts of ' in err) == (2, True), err
    assert sorted((tmp_path / 'run').rglob('*')) == before


def test_damaged_settings_are_named(run, tmp_path, capsys):
    (tmp_path / 'run').mkdir()
    for damaged in ('{"a":', '[]'):
        (tmp_path / 'run/args.json').write_text(damaged)
        with pytest.raises(SystemExit):
            run('--resume', tmp_path / 'run')
        assert f'--resume {tmp_path / "run/args.json"}: is damaged (' in capsys.readouterr().err


def test_a_damaged_choice_is_named_and_can_be_removed(run, train, tmp_path, folder, monkeypatch):
    assert run('--task', 'plain', '--dataset', folder, '--epochs', 1)[0] == 0
    (tmp_path / 'run/plain/result.json').unlink()
    choices = tmp_path / 'run/plain/choices.json'
    choices.write_text('')
    status, _, err = run('--resume', tmp_path / 'run')
    assert (status, f'{choices}: is damaged (' in err, len(err.splitlines())) == (2, True, 1), err
    choices.unlink()
    said = []
    monkeypatch.setattr(train, 'say', lambda args, text: said.append(text))
    assert run('--resume', tmp_path / 'run')[0] == 0
    assert f'{tmp_path}/run/plain/last.pth.tar: all epochs are trained, what is left is the test part' in said


def test_a_damaged_picture_costs_no_training(run, tmp_path, folder):
    own = shutil.copytree(folder, tmp_path / 'own pictures')
    flags = ('--task', 'plain', '--dataset', own, '--epochs', 1, '--loader', 'timm', '--workers', 0)
    assert run(*flags, name='whole')[0] == 0
    bad = Path(load_target(str(own)).test.images[0])
    bad.write_bytes(bad.read_bytes()[:100])
    status, _, err = run(*flags, name='a run')
    assert (status, len(err.splitlines())) == (2, 1), err
    assert f'{bad}: not a readable image (' in err
    assert err.endswith(f"Put a readable one in its place. Then go on with: python train.py --resume '{tmp_path}/a "
                        "run' (without it the set would be another one)\n")
    shutil.copy(folder / bad.relative_to(own), bad)
    status, _, err = run('--resume', tmp_path / 'a run')
    assert status == 0, err
    results = [json.loads((tmp_path / name / 'plain/result.json').read_text())['test'] for name in ('whole', 'a run')]
    assert results[0] == results[1]


def test_a_lost_summary_takes_no_result_with_it(run, train, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(train, 'draw_curves', draw_curves)
    assert run('--task', 'plain', '--dataset', folder, '--epochs', 1)[0] == 0
    header = 'epoch,train_loss,eval_loss,eval_top1,lr\n'
    for content in (None, '', header, f'{header}\0\0\0'):
        for lost in ('result.json', 'summary.csv', 'curves.png'):
            (tmp_path / 'run/plain' / lost).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / 'run/plain/summary.csv').write_text(content)
        said = []
        with monkeypatch.context() as printing:
            printing.setattr('builtins.print', lambda *text, said=said, **_: said.append(text))
            assert run('--resume', tmp_path / 'run')[0] == 0
        assert (tmp_path / 'run/plain/result.json').is_file()
        assert 'curves.png is not drawn: ' in str(said)


def test_two_processes_do_not_train_one_run(run, train, tmp_path, folder, monkeypatch):
    with monkeypatch.context() as stopping:
        stopping.setattr(train, 'asked_to_stop', lambda args, received: received.append(signal.SIGTERM) or True)
        assert run('--task', 'plain', '--dataset', folder, '--epochs', 1)[0] == 128 + signal.SIGTERM
    with train.lock_run(tmp_path / 'run'):
        status, _, err = run('--resume', tmp_path / 'run')
    assert (status, 'run: another process trains this run. Wait for it, or end it.' in err) == (2, True), err
    assert run('--resume', tmp_path / 'run')[0] == 0


def test_an_experiment_may_be_called_anything(run, train, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(train, 'draw_curves', draw_curves)
    status = run('--task', 'plain', '--dataset', folder, '--epochs', 1, name='a$_$ {b}')[0]
    assert (status, (tmp_path / 'a$_$ {b}/plain/curves.png').is_file()) == (0, True)


@pytest.mark.parametrize(('flags', 'message'), [
    (('--model-kwargs', 'foo=1'), "--model test_resnet cannot be built so: "),
    (('--model', 'emoreg_vit_tiny', '--img-size', 36, '--small-image', '--experience', 'none'),
     '. Change --img-size or give --no-small-image.'),
    (('--model-kwargs', 'output_stride=7', '--task', 'plain'), 'cannot be built so: AssertionError. Change'),
    (('--experience', 'emoreg_resnet18.emoji', '--task', 'plain'),
     'emoreg_resnet18.emoji: is of the backbone resnet18, and this run has test_resnet. Use the same --model'),
    (('--grad-accum-steps', 50, '-b', 64, '--task', 'plain'), '--grad-accum-steps 50: an epoch of '),
    (('-b', 4000), ' has 48 images to train on. Use at most as many.'),
    (('--device', 'meta'), '--device meta: torch cannot compute there ('),
    (('--device', 'abacus'), '--device abacus: torch cannot compute there ('),
    (('-b', 1, '--img-size', 8), '--batch-size: leaves one image a step, and batch norm of test_resnet has one value'),
])
def test_what_is_found_too_late_for_the_command_line_leaves_nothing(run, tmp_path, folder, flags, message):
    stimuli = () if '--experience' in flags else ('--stimuli', folder)
    status, _, err = run('--dataset', folder, *stimuli, *flags)
    assert status == 2
    assert err.startswith('train.py: ')
    assert message in err
    assert len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_missing_data_is_named_and_leaves_nothing(run, tmp_path):
    status, _, err = run('--dataset', 'oasis', '--data-dir', tmp_path / 'nothing', '--experience', 'none')
    assert status == 2
    assert '--data-dir' in err
    assert str(tmp_path / 'nothing') in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(('flags', 'message'), [
    (('--experience', 'emoreg_resnet18.joy'),
     '--experience emoreg_resnet18.joy: neither a file, nor a folder, nor a released weight'),
    (('--experience', 'emoreg_resnet18.emoji'), 'emoreg_resnet18.emoji: is of the backbone resnet18, and this run has'),
    (('--stimuli', 'cifar10'), 'cifar10: has no affective labels. It can be a classification target; stimuli are '),
    (('--stimuli', 'emoji+ferplus'), 'labels of different kinds (emoji: ratings; ferplus: class). Show together '),
    (('--stimuli-labels', 'majority'), "emoji: labels 'majority' is unknown"),
    (('-b', 4, '--grad-accum-steps', 8), '--batch-size 4: 1 processes with 8 accumulation steps each share it out.'),
    (('-b', 5, '--mixup', '0.2'),
     '--batch-size 5 gives 5 a process and accumulation step. Use a number that makes it even'),
    (('-b', 32, '--train-images', 30),
     '--batch-size 32: --train-images 30 is all that there is to train on. Use at most as many.'),
    (('--dataset', 'ferplus'), 'ferplus: has affective labels only. It can be stimuli; classification targets are '),
])
def test_what_needs_no_data_is_found_before_it_is_read(run, train, tmp_path, monkeypatch, flags, message):
    for name in ('load_stimuli', 'load_target'):
        monkeypatch.setattr(train, name, lambda *_, **__: pytest.fail('data was read'))
    status, _, err = run(*flags)
    assert (status, message in err) == (2, True), err
    assert os.listdir(tmp_path) == []


def test_a_batch_of_one_is_too_small_for_the_concordance(run, tmp_path):
    status, _, err = run('--task', 'affect', '--stimuli', 'emoji', '-b', 1)
    assert status == 2
    assert '1 - CCC needs 2 images or more a step, --batch-size 1 gives 1' in err


def test_stage_2_is_checked_before_stage_1_is_trained(run, tmp_path, folder):
    status, _, err = run('--dataset', folder, '--stimuli', 'emoji', '-b', 64)
    assert (status, ' has 48 images to train on. Use at most as many.' in err) == (2, True), err
    assert os.listdir(tmp_path) == []


def test_classes_whose_names_are_no_text(run, tmp_path, folder):
    data = shutil.copytree(folder, tmp_path / 'data')
    try:
        (data / 'blue').rename(data / os.fsdecode(b'bl\xe9u'))
    except OSError:
        pytest.skip('the file system takes no such names')
    assert run('--task', 'plain', '--dataset', data, '--epochs', 1)[0] == 0


def test_ratings_of_one_test_image_cannot_be_judged(run, tmp_path, folder):
    table = folder / 'few.csv'
    table.write_text('image,r\n' + ''.join(f'blue/{i}.png,{i}\n' for i in range(9)))
    try:
        status, _, err = run('--task', 'affect', '--stimuli', table, '--rating-columns', 'r', '--rating-scale', 0, 9)
    finally:
        table.unlink()
    assert status == 2
    assert re.match(r'train\.py: few: r is \d in all of the validation part \(1 image\), and CCC, by which ', err), err
    assert os.listdir(tmp_path) == []


def test_what_has_the_name_of_a_run_is_not_overwritten(run, tmp_path, folder):
    (tmp_path / 'run').mkdir()
    status, _, err = run('--task', 'plain', '--dataset', folder)
    assert (status, err) == (2, f'train.py: {tmp_path / "run"} exists and is no run of this script. Remove it, or '
                                'choose another --experiment.\n')
    assert os.listdir(tmp_path / 'run') == []
    (tmp_path / 'run/args.json').write_text('{}')
    status, _, err = run('--task', 'plain', '--dataset', folder)
    assert (status, err) == (2, f'train.py: {tmp_path / "run"} exists. Continue it with --resume {tmp_path / "run"}, '
                                'or choose another --experiment.\n')
    assert (tmp_path / 'run/args.json').read_text() == '{}'


def states(train, path: Path) -> dict:
    return train.load_training_checkpoint(path / 'model_best.pth.tar')['state_dict']


def test_the_plain_backbone_can_start_from_stage_1(run, train, tmp_path, folder):
    assert run('--task', 'plain', '--stimuli', folder, '--dataset', folder, '--epochs', 1, '--lr', 1e-12,
               '--affect-epochs', 1, '--opt', 'sgd', '--weight-decay', 0, name='init')[0] == 0
    stage_1, plain = states(train, tmp_path / 'init/affect'), states(train, tmp_path / 'init/plain')
    weights = [k for k in plain if f'backbone.{k}' in stage_1 and k.endswith('weight')]
    assert len(weights) > 10
    assert all(torch.allclose(plain[k], stage_1[f'backbone.{k}'], atol=1e-6) for k in weights)
    status, results, _ = run('--task', 'plain', '--experience', tmp_path / 'init', '--dataset', folder, '--epochs', 1)
    assert status == 0
    assert results[0]['experience'].endswith('model_best.pth.tar')


def test_stage_1_of_another_architecture_is_refused(run, tmp_path, folder):
    assert run('--task', 'affect', '--stimuli', folder, '--epochs', 1, name='stage1')[0] == 0
    again = ('--task', 'plain', '--experience', tmp_path / 'stage1', '--dataset', folder)
    status, _, err = run(*again, model='test_vit')
    assert (status, 'is of the backbone test_resnet, and this run has test_vit. Use the same' in err) == (2, True), err
    status, _, err = run(*again, '--model-kwargs', 'channels=[8,8,8,8]')
    assert (status, 'was trained with the --model-kwargs {}, and this run has {"channels": [8' in err) == (2, True), err
    status, _, err = run(*again, '--no-small-image')
    assert (status, 'was trained with --small-image, and this run has --no-small-image, ' in err) == (2, True), err


def test_stage_1_that_was_not_finished_is_said(run, tmp_path, folder, capsys, monkeypatch):
    assert run('--task', 'affect', '--stimuli', folder, '--epochs', 1, name='stage1')[0] == 0
    later = ('--task', 'plain', '--experience', tmp_path / 'stage1', '--dataset', folder, '--epochs', 1)
    said = []
    monkeypatch.setattr('builtins.print', lambda *text, **_: said.append(text))
    assert run(*later, name='a')[0] == 0
    assert 'not finished' not in str(said)
    (tmp_path / 'stage1/affect/result.json').unlink()
    assert run(*later, name='b')[0] == 0
    assert '; its training was not finished, this is epoch 1' in str(said)


def test_the_dual_head_without_stage_1(run, folder):
    status, results, _ = run('--experience', 'none', '--stimuli', folder, '--dataset', folder, '--epochs', 1)
    assert status == 0
    assert [(r['task'], r['experience']) for r in results] == [('emoreg', 'none')]


def test_only_the_stimuli_of_stage_1_can_be_rehearsed(run, tmp_path, folder):
    assert run('--task', 'affect', '--stimuli', folder, '--epochs', 1, name='stage1')[0] == 0
    flags = ('--experience', tmp_path / 'stage1', '--rehearsal', 1, '--dataset', folder, '--epochs', 1)
    status, _, err = run('--stimuli', 'emoji', *flags)
    assert status == 2
    assert f'{tmp_path / "stage1/affect/model_best.pth.tar"} answers with blue, green, red, ' in err
    assert 'and the labels of emoji are valence. Rehearse the stimuli of stage 1, with' in err
    assert not (tmp_path / 'run').exists()
    status, results, _ = run('--stimuli', folder, *flags)
    assert (status, len(results)) == (0, 1)
    assert float(rows(tmp_path / 'run/emoreg/summary.csv')[0]['train_loss_rehearsal']) > 0


@pytest.mark.parametrize(('flags', 'name'), [
    (('--shuffle-stimuli-labels',), 'colours (shuffled labels)'),
    (('--stimuli-labels', 'rotation'), 'colours (rotations)'),
])
def test_controls_of_stage_1(run, tmp_path, folder, flags, name):
    status, results, _ = run('--task', 'affect', '--stimuli', folder, '--epochs', 1, *flags)
    assert status == 0
    assert results[0]['data'].endswith(name.replace('colours', folder.name))


def test_part_of_the_training_set_and_rare_validation(run, tmp_path, folder):
    status, results, _ = run('--task', 'plain', '--dataset', folder, '--train-images', 20, '-b', 8, '--epochs', 5,
                             '--val-interval', 2)
    assert status == 0
    assert results[0]['train_images'] == 20
    assert 'attention' not in results[0]  # of a net without
    files = tmp_path / 'run/plain'
    summary = rows(files / 'summary.csv')
    assert [row['epoch'] for row in summary if row['eval_top1']] == ['1', '3', '4']
    assert all(float(row['train_loss']) > 0 and float(row['lr']) > 0 for row in summary)
    assert len(summary) == 5
    predictions = rows(files / 'predictions.csv')
    right = sum(row['target'] == row['prediction'] for row in predictions)
    assert 100 * right / len(predictions) == pytest.approx(results[0]['test']['top1'], abs=1e-3)


def test_predictions_are_those_that_were_counted(train):
    """Of logits of 16 bits the best ones are often equal, and argmax does not take the one that top-1 counts."""
    logits = torch.randn(512, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = logits.float().topk(5).indices[:, 0]
    assert (target != logits.argmax(1)).any()
    loader = type('Loader', (list,), {'batch_size': 512})([(logits, target)])
    args, predictions = argparse.Namespace(torchcompile=False, distributed=False), []
    metrics = train.evaluate(train.ClassificationTask(torch.nn.Identity()), loader, contextlib.nullcontext, args,
                             predictions)
    assert metrics['top1'] == 100
    assert all(right == predicted for right, predicted in predictions)


def test_the_validation_part_chooses_the_epoch_and_the_test_part_is_seen_once(run, train, tmp_path, folder,
                                                                              monkeypatch):
    parts, evaluate, seen, told = load_target(str(folder)), train.evaluate, [], [50.0, 90.0, 70.0, 60.0]

    def judge(task, loader, *args):
        part = [name for name in ('train', 'validation', 'test')
                if torch.equal(loader.pixels.permute(0, 3, 1, 2), getattr(parts, name).pixels((32, 32)))]
        seen.append((part, {k: v.clone() for k, v in task.get_eval_model().state_dict().items()}))
        return {**evaluate(task, loader, *args), 'top1': told[len(seen) - 1]}

    monkeypatch.setattr(train, 'evaluate', judge)
    status, (result,), _ = run('--task', 'plain', '--dataset', folder, '--epochs', 3)
    assert status == 0
    assert [part for part, _ in seen] == [['validation']] * 3 + [['test']]
    assert (result['best_epoch'], result['validation'], result['test']['top1']) == (2, 90.0, 60.0)
    best, last, shown = (state for _, state in seen[1:])
    assert all(torch.equal(shown[k], v) for k, v in best.items())
    assert any(not torch.equal(shown[k], v) for k, v in last.items())


def test_steps_that_share_a_batch_train_as_the_whole_one(run, tmp_path, folder):
    flags = ('--task', 'plain', '--dataset', folder, '--epochs', 2, '--no-aug', '--opt', 'sgd')
    found = []
    for steps in (1, 2):  # of a net without batch norm
        assert run(*flags, '--grad-accum-steps', steps, name=str(steps), model='test_vit')[0] == 0
        found.append([[float(row[k]) for k in ('train_loss', 'eval_loss', 'lr')]
                      for row in rows(tmp_path / str(steps) / 'plain/summary.csv')])
    assert found[0][0] != pytest.approx(found[0][1], rel=1e-3)
    for one, two in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_no_two_steps_draw_the_same(run, train, folder, monkeypatch):
    plain, seeds, epochs, choose = train.random_seed, [], [], EpochLoader.set_epoch
    monkeypatch.setattr(train, 'random_seed', lambda seed, *rank: seeds.append(seed) or plain(seed, *rank))
    monkeypatch.setattr(EpochLoader, 'set_epoch', lambda self, epoch, first_batch=0: epochs.append(epoch) or choose(
        self, epoch, first_batch))
    assert run('--task', 'plain', '--dataset', folder, '--epochs', 3, '--seed', 7)[0] == 0
    assert len(seeds) == len(set(seeds)) == 1 + 3 * 6
    assert seeds[0] == 7  # of the initial weights
    assert epochs == [0, 1, 2]  # of which order, crops and flips are drawn


def test_averaged_weights_follow_by_the_decay_that_was_asked_for(run, train, tmp_path, folder):
    flags = ('--task', 'plain', '--dataset', folder, '--epochs', 1, '--model-ema', '--model-ema-decay', 0)
    assert run(*flags)[0] == 0  # at 0 they are those of the moment
    state = train.load_training_checkpoint(tmp_path / 'run/plain/last.pth.tar')
    weights = [k for k in state['state_dict'] if k.endswith('weight')]
    assert len(weights) > 10
    assert all(torch.allclose(state['state_dict_ema'][k], state['state_dict'][k], atol=1e-6) for k in weights)


def test_what_the_images_are_shown_with(run, folder, watched):
    loaders, mixups, clips = watched('make_loader'), watched('Mixup'), watched('dispatch_clip_grad')
    shrunk = watched('ProgressiveLoader')
    flags = ('--stimuli', folder, '--dataset', folder, '--epochs', 1, '--hflip', 'alternate', '--seed', 7)
    assert run(*flags, '--stimuli-labels', 'rotation', '--cutout', 5, '--mixup', 0.5, '--cutmix', 0.25, '--smoothing',
               0.3, '--start-img-size', 16, '--clip-grad', 0.7, '--clip-mode', 'value')[0] == 0
    assert [call['training'] for call in loaders] == [True, False, False] * 2
    # a mirrored picture on its side looks like one that lies on the other
    assert [call['flip'] for call in loaders] == ['none'] * 3 + ['alternate'] * 3
    assert all((call['cutout'], call['seed'], call['augment']) == (5, 7, True) for call in loaders)
    assert [list(call.values())[1:] for call in shrunk] == [[16, 1]] * 2
    mixup, = mixups  # none in stage 1
    assert (mixup['mixup_alpha'], mixup['cutmix_alpha'], mixup['label_smoothing'], mixup['num_classes']) == (
        0.5, 0.25, 0.3, 3)
    assert {(call['value'], call['mode']) for call in clips} == {(0.7, 'value')}
    loaders.clear()
    assert run('--task', 'plain', '--dataset', folder, '--epochs', 1, '--no-aug', name='plain')[0] == 0
    assert [call['augment'] for call in loaders] == [False] * 3


def test_stage_1_has_epochs_of_its_own(run, folder):
    _, results, _ = run('--stimuli', folder, '--dataset', folder, '--epochs', 1, '--affect-epochs', 2)
    assert [result['epochs'] for result in results] == [2, 1]


def test_stage_2_of_a_registered_model_starts_from_the_released_stage_1(run, train, folder, monkeypatch):
    started = []
    monkeypatch.setattr(train, 'run_stage', lambda args, task, splits, device, experience=None, stimuli=None:
                        started.append((task, experience and experience.source)) or {})
    assert run('--dataset', folder, model='emoreg_resnet18')[0] == 0
    assert started == [('emoreg', 'emoreg_resnet18.emoji')]


def test_a_run_goes_on_under_the_launcher_that_started_it(train, monkeypatch):
    args = argparse.Namespace(distributed=True, world_size=4, output='out', experiment='a b', device='cuda:0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.delenv('SLURM_PROCID', raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert train.resume_command(args) == "torchrun --nproc-per-node 2 train.py --resume 'out/a b'"
    monkeypatch.setenv('SLURM_PROCID', '0')
    assert train.resume_command(args) == "srun python train.py --resume 'out/a b'"
    args.distributed, args.device = False, 'cuda'
    assert train.resume_command(args) == "python train.py --resume 'out/a b'"


@pytest.mark.parametrize(('gpu', 'distributed', 'device', 'told'), [
    (True, False, 'cuda:1', ' --device cuda:1'), (True, False, 'cpu', ' --device cpu'),
    (True, True, 'cpu', ' --device cpu'), (False, False, 'cpu', '')])
def test_a_run_goes_on_where_it_was(train, monkeypatch, gpu, distributed, device, told):
    """A device that would not be taken by itself is named."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.delenv('SLURM_PROCID', raising=False)
    args = argparse.Namespace(distributed=distributed, world_size=2, output='out', experiment='run', device=device)
    assert train.resume_command(args).partition('out/run')[2] == told
