from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import loopback_hub
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

import timm_emoreg
from timm_emoreg import emoreg_resnet, emoreg_vit, weights, zoo
from timm_emoreg.data import load_target
from timm_emoreg.data.loader import make_loader
from timm_emoreg.emoreg import EmoReg
from timm_emoreg.files import sha256_of
from timm_emoreg.hub import release
from timm_emoreg.hub.card_lint import run_snippets
from timm_emoreg.hub.command import check, main, publish
from timm_emoreg.hub.finished_runs import ROOT, HubError, Run, check_same_recipe
from timm_emoreg.hub.release import build
from timm_emoreg.zoo import HUB_FILE, read_records, write_records

NAME = 'emoreg_resnet18.emoji'
STAGE_2 = 'emoreg_resnet18.emoji_ft_emoji'
COMMIT = 'a' * 40
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

spec = importlib.util.spec_from_file_location('emoreg_train', ROOT / 'train.py')
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)


def settings(*command):
    return vars(train.parse_args(list(command)))


@pytest.fixture
def tiny(monkeypatch):
    """Two architectures of this package around timm's smallest backbones."""
    for backbones in (emoreg_resnet.BACKBONES, timm_emoreg.BACKBONES):
        monkeypatch.setitem(backbones, 'emoreg_resnet18', 'test_resnet')
    for backbones in (emoreg_vit.BACKBONES, timm_emoreg.BACKBONES):
        monkeypatch.setitem(backbones, 'emoreg_vit_tiny', 'test_vit')


@pytest.fixture
def home(tmp_path):
    """A checkout as far as the command needs one."""
    folder = tmp_path / 'home'
    (folder / 'timm_emoreg' / 'assets' / 'weights').mkdir(parents=True)
    (folder / 'timm_emoreg' / 'assets' / 'weights.json').write_text('[]')
    (folder / 'train.py').touch()
    return folder


@pytest.fixture
def run(tmp_path, tiny):
    """Writes what train.py leaves of a stage, with a model that was never trained."""
    def write(task='affect', seed=0, validation=0.5, test=0.4, model='emoreg_resnet18', more=(),
              change=lambda state: None, experience=None, folder=None, names=('valence',), kind='ratings', noted=(),
              recipe=None):
        folder = folder or tmp_path / f'{task}-{model}-{seed}'
        command = ['--model', model, '--task', task, '--seed', str(seed), '--output', str(tmp_path), *more]
        command += ['--experience', str(experience)] if experience else []
        if task != 'affect':
            command += ['--dataset', 'emoji']
        args = settings(*command)
        out = folder / task
        out.mkdir(parents=True)
        (folder / 'args.json').write_text(json.dumps({**args, **dict(noted)}))
        metric = 'top1' if task != 'affect' else 'ccc'
        (out / 'result.json').write_text(json.dumps({
            'task': task, 'model': model, 'form': 'small', 'img_size': 32, 'data': 'emoji', 'metric': metric,
            'validation': validation, 'seed': seed, 'seconds': 2.0, 'experience': experience and str(experience),
            'test': {'loss': 1.0, metric: test, f'{metric}_valence': test, 'rmse': 0.7},
            **({'recipe': recipe, 'loader': 'resident', 'precision': 'float32'} if recipe else {})}))
        if task != 'plain':
            torch.manual_seed(seed)
            net = EmoReg(timm_emoreg.BACKBONES[model], num_classes=0 if task == 'affect' else 9, num_affect=len(names),
                         affect_kind='ratings' if kind == 'ratings' else 'emotion', small_image=True, img_size=32)
            state = net.state_dict()
            change(state)
            torch.save({'state_dict': state, 'epoch': 0,
                        'task_state': {'target_kind': kind, 'names': list(names)} if task == 'affect' else {}},
                       out / 'model_best.pth.tar')
        return out / 'result.json'
    return write


@pytest.fixture
def built(run, home):
    """A good, waiting weight in a home of its own."""
    return build(NAME, [run()], home=home, commit=COMMIT)


def alter(home, **changes):
    path = home / 'timm_emoreg' / 'assets' / 'weights.json'
    records = read_records(path)
    write_records({**records, NAME: replace(records[NAME], **changes)}, path)


# -- build -------------------------------------------------------------------------------------------------------------


def test_build_releases_the_best_of_the_seeds(run, home):
    results = [run(seed=3, validation=0.5, test=0.60), run(seed=4, validation=0.7, test=0.40).parent]
    weight = build(NAME, results, home=home, commit=COMMIT)
    assert weight.seeds == (4, 3)
    assert weight.metrics['ccc'] == {'weight': 0.4, 'n': 2, 'mean': 0.5, 'sd': 0.1414}
    assert set(weight.metrics) == {'ccc', 'rmse'}  # the only dimension is not told twice
    assert weight.baseline == {}
    assert (weight.licence, weight.stimuli_labels, weight.commit) == ('cc-by-sa-4.0', 'valence', COMMIT)
    assert weight.logit_difference > 0
    assert read_records(home / 'timm_emoreg/assets/weights.json') == {NAME: weight}
    folder = home / 'hub_cards' / NAME
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', HUB_FILE]
    assert sorted(p.name for p in home.iterdir()) == ['hub_cards', 'timm_emoreg', 'train.py']
    state = torch.load(results[1] / 'model_best.pth.tar')['state_dict']
    loaded = load_file(folder / HUB_FILE)
    assert all(torch.equal(loaded[k], t.half() if t.is_floating_point() else t) for k, t in state.items())
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    net = EmoReg('test_resnet', num_classes=0, num_affect=1, affect_kind='ratings', small_image=True, img_size=32)
    net.eval().load_state_dict(loaded)
    with torch.no_grad():
        assert torch.equal(model.forward_affect(X), net.forward_affect(X))
    assert check(NAME, home) == []


