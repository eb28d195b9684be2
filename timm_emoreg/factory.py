"""Models of the registered names, with a released weight where one is asked for and in the form that it has.

timm's own path gives random heads for another number of classes with no more than a line in the log, and does not know
the arguments that belong to a weight: here they are its defaults, and what contradicts them is refused.
"""
from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any

import timm
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs
from timm.models._input import update_model_args
from torch import nn

from . import zoo
from .backbone import SOURCES, backbone_cfg, small_image_cfg
from .emoreg import EmoReg, create_emoreg
from .weights import NewHeadsWarning, WeightError, WeightMismatch, WeightNotFound, find_file, layout_of
from .zoo import Weight

__all__ = ['create']

# what decides the meaning of the affect response: never another one under the same weights, though shapes may agree
MEANING = ('num_affect', 'affect_kind', 'experience')
# arguments that say nothing about the form of the model, or that timm fits the weights to
FORM_FREE_ARGS = ('num_classes', 'in_chans', 'device', 'dtype', 'features_only', 'out_indices', 'feature_cls',
                  'drop_rate')


def _differing(weight: Weight, arguments: dict[str, Any]) -> dict[str, Any]:
    known = {name: p.default for name, p in inspect.signature(EmoReg).parameters.items()} | weight.model_args
    return {name: value for name, value in arguments.items()
            if name not in FORM_FREE_ARGS and value != known.get(name)}


def _mismatch(weight: Weight, differing: dict[str, Any], found: str = '') -> WeightMismatch:
    asked = ', '.join(f'{name}={value!r}' for name, value in differing.items())
    needed = ', '.join(f'{name}={weight.model_args[name]!r}' for name in differing if name in weight.model_args)
    return WeightMismatch(
        f'{weight.name} does not fit a model with {asked or "its own arguments"}'
        + (f': it needs {needed}' if needed else '') + (f' ({found})' if found else '')
        + '. Leave the argument out, or build without pretrained=True.')


def _refuse_misfits(weight: Weight, arguments: dict[str, Any]) -> None:
    differing = _differing(weight, arguments)
    wrong = {name: value for name, value in differing.items() if name in (*MEANING, 'small_image')}
    if weight.target is not None:
        kinds = [value if isinstance(value, str) else 'a fixed number'
                 for value in (arguments.get('balance'), weight.model_args['balance'])]
        if 'balance' in differing and kinds[0] != kinds[1]:
            raise _mismatch(weight, {'balance': arguments['balance']},
                            f'{kinds[0]} has other tensors than {kinds[1]}; model.balance can be set afterwards')
        wrong |= {name: value for name, value in differing.items() if name == 'modulation'}
    if wrong:
        raise _mismatch(weight, wrong)


def _warn_of_new_heads(name: str, num_classes: int, arguments: dict[str, Any], stacklevel: int = 7) -> None:
    """`stacklevel` is that of the line which calls ``timm.create_model``: 6 from `create`, one more from below it."""
    overlay = arguments.get('pretrained_cfg_overlay') or {}
    wanted = arguments.get('num_classes', overlay.get('num_classes', num_classes))
    if wanted not in (0, num_classes) and not arguments.get('features_only'):
        warnings.warn(f'{name} has {num_classes or "no"} classes, the model {wanted}: both heads are new and answer at '
                      'random until they are trained.', NewHeadsWarning, stacklevel=stacklevel)


def _name_of_cfg(variant: str, cfg: Any) -> Any:
    """The tag for a whole cfg that is the registry's own, ``None`` for that of the untagged name; others unchanged.

    timm's scripts look a name up and hand over what they found, without the arguments that belong to a weight.
    """
    if not cfg or isinstance(cfg, str):
        return cfg
    own = PretrainedCfg(**cfg) if isinstance(cfg, dict) else cfg
    registered = (get_arch_pretrained_cfgs(variant).get(f'{variant}.{own.tag}') if own.tag
                  else timm.get_pretrained_cfg(variant))
    return (own.tag or None) if own == registered else cfg


