"""The bench: the measurement itself by an injected clock, the figures on tiny nets, the command line."""
from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from inspect import getclosurevars
from itertools import groupby

import pytest
import timm.optim.muon
import torch

from timm_emoreg import bench


@pytest.fixture
def args(monkeypatch):
    monkeypatch.setattr(bench, 'NETS', {'cpu': [('test_resnet', 32, 4, True)]})
    return argparse.Namespace(device=torch.device('cpu'), rounds=1, runs=1, images=256, steps=1, autocast=nullcontext,
                              precision='float32', timm_train=None, data_dir=None)


def test_two_functions_are_timed_in_turn_after_one_run_that_is_not_counted():
    now, calls = [0.0], []

    def take(name, seconds):
        def run():
            calls.append(name)
            now[0] += next(seconds)
        return run
    ours, theirs = take('ours', iter([100, 2, 3, 4])), take('theirs', iter([200, 1, 2, 1]))
    assert bench.compare(ours, theirs, 3, clock=lambda: now[0]) == [(2, 1), (3, 2), (4, 1)]
    assert calls == ['ours', 'theirs', 'ours', 'theirs', 'theirs', 'ours', 'ours', 'theirs']


def test_a_row_holds_the_median_of_the_ratios_not_the_ratio_of_the_medians():
    figure = bench.Measurement('a step', 's', [(2, 1), (3, 2), (40, 10), (9, 3)], 'at most 2')
    assert figure.row() == ['a step', '2.500', '1.875 to 3.250', '4', '6 s', '2.5 s', 'at most 2']
    assert bench.Measurement('once', 'MB', [(1500, 1000)]).row() == [
        'once', '1.500', '1.500 to 1.500', '1', '1,500 MB', '1,000 MB', '']
    fast = bench.Measurement('fast', 'images/s', [(215_004.2, 999.94)])
    assert fast.row()[4:6] == ['215,004 images/s', '999.9 images/s']
    assert bench.table([figure]).splitlines()[-1] == (
        '| a step | 2.500 | 1.875 to 3.250 | 4 | 6 s | 2.5 s | at most 2 |')


def test_peak_memory_counts_what_exists_at_once():
    def call():
        a = torch.zeros(1_000_000)
        del a
        b, c = torch.zeros(500_000), torch.zeros(700_000)
        return b, c
    assert bench.peak_memory(call, torch.device('cpu')) == pytest.approx(4_800_000, rel=0.01)


def test_step_compares_the_same_net_with_and_without_the_dual_head(args, monkeypatch):
    compared = []

    def compare(ours, theirs, rounds):
        compared.append((ours, theirs))
        return [(ours() or 1.0, theirs() or 1.0)]
    built, build, inferred, inference = [], bench.build, [], bench.inference
    monkeypatch.setattr(bench, 'compare', compare)
    monkeypatch.setattr(bench, 'inference', lambda model, *at: inferred.append(model) or inference(model, *at))
    monkeypatch.setattr(bench, 'build', lambda *a, **k: built.append(build(*a, **k)) or built[-1])
    figures = list(bench.step(args))
    assert [figure.name.split(':')[0] for figure in figures] == [
        'training step', 'training step, separate experience', 'peak memory of training', 'inference, folded']
    (peaks,) = figures[2].pairs
    assert 1 < peaks[0] / peaks[1] < 1.5
    plain, emoreg, separate, *_, unfolded, alone = built
    assert [type(model).__name__ for model in (plain, emoreg, separate)] == ['ResNet', 'EmoReg', 'EmoReg']
    assert separate.backbone_emo is not None
    assert str(plain.conv1) == str(emoreg.backbone.conv1)
    assert all(p.grad is None for model in (plain, emoreg) for p in model.parameters())  # a whole step was taken
    folded = inferred[0]
    assert [type(model).__name__ for model in (unfolded, folded, alone)] == ['EmoReg', 'ResNet', 'ResNet']
    assert inferred[1] is alone
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded(x), unfolded.eval()(x), atol=1e-4, rtol=1e-4)


def test_peak_memory_of_training_is_that_with_the_state_of_the_optimizer(args, monkeypatch):
    runs = []
    monkeypatch.setattr(bench, 'training', lambda *_: lambda: runs.append('step'))  # which the first one makes
    bench.train_anew(True, ('test_resnet', 32, True), (32, 4, args))
    assert runs == ['step', 'step']


