from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from timm.utils import CheckpointSaver

from timm_emoreg import zoo
from timm_emoreg.data import DataError, ImageSet, Splits, Target
from timm_emoreg.task import AffectTask, EmoRegTask
from timm_emoreg.training.checkpoint import CheckpointError
from timm_emoreg.training.experience import (
    Experience,
    find_experience,
    load_backbone,
    released_experience,
    untrained_experience,
)
from timm_emoreg.weights import WeightError


def make(affect_kind='emotion', num_affect=3):
    return timm.create_model('emoreg', backbone='test_resnet', num_classes=2, num_affect=num_affect,
                             affect_kind=affect_kind)


def save(task, folder, ema=False):
    folder.mkdir(parents=True)
    if ema:
        task.setup_ema()
        with torch.no_grad():
            for p in task.trainable_module.parameters():
                p.add_(1)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    saver = CheckpointSaver(task.trainable_module, optimizer, task=task, checkpoint_dir=str(folder))
    saver.save_checkpoint(0, metric=1.0)
    return folder / 'model_best.pth.tar'


@pytest.mark.parametrize(('kind', 'affect_kind'), [('class', 'emotion'), ('votes', 'emotion'), ('ratings', 'ratings')])
def test_names_and_kind_come_back(tmp_path, kind, affect_kind):
    task = AffectTask(make(affect_kind), kind, ('joy', 'fear', 'Ärger'))
    path = save(task, tmp_path / 'run' / 'affect')
    state = task.trainable_module.state_dict()
    for where in (path, path.parent, path.parent.parent):  # the file, its folder, the folder of a run
        found = find_experience(str(where))
        assert found.source == str(path)
        assert (found.affect_kind, found.num_affect, found.names) == (affect_kind, 3, ('joy', 'fear', 'Ärger'))
        assert all(torch.equal(found.state_dict[name], value) for name, value in state.items())
    model = make(found.affect_kind, found.num_affect)
    model.load_experience(found.state_dict)
    assert torch.equal(model.head_affect.weight, task.trainable_module.head_affect.weight)


def test_averaged_weights_go_first(tmp_path):
    task = AffectTask(make(), 'class', tuple('abc'))
    path = save(task, tmp_path / 'run', ema=True)
    found = find_experience(str(path)).state_dict
    averaged = task.get_eval_model(ema=True).module
    assert torch.equal(found['head_affect.weight'], averaged.head_affect.weight)
    assert not torch.equal(found['head_affect.weight'], task.trainable_module.head_affect.weight)


def test_the_result_of_another_stage_is_refused(tmp_path):
    path = save(EmoRegTask(make()), tmp_path / 'emoreg')
    for where in (path, path.parent):
        with pytest.raises(CheckpointError, match=r'was not written by stage 1 \(--task affect\)'):
            find_experience(str(where))
    for task_state in (None, [], {'target_kind': 'class'}):
        torch.save({'state_dict': {}, 'task_state': task_state}, path)
        with pytest.raises(CheckpointError, match='was not written by stage 1'):
            find_experience(str(path))
    path.write_text('no checkpoint')
    with pytest.raises(CheckpointError, match='not a readable checkpoint'):
        find_experience(str(path))


@pytest.mark.parametrize('where', ['', 'nowhere/run', 'emoreg_resnet18.unheard', 'emoreg_resnet18', 'x' * 5000, 'a\0b',
                                   'emoreg_resnet18.[a'])
def test_nothing_of_that_name(monkeypatch, tmp_path, where):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match='neither a file, nor a folder, nor a released weight') as caught:
        find_experience(where)
    assert len(str(caught.value)) < 1000


def test_a_folder_without_a_result(tmp_path):
    (tmp_path / 'last.pth.tar').touch()
    with pytest.raises(CheckpointError, match=r'holds no model_best\.pth\.tar of stage 1, neither itself nor in'):
        find_experience(str(tmp_path))


