"""EmoReg: the invariants of the method, everything one does with a timm model, and the errors."""
import copy
import pickle
import re

import numpy as np
import pytest
import timm
import torch
from backbone_sweep import layer_decay
from small_models import BACKBONES, create, images, stir
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import PretrainedCfg, get_model_args, get_model_input_config, group_parameters
from timm.models._hub import save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, freeze
from torch.testing import assert_close

from timm_emoreg import BACKBONES as BACKBONE_OF
from timm_emoreg import EmoReg, emoreg
from timm_emoreg.backbone import checkpoint_filter_fn, create_backbone

both = pytest.mark.parametrize('backbone', BACKBONES)
HEADS = ('head.', 'head_emo.')


def plain_model(backbone='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(backbone, **{'num_classes': 5, **BACKBONES.get(backbone, {}), **kwargs})


# -- invariants of the method ------------------------------------------------------------------------------------------

@both
@pytest.mark.parametrize('training', [False, True])
def test_balance_0_is_the_plain_model_bit_for_bit(backbone, training):
    plain, model = plain_model(backbone, drop_rate=0.3), stir(create(backbone, balance=0.0, drop_rate=0.3))
    outputs = []
    for m in (plain.train(training), model.train(training)):
        torch.manual_seed(3)  # of the dropout
        outputs.append(m(images()))
    assert torch.equal(*outputs)


@both
def test_balance_0_on_a_bare_timm_checkpoint(backbone, tmp_path):
    plain = plain_model(backbone, num_classes=7).eval()
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    overlay = {'file': str(tmp_path / 'plain.pth'), 'num_classes': 7}
    torch.manual_seed(5)
    model = timm.create_model('emoreg', pretrained=True, backbone=backbone, num_classes=7, balance=0.0,
                              pretrained_cfg_overlay=overlay, **BACKBONES[backbone]).eval()
    assert torch.equal(model(images()), plain(images()))
    model.balance = 0.5  # G = S = 0 and both heads the checkpoint's
    assert_close(model(images()), plain(images()))
    separate = timm.create_model('emoreg', pretrained=True, backbone=backbone, num_classes=7, experience='separate',
                                 pretrained_cfg_overlay=overlay, **BACKBONES[backbone]).eval()
    assert_close(separate(images()), plain(images()))


def test_balance_1_is_the_emotional_response_alone():
    model = stir(create(balance=1.0)).eval()
    out = model.forward_responses(images())
    assert torch.equal(model(images()), out.emotional)
    assert not torch.allclose(out.emotional, out.non_emotional)


@pytest.mark.parametrize('balance', [0.3, 'learned', 'gate'])
@pytest.mark.parametrize('experience', ['shared', 'separate'])
def test_forward_is_the_formula(balance, experience):
    model = stir(create(balance=balance, experience=experience)).eval()
    x = images()
    h = model.backbone(x)
    h_affect = h if experience == 'shared' else model.backbone_emo(x)
    a = model.head_affect(h_affect)
    e = a.softmax(-1)
    h_emo = h_affect * (1 + e @ model.modulation.gain.weight.T) + e @ model.modulation.shift.weight.T
    z, z_emo = model.head(h), model.head_emo(h_emo)
    if balance == 'gate':
        r = (e @ model.regulation.gate.weight.T + model.regulation.gate.bias).sigmoid()
    else:
        r = torch.full((2, 1), model.balance)
    assert_close(model(x), (1 - r) * z + r * z_emo)
    assert_close(model.forward_affect(x), a)
    out = model.forward_responses(x)
    for got, want in zip(out, (z, z_emo, a, r), strict=True):
        assert_close(got, want)


@both
@pytest.mark.parametrize('classes', [3, 0])
def test_another_class_count_keeps_everything_but_the_heads(backbone, classes):
    model = stir(create(backbone, balance='gate')).eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(HEADS)}
    model.reset_classifier(classes)
    after = model.state_dict()
    assert {k for k in after if not k.startswith(HEADS)} == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert model.num_classes == classes
    assert model(images()).shape == (2, classes or model.head_hidden_size)
    assert model.reset_classifier(5) is None
    assert [head.out_features for head in model.get_classifier()] == [5, 5]


def test_only_the_heads_depend_on_the_class_count():
    one, other = create(num_classes=3).state_dict(), create(num_classes=4).state_dict()
    assert {k for k in one if one[k].shape != other[k].shape} == {
        'head.weight', 'head.bias', 'head_emo.weight', 'head_emo.bias'}


@pytest.mark.parametrize('training_output', ['regulated', 'responses', 'affect'])
def test_eval_gives_one_tensor(training_output):
    model = create(balance='gate')
    model.set_training_output(training_output)
    shapes = {'regulated': (2, 5), 'responses': (2, 5), 'affect': (2, 8)}
    assert model.eval()(images()).shape == shapes[training_output]
    in_training = model.train()(images())
    assert isinstance(in_training, tuple) == (training_output == 'responses')
    with pytest.raises(ValueError, match="output='all' is unknown"):
        model.set_training_output('all')


@pytest.mark.parametrize('kwargs', [
    {}, {'balance': 'learned'}, {'balance': 'gate'}, {'modulation': False}, {'modulation': False, 'balance': 'gate'},
    {'experience': 'separate'}, {'experience': 'separate', 'balance': 'gate', 'modulation': False},
    {'backbone': 'test_vit'}, {'num_classes': 0}, {'affect_kind': 'ratings', 'num_affect': 2}])