def test_build_into_the_package_and_back(run, home):
    embedded = build(NAME, [run()], home=home, embed=True, default=True, commit=COMMIT)
    assert [p.name for p in (home / 'timm_emoreg/assets/weights').iterdir()] == [f'{NAME}.safetensors']
    assert (home / 'timm_emoreg/assets/weights' / f'{NAME}.safetensors').stat().st_mode & 0o777 == 0o644
    assert sorted(p.name for p in (home / 'hub_cards' / NAME).iterdir()) == ['README.md', 'config.json']
    assert check(NAME, home, run=False) == []
    waiting = build(NAME, [run(folder=home.parent / 'again')], home=home, commit=COMMIT)
    assert waiting.sha256 == embedded.sha256  # equal runs give equal bytes
    assert not list((home / 'timm_emoreg/assets/weights').iterdir())
    assert (home / 'hub_cards' / NAME / HUB_FILE).exists()


@pytest.mark.parametrize('written', ['make_card', 'write_records'])
def test_a_build_that_cannot_be_written_leaves_the_weight_as_it_was(run, home, monkeypatch, written):
    build(NAME, [run()], home=home, embed=True, default=True, commit=COMMIT)
    monkeypatch.setattr(release, written, mock.Mock(side_effect=OSError(28, 'No space left on device')))
    with pytest.raises(OSError, match='No space left'):
        build(NAME, [run(seed=1)], home=home, commit=COMMIT)
    assert check(NAME, home, run=False) == []
    assert read_records(home / 'timm_emoreg/assets/weights.json')[NAME].embedded
    assert not list(home.rglob('*.part'))


def test_build_of_stage_2_with_its_baseline(run, home):
    stage_1 = run()
    build(NAME, [stage_1], home=home, commit=COMMIT)
    results = [run('emoreg', seed=s, test=60 + s, experience=stage_1.parent, more=['--balance', '0.3']) for s in (0, 1)]
    plain = [run('plain', seed=s, test=50 + s) for s in (0, 1, 2)]
    weight = build('emoreg_resnet18.emoji_ft_emoji', results, plain, home=home, commit=COMMIT)
    assert weight.base == NAME
    assert weight.model_args['balance'] == 0.3
    assert weight.baseline['top1'] == {'weight': 50, 'n': 3, 'mean': 51, 'sd': 1.0}
    assert weight.label_names[0] == 'Smileys & Emotion'
    assert weight.affect_names == ('valence',)
    assert check(weight.name, home) == []
    card = (home / 'hub_cards' / weight.name / 'README.md').read_text()
    assert '| accuracy | 60.0 % | 60.5 ± 0.7 % (n = 2) | 51.0 ± 1.0 % (n = 3) |' in card


def test_build_in_8_bits_measures_what_they_cost(run, stage_2, home, capsys):
    result = stage_2()
    command = ['build', STAGE_2, str(result), '--home', str(home), '--commit', COMMIT]
    assert main(command) == 0
    sixteen = capsys.readouterr().out
    assert main([*command, '--eight-bits']) == 0
    eight = capsys.readouterr().out
    weight = read_records(home / 'timm_emoreg/assets/weights.json')[STAGE_2]
    file = home / 'hub_cards' / STAGE_2 / HUB_FILE
    assert 'float16 moves an output by at most' in sixteen
    assert 'int8 moves an output by at most' in eight
    assert 'as the file has it' in eight
    assert 'as the file has it' not in sixteen
    assert weight.precision == 'int8'
    state = torch.load(result.with_name('model_best.pth.tar'))['state_dict']
    matrices = sum(t.numel() for name, t in state.items() if t.ndim > 1)
    assert weight.size == file.stat().st_size < matrices * 1.6  # 2 in 16 bits, the rest of so small a net is much
    # the cost, by the models that timm builds of the file and of the checkpoint
    test = load_target('emoji').test
    images = [timm.create_model(f'local-dir:{file.parent}', pretrained=True), EmoReg(
        'test_resnet', num_classes=9, num_affect=1, affect_kind='ratings', small_image=True, img_size=32)]
    images[1].load_state_dict(state)
    loader = make_loader(test, (32, 32), 64, resolve_model_data_config(images[0]))
    with torch.no_grad():
        given = [torch.cat([model.eval()(x).argmax(dim=1) for x, _ in loader]) for model in images]
    accuracy = [round(100 * (answers == test.targets).double().mean().item(), 2) for answers in given]
    assert weight.eight_bits == {'images': len(test), 'float32': accuracy[1], 'int8': accuracy[0],
                                 'changed': int((given[0] != given[1]).sum())}
    assert check(STAGE_2, home) == []
    card = (file.parent / 'README.md').read_text()
    assert (f'answers {accuracy[1]:.2f} % of the {len(test):,} test images correctly before it was rounded to 8 bits '
            f'and {accuracy[0]:.2f} % as the file has it') in card
    assert 'the test part was looked at once, and again for what the 8 bits cost' in card
    assert 'safetensors, int8 with a scale per output channel: moves outputs' in card


