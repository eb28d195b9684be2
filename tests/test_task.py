from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup

import timm_emoreg  # noqa: F401  registers the models
from timm_emoreg.metrics import concordance
from timm_emoreg.task import AffectTask, ConcordanceLoss, EmoRegTask

B, C, K = 6, 5, 4


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs = {'backbone': 'test_vit', 'img_size': 32, 'num_classes': C, 'num_affect': K, **kwargs}
    model = timm.create_model('emoreg', **kwargs)
    if model.modulation is not None:  # both start at zero, which would hide errors
        for part in (model.modulation.gain, model.modulation.shift):
            torch.nn.init.normal_(part.weight, std=0.5)
    if model.regulation.kind == 'gate':  # so does this, and every image had the same balance
        torch.nn.init.normal_(model.regulation.gate.weight)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, 32, 32, generator=generator), torch.randint(0, C, (B,), generator=generator)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def responses(model, x):
    model.train()
    z, z_emo, _, r = model.forward_responses(x)
    return z, z_emo, r


# -- stage 2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('balance', [0.0, 0.3, 1.0, 'learned', 'gate'])
def test_prediction_is_balanced_before_the_loss(batch, balance):
    x, target = batch
    task = EmoRegTask(make(balance=balance))
    result = task.train()(x, target)
    z, z_emo, r = responses(task.trainable_module, x)
    y = (1 - r) * z + r * z_emo
    log_p = y - y.exp().sum(1, keepdim=True).log()
    torch.testing.assert_close(result['loss'], -log_p[torch.arange(B), target].mean())
    torch.testing.assert_close(result['output'], y)
    torch.testing.assert_close(result['balance'], r.mean())
    assert set(result) == {'loss', 'output', 'loss_non_emotional', 'loss_emotional', 'balance'}


def test_parts_are_the_losses_of_the_responses_and_carry_no_gradient(batch):
    x, target = batch
    for balanced_in in ('prediction', 'loss'):
        task = EmoRegTask(make(balance=0.3), balanced_in)
        result = task.train()(x, target)
        z, z_emo, _ = responses(task.trainable_module, x)
        for name, value in (('loss_non_emotional', F.cross_entropy(z, target)),
                            ('loss_emotional', F.cross_entropy(z_emo, target)), ('balance', torch.tensor(0.3))):
            torch.testing.assert_close(result[name], value)
            assert not result[name].requires_grad
        assert result['loss'].requires_grad


def test_loss_is_balanced_after_the_loss(batch):
    x, target = batch
    task, twin = EmoRegTask(make(balance=0.3), 'loss'), make(balance=0.3)
    loss = task.train()(x, target)['loss']
    loss.backward()
    z, z_emo, _ = responses(twin, x)
    expected = 0.7 * F.cross_entropy(z, target) + 0.3 * F.cross_entropy(z_emo, target)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    in_prediction = EmoRegTask(make(balance=0.3)).train()(x, target)['loss']
    assert abs(loss.item() - in_prediction.item()) > 1e-4  # the two places differ, or this test could not fail
    for (name, p), q in zip(task.trainable_module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f'{name}: {m}')


@pytest.mark.parametrize('balance', ['learned', 'gate'])
def test_a_trained_balance_in_the_loss_is_refused(batch, balance):
    with pytest.raises(ValueError, match=f"balance='{balance}' cannot be balanced in the loss.*smaller of the two"):
        EmoRegTask(make(balance=balance), 'loss')
    task = EmoRegTask(make(balance=0.3), 'loss')
    task.trainable_module.balance = balance  # one of the first image would have been taken for all
    with pytest.raises(ValueError, match=f"balance='{balance}' cannot be balanced in the loss"):
        task.train()(*batch)
    with pytest.raises(ValueError, match="balanced_in='both' is unknown"):
        EmoRegTask(make(), 'both')
    with pytest.raises(ValueError, match='num_classes=0, so there is no response to train'):
        EmoRegTask(make(num_classes=0))
    with pytest.raises(ValueError, match='keep_affect=1 has nothing to keep'):
        EmoRegTask(make(experience='separate'), keep_affect=1)


