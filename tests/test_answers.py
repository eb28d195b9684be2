"""What is shown of a model, as numbers."""
from types import SimpleNamespace

import pytest
import torch
from small_models import animals, build_trained
from torch import nn

import timm_emoreg  # noqa: F401  registers the models
from timm_emoreg.answers import (
    Answers,
    affect_gradient,
    answer,
    changed_answers,
    class_affect,
    describe_image,
    describe_set,
    largest_error,
    top_classes,
)


@pytest.mark.parametrize('kwargs', [
    {'balance': 0.3}, {'balance': 'gate'}, {'balance': 'gate', 'experience': 'separate'},
    {'balance': 'learned', 'affect_kind': 'ratings', 'backbone': 'test_vit'}])
def test_the_answers_are_those_of_the_model(kwargs):
    trained, shown = build_trained(**kwargs), animals()
    answers, slopes = answer(trained, shown, gradient=True)
    r = answers.balance[:, None]
    torch.testing.assert_close(answers.regulated, (1 - r) * answers.non_emotional + r * answers.emotional)
    mean, std = (torch.tensor(trained.model.pretrained_cfg[k])[:, None, None] for k in ('mean', 'std'))
    x = (torch.from_numpy(shown.images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(answers.regulated, trained.model(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(answers.affect, trained.model.forward_affect(x), atol=1e-4, rtol=1e-4)
    if kwargs.get('affect_kind') == 'ratings':
        torch.testing.assert_close(answers.state, answers.affect.tanh())
    else:
        torch.testing.assert_close(answers.state, answers.affect.softmax(dim=1))
    assert (answers.balance.std() > 0) == (kwargs['balance'] == 'gate')
    assert slopes.shape == (5, 32, 32)
    assert slopes.min() >= 0
    assert slopes.amax(dim=(1, 2)).tolist() == [1] * 5


def test_a_model_without_classes_answers_with_affect_alone():
    trained = build_trained(num_classes=0)
    answers, slopes = answer(trained, animals())
    assert answers.affect.shape == (5, 3)
    assert answers.regulated.shape == (5, 0)
    assert slopes.numel() == 0
    assert set(describe_image(trained, answers, 0)) == {'affect_response', 'affective_state'}
    assert 'top1' not in describe_set(trained, answers, animals().targets, animals().target.names)


class Corners(nn.Module):
    """Two features: the sum of the upper left 4 x 4 pixels, and of the lower right ones."""

    def forward_features(self, x):
        return torch.stack([x[:, :, :4, :4].sum((1, 2, 3)), x[:, :, -4:, -4:].sum((1, 2, 3))], dim=1)

    def forward_head(self, x, pre_logits):
        return x


def corners(kind, weight, bias=(0., 0.)):
    head = nn.Linear(2, 2)
    head.weight.data, head.bias.data = torch.tensor(weight), torch.tensor(bias)
    return SimpleNamespace(affect_backbone=Corners(), head_affect=head, affect_kind=kind)


def test_the_gradient_shows_the_corner_that_the_strongest_emotion_depends_on():
    x = torch.zeros(1, 3, 40, 40)
    first = affect_gradient(corners('emotion', [[1., 0.], [0., 1.]], (1., 0.)), x)[0]
    assert first[:4, :4].min() > 0.3
    assert first[12:].abs().max() == 0  # a blur of 4 px reaches 8 px
    second = affect_gradient(corners('emotion', [[1., 0.], [0., 1.]], (0., 1.)), x)[0]
    torch.testing.assert_close(second, first.flip(0, 1))


def test_the_gradient_is_that_of_the_stream_that_feels():
    model, x = build_trained(experience='separate').model, torch.rand(2, 3, 32, 32)
    own = affect_gradient(model, x)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.zero_()
        assert torch.equal(affect_gradient(model, x), own)
        next(model.backbone_emo.parameters()).mul_(-1)
        assert not torch.equal(affect_gradient(model, x), own)


def test_the_gradient_of_ratings_shows_all_of_them_and_their_sign_does_not_cancel():
    x = torch.zeros(1, 3, 40, 40)
    slope = affect_gradient(corners('ratings', [[1., 0.], [-1., 1.]]), x)[0]
    assert slope[:4, :4].max() == 1  # two ratings look there, in opposite directions
    assert 0.4 < slope[-4:, -4:].max() < 0.6
    assert slope[18:22, 18:22].max() == 0


def test_the_gradient_of_a_response_that_sees_nothing_is_zero():
    assert affect_gradient(corners('emotion', [[0., 0.], [0., 0.]]), torch.zeros(2, 3, 40, 40)).abs().max() == 0


def test_the_answer_of_each_response_is_among_the_classes_shown():
    # the answer of y is the sixth of each of the others
    z = torch.tensor([[5., 4.9, 4.8, 4.7, 4.6, 0, 0, 0, 0, 0, 4.5]])
    z_emo = torch.tensor([[0., 0, 0, 0, 0, 5., 4.9, 4.8, 4.7, 4.6, 4.5]])
    y = (z + z_emo) / 2
    answers = Answers(*[torch.zeros(1, 1)] * 2, z, z_emo, y, torch.tensor([0.5]))
    assert top_classes(answers, 0)[0] == 10
    assert {0, 5, 10} <= set(top_classes(answers, 0))
    assert len(top_classes(answers, 0)) == 5
    trained = SimpleNamespace(affect_names=('joy',), model=SimpleNamespace(num_classes=11), label=lambda i: f'c{i}')
    text = describe_image(trained, answers, 0)
    assert text['answer'] == {'non_emotional': 'c0', 'emotional': 'c5', 'regulated': 'c10'}
    assert text['probability']['c10']['regulated'] == pytest.approx(y.softmax(1)[0, 10].item(), abs=1e-4)


def test_class_affect_is_mean_and_standard_error():
    state = torch.tensor([[0.1, 0.9], [0.3, 0.7], [0.5, 0.5]])
    mean, error = class_affect(state, torch.tensor([0, 0, 2]), 3)
    torch.testing.assert_close(mean[0], torch.tensor([0.2, 0.8]))
    assert mean[1].isnan().all()
    torch.testing.assert_close(mean[2], state[2])
    torch.testing.assert_close(error[0], state[:2].std(dim=0) / 2 ** 0.5)
    assert error[1:].isnan().all()
    assert largest_error(error) == pytest.approx(0.1)
    assert largest_error(error[1:]) is None


def test_changes_are_told_apart_and_sorted():
    z = torch.eye(3)[[0, 0, 1, 0, 1]]  # answers 0 0 1 0 1
    y = torch.eye(3)[[1, 2, 1, 2, 0]] * torch.tensor([1., 1, 1, 5, 1])[:, None]  # 1 2 1 2 0
    changes = changed_answers(z, y, torch.tensor([1, 1, 1, 2, 1]))
    assert changes.repaired.tolist() == [3, 0]  # the clearest first
    assert changes.broken.tolist() == [4]
    assert changes.neither.tolist() == [1]
    assert len(changes) == 4


def test_the_numbers_of_a_set():
    trained, shown = build_trained(balance='gate'), animals(8)
    answers, _ = answer(trained, shown)
    text = describe_set(trained, answers, shown.targets, shown.target.names)
    right = answers.regulated.argmax(1) == shown.targets
    before = answers.non_emotional.argmax(1) == shown.targets
    assert text['top1']['regulated'] == round(100 * right.double().mean().item(), 2)
    assert text['repaired'] - text['broken'] == right.sum() - before.sum()
    assert text['balance']['kind'] == 'gate'
    assert text['balance']['min'] < text['balance']['mean'] < text['balance']['max']
    assert text['affective_state']['cat']['joy'] == pytest.approx(answers.state[[0, 4], 0].mean().item(), abs=1e-4)


def test_the_accuracy_of_each_response_is_its_own():
    z, z_emo, y = (torch.eye(2)[answers] for answers in ([0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 1]))
    answers = Answers(*[torch.zeros(4, 1)] * 2, z, z_emo, y, torch.tensor([0.1, 0.3, 0.1, 0.3]))
    trained = SimpleNamespace(source='a model', affect_names=('joy',), model=SimpleNamespace(
        num_classes=2, regulation=SimpleNamespace(kind='gate')))
    text = describe_set(trained, answers, torch.tensor([0, 0, 0, 1]), ('cat', 'dog'))
    assert text['top1'] == {'non_emotional': 100.0, 'emotional': 50.0, 'regulated': 75.0}
    assert text['balance'] == {'kind': 'gate', 'mean': 0.2, 'sd': 0.1, 'min': 0.1, 'max': 0.3}
    assert (text['changed'], text['repaired'], text['broken']) == (1, 0, 1)
