"""What EmoReg asks of a timm backbone: building one, taking its classifier off, its cfg, reading its checkpoints."""
from __future__ import annotations

import copy
import difflib
import inspect
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import to_2tuple
from timm.models import get_model_args, get_model_traits, resolve_model_input_args
from timm.models._input import update_model_args
from torch import Tensor, nn

from .eight_bit import from_eight_bits
from .small_image import DEFAULT_SIZE, small_image_args, small_image_stem, whole_image_cfg

__all__ = ['SOURCES', 'Classifier', 'backbone_cfg', 'check_backbone', 'check_backbone_name', 'checkpoint_filter_fn',
           'create_backbone', 'own_terms', 'pooling', 'prefixed', 'put_classifier', 'remove_classifier',
           'resized_state', 'shrunk_state', 'small_image_cfg', 'without_weights']

# Families that apply their dropout after pre_logits, by a function call or a module beside the classifier. Where it is
# part of the classifier (LeViT ...) it is found there, and everywhere else it is applied within pre_logits.
LATE_DROPOUT = ('LCNetV2', 'MultiScaleVit')
SOURCES = ('file', 'url', 'state_dict', 'hf_hub_id', 'hf_hub_filename')  # of weights, in a pretrained cfg of timm
# The cfg entries that tell where weights come from, what they were trained for and their terms, not how to feed the
# model.
WEIGHT_CFG_KEYS = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'architecture', 'tag', 'custom_load',
                  'label_offset', 'label_names', 'label_descriptions', 'description', 'origin_url', 'paper_name',
                  'paper_ids', 'notes', 'license')


class Classifier(NamedTuple):
    """A classifier taken off a backbone, as one linear map of the pre-logits; both None if it was none."""

    weight: Tensor | None  # (C, D)
    bias: Tensor | None  # (C,)
    drop_rate: float  # of the dropout that went with it, 0 where the backbone's pre-logits still apply it


def check_backbone_name(name: str) -> None:
    """Refuse a name that timm does not know, or that is an EmoReg itself.

    Raises:
        ValueError: With near names.
        TypeError: If it is no name.
    """
    if not isinstance(name, str):
        raise TypeError(f'backbone={name!r} is a {type(name).__name__}. Give the name of a timm model, or a built one.')
    if ':' in name:  # hf-hub: and local-dir: are resolved by timm
        return
    plain = timm.models.split_model_name_tag(name)[0]
    if plain == 'emoreg' or plain.startswith('emoreg_'):
        raise ValueError(f'The backbone {name!r} is emotionally regulated already. Give the name of a plain model.')
    if not timm.is_model(plain):
        near = difflib.get_close_matches(plain, timm.list_models(exclude_filters='emoreg*'), n=3)
        hint = f' Did you mean {", ".join(near)}?' if near else ''
        raise ValueError(f'Unknown backbone {name!r}.{hint} timm.list_models() shows all names.')


def check_backbone(model: nn.Module, name: str) -> None:
    """Refuse a model that gives no pooled feature vector by timm's model interface, or that is an EmoReg itself.

    Raises:
        ValueError: With the reason.
    """
    if hasattr(model, 'forward_affect'):
        raise ValueError(f'The backbone {name!r} is emotionally regulated already. Give a plain model.')
    missing = [m for m in ('forward_features', 'forward_head', 'get_classifier', 'reset_classifier')
               if not hasattr(model, m)]
    if missing:
        why = f'it has no {", ".join(missing)}'
    elif 'pre_logits' not in inspect.signature(model.forward_head).parameters:
        why = 'its forward_head has no pre_logits'
    elif pooling(model) == '' and model.num_classes > 0:
        why = "global_pool='' leaves its features unpooled; use num_classes=0 with it, or keep the pooling"
    else:
        return
    raise ValueError(f'The backbone {name!r} gives no pooled feature vector for the heads to read: {why}.')


def pooling(model: nn.Module) -> str | None:
    """The pooling of a timm model now, '' for none, None if the family does not name it."""
    return get_model_args(model).get('global_pool')


def prefixed(names: str | tuple[str, ...] | None,
             streams: tuple[str, ...] = ('backbone',)) -> str | tuple[str, ...] | None:
    """Module names of the backbone, such as its ``first_conv``, as they are within EmoReg, in each of its streams."""
    if not names:
        return None
    if isinstance(names, str) and len(streams) == 1:
        return f'{streams[0]}.{names}'
    return tuple(f'{stream}.{name}' for stream in streams for name in ((names,) if isinstance(names, str) else names))


