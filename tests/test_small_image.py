"""Small-image forms of ResNet and ViT."""
import pytest
import timm
import torch
from timm.models import get_model_input_config

from timm_emoreg.backbone import create_backbone
from timm_emoreg.small_image import has_small_image_form, small_image_args, small_image_form


@pytest.mark.parametrize(('name', 'form'), [
    ('test_resnet', '3x3 stem of stride 1, no max-pool'),
    ('resnet10t', '3x3 stem of stride 1, no max-pool'),  # deep stem
    ('resnet18', '3x3 stem of stride 1, no max-pool'),  # 7x7 stem
])
def test_resnet_keeps_its_resolution(name, form):
    model = create_backbone(name, small_image=True, num_classes=3).eval()
    assert small_image_form(model) == form
    with torch.no_grad():
        features = model.forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)
    assert [f.shape[-1] for f in features] == [32 // info['reduction'] for info in model.feature_info]
    stock = timm.create_model(name, device='meta')
    assert [f.shape[-1] for f in features] != [32 // info['reduction'] for info in stock.feature_info]
    assert [info['module'] for info in model.feature_info] == [info['module'] for info in stock.feature_info]


def test_the_new_convolution_of_a_resnet_starts_as_timms():
    own = timm.create_model('resnet18').layer1[0].conv1.weight  # 64 channels of 3x3, too
    new = create_backbone('resnet18', small_image=True).conv1.weight
    assert new.std().item() == pytest.approx(own.std().item(), rel=0.1)


@pytest.mark.parametrize(('size', 'patch'), [(8, 1), (32, 4), (48, 6), ((64, 64), 8)])
def test_vit_sees_64_patches(size, patch):
    model = create_backbone('test_vit', small_image=True, img_size=size)
    assert model.patch_embed.patch_size == (patch, patch)
    assert model.patch_embed.num_patches == 64
    assert small_image_form(model) == f'patches of {patch}x{patch}'


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit'])
def test_default_size_is_32(backbone):
    model = timm.create_model('emoreg', backbone=backbone, small_image=True, num_classes=3).eval()
    assert get_model_input_config(model)['input_size'] == (3, 32, 32)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_registered_vit_takes_it_without_a_size():
    model = timm.create_model('emoreg_vit_tiny', small_image=True, num_classes=3, device='meta')
    assert model.backbone.patch_embed.patch_size == (4, 4)


def test_other_models_are_left_as_they_are():
    assert small_image_form(timm.create_model('test_convnext')) == 'stock stem'
    assert small_image_form(timm.create_model('efficientvit_m0', device='meta')) == 'patches of 16x16'
    assert small_image_form(timm.create_model('resnet18', device='meta')) == '7x7 stem of stride 2, max-pool'


def test_which_families_have_a_form():
    assert [has_small_image_form(n) for n in ('resnet18.a1_in1k', 'vit_tiny_patch16_224', 'deit_tiny_patch16_224',
                                              'convnext_tiny', 'no_such_model')] == [True, True, True, False, False]


@pytest.mark.parametrize(('name', 'size', 'message'), [
    ('convnext_tiny', 32, "no form for the backbone 'convnext_tiny'"),
    ('resnet18', 224, 'meant for images of 8 to 64 px'),
    ('resnet18', (32, 4), 'meant for images of 8 to 64 px'),
    ('test_vit', 36, 'multiple of 8'),
    ('test_vit', (32, 64), 'square image'),
])
def test_refusals(name, size, message):
    with pytest.raises(ValueError, match=message):
        small_image_args(name, size)


@pytest.mark.parametrize('build', [
    lambda patch: create_backbone('test_vit', small_image=True, patch_size=patch),
    lambda patch: timm.create_model('emoreg_vit_tiny', small_image=True, depth=1, patch_size=patch),
    lambda patch: timm.create_model('emoreg_vit_tiny', pretrained=True, patch_size=patch),
])
def test_patches_of_another_size_are_no_small_image_form(build):
    build(4)
    build((4, 4))
    with pytest.raises(ValueError, match=r'small_image=True gives \w+ patches of 4x4 at \S+ px, and patch_size=2 asks'):
        build(2)