@pytest.mark.parametrize('balanced_in', ['prediction', 'loss'])
def test_soft_targets_and_smoothing(batch, balanced_in):
    x, target = batch
    soft_x, soft = Mixup(1.0, num_classes=C, label_smoothing=0.1)(x.clone(), target)
    smooth = torch.full((B, C), 0.2 / C).scatter_add_(1, target[:, None], torch.full((B, 1), 0.8))
    for kwargs, given_x, given, meant in (({'soft_targets': True}, soft_x, soft, soft),
                                          ({'smoothing': 0.2}, x, target, smooth)):
        task = EmoRegTask(make(balance=0.3), balanced_in, criterion_kwargs=kwargs)
        loss = task.train()(given_x, given)['loss']
        z, z_emo, r = responses(task.trainable_module, given_x)

        def cross_entropy(logits, meant=meant):
            return -(meant * logits.log_softmax(1)).sum(1).mean()

        expected = cross_entropy((1 - r) * z + r * z_emo) if balanced_in == 'prediction' else (
            0.7 * cross_entropy(z) + 0.3 * cross_entropy(z_emo))
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize('kind', ['emotion', 'ratings'])
@pytest.mark.parametrize('balanced_in', ['prediction', 'loss'])
def test_affect_response_is_kept_close_to_what_it_was(batch, kind, balanced_in):
    x, target = batch
    kwargs = {'balance': 0.3, 'affect_kind': kind, 'modulation': False}
    model, before = make(**kwargs), make(**kwargs).eval()
    task = EmoRegTask(model, balanced_in, keep_affect=2.0).train()
    assert not task.before.training
    assert task(x, target)['loss_affect'].abs() < 1e-6
    with torch.no_grad():
        model.head_affect.weight.add_(0.3)
        model.backbone.norm.weight.mul_(1.5)
    result = task(x, target)
    a, a_before = model.forward_affect(x), before.forward_affect(x)
    if kind == 'emotion':
        p, p_before = a.softmax(1), a_before.softmax(1)
        expected = (p_before * (p_before / p).log()).sum(1).mean()
    else:
        expected = ((a - a_before) ** 2).mean()
    assert expected > 1e-3
    torch.testing.assert_close(result['loss_affect'], expected)
    without = EmoRegTask(copy.deepcopy(model), balanced_in).train()(x, target)['loss']
    torch.testing.assert_close(result['loss'], without + 2 * expected)
    assert not result['loss_affect'].requires_grad
    result['loss'].backward()
    assert model.head_affect.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in task.before.parameters())
    assert set(task.get_checkpoint_state()['state_dict']) == set(model.state_dict())  # the frozen copy is not saved


def test_losses_are_float32_under_autocast(batch):
    x, target = batch
    for balanced_in in ('prediction', 'loss'):
        task = EmoRegTask(make(balance=0.25, affect_kind='ratings'), balanced_in)
        exact = task.train()(x, target)
        with torch.autocast('cpu', torch.bfloat16):
            result = task(x, target)
        for name in ('loss', 'loss_non_emotional', 'loss_emotional', 'balance'):
            assert result[name].dtype == torch.float32
            torch.testing.assert_close(result[name], exact[name], atol=0.05, rtol=0.02)
        result['loss'].backward()
        assert all(p.grad.isfinite().all() for p in task.parameters())


def test_train_gives_parts_and_eval_gives_one_tensor(batch):
    x, target = batch
    task = EmoRegTask(make(balance=0.3))
    task.eval()
    y = task.get_eval_model()(x)
    assert y.shape == (B, C)
    with torch.no_grad():
        assert torch.equal(task(x, target)['output'], y)  # a task judges a batch in this mode, too
    evaluator = task.create_evaluator()
    evaluator.update(y, target)
    assert evaluator.compute()['top1'] == pytest.approx(100 * (y.argmax(1) == target).double().mean().item())


