"""One record a released weight. Registry, cards and tables are made from these records and from nothing else.

The records lie in ``assets/weights.json``, which ``python -m timm_emoreg.hub`` writes, so that no number is typed.
"""
from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from .backbone import backbone_cfg
from .files import write_text
from .small_image import whole_image_cfg

__all__ = ['HUB_FILE', 'WEIGHTS', 'Weight', 'find', 'read_records', 'registry_cfgs', 'write_records']

HUB_FILE = 'model.safetensors'  # name of the weight file in its Hub repository
ASSETS = files('timm_emoreg') / 'assets'


@dataclass(frozen=True)
class Weight:
    """A released weight.

    Args:
        architecture: Registered name of the model.
        tag: ``<stimuli>`` after stage 1, ``<stimuli>_ft_<target>`` after stage 2.
        file: Name of the file in the package and in ``$EMOREG_WEIGHTS``.
        sha256: Of the file, 64 hexadecimal digits.
        size: Of the file, in bytes.
        precision: Type of its floating-point tensors, 'float16'; or 'int8', as `timm_emoreg.eight_bit` has it.
        logit_difference: Largest absolute difference that this type makes to the model's output, on a fixed batch.
        parameters: Number of parameters of the model.
        stimuli: What the affective pre-training showed, a key of `timm_emoreg.data.STIMULI`.
        stimuli_labels: Which labels of it.
        target: Data set of stage 2, None after stage 1.
        input_size: (channels, height, width) of the training.
        form: Form of the backbone, in words.
        affect_names: Name of each output of the affect response.
        label_names: Name of each class, empty after stage 1.
        model_args: Arguments of the constructor under which the weights fit.
        metric: The metric that chose the best epoch.
        metrics: Results on the test part: name to ``{'weight': of this weight, 'n': runs, 'mean': ..., 'sd': ...}``;
            sd is None for one run.
        baseline: The same of the plain backbone under the same recipe, empty if there is none.
        seeds: Seed of each run, the released one first.
        seconds: Mean duration of a run of this stage.
        hardware: What the runs were made on.
        recipe: The command that trained it.
        commit: Commit of this project that it was trained with; ``-dirty`` at its end if files had been changed.
        licence: Identifier as the Hub knows it.
        base: Weight that it was trained from: a tag of ours or a timm model with its tag, None from scratch.
        embedded: Whether the file is in the package.
        default: Whether ``pretrained=True`` without a tag means this weight.
        hub_id: Repository on the Hub.
        hub_commit: Published commit, None while it waits for publication.
        eight_bits: What int8 costs on the test part: number of ``'images'``, accuracy in percent before the rounding
            (``'float32'``) and after it (``'int8'``), and how many answers are ``'changed'``; None in 16 bits.

    Raises:
        ValueError: If a field cannot be true.
    """

    architecture: str
    tag: str
    file: str
    sha256: str
    size: int
    precision: str
    logit_difference: float
    parameters: int
    stimuli: str
    stimuli_labels: str
    target: str | None
    input_size: tuple[int, int, int]
    form: str
    affect_names: tuple[str, ...]
    label_names: tuple[str, ...]
    model_args: dict[str, Any]
    metric: str
    metrics: dict[str, dict[str, Any]]
    baseline: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    seconds: float
    hardware: str
    recipe: str
    commit: str
    licence: str
    base: str | None
    embedded: bool
    default: bool
    hub_id: str
    hub_commit: str | None
    eight_bits: dict[str, float] | None = None

    def __post_init__(self):
        for name in ('input_size', 'affect_names', 'label_names', 'seeds'):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # json knows lists only
        expected = self.stimuli + (f'_ft_{self.target}' if self.target else '')
        for wrong, what in (
                (self.tag != expected, f'tag {self.tag!r} does not say stimuli and target, expected {expected!r}'),
                (self.file != f'{self.name}.safetensors', f'file {self.file!r} is not named after the weight'),
                (not re.fullmatch('[0-9a-f]{64}', self.sha256), f'sha256 {self.sha256!r} is not 64 hexadecimal digits'),
                (self.hub_commit is not None and not re.fullmatch('[0-9a-f]{40}', self.hub_commit),
                 f'hub_commit {self.hub_commit!r} is no full commit'),
                (bool(self.target) != bool(self.label_names), 'label_names and target must come together'),
                (self.model_args.get('num_affect') != len(self.affect_names),
                 f'model_args have num_affect={self.model_args.get("num_affect")}, '
                 f'affect_names name {len(self.affect_names)}'),
                ((self.precision == 'int8') != bool(self.eight_bits),
                 'eight_bits and precision int8 must come together'),
        ):
            if wrong:
                raise ValueError(f'Record of the weight {self.name}: {what}. Build it anew with '
                                 '`python -m timm_emoreg.hub build`.')

    @property
    def name(self) -> str:
        """Registered name with tag."""
        return f'{self.architecture}.{self.tag}'

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def available(self) -> bool:
        """Whether it can be had from the package or the Hub."""
        return self.embedded or self.hub_commit is not None

    @property
    def at_hand(self) -> bool:
        """Whether it can be had from there, or lies in this checkout of the project."""
        return self.available or self.waiting_path.is_file()

    @property
    def embedded_path(self) -> Path:
        """Where the file is in the package, if it is embedded."""
        return Path(str(ASSETS / 'weights' / self.file))

    @property
    def waiting_path(self) -> Path:
        """Where the file is in a checkout of the project, while it waits for publication."""
        return Path(str(ASSETS)).parents[1] / 'hub_cards' / self.name / HUB_FILE

    def cfg(self) -> dict[str, Any]:
        """What a pretrained cfg of timm says about this weight, beside the preprocessing of its backbone."""
        cfg = {**whole_image_cfg(self.input_size), 'num_classes': self.num_classes, 'license': self.licence,
               'paper_ids': 'arXiv:2606.13081'}
        if self.label_names:
            cfg['label_names'] = self.label_names
        if self.embedded:
            cfg['file'] = str(self.embedded_path)
        if self.hub_commit is not None:
            cfg |= {'hf_hub_id': f'{self.hub_id}@{self.hub_commit}', 'hf_hub_filename': HUB_FILE}
        return cfg

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_records(path: Path | None = None) -> dict[str, Weight]:
    """The records of a file, by name; those of the package if no path is given.

    Raises:
        ValueError: For a record that cannot be true, or two of one name or one default.
    """
    text = (ASSETS / 'weights.json' if path is None else path).read_text(encoding='utf-8')
    weights = [Weight(**fields) for fields in json.loads(text)]
    records = {weight.name: weight for weight in weights}
    defaults = [weight.architecture for weight in weights if weight.default]
    if len(records) < len(weights) or len(set(defaults)) < len(defaults):
        raise ValueError(f'{path or "weights.json"}: two records of one weight, or two defaults of one architecture.')
    return records