def test_a_function_that_is_timed_takes_all_steps_in_its_mode(args):
    args.steps = 3
    for make, mode in ((bench.training, True), (bench.inference, False)):
        model, modes = bench.build(True, 'test_resnet', 32, True).train(not mode), []
        model.register_forward_hook(lambda model, *_, modes=modes: modes.append(model.training))
        make(model, 32, 4, args)()
        assert modes == [mode] * 3


def test_a_training_step_changes_what_it_trains(args):
    model = bench.build(True, 'test_resnet', 32, True)
    before = model.head.weight.clone()
    bench.training(model, 32, 4, args)()
    assert not torch.equal(model.head.weight, before)


def test_both_loaders_give_all_images(args, monkeypatch):
    monkeypatch.setattr(bench.os, 'cpu_count', lambda: 1)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads[-1])
    monkeypatch.setattr(torch, 'set_num_threads', lambda number: threads.append(number))
    counts, threads, used = [], [3], []

    def compare(ours, theirs, rounds):
        used.append(torch.get_num_threads())
        sides = [getclosurevars(call).nonlocals['batches'] for call in (ours, theirs)]
        counts.append([sum(len(x) for x, _ in batches) for batches in sides])
        return [(0.5, 2.0)]
    monkeypatch.setattr(bench, 'compare', compare)
    one, jitter, many = bench.loader(args)
    assert counts == [[256, 256]] * 3
    assert one.pairs == [(512.0, 128.0)]
    assert one.name == 'loader, 32 px: one core'
    assert jitter.name == 'loader, 32 px: one core, timm with its default colour jitter'
    assert many.name.endswith('3 threads, timm with 1 workers')
    assert (used, threads[-1]) == ([1, 1, 3], 3)


def test_muon_is_compared_only_where_train_sets_it_up_in_another_way(args, monkeypatch):
    types = []
    usual = timm.optim.muon.zeropower_via_newtonschulz
    monkeypatch.setattr(timm.optim.muon, 'zeropower_via_newtonschulz',
                        lambda *a, **k: types.append(k.get('dtype', torch.bfloat16)) or usual(*a, **k))
    figure, = bench.muon(args)
    assert len(figure.pairs) == 1
    assert [kind for kind, _ in groupby(types)] == [torch.float32, torch.bfloat16] * 2  # once before, and the round
    args.precision = 'bfloat16'
    with pytest.raises(bench.Skipped, match=r'on cpu in bfloat16 train\.py uses it as it is'):
        list(bench.muon(args))


def test_attention_is_compared_only_where_train_chooses_the_plain_one(args, monkeypatch):
    monkeypatch.setattr(bench, 'NETS', {'cpu': [('test_resnet', 32, 4, True), ('test_vit', 32, 4, True)]})
    asked, sides = [], []
    monkeypatch.setattr(bench, 'choose_attention', lambda model, *asked_for: asked.append(asked_for) or (
        'plain' if bench.fused_attentions(model) else None))
    monkeypatch.setattr(bench, 'training', lambda model, *_: sides.append(len(bench.fused_attentions(model))) or int)
    figure, = bench.attention(args)
    assert figure.name == 'training step, plain attention: test_vit, 32 px, batch 4'
    assert asked == [(args.device, 'float32', 32)] * 2
    assert sides == [0, 6]  # ours, timm's
    monkeypatch.setattr(bench, 'choose_attention', lambda *_: 'fused')
    with pytest.raises(bench.Skipped, match=r'on cpu in float32 train\.py uses attention as timm has it'):
        list(bench.attention(args))


