"""Folding into the plain timm model."""
import subprocess
import sys

import pytest
import timm
import torch
from small_models import create, images, stir
from timm.data import resolve_model_data_config
from timm.models._hub import save_for_hf

from timm_emoreg.fold import FoldError, fold


@pytest.mark.parametrize('balance', [0.0, 0.3, 1.0, 'learned'])
@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit', 'test_mambaout'])
def test_equal_logits_of_the_plain_class(backbone, balance):
    model = stir(create(backbone, balance=balance, modulation=False)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = fold(model)
    x = images(size=64)
    assert type(plain) is type(timm.create_model(backbone))
    heads = sum(p.numel() for p in plain.get_classifier().parameters())
    assert heads == 5 * (model.head_hidden_size + 1)
    assert sum(p.numel() for p in plain.parameters()) == heads + sum(p.numel() for p in model.backbone.parameters())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not plain.training


@pytest.mark.parametrize('backbone', ['levit_128s', 'efficientformerv2_s0', 'pit_ti_distilled_224', 'dla46x_c'])
def test_norm_heads_pairs_and_convolutions(backbone):
    model = create(backbone, modulation=False, balance=0.4).eval()
    with torch.no_grad():
        torch.testing.assert_close(fold(model)(images(1, size=224)), model(images(1, size=224)), rtol=1e-4, atol=1e-5)


def test_the_export_needs_no_plug_in(tmp_path):
    code = 'import sys, timm, torch\n'
    for backbone in ('test_resnet', 'test_vit'):
        model = create(backbone, modulation=False, balance=0.3).eval()
        save_for_hf(fold(model), tmp_path / backbone, safe_serialization=True)
        torch.save((images(), model(images()).detach()), tmp_path / backbone / 'pair.pt')
        code += (f'x, y = torch.load({str(tmp_path / backbone / "pair.pt")!r})\n'
                 f'm = timm.create_model("local-dir:{tmp_path / backbone}", pretrained=True).eval()\n'
                 'torch.testing.assert_close(m(x), y, rtol=1e-5, atol=1e-5)\n')
    code += 'assert "timm_emoreg" not in sys.modules'
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


def test_small_image_forms(tmp_path):
    for backbone in ('test_resnet', 'test_vit'):
        model = create(backbone, modulation=False, small_image=True, img_size=32).eval()
        plain = fold(model)
        torch.testing.assert_close(plain(images()), model(images()), rtol=1e-5, atol=1e-5)
        assert resolve_model_data_config(plain) == resolve_model_data_config(model)
        save_for_hf(plain, tmp_path / backbone, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}/test_vit', pretrained=True).eval()
    torch.testing.assert_close(again(images()), plain(images()))
    with pytest.raises(TypeError, match='small_image'):
        timm.create_model(f'local-dir:{tmp_path}/test_resnet', pretrained=True)


def test_a_folded_model_is_fed_and_answers_as_before():
    model = timm.create_model('emoreg_resnet18', num_classes=2, small_image=True, modulation=False)
    model.pretrained_cfg |= {'label_names': ('cat', 'dog'), 'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.2, 0.3),
                             'license': 'cc-by-sa-4.0'}
    plain = fold(model)
    assert resolve_model_data_config(plain) == resolve_model_data_config(model)
    assert plain.pretrained_cfg['label_names'] == ('cat', 'dog')
    assert plain.pretrained_cfg['license'] == 'cc-by-sa-4.0'  # not that of the stock model
    assert not {'url', 'file', 'hf_hub_id', 'tag'} & plain.pretrained_cfg.keys()  # of the weights of the stock model
    assert (plain.pretrained_cfg['first_conv'], plain.pretrained_cfg['classifier']) == ('conv1', 'fc')


@pytest.mark.parametrize(('kwargs', 'message'), [
    ({}, 'cannot be folded into a plain test_resnet: modulation'),
    ({'modulation': False, 'balance': 'gate'}, "balance='gate' gives each image its own"),
    ({'modulation': False, 'experience': 'separate'}, "experience='separate' reads two backbones"),
    ({'modulation': False, 'num_classes': 0}, 'no heads'),
    ({'modulation': False, 'backbone': 'crossvit_tiny_240'}, 'classifier of crossvit_tiny_240 is no single linear'),
    ({'modulation': False, 'backbone': 'caformer_s18'}, 'classifier of caformer_s18 is no single linear'),
])
def test_refusals(kwargs, message):
    with pytest.raises(FoldError, match=message):
        fold(create(device='meta', **kwargs))


def test_wrappers_are_looked_through_and_other_models_refused():
    compiled = torch.compile(create('test_resnet', modulation=False))
    assert type(fold(compiled)) is type(timm.create_model('test_resnet'))
    with pytest.raises(FoldError, match='ResNet is no EmoReg, there is nothing to fold'):
        fold(timm.create_model('test_resnet'))
