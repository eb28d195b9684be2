"""Folding a trained model into the plain timm model: two linear heads that are balanced are one linear head."""
from __future__ import annotations

import torch
from timm.models.resnet import ResNet
from timm.utils import unwrap_model
from torch import nn

from .backbone import put_classifier, without_weights
from .emoreg import EmoReg
from .regulation import regulate

__all__ = ['FoldError', 'fold']

# what a pretrained cfg says of the images that a model was made for, and of its answers
IMAGE_CFG_KEYS = ('input_size', 'pool_size', 'fixed_input_size', 'crop_pct', 'crop_mode', 'test_input_size',
                 'test_crop_pct', 'interpolation', 'mean', 'std', 'label_names', 'label_descriptions')
# and the terms of what it was built from, which hold for what it is folded into
KEPT_CFG_KEYS = (*IMAGE_CFG_KEYS, 'license')


class FoldError(ValueError):
    """A model that is no plain model; the message says why."""


@torch.no_grad()
def fold(model: EmoReg) -> nn.Module:
    """The plain timm model that gives the logits of a regulated model, up to rounding.

    Without modulation both heads read the same features, so that ``(1 - r)(W h + b) + r (W' h + b')`` is one head,
    ``(1 - r) W + r W'``. The result is an instance of the backbone's own timm class: it costs what the plain model
    costs, needs no plug-in, and timm exports and reloads it - except for a ResNet with ``small_image=True``, for whose
    stem timm has no arguments: reloading its export fails.

    Args:
        model: A model with a fixed or learned balance, without modulation, of shared experience. It is not changed.

    Returns:
        The plain model, on the same device, in the same mode.

    Raises:
        FoldError: If the model is none of these, or if the family's own classifier is no linear map.
    """
    model = unwrap_model(model)
    if not isinstance(model, EmoReg):
        raise FoldError(f'{type(model).__name__} is no EmoReg, there is nothing to fold. Give a regulated model.')
    name = getattr(model.backbone, 'pretrained_cfg', {}).get('architecture', type(model.backbone).__name__)
    if model.experience != 'shared':
        why = "experience='separate' reads two backbones"
    elif model.modulation is not None:
        why = ('modulation makes the emotionally-influenced response no linear map of the features. '
               'Train with modulation=False to fold')
    elif model.regulation.kind == 'gate':
        why = "balance='gate' gives each image its own balance"
    elif not model.num_classes:
        why = 'it has no heads (num_classes=0)'
    else:
        r = model.balance
        weight, bias = (
            regulate(z.float(), z_emo.float(), r).to(z.dtype) for z, z_emo in zip(
                (model.head.weight, model.head.bias), (model.head_emo.weight, model.head_emo.bias), strict=True))
        plain = put_classifier(model.backbone, weight, bias)
        if plain is not None:
            return _described(plain, model)
        why = f'the classifier of {name} is no single linear layer'
    raise FoldError(f'This model cannot be folded into a plain {name}: {why}.')


def _described(plain: nn.Module, model: EmoReg) -> nn.Module:
    """What an export of the plain model says of it: how to build and feed it and under which terms, not which weights
    it came from."""
    kept = without_weights(getattr(plain, 'pretrained_cfg', {}))
    ours = getattr(model, 'pretrained_cfg', None) or {}
    kept |= {k: ours[k] for k in KEPT_CFG_KEYS if k in ours}
    plain.pretrained_cfg = plain.default_cfg = dict(kept, num_classes=plain.num_classes)
    if model.small_image and isinstance(plain, ResNet):
        # A stem with another stride has tensors of the same shapes; timm refuses this argument, as it should.
        plain._model_args = dict(getattr(plain, '_model_args', {}), small_image=True)
    return plain
