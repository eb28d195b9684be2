"""Attention in training on a CPU: which formula is chosen, and that both are the same; no test measures time."""
import pytest
import timm
import torch

from timm_emoreg.training import attention
from timm_emoreg.training.attention import choose_attention, fused_attentions, use_plain_attention

CPU = torch.device('cpu')


@pytest.mark.parametrize('experience', ['shared', 'separate'])
def test_plain_attention_answers_and_learns_as_the_fused_one(experience):
    model = timm.create_model('emoreg', backbone='test_vit', num_classes=3, experience=experience)
    images = torch.randn(2, 3, 160, 160)
    answers, gradients = [], []
    for number in range(2):
        answers.append(model(images))
        model.zero_grad()
        answers[-1].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert len(fused_attentions(model)) == (0 if number else 6 * (2 if experience == 'separate' else 1))
        use_plain_attention(model)
    torch.testing.assert_close(*answers)
    torch.testing.assert_close(*gradients)


def vit(**kwargs):
    return timm.create_model('test_vit', **{'img_size': 32, 'patch_size': 4, **kwargs})


def test_a_net_without_attention_is_asked_nothing(monkeypatch):
    monkeypatch.setattr(attention, 'fastest', lambda ways: pytest.fail('probed'))
    model = timm.create_model('test_resnet')
    assert fused_attentions(model) == []
    assert choose_attention(model, CPU, 'bfloat16', 32) is None


def test_plain_attention_that_was_asked_for_is_noted(monkeypatch):
    monkeypatch.setattr(attention, 'fastest', lambda ways: pytest.fail('probed'))
    model = vit()  # as TIMM_FUSED_ATTN=0 has it
    use_plain_attention(model)
    assert choose_attention(model, CPU, 'float32', 32) == 'plain'


@pytest.mark.parametrize(('device', 'precision', 'img_size', 'patch_size'), [
    ('cpu', 'float32', 32, 4), ('cuda', 'bfloat16', 32, 4), ('cpu', 'bfloat16', 36, 4), ('cpu', 'bfloat16', 32, 2)])
def test_the_fused_kernel_stays_without_a_probe(monkeypatch, device, precision, img_size, patch_size):
    monkeypatch.setattr(attention, 'fastest', lambda ways: pytest.fail('probed'))
    model = vit(img_size=img_size, patch_size=patch_size)
    assert choose_attention(model, torch.device(device), precision, img_size) == 'fused'


def test_a_net_of_unknown_patches_counts_by_the_size_of_its_images(monkeypatch):
    monkeypatch.setattr(attention, 'fastest', lambda ways: 'plain')
    model = timm.create_model('emoreg', backbone='mobilevit_xxs')
    assert [choose_attention(model, CPU, 'bfloat16', size) for size in (32, 36)] == ['plain', 'fused']


@pytest.mark.parametrize('winner', ['fused', 'plain'])
def test_the_probe_decides_for_few_patches_in_16_bits(monkeypatch, winner):
    def fastest(ways):
        assert list(ways) == ['fused', 'plain']  # of equal ones the first is taken: plain must gain something
        return winner
    monkeypatch.setattr(attention, 'fastest', fastest)
    assert choose_attention(vit(img_size=64, patch_size=8), CPU, 'bfloat16', 64) == winner


def test_the_probe_trains_both_ways_on_the_same_input(monkeypatch):
    taken = []
    monkeypatch.setattr(attention, 'fastest', lambda ways: taken.extend(way() for way in ways.values()) or 'plain')
    model, before = vit(), torch.get_rng_state()
    choose_attention(model, CPU, 'bfloat16', 32)
    assert torch.equal(torch.get_rng_state(), before)  # no random numbers are drawn from the stream of the caller
    fused, plain = taken
    assert [g.dtype for g in fused] == [torch.bfloat16] * 3
    torch.testing.assert_close(fused, plain, atol=0.01, rtol=0)
    assert fused[2].abs().sum() > 0
