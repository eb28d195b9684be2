"""The ViT family with emotional regulation."""
from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from .emoreg import EmoReg
from .factory import create
from .zoo import registry_cfgs

__all__: list[str] = []

BACKBONES = {
    'emoreg_vit_tiny': 'vit_tiny_patch16_224',
    'emoreg_vit_small': 'vit_small_patch16_224',
    'emoreg_vit_base': 'vit_base_patch16_224',
    'emoreg_vit_large': 'vit_large_patch16_224',
}

default_cfgs = generate_default_cfgs(registry_cfgs(BACKBONES))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> EmoReg:
    return create(variant, BACKBONES[variant], pretrained, **kwargs)


@register_model
def emoreg_vit_tiny(pretrained: bool = False, **kwargs: Any) -> EmoReg:
    """Emotional regulation around timm's vit_tiny_patch16_224."""
    return _create('emoreg_vit_tiny', pretrained, **kwargs)


@register_model
def emoreg_vit_small(pretrained: bool = False, **kwargs: Any) -> EmoReg:
    """Emotional regulation around timm's vit_small_patch16_224."""
    return _create('emoreg_vit_small', pretrained, **kwargs)


@register_model
def emoreg_vit_base(pretrained: bool = False, **kwargs: Any) -> EmoReg:
    """Emotional regulation around timm's vit_base_patch16_224."""
    return _create('emoreg_vit_base', pretrained, **kwargs)


@register_model
def emoreg_vit_large(pretrained: bool = False, **kwargs: Any) -> EmoReg:
    """Emotional regulation around timm's vit_large_patch16_224."""
    return _create('emoreg_vit_large', pretrained, **kwargs)
