from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import loopback_hub
import pytest
import timm
import torch
from releasing import COMMIT, NAME, STAGE_2, alter, settings
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from train_module import load_train

from timm_emoreg import zoo
from timm_emoreg.data import load_target
from timm_emoreg.data.loader import make_loader
from timm_emoreg.emoreg import EmoReg
from timm_emoreg.hub import release
from timm_emoreg.hub.command import check, main, publish
from timm_emoreg.hub.finished_runs import HubError, Run, check_same_recipe
from timm_emoreg.hub.release import build
from timm_emoreg.zoo import HUB_FILE, read_records, write_records

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
FIXED = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # by which a precision is judged


# -- build -------------------------------------------------------------------------------------------------------------


def test_build_releases_the_best_of_the_seeds(run, home):
    results = [run(seed=3, validation=0.5, test=0.60, seconds=1.0),
               run(seed=4, validation=0.7, test=0.40, seconds=4.0).parent]
    weight = build(NAME, results, home=home, commit=COMMIT)
    assert weight.seeds == (4, 3)
    assert weight.metrics['ccc'] == {'weight': 0.4, 'n': 2, 'mean': 0.5, 'sd': 0.1414}
    assert set(weight.metrics) == {'ccc', 'rmse'}  # the only dimension is not told twice
    assert weight.baseline == {}
    assert (weight.licence, weight.stimuli_labels, weight.commit) == ('cc-by-sa-4.0', 'valence', COMMIT)
    assert weight.seconds == 2.5  # of a run
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
        rounded = net.forward_affect(FIXED)
        net.load_state_dict(state)
        moved = (net.forward_affect(FIXED) - rounded).abs()
    assert weight.logit_difference == pytest.approx(moved.max().item(), rel=0.01)  # the card says 'at most'
    assert moved.max() > 1.1 * moved.mean()
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


def test_build_in_8_bits_measures_what_they_cost(stage_2, home, capsys, monkeypatch):
    result = stage_2()
    checkpoint = result.with_name('model_best.pth.tar')
    whole = torch.load(checkpoint)
    state = whole['state_dict']
    splits = load_target('emoji')
    few = splits.test.subset(range(0, len(splits.test), 12))
    net = EmoReg('test_resnet', num_classes=9, num_affect=1, affect_kind='ratings', small_image=True, img_size=32)

    def answers_of(model):
        loader = make_loader(few, (32, 32), 64, resolve_model_data_config(net))
        with torch.no_grad():
            return torch.cat([model.eval()(x) for x, _ in loader])

    for head in ('head', 'head_emo'):  # one large weight leaves few steps to the others, and so answers change
        state[f'{head}.weight'][:, 0] = 3
    net.load_state_dict(state)
    for head in ('head', 'head_emo'):  # untrained, it answers all images alike
        state[f'{head}.bias'] -= answers_of(net).mean(dim=0)
    torch.save(whole, checkpoint)
    net.load_state_dict(state)
    # right is what the checkpoint answers, but for every fifth image: the 8 bits cost what they change
    given = [answers_of(net).argmax(dim=1)]
    few.targets = torch.where(torch.arange(len(few)) % 5 == 0, (given[0] + 1) % 9, given[0])
    monkeypatch.setattr(release, 'load_target', lambda *_: replace(splits, test=few))

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
    matrices = sum(t.numel() for name, t in state.items() if t.ndim > 1)
    assert weight.size == file.stat().st_size < matrices * 1.6  # 2 in 16 bits, the rest of so small a net is much
    # the cost, by the models that timm builds of the file and of the checkpoint
    built = timm.create_model(f'local-dir:{file.parent}', pretrained=True)
    given.append(answers_of(built).argmax(dim=1))
    accuracy = [round(100 * (answers == few.targets).double().mean().item(), 2) for answers in given]
    assert accuracy[0] > accuracy[1]  # or this test could not tell them apart
    assert weight.eight_bits == {'images': len(few), 'float32': accuracy[0], 'int8': accuracy[1],
                                 'changed': int((given[0] != given[1]).sum())}
    with torch.no_grad():
        moved = (net.eval()(FIXED) - built(FIXED)).abs().max().item()
    assert weight.logit_difference == pytest.approx(moved, rel=0.01)
    assert check(STAGE_2, home) == []
    card = (file.parent / 'README.md').read_text()
    assert (f'answers {accuracy[0]:.2f} % of the {len(few):,} test images correctly before it was rounded to 8 bits '
            f'and {accuracy[1]:.2f} % as the file has it') in card
    assert 'the test part was looked at once, and again for what the 8 bits cost' in card
    assert 'safetensors, int8 with a scale per output channel: moves outputs' in card


def test_a_model_that_timm_builds_otherwise_is_not_released(stage_2, home, monkeypatch):
    text = release.config_text
    monkeypatch.setattr(release, 'config_text', lambda weight: text(
        replace(weight, model_args={**weight.model_args, 'balance': 0.9})))
    with pytest.raises(HubError, match=f'{STAGE_2}: the model that timm builds from the folder answers differently'):
        build(STAGE_2, [stage_2()], home=home, commit=COMMIT)
    assert list(read_records(home / 'timm_emoreg/assets/weights.json')) == [NAME]
    assert not (home / 'hub_cards' / STAGE_2).exists()


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


def test_a_seed_of_the_baseline_counts_once(run, stage_2, home):
    plain = run('plain')
    with pytest.raises(HubError, match=r'Two of the runs have the same seed \(\[0, 0\]\)'):
        build(STAGE_2, [stage_2()], [plain, plain], home=home)


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


@pytest.mark.parametrize(('name', 'usual', 'other'), [
    ('attention', 'fused', 'plain'), ('convolution', 'torch', 'columns')])
def test_before_there_was_a_choice_of_a_kernel_it_was_the_usual_one(run, name, usual, other):
    older, same, different = (run('plain', seed=seed, recipe={'opt': 'muon'}) for seed in range(3))
    for path, kernel in ((same, usual), (different, other)):
        path.write_text(json.dumps({**json.loads(path.read_text()), name: kernel}))
    check_same_recipe([Run(older), Run(same)])
    with pytest.raises(HubError, match=rf"{name} '{other}' \(there '{usual}'\)\. Only seeds may differ"):
        check_same_recipe([Run(older), Run(different)])


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
    # a default, too: what the card says of the epochs goes by it
    assert recipe == 'python train.py --model emoreg_resnet18 --task affect --stimuli emoji --epochs 8 --seed 0'


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


def tenth(load):
    """Gives every tenth image of each part of what `load` gives."""
    def load_tenth(*args, **kwargs):
        splits = load(*args, **kwargs)
        parts = {part: getattr(splits, part) for part in ('train', 'validation', 'test')}
        return replace(splits, **{part: images.subset(range(0, len(images), 10)) for part, images in parts.items()})
    return load_tenth


def test_from_training_to_the_hub(hub, tiny, home, tmp_path, monkeypatch):
    """What train.py really leaves is what the command reads."""
    monkeypatch.setattr(sys, 'argv', ['train.py', '--model', 'emoreg_resnet18', '--dataset', 'emoji', '--epochs', '1',
                                      '--img-size', '16', '--batch-size', '64', '--no-amp', '--balance', 'learned',
                                      '--output', str(tmp_path), '--experiment', 'run'])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train = load_train()
    for name in ('load_stimuli', 'load_target'):
        monkeypatch.setattr(train, name, tenth(getattr(train, name)))
    monkeypatch.setattr(release, 'load_target', tenth(release.load_target))
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