@pytest.mark.parametrize('kwargs', [
    {'balance': 'gate'}, {'modulation': False}, {'experience': 'separate'}, {'balance': 'learned', 'modulation': False},
])
def test_every_trainable_parameter_gets_a_gradient(batch, kwargs):
    task = EmoRegTask(make(**kwargs))
    task.train()(*batch)['loss'].backward()
    for name, p in task.trainable_module.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


def test_clipping_leaves_out_exactly_the_heads():
    model = make(balance='gate')
    task = EmoRegTask(model)
    names = {id(p): name for name, p in model.named_parameters()}
    every = [names[id(p)] for p in task.get_clip_parameters()]
    assert every == list(names.values())
    kept = [names[id(p)] for p in task.get_clip_parameters(exclude_head=True)]
    assert set(every) - set(kept) == {'head.weight', 'head.bias', 'head_emo.weight', 'head_emo.bias'}


def test_a_model_may_go_from_stage_1_to_stage_2(batch):
    for kwargs in ({'balance': 'gate'}, {'modulation': False}, {'balance': 'gate', 'modulation': False}):
        expected = {name: p.requires_grad for name, p in make(**kwargs).named_parameters()}
        model = make(**kwargs)
        AffectTask(model, 'class', tuple('abcd'))
        task = EmoRegTask(model)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == expected
        assert task.train()(*batch)['output'].shape == (B, C)


