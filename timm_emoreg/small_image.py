"""Forms of ResNet and ViT for images of 32 to 64 px, which timm's own stems would shrink to a handful of positions."""
from __future__ import annotations

from typing import Any

from timm.layers import to_2tuple
from timm.models import is_model_in_modules, split_model_name_tag
from timm.models.resnet import ResNet
from torch import nn

__all__ = ['DEFAULT_SIZE', 'GRID', 'LARGEST_SIZE', 'has_small_image_form', 'small_image_args', 'small_image_form',
           'small_image_stem', 'whole_image_cfg']

DEFAULT_SIZE = 32
LARGEST_SIZE = 64
GRID = 8  # patches on a side for ViT: 64 tokens, as ViT-S/4 at 32 px in the literature on small images
RESNET_MODULES = ('resnet',)
VIT_MODULES = ('vision_transformer', 'deit')


def has_small_image_form(backbone: str) -> bool:
    """Whether the timm model of this name has a small-image form."""
    return is_model_in_modules(split_model_name_tag(backbone)[0], (*RESNET_MODULES, *VIT_MODULES))


def _check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    size = to_2tuple(size)
    if any(s < GRID or s > LARGEST_SIZE for s in size):
        remedy = f'Use {GRID} px or more.' if min(size) < GRID else 'Leave small_image off for larger ones.'
        raise ValueError(f'small_image=True is meant for images of {GRID} to {LARGEST_SIZE} px, got {size}. {remedy}')
    return size


def small_image_args(backbone: str, img_size: int | tuple[int, int]) -> dict[str, Any]:
    """Arguments for ``timm.create_model`` that give the small-image form of a backbone.

    A ResNet needs none (its stem is exchanged after building, see `small_image_stem`); a ViT gets a patch size that
    cuts the image into 8 x 8 patches: 4 at 32 px, 6 at 48 px, 8 at 64 px.

    Raises:
        ValueError: For a family without such a form, a size outside 8..64, and for ViT a size that 8 does not divide.
    """
    if not has_small_image_form(backbone):
        raise ValueError(
            f'small_image=True has no form for the backbone {backbone!r}: only the ResNet family (3x3 stem) and plain '
            'ViT (small patches) have one. Leave small_image off and train at a larger --img-size, for example 224.')
    size = _check_size(img_size)
    if is_model_in_modules(split_model_name_tag(backbone)[0], RESNET_MODULES):
        return {}
    if size[0] != size[1] or size[0] % GRID:
        raise ValueError(f'The small-image form of {backbone!r} needs a square image whose side is a multiple of '
                         f'{GRID} up to {LARGEST_SIZE}, got {size}. Use 32, 48 or 64, for example.')
    return {'patch_size': size[0] // GRID, 'img_size': size}


def whole_image_cfg(input_size: tuple[int, int, int]) -> dict[str, Any]:
    """What a pretrained cfg says of a model that is made for whole images of one size: (channels, height, width).

    Oblong images are squashed to that size, as in the training.
    """
    return {'input_size': tuple(input_size), 'pool_size': None, 'crop_pct': 1.0, 'crop_mode': 'squash',
            'interpolation': 'bicubic', 'test_input_size': None, 'test_crop_pct': None}


def small_image_stem(model: nn.Module) -> bool:
    """Exchange, in place, the stem of a ResNet: the first convolution gets stride 1, the pooling goes.

    A 7x7 convolution is replaced by a new 3x3 one (He et al. 2016, section 4.2, for CIFAR); the first convolution of
    a deep stem is 3x3 already and only its stride changes. Models that are no ResNet are left as they are: their
    small-image form is made by `small_image_args`.

    Returns:
        Whether the model was changed.
    """
    if not isinstance(model, ResNet):
        return False
    old = model.conv1[0] if isinstance(model.conv1, nn.Sequential) else model.conv1
    if old.kernel_size == (3, 3):
        old.stride = (1, 1)
    else:
        model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False,
                                device=old.weight.device, dtype=old.weight.dtype)
        nn.init.kaiming_normal_(model.conv1.weight, mode='fan_out', nonlinearity='relu')
    model.maxpool = nn.Identity()
    # Without the stem's strides of 2 x 2 each feature map is four times as fine; the stem's own only twice.
    model.feature_info = [
        dict(info, reduction=max(info['reduction'] // (2 if i == 0 else 4), 1))
        for i, info in enumerate(model.feature_info)
    ]
    return True


def small_image_form(model: nn.Module) -> str:
    """The form a backbone has, in words, for logs and result tables."""
    if isinstance(model, ResNet):
        conv = model.conv1[0] if isinstance(model.conv1, nn.Sequential) else model.conv1
        pool = 'no max-pool' if isinstance(model.maxpool, nn.Identity) else 'max-pool'
        return f'{conv.kernel_size[0]}x{conv.kernel_size[1]} stem of stride {conv.stride[0]}, {pool}'
    patch = getattr(getattr(model, 'patch_embed', None), 'patch_size', None)
    if not patch:
        return 'stock stem'
    height, width = to_2tuple(patch)  # EfficientViT of MSRA has a single number
    return f'patches of {height}x{width}'