def create(variant: str, backbone: str, pretrained: bool, /, **kwargs: Any) -> nn.Module:
    """What the entrypoints of the registry return: a model, with its released weight if one is asked for.

    The arguments of a weight's record are defaults where ``pretrained=True`` or a tag names that weight. Without
    either, the model has its backbone's usual form. A cfg or a source of weights that the caller gives is taken as
    it is.

    Args:
        variant: Registered name.
        backbone: timm's name of its backbone.
        pretrained: Whether to load a weight.
        kwargs: Those of `EmoReg`, and timm's own.

    Raises:
        WeightError: If the weight cannot be had, or does not fit the arguments.
        ValueError: If another backbone is asked for.
    """
    if 'backbone' in kwargs:
        raise ValueError(f'{variant} has the backbone {backbone}. For another one: '
                         f"timm.create_model('emoreg', backbone={kwargs['backbone']!r}).")
    cfg = _name_of_cfg(variant, kwargs.pop('pretrained_cfg', None))
    if cfg and not isinstance(cfg, str):  # hf-hub:, local-dir:, or the caller's own
        own = cfg if isinstance(cfg, dict) else cfg.to_dict()
        if pretrained and own.get('num_classes') is not None:
            _warn_of_new_heads(own.get('hf_hub_id') or own.get('file') or variant, own['num_classes'], kwargs, 6)
        return create_emoreg(variant, backbone, pretrained, pretrained_cfg=cfg, **kwargs)
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    own_source = any(overlay.get(key) for key in SOURCES)
    asked = bool(cfg) or (pretrained and not own_source)
    if not asked:
        # not the cfg of a default weight, whose size may be another
        kwargs['pretrained_cfg'] = backbone_cfg(backbone, **small_image_cfg(**kwargs))
        return create_emoreg(variant, backbone, pretrained, **kwargs)
    weight = zoo.find(f'{variant}.{cfg}' if cfg else variant)
    if weight is None:
        known = ', '.join(w.name for w in zoo.WEIGHTS.values() if w.architecture == variant) or 'none'
        raise WeightNotFound(f'{variant}{f".{cfg}" if cfg else ""}: there is no such weight; of this architecture '
                             f'there are: {known}. timm.list_pretrained("emoreg*") shows all that can be had; '
                             'pretrained_backbone=True takes the weights of the plain backbone.')
    if pretrained and not own_source:
        return _with_tensors(weight, variant, backbone, overlay, kwargs)
    return _in_form(weight, variant, backbone, pretrained, overlay, kwargs)


def _fill_in(weight: Weight, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put the weight's arguments into `kwargs`, where the caller gave none; gives the caller's and those put in."""
    arguments = {name: value for name, value in kwargs.items()
                 if value is not None and name not in ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir')}
    added = {name: value for name, value in weight.model_args.items() if arguments.get(name) is None}
    if arguments.get('small_image') is False:
        added.pop('img_size', None)  # it belonged to the small form
    kwargs |= added
    return arguments, added


def _in_form(weight: Weight, variant: str, backbone: str, pretrained: bool, overlay: dict[str, Any],
             kwargs: dict[str, Any]) -> nn.Module:
    """A model in the weight's form, without its tensors: new ones, or where `pretrained` the overlay's."""
    arguments, added = _fill_in(weight, kwargs)
    if pretrained:
        source = next(key for key in SOURCES if overlay.get(key))
        _warn_of_new_heads(f'the {source} of the overlay', overlay.get('num_classes', weight.num_classes), kwargs)
    own_cfg = timm.get_pretrained_cfg(weight.name)
    if 'small_image' in _differing(weight, arguments):  # another form, of its usual size
        own_cfg = PretrainedCfg(**backbone_cfg(backbone, **small_image_cfg(**kwargs)))
    kwargs['pretrained_cfg'] = replace(own_cfg, file=None, hf_hub_id=None, hf_hub_filename=None)
    model = create_emoreg(variant, backbone, pretrained, **kwargs)
    update_model_args(model, **added)
    return model


def _with_tensors(weight: Weight, variant: str, backbone: str, overlay: dict[str, Any],
                  kwargs: dict[str, Any]) -> nn.Module:
    """A model with the tensors of the weight."""
    arguments, added = _fill_in(weight, kwargs)
    _refuse_misfits(weight, arguments)
    layout = layout_of(weight, backbone)
    overlay['file'] = str(find_file(weight, layout, kwargs.get('cache_dir')))
    _warn_of_new_heads(weight.name, weight.num_classes, kwargs)
    differing = _differing(weight, arguments)
    # stage 1 trained neither balance nor modulation, so another form of them fits, too
    kwargs |= {'pretrained_cfg': weight.tag, 'pretrained_cfg_overlay': overlay,
               'pretrained_model_args': weight.model_args, 'pretrained_strict': weight.target is not None}
    try:
        model = create_emoreg(variant, backbone, True, **kwargs)
    except (RuntimeError, ValueError) as e:
        if not differing or isinstance(e, WeightError):
            raise
        raise _mismatch(weight, differing, ' '.join(str(e).split()).rstrip('.')) from e
    update_model_args(model, **added)  # or an export would rebuild another form
    return model
