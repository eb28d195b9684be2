"""The metrics against independent twins: exact rational arithmetic, SciPy, and plain loops."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.task import ClassificationEvaluator
from torch.multiprocessing import start_processes

from timm_emoreg.metrics import (
    EmotionEvaluator,
    RatingEvaluator,
    concordance,
    pearson,
    rmse,
    unweighted_average_recall,
)

NAMES = ('valence', 'arousal')
hypothesis_settings = settings(deadline=None, max_examples=60, derandomize=True)


# Twins.


def twin_ccc(prediction, target):
    """Lin's formula in exact rationals; only the last conversion rounds."""
    p, t = [Fraction(float(v)) for v in prediction], [Fraction(float(v)) for v in target]
    n = len(p)
    mean_p, mean_t = sum(p) / n, sum(t) / n
    var_p = sum((v - mean_p) ** 2 for v in p) / n
    var_t = sum((v - mean_t) ** 2 for v in t) / n
    cov = sum((a - mean_p) * (b - mean_t) for a, b in zip(p, t, strict=True)) / n
    denominator = var_p + var_t + (mean_p - mean_t) ** 2
    return float(2 * cov / denominator) if denominator else 0.0


def twin_pcc(prediction, target):
    if len(set(prediction)) == 1 or len(set(target)) == 1:
        return 0.0
    return scipy.stats.pearsonr(prediction, target).statistic


def twin_rmse(prediction, target):
    errors = [float(a) - float(b) for a, b in zip(prediction, target, strict=True)]
    return math.sqrt(math.fsum(e * e for e in errors) / len(errors))


def twin_uar(prediction, target):
    recalls = []
    for label in sorted(set(target)):
        members = [p for p, t in zip(prediction, target, strict=True) if t == label]
        recalls.append(sum(p == label for p in members) / len(members))
    return sum(recalls) / len(recalls)


def twin_ratings(prediction, target):
    """All metrics of RatingEvaluator, for NumPy arrays (N, D)."""
    columns = [(prediction[:, d], target[:, d]) for d in range(prediction.shape[1])]
    ccc = [twin_ccc(*c) for c in columns]
    return {
        'loss': 1 - np.mean(ccc),
        'ccc': np.mean(ccc),
        **{f'ccc_{name}': value for name, value in zip(NAMES, ccc, strict=True)},
        'pcc': np.mean([twin_pcc(*c) for c in columns]),
        'rmse': np.mean([twin_rmse(*c) for c in columns]),
    }


def twin_emotions(logits, target):
    """All metrics of EmotionEvaluator, for NumPy arrays: logits (N, K), target (N,) or (N, K)."""
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    votes = target if target.ndim == 2 else np.eye(logits.shape[1])[target]
    prediction, label = logits.argmax(1), votes.argmax(1)
    return {
        'loss': -(votes * log_p).sum(1).mean(),
        'top1': 100 * np.mean(prediction == label),
        'uar': 100 * twin_uar(prediction.tolist(), label.tolist()),
    }


def assert_metrics(got, expected, tolerance):
    assert list(got) == list(expected)
    assert dict(got) == pytest.approx(expected, abs=tolerance, rel=0)


# Data.

# A grid makes ties, constant columns and equal columns likely, and keeps the correlations well conditioned.
ratings = st.integers(-1000, 1000).map(lambda k: k / 1000) | st.sampled_from([-1.0, 0.0, 0.1])


@st.composite
def rating_pairs(draw, columns=2):
    n = draw(st.integers(2, 24))
    column = st.lists(ratings, min_size=n, max_size=n) | ratings.map(lambda value: [value] * n)
    table = np.array([draw(column) for _ in range(2 * columns)]).T
    return table[:, :columns].copy(), table[:, columns:].copy()


@st.composite
def chunked(draw):
    """Boundaries of a random chunking, empty chunks included; `stream` appends what they leave over."""
    return np.cumsum([0, *draw(st.lists(st.integers(0, 6), max_size=12))]).tolist()


