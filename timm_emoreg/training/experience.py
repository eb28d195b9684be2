"""The result of stage 1: the weights of an affectively pre-trained model, and what its affect response means."""
from __future__ import annotations

import copy
import difflib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from .. import BACKBONES, EmoReg, zoo
from ..backbone import resized_state, shrunk_state
from ..data import DataError, Splits, Target
from ..small_image import DEFAULT_SIZE, LARGEST_SIZE
from ..weights import WeightError
from .checkpoint import BEST, CheckpointError, judged_state, load_training_checkpoint

__all__ = [
    'STIMULI_SETTINGS',
    'Experience',
    'find_experience',
    'load_backbone',
    'released_experience',
    'untrained_experience',
    'without_drop_rates',
]

STIMULI_SETTINGS = ('stimuli', 'stimuli_labels', 'rating_columns', 'rating_scale')


def without_drop_rates(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """A backbone's arguments but for what is dropped (units, patches, layers): that is so in training only."""
    return {k: v for k, v in model_kwargs.items() if not ('drop' in k and k.endswith('_rate'))}


@dataclass(frozen=True)
class Experience:
    """Stage-1 weights.

    Args:
        source: Where they come from, for the log.
        state_dict: Weights of an EmoReg, at least ``backbone.*`` and ``head_affect.*``; empty if nothing was learned.
        affect_kind: ``'emotion'`` or ``'ratings'``.
        num_affect: Number of affect outputs K.
        names: Name of each affect output, empty if unknown.
        backbone: Name of the backbone that was trained, empty if unknown.
        small_image: Whether it has its form for small images, None if unknown.
        unfinished: For the log, if stage 1 was not trained to its end.
        model_kwargs: Further arguments that the backbone was built with, None if unknown.
        stimuli: What was shown, as `timm_emoreg.data.load_stimuli` and train.py name it: ``'stimuli'`` and, where they
            are not the usual ones, ``'stimuli_labels'``, ``'rating_columns'``, ``'rating_scale'``. Empty if it is
            unknown, or if the labels were shuffled.
        seed: Of its training, by which the rotations of a label-free task were drawn, 0 if unknown.
    """

    source: str
    state_dict: dict[str, Tensor]
    affect_kind: str
    num_affect: int
    names: tuple[str, ...] = ()
    backbone: str = ''
    small_image: bool | None = None
    unfinished: str = ''
    model_kwargs: dict[str, Any] | None = None
    stimuli: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def check_form(self, backbone: str, small_image: bool, model_kwargs: dict[str, Any]) -> None:
        """Refuse another backbone or form than that of stage 1: strides, activations and the normalisation of images
        are in no tensor.

        Raises:
            CheckpointError: If they differ; what is not known is not compared.
        """
        name, own = backbone.partition('.')[0], self.backbone.partition('.')[0]
        if own and own != name:
            raise CheckpointError(f'{self.source}: is of the backbone {own}, and this run has {name}. Use the same '
                                  '--model in both stages.')
        if own:  # the tags may differ, where they name weights only
            theirs, ours = ((cfg.mean, cfg.std) for cfg in map(timm.get_pretrained_cfg, (self.backbone, backbone)))
            if theirs != ours:
                raise CheckpointError(f'{self.source}: {self.backbone} saw images normalised by mean and sd {theirs}, '
                                      f'and {backbone} sees them by {ours}. Use the same --model in both stages.')
        if self.small_image not in (None, small_image):
            forms = [f'--{"" if small else "no-"}small-image' for small in (self.small_image, small_image)]
            remedy = (f'For images of up to {LARGEST_SIZE} px that is the usual one: give --img-size {DEFAULT_SIZE}, '
                      'say' if self.small_image else 'Give the same one in both stages')
            raise CheckpointError(f'{self.source}: was trained with {forms[0]}, and this run has {forms[1]}, given or '
                                  f'by the size of its images. {remedy}.')
        if self.model_kwargs is not None:
            theirs, ours = (json.dumps(without_drop_rates(kwargs), sort_keys=True)
                            for kwargs in (self.model_kwargs, model_kwargs))
            if theirs != ours:
                raise CheckpointError(f'{self.source}: was trained with the --model-kwargs {theirs}, and this run has '
                                      f'{ours}. Give the same ones in both stages.')

    def check_stimuli(self, stimuli: Splits) -> None:
        """Refuse to rehearse stimuli that the affect response does not answer.

        Raises:
            DataError: If their labels differ in kind, number or names.
        """
        target = stimuli.target
        same = (target.affect_kind, len(target)) == (self.affect_kind, self.num_affect)
        if not same or (self.names and self.names != target.names):
            raise DataError(f'{self.source} answers with {", ".join(self.names) or self.num_affect}, and the labels of '
                            f'{stimuli.name} are {", ".join(target.names)}. Rehearse the stimuli of stage 1, with the '
                            'same --stimuli-labels.')


def _from_checkpoint(path: Path) -> Experience:
    checkpoint = load_training_checkpoint(path)
    task = checkpoint.get('task_state')
    if not isinstance(task, dict) or not {'target_kind', 'names'} <= task.keys():
        raise CheckpointError(f"{path}: was not written by stage 1 (--task affect). Give stage 1's {BEST}.")
    answers = Target(task['target_kind'], tuple(task['names']))
    args = checkpoint.get('args')
    shown = {}
    if hasattr(args, 'stimuli') and not args.shuffle_stimuli_labels:
        shown = {name: getattr(args, name) for name in STIMULI_SETTINGS if getattr(args, name) is not None}
        shown.setdefault('stimuli', 'emoji')
    unfinished = ''
    folder = path.resolve().parent  # that of the run, also where a link leads to its checkpoint
    if (folder.parent / 'args.json').is_file() and not (folder / 'result.json').is_file():
        unfinished = f'; its training was not finished, this is epoch {checkpoint["epoch"] + 1}'
    return Experience(str(path), judged_state(checkpoint), answers.affect_kind, len(answers), answers.names,
                      getattr(args, 'backbone', ''), getattr(args, 'small_image', None), unfinished,
                      getattr(args, 'model_kwargs', None), shown, getattr(args, 'seed', 0))


def find_experience(where: str) -> Experience:
    """Stage-1 weights by path or by registered tag; a path goes first.

    Args:
        where: A checkpoint of ``--task affect``, the output folder of such a run, or the name of a pretrained
            model with its tag, such as ``emoreg_resnet18.emoji``.

    Raises:
        CheckpointError: If there is nothing of that name, or it was not written by stage 1.
    """
    # os.path rather than Path: False, not an error, for the empty name and for any that no file can have
    if os.path.isdir(where):
        for candidate in (Path(where, BEST), Path(where, 'affect', BEST)):
            if candidate.is_file():
                return _from_checkpoint(candidate)
        raise CheckpointError(f'{where}: holds no {BEST} of stage 1, neither itself nor in its folder '
                              'affect. Give the output folder of a run that had one, or a tag such as '
                              'emoreg_resnet18.emoji.')
    if os.path.isfile(where):
        return _from_checkpoint(Path(where))
    weight = zoo.WEIGHTS.get(where)
    if weight is not None and weight.target is None:
        try:
            model = timm.create_model(where, pretrained=True)
        except WeightError as e:
            raise CheckpointError(f'--experience {e}') from e
        own = inspect.signature(EmoReg).parameters
        return Experience(where, model.state_dict(), model.affect_kind, model.num_affect, weight.affect_names,
                          BACKBONES[weight.architecture], bool(weight.model_args.get('small_image')),
                          model_kwargs={k: v for k, v in weight.model_args.items() if k not in own},
                          stimuli={'stimuli': weight.stimuli, 'stimuli_labels': weight.stimuli_labels})
    known = [name for name, weight in zoo.WEIGHTS.items() if weight.target is None and weight.at_hand]
    near = difflib.get_close_matches(where, known, n=1)
    what = 'the result of stage 2, which knows its target already; give one of' if weight else (
        'neither a file, nor a folder, nor a released weight of')
    raise CheckpointError(f'--experience {where[:80]}: {what} stage 1 ({", ".join(known) or "none yet"}).'
                          + (f' Did you mean {near[0]}?' if near else ''))


def released_experience(architecture: str, small_image: bool, img_size: int) -> str | None:
    """Name of a released stage-1 weight of this architecture, form and size that can be had; None if there is none."""
    for weight in zoo.WEIGHTS.values():
        form = (weight.architecture, bool(weight.model_args.get('small_image')), *weight.input_size[1:])
        if weight.target is None and weight.available and form == (architecture, small_image, img_size, img_size):
            return weight.name
    return None


def untrained_experience(target: Target | None = None) -> Experience:
    """What the dual head starts from without stage 1: the form of the affect response and no weights.

    Args:
        target: Meaning of the stimuli's labels, for a response of the same form; None for eight emotions.
    """
    if target is None:
        return Experience('none', {}, 'emotion', 8)
    return Experience('none', {}, target.affect_kind, len(target), target.names)


def load_backbone(model: nn.Module, experience: Experience, share: float = 1.0) -> None:
    """Start a bare timm model from the backbone of an experience; its classifier keeps its initial weights.

    As with `EmoReg.load_experience`, stage 1 may have seen images of another size, and a share of it may be taken.

    Raises:
        CheckpointError: If a tensor is missing, unknown, or has another shape; nothing is changed then.
    """
    bare = copy.deepcopy(model)
    bare.reset_classifier(0)  # some families lose a norm or an MLP with their classifier
    own = bare.state_dict()
    given = {k.removeprefix('backbone.'): v for k, v in experience.state_dict.items() if k.startswith('backbone.')}
    given = resized_state(given, bare)
    different = sorted(own.keys() ^ given.keys()) or [k for k in own if own[k].shape != given[k].shape]
    if different:
        raise CheckpointError(f'{experience.source}: its backbone is of another architecture or form; the first '
                              f'difference is {different[0]!r}. Use the same --model, --img-size and --small-image '
                              'in both stages.')
    model.load_state_dict(shrunk_state(given, own, share), strict=False)
