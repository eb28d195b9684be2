"""Runs and weights to build, check and publish."""
from __future__ import annotations

import json

import pytest
import torch
from releasing import COMMIT, NAME, settings

import timm_emoreg
from timm_emoreg import emoreg_resnet, emoreg_vit
from timm_emoreg.emoreg import EmoReg
from timm_emoreg.hub.release import build


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
              recipe=None, seconds=2.0):
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
            'validation': validation, 'seed': seed, 'seconds': seconds, 'experience': experience and str(experience),
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


@pytest.fixture
def stage_2(run, built):
    """Writes a run of stage 2 that started from the released stage 1."""
    return lambda **changes: run('emoreg', **{'experience': NAME, **changes})