def test_convolutions_are_compared_where_train_changes_them(args, monkeypatch):
    monkeypatch.setattr(bench, 'STOCK_NETS', ('test_resnet',))
    sides, asked = [], []
    monkeypatch.setattr(bench, 'choose_convolution', lambda model, *given: asked.append(given) or 'columns')
    monkeypatch.setattr(bench, 'training', lambda model, *_: sides.append(
        {getattr(m, 'columns', None) for m in model.modules() if isinstance(m, torch.nn.Conv2d)}) or int)
    figures = list(bench.convolution(args))
    assert [figure.name for figure in figures] == [
        f'training step, convolutions of small maps: test_resnet, {stem} stem, 32 px, batch 64'
        for stem in ('stock', '3x3')]
    assert sides == [{True}, {None}] * 2  # ours, torch's
    assert asked == [(args.device, args.precision, [32])] * 2
    sides.clear()
    monkeypatch.setattr(bench, 'choose_convolution', lambda *_: 'torch')
    list(bench.convolution(args))
    assert sides == [{False}, {None}] * 2  # without columns, but as suit_small_maps leaves them
    args.device = torch.device('cuda')
    with pytest.raises(bench.Skipped, match=r'on cuda train\.py uses those of torch'):
        list(bench.convolution(args))


SCRIPT = """
import sys
assert sys.argv[sys.argv.index('--model') + 1] == 'resnet18', sys.argv
ours = '--task' in sys.argv
for epoch in (1, 2, 3):
    print('epoch %d/3: loss 1' % epoch if ours else 'Current checkpoints:', flush=True)
print('the end')
"""


def test_train_runs_both_scripts(args, monkeypatch, tmp_path):
    script = tmp_path / 'train.py'
    script.write_text(SCRIPT)
    monkeypatch.setattr(bench, 'TRAIN', script)
    args.data_dir = tmp_path
    with pytest.raises(bench.Skipped, match='holds no cifar-10-batches-py'):
        list(bench.train(args))
    (tmp_path / 'cifar-10-batches-py').mkdir()
    with pytest.raises(bench.Skipped, match='is in no package; name your copy with --timm-train'):
        list(bench.train(args))
    args.timm_train, args.runs = script, 2
    speed, = bench.train(args)
    assert (len(speed.pairs), speed.goal, speed.unit) == (2, 'at least 1.5', 'images/s')
    script.write_text(SCRIPT.replace('(1, 2, 3)', '(1, 2)'))
    with pytest.raises(bench.Skipped, match=r'train\.py printed 2 lines .*, expected 3'):
        list(bench.train(args))
    script.write_text(SCRIPT + 'sys.exit("no room")')
    with pytest.raises(bench.Skipped, match='ended with status 1: no room'):
        list(bench.train(args))


def test_train_counts_the_images_of_the_later_epochs(args, monkeypatch, tmp_path):
    commands = []

    def output(command):
        commands.append(command)
        ours = '--task' in command
        ends = {9.0: 'epoch 1/3: loss 1', 12.0: 'epoch 2/3: loss 1', 13.0: 'epoch 3/3: loss 1', 14.0: 'the end'}
        return list((ends if ours else dict.fromkeys((4.0, 9.0, 14.0), 'Current checkpoints:')).items())
    monkeypatch.setattr(bench, 'output', output)
    (tmp_path / 'cifar-10-batches-py').mkdir()
    args.data_dir, args.timm_train = tmp_path, tmp_path / 'timm_train.py'
    speed, = bench.train(args)
    assert speed.pairs == [(2 * 30_000 / 4, 2 * 60_000 / 10)]  # 25,000 + 5,000 an epoch in 2 s, 50,000 + 10,000 in 5
    ours, theirs = commands
    assert (ours[1], theirs[1]) == (str(bench.TRAIN), str(args.timm_train))
    assert ours[ours.index('--train-images') + 1] == '25000'
    common = ours.index('--data-dir')
    assert theirs[theirs.index('--data-dir'):-1] == ours[common:-1]  # but for the name of the experiment


FIRST_UPDATE = """
import sys, time, torch
assert __name__ == '__main__' and sys.argv[0] == __file__ and sys.argv[-2] == '--experiment', sys.argv
weight = torch.nn.Parameter(torch.zeros(1))
weight.grad = torch.ones(1)
optimizer = torch.optim.SGD([weight])
print('is set up')
optimizer.step()
time.sleep(60)
"""