def make_ratings(n, seed=0, offset=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    target = rng.uniform(-1, 1, (n, 2))
    prediction = 0.6 * target + 0.3 * rng.normal(size=(n, 2)) + 0.1
    return offset + scale * prediction, offset + scale * target


def make_emotions(n, num_classes=4, seed=0):
    """Logits, skewed labels with some rare classes, and vote distributions."""
    rng = np.random.default_rng(seed)
    label = rng.choice(num_classes, size=n, p=np.array([8, 4, 2, 1]) / 15)
    logits = rng.normal(size=(n, num_classes)) + 1.5 * np.eye(num_classes)[label]
    votes = rng.dirichlet(np.full(num_classes, 0.5), size=n)
    return logits, label, votes


def stream(evaluator, output, target, bounds):
    output, target = torch.as_tensor(output), torch.as_tensor(target)
    for start, stop in pairwise([*bounds, max(bounds[-1], len(output))]):
        evaluator.update(output[start:stop], target[start:stop])
    return evaluator


# The functions.


@hypothesis_settings
@given(rating_pairs())
def test_functions_equal_twins(pair):
    prediction, target = pair
    p, t = torch.as_tensor(prediction), torch.as_tensor(target)
    for function, twin in ((concordance, twin_ccc), (pearson, twin_pcc), (rmse, twin_rmse)):
        expected = [twin(prediction[:, d], target[:, d]) for d in range(2)]
        assert function(p, t).tolist() == pytest.approx(expected, abs=1e-9)
        scalar = function(p[:, 0], t[:, 0])
        assert scalar.shape == ()
        assert scalar.item() == pytest.approx(expected[0], abs=1e-9)


@hypothesis_settings
@given(rating_pairs(columns=1))
def test_correlations_are_symmetric_and_ordered(pair):
    p, t = (torch.as_tensor(v[:, 0]) for v in pair)
    assert concordance(p, t).item() == pytest.approx(concordance(t, p).item(), abs=1e-12)
    assert abs(concordance(p, t)) <= abs(pearson(p, t)) + 1e-12
    assert abs(pearson(p, t)) <= 1
    assume(len(set(t.tolist())) > 1)
    assert concordance(t, t).item() == 1
    assert concordance(-t + 2 * t.mean(), t).item() == pytest.approx(-1, abs=1e-9)


def test_concordance_uses_population_variances():
    # p = (0, 2), t = (1, 5): variances 1 and 4, covariance 2, squared mean difference 4. With N - 1: 8 / 14.
    assert concordance(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 5.0])).item() == pytest.approx(4 / 9, abs=1e-7)


def test_constant_columns_are_zero():
    # 0.1 * 7 / 7 rounds, so a variance about the rounded mean would not vanish.
    constant, varying = torch.full((7,), 0.1, dtype=torch.float64), torch.linspace(-1, 1, 7, dtype=torch.float64)
    for p, t in ((constant, constant), (constant, varying), (varying, constant), (constant, -constant)):
        assert concordance(p, t).item() == 0
        assert pearson(p, t).item() == 0


@pytest.mark.parametrize(
    ('dtype', 'result_dtype'),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_result_type_and_value(dtype, result_dtype):
    prediction, target = (torch.as_tensor(v).to(dtype) for v in make_ratings(50))
    for function, twin in ((concordance, twin_ccc), (pearson, twin_pcc), (rmse, twin_rmse)):
        result = function(prediction, target)
        assert result.dtype == result_dtype
        p, t = prediction.double().numpy(), target.double().numpy()
        assert result.tolist() == pytest.approx([twin(p[:, d], t[:, d]) for d in range(2)], abs=1e-6)


def test_integer_targets():
    target = torch.tensor([0, 1, 2, 3])
    assert concordance(target.float(), target).dtype == torch.float32
    assert concordance(target, target).item() == 1


def test_not_a_number_is_not_hidden():
    prediction, target = torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0])
    for function in (concordance, pearson, rmse):
        assert function(prediction, target).isnan()


def test_large_offset():
    prediction, target = make_ratings(60, offset=1e4, scale=1e-3)
    p, t = torch.as_tensor(prediction), torch.as_tensor(target)
    exact = [twin_ccc(prediction[:, d], target[:, d]) for d in range(2)]
    # Raw sums lose the variance here: the data can tell a sound formula from a naive one.
    cov = (p * t).mean(0) - p.mean(0) * t.mean(0)
    var_p, var_t = (p * p).mean(0) - p.mean(0) ** 2, (t * t).mean(0) - t.mean(0) ** 2
    naive = 2 * cov / (var_p + var_t + (p.mean(0) - t.mean(0)) ** 2)
    assert max(abs(a - b) for a, b in zip(naive.tolist(), exact, strict=True)) > 1e-4

    assert concordance(p, t).tolist() == pytest.approx(exact, abs=1e-8)
    near = prediction - 1e4, target - 1e4
    assert pearson(p, t).tolist() == pytest.approx([twin_pcc(near[0][:, d], near[1][:, d]) for d in range(2)], abs=1e-8)
    evaluator = stream(RatingEvaluator(names=NAMES), prediction, target, [0, 1, 4, 30, 31])
    assert [evaluator.summary()[f'ccc_{name}'] for name in NAMES] == pytest.approx(exact, abs=1e-8)