def test_every_parameter_gets_a_gradient(kwargs):
    model = create(**kwargs).train()
    model(images()).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = {n.split('.')[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen <= {'backbone_emo', 'head_affect'}
    assert ('head_affect' in frozen) == (kwargs.get('experience') == 'separate'
                                         or (kwargs.get('modulation') is False and kwargs.get('balance') != 'gate'))


def test_the_separate_stream_is_frozen():
    model = create(experience='separate')
    assert not model.backbone_emo.training  # from the start, without a call of train()
    before = copy.deepcopy(model.backbone_emo.state_dict())
    model.train()(images())
    assert all(torch.equal(v, before[k]) for k, v in model.backbone_emo.state_dict().items())
    assert model.backbone.training
    with pytest.raises(RuntimeError, match='needs the image'):
        model.forward_head(model.forward_features(images()))


def test_balance_can_be_set():
    model = create(modulation=False)
    assert model.balance == 0.5
    model.balance = 0.25
    assert model.balance == 0.25
    assert get_model_args(model)['balance'] == 0.25
    model.balance = 'gate'  # reads the affect response, which must now learn
    assert model.balance == 'gate'
    assert model.head_affect.weight.requires_grad
    model.balance = 'gate'
    assert model.head_affect.weight.requires_grad
    model.head_affect.requires_grad_(False)
    model.balance = 'gate'
    assert not model.head_affect.weight.requires_grad
    model.balance = 'learned'
    assert model.balance == 0.5
    with pytest.raises(ValueError, match='outside'):
        model.balance = 2


def test_an_untrained_second_head_has_the_scale_of_the_first():
    model = create(num_classes=400)
    assert not torch.allclose(model.head.weight, model.head_emo.weight)
    assert_close(model.head.weight.std(), model.head_emo.weight.std(), rtol=0.05, atol=0)


# -- wrapping ----------------------------------------------------------------------------------------------------------

def test_a_built_model_keeps_its_classifier():
    plain = plain_model(in_chans=4).eval()
    want = plain(images(chans=4))
    model = EmoReg(plain).eval()
    assert (model.num_classes, model.in_chans) == (5, 4)
    assert_close(model(images(chans=4)), want)
    assert torch.equal(model.head.weight, model.head_emo.weight)
    assert model.pretrained_cfg['first_conv'] == 'backbone.conv1.0'
    other = EmoReg(plain_model(), num_classes=3).eval()
    assert other(images()).shape == (2, 3)
    assert not torch.equal(other.head.weight, other.head_emo.weight)


def test_pretrained_backbone_gives_both_heads(tmp_path):
    plain = plain_model().eval()
    save_for_hf(plain, tmp_path, safe_serialization=True)
    name = f'local-dir:{tmp_path}'
    model = timm.create_model('emoreg', backbone=name, pretrained_backbone=True).eval()
    assert model.num_classes == 5
    assert_close(model(images()), plain(images()))
    other = timm.create_model('emoreg', backbone=name, pretrained_backbone=True, num_classes=3)
    assert torch.equal(other.backbone.bn1.weight, plain.bn1.weight)
    assert not torch.equal(other.head.weight, other.head_emo.weight)


@pytest.mark.parametrize('experience', ['shared', 'separate'])
@pytest.mark.parametrize(('name', 'more'), [('emoreg', {'backbone': 'test_resnet'}), ('emoreg_resnet18', {})])
def test_pretrained_backbone_comes_from_the_file_that_is_named(name, more, experience, tmp_path):
    plain = plain_model(more.get('backbone', 'resnet18')).eval()
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    overlay = {'file': str(tmp_path / 'plain.pth'), 'num_classes': 5, 'mean': (0.1, 0.2, 0.3)}
    model = timm.create_model(name, pretrained_backbone=True, pretrained_cfg_overlay=overlay, num_classes=5,
                              experience=experience, **more).eval()
    assert_close(model(images()), plain(images()))
    assert model.pretrained_cfg['mean'] == (0.1, 0.2, 0.3)
    assert not model.pretrained_cfg.get('file')  # it holds the backbone alone
    assert 'license' not in model.pretrained_cfg  # that of the file is not known
    assert 'pretrained_cfg_overlay' not in get_model_args(model)
    assert len(overlay) == 3


@pytest.mark.parametrize('name', ['emoreg', 'emoreg_resnet18'])
def test_pretrained_backbone_comes_from_the_cache_that_is_named(name, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(emoreg, 'create_backbone', lambda *args, pretrained=False, cache_dir=None, **kwargs: (
        given.append((pretrained, cache_dir)), create_backbone(*args, **kwargs))[1])
    model = timm.create_model(name, pretrained_backbone=True, cache_dir=tmp_path)
    assert given == [(True, tmp_path)]
    # whose terms are those of the weights that it starts from
    assert model.pretrained_cfg['license'] == timm.get_pretrained_cfg('resnet18').license
    assert 'license' not in timm.create_model(name).pretrained_cfg
    assert 'cache_dir' not in get_model_args(model)


def test_what_cannot_be_given_to_a_built_model():
    with pytest.raises(TypeError, match='A built backbone takes no building arguments: in_chans, img_size'):
        EmoReg(plain_model(), in_chans=1, img_size=32)
    with pytest.raises(ValueError, match="experience='separate' builds the backbone twice"):
        EmoReg(plain_model(), experience='separate')
    with pytest.raises(TypeError, match=r'Wrap a built model with timm_emoreg.EmoReg'):
        timm.create_model('emoreg', backbone=plain_model())


# -- what one does with a timm model -----------------------------------------------------------------------------------

@both
@pytest.mark.parametrize('chans', [1, 4])
def test_in_chans(backbone, chans):
    model = create(backbone, in_chans=chans).eval()
    assert model.in_chans == chans
    assert model(images(chans=chans)).shape == (2, 5)
    assert get_model_input_config(model)['input_size'][0] == chans


@both
def test_pretrained_with_other_channels_and_classes(backbone, tmp_path):
    model = stir(create(backbone))
    torch.save(model.state_dict(), tmp_path / 'm.pth')
    overlay = {'file': str(tmp_path / 'm.pth'), 'num_classes': 5}
    other = timm.create_model('emoreg', pretrained=True, backbone=backbone, num_classes=3, in_chans=1,
                              pretrained_cfg_overlay=overlay, **BACKBONES[backbone]).eval()
    assert other(images(chans=1)).shape == (2, 3)
    skipped = (*HEADS, model.pretrained_cfg['first_conv'])
    for key, value in model.state_dict().items():
        if not key.startswith(skipped):
            assert torch.equal(other.state_dict()[key], value), key


def test_drop_rates():
    model = create(drop_rate=0.5, drop_path_rate=0.5)
    assert model.backbone.drop_rate == 0.5
    assert any(getattr(m, 'drop_prob', 0) for m in model.modules())
    assert not torch.equal(model.train()(images()), model(images()))
    assert not {'drop_rate', 'drop_path_rate'} & get_model_args(model).keys()


def test_dropout_inside_a_removed_classifier_still_acts():
    model = create('levit_128s', img_size=224, drop_rate=0.5, device='meta')
    assert model.head_drop.p == 0.5


def test_a_batch_norm_of_little_variance_is_folded_exactly():
    plain = timm.create_model('levit_128s', num_classes=5).eval()
    for norm in [m for m in plain.modules() if isinstance(m, torch.nn.BatchNorm1d)][-1:]:  # of the classifier
        norm.running_var.fill_(norm.eps)
    x = images(size=224)
    want = plain(x)
    assert_close(EmoReg(plain, balance=0.0).eval()(x), want, rtol=1e-4, atol=1e-5)


def test_that_dropout_acts_on_every_response():
    model = stir(create(balance=0.0)).train()
    model.head_drop = torch.nn.Dropout(1.0)  # nothing is left of the features
    head, affect = (part.bias.expand(2, -1) for part in (model.head, model.head_affect))
    assert_close(model(images()), head)
    assert_close(model.forward_responses(images()).non_emotional, head)
    assert_close(model.forward_responses(images()).affect, affect)
    assert_close(model.forward_affect(images()), affect)


@both
def test_global_pool(backbone):
    model = create(backbone, global_pool='max' if backbone == 'test_resnet' else 'avg').eval()
    h = model.forward_head(model.forward_features(images()), pre_logits=True)
    model.reset_classifier(4)
    assert torch.equal(model.forward_head(model.forward_features(images()), pre_logits=True), h)
    model.reset_classifier(0, '')
    unpooled = model(images())
    assert unpooled.ndim == (4 if backbone == 'test_resnet' else 3)
    assert torch.equal(unpooled, model.backbone(images()))
    for pooling in ('', None):  # None keeps the pooling, as timm's models do, so that there is nothing to read
        with pytest.raises(ValueError, match="global_pool='' or pruning leaves no pooled vector for the 3 classes"):
            model.reset_classifier(3, pooling)
    assert torch.equal(model(images()), unpooled)
    with pytest.raises(ValueError, match='no pooled feature vector'):
        create(backbone, global_pool='')
    assert create(backbone, global_pool='', num_classes=0).eval()(images()).shape == unpooled.shape


def test_a_wider_pooling_renews_what_reads_it():
    model = create(balance='gate').eval()
    width = model.head_hidden_size
    model.reset_classifier(5, 'catavgmax')
    assert model.head_hidden_size == 2 * width == model.head_affect.in_features
    assert model(images()).shape == (2, 5)
    assert model.balance == 'gate'


def test_what_the_balance_has_learned_outlives_a_wider_pooling():
    model = stir(create(balance='learned', modulation=False))
    before = model.balance
    model.reset_classifier(7, 'catavgmax')
    assert model.balance == before != 0.5


@pytest.mark.parametrize('unpool', [lambda m: m.reset_classifier(0, ''), lambda m: m.prune_intermediate_layers([0])])
@both
def test_without_pooled_features_there_is_no_response(backbone, unpool):
    model = create(backbone).eval()
    unpool(model)
    for forward in (model.forward_affect, model.forward_responses):
        with pytest.raises(RuntimeError, match='leaves no pooled vector for the heads to read'):
            forward(images())


@pytest.mark.parametrize('size', [None, 48])
def test_the_small_image_form_is_shown_small_images(size, tmp_path):
    expected = (size or 32, size or 32)
    named = timm.create_model('emoreg_resnet18', num_classes=3, small_image=True, img_size=size, in_chans=1)
    wrapped = create('resnet10t', small_image=True, img_size=size)
    direct = EmoReg('resnet10t', num_classes=3, small_image=True, img_size=size)
    for model in (named, wrapped, direct):
        config = resolve_model_data_config(model)
        assert config['input_size'][1:] == expected
        assert config['crop_pct'] == 1.0
    save_for_hf(named, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert resolve_model_data_config(again)['input_size'] == (1, *expected)
    assert get_model_input_config(again)['input_size'] == (1, *expected)
    assert create('resnet10t').pretrained_cfg['input_size'][1:] != expected


def test_registered_models_follow_their_backbones_cfg():
    for name, backbone in BACKBONE_OF.items():
        cfg = timm.create_model(name, device='meta').pretrained_cfg
        own = timm.get_pretrained_cfg(backbone).to_dict()
        for key in ('mean', 'std', 'input_size', 'interpolation', 'crop_pct', 'pool_size', 'fixed_input_size'):
            assert cfg.get(key) == own.get(key), (name, key)
        assert cfg['first_conv'] == f"backbone.{own['first_conv']}"
        assert cfg['classifier'] == ('head', 'head_emo')


def test_the_cfg_that_timms_scripts_resolve_gives_way_to_the_backbones():
    args = timm.models.resolve_model_input_args('emoreg', {'img_size': 32}, backbone='test_vit', img_size=32)
    model = timm.create_model(**args)
    own = timm.get_pretrained_cfg('test_vit')
    assert (model.pretrained_cfg['mean'], model.pretrained_cfg['first_conv']) == (own.mean, 'backbone.patch_embed.proj')
    overlay = timm.create_model('emoreg', backbone='test_vit', pretrained_cfg_overlay={'mean': (0.1, 0.2, 0.3)})
    assert overlay.pretrained_cfg['mean'] == (0.1, 0.2, 0.3)
    given = timm.create_model('emoreg', backbone='test_vit', pretrained_cfg=PretrainedCfg(mean=(0.1, 0.2, 0.3)))
    assert given.pretrained_cfg['mean'] == (0.1, 0.2, 0.3)


def test_an_input_stem_that_follows_the_arguments():
    model = create('vit_tiny_patch16_224', use_naflex=True, device='meta')
    assert get_model_input_config(model)['first_conv'] == 'backbone.embeds.proj'


@both
def test_features_only(backbone):
    plain = plain_model(backbone, features_only=True).eval()
    model = create(backbone, features_only=True).eval()
    with torch.no_grad():
        for got, want in zip(model(images()), plain(images()), strict=True):
            assert torch.equal(got, want)
    assert model.feature_info.channels() == plain.feature_info.channels()
    assert model.feature_info.reduction() == plain.feature_info.reduction()
    one = create(backbone, features_only=True, out_indices=(1,)).train()
    sum(f.sum() for f in one(images())).backward()
    assert not [n for n, p in one.named_parameters() if p.grad is None]


@pytest.mark.parametrize('depth', [4, 14])  # vit_tiny has 12
def test_features_of_a_backbone_of_another_depth(depth):
    kwargs = {'features_only': True, 'depth': depth, 'device': 'meta'}
    model = create('vit_tiny_patch16_224', small_image=True, img_size=64, **kwargs)
    plain = timm.create_model('vit_tiny_patch16_224', **kwargs)
    assert model.feature_info.out_indices == plain.feature_info.out_indices == (depth - 3, depth - 2, depth - 1)


def test_features_of_a_family_with_other_levels():
    model = create('test_convnext', features_only=True)
    assert len(model(images(size=64))) == len(timm.create_model('test_convnext', features_only=True).feature_info)


@both
def test_forward_intermediates(backbone):
    model = create(backbone).eval()
    out, features = model.forward_intermediates(images(), indices=[0, -1])
    assert torch.equal(out, model.forward_features(images()))
    want = model.backbone.forward_intermediates(images(), indices=[0, -1], intermediates_only=True)
    assert all(torch.equal(f, w) for f, w in zip(features, want, strict=True))
    modules = dict(model.named_modules())
    assert all(info['module'] in modules for info in model.feature_info)


@pytest.mark.parametrize('balance', ['learned', 'gate'])
@both
def test_pruning_leaves_nothing_unused(backbone, balance):
    model = create(backbone, balance=balance).train()
    take = model.prune_intermediate_layers([1])
    sum(f.sum() for f in model.forward_intermediates(images(), indices=take, norm=True,
                                                     intermediates_only=True)).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert torch.equal(model.eval()(images()), model.forward_features(images()))
    model.reset_classifier(3, 'avg')
    assert model(images()).shape == (2, 3)
    assert model.head_hidden_size == model.num_features == model.head_affect.in_features
    assert model.balance == 0.0


@pytest.mark.parametrize('experience', ['shared', 'separate'])
def test_heads_that_pruning_kept_fit_once_they_are_new(experience):
    model = create('resnet10t', experience=experience).eval()
    width = model.head_hidden_size
    model.prune_intermediate_layers([3], prune_head=False)
    model.reset_classifier(5, 'avg')
    assert model.head_hidden_size < width
    assert model(images()).shape == (2, 5)
    for stream in (model.backbone, model.backbone_emo):
        assert stream is None or stream.head_hidden_size == model.head_hidden_size


def test_the_balance_of_a_pruned_model_survives_its_export(tmp_path):
    model = stir(create(balance=0.3)).eval()
    model.prune_intermediate_layers([len(model.feature_info) - 1])
    model.reset_classifier(3, 'avg')
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.balance == model.balance == 0.0
    assert_close(again(images()), model(images()))


def test_pruning_behind_the_last_feature_keeps_the_heads():
    model = stir(create()).eval()
    want = model(images())
    model.prune_intermediate_layers([len(model.feature_info) - 1], prune_head=False)
    assert torch.equal(model(images()), want)


@both
def test_grad_checkpointing_gives_equal_gradients(backbone):
    gradients = []
    for enable in (False, True):
        model = stir(create(backbone)).train()
        model.set_grad_checkpointing(enable)
        assert model.backbone.grad_checkpointing == enable
        model(images()).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, msg=name)


def test_set_input_size_and_its_export(tmp_path):
    model = stir(create('test_vit', img_size=32, dynamic_img_size=False)).eval()
    model.set_input_size(img_size=64)
    assert get_model_input_config(model)['input_size'] == (3, 64, 64)
    want = model(images(size=64))
    with pytest.raises(AssertionError, match='Input height'):
        model(images(size=32))
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(images(size=64)), want)
    free = create()
    free.set_input_size(img_size=64)
    assert 'img_size' not in get_model_args(free)  # any size works, and a ResNet takes no such argument


@pytest.mark.parametrize('size', [32, 48])
def test_set_input_size_of_a_small_image_form_keeps_its_patches_in_an_export(tmp_path, size):
    model = stir(create('test_vit', small_image=True)).eval()
    model.set_input_size(img_size=size)
    assert not model.small_image
    want = model(images(size=size))
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.backbone.patch_embed.patch_size == (4, 4)  # as at 32 px
    assert torch.equal(again(images(size=size)), want)


def test_a_small_image_resnet_is_never_rebuilt_with_the_stock_stem(tmp_path):
    plain = create_backbone('test_resnet', small_image=True, num_classes=5).eval()
    save_for_hf(plain, tmp_path / 'plain', safe_serialization=True)
    with pytest.raises(TypeError, match='small_image'):  # its stem differs in a stride alone, which no tensor shows
        timm.create_model(f'local-dir:{tmp_path / "plain"}', pretrained=True)
    model = stir(EmoReg(plain)).eval()
    assert model.small_image
    save_for_hf(model, tmp_path / 'emoreg', safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "emoreg"}', pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))
    sizes = [[resolve_model_data_config(m)[key] for key in ('input_size', 'crop_pct')] for m in (model, again)]
    assert sizes == [[(3, 32, 32), 1.0]] * 2


def test_a_balance_of_numpy_is_exported(tmp_path):
    model = EmoReg('test_resnet', num_classes=5, balance=np.float32(0.25))
    for balance in (0.25, 0.75):
        save_for_hf(model, tmp_path, safe_serialization=True)
        assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).balance == balance
        model.balance = np.float32(0.75)


def test_dynamic_img_size():
    model = create('test_vit', img_size=32, dynamic_img_size=True).eval()
    assert not get_model_input_config(model)['fixed_input_size']
    assert model(images(size=32)).shape == model(images(size=48)).shape == (2, 5)


@pytest.mark.parametrize('reset', [None, (3, None), (3, 'avg'), (0, ''), (0, None)])
@both
def test_export_reloads_with_equal_outputs(backbone, reset, tmp_path):
    model = stir(create(backbone, balance='gate', num_affect=4)).eval()
    if reset:
        model.reset_classifier(*reset)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))
    assert again.global_pool == model.global_pool
    assert (tmp_path / 'model.safetensors').is_file()