def test_what_the_user_froze_stays_frozen():
    model = make()
    for part in (model.head, model.modulation):
        part.requires_grad_(False)
    EmoRegTask(model)
    frozen = {name.partition('.')[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {'head', 'modulation'}


@pytest.mark.parametrize('kind', ['class', 'votes', 'ratings'])
def test_rehearsal_adds_the_loss_of_stage_1(batch, kind):
    x, target = batch
    stimuli, labels = affect_batch(kind)
    model = make(affect_kind='ratings' if kind == 'ratings' else 'emotion', modulation=False)
    AffectTask(model, kind, tuple('abcd'))  # as after stage 1
    alone = EmoRegTask(copy.deepcopy(model)).train()(x, target)['loss']
    stage_1 = AffectTask(copy.deepcopy(model), kind, tuple('abcd'), smoothing=0.3).train()(stimuli, labels)['loss']
    task = EmoRegTask(model, rehearsal=3.0, stimuli_kind=kind, stimuli_smoothing=0.3)
    result = task.train()(x, target, stimuli, labels)
    torch.testing.assert_close(result['loss_rehearsal'], stage_1.detach())
    torch.testing.assert_close(result['loss'], alone + 3 * stage_1)
    result['loss'].backward()
    assert model.head_affect.weight.grad.abs().sum() > 0
    assert not result['loss_rehearsal'].requires_grad


def test_rehearsal_leaves_no_trace_in_the_running_statistics(batch):
    x, target = batch
    model = make(backbone='test_resnet', img_size=None)
    after = []
    for stimuli in ((), affect_batch('class'), (100 * affect_batch('class')[0], affect_batch('class')[1])):
        task = EmoRegTask(copy.deepcopy(model), rehearsal=1.0 if stimuli else 0.0)
        task.train()(x, target, *stimuli)['loss'].backward()
        after.append({k: v.clone() for k, v in task.trainable_module.named_buffers()})
        norms = [m for m in task.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert len(norms) > 5
        assert all(m.track_running_stats for m in norms)
    assert any('running_mean' in k for k in after[0])
    for other in after[1:]:
        assert all(torch.equal(v, other[k]) for k, v in after[0].items())


def test_rehearsal_and_stimuli_come_together(batch):
    model, stimuli = make(), affect_batch('class')
    with pytest.raises(ValueError, match=r'rehearsal=0\.0 and stimuli belong together: give both, or neither'):
        EmoRegTask(model).train()(*batch, *stimuli)
    task = EmoRegTask(model, rehearsal=1.0)
    with pytest.raises(ValueError, match=r'rehearsal=1\.0 and stimuli belong together'):
        task.train()(*batch)
    task.eval()
    assert 'loss_rehearsal' not in task(*batch)  # a validation has none
    expected = task.affect_criterion(model.forward_affect(stimuli[0]), stimuli[1])
    assert task(*batch, *stimuli)['loss_rehearsal'] == pytest.approx(expected.item())


def test_averaged_weights_and_checkpoint_state(batch):
    x, target = batch
    task = EmoRegTask(make(balance='learned'))
    task.setup_ema(decay=0.5)
    start = task.trainable_module.head.weight.detach().clone()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    task.train()(x, target)['loss'].backward()
    optimizer.step()
    task.update_ema()
    now = task.trainable_module.head.weight.detach()
    averaged = task.get_eval_model(ema=True)
    torch.testing.assert_close(averaged.module.head.weight, (start + now) / 2)
    averaged.eval()
    assert averaged(x).shape == (B, C)

    other = EmoRegTask(make(seed=5, balance='learned'))
    other.setup_ema(decay=0.5)
    for ema in (False, True):
        state = task.get_checkpoint_state(ema=ema)
        other.load_checkpoint_state(state['state_dict_ema' if ema else 'state_dict'], ema=ema)
        for model in (task, other):
            model.get_eval_model(ema=ema).eval()
        assert torch.equal(other.get_eval_model(ema=ema)(x), task.get_eval_model(ema=ema)(x))


@pytest.mark.usefixtures('process_group')
@pytest.mark.parametrize('stage', [1, 2, 'rehearsal'])
def test_wrapped_for_distributed_training(batch, stage):
    def build():
        model = make(balance='gate', experience='shared')
        if stage == 1:
            return AffectTask(model, 'class', tuple('abcd'))
        return EmoRegTask(model, rehearsal=0.7 if stage == 'rehearsal' else 0.0)

    x, target = batch[0], batch[1] % K
    batch = x, target, *(affect_batch('class') if stage == 'rehearsal' else ())
    plain, task = build(), build()
    task.prepare_distributed()
    for one in (plain, task):
        for _ in range(2):  # the second pass fails where the first left a parameter without gradient
            one.train()(*batch)['loss'].backward()
    for p, q in zip(plain.trainable_module.parameters(), task.trainable_module.module.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
    assert len(task.get_clip_parameters(exclude_head=True)) == len(plain.get_clip_parameters(exclude_head=True))
    assert list(task.get_checkpoint_state()['state_dict']) == list(plain.trainable_module.state_dict())


# -- stage 1 -----------------------------------------------------------------------------------------------------------


def affect_batch(kind):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, 3, 32, 32, generator=generator)
    return x, {'class': torch.randint(0, K, (B,), generator=generator),
               'votes': torch.rand(B, K, generator=generator).softmax(1),
               'ratings': torch.rand(B, K, generator=generator) * 2 - 1}[kind]


@pytest.mark.parametrize('kind', ['class', 'votes', 'ratings'])
def test_affect_loss_and_metrics(kind):
    x, target = affect_batch(kind)
    task = AffectTask(make(affect_kind='ratings' if kind == 'ratings' else 'emotion'), kind, tuple('abcd'))
    result = task.train()(x, target)
    a = task.trainable_module.forward_affect(x)
    torch.testing.assert_close(result['output'], a)
    expected = {'class': lambda: F.cross_entropy(a, target), 'votes': lambda: F.cross_entropy(a, target),
                'ratings': lambda: 1 - concordance(a, target).mean() + (a - target).square().mean()}[kind]()
    torch.testing.assert_close(result['loss'], expected)
    result['loss'].backward()
    for name, p in task.trainable_module.named_parameters():
        trained = name.startswith(('backbone.', 'head_affect.'))
        assert p.requires_grad == trained == (p.grad is not None), name

    task.eval()
    evaluator = task.create_evaluator()
    evaluator.update(task.get_eval_model()(x), target)
    scores = evaluator.compute()
    assert ('ccc_a' if kind == 'ratings' else 'uar') in scores
    assert task.get_checkpoint_state()['task_state'] == {'target_kind': kind, 'names': list('abcd')}


def test_affect_smoothing_is_for_classes():
    x, target = affect_batch('class')
    task = AffectTask(make(), 'class', tuple('abcd'), smoothing=0.4)
    result = task.train()(x, target)
    torch.testing.assert_close(result['loss'], F.cross_entropy(result['output'], target, label_smoothing=0.4))


def test_affect_without_modulation_still_trains_the_affect_response():
    task = AffectTask(make(modulation=False), 'class', tuple('abcd'))
    task.train()(*affect_batch('class'))['loss'].backward()
    assert task.trainable_module.head_affect.weight.grad.abs().sum() > 0


def test_affect_leaves_frozen_parameters_of_the_backbone():
    model = make()
    model.backbone.pos_embed.requires_grad_(False)
    AffectTask(model, 'class', tuple('abcd'))
    assert not model.backbone.pos_embed.requires_grad


@pytest.mark.parametrize(('kwargs', 'kind', 'names', 'message'), [
    ({}, 'ratings', 'abcd', r"ask for affect_kind='ratings' with num_affect=4 \(a, b, c, d\), the model has "
                            r"affect_kind='emotion' with num_affect=4"),
    ({}, 'class', 'abc', r"num_affect=3 \(a, b, c\), the model has affect_kind='emotion' with num_affect=4"),
    ({'affect_kind': 'ratings'}, 'votes', 'abcd', "ask for affect_kind='emotion'"),
    ({'experience': 'separate'}, 'class', 'abcd', "Stage 1 trains one backbone.*experience='shared'"),
])
def test_models_that_do_not_fit_the_stimuli_are_refused(kwargs, kind, names, message):
    with pytest.raises(ValueError, match=message):
        AffectTask(make(**kwargs), kind, tuple(names))


def test_affect_clipping_leaves_out_the_affect_response():
    model = make(num_classes=0)
    task = AffectTask(model, 'class', tuple('abcd'))
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for p in task.get_clip_parameters(exclude_head=True)}
    assert set(names.values()) - kept == {'head_affect.weight', 'head_affect.bias'}
    assert len(task.get_clip_parameters()) == len(names)


def test_one_rated_image_alone_teaches_by_its_error():
    output, target = torch.zeros(1, 4, requires_grad=True), affect_batch('ratings')[1][:1]
    loss = ConcordanceLoss()(output, target)
    torch.testing.assert_close(loss, 1 + target.square().mean())
    loss.backward()
    assert (output.grad * target < 0).all()  # a step against it goes towards the target


def test_concordance_loss_brings_back_predictions_that_drifted_off():
    target = affect_batch('ratings')[1]
    output = torch.nn.Parameter(target.flip(0) * 0.01 + 5)  # next to no variance, far off, the wrong order
    optimizer = torch.optim.SGD([output], lr=2)
    for _ in range(200):
        optimizer.zero_grad()
        ConcordanceLoss()(output, target).backward()
        optimizer.step()
    assert concordance(output.detach(), target).mean() > 0.9


def test_concordance_loss_learns_a_line():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 3, generator=generator)
    target = (x @ torch.tensor([[0.5, 0.0], [0.0, -0.5], [0.2, 0.1]]) + 0.1).tanh()
    model = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(60):
        loss = ConcordanceLoss()(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1  # a constant agrees with nothing
    assert losses[-1] < 0.1