def test_startup_kills_both_scripts_at_their_first_update(args, monkeypatch, tmp_path):
    script = tmp_path / 'train.py'
    script.write_text(FIRST_UPDATE)
    monkeypatch.setattr(bench, 'TRAIN', script)
    (tmp_path / 'cifar-10-batches-py').mkdir()
    args.data_dir, args.timm_train, args.rounds = tmp_path, script, 1
    output, commands, ends = bench.output, [], []

    def watched(command, until):
        commands.append(command)
        lines = output(command, until=until)
        ends.append(lines[-1])
        return lines

    monkeypatch.setattr(bench, 'output', watched)
    figure, = bench.startup(args)
    seconds = [when for when, _ in ends]
    assert {line for _, line in ends} == {'first update'}
    assert max(seconds) < 60
    assert (figure.pairs, figure.unit) == ([tuple(seconds[2:])], 's')  # ours and timm's, without the first round
    assert [command[-1] for command in commands] == ['0-ours', '0-theirs', '1-ours', '1-theirs']
    assert ['torch/cifar10' in command for command in commands] == [False, True] * 2
    script.write_text('print("the end")')
    with pytest.raises(bench.Skipped, match=r"train\.py printed no line 'first update', its last one was: the end"):
        list(bench.startup(args))


def test_graphs_that_are_compiled_after_the_first_epoch_are_counted(args, monkeypatch, tmp_path):
    lines = ['Recompiling function forward', 'epoch 1/2: loss 1', 'V [__recompiles] Recompiling function forward',
             'epoch 2/2: loss 1', 'Recompiling function forward', 'epoch 1/2: loss 1', 'epoch 2/2: loss 1']
    (tmp_path / 'train.py').write_text(f'print(*{lines!r}, sep="\\n")')
    monkeypatch.setattr(bench, 'TRAIN', tmp_path / 'train.py')
    monkeypatch.setattr(bench, 'NETS', {'cpu': []})
    assert list(bench.compile_(args)) == [
        'compile: train.py --torchcompile compiled 1 graphs after the first epoch of each stage (goal: 0).']


def test_the_command_prints_and_writes_what_was_measured_and_what_was_not(monkeypatch, tmp_path, capsys):
    def skipped(args):
        yield bench.Measurement('before', 's', [(2.0, 1.0)] * args.rounds)
        raise bench.Skipped('there is no GPU')
    monkeypatch.setattr(bench, 'BENCHES', {'step': skipped, 'loader': lambda args: iter(['a note'])})
    assert bench.main(['--quick', '--device', 'cpu', '--json', str(tmp_path / 'out.json')]) == 0
    out = capsys.readouterr().out
    assert f'torch {torch.__version__}' in out
    assert '\nstep: skipped, there is no GPU.\na note\n' in out
    assert '\n| before | 2.000 | 2.000 to 2.000 | 2 | 2 s | 1 s |  |\n' in out
    written = json.loads((tmp_path / 'out.json').read_text())
    assert written['figures'] == [{'name': 'before', 'unit': 's', 'pairs': [[2.0, 1.0]] * 2, 'goal': ''}]
    assert bench.main(['loader', '--device', 'cpu']) == 0
    assert 'before' not in capsys.readouterr().out

    def broken(args):
        raise RuntimeError('no C++ compiler\nmore')
    monkeypatch.setattr(bench, 'BENCHES', {'step': skipped, 'compile': broken, 'loader': lambda args: iter(['a note'])})
    assert bench.main(['--quick', '--device', 'cpu', '--json', str(tmp_path / 'out.json')]) == 1
    out = capsys.readouterr().out
    assert '\nstep: skipped, there is no GPU.\ncompile: failed, RuntimeError: no C++ compiler\na note\n' in out
    assert json.loads((tmp_path / 'out.json').read_text())['figures'] == written['figures']


@pytest.mark.parametrize(('argv', 'message'), [
    (['steps'], 'steps: unknown, expected one of step, loader, muon, attention, convolution, train, startup, import, '
     'compile.'),
    (['--rounds', '0'], '--rounds 0: at least 1 is needed.'),
    (['--timm-train', '/nowhere/train.py'], '/nowhere/train.py: there is no such file or folder.'),
    (['--json', '/nowhere/out.json'], '/nowhere: there is no such file or folder.'),
    (['--json', '/'], '--json /: is a folder. Give the name of a file.'),
    pytest.param(['muon', '--device', 'cuda'], '--device cuda: torch sees no GPU here. Leave it out, or give cpu.',
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')),
])
def test_arguments_that_do_not_fit_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_import_adds_to_what_timm_takes(args):
    (figure,) = bench.import_(args)
    ((ours, theirs),) = figure.pairs
    assert ours > theirs > 0