def test_stage_1_stays_in_16_bits(run, home):
    with pytest.raises(HubError, match=r'emoreg_resnet18.emoji: is of stage 1, which stays in 16 bits.*--eight-bits'):
        build(NAME, [run()], home=home, precision='int8')


def test_one_default_an_architecture(run, home, make_record):
    other = make_record(architecture='emoreg_vit_tiny', default=True)
    write_records({other.name: other}, home / 'timm_emoreg/assets/weights.json')
    stage_1 = run()
    build(NAME, [stage_1], home=home, default=True, commit=COMMIT)
    stage_2 = run('emoreg', experience=stage_1.parent)
    build('emoreg_resnet18.emoji_ft_emoji', [stage_2], home=home, default=True, commit=COMMIT)
    assert {n: w.default for n, w in read_records(home / 'timm_emoreg/assets/weights.json').items()} == {
        NAME: False, 'emoreg_resnet18.emoji_ft_emoji': True, other.name: True}


def test_build_of_a_fixed_size_backbone(run, home):
    weight = build('emoreg_vit_tiny.emoji', [run(model='emoreg_vit_tiny')], home=home, commit=COMMIT)
    assert weight.model_args['img_size'] == 32
    assert check(weight.name, home) == []


def test_what_is_dropped_in_training_is_no_form_of_the_weight(run, home):
    kwargs = ['--model-kwargs', 'patch_drop_rate=0.5', 'attn_drop_rate=0.1', 'mlp_ratio=3']
    weight = build('emoreg_vit_tiny.emoji', [run(model='emoreg_vit_tiny', more=kwargs)], home=home, commit=COMMIT)
    assert weight.model_args['mlp_ratio'] == 3
    assert not {'patch_drop_rate', 'attn_drop_rate'} & weight.model_args.keys()
    assert ' '.join(kwargs) in weight.recipe


def test_recipe_gives_the_settings_again(run, home):
    more = ['--epochs', '7', '--no-amp', '--model-ema', '--stimuli', 'emoji', '--lr', '0.02', '--hflip', 'none']
    result = run(seed=9, more=more)
    weight = build(NAME, [result], home=home, commit=COMMIT)
    command = shlex.split(weight.recipe)
    assert command[:2] == ['python', 'train.py']
    again, args = settings(*command[2:]), json.loads((result.parents[1] / 'args.json').read_text())
    different = {k for k in again if again[k] != args[k]}
    assert different <= {'output', 'experiment', 'data_dir', 'dataset'}
    assert weight.recipe.endswith('--seed 9')
    assert str(home.parent) not in weight.recipe


def nan(state):
    state['head_affect.bias'][0] = float('nan')


def unregistered(result):
    result.write_text(json.dumps({**json.loads(result.read_text()), 'model': 'resnet10t'}))
    return result


def huge(state):
    state['head_affect.weight'][0] = 1e6


@pytest.mark.parametrize(('runs', 'words'), [
    (lambda run: [run(seed=1), run(seed=2, more=['--epochs', '3'])], 'another recipe .*epochs'),
    (lambda run: [run(seed=1), run(seed=1, folder=run().parents[2] / 'twice')], 'the same seed'),
    (lambda run: [run(model='emoreg_vit_tiny')], 'the runs are of emoreg_vit_tiny.emoji'),
    (lambda run: [run('plain')], 'a plain backbone'),
    (lambda run: [unregistered(run())], 'resnet10t is no registered architecture .*, such as emoreg_resnet18.'),
    (lambda run: [run(change=nan)], 'head_affect.bias is not finite in float16'),
    (lambda run: [run(change=huge)], r'head_affect.weight is not finite in float16 .*1e\+06'),
    (lambda run: [run(more=['--stimuli', '/my/faces'])], 'are your own, .* For a weight of yours see'),
    (lambda run: [run().parent / 'nothing.json'], 'no result of a run'),
    (lambda run: [run().with_name('model_best.pth.tar')], 'no result of a run'),
])
def test_build_refuses_what_cannot_be_released(run, home, runs, words):
    with pytest.raises(HubError, match=words):
        build(NAME, runs(run), home=home, commit=COMMIT)
    assert read_records(home / 'timm_emoreg/assets/weights.json') == {}
    assert not (home / 'hub_cards').exists()


@pytest.fixture
def stage_2(run, built):
    """Writes a run of stage 2 that started from the released stage 1."""
    return lambda **changes: run('emoreg', **{'experience': NAME, **changes})


@pytest.mark.parametrize(('other', 'words'), [
    ({'model': 'emoreg_vit_tiny'}, 'is not the plain baseline of emoreg_resnet18 on emoji: it is plain of '
                                   r'emoreg_vit_tiny on emoji\. Give runs of --task plain'),
    ({'task': 'affect', 'seed': 1}, r'it is affect of emoreg_resnet18 on emoji\. Give runs of --task plain'),
    ({'experience': NAME}, f'is not the plain baseline: it started from the experience {NAME}\\. '
                           'Train it without --experience and --stimuli'),
    ({'more': ['--epochs', '3', '--lr', '0.1']},
     r"plain-.* is not the plain baseline of the same recipe as .*emoreg-.*: epochs 3 \(there 8\), lr 0\.1 "
     r"\(there None\)\. Train the plain backbone with the weight's flags"),
    ({'noted': {'start_img_size': 16}}, r'start_img_size 16 \(there None\)'),
])
def test_build_refuses_another_baseline(run, stage_2, home, other, words):
    result = stage_2()
    args = result.parents[1] / 'args.json'
    older = json.loads(args.read_text())
    del older['start_img_size']  # as written by a train.py that had no such flag
    args.write_text(json.dumps(older))
    with pytest.raises(HubError, match=words):
        build(STAGE_2, [result], [run(**{'task': 'plain', **other})], home=home)


