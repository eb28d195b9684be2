"""EmoReg: timm's model contract around a backbone and the dual head."""
# No postponed annotations here: torch.fx copies them into its code, where TorchScript could not resolve a string.
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import get_device_dtype, to_2tuple
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_model_args,
    get_model_traits,
    register_model,
)
from timm.models._input import update_model_args
from timm.optim import auto_group_layers
from torch import Tensor, nn

from . import zoo
from .backbone import (
    SOURCES,
    backbone_cfg,
    check_backbone,
    check_backbone_name,
    checkpoint_filter_fn,
    create_backbone,
    own_terms,
    pooling,
    prefixed,
    remove_classifier,
    resized_state,
    shrunk_state,
    small_image_cfg,
)
from .eight_bit import SCALE
from .regulation import AffectiveState, Balance, Modulation, Responses, check_regulation, regulate
from .small_image import DEFAULT_SIZE

__all__ = ['EmoReg', 'create_emoreg']



def _need_pooling(pooled: bool) -> None:
    if not pooled:
        raise RuntimeError("global_pool='' or pruning leaves no pooled vector for the heads to read. reset_classifier "
                           'with a pooling gives it and new heads.')


def _check_built_arguments(building: dict[str, Any], experience: str) -> None:
    if building:
        raise TypeError(f'A built backbone takes no building arguments: {", ".join(building)}. '
                        'Give them to the backbone, or give its name instead of a model.')
    if experience == 'separate':
        raise ValueError("experience='separate' builds the backbone twice and needs its name, "
                         'not a built model. Give the timm name.')


