from __future__ import annotations

import pytest
import timm
import torch

from timm_emoreg.training.trainable import ModelError, check_takes, check_takes_one, reason_of

CPU = torch.device('cpu')


@pytest.mark.parametrize(('name', 'kwargs', 'fits'), [
    ('test_convnext', {}, 32), ('efficientvit_m0', {'img_size': 8}, None),  # that one divides by zero
])
def test_a_size_that_leaves_nothing_to_pool_is_named(name, kwargs, fits):
    model = timm.create_model(name, **kwargs)
    if fits:
        check_takes(model, name, '--img-size', fits, CPU)
    with pytest.raises(ModelError, match=rf'^--start-img-size 8: {name} takes no images of that size \(.+\)\. '
                                         'Use a larger one, or leave it out'):
        check_takes(model, name, '--start-img-size', 8, CPU)


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory.'), torch.AcceleratorError('no GPU', 1)])
def test_what_a_device_lacks_is_no_fault_of_the_size(monkeypatch, error):
    model = timm.create_model('test_resnet')

    def fail(*_):
        raise error
    monkeypatch.setattr(model, 'forward', fail)
    with pytest.raises(type(error)):
        check_takes(model, 'test_resnet', '--img-size', 32, CPU)


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