def test_a_baseline_may_differ_in_what_it_does_not_have(run, stage_2, home):
    more = ['--balance', '0.3', '--balanced-in', 'loss', '--keep-affect', '0.1', '--lr', '0.02', '--rehearsal',
            '0.2', '--stimuli', 'emoji', '--stimuli-labels', 'valence', '--affect-lr-scale', '0.5']
    noted = {'affect_epochs': 3, 'commit': COMMIT}
    plain = run('plain', more=['--lr', '0.02'], noted={'commit': 'c' * 40})
    args = json.loads((plain.parents[1] / 'args.json').read_text())
    args |= {'modulation': False, 'separate_experience': True}  # as a train.py before let it be
    del args['rehearsal'], args['affect_lr_scale']
    (plain.parents[1] / 'args.json').write_text(json.dumps(args))
    weight = build(STAGE_2, [stage_2(more=more, noted=noted)], [plain], home=home)
    assert weight.baseline['top1']['n'] == 1


def test_a_default_may_be_spelled_out(run, stage_2, home):
    recipe = {'batch_size': 64, 'opt': 'muon', 'lr': 0.02, 'weight_decay': 0.01, 'opt_kwargs': {'ns_steps': 3}}
    plain = run('plain', more=['-b', '64', '--opt', 'muon', '--lr', '0.02'], recipe=recipe)
    assert build(STAGE_2, [stage_2(recipe=recipe)], [plain], home=home).baseline['top1']['n'] == 1
    older = run('plain', seed=5)  # by a train.py that did not note what the settings came to
    assert build(STAGE_2, [stage_2(seed=6, recipe=recipe)], [older], home=home).baseline['top1']['n'] == 1
    with pytest.raises(HubError, match=r'lr 0\.02 \(there 0\.03\)\. Train the plain backbone'):
        build(STAGE_2, [stage_2(seed=1, recipe={**recipe, 'lr': 0.03})], [plain], home=home)


def test_before_there_was_a_choice_of_attention_it_was_the_fused_one(run):
    older, fused, plain = (run('plain', seed=seed, recipe={'opt': 'muon'}) for seed in range(3))
    for path, attention in ((fused, 'fused'), (plain, 'plain')):
        path.write_text(json.dumps({**json.loads(path.read_text()), 'attention': attention}))
    check_same_recipe([Run(older), Run(fused)])
    with pytest.raises(HubError, match=r"attention 'plain' \(there 'fused'\)\. Only seeds may differ"):
        check_same_recipe([Run(older), Run(plain)])


def test_the_averaged_weights_are_released_where_there_are_some(run, home):
    result = run()
    checkpoint = result.with_name('model_best.pth.tar')
    state = torch.load(checkpoint)
    averaged = {k: v + 1 if v.is_floating_point() else v for k, v in state['state_dict'].items()}
    torch.save({**state, 'state_dict_ema': averaged}, checkpoint)
    build(NAME, [result], home=home, commit=COMMIT)
    loaded = load_file(home / 'hub_cards' / NAME / HUB_FILE)
    assert all(torch.equal(loaded[k], v.half() if v.is_floating_point() else v) for k, v in averaged.items())


def test_a_part_of_the_training_images_is_another_recipe(run, stage_2, home):
    part = ['--train-images', '100']
    with pytest.raises(HubError, match=r'another recipe .*: train_images 100 \(there None\)\. Only seeds may differ'):
        build(STAGE_2, [stage_2(), stage_2(seed=1, more=part)], home=home)
    with pytest.raises(HubError, match=r'not the plain baseline of the same recipe .*: train_images 100 \(there None'):
        build(STAGE_2, [stage_2(seed=2)], [run('plain', more=part)], home=home)


def test_the_released_run_says_its_commit(run, home):
    first, best = ({'commit': letter * 40} for letter in 'cd')
    results = [run(seed=1, validation=0.5, noted=first), run(seed=2, validation=0.6, noted=best)]
    assert build(NAME, results, home=home).commit == 'd' * 40
    assert build(NAME, results, home=home, commit=COMMIT).commit == COMMIT
    assert build(NAME, [run(seed=3)], home=home).commit == 'unknown'  # this home is no checkout


# -- stage 1 of a stage 2 ----------------------------------------------------------------------------------------------


def test_stage_2_from_a_tag_is_what_its_record_says(stage_2, home):
    weight = build(STAGE_2, [stage_2()], home=home, commit=COMMIT)
    assert (weight.base, weight.stimuli_labels, weight.affect_names) == (NAME, 'valence', ('valence',))
    assert f'--experience {NAME} ' in weight.recipe


