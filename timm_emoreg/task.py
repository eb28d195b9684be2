"""The two training tasks, on timm's task interface: loss and model in one place, no emotion in the training loop."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import create_classification_loss
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .data import Target
from .emoreg import EmoReg
from .metrics import EmotionEvaluator, RatingEvaluator, affect_evaluator, concordance
from .regulation import check_balanced_in, check_regulation, regulate

__all__ = ['AffectTask', 'ConcordanceLoss', 'EmoRegTask']


class ConcordanceLoss(nn.Module):
    """``1 - CCC + MSE``, both the mean over the rating dimensions: (B, D) and (B, D) to a scalar of at least 0.

    The concordance alone holds nothing in place: predictions far off all targets have CCC near 0 and next to no
    gradient, and a network whose predictions drifted there (a ViT does within its first epoch) never comes back. The
    squared error brings it back, and weighs little once predictions are on the scale [-1, 1].

    One image alone neither agrees nor disagrees: with B = 1 the CCC counts as 0.
    """

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        output = output.float()
        error = F.mse_loss(output, target)
        if len(output) == 1:
            return 1 + error
        return 1 - concordance(output, target).mean() + error


def _parameters_without(model: nn.Module, left_out: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of `model` in their order, but for those of the modules `left_out`."""
    ids = {id(p) for module in left_out for p in module.parameters()}
    return [p for p in model.parameters() if id(p) not in ids]


def _affect_criterion(target_kind: str, smoothing: float = 0.0) -> nn.Module:
    """The loss of an affect response for targets of that kind (see `AffectTask`)."""
    if target_kind == 'ratings':
        return ConcordanceLoss()
    return create_classification_loss(smoothing=smoothing, soft_targets=target_kind == 'votes')


@contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norm in train mode goes by its batch as ever, but does not remember it."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class AffectTask(ClassificationTask):
    """Stage 1: train backbone and affect response on stimuli.

    Only these two are trained; heads, modulation and balance are left as they are and need no gradient. The loss is
    that of the affect response, the ``output`` of `forward`; a batch of ratings should hold many images, because their
    agreement is judged within it - with several processes or accumulation steps, within each one's share.

    Args:
        model: The model; its forward gives the affect response from here on.
        target_kind: ``'class'`` (cross-entropy on (B,) indices), ``'votes'`` (cross-entropy on (B, K) distributions)
            or ``'ratings'`` (``1 - CCC + MSE`` on (B, D) ratings in [-1, 1]).
        names: Name of each affect output.
        smoothing: Label smoothing, ``'class'`` only.
        device: Device for task tensors.
        verbose: Whether timm's base class logs what the task is made of.

    Raises:
        ValueError: If the model's affect response does not fit the target, or the model has ``experience='separate'``.
    """

    def __init__(
            self,
            model: EmoReg,
            target_kind: str,
            names: tuple[str, ...],
            smoothing: float = 0.0,
            device: torch.device | None = None,
            verbose: bool = True,
    ):
        if model.experience != 'shared':
            raise ValueError(f'Stage 1 trains one backbone, but the model has experience={model.experience!r}. Build '
                             "it with experience='shared'; load_experience puts its weights into the frozen stream.")
        needed = Target(target_kind, tuple(names)).affect_kind
        if (model.affect_kind, model.num_affect) != (needed, len(names)):
            raise ValueError(
                f'The stimuli ask for affect_kind={needed!r} with num_affect={len(names)} ({", ".join(names)}), the '
                f'model has affect_kind={model.affect_kind!r} with num_affect={model.num_affect}. '
                'Build the model with the stimuli\'s values.')
        criterion = _affect_criterion(target_kind, smoothing)
        for name, parameter in model.named_parameters():
            if not name.startswith('backbone.'):  # whose own frozen parameters stay frozen
                parameter.requires_grad_(name.startswith('head_affect.'))
        model.set_training_output('affect')
        super().__init__(model, criterion, device=device, verbose=verbose)
        self.target_kind = target_kind
        self.names = tuple(names)

    def create_evaluator(self, **kwargs: Any) -> EmotionEvaluator | RatingEvaluator:
        return affect_evaluator(self.target_kind, self.names, self.device, **kwargs)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """What a later stage must know of the affect response: its target kind and the names of its outputs."""
        return {'target_kind': self.target_kind, 'names': list(self.names)}

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The parameters to clip; the head of this stage is the affect response."""
        model = unwrap_model(self.trainable_module)
        return _parameters_without(model, [model.head_affect] if exclude_head else [])


class EmoRegTask(ClassificationTask):
    """Stage 2: train a classifier whose response is regulated.

    Args:
        model: The model; in train mode its forward gives both responses from here on.
        balanced_in: ``'prediction'``: ``CE(y)``; ``'loss'``: ``(1 - r) CE(z) + r CE(z')``, for a fixed balance only.
        keep_affect: Weight of a second loss that keeps the affect response to the downstream images close to what the
            model answers now, before stage 2 (Learning without Forgetting, Li and Hoiem 2016, arXiv 1606.09282): the
            divergence ``KL(softmax(a before) || softmax(a))`` of emotions, the squared error of ratings. 0 for none;
            it costs a forward pass of a frozen copy.
        rehearsal: Weight of stage 1's loss on a batch of stimuli in each step, 0 for none; it costs a forward and a
            backward pass of these. Batch norm goes by their own statistics and keeps running ones of images only.
        stimuli_kind: Kind of the stimuli's targets where they are rehearsed, as `AffectTask` has it.
        stimuli_smoothing: Their label smoothing, as `AffectTask` has it.
        criterion: Loss function. Created from `criterion_kwargs` by timm when None.
        criterion_kwargs: Arguments for ``timm.loss.create_classification_loss``.
        device: Device for task tensors.
        verbose: Whether timm's base class logs what the task is made of.

    Raises:
        ValueError: For a learned or gated balance in the loss, a model without classes, a `keep_affect` or `rehearsal`
            that is negative, or above 0 with ``experience='separate'``.
    """

    def __init__(
            self,
            model: EmoReg,
            balanced_in: str = 'prediction',
            keep_affect: float = 0.0,
            rehearsal: float = 0.0,
            stimuli_kind: str = 'class',
            stimuli_smoothing: float = 0.0,
            criterion: nn.Module | Callable | None = None,
            criterion_kwargs: dict[str, Any] | None = None,
            device: torch.device | None = None,
            verbose: bool = True,
    ):
        if model.num_classes < 1:
            raise ValueError('The model has num_classes=0, so there is no response to train. Build it with classes.')
        kind = model.regulation.kind
        check_regulation(model.balance if kind == 'fixed' else kind, model.num_affect, model.affect_kind,
                         model.experience, balanced_in, keep_affect, rehearsal)
        before = None
        if keep_affect:
            before = copy.deepcopy(model).eval().requires_grad_(False)
            before.set_training_output('affect')
        if model.training_output == 'affect':  # it comes straight from stage 1, which froze these
            for part in (model.head, model.head_emo, model.modulation, model.regulation):
                if part is not None:
                    part.requires_grad_(True)
        model.head_affect.requires_grad_(
            model.experience == 'shared'
            and (model.modulation is not None or kind == 'gate' or keep_affect > 0 or rehearsal > 0))
        super().__init__(model, criterion, criterion_kwargs, device=device, verbose=verbose)
        self.balanced_in = balanced_in
        self.keep_affect = keep_affect
        self.rehearsal = rehearsal
        self.affect_criterion = _affect_criterion(stimuli_kind, stimuli_smoothing) if rehearsal else None
        self.emotion = model.affect_kind == 'emotion'
        self.before = before
        model.set_training_output('responses')

    def forward(
            self,
            input: Tensor,
            target: Tensor,
            stimuli: Tensor | None = None,
            stimuli_target: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Both responses and their loss.

        Args:
            input: (B, in_chans, H, W).
            target: (B,) class indices, or (B, C) soft targets.
            stimuli: (S, in_chans, H, W), where stage 1 is rehearsed.
            stimuli_target: Their targets.

        Returns:
            ``loss`` (scalar), ``output`` (y, (B, C)), and for the log, without gradient, ``loss_non_emotional``,
            ``loss_emotional``, ``balance`` (means over the batch) and, where they are in use, ``loss_affect`` (kept)
            and ``loss_rehearsal``.

        Raises:
            ValueError: If there are stimuli without a weight of their rehearsal, or in training a weight without them;
                if the balance, which a model may change, has become one that cannot be balanced in the loss.
        """
        if (stimuli is not None) != bool(self.rehearsal) and (self.training or stimuli is not None):
            raise ValueError(f'rehearsal={self.rehearsal!r} and stimuli belong together: give both, or neither.')
        if self.training:
            z, z_emo, affect, r = self.trainable_module(input)
        else:  # where the model gives one tensor
            z, z_emo, affect, r = unwrap_model(self.trainable_module).forward_responses(input)
        output = regulate(z, z_emo, r)
        with torch.set_grad_enabled(self.balanced_in == 'loss' and torch.is_grad_enabled()):
            loss_z, loss_emo = self.criterion(z, target), self.criterion(z_emo, target)
        if self.balanced_in == 'loss':
            kind = unwrap_model(self.trainable_module).regulation.kind
            if kind != 'fixed':
                check_balanced_in(kind, self.balanced_in)
            loss = regulate(loss_z, loss_emo, r[0, 0])  # the same for each image
        else:
            loss = self.criterion(output, target)
        result = {'loss': loss, 'output': output, 'loss_non_emotional': loss_z.detach(),
                  'loss_emotional': loss_emo.detach(), 'balance': r.detach().float().mean()}
        if self.before is not None:
            with torch.no_grad():
                before = self.before(input).float()
            if self.emotion:
                loss_affect = F.kl_div(affect.float().log_softmax(1), before.log_softmax(1), reduction='batchmean',
                                       log_target=True)
            else:
                loss_affect = F.mse_loss(affect.float(), before)
            result |= {'loss': loss + self.keep_affect * loss_affect, 'loss_affect': loss_affect.detach()}
        if stimuli is not None:
            model = unwrap_model(self.trainable_module)  # DDP's forward may be called once only before a backward pass
            with _running_statistics_kept(model):
                affect = (model(stimuli) if self.training else model.forward_responses(stimuli))[2]
            loss_rehearsal = self.affect_criterion(affect, stimuli_target)
            result |= {'loss': result['loss'] + self.rehearsal * loss_rehearsal,
                       'loss_rehearsal': loss_rehearsal.detach()}
        return result

    def train(self, mode: bool = True) -> EmoRegTask:
        super().train(mode)
        if self.before is not None:
            self.before.eval()
        return self

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The parameters to clip, without those of the two heads if `exclude_head`."""
        model = unwrap_model(self.trainable_module)
        return _parameters_without(model, model.get_classifier() if exclude_head else [])