@pytest.mark.parametrize('make', [
    lambda: EmoReg('test_vit', img_size=32, num_classes=5, num_affect=2, affect_kind='ratings', balance=0.3),
    lambda: EmoReg(plain_model('test_vit'), num_affect=2, affect_kind='ratings', balance=0.3, modulation=False),
    lambda: EmoReg('test_resnet', num_classes=5, in_chans=1, experience='separate'),
], ids=['name', 'built', 'separate'])
def test_a_model_built_without_the_factory_is_a_timm_model(make, tmp_path):
    model = stir(make()).eval()
    backbone = timm.get_pretrained_cfg(get_model_args(model)['backbone'])
    assert resolve_model_data_config(model)['mean'] == backbone.mean
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(images(chans=model.in_chans)), model(images(chans=model.in_chans)))
    assert again.affect_kind == model.affect_kind
    assert again.balance == model.balance


@pytest.mark.parametrize('mode', [True, False])
def test_a_built_model_keeps_its_mode(mode):
    model = EmoReg(plain_model().train(mode))
    assert {m.training for m in model.modules()} == {mode}


@pytest.mark.parametrize(('backbone', 'changed'), [('test_resnet', {'in_chans': 1}), ('test_vit', {'img_size': 48})])
def test_an_export_with_a_separate_stream_fits_other_inputs(backbone, changed, tmp_path):
    model = stir(create(backbone, experience='separate'))
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **changed)
    for stream in ('backbone', 'backbone_emo'):  # each from its own tensors, as timm fits the plain model
        part = getattr(model, stream)
        save_for_hf(part, tmp_path / stream, safe_serialization=True, model_args={'num_classes': 0})
        plain = timm.create_model(f'local-dir:{tmp_path / stream}', pretrained=True, num_classes=0, **changed)
        fitted = getattr(again, stream).state_dict()
        assert all(torch.equal(fitted[k], v) for k, v in plain.state_dict().items())


