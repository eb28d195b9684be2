from __future__ import annotations

import pytest
import timm
import torch

from timm_emoreg.trainable import ModelError, check_takes, check_takes_one, reason_of

CPU = torch.device('cpu')


def test_a_size_that_leaves_nothing_to_pool_is_named():
    model = timm.create_model('test_convnext')
    check_takes(model, 'test_convnext', '--img-size', 32, CPU)
    with pytest.raises(ModelError, match=r'^--start-img-size 16: test_convnext takes no images of that size \(.+\)\. '
                                         'Use a larger one, or leave it out'):
        check_takes(model, 'test_convnext', '--start-img-size', 16, CPU)


def test_one_image_a_step_is_refused_where_batch_norm_has_one_value_a_channel():
    model = timm.create_model('test_resnet')
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check_takes_one(model, 'test_resnet', 64, CPU)
    with pytest.raises(ModelError, match=r'batch norm of test_resnet has one value a channel there \(Expected more .+'
                                         r'\)\. Use a larger one\.$'):
        check_takes_one(model, 'test_resnet', 32, CPU)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    check_takes_one(timm.create_model('test_vit', img_size=32), 'test_vit', 32, CPU)


def test_an_assertion_without_a_message_is_named_by_its_type():
    assert reason_of(AssertionError()) == 'AssertionError'
    assert reason_of(ValueError('one.\ntwo')) == 'one'