def test_float32_inputs_are_computed_in_float64():
    prediction, target = (torch.as_tensor(v).float() for v in make_ratings(200, offset=100.0, scale=1e-2))
    for function, twin in ((concordance, twin_ccc), (pearson, twin_pcc), (rmse, twin_rmse)):
        expected = [twin(prediction[:, d].double().numpy(), target[:, d].double().numpy()) for d in range(2)]
        # Half a unit in the last place of a float32 result: only its own rounding, none from the way there.
        assert function(prediction, target).tolist() == pytest.approx(expected, abs=0, rel=2**-24)


# Concordance as a loss.


def test_concordance_gradient():
    prediction, target = (torch.as_tensor(v) for v in make_ratings(8))
    assert torch.autograd.gradcheck(concordance, (prediction.requires_grad_(), target.requires_grad_()))
    constant = torch.full((8, 2), 0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: concordance(p, target.detach()), (constant,))


@pytest.mark.parametrize('value', [0.0, 0.3, -1.0])
def test_gradient_of_constant_prediction_leads_out(value):
    prediction = torch.full((16,), value, requires_grad=True)
    target = torch.linspace(-1, 1, 16)
    (1 - concordance(prediction, target)).backward()
    assert prediction.grad.isfinite().all()
    # The step down the gradient moves the predictions apart, in the order of the targets.
    assert (prediction.grad.diff() < 0).all()


@pytest.mark.parametrize('value', [0.1, -0.7])
def test_gradient_of_constant_target_is_zero(value):
    target = torch.full((6,), 0.1)
    for prediction in (torch.full((6,), value), torch.linspace(-1, 1, 6)):
        prediction.requires_grad_()
        (1 - concordance(prediction, target)).backward()
        assert prediction.grad.eq(0).all()


def test_concordance_trains_under_autocast():
    torch.manual_seed(0)
    features = torch.randn(64, 8)
    target = torch.tanh(features[:, :2])
    head = torch.nn.Linear(8, 2)
    torch.nn.init.zeros_(head.weight)  # starts at constant predictions
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    losses = []
    for _ in range(60):
        with torch.autocast('cpu', torch.bfloat16):
            output = head(features)
            assert output.dtype == torch.bfloat16
            loss = 1 - concordance(output, target).mean()
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        assert head.weight.grad.isfinite().all()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == 1
    assert losses[-1] < 0.2


# Unweighted average recall.


@hypothesis_settings
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_uar_equals_loops(pairs):
    prediction, target = (list(v) for v in zip(*pairs, strict=True))
    result = unweighted_average_recall(torch.tensor(prediction), torch.tensor(target), 5)
    assert result.item() == pytest.approx(twin_uar(prediction, target), abs=1e-12)
    one = unweighted_average_recall(torch.full((len(target),), target[0]), torch.tensor(target), 5)
    assert one.item() == pytest.approx(1 / len(set(target)), abs=1e-12)


def test_uar_ignores_absent_classes_and_takes_small_integers():
    prediction = torch.tensor([0, 2, 2, 1], dtype=torch.uint8)
    target = torch.tensor([0, 0, 2, 2], dtype=torch.uint8)
    assert unweighted_average_recall(prediction, target, 9).item() == 0.5


# The evaluators on one process.


@hypothesis_settings
@given(rating_pairs(), chunked())
def test_rating_stream_equals_whole(pair, bounds):
    prediction, target = pair
    evaluator = stream(RatingEvaluator(names=NAMES), prediction, target, bounds)
    assert_metrics(evaluator.compute(), twin_ratings(prediction, target), 1e-9)
    p, t = torch.as_tensor(prediction), torch.as_tensor(target)
    assert evaluator.summary()['ccc'] == pytest.approx(concordance(p, t).mean().item(), abs=1e-9)