class EmoReg(nn.Module):
    """A timm backbone with emotional regulation.

    `forward` returns one tensor, the regulated response y of shape (B, num_classes), in train and in eval mode;
    see `timm_emoreg.regulation` for the formulas. With ``num_classes=0`` the two heads are left out and y is the
    regulated feature vector, (B, head_hidden_size); with ``global_pool=''`` too, it is the backbone's, unpooled.

    The first head is the backbone's own classifier, with its initial, pretrained or trained weights, wherever that is
    one linear map of the pre-logits (see `timm_emoreg.backbone.remove_classifier`), so that ``balance=0`` gives the
    plain model's logits.

    Args:
        backbone: Name of any timm model, or a built timm model, which is changed in place. A built model's trained
            classifier becomes both heads if the number of classes agrees.
        num_classes: Number of classes C; 0 for none; the backbone's own number if None.
        in_chans: Number of input channels, passed to the backbone; the backbone's own number if None.
        num_affect: Number of affect outputs K.
        affect_kind: ``'emotion'`` (categories, softmax) or ``'ratings'`` (valence and the like, tanh).
        balance: A number in [0, 1], ``'learned'`` or ``'gate'``.
        modulation: Whether the affective state modulates the features of the emotionally-influenced response.
        experience: ``'shared'``: one backbone, one forward pass; ``'separate'``: a second, frozen backbone gives the
            affective state and the features of the emotionally-influenced response, so that the non-emotional
            response never saw an emotion.
        small_image: Use the backbone's form for images of 32 to 64 px.
        img_size: Input size; for backbones of a fixed size, or with `small_image` (default there: 32).
        global_pool: Global pooling of the backbone, its own default if None.
        pretrained_backbone: Load the backbone's own pretrained timm weights, or those of the source in timm's
            `pretrained_cfg_overlay`.
        cache_dir: Where these are cached, the Hub's usual place if None.
        device: Of all parameters, as in torch.
        dtype: Of all parameters, as in torch.
        backbone_args: Every other argument goes to the backbone; one it does not know raises ``TypeError``.

    Raises:
        ValueError: For an impossible combination, an unknown backbone, or one without a pooled feature vector.
        TypeError: For an argument that the backbone does not know.
    """

    __jit_unused_properties__ = ('affect_backbone', 'balance')

    def __init__(
            self,
            backbone: str | nn.Module,
            num_classes: int | None = None,
            in_chans: int | None = None,
            num_affect: int = 8,
            affect_kind: str = 'emotion',
            balance: float | str = 0.5,
            modulation: bool = True,
            experience: str = 'shared',
            small_image: bool = False,
            img_size: int | tuple[int, int] | None = None,
            global_pool: str | None = None,
            pretrained_backbone: bool = False,
            cache_dir: str | Path | None = None,
            device=None,
            dtype=None,
            **backbone_args: Any,
    ):
        super().__init__()
        check_regulation(balance, num_affect, affect_kind, experience)
        if not isinstance(modulation, bool):
            raise ValueError(f'modulation={modulation!r} is a {type(modulation).__name__}. Give True or False.')
        if num_classes is not None and num_classes < 0:
            raise ValueError(f'num_classes={num_classes} is below 0. Give the number of classes, or 0 for none.')
        balance = balance if isinstance(balance, str) else float(balance)  # NumPy's numbers are not JSON's
        building = dict(backbone_args, in_chans=in_chans, img_size=img_size, global_pool=global_pool, device=device,
                        dtype=dtype, pretrained=pretrained_backbone or None, small_image=small_image or None,
                        cache_dir=cache_dir)
        building = {k: v for k, v in building.items() if v is not None}
        built = isinstance(backbone, nn.Module)
        if built:
            _check_built_arguments(building, experience)
            self.backbone = backbone
            noted = get_model_args(backbone)  # by `create_backbone`
            small_image = bool(noted.get('small_image'))
            building = {'small_image': small_image, 'img_size': noted.get('img_size')}
        else:
            if num_classes is not None:
                building['num_classes'] = num_classes
            self.backbone = create_backbone(backbone, **building)
        check_backbone(self.backbone, type(backbone).__name__ if built else backbone)
        self._describe(backbone, building)
        own_classes = self.backbone.num_classes
        self.num_classes = own_classes if num_classes is None else num_classes
        self.in_chans = getattr(self.backbone, 'in_chans', 3)
        self.num_affect = num_affect
        self.affect_kind = affect_kind
        self.modulated = modulation
        self.experience = experience
        self.small_image = small_image
        self.training_output = 'regulated'
        self._declare_traits(building.get('img_size'))
        classifier = remove_classifier(self.backbone)
        self.backbone_emo = None
        if experience == 'separate':
            self.backbone_emo = create_backbone(backbone, **building).eval().requires_grad_(False)
            self.backbone_emo.reset_classifier(0)
        self._set_feature_size()
        self.head_drop = nn.Dropout(classifier.drop_rate) if classifier.drop_rate else nn.Identity()
        self.state = AffectiveState(affect_kind)
        self.regulation = Balance(balance, num_affect, **get_device_dtype(self.backbone))
        self._build_affect()
        self.head = self._new_head(self.num_classes)
        self.head_emo = self._new_head(self.num_classes)
        if classifier.weight is not None and self.num_classes == own_classes:
            trained_for = getattr(self.backbone, 'pretrained_cfg', {}).get('num_classes')
            self._start_heads(classifier.weight, classifier.bias,
                              trained=built or (pretrained_backbone and trained_for == own_classes))
        update_model_args(self, num_affect=num_affect, affect_kind=affect_kind, balance=balance, modulation=modulation,
                          experience=experience, small_image=small_image)
        if built:
            self.train(backbone.training)

    # -- construction ------------------------------------------------------------------------------------------

    def _describe(self, backbone: str | nn.Module, building: dict[str, Any]) -> None:
        """Give a model that is built without timm's factory what timm's transforms and exports ask of it."""
        name = backbone if isinstance(backbone, str) else getattr(backbone, 'pretrained_cfg', {}).get('architecture')
        self.pretrained_cfg = self.default_cfg = backbone_cfg(self.backbone, **small_image_cfg(**building))
        if building.get('pretrained'):
            self.pretrained_cfg |= own_terms(name, building.get('pretrained_cfg_overlay'))
        if name is not None:  # a module that is none of timm's cannot be built again by its name
            self.pretrained_cfg['architecture'] = 'emoreg'
            args = building if isinstance(backbone, str) else get_model_args(backbone)
            here = ('device', 'dtype', 'pretrained', 'cache_dir', 'pretrained_cfg_overlay')
            update_model_args(self, **{k: v for k, v in args.items() if k not in here}, backbone=name)

    def _declare_traits(self, img_size: int | tuple[int, int] | None) -> None:
        """What timm asks of a model's input; it keeps what a model declares before its builder adds the cfg's."""
        traits = get_model_traits(self.backbone)
        streams = ('backbone',) if self.experience == 'shared' else ('backbone', 'backbone_emo')
        self._traits = {'img_size': traits.get('img_size'), 'first_conv': prefixed(traits.get('first_conv'), streams),
                        'fixed_input_size': traits.get('fixed_input_size', False)}
        if self.small_image:
            self._traits['img_size'] = to_2tuple(img_size or DEFAULT_SIZE)

    def _set_feature_size(self) -> None:
        self.num_features = self.backbone.num_features
        self.head_hidden_size = self.backbone.head_hidden_size
        self.global_pool = pooling(self.backbone)
        # False once there is no pooled vector for the heads to read: forward gives the backbone's features then
        self.pooled = self.global_pool != ''
        self.feature_info = [dict(info, module=f"backbone.{info['module']}") if info.get('module') else dict(info)
                             for info in getattr(self.backbone, 'feature_info', [])]

    def _new_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.head_hidden_size, num_classes, **get_device_dtype(self.backbone))
        return head.train(self.training)

    @torch.no_grad()
    def _start_heads(self, weight: Tensor, bias: Tensor, trained: bool) -> None:
        """The backbone's classifier becomes the first head, and the other one if it is trained.

        An untrained one, which no seed draws differently from the plain model's, lends the other head only its scale.
        """
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)
        if trained:
            self.head_emo.weight.copy_(weight)
            self.head_emo.bias.copy_(bias)
        else:
            self.head_emo.weight.normal_().mul_(weight.std(correction=0))
            self.head_emo.bias.zero_()

    def _build_affect(self) -> None:
        dd = get_device_dtype(self.backbone)
        self.head_affect = nn.Linear(self.head_hidden_size, self.num_affect, **dd)
        self.modulation = Modulation(self.num_affect, self.head_hidden_size, **dd) if self.modulated else None
        # Nothing of the default forward may be left without a gradient (DistributedDataParallel waits for each), so
        # the affect response is frozen where it is taken from a frozen stream or where nothing follows from it.
        self.head_affect.requires_grad_(self._affect_is_used())
        self.head_affect.train(self.training)

    def _affect_is_used(self) -> bool:
        return self.experience == 'shared' and (self.modulated or self.regulation.kind == 'gate')

    def train(self, mode: bool = True) -> 'EmoReg':
        super().train(mode)
        if self.backbone_emo is not None:
            self.backbone_emo.eval()  # frozen means frozen: no batch statistics, no dropout
        return self

    @property
    def affect_backbone(self) -> nn.Module:
        """The backbone that the affect response reads: with ``experience='separate'`` the frozen one."""
        return self.backbone if self.backbone_emo is None else self.backbone_emo

    # -- balance -----------------------------------------------------------------------------------------------

    @property
    def balance(self) -> float | str:
        """The balance r in force: a number in [0, 1] (also of a learned scalar), or ``'gate'`` (one per image).

        Setting it to a number fixes it; setting it to ``'learned'`` or ``'gate'`` starts that form anew at 0.5.
        """
        if self.regulation.kind == 'gate':
            return 'gate'
        if self.regulation.rho is not None:
            return self.regulation.rho.detach().sigmoid().item()
        return self.regulation.number

    @balance.setter
    def balance(self, value: float | str) -> None:
        check_regulation(value, self.num_affect, self.affect_kind, self.experience)
        value = value if isinstance(value, str) else float(value)
        used = self._affect_is_used()
        self.regulation = Balance(value, self.num_affect, **get_device_dtype(self.backbone)).train(self.training)
        if used != self._affect_is_used():  # otherwise a head that the user froze stays frozen
            self.head_affect.requires_grad_(not used)
        update_model_args(self, balance=value)

    # -- forward -----------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Features of the backbone before pooling."""
        return self.backbone.forward_features(x)

    def _features(self, x: Tensor) -> Tensor:
        return self.head_drop(self.backbone.forward_head(self.backbone.forward_features(x), pre_logits=True))

    def _features_of_experience(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.backbone_emo.forward_head(self.backbone_emo.forward_features(x), pre_logits=True)

    def _respond(self, h: Tensor, h_affect: Tensor) -> Responses:
        affect = self.head_affect(h_affect)
        state = self.state(affect)
        h_emo = h_affect
        if self.modulation is not None:
            h_emo = self.modulation(h_affect, state)
        return Responses(self.head(h), self.head_emo(h_emo), affect, self.regulation(state))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features and give the regulated response, or the pooled features h with ``pre_logits=True``.

        Raises:
            RuntimeError: With ``experience='separate'``, whose response needs the image: call the model itself.
                With classes but without pooling.
        """
        h = self.backbone.forward_head(x, pre_logits=True)
        if pre_logits:
            return h
        if self.num_classes > 0:
            _need_pooling(self.pooled)
        if not self.pooled:
            return h
        if self.backbone_emo is not None:
            raise RuntimeError("With experience='separate' the regulated response needs the image: call forward(x).")
        h = self.head_drop(h)
        out = self._respond(h, h)
        return regulate(out.non_emotional, out.emotional, out.balance)

    def forward_responses(self, x: Tensor) -> Responses:
        """Both responses (B, C), the affect response (B, K) and the balance (B, 1) of a batch of images.

        Raises:
            RuntimeError: Without pooling, or after `prune_intermediate_layers`.
        """
        _need_pooling(self.pooled)
        h = self._features(x)
        return self._respond(h, h if self.backbone_emo is None else self._features_of_experience(x))

    def forward_affect(self, x: Tensor) -> Tensor:
        """The affect response a, shape (B, K): emotion logits, or ratings, which stage 1 draws towards their scale of
        [-1, 1] without a bound.

        Raises:
            RuntimeError: Without pooling, or after `prune_intermediate_layers`.
        """
        _need_pooling(self.pooled)
        return self.head_affect(self._features(x) if self.backbone_emo is None else self._features_of_experience(x))

    def forward(self, x: Tensor) -> Tensor:
        """The regulated response y, (B, num_classes), of images (B, in_chans, H, W).

        To a training task it gives what `set_training_output` chose; TorchScript knows one type alone, that of y.

        Raises:
            RuntimeError: With classes, without pooling.
        """
        if not torch.jit.is_scripting():
            if self.training_output == 'affect':
                return self.forward_affect(x)
            if self.training_output == 'responses' and self.training:
                return self.forward_responses(x)
        if self.backbone_emo is None or not self.pooled:
            return self.forward_head(self.backbone.forward_features(x))
        out = self.forward_responses(x)
        return regulate(out.non_emotional, out.emotional, out.balance)

    @torch.jit.ignore
    def set_training_output(self, output: str = 'regulated') -> None:
        """Choose what `forward` returns to a training task.

        Args:
            output: ``'regulated'``: y, always; ``'responses'``: a `Responses` tuple in train mode and y in eval mode;
                ``'affect'``: the affect response a in both modes (stage 1).
        """
        if output not in ('regulated', 'responses', 'affect'):
            raise ValueError(f"output={output!r} is unknown, expected 'regulated', 'responses' or 'affect'.")
        self.training_output = output

    # -- timm's contract ---------------------------------------------------------------------------------------

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_emo

    def _change_backbones(self, method: str, **kwargs: Any) -> None:
        """Call a method of each backbone; what it records for an export of the backbone is recorded for ours, too."""
        before = dict(getattr(self.backbone, '_model_args', {}))
        for backbone in (self.backbone, self.backbone_emo):
            if backbone is not None:
                getattr(backbone, method)(**kwargs)
        now = getattr(self.backbone, '_model_args', {})
        update_model_args(self, **{k: v for k, v in now.items() if k not in before or before[k] != v})

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for another number of classes; backbone, affect response, modulation and balance stay.

        Only where the pooled features have another width than the affect response reads, and where pruning took it
        away, affect response and modulation are new, too.

        Raises:
            ValueError: For classes without pooling, also where it was taken off before and none is named.
        """
        if num_classes > 0 and (global_pool == '' or (global_pool is None and not self.pooled)):
            raise ValueError(f"global_pool='' or pruning leaves no pooled vector for the {num_classes} classes to "
                             'read. Name a pooling, or use num_classes=0.')
        width = self.head_hidden_size
        self._change_backbones('reset_classifier', num_classes=0,
                               **({} if global_pool is None else {'global_pool': global_pool}))
        self._set_feature_size()
        reads = getattr(self.head_affect, 'in_features', width)  # what a user put in its place may not say
        if isinstance(self.head_affect, nn.Identity) or reads != self.head_hidden_size:
            self._build_affect()
        self.num_classes = num_classes
        self.head = self._new_head(num_classes)
        self.head_emo = self._new_head(num_classes)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], float]:
        """The backbone's own layer groups, its names prefixed.

        Some families give a function of the name; so do we for those without groups, from the optimizers' fallback.
        """
        if hasattr(self.backbone, 'group_matcher'):
            matcher = self.backbone.group_matcher(coarse=coarse)
        else:
            matcher = auto_group_layers(self.backbone).get
        if callable(matcher):
            return lambda name: (matcher(name.removeprefix('backbone.')) if name.startswith('backbone.')
                                 else float('inf'))

        names = getattr(self.backbone, 'pretrained_cfg', {}).get('classifier') or ''
        classifier = names if isinstance(names, str) else names[0]

        def within(pattern):
            if isinstance(pattern, str):
                # anchors of single alternatives ('^a|b') go, one anchor before the prefix holds for all of them
                ours = r'backbone\.(?:' + re.sub(r'(?<![\[\\])\^', '', pattern) + ')'
                # a family that gives its classifier a place (iFormer) has our heads in that place, too
                return rf'^(?:{ours}|(?!backbone\.))' if re.match(pattern, classifier) else f'^{ours}'
            if isinstance(pattern, tuple):
                return (within(pattern[0]), *pattern[1:])
            return [within(p) for p in pattern]
        return {name: within(pattern) for name, pattern in matcher.items() if pattern is not None}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = getattr(self.backbone, 'no_weight_decay', set)()
        return {f'backbone.{name}' for name in names}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, **kwargs: Any) -> None:
        """Change the input size of a backbone that has a fixed one; the others take any, and nothing is changed."""
        if hasattr(self.backbone, 'set_input_size'):
            self._change_backbones('set_input_size', img_size=img_size, **kwargs)
            size = get_model_traits(self.backbone).get('img_size')
            self._traits = dict(self._traits, img_size=size)
            if self.small_image:  # of another size it would be built with patches of another size
                self.small_image = False
                update_model_args(self, small_image=False, patch_size=self.backbone.patch_embed.patch_size)

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            **kwargs: Any,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The backbone's intermediate features; arguments and result are those of its own method."""
        return self.backbone.forward_intermediates(
            x, indices=indices, norm=norm, stop_early=stop_early, output_fmt=output_fmt,
            intermediates_only=intermediates_only, **kwargs)

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Cut the backbone behind the last of the features `indices`, and with `prune_head` all that reads h.

        `forward` then gives the backbone's own features. `reset_classifier` with a pooling builds new heads and a new
        affect response; the balance is 0 until it is set again.
        """
        cut = {'indices': indices, 'prune_norm': prune_norm, 'prune_head': prune_head}
        taken = self.backbone.prune_intermediate_layers(**cut)
        if self.backbone_emo is not None:
            self.backbone_emo.prune_intermediate_layers(**cut)
        self._set_feature_size()
        if prune_head:
            self.num_classes = 0
            self.head, self.head_emo, self.head_affect = nn.Identity(), nn.Identity(), nn.Identity()
            self.regulation = Balance(0.0, self.num_affect)
            self.modulation = self.backbone_emo = None
            self.experience = 'shared'
            self.pooled = False
            update_model_args(self, balance=0.0, experience='shared')  # neither is in a tensor that an export has
        return taken

    # -- loading -----------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # every load comes through here, also that of a wrapper such as DistributedDataParallel
        self._refuse_another_form({name.removeprefix(prefix): tensor.shape for name, tensor in state_dict.items()
                                   if name.startswith(prefix) and isinstance(tensor, Tensor)})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _refuse_another_form(self, shapes: dict[str, torch.Size]) -> None:
        """Replace torch's list of mismatched tensors by one error.

        Missing and unexpected tensors are left to torch, except in checkpoints of the plain backbone, which have none
        of ours, and in those in 8 bits.

        Raises:
            RuntimeError: As torch does for another shape, whether strict or not.
        """
        own = {name: tensor.shape for name, tensor in self.state_dict().items()}
        ours = any(name.startswith('backbone.') for name in shapes)
        what = ''
        if any(name.endswith(SCALE) for name in shapes):  # as they are, its numbers would be taken for weights
            what = 'in 8 bits'
        elif not ours and any(f'backbone.{name}' in own for name in shapes):
            what = 'of the plain backbone'
        if what:
            raise RuntimeError(f'The checkpoint is {what}. timm.create_model(NAME, num_classes=N, pretrained=True, '
                               "pretrained_cfg_overlay={'file': PATH, 'num_classes': N}) loads it, N the classes that "
                               'it has, with the other arguments that the saved model had.')
        different = next((name for name, shape in own.items() if shapes.get(name, shape) != shape), None)
        if different is None or 'head_affect.weight' not in shapes:  # without it, it is no checkpoint of an EmoReg
            return
        part = different.split('.')[0]
        outputs = next(iter(shapes[different]), 1)
        argument = {'head_affect': f'num_affect={outputs}', 'backbone': 'small_image or img_size',
                    'head': f'num_classes={outputs}'}.get(part.removesuffix('_emo'), part)
        architecture = (getattr(self, 'pretrained_cfg', None) or {}).get('architecture')
        weights = [weight.name for weight in zoo.WEIGHTS.values() if weight.architecture == architecture]
        named = f"; if it was trained from a released weight, by that one's name: {', '.join(weights)}"
        raise RuntimeError(
            f'The checkpoint is of another form than the model: its {different!r} has the shape '
            f'{tuple(shapes[different])}, the model needs {tuple(own[different])}. Build the model with the arguments '
            f'that the saved one had, such as {argument}, or a run of train.py by '
            f'timm_emoreg.trained.trained_model(PATH){named if weights else ""}.')

    # -- experience --------------------------------------------------------------------------------------------

    def load_experience(self, state_dict: dict[str, Tensor], share: float = 1.0) -> None:
        """Take backbone and affect response from the state of an affectively pre-trained EmoReg (stage 1).

        With ``experience='separate'`` they go to the frozen second stream, and the first one stays as it is. Stage 1
        may have seen images of another size: what depends on it (position embeddings and patches of a ViT, for
        instance) is resized by the filter of the backbone's family, which also resizes patches of another form.

        Args:
            state_dict: The state of stage 1.
            share: Of its backbone in the result, in [0, 1]; the rest is what this model's backbone has already (shrink
                and perturb, see `shrunk_state`). The affect response is taken as it is.

        Raises:
            ValueError: If a tensor is missing, unknown, or has another shape that the filter does not resize, or if
                there is a share for a frozen stream, which could not learn the rest again; nothing is changed then.
        """
        if share != 1 and self.backbone_emo is not None:
            raise ValueError(f"share={share!r}: experience='separate' keeps stage 1 as it is. Leave one of them out.")
        stream = 'backbone' if self.backbone_emo is None else 'backbone_emo'
        backbone = {k.removeprefix('backbone.'): v for k, v in state_dict.items() if k.startswith('backbone.')}
        state_dict = {**state_dict, **{f'backbone.{k}': v for k, v in resized_state(backbone, self.backbone).items()}}
        own = {k: v for k, v in self.state_dict().items() if k.startswith((f'{stream}.', 'head_affect.'))}
        loaded = {}
        for key, value in own.items():
            source = key.replace('backbone_emo.', 'backbone.', 1)
            if source not in state_dict:
                raise ValueError(f'The experience has no {source!r}: it is no stage-1 weight of this architecture. '
                                 'Use the same model and form (small_image, img_size) in both stages.')
            if state_dict[source].shape != value.shape:
                raise ValueError(
                    f'{source!r} of the experience has shape {tuple(state_dict[source].shape)}, the model needs '
                    f'{tuple(value.shape)}. Use the same model, form (small_image, img_size) and num_affect in both '
                    'stages.')
            loaded[key] = state_dict[source]
        extra = next((k for k in state_dict if k.startswith('backbone.')
                      and k.replace('backbone.', f'{stream}.', 1) not in own), None)
        if extra is not None:  # a deeper network of the same family has all our tensors, and more
            raise ValueError(f'The experience is of another architecture: the model has no {extra!r}.')
        inner = {k: v for k, v in loaded.items() if k.startswith('backbone.')}
        self.load_state_dict({**loaded, **shrunk_state(inner, own, share)}, strict=False)


def create_emoreg(variant: str, backbone: str, pretrained: bool = False, **kwargs: Any) -> EmoReg:
    """Build a registered variant through timm's builder; the arguments are those of `EmoReg`.

    Returns:
        The model, or with ``features_only=True``, as everywhere in timm, its ``FeatureGetterNet`` around one.
    """
    if kwargs.get('small_image'):
        # timm's builder would fill in the size that the cfg of a fixed-size backbone has, which is a large one
        kwargs.setdefault('img_size', DEFAULT_SIZE)
    if pretrained or kwargs.get('pretrained_model_args'):
        # the weights of the whole model follow; an exported model remembers what it once started from
        kwargs.pop('pretrained_backbone', None)
    feature_cfg = {'feature_cls': 'getter'}
    if kwargs.get('features_only') and kwargs.get('out_indices') is None:
        # the levels that the bare backbone gives by default; they are a matter of the family and of its arguments
        own = {**inspect.signature(EmoReg).parameters, **inspect.signature(build_model_with_cfg).parameters}
        form = {k: v for k, v in kwargs.items() if k not in own}
        with torch.device('meta'):
            plain = create_backbone(backbone, kwargs.get('small_image', False), kwargs.get('img_size'), **form)
        feature_cfg['out_indices'] = tuple(plain.feature_info.out_indices)
    model_cls = EmoReg
    if kwargs.get('pretrained_backbone'):
        # timm's builder keeps these for the weights of the whole model
        model_cls = partial(EmoReg, **{name: kwargs[name] for name in ('cache_dir', 'pretrained_cfg_overlay')
                                       if kwargs.get(name) is not None})
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        kwargs['pretrained_cfg_overlay'] = {k: v for k, v in overlay.items() if k not in SOURCES}
    model = build_model_with_cfg(
        model_cls, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        backbone=backbone,
        **kwargs,
    )
    if kwargs.get('pretrained_backbone'):
        model.pretrained_cfg |= own_terms(backbone, overlay)
    model._model_args = {}  # timm's factory records the arguments of its call, and a registered name has its backbone
    return model


default_cfgs = generate_default_cfgs({'emoreg': backbone_cfg('resnet18')})


@register_model
def emoreg(pretrained: bool = False, backbone: str = 'resnet18', **kwargs: Any) -> EmoReg:
    """Emotional regulation around any timm backbone: ``timm.create_model('emoreg', backbone='convnext_tiny')``.

    Its preprocessing is the backbone's. ``pretrained_backbone=True`` loads the backbone's own timm weights, or those of
    the source in ``pretrained_cfg_overlay``, such as ``{'file': PATH, 'num_classes': N}``.
    """
    if not isinstance(backbone, str):
        raise TypeError(f'timm.create_model takes the name of a backbone, got {type(backbone).__name__}. '
                        'Wrap a built model with timm_emoreg.EmoReg(backbone=model).')
    check_backbone_name(backbone)
    given = kwargs.get('pretrained_cfg') or {}
    if isinstance(given, str):
        raise ValueError(f"emoreg.{given}: 'emoreg' stands for any backbone and has no weights of its own, so it takes "
                         f"no tag. For a weight of the backbone: backbone='{backbone}.{given}', "
                         'pretrained_backbone=True.')
    given = given if isinstance(given, dict) else given.to_dict()
    if not any(given.get(k) for k in SOURCES):
        # What timm's scripts resolve by the name 'emoreg' alone is the registry's cfg: another backbone than ours.
        registered = default_cfgs['emoreg'].default.to_dict()
        given = {k: v for k, v in given.items() if registered.get(k) != v}
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        if pretrained and not any(overlay.get(k) for k in SOURCES):
            raise ValueError("'emoreg' stands for any backbone and has no weights of its own. For the backbone's: "
                             f"timm.create_model('emoreg', backbone={backbone!r}, pretrained_backbone=True).")
        kwargs['pretrained_cfg'] = {**backbone_cfg(backbone, **small_image_cfg(**kwargs)), **given}
    return create_emoreg('emoreg', backbone, pretrained, **kwargs)
