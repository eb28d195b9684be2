#!/usr/bin/env python3
"""Which timm models can be a backbone: every name on the meta device, one small member of every module with tensors.

    python tests/backbone_sweep.py                        both parts and their tables (half an hour on one core)
    python tests/backbone_sweep.py --names test_vit 'pit_*'   both parts, with tensors for each of these names
    python tests/backbone_sweep.py --meta-only

Exit status 1 if a model fails without a reason, or if fewer than 99 % work.
"""
import argparse
import sys
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from unittest import mock

import timm
import torch
from timm.models import get_model_input_config
from timm.models._hub import save_for_hf  # the call that every model card of timm shows; it has no public path
from timm.optim import param_groups_layer_decay
from torch.nn import functional

import timm_emoreg  # noqa: F401  registers the models

OURS = 'emoreg*'
SMALL = 128  # px, for models that take any size


def image(model: torch.nn.Module, batch: int = 2, device: str = 'cpu') -> torch.Tensor:
    """Random images of a size that the model takes, a small one where it is free."""
    chans, *size = get_model_input_config(model)['input_size']
    if not get_model_input_config(model)['fixed_input_size']:
        least = model.pretrained_cfg.get('min_input_size')
        size = least[-2:] if least else [min(s, SMALL) for s in size]
    return torch.randn(batch, chans, *size, device=device)


def on_meta(name: str) -> int:
    """Wrap a backbone on the meta device and check its shapes: its number of parameters.

    A refusal is a ValueError with the reason; any other exception is a defect.
    """
    with torch.device('meta'):
        model = timm.create_model('emoreg', backbone=name, num_classes=7).eval()
        chans, *size = get_model_input_config(model)['input_size']
        x = torch.empty(2, chans, *size)
        features = model.forward_features(x)
        h = model.forward_head(features, pre_logits=True)
        assert h.shape == (2, model.head_hidden_size), f'pre_logits {tuple(h.shape)}, width {model.head_hidden_size}'
        assert model.forward_head(features).shape == (2, 7)
        model.reset_classifier(3)
        assert model.forward_head(features).shape == (2, 3)
        model.reset_classifier(0)
        assert model.forward_head(features).shape == h.shape
        stage_1 = timm.create_model('emoreg', backbone=name, num_classes=0)
        assert stage_1.backbone.state_dict().keys() == model.backbone.state_dict().keys()
    return sum(p.numel() for p in model.backbone.parameters())


@contextmanager
def counted_dropout():
    calls, real = [], functional.dropout

    def dropout(x, p=0.5, training=True, inplace=False):
        if training and p > 0:
            calls.append(p)
        return real(x, p, training, inplace)
    with mock.patch.object(functional, 'dropout', dropout):
        yield calls