def write_records(records: dict[str, Weight], path: Path) -> None:
    """Write records in the order of their names."""
    text = json.dumps([records[name].to_dict() for name in sorted(records)], indent=1, ensure_ascii=False)
    write_text(path, text + '\n')


def find(name: str) -> Weight | None:
    """The record of ``<architecture>.<tag>``, or of the default weight of an architecture; None if there is none."""
    if name in WEIGHTS:
        return WEIGHTS[name]
    own = [weight for weight in WEIGHTS.values() if weight.architecture == name and weight.available]
    return next((w for w in own if w.default), own[0] if own else None)


def registry_cfgs(backbones: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Arguments of ``generate_default_cfgs`` for some architectures: their weights, and the architecture without any.

    The star makes the cfg without weights the one of the untagged name, which builds the backbone's usual form: the
    input size of a weight for small images would not fit it. It works only behind the weights. Which weight
    ``pretrained=True`` means, `find` knows.

    Args:
        backbones: Registered name to timm's name of its backbone.
    """
    plain = {name: backbone_cfg(backbone) for name, backbone in backbones.items()}
    weights = {}
    for weight in (w for w in WEIGHTS.values() if w.architecture in backbones):
        cfg = backbone_cfg(backbones[weight.architecture], **weight.cfg())
        if plain[weight.architecture].get('pool_size'):  # a family that pools a feature map; the small stem halves less
            reduction = 8 if weight.model_args.get('small_image') else 32
            cfg['pool_size'] = tuple(side // reduction for side in weight.input_size[1:])
        weights[weight.name] = cfg
    return weights | {f'{name}.*': cfg for name, cfg in plain.items()}


WEIGHTS = read_records()