def test_stage_2_from_a_path_needs_the_released_weights(run, stage_2, built, home, tmp_path):
    same = run(folder=tmp_path / 'same').parent
    assert build(STAGE_2, [stage_2(experience=same)], home=home, commit=COMMIT).base == NAME
    other = run(seed=7, folder=tmp_path / 'other').parent
    result = stage_2(experience=other, folder=tmp_path / 'from-other')
    words = (f'{result}: its experience {other} is not the released {NAME}, which its card would name. Release its '
             f'stage 1 first: build {NAME} from that run, or train with --experience {NAME}.')
    with pytest.raises(HubError, match=re.escape(words)):
        build(STAGE_2, [result], home=home, commit=COMMIT)
    with pytest.raises(HubError, match='is not the released'):
        build(STAGE_2, [stage_2(folder=tmp_path / 'tag')], home=home, commit=COMMIT, experience=str(other))
    assert build(STAGE_2, [result], home=home, commit=COMMIT, experience=str(same)).base == NAME
    build(NAME, [other], home=home, commit=COMMIT)
    assert build(STAGE_2, [result], home=home, commit=COMMIT).base == NAME


def test_stage_2_on_pictures_of_ones_own(stage_2, home):
    with pytest.raises(HubError, match=r"its target '/my/pictures' is your own, .* For a weight of yours see timm"):
        build(STAGE_2, [stage_2(noted={'dataset': '/my/pictures'})], home=home, commit=COMMIT)


def test_stage_2_before_its_stage_1(run, home):
    with pytest.raises(HubError, match=f'is not the released {NAME}, .* Release its stage 1 first'):
        build(STAGE_2, [run('emoreg', experience=run().parent)], home=home, commit=COMMIT)


@pytest.mark.parametrize('damage', [lambda file: file.unlink(), lambda file: file.write_bytes(b'')])
def test_stage_1_that_is_only_on_the_hub(hub, run, stage_2, built, home, tmp_path, monkeypatch, damage):
    monkeypatch.setitem(zoo.WEIGHTS, NAME, publish(NAME, home, push=True, token=loopback_hub.TOKEN))
    damage(home / 'hub_cards' / NAME / HUB_FILE)
    result = stage_2(experience=run(folder=tmp_path / 'same').parent)
    assert build(STAGE_2, [result], home=home, commit=COMMIT).base == NAME
    result = stage_2(experience=run(seed=7).parent, folder=tmp_path / 'from-other')
    with pytest.raises(HubError, match='is not the released'):
        build(STAGE_2, [result], home=home, commit=COMMIT)


def test_stage_2_of_lost_or_no_stage_1(run, stage_2, home, tmp_path):
    stage_1 = run(seed=7).parent
    result = stage_2(experience=stage_1)
    shutil.move(stage_1.parent, tmp_path / 'moved')
    with pytest.raises(HubError, match=rf'{stage_1} is neither in .*weights\.json nor a file or folder here\. Say '
                                       'with --experience where it lies now'):
        build(STAGE_2, [result], home=home)
    build(NAME, [tmp_path / 'moved' / 'affect'], home=home, commit=COMMIT)
    assert build(STAGE_2, [result], home=home, commit=COMMIT, experience=str(tmp_path / 'moved')).base == NAME
    with pytest.raises(HubError, match=r'was trained with --experience none, so it is a control .* Train it from a '
                                       'released stage 1'):
        build(STAGE_2, [stage_2(experience='none', folder=tmp_path / 'none')], home=home)
    build(STAGE_2, [result], home=home, commit=COMMIT, experience=NAME)
    (tmp_path / 'moved/args.json').unlink()
    with pytest.raises(HubError, match=r'no args\.json one folder up tells what stage 1 showed \(.*\)\. Bring it back'):
        build(STAGE_2, [result], home=home, experience=str(tmp_path / 'moved'))
    with pytest.raises(HubError, match=f'its experience {STAGE_2} is not the released {NAME}'):
        build(STAGE_2, [stage_2(experience=STAGE_2, folder=tmp_path / 'of-stage-2')], home=home)


def test_seeds_of_one_stage_2_have_one_stage_1(run, stage_2, home, tmp_path):
    other = run(seed=7, folder=tmp_path / 'other').parent
    with pytest.raises(HubError, match=rf"another recipe .*: experience '{other}' \(there '{NAME}'\)\. Only seeds"):
        build(STAGE_2, [stage_2(validation=0.9), stage_2(seed=1, experience=other)], home=home)


@pytest.mark.parametrize(('more', 'words'), [
    (['--shuffle-stimuli-labels'], 'had shuffled labels, so it is a control of the study and no weight to release. '
                                   'Train on affective labels: leave --shuffle-stimuli-labels out.'),
    (['--stimuli-labels', 'rotation'], "had the labels 'rotation', so it is a control of the study and no weight to "
                                       'release. Train on affective labels: leave --stimuli-labels out.'),
    (['--stimuli-labels', 'group'], "had the labels 'group', so it is a control"),
    (['--stimuli', 'oasis', '--stimuli-labels', 'category'], "had the labels 'category', so it is a control"),
    (['--stimuli', 'nemo', '--stimuli-labels', 'speaker'], "had the labels 'speaker', so it is a control"),
])
def test_controls_are_not_released(run, built, home, tmp_path, more, words):
    stage_1 = run(more=more, folder=tmp_path / 'control')
    noted = {key: settings(*more)[key] for key in ('stimuli', 'stimuli_labels', 'shuffle_stimuli_labels')}
    beside = run('emoreg', experience=stage_1.parent, noted=noted)  # as train.py leaves both stages
    after = run('emoreg', experience=stage_1.parent, folder=tmp_path / 'after')
    for name, result, where in ((NAME, stage_1, stage_1), (STAGE_2, beside, beside),
                                (STAGE_2, after, stage_1.with_name('model_best.pth.tar'))):
        with pytest.raises(HubError, match=re.escape(f'{where}: its stage 1 {words}')):
            build(name, [result], home=home)