def test_an_export_does_not_fetch_what_it_once_started_from(tmp_path):
    save_for_hf(plain_model(), tmp_path / 'plain', safe_serialization=True)
    model = timm.create_model('emoreg', backbone=f'local-dir:{tmp_path}/plain', pretrained_backbone=True).eval()
    save_for_hf(model, tmp_path / 'ours', safe_serialization=True)
    (tmp_path / 'plain' / 'model.safetensors').unlink()
    again = timm.create_model(f'local-dir:{tmp_path}/ours', pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))
    timm.create_model(f'local-dir:{tmp_path}/ours')


@both
def test_no_weight_decay_and_layer_decay(backbone):
    plain, model = plain_model(backbone), create(backbone)
    assert model.no_weight_decay() == {f'backbone.{n}' for n in getattr(plain, 'no_weight_decay', set)()}
    ours, theirs = layer_decay(model), layer_decay(plain)
    assert len(set(ours.values())) > 3
    for name, group in ours.items():
        if name.startswith('backbone.'):
            assert group == theirs[name.removeprefix('backbone.')], name
        else:
            assert group[0] == 1.0, name
    groups = create_optimizer_v2(model, opt='adamw', lr=1.0, layer_decay=0.7).param_groups
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))


def test_layer_groups_with_anchors_inside_alternatives():
    for name in ('test_efficientnet', 'pit_ti_224', 'test_convnext', 'cait_xxs24_224'):
        model = create(name, device='meta')
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        assert groups.keys() == dict(model.named_parameters()).keys()
        assert groups['head.weight'] == max(groups.values()) > 2


