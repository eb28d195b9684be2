"""Metrics of affect: agreement of ratings, recall of emotions; as pure functions and as timm evaluators.

Ratings (valence, arousal, ...) are judged by concordance, Pearson correlation and RMSE; emotion categories by
accuracy and unweighted average recall. Each formula is written once and serves both faces: the function, which sees
all samples together, and the evaluator, which sees them batch by batch and, if distributed, on several ranks.

Arithmetic runs in float64, whatever the inputs or autocast say (float32 on MPS, which has no float64).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator
from torch import Tensor

__all__ = ['EmotionEvaluator', 'RatingEvaluator', 'affect_evaluator', 'concordance', 'pearson', 'rmse',
           'unweighted_average_recall', 'wide_dtype']


def wide_dtype(device: torch.device) -> torch.dtype:
    """The type to sum in on `device`."""
    return torch.float32 if device.type == 'mps' else torch.float64


def _check_ratings(name: str, prediction: Tensor, target: Tensor, min_samples: int) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f'{name}: prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape; '
            'give both as (N, D) or both as (N,).'
        )
    if prediction.ndim not in (1, 2):
        raise ValueError(f'{name}: expected (N, D) or (N,), got {tuple(prediction.shape)}; flatten the samples first.')
    if prediction.shape[0] < min_samples:
        raise ValueError(
            f'{name}: {min_samples} or more samples needed, got {prediction.shape[0]}; '
            'use a larger batch, or drop the incomplete last one.'
        )


def _widen(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both tensors in the wide type, and the type of the result: the inputs' own, but never below float32."""
    result_dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    dtype = wide_dtype(prediction.device)
    return prediction.to(dtype), target.to(dtype), result_dtype