def test_rehearsal_is_in_the_recipe(stage_2, home, tmp_path):
    more = ['--rehearsal', '0.5', '--stimuli', 'emoji', '--stimuli-labels', 'valence']
    result = stage_2(more=more)
    weight = build(STAGE_2, [result], home=home, commit=COMMIT)
    again, args = (settings(*shlex.split(weight.recipe)[2:]), json.loads((result.parents[1] / 'args.json').read_text()))
    assert {k for k in again if again[k] != args[k]} <= {'output', 'experiment'}
    more[3] = 'oasis'
    with pytest.raises(HubError, match=r"rehearsed the stimuli 'oasis', and its stage 1 showed 'emoji'; its card would "
                                       r'name these only\. Train with --stimuli emoji'):
        build(STAGE_2, [stage_2(more=more, folder=tmp_path / 'oasis')], home=home)


def test_recipe_of_stage_1_of_a_run_of_both(run, home):
    more = ['--rehearsal', '0.5', '--stimuli', 'emoji', '--keep-affect', '0.1', '--affect-lr-scale', '0.1']
    result = run(noted={**settings(*more), 'task': 'emoreg'})
    recipe = build(NAME, [result], home=home, commit=COMMIT).recipe
    assert recipe == 'python train.py --model emoreg_resnet18 --task affect --stimuli emoji --seed 0'


def test_recipe_of_stage_2_names_the_backbone_that_it_started_from(run, home):
    stage_1 = run(more=['--pretrained-backbone'])
    assert build(NAME, [stage_1], home=home, commit=COMMIT).base.startswith('test_resnet.')
    result = run('emoreg', experience=stage_1.parent, noted={'pretrained_backbone': True, 'experience': None})
    recipe = build(STAGE_2, [result], home=home, commit=COMMIT).recipe
    assert settings(*shlex.split(recipe)[2:])['experience'] == NAME
    assert '--pretrained-backbone' in recipe  # which a separate experience leaves as it is


def test_build_from_within_the_folder_of_a_run(run, home, monkeypatch):
    monkeypatch.chdir(run().parent)
    build(NAME, [Path('result.json')], home=home, commit=COMMIT)
    result = run('emoreg', experience='model_best.pth.tar')
    assert build(STAGE_2, [result], home=home, commit=COMMIT).base == NAME


def test_published_commit_stays_with_its_bytes(run, home, built):
    alter(home, hub_commit='b' * 40)
    same = build(NAME, [run(folder=home.parent / 'same')], home=home, commit=COMMIT)
    assert same.hub_commit == 'b' * 40
    other = build(NAME, [run(seed=8)], home=home, commit=COMMIT)
    assert other.hub_commit is None


def test_from_training_to_the_hub(hub, tiny, home, tmp_path, monkeypatch):
    """What train.py really leaves is what the command reads."""
    monkeypatch.setattr(sys, 'argv', ['train.py', '--model', 'emoreg_resnet18', '--dataset', 'emoji', '--epochs', '1',
                                      '--img-size', '16', '--batch-size', '128', '--no-amp', '--balance', 'learned',
                                      '--output', str(tmp_path), '--experiment', 'run'])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert train.main() == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    runs = tmp_path / 'run'
    one = build(NAME, [runs / 'affect'], home=home, commit=COMMIT)
    two = build('emoreg_resnet18.emoji_ft_emoji', [runs / 'emoreg'], home=home, commit=COMMIT,
                experience=str(runs))
    assert one.input_size == two.input_size == (3, 16, 16)
    assert two.model_args['balance'] == 'learned'
    assert two.hardware.startswith('CPU' if not torch.cuda.is_available() else torch.cuda.get_device_name())
    assert '--experience emoreg_resnet18.emoji --dataset emoji' in two.recipe
    assert '--balance learned' in two.recipe
    assert '--balance' not in one.recipe
    for weight in (one, two):
        assert check(weight.name, home) == []
        assert publish(weight.name, home, push=True, token=loopback_hub.TOKEN).hub_commit


# -- check -------------------------------------------------------------------------------------------------------------