def test_a_family_that_groups_its_classifier():
    plain, model = plain_model('iformer_t'), create('iformer_t')
    theirs, ours = layer_decay(plain), layer_decay(model)
    assert all(v == theirs[k.removeprefix('backbone.')] for k, v in ours.items() if k.startswith('backbone.'))


def test_ema_deepcopy_and_pickle():
    model = stir(create(balance='learned')).eval()
    want = model(images())
    ema = ModelEmaV3(model, decay=0.0)
    assert torch.equal(copy.deepcopy(model)(images()), want)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), want)
    with torch.no_grad():
        model.head.weight.add_(1)
    ema.update(model)
    assert torch.equal(ema.module.eval()(images()), model(images()))


def test_freezing():
    model = create()
    freeze(model, 'backbone')
    model.train()(images()).sum().backward()
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert model.head.weight.grad is not None
    model.requires_grad_(False)
    model.reset_classifier(0)
    model.set_input_size(img_size=64)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@both
def test_half_precision(backbone, dtype):
    model = stir(create(backbone, balance='gate')).eval()
    want = model(images())
    half = create(backbone, balance='gate', dtype=dtype).eval()
    assert {p.dtype for p in half.parameters()} == {dtype}
    half.load_state_dict(model.state_dict())
    got = half(images().to(dtype))
    assert got.dtype == dtype
    assert (got.float() - want).norm() < 0.05 * want.norm()
    half.reset_classifier(3)
    assert half.head.weight.dtype == half.head_emo.weight.dtype == dtype
    half.balance = 'learned'
    assert half(images().to(dtype)).dtype == dtype


