"""The contract that timm's own tests check, in short and offline; timm_suite.py runs those tests themselves."""
import importlib.metadata

import pytest
import timm
import timm_suite
import torch
from small_models import create, images
from timm.models import FeatureInfo

import timm_emoreg

REGISTERED = ['emoreg', *timm_emoreg.BACKBONES]


def test_the_documented_command_names_every_module():
    assert set(timm.list_models('emoreg*')) == set(REGISTERED)
    assert set(timm.list_models(module=timm_suite.MODULES)) == set(REGISTERED)
    assert timm.__version__ == importlib.metadata.version('timm')


@pytest.mark.parametrize('name', REGISTERED)
def test_config(name):
    """test_model_default_cfgs, as far as it looks at registered names."""
    model = timm.create_model(name, device='meta').eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert model.in_chans == cfg['input_size'][0]
    assert model.num_classes == cfg['num_classes'] == 1000
    assert all(f'{c}.weight' in state for c in (*cfg['classifier'], cfg['first_conv']))
    x = torch.empty(1, *cfg['input_size'], device='meta')
    features = model.forward_features(x)
    h = model.forward_head(features, pre_logits=True)
    if cfg['pool_size']:
        assert tuple(features.shape[-2:]) == cfg['pool_size']
    assert features.shape[1 if features.ndim == 4 else -1] == model.num_features
    assert h.shape == (1, model.head_hidden_size)
    model.to(torch.bfloat16)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    model.train().reset_classifier(0)
    assert model(x.bfloat16()).shape == h.shape
    model.reset_classifier(2)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for head in model.get_classifier() for p in head.parameters())
    assert all(m.training for m in model.modules())
    assert timm.create_model(name, num_classes=0, device='meta').eval()(x).shape == h.shape


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit'])
def test_features(backbone):
    """test_model_forward_intermediates and its features_only form."""
    model = create(backbone, features_only=False).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert len(info) >= 3
    out, features = model.forward_intermediates(images(1, size=64), output_fmt='NCHW')
    assert len(features) == len(info)
    for channels, reduction, f in zip(info.channels(), info.reduction(), features, strict=True):
        assert f.shape == (1, channels, 64 // reduction, 64 // reduction)
    torch.testing.assert_close(out, model.forward_features(images(1, size=64)))


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit'])
def test_pruning_contract(backbone):
    """test_prune_intermediate_layers_contract."""
    model = create(backbone).eval()
    taps = model.forward_intermediates(images(), intermediates_only=True)
    for i, tap in enumerate(taps):
        early = model.forward_intermediates(images(), indices=[i], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], tap)
        pruned = create(backbone).eval()
        pruned.load_state_dict(model.state_dict())
        take = pruned.prune_intermediate_layers([i])
        again = pruned.forward_intermediates(images(), indices=take, intermediates_only=True)
        torch.testing.assert_close(again[0], tap)


def test_registering_disturbs_nothing():
    assert 'emoreg_resnet18' not in timm.list_models(module='resnet')
    assert timm.list_pretrained('resnet18*')
    assert all(name.startswith('emoreg') for module in timm_suite.MODULES for name in timm.list_models(module=module))
