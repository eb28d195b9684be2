"""The ResNet family with emotional regulation."""
from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from .emoreg import EmoReg
from .factory import create
from .zoo import registry_cfgs

__all__: list[str] = []

BACKBONES = {
    'emoreg_resnet18': 'resnet18',
    'emoreg_resnet34': 'resnet34',
    'emoreg_resnet50': 'resnet50',
    'emoreg_resnet101': 'resnet101',
    'emoreg_resnet152': 'resnet152',
}

default_cfgs = generate_default_cfgs(registry_cfgs(BACKBONES))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> EmoReg:
    return create(variant, BACKBONES[variant], pretrained, **kwargs)


@register_model
def emoreg_resnet18(pretrained: bool = False, **kwargs: Any) -> EmoReg:
    """Emotional regulation around timm's resnet18."""
    return _create('emoreg_resnet18', pretrained, **kwargs)


@register_model
def emoreg_resnet34(pretrained: bool = False, **kwargs: Any) -> EmoReg:
    """Emotional regulation around timm's resnet34."""
    return _create('emoreg_resnet34', pretrained, **kwargs)


@register_model
def emoreg_resnet50(pretrained: bool = False, **kwargs: Any) -> EmoReg:
    """Emotional regulation around timm's resnet50."""
    return _create('emoreg_resnet50', pretrained, **kwargs)


@register_model
def emoreg_resnet101(pretrained: bool = False, **kwargs: Any) -> EmoReg:
    """Emotional regulation around timm's resnet101."""
    return _create('emoreg_resnet101', pretrained, **kwargs)


@register_model
def emoreg_resnet152(pretrained: bool = False, **kwargs: Any) -> EmoReg:
    """Emotional regulation around timm's resnet152."""
    return _create('emoreg_resnet152', pretrained, **kwargs)