def test_autocast_answers_nearly_as_float32():
    model = stir(create(balance='learned')).eval()
    want = model(images())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = model(images())
    assert 0 < (got.float() - want).norm() < 0.05 * want.norm()


@both
@pytest.mark.parametrize('kwargs', [{}, {'experience': 'separate'}, {'balance': 'gate'}])
def test_meta_device(backbone, kwargs):
    model = create(backbone, device='meta', **kwargs)
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {'meta'}
    assert model(images().to('meta')).shape == (2, 5)
    with torch.device('meta'):
        assert create(backbone, **kwargs).head_emo.weight.is_meta


def test_training_with_distributed_wrappers_in_mind():
    # what DistributedDataParallel and state_dict users see: plain names, no duplicates, nothing but tensors
    model = create(balance='learned')
    state = model.state_dict()
    tops = {key.split('.')[0] for key in state}
    assert tops == {'backbone', 'head', 'head_emo', 'head_affect', 'modulation', 'regulation'}
    assert len({v.data_ptr() for v in state.values() if v.numel()}) == len([v for v in state.values() if v.numel()])


# -- stage 1 to stage 2 ------------------------------------------------------------------------------------------------

def test_a_built_backbone_of_the_small_image_form_keeps_its_size():
    built = EmoReg(create_backbone('resnet10t', small_image=True, img_size=64))
    named = EmoReg('resnet10t', small_image=True, img_size=64)
    for model in (built, named):
        assert resolve_model_data_config(model)['input_size'] == (3, 64, 64)
        assert to_2tuple(get_model_args(model)['img_size']) == (64, 64)


@pytest.mark.parametrize('experience', ['shared', 'separate'])
def test_load_experience(experience):
    torch.manual_seed(9)
    first = timm.create_model('emoreg', backbone='test_resnet', num_classes=0)
    model = create(experience=experience).eval()
    before = copy.deepcopy(model.state_dict())
    model.load_experience(first.state_dict())
    assert torch.equal(model.forward_affect(images()), first.eval().forward_affect(images()))
    untouched = HEADS if experience == 'shared' else (*HEADS, 'backbone.')
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k.startswith(untouched))


def test_a_share_of_an_experience_is_mixed_with_what_the_backbone_has():
    torch.manual_seed(9)  # create() has a seed of its own, and would give both the same weights
    stage_1 = timm.create_model('emoreg', backbone='test_resnet', num_classes=5).state_dict()
    kernel = next(k for k, v in stage_1.items() if k.startswith('backbone.') and v.ndim == 4)
    assert not torch.equal(stage_1[kernel], create().state_dict()[kernel])
    stage_1['backbone.bn1.num_batches_tracked'] += 7
    for share in (0.0, 0.3, 1.0):
        model = create()
        before = copy.deepcopy(model.state_dict())
        model.load_experience({k: v.bfloat16() if v.is_floating_point() else v for k, v in stage_1.items()}, share)
        for key, value in model.state_dict().items():
            taught = stage_1[key].bfloat16().to(value) if value.is_floating_point() else stage_1[key]
            if key.startswith(HEADS):
                assert torch.equal(value, before[key])
            elif not value.is_floating_point() or key.startswith('head_affect.'):
                assert torch.equal(value, taught)
            elif share in (0, 1):
                assert torch.equal(value, taught if share else before[key])
            else:
                torch.testing.assert_close(value, share * taught + (1 - share) * before[key])
    separate = create(experience='separate')
    for refused, share, why in ((create(), 1.5, r'share=1\.5 is outside \[0, 1\]: 1 takes the experience as it is'),
                                (create(), float('nan'), 'share=nan is outside'),
                                (separate, 0.5, "share=0.5: experience='separate' keeps stage 1 as it is. Leave one")):
        before = copy.deepcopy(refused.state_dict())
        with pytest.raises(ValueError, match=why):
            refused.load_experience(stage_1, share)
        assert all(torch.equal(v, before[k]) for k, v in refused.state_dict().items())