@hypothesis_settings
@given(st.integers(1, 30), st.integers(0, 1000), chunked(), st.booleans())
def test_emotion_stream_equals_whole(n, seed, bounds, soft):
    logits, label, votes = make_emotions(n, seed=seed)
    target = votes if soft else label
    evaluator = stream(EmotionEvaluator(num_classes=4), logits, target, bounds)
    # timm's protocol computes the loss of a batch in float32.
    assert_metrics(evaluator.compute(), twin_emotions(logits, target), 1e-5)
    index = torch.as_tensor(target).argmax(-1) if soft else torch.as_tensor(target)
    uar = unweighted_average_recall(torch.as_tensor(logits).topk(4).indices[:, 0], index, 4)
    assert evaluator.summary()['uar'] == pytest.approx(100 * uar.item(), abs=1e-9)


def test_of_equal_logits_the_class_is_the_one_that_timm_counts():
    # 16 bits make many of them; predictions.csv has this class, too
    logits = (torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * 0.3).bfloat16()
    target = torch.arange(4000) % 8
    assert not torch.equal(logits.float().topk(5).indices[:, 0], logits.float().argmax(1))
    ours, theirs = EmotionEvaluator(num_classes=8), ClassificationEvaluator()
    for evaluator in (ours, theirs):
        evaluator.update(logits, target)
    assert ours.compute()['top1'] == theirs.compute()['top1']


def test_one_hot_votes_equal_indices():
    logits, label, _ = make_emotions(30)
    by_index = stream(EmotionEvaluator(num_classes=4), logits, label, [0, 11])
    by_vote = stream(EmotionEvaluator(num_classes=4), logits, np.eye(4, dtype=np.int64)[label], [0, 11])
    assert_metrics(by_vote.compute(), by_index.compute(), 1e-6)


def test_half_precision_batches():
    prediction, target = make_ratings(40)
    prediction = torch.as_tensor(prediction).bfloat16()
    evaluator = RatingEvaluator(names=NAMES)
    evaluator.update(prediction, torch.as_tensor(target))
    assert_metrics(evaluator.summary(), twin_ratings(prediction.double().numpy(), target), 1e-9)


def test_protocol():
    for evaluator in (RatingEvaluator('cpu', names=NAMES), EmotionEvaluator('cpu', num_classes=4)):
        assert evaluator.device == torch.device('cpu')
        assert evaluator.max_samples is None
        assert tuple(evaluator.summary()) == tuple(evaluator.compute(distributed=False)) == evaluator.metric_names
        assert evaluator.default_metric in evaluator.metric_names
    assert RatingEvaluator(names=NAMES).metric_names == ('loss', 'ccc', 'ccc_valence', 'ccc_arousal', 'pcc', 'rmse')
    assert RatingEvaluator.default_metric == 'ccc'
    assert EmotionEvaluator.default_metric == 'top1'
    assert EmotionEvaluator.metric_names == ('loss', 'top1', 'uar')


def test_rating_summary_of_none_and_one():
    evaluator = RatingEvaluator(names=NAMES)
    empty = {'loss': 1, 'ccc': 0, 'ccc_valence': 0, 'ccc_arousal': 0, 'pcc': 0, 'rmse': 0}
    assert evaluator.summary() == empty
    evaluator.update(torch.zeros(0, 2), torch.zeros(0, 2))
    assert evaluator.summary() == empty
    evaluator.update(torch.tensor([[0.5, 0.0]]), torch.tensor([[0.0, 0.25]]))
    assert evaluator.summary() == empty | {'rmse': 0.375}


def test_emotion_summary_of_none_and_one():
    evaluator = EmotionEvaluator(num_classes=3)
    assert evaluator.summary() == {'loss': 0, 'top1': 0, 'uar': 0}
    evaluator.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert evaluator.summary() == {'loss': 0, 'top1': 0, 'uar': 0}
    evaluator.update(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([2]))
    assert evaluator.summary() == pytest.approx({'loss': math.log(2 + math.e) - 1, 'top1': 100, 'uar': 100}, abs=1e-6)


