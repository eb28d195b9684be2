"""A small sample of backbone_sweep.py: one family of each kind of head, groups and dropout."""
import pytest
import timm
from backbone_sweep import on_meta, with_tensors

THEIRS, FALLBACK = "the family's", 'the fallback'


@pytest.mark.parametrize(('name', 'logits', 'groups'), [
    ('test_resnet', 'equal', THEIRS),
    ('test_convnext', 'equal', THEIRS),
    ('test_efficientnet', 'equal', THEIRS),
    ('test_byobnet', 'equal', THEIRS),
    ('test_nfnet', 'equal', THEIRS),
    ('test_vit', 'equal', THEIRS),
    ('pit_ti_distilled_224', 'own head', FALLBACK),  # a distilled pair that reads two tokens; no group_matcher
    ('efficientformerv2_s0', 'close', THEIRS),  # a pair that reads the same features
    ('levit_128s', 'close', THEIRS),  # BatchNorm and dropout inside the classifier
    ('lcnetv2_small', 'equal', THEIRS),  # dropout after pre_logits
])
def test_real_tensors(name, logits, groups):
    assert with_tensors(name) == {'logits': logits, 'groups': groups, 'dropout': THEIRS}


@pytest.mark.parametrize('module', ['cait', 'crossvit', 'dla', 'mvitv2', 'metaformer', 'efficientvim', 'vgg', 'volo',
                                    'swin_transformer', 'naflexvit', 'vision_transformer_sam', 'inception_v3', 'shvit',
                                    'efficientvit_msra'])
def test_one_of_a_module_on_meta(module):
    assert on_meta(timm.list_models(module=module)[0]) > 1e6


@pytest.mark.parametrize('name', ['mobilenetv5_300m_enc', 'qwen3_vit_88m_enc'])
def test_token_encoders_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' gives no pooled feature vector .* it has no get_classifier"):
        on_meta(name)