def _center(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the samples, and the deviations from it.

    The first sample is subtracted before averaging, so that a constant column deviates by exactly zero: without it,
    the rounding of the mean leaves a spurious variance of 1e-34, and two such variances a spurious correlation of 1.
    The shift is a constant to autograd: deviations do not depend on it.
    """
    shift = values[0].detach()
    shifted = values - shift
    mean = shifted.mean(0)
    return shift + mean, shifted - mean


def _moments(prediction: Tensor, target: Tensor) -> Tensor:
    """(5, D) or (5,): the two means, the two sums of squared deviations, and the sum of their products."""
    mean_p, dev_p = _center(prediction)
    mean_t, dev_t = _center(target)
    return torch.stack((
        mean_p, mean_t,
        (dev_p * dev_p).sum(0), (dev_t * dev_t).sum(0), (dev_p * dev_t).sum(0),
    ))


def _concordance(moments: Tensor, count: int) -> Tensor:
    mean_p, mean_t, square_p, square_t, product = moments
    # Population variances times N throughout: N cancels. Where the denominator is zero, so is the numerator.
    denominator = square_p + square_t + count * (mean_p - mean_t) ** 2
    return 2 * product / denominator.masked_fill(denominator == 0, 1)


def _pearson(moments: Tensor) -> Tensor:
    _, _, square_p, square_t, product = moments
    constant = (square_p == 0) | (square_t == 0)
    # The roots are taken apart, because the product of two small sums of squares can underflow; and the filling comes
    # before the roots, because the slope of a root at zero is infinite.
    scale = square_p.masked_fill(constant, 1).sqrt() * square_t.masked_fill(constant, 1).sqrt()
    return (product / scale).clamp(-1, 1)


def concordance(prediction: Tensor, target: Tensor) -> Tensor:
    """Concordance correlation coefficient (CCC) of each column; `1 - concordance(...).mean()` is a training loss.

        CCC = 2 cov(p, t) / (var(p) + var(t) + (mean(p) - mean(t))^2)

    with the population (biased, 1/N) variances and covariance of Lin's paper. Software that divides by N - 1 gives
    slightly different values for small N.

    Differentiable. The denominator is never below the variance of the target, so the gradient stays finite for a
    constant prediction without an epsilon that would bias the value. A column whose target is constant has CCC 0 and
    gradient 0: it teaches nothing.

    Args:
        prediction: (N, D) or (N,), any real type.
        target: The same shape.

    Returns:
        (D,), or a scalar for (N,) inputs, in [-1, 1]; the wider type of the inputs, at least float32. 1 is equality,
        0 no agreement. Two constant, equal columns make it 0 / 0; it is 0 there, because samples that do not
        vary are no evidence of agreement, and so that it never exceeds Pearson's correlation in magnitude.

    Raises:
        ValueError: The shapes differ or are neither (N, D) nor (N,), or there are fewer than 2 samples.

    Source: L. I. Lin, A concordance correlation coefficient to evaluate reproducibility, Biometrics 45 (1989).
    """
    _check_ratings('concordance', prediction, target, min_samples=2)
    prediction, target, result_dtype = _widen(prediction, target)
    return _concordance(_moments(prediction, target), prediction.shape[0]).to(result_dtype)


def pearson(prediction: Tensor, target: Tensor) -> Tensor:
    """Pearson correlation coefficient (PCC) of each column: agreement up to a shift and a positive scale.

        PCC = cov(p, t) / sqrt(var(p) var(t))

    Args:
        prediction: (N, D) or (N,), any real type.
        target: The same shape.

    Returns:
        (D,), or a scalar for (N,) inputs, in [-1, 1]; the wider type of the inputs, at least float32. It is 0 where
        prediction or target is constant, which leaves it undefined.

    Raises:
        ValueError: The shapes differ or are neither (N, D) nor (N,), or there are fewer than 2 samples.

    Source: K. Pearson, Note on regression and inheritance in the case of two parents, Proc. R. Soc. 58 (1895).
    """
    _check_ratings('pearson', prediction, target, min_samples=2)
    prediction, target, result_dtype = _widen(prediction, target)
    return _pearson(_moments(prediction, target)).to(result_dtype)


def rmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Root mean squared error of each column, in the unit of the ratings.

        RMSE = sqrt(mean((p - t)^2))

    A metric rather than a loss: its gradient is undefined where every error is zero.

    Args:
        prediction: (N, D) or (N,), any real type.
        target: The same shape.

    Returns:
        (D,), or a scalar for (N,) inputs, in [0, inf); the wider type of the inputs, at least float32.

    Raises:
        ValueError: The shapes differ or are neither (N, D) nor (N,), or there is no sample.
    """
    _check_ratings('rmse', prediction, target, min_samples=1)
    prediction, target, result_dtype = _widen(prediction, target)
    return ((prediction - target) ** 2).mean(0).sqrt().to(result_dtype)


def _count_hits(prediction_index: Tensor, target_index: Tensor, num_classes: int) -> Tensor:
    """(2, num_classes) int64: per target class, the samples recognised and the samples there are."""
    hits = (prediction_index == target_index).to(torch.int64)
    counts = torch.zeros(2, num_classes, dtype=torch.int64, device=target_index.device)
    # index_add rather than bincount, which makes the host wait for the GPU.
    return counts.index_add_(1, target_index.long(), torch.stack((hits, torch.ones_like(hits))))


def _mean_recall(counts: Tensor) -> Tensor:
    hits, totals = counts.to(wide_dtype(counts.device))
    recall = hits / totals.clamp(min=1)
    return recall.sum() / (totals > 0).sum().clamp(min=1)


def unweighted_average_recall(prediction_index: Tensor, target_index: Tensor, num_classes: int) -> Tensor:
    """Unweighted average recall (UAR): the mean, over the classes present in the target, of the recall.

        UAR = mean over c with N_c > 0 of (samples of class c predicted as c) / N_c

    Unlike accuracy, a frequent emotion weighs no more than a rare one. Guessing one class always gives 1 / classes.

    Args:
        prediction_index: (N,) integer class indices.
        target_index: (N,) integer class indices.
        num_classes: Indices lie in [0, num_classes).

    Returns:
        A scalar in [0, 1], float64 (float32 on MPS).

    Raises:
        ValueError: The shapes differ or are not (N,), there is no sample, or the indices are no integers or lie
            outside [0, num_classes).

    Source: B. Schuller, S. Steidl, A. Batliner, The INTERSPEECH 2009 emotion challenge.
    """
    name = 'unweighted_average_recall'
    if prediction_index.shape != target_index.shape or target_index.ndim != 1:
        raise ValueError(
            f'{name}: expected two (N,) tensors of class indices, got prediction {tuple(prediction_index.shape)} and '
            f'target {tuple(target_index.shape)}; take the argmax of logits or votes first.'
        )
    if not target_index.numel():
        raise ValueError(f'{name}: needs at least 1 sample, got 0; check that the loader is not empty.')
    for kind, index in (('prediction', prediction_index), ('target', target_index)):
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise ValueError(f'{name}: the {kind} must hold integer class indices, got {index.dtype}; convert it.')
        low, high = index.min().item(), index.max().item()
        if low < 0 or high >= num_classes:
            raise ValueError(
                f'{name}: the {kind} holds indices {low}..{high}, outside [0, {num_classes}); '
                'raise num_classes, or drop the unlabelled samples.'
            )
    return _mean_recall(_count_hits(prediction_index, target_index, num_classes))


# Rows of RatingEvaluator.state, (6, D)
MEANS = slice(0, 2)  # of prediction and target
PRODUCTS = slice(2, 5)  # squared deviations of both, and their product, summed
MOMENTS = slice(0, 5)  # what `_moments` gives
ERROR = slice(5, 6)  # sum of squared errors, which derived from the moments would cancel badly


def _merge(count_a: int, state_a: Tensor, count_b: int, state_b: Tensor) -> Tensor:
    """Statistics of the union of two disjoint sets of samples (see RatingEvaluator.state).

    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, Updating formulae and a pairwise algorithm for computing sample
    variances, Stanford STAN-CS-79-773 (1979). Raw sums of squares would lose the variance of ratings far from zero.
    """
    if not count_a or not count_b:
        return state_a if count_a else state_b
    total = count_a + count_b
    delta = state_b[MEANS] - state_a[MEANS]
    delta_p, delta_t = delta
    between = torch.stack((delta_p * delta_p, delta_t * delta_t, delta_p * delta_t)) * (count_a * count_b / total)
    return torch.cat((
        state_a[MEANS] + delta * (count_b / total),
        state_a[PRODUCTS] + state_b[PRODUCTS] + between,
        state_a[ERROR] + state_b[ERROR],
    ))


class RatingEvaluator:
    """Concordance, correlation and error of ratings over a whole data set, in timm's evaluator protocol.

    The samples are not kept: means, squared deviations and products are merged batch by batch (Chan et al.), and rank
    by rank, so that the result is that of the functions above on all samples at once, whatever the batches.

    Metrics: `loss` = 1 - ccc, over the set rather than averaged over batches; `ccc`, `pcc` and `rmse`, each the
    mean over the dimensions; `ccc_<name>` for each dimension. Ratings are meant in [-1, 1], but nothing depends on it.
    What is undefined is 0, never nan: with fewer than 2 samples ccc and pcc are 0 (so loss is 1), and rmse is 0
    before the first. Only a nan or infinity in outputs or targets shows as one: a diverged model must not be hidden.

    Args:
        device: Device for the running statistics, normally the model output device.
        names: The dimensions in the order of the columns, for example ('valence', 'arousal').
        max_samples: Ignore predictions beyond this many examples (distributed sampler padding).
    """

    default_metric = 'ccc'

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        names: Sequence[str],
        max_samples: int | None = None,
    ):
        if isinstance(names, str) or not names or len(set(names)) != len(names):
            raise ValueError(
                f'RatingEvaluator: names must be distinct names in a sequence, one per dimension, got {names!r}; '
                "for example ('valence', 'arousal')."
            )
        self.names = tuple(names)
        self.metric_names = ('loss', 'ccc', *(f'ccc_{name}' for name in self.names), 'pcc', 'rmse')
        self.device = torch.device(device or 'cpu')
        self.max_samples = max_samples
        self.reset()

    def reset(self) -> None:
        self.num_samples = 0
        self.state = torch.zeros(6, len(self.names), dtype=wide_dtype(self.device), device=self.device)

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        """Add a batch: `output` and `target` (B, D), D the number of names; B may be 0."""
        if output.ndim != 2 or output.shape != target.shape or output.shape[1] != len(self.names):
            raise ValueError(
                f'RatingEvaluator: expected output and target (B, {len(self.names)}) for {self.names}, '
                f'got {tuple(output.shape)} and {tuple(target.shape)}; give one column to each name.'
            )
        if self.max_samples is not None:
            count = max(0, self.max_samples - self.num_samples)
            output, target = output[:count], target[:count]
        count = output.shape[0]
        if not count:
            return
        output, target = output.to(self.state), target.to(self.state)
        batch = torch.cat((_moments(output, target), ((output - target) ** 2).sum(0, keepdim=True)))
        self.state = _merge(self.num_samples, self.state, count, batch)
        self.num_samples += count

    def _summary(self, count: int, state: Tensor) -> OrderedDict[str, float]:
        moments, squared_error = state[MOMENTS], state[ERROR]
        ccc = _concordance(moments, count)
        error = (squared_error[0] / max(count, 1)).sqrt()
        # One transfer to the host for all values.
        mean_ccc, pcc, error, *each = torch.cat((
            torch.stack((ccc.mean(), _pearson(moments).mean(), error.mean())), ccc,
        )).tolist()
        return OrderedDict(zip(self.metric_names, (1 - mean_ccc, mean_ccc, *each, pcc, error), strict=True))

    def summary(self) -> OrderedDict[str, float]:
        """Return local running metrics for progress logging, without collectives."""
        return self._summary(self.num_samples, self.state)

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """Return the metrics of all samples; with `distributed`, of all ranks, of which some may have none."""
        if not distributed:
            return self.summary()
        # Gathered and merged in the order of the ranks, so that each rank arrives at the same bits.
        counts = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(dist.get_world_size())]
        states = [torch.empty_like(self.state) for _ in counts]
        dist.all_gather(counts, torch.tensor(self.num_samples, device=self.device))
        dist.all_gather(states, self.state)
        total, merged = 0, torch.zeros_like(self.state)
        for count, state in zip(torch.stack(counts).tolist(), states, strict=True):
            merged = _merge(total, merged, count, state)
            total += count
        return self._summary(total, merged)