def spoil(name, change):
    def do(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
    return do


@pytest.mark.parametrize(('damage', 'words'), [
    (spoil(HUB_FILE, lambda b: b[:-1] + bytes([b[-1] ^ 1])), 'sha256'),
    (spoil(HUB_FILE, lambda b: b[:-1]), 'bytes'),
    (lambda folder: (folder / HUB_FILE).unlink(), f'{HUB_FILE} is missing'),
    (lambda folder: (folder / 'README.md').unlink(), 'README.md is missing'),
    (lambda folder: (folder / 'pytorch_model.bin').write_bytes(b''), 'pytorch_model.bin does not belong there'),
    (spoil('config.json', lambda b: b.replace(b'"small_image": true', b'"small_image": 1')), 'config.json is not what'),
    (spoil('README.md', lambda b: b.replace(b'0.4', b'0.9')), 'README.md is not what the record says'),
    (spoil('README.md', lambda b: b.replace(b'license: cc-by-sa-4.0', b'license: mit')), 'allow cc-by-sa-4.0 only'),
])
def test_check_finds_damage(built, home, damage, words):
    damage(home / 'hub_cards' / NAME)
    assert words in '\n'.join(check(NAME, home, run=False))


@pytest.mark.parametrize(('changes', 'words'), [
    ({'licence': 'mit'}, 'allow cc-by-sa-4.0 only'),
    ({'metrics': {}}, 'the record holds no numbers'),
    ({'metrics': {'ccc': {'weight': float('nan'), 'n': 1, 'mean': 0.0, 'sd': None}}}, 'not finite'),
    ({'size': 5}, 'expected 5'),
    ({'affect_names': ('a', 'b'), 'model_args': {'num_affect': 2}}, 'shape'),
])
def test_check_finds_a_wrong_record(built, home, changes, words):
    if 'model_args' in changes:
        changes = {**changes, 'model_args': {**built.model_args, **changes['model_args']}}
    alter(home, **changes)
    assert words in '\n'.join(check(NAME, home, run=False))


def test_check_weighs_the_files(built, home, monkeypatch):
    monkeypatch.setattr('timm_emoreg.hub.command.WAITING_LIMIT', built.size - 1)
    assert 'bytes are too many for a waiting file' in '\n'.join(check(NAME, home, run=False))


def test_check_runs_the_snippets(built, home, monkeypatch):
    monkeypatch.setattr(EmoReg, 'forward_affect', lambda self, x: 1 / 0)
    assert 'snippet 1 fails: ZeroDivisionError' in '\n'.join(check(NAME, home))


# -- publish -----------------------------------------------------------------------------------------------------------


def test_dry_run_shows_everything_and_sends_nothing(hub, built, home, capsys):
    publish(NAME, home)
    out = capsys.readouterr().out
    for part in ('config.json', 'README.md', HUB_FILE):
        path = home / 'hub_cards' / NAME / part
        assert f'{path.stat().st_size:,} bytes  sha256 {sha256_of(path)}' in out
    assert 'dry run' in out
    assert not hub.requests
    assert read_records(home / 'timm_emoreg/assets/weights.json')[NAME].hub_commit is None


@pytest.mark.parametrize('commit', ['unknown', 'a' * 40 + '-dirty', ''])
def test_publish_refuses_a_dirty_record(hub, run, home, commit):
    build(NAME, [run()], home=home, commit=commit or 'unknown')
    alter(home, commit=commit)
    with pytest.raises(HubError, match=r'the record is dirty: .* train it in a clean checkout, or name the commit'):
        publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    assert not hub.requests


def test_publish_refuses_what_check_finds(hub, built, home):
    (home / 'hub_cards' / NAME / 'optimizer.pkl').write_bytes(b'')
    with pytest.raises(HubError, match='no pickles'):
        publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    assert not hub.requests


def test_push(hub, built, home, capsys, monkeypatch):
    weight = publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    repository = hub.repositories[built.hub_id]
    assert len(repository.commits) == 2  # the Hub's own first one, and one for all files
    files = repository.commits[weight.hub_commit]
    assert sorted(files) == ['.gitattributes', 'README.md', 'config.json', HUB_FILE]
    assert repository.tags == {f'v{timm_emoreg.__version__}-{built.sha256[:8]}': weight.hub_commit}
    assert weight.hub_commit in capsys.readouterr().out
    assert read_records(home / 'timm_emoreg/assets/weights.json')[NAME] == weight
    assert hub.count('GET', '/objects/') == 1  # fetched again

    card = files['README.md'].decode()
    assert f"'hf-hub:{built.hub_id}'" in card
    assert 'valence' in run_snippets(card)[0]  # as printed, from the Hub
    model = timm.create_model(f'hf-hub:{built.hub_id}@{weight.hub_commit}', pretrained=True)
    assert model.num_affect == 1

    monkeypatch.setitem(zoo.WEIGHTS, NAME, weight)
    layout = weights.layout_of(weight, 'test_resnet')
    found = weights.find_file(weight, layout, home / 'cache')
    assert found.read_bytes() == files[HUB_FILE]

    again = publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    assert again.hub_commit == weight.hub_commit
    assert len(repository.commits) == 2  # nothing new, no new commit


def test_push_of_a_newer_card_moves_the_tag(hub, built, home):
    first = publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    alter(home, seconds=3.0)
    assert main(['card', NAME, '--home', str(home)]) == 0
    second = publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    assert second.hub_commit != first.hub_commit
    assert list(hub.repositories[built.hub_id].tags.values()) == [second.hub_commit]


def test_a_dry_run_for_another_owner_writes_nothing(built, home, capsys):
    before = {path: path.read_bytes() for path in home.rglob('*') if path.is_file()}
    publish(NAME, home, organisation='someone')
    assert f'{NAME} -> someone/{NAME} (dry run' in capsys.readouterr().out
    assert {path: path.read_bytes() for path in home.rglob('*') if path.is_file()} == before


def test_a_build_for_another_owner_has_no_published_commit(run, home):
    build(NAME, [run()], home=home, commit=COMMIT)
    alter(home, hub_commit='b' * 40)
    again = run(folder=home.parent / 'again')  # gives the same bytes
    assert build(NAME, [again], home=home, commit=COMMIT).hub_commit == 'b' * 40
    other = build(NAME, [again], home=home, commit=COMMIT, organisation='other')
    assert (other.hub_id, other.hub_commit) == (f'other/{NAME}', None)


def test_push_under_another_owner(hub, built, home):
    weight = publish(NAME, home, push=True, organisation='someone', token=loopback_hub.TOKEN)
    assert list(hub.repositories) == [f'someone/{NAME}']
    assert f"'hf-hub:someone/{NAME}'" in (home / 'hub_cards' / NAME / 'README.md').read_text()
    assert read_records(home / 'timm_emoreg/assets/weights.json')[NAME] == weight


def test_a_push_that_fails_under_another_owner_leaves_record_and_card(hub, built, home, monkeypatch):
    before = {path: path.read_bytes() for path in home.rglob('*') if path.is_file()}

    def cut(*_, **__):
        raise ConnectionResetError('the cable')
    monkeypatch.setattr('timm_emoreg.hub.command.HfApi.create_commit', cut)
    with pytest.raises(HubError, match=r'could not be published, ConnectionResetError: the cable\. Nothing'):
        publish(NAME, home, push=True, organisation='someone', token=loopback_hub.TOKEN)
    assert {path: path.read_bytes() for path in home.rglob('*') if path.is_file()} == before


def test_the_commands_need_a_checkout(tmp_path, home, capsys):
    (home / 'train.py').unlink()  # as an installed package has none
    assert main(['table', '--home', str(home)]) == 2
    assert f'hub: {home} is no checkout of the project' in capsys.readouterr().err


def test_what_comes_back_with_other_bytes_is_not_recorded(hub, built, home):
    hub.fail('large', loopback_hub.sending(lambda data: bytes(len(data))))
    with pytest.raises(HubError, match=r'came back .* other bytes'):
        publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    assert hub.repositories[built.hub_id].tags == {}
    assert read_records(home / 'timm_emoreg/assets/weights.json')[NAME].hub_commit is None
    assert publish(NAME, home, push=True, token=loopback_hub.TOKEN).hub_commit


@pytest.mark.parametrize('token', [None, 'hf_stranger'])
def test_push_without_permission(hub, built, home, token):
    with pytest.raises(HubError, match=r'the Hub refuses.*hf auth login'):
        publish(NAME, home, push=True, token=token)
    assert not hub.repositories


def test_pushed_weight_loads_in_a_clean_process(hub, home, tmp_path):
    """With the real architecture, since a clean process knows of no other."""
    net = EmoReg('resnet18', num_classes=0, num_affect=1, affect_kind='ratings', small_image=True, img_size=32).eval()
    out = tmp_path / 'real' / 'affect'
    out.mkdir(parents=True)
    torch.save({'state_dict': net.state_dict(), 'task_state': {'target_kind': 'ratings', 'names': ['valence']}},
               out / 'model_best.pth.tar')
    (out.parent / 'args.json').write_text(json.dumps(settings('--task', 'affect')))
    (out / 'result.json').write_text(json.dumps({
        'task': 'affect', 'model': 'emoreg_resnet18', 'form': 'small', 'img_size': 32, 'data': 'emoji', 'metric': 'ccc',
        'validation': 0.1, 'test': {'ccc': 0.1}, 'seed': 0, 'seconds': 1.0}))
    built = build(NAME, [out], home=home, commit=COMMIT)
    publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    script = ('import timm, torch, timm_emoreg\n'
              f'm = timm.create_model("hf-hub:{built.hub_id}", pretrained=True).eval()\n'
              'print(m.forward_affect(torch.ones(1, 3, 32, 32)).item())')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HOME': str(tmp_path / 'hf')}
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    net.load_state_dict({k: t.half() if t.is_floating_point() else t for k, t in net.state_dict().items()})
    with torch.no_grad():
        assert float(done.stdout) == pytest.approx(net.forward_affect(torch.ones(1, 3, 32, 32)).item(), rel=1e-5)


# -- command line ------------------------------------------------------------------------------------------------------


def test_command_line(run, home, capsys, tmp_path):
    place = ['--home', str(home)]
    assert main(['build', NAME, str(run()), '--commit', COMMIT, *place]) == 0
    assert 'sha256' in capsys.readouterr().out
    assert main(['check', '--all', *place]) == 0
    assert capsys.readouterr().out == f'{NAME}: good\n'
    assert main(['publish', NAME, *place]) == 0
    assert 'dry run' in capsys.readouterr().out
    assert main(['table', *place]) == 0
    table = capsys.readouterr().out.strip()
    assert NAME in table
    readme = tmp_path / 'README.md'
    readme.write_text('a\n<!-- weights -->\nold\n<!-- /weights -->\nb\n')
    assert main(['table', '--write', str(readme), *place]) == 0
    assert readme.read_text() == f'a\n<!-- weights -->\n{table}\n<!-- /weights -->\nb\n'
    readme.write_text('nothing')
    assert main(['table', '--write', str(readme), *place]) == 2
    assert 'README.md: holds no <!-- weights --> ... <!-- /weights --> to write between' in capsys.readouterr().err
    (home / 'hub_cards' / NAME / 'README.md').write_text('x')
    assert main(['check', NAME, *place]) == 1
    assert main(['publish', '--all', *place]) == 1
    assert 'is not published' in capsys.readouterr().err
    assert main(['check', 'emoreg_resnet18.faces', *place]) == 2
    assert f'Known: {NAME}' in capsys.readouterr().err
    assert main(['check', '--all', '--home', str(tmp_path)]) == 2
    for wrong in (['check'], ['publish', NAME, '--all'], []):
        with pytest.raises(SystemExit):
            main([*wrong, *place])