@pytest.mark.parametrize('experience', ['shared', 'separate'])
def test_experience_of_another_image_size_is_resized_as_timm_resizes_weights(experience):
    torch.manual_seed(9)
    first = timm.create_model('emoreg', backbone='test_vit', img_size=64, num_classes=0)
    model = timm.create_model('emoreg', backbone='test_vit', img_size=96, num_classes=4, experience=experience)
    model.load_experience(first.state_dict())
    stream = model.backbone if experience == 'shared' else model.backbone_emo
    expected = resample_abs_pos_embed(first.backbone.pos_embed, [6, 6], num_prefix_tokens=1)
    assert torch.equal(stream.pos_embed, expected)
    assert torch.equal(stream.blocks[0].attn.qkv.weight, first.backbone.blocks[0].attn.qkv.weight)
    mixer = [timm.create_model('emoreg', backbone='mixer_s32_224', img_size=s, num_classes=0) for s in (64, 96)]
    with pytest.raises(ValueError, match=r"mlp_tokens.fc1.weight' of the experience has shape \(256, 4\), the model "
                                         r'needs \(256, 9\). Use the same model, form \(small_image, img_size\)'):
        mixer[1].load_experience(mixer[0].state_dict())  # whose family has no filter for it


def test_experience_of_another_architecture_is_refused():
    model = create()
    before = copy.deepcopy(model.state_dict())
    state = create().state_dict()
    cut = {k: v for k, v in state.items() if k != 'backbone.bn1.weight'}
    with pytest.raises(ValueError, match=r"has no 'backbone.bn1.weight'.*same model and form"):
        model.load_experience(cut)
    with pytest.raises(ValueError, match=r"'head_affect.weight' of the experience has shape \(3, .*num_affect"):
        model.load_experience(create(num_affect=3).state_dict())
    deeper = {**state, 'backbone.layer4.7.conv1.weight': torch.zeros(1)}
    with pytest.raises(ValueError, match=r"the model has no 'backbone.layer4.7.conv1.weight'"):
        model.load_experience(deeper)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- errors ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('kwargs', 'error', 'message'), [
    ({'backbone': 'resnet81'}, ValueError, r"Unknown backbone 'resnet81'. Did you mean .*resnet18"),
    ({'backbone': 'emoreg_resnet18'}, ValueError, 'is emotionally regulated already'),
    ({'pretrained': True}, ValueError, r"no weights of its own\. For the backbone's: .*, pretrained_backbone=True"),
    ({'backbone': 'mobilenetv5_300m_enc'}, ValueError, r'no pooled feature vector .* it has no get_classifier'),
    ({'balance': 1.5}, ValueError, 'outside'),
    ({'balance': 'always'}, ValueError, 'unknown'),
    ({'no_such_argument': 1}, TypeError, 'no_such_argument'),
    ({'pretrained_cfg': 'a1_in1k'}, ValueError, r"emoreg.a1_in1k: 'emoreg' stands for any backbone.* it takes no tag. "
                                                r"For a weight of the backbone: backbone='test_resnet.a1_in1k'"),
])
def test_errors_of_construction(kwargs, error, message):
    with pytest.raises(error, match=message):
        create(device='meta', **kwargs)


def test_a_regulated_model_is_no_backbone():
    with pytest.raises(TypeError, match=r'backbone=None is a NoneType\. Give the name of a timm model, or a built one'):
        EmoReg(None)
    with pytest.raises(ValueError, match=r"modulation='no' is a str\. Give True or False"):
        create(modulation='no')
    with pytest.raises(ValueError, match=r'num_classes=-1 is below 0\. Give the number of classes, or 0 for none'):
        create(num_classes=-1)
    with pytest.raises(ValueError, match=r"'EmoReg' is emotionally regulated already\. Give a plain model"):
        EmoReg(EmoReg('test_resnet'))


def test_a_registered_model_has_its_backbone():
    with pytest.raises(ValueError, match=r'has the backbone resnet18\. For another one: timm\.create_model'):
        timm.create_model('emoreg_resnet18', backbone='resnet50')


@pytest.mark.parametrize('name', ['emoreg_resnet18', 'emoreg_vit_tiny'])
def test_unknown_keyword_of_a_registered_model(name):
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model(name, no_such_argument=1, device='meta')


def test_checkpoint_of_another_architecture_is_named(tmp_path):
    model = create()
    state = create().state_dict()
    with pytest.raises(ValueError, match=r"another architecture or form: it has no 'backbone.conv1"):
        checkpoint_filter_fn(create('test_vit').state_dict(), model)
    with pytest.raises(ValueError, match=r"it has no 'backbone.conv1"):
        checkpoint_filter_fn(plain_model('test_vit').state_dict(), model)
    with pytest.raises(ValueError, match=r"its 'head_affect.weight' has shape \(4, .*the model needs \(8,"):
        checkpoint_filter_fn(create(num_affect=4).state_dict(), model)
    with pytest.raises(ValueError, match=r"the model has no 'backbone.layer4.7.conv1.weight'"):
        checkpoint_filter_fn({**state, 'backbone.layer4.7.conv1.weight': torch.zeros(1)}, model)
    torch.save(create('test_vit').state_dict(), tmp_path / 'vit.pth')
    with pytest.raises(ValueError, match='another architecture or form'):
        timm.create_model('emoreg', pretrained=True, backbone='test_resnet', num_classes=5,
                          pretrained_cfg_overlay={'file': str(tmp_path / 'vit.pth'), 'num_classes': 5})