class EmotionEvaluator(ClassificationEvaluator):
    """Cross-entropy, accuracy and unweighted average recall of emotion categories, the latter two in percent.

    Targets are class indices (B,), or vote distributions (B, K), whose rows sum to 1. For votes the loss is the soft
    cross-entropy, and accuracy and recall compare with the class that got most votes, the first of them in a tie.
    All metrics are 0 before the first sample.

    Args:
        device: Device for the running totals, normally the model output device.
        num_classes: The number K of emotions.
        max_samples: Ignore predictions beyond this many examples (distributed sampler padding).
    """

    metric_names = ('loss', 'top1', 'uar')

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        num_classes: int,
        max_samples: int | None = None,
    ):
        if num_classes < 1:
            raise ValueError(f'EmotionEvaluator: num_classes must be at least 1, got {num_classes}.')
        self.num_classes = num_classes
        super().__init__(device, max_samples=max_samples)

    def reset(self) -> None:
        super().reset()
        # In the place of timm's three counts, so that its compute() reduces these over the ranks: see _count_hits.
        self.counts = torch.zeros(2, self.num_classes, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        """Add a batch: logits (B, K), and class indices (B,) or vote distributions (B, K); B may be 0."""
        batch_size = output.shape[0] if output.ndim else 0
        shape = (batch_size, self.num_classes)
        if output.shape != shape or target.shape not in (shape, shape[:1]):
            raise ValueError(
                f'EmotionEvaluator: expected logits (B, {self.num_classes}) and class indices (B,) or vote '
                f'distributions (B, {self.num_classes}), got {tuple(output.shape)} and {tuple(target.shape)}; '
                'check num_classes against the model and the data set.'
            )
        output, target = self._prepare(output, target)
        if not output.shape[0]:
            return
        if target.ndim == 2:
            target = target.float()
            target_index = target.argmax(-1)
        else:
            target_index = target
        self.loss_sum += self.criterion(output, target).to(self.loss_sum.dtype) * output.shape[0]
        best = output.topk(min(5, self.num_classes)).indices[:, 0]  # as timm does: of equal logits argmax takes others
        self.counts += _count_hits(best, target_index, self.num_classes)

    def _summary(self, loss_sum: Tensor, counts: Tensor) -> OrderedDict[str, float]:
        hits, total = counts.sum(1).tolist()
        total = max(total, 1)
        return OrderedDict(
            loss=loss_sum.item() / total,
            top1=100 * hits / total,
            uar=100 * _mean_recall(counts).item(),
        )


def affect_evaluator(target_kind: str, names: Sequence[str], device: torch.device | str = 'cpu',
                     **kwargs: Any) -> EmotionEvaluator | RatingEvaluator:
    """The evaluator of an affect response.

    Args:
        target_kind: Of its stimuli: ``'class'``, ``'votes'`` or ``'ratings'``.
        names: Name of each of its outputs.
        device: Where to count.
        kwargs: Those of the evaluator.
    """
    if target_kind == 'ratings':
        return RatingEvaluator(device, names=tuple(names), **kwargs)
    return EmotionEvaluator(device, num_classes=len(names), **kwargs)