def test_reset_forgets():
    prediction, target = make_ratings(20)
    evaluator = stream(RatingEvaluator(names=NAMES), target, -target, [0, 3])
    evaluator.reset()
    stream(evaluator, prediction, target, [0, 7])
    assert_metrics(evaluator.compute(), twin_ratings(prediction, target), 1e-9)

    logits, label, _ = make_emotions(20)
    evaluator = stream(EmotionEvaluator(num_classes=4), -logits, label, [0, 3])
    evaluator.reset()
    stream(evaluator, logits, label, [0, 7])
    assert_metrics(evaluator.compute(), twin_emotions(logits, label), 1e-5)


@pytest.mark.parametrize('bounds', [[0, 5, 10], [0, 13], [0, 12, 16], [0]])
def test_max_samples_drops_the_padding(bounds):
    prediction, target = make_ratings(20)
    evaluator = stream(RatingEvaluator(names=NAMES, max_samples=13), prediction, target, bounds)
    assert evaluator.num_samples == 13
    assert_metrics(evaluator.compute(), twin_ratings(prediction[:13], target[:13]), 1e-9)

    logits, label, votes = make_emotions(20)
    for labels in (label, votes):
        evaluator = stream(EmotionEvaluator(num_classes=4, max_samples=13), logits, labels, bounds)
        assert evaluator.num_samples == 13
        assert_metrics(evaluator.compute(), twin_emotions(logits[:13], labels[:13]), 1e-5)


def test_updates_keep_no_graph():
    evaluator = RatingEvaluator(names=NAMES)
    evaluator.update(torch.rand(4, 2, requires_grad=True), torch.rand(4, 2))
    assert not evaluator.state.requires_grad
    evaluator = EmotionEvaluator(num_classes=3)
    evaluator.update(torch.rand(4, 3, requires_grad=True), torch.arange(4) % 3)
    assert not evaluator.loss_sum.requires_grad


# The evaluators on two processes.

# The samples of rank 0, the samples of rank 1, and max_samples of rank 1.
SPLITS = {
    'uneven': (17, 6, None),
    'none on rank 0': (0, 23, None),
    'none on rank 1': (23, 0, None),
    'padded': (12, 12, 11),
}


