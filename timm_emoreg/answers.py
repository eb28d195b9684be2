"""What a trained model answers, in numbers: for single images, and over the test part of a data set."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from .data import DataError, ImageSet
from .data.loader import make_loader
from .emoreg import EmoReg
from .regulation import regulate
from .trained import Trained
from .training.trainable import brief

__all__ = ['BATCH', 'Answers', 'Changes', 'affect_gradient', 'answer', 'changed_answers', 'check_device',
           'class_affect', 'describe_image', 'describe_set', 'largest_error', 'top1', 'top_classes']

BATCH = 64
TOP = 5  # classes of an image that are told and drawn


def affect_gradient(model: EmoReg, x: Tensor) -> Tensor:
    """Where the affect response looks: how much each pixel would change it, (B, 3, H, W) to (B, H, W) in [0, 1].

    The magnitude of the gradient of the strongest emotion's logit, or of all ratings together, with respect to the
    image; the largest over the channels (Simonyan, Vedaldi, Zisserman 2014, arXiv 1312.6034). It is blurred by a tenth
    of the image's side, because single pixels of it mean little and strided convolutions leave the pattern of their
    grid in it, and scaled to a maximum of 1 for each image. All zero where the response does not depend on the image.
    """
    stream = model.affect_backbone
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        # forward_affect would do, but with a frozen stream it cuts the gradient off
        a = model.head_affect(stream.forward_head(stream.forward_features(x), pre_logits=True))
        parts = [a.amax(dim=1)] if model.affect_kind == 'emotion' else a.unbind(dim=1)
        slope = sum(torch.autograd.grad(part.sum(), x, retain_graph=True)[0].abs() for part in parts).amax(dim=1)
    sigma = max(x.shape[-2:]) / 10
    slope = gaussian_blur(slope, [2 * min(int(2 * sigma), side - 1) + 1 for side in x.shape[:-3:-1]], sigma)
    highest = slope.amax(dim=(1, 2), keepdim=True)
    return slope / highest.masked_fill(highest == 0, 1)


@dataclass(frozen=True)
class Answers:
    """What the model answered to N images, on the CPU.

    Args:
        affect: Affect response a, (N, K).
        state: Affective state e, (N, K): probabilities of emotions, or ratings in [-1, 1].
        non_emotional: Non-emotional response z, (N, C); C = 0 for a model without classes.
        emotional: Emotionally-influenced response z', (N, C).
        regulated: Regulated response y, (N, C).
        balance: Balance r, (N,).
    """

    affect: Tensor
    state: Tensor
    non_emotional: Tensor
    emotional: Tensor
    regulated: Tensor
    balance: Tensor

    def __len__(self) -> int:
        return len(self.affect)


def check_device(device: str, flag: str = '--device') -> None:
    """Refuse a device, given by a flag, that torch cannot use.

    Raises:
        DataError: If it is unknown or unavailable.
    """
    try:
        torch.zeros(1, device=device).item()  # which 'meta' has not
    except (RuntimeError, AssertionError) as e:
        raise DataError(f'{flag} {device}: torch cannot compute there ({brief(e)}). Leave it out, or give cpu.'
                        ) from None


def answer(trained: Trained, images: ImageSet, device: torch.device | str = 'cpu', gradient: bool = False,
           ) -> tuple[Answers, Tensor]:
    """Show images to a model, as its evaluation did: resized to its input, nothing cropped.

    Args:
        trained: The model.
        images: The images.
        device: Where to compute.
        gradient: Whether to compute `affect_gradient`, too.

    Returns:
        The answers, and the gradients (N, H, W), or (0,) if they are not asked for.
    """
    model = trained.model.to(device)
    loader = make_loader(images, trained.img_size, BATCH, resolve_model_data_config(model), device=device)
    rows, slopes = [], [torch.zeros(0)]
    for x, _ in tqdm(loader, desc='images', leave=False, disable=None if len(loader) > 1 else True):
        with torch.inference_mode():
            if model.num_classes:
                out = model.forward_responses(x)
                z, z_emo, a, r = out
            else:
                a = model.forward_affect(x)
                z = z_emo = a[:, :0]
                r = model.regulation(model.state(a))
            rows.append([t.float().cpu() for t in (a, model.state(a), z, z_emo, regulate(z, z_emo, r), r[:, 0])])
        if gradient:
            slopes.append(affect_gradient(model, x).cpu())
    return Answers(*map(torch.cat, zip(*rows, strict=True))), torch.cat(slopes[gradient:])


def describe_image(trained: Trained, answers: Answers, i: int) -> dict[str, Any]:
    """The answer to image `i` as plain values: everything that is drawn of it."""
    text: dict[str, Any] = {
        'affect_response': dict(zip(trained.affect_names, _rounded(answers.affect[i]), strict=True)),
        'affective_state': dict(zip(trained.affect_names, _rounded(answers.state[i]), strict=True))}
    if trained.model.num_classes:
        responses = {'non_emotional': answers.non_emotional[i], 'emotional': answers.emotional[i],
                     'regulated': answers.regulated[i]}
        text |= {'balance': round(answers.balance[i].item(), 4),
                 'answer': {name: trained.label(z.argmax().item()) for name, z in responses.items()}}
        order = top_classes(answers, i)
        text['probability'] = {trained.label(c): {name: round(z.softmax(0)[c].item(), 4)
                                                  for name, z in responses.items()} for c in order}
    return text


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 4) for v in values.tolist()]


def top_classes(answers: Answers, i: int, count: int = TOP) -> list[int]:
    """The answers of the three responses to image `i`, and the classes that any of them gives most to; the regulated
    one's favourites first. `count` of them, at least 3, or all if there are fewer."""
    p = torch.stack([z[i].softmax(0) for z in (answers.non_emotional, answers.emotional, answers.regulated)])
    score = p.amax(dim=0)
    score[p.argmax(dim=1)] += 1  # of a hundred classes, one's answer may be among the others' least
    chosen = score.topk(min(max(count, 3), p.shape[1])).indices
    return chosen[p[2, chosen].argsort(descending=True)].tolist()