def layer_decay(model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    """Learning-rate scale and weight decay of every parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    skip = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
    groups = param_groups_layer_decay(model, no_weight_decay_list=skip, layer_decay=0.7)
    return {names[id(p)]: (g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']}


def without_gradient(model: torch.nn.Module, x: torch.Tensor) -> set[str]:
    model.train()
    out = model(x)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


def with_tensors(name: str) -> dict[str, str]:
    """Everything that is promised of a backbone, checked with real tensors; AssertionError for a broken promise.

    Returns:
        ``logits``: how the r = 0 logits relate to the plain model's: 'equal' bit for bit, 'close' or 'own head';
        ``groups`` and ``dropout``: 'the family\'s' or 'none', as the family has it.
    """
    result = {}
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5)
    torch.manual_seed(0)
    model = timm.create_model('emoreg', backbone=name, num_classes=5)
    torch.manual_seed(1)
    x = image(plain)

    # r = 0 is the plain model, from the same seed
    model.balance = 0.0
    with torch.no_grad():
        want, got = plain.eval()(x), model.eval()(x)
    equal, close = torch.equal(got, want), torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    result['logits'] = 'equal' if equal else 'close' if close else 'own head'
    for key, value in plain.state_dict().items():
        own = model.state_dict().get(f'backbone.{key}')
        assert own is None or torch.equal(own, value), f'{key} differs from the plain model of the same seed'
    model.balance = 0.5

    # layer decay: the bare backbone's scale and weight decay for each of its parameters
    theirs, ours = layer_decay(plain), layer_decay(model)
    differing = [k for k, v in ours.items() if k.startswith('backbone.') and theirs[k.removeprefix('backbone.')] != v]
    assert not differing, f'layer decay differs at {differing[0]}'
    result['groups'] = "the family's" if hasattr(plain, 'group_matcher') else 'the fallback'

    # a gradient for whatever has one in the plain model
    missing = {k.removeprefix('backbone.') for k in without_gradient(model, x)} - without_gradient(plain, x)
    assert not missing, f'no gradient for {missing}'

    # another class count keeps everything but the two heads
    kept = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(('head.', 'head_emo.'))}
    model.reset_classifier(3)
    state = model.eval().state_dict()
    assert all(torch.equal(state[k], v) for k, v in kept.items())
    with torch.no_grad():
        y = model(x)
    assert y.shape == (2, 3)
    assert torch.isfinite(y).all()

    # the export is the same model
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_for_hf(model, folder, safe_serialization=True)
        except RuntimeError as e:  # safetensors holds no tensor twice; CoaT has some, as a plain model, too
            if 'share memory' not in str(e) or 'backbone.' not in str(e):
                raise
            save_for_hf(model, folder)
        again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(again(x), y), 'the reloaded model gives other logits'

    # drop_rate acts before the heads as often as before the family's own classifier
    try:
        plain = timm.create_model(name, num_classes=5, drop_rate=0.5).train()
    except TypeError:
        result['dropout'] = 'none'
        return result
    model = timm.create_model('emoreg', backbone=name, num_classes=5, drop_rate=0.5).train()
    with torch.no_grad():
        features = plain.forward_features(x)
        with counted_dropout() as theirs:
            plain.forward_head(features)
        with counted_dropout() as ours:
            model.forward_head(features)
    assert bool(ours) == bool(theirs), f'drop_rate acts {len(ours)} times, {len(theirs)} times in the plain model'
    assert len(ours) <= len(theirs)
    result['dropout'] = "the family's" if ours else 'none'
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--names', nargs='*', default='', help='patterns of model names (default: all)')
    parser.add_argument('--meta-only', action='store_true')
    args = parser.parse_args()
    names = timm.list_models(args.names, exclude_filters=OURS)
    sizes, refused, failures = {}, defaultdict(list), {}
    for name in names:
        try:
            sizes[name] = on_meta(name)
        except ValueError as e:
            refused[str(e).partition(': ')[2]].append(name)
        except Exception as e:  # a defect; the sweep goes on and names each
            failures[name] = f'{type(e).__name__}: {e}'
            print(f'FAILED {name}: {failures[name]}', flush=True)

    def share(n: int) -> str:
        return f'{n} | {100 * n / len(names):.2f}'
    print(f'\n| of {len(names)} models, on the meta device | n | per cent | which |\n|---|---:|---:|---|')
    print(f'| work | {share(len(sizes))} | |')
    for why, which in refused.items():
        print(f'| refused: {why} | {share(len(which))} | {", ".join(which)} |')
    print(f'| fail | {share(len(failures))} | {", ".join(failures)} |\n', flush=True)
    failed = bool(failures) or (not args.names and len(sizes) < 0.99 * len(names))
    if args.meta_only:
        return int(failed)

    print('| module | smallest member | r = 0 logits | layer-decay groups | dropout |\n|---|---|---|---|---|')
    for module in timm.list_modules():
        members = sorted((n for n in sizes if timm.models.is_model_in_modules(n, module)), key=sizes.get)
        for name in members if args.names else members[:1]:
            try:
                print('|', ' | '.join((module, name, *with_tensors(name).values())), '|', flush=True)
            except Exception as e:  # as above
                failed = True
                print(f'| {module} | {name} | FAILED {type(e).__name__}: {str(e)[:300]} | | |', flush=True)
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