def run_rank(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    results = {}
    for name, (first, second, limit) in SPLITS.items():
        own = slice(0, first) if rank == 0 else slice(first, first + second)
        limit = limit if rank == 1 else None
        prediction, target = make_ratings(24, offset=100.0)
        logits, label, votes = make_emotions(24)
        evaluators = {
            'ratings': (RatingEvaluator(names=NAMES, max_samples=limit), prediction, target),
            'indices': (EmotionEvaluator(num_classes=4, max_samples=limit), logits, label),
            'votes': (EmotionEvaluator(num_classes=4, max_samples=limit), logits, votes),
        }
        for kind, (evaluator, output, labels) in evaluators.items():
            stream(evaluator, output[own], labels[own], [0, 5, 6])
            local = evaluator.summary()
            # Twice, because computing must not fold the other rank's samples into this one's.
            results[name, kind] = evaluator.compute(distributed=True), evaluator.compute(distributed=True)
            assert evaluator.summary() == local
    untouched = RatingEvaluator(names=NAMES), EmotionEvaluator(num_classes=4)
    results['empty'] = [evaluator.compute(distributed=True) for evaluator in untouched]
    torch.save(results, f'{folder}/rank{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def rank_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    start_processes(run_rank, args=(str(folder),), nprocs=2, start_method='forkserver')
    return [torch.load(folder / f'rank{rank}.pt', weights_only=False) for rank in range(2)]


@pytest.mark.parametrize('split', SPLITS)
def test_two_ranks_equal_whole(rank_results, split):
    prediction, target = make_ratings(24, offset=100.0)
    logits, label, votes = make_emotions(24)
    # 23 samples each: in the padded split, the last one is what the limit drops.
    expected = {
        'ratings': (twin_ratings(prediction[:23], target[:23]), 1e-9),
        'indices': (twin_emotions(logits[:23], label[:23]), 1e-5),
        'votes': (twin_emotions(logits[:23], votes[:23]), 1e-5),
    }
    for kind, (metrics, tolerance) in expected.items():
        first, again = rank_results[0][split, kind]
        assert_metrics(first, metrics, tolerance)
        assert first == again
        assert rank_results[1][split, kind] == (first, again)


def test_two_ranks_without_samples(rank_results):
    for results in rank_results:
        rating, emotion = results['empty']
        assert rating == RatingEvaluator(names=NAMES).summary()
        assert emotion == EmotionEvaluator(num_classes=4).summary()


# Errors.


@pytest.mark.parametrize('function', [concordance, pearson, rmse])
def test_rating_function_errors(function):
    name, least = function.__name__, 1 if function is rmse else 2
    cases = [
        (
            torch.zeros(4, 2),
            torch.zeros(4),
            f'{name}: prediction (4, 2) and target (4,) differ in shape; give both as (N, D) or both as (N,).',
        ),
        (
            torch.zeros(4, 2, 1),
            torch.zeros(4, 2, 1),
            f'{name}: expected (N, D) or (N,), got (4, 2, 1); flatten the samples first.',
        ),
        (
            torch.zeros(least - 1, 2),
            torch.zeros(least - 1, 2),
            f'{name}: {least} or more samples needed, got {least - 1}; '
            'use a larger batch, or drop the incomplete last one.',
        ),
    ]
    for prediction, target, message in cases:
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
            function(prediction, target)
        assert str(error.value) == message
    assert rmse(torch.ones(1), torch.zeros(1)).item() == 1


@pytest.mark.parametrize(
    ('prediction', 'target', 'message'),
    [
        (
            torch.zeros(3, 5),
            torch.zeros(3, dtype=torch.long),
            'expected two (N,) tensors of class indices, got prediction (3, 5) and target (3,); '
            'take the argmax of logits or votes first.',
        ),
        (
            torch.zeros(3, 5),
            torch.zeros(3, 5),
            'expected two (N,) tensors of class indices, got prediction (3, 5) and target (3, 5); '
            'take the argmax of logits or votes first.',
        ),
        (
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, dtype=torch.long),
            'needs at least 1 sample, got 0; check that the loader is not empty.',
        ),
        (
            torch.zeros(3),
            torch.zeros(3, dtype=torch.long),
            'the prediction must hold integer class indices, got torch.float32; convert it.',
        ),
        (
            torch.tensor([0, 1]),
            torch.tensor([True, False]),
            'the target must hold integer class indices, got torch.bool; convert it.',
        ),
        (
            torch.tensor([0, 5]),
            torch.tensor([0, 1]),
            'the prediction holds indices 0..5, outside [0, 5); raise num_classes, or drop the unlabelled samples.',
        ),
        (
            torch.tensor([0, 1]),
            torch.tensor([-1, 4]),
            'the target holds indices -1..4, outside [0, 5); raise num_classes, or drop the unlabelled samples.',
        ),
    ],
)
def test_uar_errors(prediction, target, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        unweighted_average_recall(prediction, target, 5)
    assert str(error.value) == f'unweighted_average_recall: {message}'


@pytest.mark.parametrize('names', ['valence', (), ('valence', 'valence')])
def test_rating_names_errors(names):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        RatingEvaluator(names=names)
    assert str(error.value) == (
        f'RatingEvaluator: names must be distinct names in a sequence, one per dimension, got {names!r}; '
        "for example ('valence', 'arousal')."
    )


@pytest.mark.parametrize(('output', 'target'), [((4, 3), (4, 3)), ((4, 2), (4, 1)), ((4, 2), (3, 2)), ((4,), (4,))])
def test_rating_update_errors(output, target):
    evaluator = RatingEvaluator(names=NAMES)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        evaluator.update(torch.zeros(output), torch.zeros(target))
    assert str(error.value) == (
        f"RatingEvaluator: expected output and target (B, 2) for ('valence', 'arousal'), got {output} and {target}; "
        'give one column to each name.'
    )
    assert evaluator.num_samples == 0


def test_emotion_num_classes_error():
    with pytest.raises(ValueError, match=r'^EmotionEvaluator: num_classes must be at least 1, got 0\.$'):
        EmotionEvaluator(num_classes=0)


@pytest.mark.parametrize(
    ('output', 'target'), [((4, 3), (4,)), ((4, 5), (3,)), ((4, 5), (4, 3)), ((4, 5), (4, 1)), ((5,), (5,)), ((), ())]
)
def test_emotion_update_errors(output, target):
    evaluator = EmotionEvaluator(num_classes=5)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        evaluator.update(torch.zeros(output), torch.zeros(target))
    assert str(error.value) == (
        'EmotionEvaluator: expected logits (B, 5) and class indices (B,) or vote distributions (B, 5), '
        f'got {output} and {target}; check num_classes against the model and the data set.'
    )
    assert evaluator.num_samples == 0