# -- a data set --------------------------------------------------------------------------------------------------------


def class_affect(state: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean affective state of each class and the standard error of it.

    Args:
        state: (N, K).
        target: (N,) class indices.
        num_classes: C.

    Returns:
        Two (C, K) tensors; the mean is NaN in a class without images, the error in a class of one, too.
    """
    state, one_hot = state.double(), torch.nn.functional.one_hot(target, num_classes).double()
    count = one_hot.sum(dim=0)[:, None]
    mean = one_hot.T @ state / count
    square = one_hot.T @ (state - mean[target]).square()
    error = (square / (count - 1) / count).sqrt()
    return mean.float(), error.float()


def largest_error(error: Tensor) -> float | None:
    """The largest standard error of `class_affect`; None if no class has two images."""
    known = error[error.isfinite()]
    return round(known.max().item(), 4) if len(known) else None


@dataclass(frozen=True)
class Changes:
    """Images whose answer regulation changes, from z to y: indices, the most decided change first.

    Args:
        repaired: Wrong before and right after.
        broken: Right before and wrong after.
        neither: Wrong before and, with another answer, wrong after.
    """

    repaired: Tensor
    broken: Tensor
    neither: Tensor

    def __len__(self) -> int:
        return len(self.repaired) + len(self.broken) + len(self.neither)


def changed_answers(non_emotional: Tensor, regulated: Tensor, target: Tensor) -> Changes:
    """Compare the answers of two responses, (N, C) each, to N images of the classes `target`, (N,)."""
    before, after = non_emotional.argmax(dim=1), regulated.argmax(dim=1)
    p = regulated.softmax(dim=1)
    lead = (p.gather(1, after[:, None]) - p.gather(1, before[:, None]))[:, 0]
    order = lead.argsort(descending=True, stable=True)
    changed = order[(before != after)[order]]
    was, now = (before == target)[changed], (after == target)[changed]
    return Changes(changed[now], changed[was], changed[~was & ~now])


def top1(response: Tensor, target: Tensor) -> float:
    """Share of right answers in percent: (N, C) responses and (N,) class indices."""
    return 100 * (response.argmax(dim=1) == target).double().mean().item()


def describe_set(trained: Trained, answers: Answers, target: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The numbers of a data set as plain values; `names` are those of its classes."""
    mean, error = class_affect(answers.state, target, len(names))
    text: dict[str, Any] = {
        'model': trained.source, 'images': len(answers),
        'affective_state': {name: dict(zip(trained.affect_names, _rounded(row), strict=True))
                            for name, row in zip(names, mean, strict=True) if not row.isnan().any()},
        'largest_standard_error': largest_error(error)}
    if trained.model.num_classes:
        r = answers.balance.double()
        changes = changed_answers(answers.non_emotional, answers.regulated, target)
        text |= {
            'top1': {name: round(top1(z, target), 2)
                     for name, z in (('non_emotional', answers.non_emotional), ('emotional', answers.emotional),
                                     ('regulated', answers.regulated))},
            'balance': {'kind': trained.model.regulation.kind, 'mean': round(r.mean().item(), 4),
                        'sd': round(r.std(correction=0).item(), 4), 'min': round(r.min().item(), 4),
                        'max': round(r.max().item(), 4)},
            'changed': len(changes), 'repaired': len(changes.repaired), 'broken': len(changes.broken)}
    return text