def create_backbone(
        name: str,
        small_image: bool = False,
        img_size: int | tuple[int, int] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """A plain timm model as EmoReg uses it inside: the baseline that a regulated model is compared with.

    Args:
        name: Name of any timm model.
        small_image: Use the form for images of 32 to 64 px.
        img_size: Input size; for backbones of a fixed size, or with `small_image` (default there: 32).
        kwargs: Passed to ``timm.create_model``; None means unset.

    Raises:
        ValueError: For an unknown name, a family without a small-image form, or one with another `patch_size`.
    """
    check_backbone_name(name)
    if small_image:
        form = small_image_args(name, img_size or DEFAULT_SIZE)
        patch, own = kwargs.get('patch_size'), form.get('patch_size')
        if patch is not None and own is not None and to_2tuple(patch) != to_2tuple(own):
            raise ValueError(f'small_image=True gives {name} patches of {own}x{own} at {img_size or DEFAULT_SIZE} px, '
                             f'and patch_size={patch!r} asks for others. Leave one of the two out, in train.py by '
                             '--no-small-image.')
        kwargs.update(form)
    elif img_size is not None:
        kwargs['img_size'] = img_size
    model = timm.create_model(name, **kwargs)
    if small_image and small_image_stem(model):
        # Another stride leaves the shapes of all tensors: timm, which has no such argument, must not rebuild this model
        # without it. It refuses the argument.
        update_model_args(model, small_image=True, img_size=img_size or DEFAULT_SIZE)
    return model


def _as_linear(module: nn.Module, width: int) -> tuple[Tensor, Tensor] | None:
    """Weight (C, width) and bias (C,) of a module that is a Linear, a 1x1 convolution, or BatchNorm and Linear."""
    layers = [m for m in module.modules() if list(m.parameters(recurse=False))]
    if not layers or not isinstance(layers[-1], (nn.Linear, nn.Conv2d)):
        return None
    weight, bias = layers[-1].weight, layers[-1].bias
    if weight.numel() != weight.shape[0] * width:
        return None
    weight = weight.flatten(1)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if len(layers) == 2 and isinstance(layers[0], nn.BatchNorm1d):
        norm = layers[0]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return weight * scale, bias + weight @ (norm.bias - norm.running_mean * scale)
    return (weight, bias) if len(layers) == 1 else None


def _classifier_modules(backbone: nn.Module) -> set[nn.Module]:
    if not backbone.num_classes:  # some families cannot name what is not there
        return set()
    own = backbone.get_classifier()
    own = own if isinstance(own, (tuple, list)) else (own,)
    return {m for classifier in own if classifier is not None for m in classifier.modules()}


def _removed(before: dict[str, nn.Module], after: dict[str, nn.Module]) -> list[nn.Module]:
    """The topmost modules that are gone, or replaced by an Identity."""
    gone = [name for name, m in before.items()
            if not isinstance(m, nn.Identity) and isinstance(after.get(name, nn.Identity()), nn.Identity)]
    return [before[name] for name in gone if not any(name.startswith(f'{other}.') for other in gone)]


def _is_distilled_pair(backbone: nn.Module, classifiers: list[nn.Module]) -> bool:
    return len(classifiers) == 2 and hasattr(backbone, 'set_distilled_training')


@torch.no_grad()
def put_classifier(bare: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module | None:
    """The reverse of `remove_classifier`: a copy of a backbone with its family's classifier, made one linear map.

    Args:
        bare: A backbone without classifier.
        weight: (C, D).
        bias: (C,).

    Returns:
        The copy; None if the family's classifier is no linear map of the pre-logits.
    """
    full = copy.deepcopy(bare)
    full.reset_classifier(len(weight))
    roots = _removed(dict(full.named_modules()), dict(bare.named_modules()))
    if len(roots) != 1 and not _is_distilled_pair(full, roots):
        return None
    for root in roots:
        layers = [m for m in root.modules() if list(m.parameters(recurse=False))]
        if _as_linear(root, full.head_hidden_size) is None or layers[-1].bias is None:
            return None
        for norm in layers[:-1]:  # as new, a BatchNorm scales by 1 / sqrt(1 + eps)
            norm.weight.fill_((1 + norm.eps) ** 0.5)
        layers[-1].weight.copy_(weight.reshape(layers[-1].weight.shape))
        layers[-1].bias.copy_(bias)
    return full.train(bare.training)


@torch.no_grad()
def remove_classifier(backbone: nn.Module) -> Classifier:
    """Take the classifier off a backbone, in place: ``reset_classifier(0)``, and what went with it.

    A BatchNorm before the linear layer (LeViT, RepViT ...) is folded into it with its running statistics; the mean of
    a distilled pair is taken (exact where both read the same features). A classifier of more layers (MLP heads) or of
    several branches (CrossViT, EfficientViM) is no linear map of the pre-logits and goes without replacement.
    """
    own, before = _classifier_modules(backbone), dict(backbone.named_modules())
    width = backbone.head_hidden_size
    backbone.reset_classifier(0)
    removed = _removed(before, dict(backbone.named_modules()))
    roots = [root for root in removed if not own.isdisjoint(root.modules())]
    drops = [m.p for root in roots for m in root.modules() if isinstance(m, nn.Dropout)]
    drop_rate = backbone.drop_rate if type(backbone).__name__ in LATE_DROPOUT else max(drops, default=0.0)
    linears = [_as_linear(root, width) for root in roots]
    pair = _is_distilled_pair(backbone, roots)
    if None in linears or not (len(roots) == 1 or pair):
        return Classifier(None, None, drop_rate)
    weight, bias = linears[0]
    if pair:
        weight, bias = (weight + linears[1][0]) / 2, (bias + linears[1][1]) / 2
    return Classifier(weight.detach().clone(), bias.detach().clone(), drop_rate)


def without_weights(cfg: dict[str, Any]) -> dict[str, Any]:
    """What a pretrained cfg says of the architecture and its input, and nothing of the weights that it came with."""
    return {k: v for k, v in cfg.items() if k == 'architecture' or k not in WEIGHT_CFG_KEYS}


def own_terms(backbone: str, overlay: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The licence of a backbone's own timm weights, as an entry of the cfg of a model that starts from them.

    It is empty where timm states none, or where `overlay`, timm's ``pretrained_cfg_overlay``, names other weights.
    """
    licence = resolve_model_input_args(backbone)['pretrained_cfg'].get('license')
    return {'license': licence} if licence and not any((overlay or {}).get(key) for key in SOURCES) else {}


def backbone_cfg(backbone: str | nn.Module, **overrides: Any) -> dict[str, Any]:
    """A pretrained cfg for a backbone (name or model) inside EmoReg: its preprocessing, our names, no weights."""
    if isinstance(backbone, str):
        cfg = resolve_model_input_args(backbone)['pretrained_cfg']
    else:
        cfg = getattr(backbone, 'pretrained_cfg', None) or {}
    cfg = {k: v for k, v in cfg.items() if k not in WEIGHT_CFG_KEYS}
    return {**cfg, 'first_conv': prefixed(cfg.get('first_conv')), 'classifier': ('head', 'head_emo'), **overrides}


def small_image_cfg(small_image: bool | None = False, img_size: int | tuple[int, int] | None = None,
                    **_: Any) -> dict[str, Any]:
    """What the small-image form changes in the pretrained cfg of its backbone, from the arguments of `EmoReg`.

    The three channels are those of weights that may be loaded; how many the model takes, timm asks the model.
    """
    if not small_image:
        return {}
    size = img_size or DEFAULT_SIZE
    return whole_image_cfg((3, *to_2tuple(size)))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def _classifier_of_bare(state_dict: dict[str, Tensor], backbone: nn.Module) -> tuple[Classifier, dict[str, Tensor]]:
    """The classifier inside a bare checkpoint of the backbone, and the checkpoint without it."""
    names = backbone.pretrained_cfg.get('classifier') or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names or f'{names[0]}.weight' not in state_dict:
        return Classifier(None, None, 0.0), state_dict
    # The family itself rebuilds its classifier for the weights to go into, and it is then taken off again.
    own = set(backbone.state_dict())
    backbone.reset_classifier(len(state_dict[f'{names[0]}.weight']))
    new = {k: v for k, v in backbone.state_dict().items() if k not in own}
    fitting = {k: state_dict[k] for k, v in new.items() if k in state_dict and state_dict[k].shape == v.shape}
    backbone.load_state_dict(fitting, strict=False)
    found = remove_classifier(backbone)
    parts = tuple(f'{name.rpartition(".")[0] or name}.' for name in names)
    return found, {k: v for k, v in state_dict.items() if k in own or not k.startswith(parts)}


def _check_keys(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Name the first key that shows a checkpoint of another architecture, instead of torch's list of all of them."""
    own = model.state_dict()
    adapted = get_model_traits(model).get('first_conv') or ()  # timm adapts these to in_chans after the filter
    adapted = {f'{name}.weight' for name in ((adapted,) if isinstance(adapted, str) else adapted)}
    adapted |= {f'{head}.{part}' for head in ('head', 'head_emo') for part in ('weight', 'bias')}

    def misfits():
        for key, value in own.items():
            if key.startswith('backbone.') and key not in state_dict:
                yield f'it has no {key!r}'
            elif key in state_dict and key not in adapted and state_dict[key].shape != value.shape:
                yield f'its {key!r} has shape {tuple(state_dict[key].shape)}, the model needs {tuple(value.shape)}'
        yield from (f'the model has no {key!r}' for key in state_dict if key.startswith('backbone.') and key not in own)

    if why := next(misfits(), None):
        raise ValueError(f'This is a checkpoint of another architecture or form: {why}. Build the model that it was '
                         'saved from: the same backbone, small_image, img_size and num_affect.')


def _fitted_by_family(state_dict: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    family_filter = getattr(sys.modules[type(backbone).__module__], 'checkpoint_filter_fn', None)
    if family_filter is None or not state_dict:
        return state_dict
    takes_model = len(inspect.signature(family_filter).parameters) > 1
    return family_filter(state_dict, backbone) if takes_model else family_filter(state_dict)


def resized_state(state_dict: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """The state of a backbone of the same architecture, which may have been built for images of another size.

    The family's own filter resizes what depends on the size (position embeddings and patches of a ViT, for instance).
    Where every shape agrees, and where the filter cannot make anything of it, the state comes back as it is.
    """
    own = {k: v.shape for k, v in backbone.state_dict().items()}
    if state_dict.keys() != own.keys() or all(v.shape == own[k] for k, v in state_dict.items()):
        return state_dict
    try:
        return _fitted_by_family(dict(state_dict), backbone)
    except (AssertionError, RuntimeError, ValueError):  # of another width or depth; whoever loads it says so
        return state_dict


def shrunk_state(state_dict: dict[str, Tensor], own: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """`share` of each tensor of a state and the rest of a model's own one, which leaves room to learn again.

    Shrink and perturb of Ash and Adams, "On Warm-Starting Neural Network Training" (arXiv 1910.08475), whose noise is
    here what the model was initialised with. Whole numbers, as counts of batches, come from the state.

    Args:
        state_dict: Tensors in the shapes of the model; what the model does not have stays as it is.
        own: The model's own state.
        share: In [0, 1]; with 1 the state comes back bit for bit.

    Raises:
        ValueError: If `share` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f'share={share!r} is outside [0, 1]: 1 takes the experience as it is, 0 nothing of it.')
    return {k: torch.lerp(own[k], v.to(own[k]), share) if k in own and v.is_floating_point() else v
            for k, v in state_dict.items()}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit a checkpoint to an EmoReg `model`: one of our own, or a bare timm checkpoint of its backbone.

    The family's own filter runs on the part of each backbone (it resizes position embeddings, for instance). A bare
    checkpoint goes to both streams of a separate experience, and its classifier becomes both heads, so that with
    G = S = 0 the regulated model answers like the plain one; what a bare checkpoint cannot know stays as initialised.

    Raises:
        ValueError: If the checkpoint is of another architecture, naming the first key that shows it.
    """
    state_dict = from_eight_bits(state_dict.get('state_dict', state_dict))
    bare = not any(key.startswith('backbone.') for key in state_dict)
    streams = ('backbone',) if model.backbone_emo is None else ('backbone', 'backbone_emo')
    prefixes = tuple(f'{stream}.' for stream in streams)

    fitted = {k: v for k, v in (model.state_dict() if bare else state_dict).items() if not k.startswith(prefixes)}
    if bare:
        classifier, inner = _classifier_of_bare(_fitted_by_family(dict(state_dict), model.backbone), model.backbone)
        fitted |= {prefix + k: v for prefix in prefixes for k, v in inner.items()}
        if classifier.weight is not None and model.num_classes:
            fitted['head.weight'] = fitted['head_emo.weight'] = classifier.weight
            fitted['head.bias'] = fitted['head_emo.bias'] = classifier.bias
    else:
        for prefix in prefixes:
            inner = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            fitted |= {prefix + k: v for k, v in _fitted_by_family(inner, model.backbone).items()}
    _check_keys(fitted, model)
    return fitted