def test_a_released_weight_by_its_tag(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = make('ratings', 2)
    monkeypatch.setattr(zoo, 'WEIGHTS', {
        'emoreg_tiny.emoji': SimpleNamespace(affect_names=('valence', 'arousal'), target=None, at_hand=True,
                                             stimuli='emoji', stimuli_labels='valence',
                                             architecture='emoreg_resnet18', model_args={'small_image': True}),
        'emoreg_tiny.emoji_ft_cifar10': SimpleNamespace(target='cifar10', at_hand=True)})
    monkeypatch.setattr(timm, 'create_model',
                        lambda name, pretrained: model if (name, pretrained) == ('emoreg_tiny.emoji', True) else None)
    found = find_experience('emoreg_tiny.emoji')
    assert (found.source, found.affect_kind, found.num_affect) == ('emoreg_tiny.emoji', 'ratings', 2)
    assert found.names == ('valence', 'arousal')
    assert (found.backbone, found.small_image) == ('resnet18', True)
    assert torch.equal(found.state_dict['head_affect.weight'], model.head_affect.weight)
    with pytest.raises(CheckpointError, match=r'weight of stage 1 \(emoreg_tiny\.emoji\)\. Did you mean emoreg_'):
        find_experience('emoreg_tiny.ferplus')
    with pytest.raises(CheckpointError, match=r'_ft_cifar10: the result of stage 2, which knows its target already; '
                                              r'give one of stage 1 \(emoreg_tiny\.emoji\)\.'):
        find_experience('emoreg_tiny.emoji_ft_cifar10')

    def fail(name, pretrained):
        raise WeightError(f'{name}: not to be had.')

    monkeypatch.setattr(timm, 'create_model', fail)
    with pytest.raises(CheckpointError, match=r'emoreg_tiny\.emoji: not to be had'):
        find_experience('emoreg_tiny.emoji')
    (tmp_path / 'emoreg_tiny.emoji').write_text('a path goes first')
    with pytest.raises(CheckpointError, match='not a readable checkpoint'):
        find_experience('emoreg_tiny.emoji')


@pytest.mark.parametrize('backbone', ['levit_128s', 'caformer_s18', 'test_vit'])
def test_a_backbone_takes_an_experience_whatever_goes_with_its_classifier(backbone):
    with torch.device('meta'):
        stage_1 = timm.create_model('emoreg', backbone=backbone, num_classes=0)
        plain = timm.create_model(backbone, num_classes=5)
    load_backbone(plain, Experience('here', stage_1.state_dict(), 'emotion', 8))
    for other in ({}, stage_1.state_dict()):  # which has all of it and more, as a deeper network has
        with pytest.raises(CheckpointError, match='here: its backbone is of another architecture or form; the first'):
            load_backbone(plain, Experience('here', {**other, 'backbone.x': torch.zeros(1)}, 'emotion', 8))


def test_a_backbone_takes_an_experience_of_another_image_size():
    stage_1 = timm.create_model('emoreg', backbone='test_vit', img_size=64, num_classes=0)
    plain = timm.create_model('test_vit', img_size=96, num_classes=5)
    experience = Experience('here', stage_1.state_dict(), 'emotion', 8)
    load_backbone(plain, experience)
    both = timm.create_model('emoreg', backbone='test_vit', img_size=96, num_classes=5)
    both.load_experience(experience.state_dict)
    assert torch.equal(plain.pos_embed, both.backbone.pos_embed)
    wider = Experience('here', {**experience.state_dict, 'backbone.norm.weight': torch.ones(128)}, 'emotion', 8)
    with pytest.raises(CheckpointError, match=r"the first difference is 'norm\.weight'"):
        load_backbone(plain, wider)


def test_released_experience_is_of_the_same_architecture_form_and_size():
    name = released_experience('emoreg_resnet18', True, 32)
    assert name == 'emoreg_resnet18.emoji'
    found = find_experience(name)
    assert (found.affect_kind, found.num_affect, found.names) == ('ratings', 1, ('valence',))
    assert released_experience('emoreg_resnet18', False, 32) is None
    assert released_experience('emoreg_resnet18', True, 48) is None
    assert released_experience('emoreg_resnet34', True, 32) is None


def test_what_waits_for_publication_or_has_a_target_is_not_taken_by_itself(make_record, monkeypatch):
    records = (make_record(target='cifar10', embedded=True), make_record(stimuli='ferplus'), make_record(embedded=True))
    monkeypatch.setattr(zoo, 'WEIGHTS', {record.name: record for record in records})
    assert released_experience('emoreg_resnet18', True, 32) == 'emoreg_resnet18.emoji'


@pytest.mark.parametrize(('known', 'model', 'kwargs', 'message'), [
    ({'backbone': 'test_vit'}, 'test_resnet', {}, 'is of the backbone test_vit, and this run has test_resnet'),
    ({'backbone': 'vit_small_patch16_224.dino'}, 'vit_small_patch16_224', {}, 'saw images normalised by mean and sd'),
    ({'backbone': 'resnet18.a1_in1k'}, 'resnet18.tv_in1k', {}, None),  # these name weights only
    ({'small_image': True}, 'test_resnet', {}, 'was trained with --small-image, and this run has --no-small-image, '
     'given or by the size of its images. For images of up to 64 px that is the usual one: give --img-size 32, say.'),
    ({'model_kwargs': {'act_layer': 'gelu'}}, 'test_resnet', {},
     'was trained with the --model-kwargs {"act_layer": "gelu"}, and this run has {}'),
    ({'model_kwargs': {'channels': (8, 8), 'patch_drop_rate': 0.5}}, 'test_resnet', {'channels': [8, 8]}, None),
    ({}, 'test_resnet', {'act_layer': 'gelu'}, None),  # what is not known is not compared
])
def test_stage_2_has_the_form_of_stage_1(known, model, kwargs, message):
    experience = Experience('here', {}, 'emotion', 3, **known)
    if message is None:
        experience.check_form(model, False, kwargs)
        return
    with pytest.raises(CheckpointError) as error:
        experience.check_form(model, False, kwargs)
    assert message in str(error.value)


def test_a_link_to_stage_1_is_as_finished_as_its_run(trained_run, tmp_path):
    link = tmp_path / 'stage 1.pth.tar'
    link.symlink_to(trained_run / 'affect/model_best.pth.tar')
    assert find_experience(str(link)).unfinished == ''


def test_what_stage_1_was_built_with_is_known_of_runs_and_weights(trained_run):
    assert find_experience(str(trained_run)).model_kwargs == {}
    assert find_experience('emoreg_resnet18.emoji').model_kwargs == {}


def test_what_stage_1_was_shown_is_known_of_runs_and_weights(trained_run, colours):
    assert find_experience(str(trained_run)).stimuli == {'stimuli': str(colours)}
    assert find_experience('emoreg_resnet18.emoji').stimuli == {'stimuli': 'emoji', 'stimuli_labels': 'valence'}


def test_an_untrained_response_has_the_form_of_the_one_that_it_stands_for():
    found = untrained_experience(Target('ratings', ('valence', 'arousal')))
    assert (found.affect_kind, found.num_affect, found.names) == ('ratings', 2, ('valence', 'arousal'))
    assert (found.source, found.state_dict) == ('none', {})
    usual = untrained_experience()
    assert (usual.affect_kind, usual.num_affect, usual.names) == ('emotion', 8, ())


@pytest.mark.parametrize('names', [('fear', 'joy'), ('joy', 'anger'), ('joy', 'fear', 'anger')])
def test_only_stimuli_with_the_labels_of_stage_1_are_rehearsed(names):
    def stimuli(names):
        part = ImageSet(np.zeros((1, 2, 2), np.uint8), torch.zeros(1, dtype=torch.long), Target('class', names))
        return Splits('toy', part, part, part, 'free')

    experience = Experience('here', {}, 'emotion', 2, ('joy', 'fear'))
    experience.check_stimuli(stimuli(('joy', 'fear')))
    with pytest.raises(DataError, match=f'here answers with joy, fear, and the labels of toy are {", ".join(names)}'):
        experience.check_stimuli(stimuli(names))