SMALL = {'small_image': True, 'num_affect': 1, 'affect_kind': 'ratings'}


def new(backbone, **kwargs):
    return timm.create_model('emoreg', backbone=backbone, num_classes=kwargs.pop('num_classes', 5), device='meta',
                             **kwargs)


@pytest.mark.parametrize(('backbone', 'theirs', 'ours', 'found', 'argument'), [
    ('resnet18', SMALL, {}, "'backbone.conv1.weight' has the shape (64, 3, 3, 3), the model needs (64, 3, 7, 7)",
     'small_image or img_size'),
    ('resnet18', {'num_affect': 2}, {}, "'head_affect.weight' has the shape (2, 512), the model needs (8, 512)",
     'num_affect=2'),
    ('resnet18', {'num_classes': 7}, {}, "'head.weight' has the shape (7, 512), the model needs (5, 512)",
     'num_classes=7'),
    ('vit_tiny_patch16_224', SMALL, {},
     "'backbone.pos_embed' has the shape (1, 65, 192), the model needs (1, 197, 192)", 'small_image or img_size'),
])
def test_a_checkpoint_of_another_form_is_one_error(backbone, theirs, ours, found, argument):
    state, model = new(backbone, **theirs).state_dict(), new(backbone, **ours)
    message = re.escape(f'The checkpoint is of another form than the model: its {found}. Build the model with the '
                        f'arguments that the saved one had, such as {argument}, or a run of train.py by '
                        'timm_emoreg.trained.trained_model(PATH).')
    for strict in (True, False):  # as torch does
        with pytest.raises(RuntimeError, match=f'^{message}$'):
            model.load_state_dict(state, strict=strict)
    wrapped = torch.nn.ModuleDict({'module': model})  # as DistributedDataParallel does
    with pytest.raises(RuntimeError, match=f'^{message}$'):
        wrapped.load_state_dict({f'module.{name}': tensor for name, tensor in state.items()})


def test_a_checkpoint_with_a_number_for_a_vector_is_of_another_form():
    state = {**create().state_dict(), 'head.bias': torch.tensor(1.0)}
    with pytest.raises(RuntimeError, match=r"its 'head\.bias' has the shape \(\), the model needs \(\d+,\)"):
        create().load_state_dict(state)


@both
def test_a_checkpoint_of_the_plain_backbone_is_told_how_to_be_loaded(backbone, tmp_path):
    plain = plain_model(backbone)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r'of the plain backbone\. timm\.create_model\(NAME, num_classes=N'):
            create(backbone).load_state_dict(plain.state_dict(), strict=strict)
    overlay = {'file': str(tmp_path / 'plain.pth'), 'num_classes': plain.num_classes}  # as the message says
    loaded = create(backbone, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=plain.num_classes, balance=0)
    assert torch.equal(loaded.eval()(images()), plain.eval()(images()))


def test_other_misfits_of_a_checkpoint_are_left_to_torch():
    model, state = create(num_classes=5), create(num_classes=5).state_dict()
    part = {name: tensor for name, tensor in state.items() if name != 'head.bias'}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "head.bias"'):
        model.load_state_dict(part)
    assert model.load_state_dict({**part, 'x': torch.zeros(1)}, strict=False) == (['head.bias'], ['x'])
    with pytest.raises(RuntimeError, match=r'size mismatch for head\.weight'):  # no checkpoint of an EmoReg
        model.load_state_dict({'head.weight': torch.zeros(3, 64)}, strict=False)
    with pytest.raises(TypeError, match='Expected state_dict to be dict-like'):
        model.load_state_dict(None)


def test_bare_checkpoints_of_families_with_other_classifiers():
    for name in ('levit_128s', 'deit_tiny_distilled_patch16_224'):
        plain = timm.create_model(name, num_classes=3).eval()
        with torch.no_grad():  # statistics that folding must respect
            for m in plain.get_classifier()[0].modules():
                if isinstance(m, torch.nn.BatchNorm1d):
                    m.running_mean.normal_()
                    m.running_var.uniform_(0.5, 2)
        model = create(name, num_classes=3, img_size=None, balance=0.0).eval()
        model.load_state_dict(checkpoint_filter_fn(plain.state_dict(), model))
        h = plain.forward_head(plain.forward_features(images(size=224)), pre_logits=True)
        want = sum(head(h) for head in plain.get_classifier()) / 2
        assert_close(model(images(size=224)), want, rtol=1e-4, atol=1e-4)


def test_position_embeddings_are_resized_by_the_familys_filter():
    bare, model = plain_model('test_vit', img_size=64).state_dict(), create('test_vit', img_size=32)
    fitted = checkpoint_filter_fn(bare, model)
    assert fitted['backbone.pos_embed'].shape == model.backbone.pos_embed.shape
    assert torch.equal(fitted['head.weight'], bare['head.weight'])
    assert torch.equal(fitted['head_emo.weight'], bare['head.weight'])
    own = model.state_dict()
    assert checkpoint_filter_fn({'state_dict': own}, model).keys() == own.keys()  # as training scripts save it
