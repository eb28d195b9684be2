"""What stage 2 left of stage 1, and what it does with it, in numbers: python -m timm_emoreg.diagnose.

    python -m timm_emoreg.diagnose output/RUN

    affect         quality of the affect response on stimuli before and after stage 2: does stage 2 erase stage 1?
    similarity     of the pooled features of different images (mean cosine; 1 if all are alike), untrained, before and
                   after stage 2: did stage 1 leave features to start from?
    growth         of the backbone's matrices and kernels before and after stage 2: spectral norm over that of an
                   untrained one, median; without batch norm, large weights are slow to learn again
    state          how far the affective state of downstream images moved, and how much of it varies between images
    constant_state downstream accuracy if each image got the mean state instead of its own: is it made use of?
    top1           of the non-emotional, the emotionally-influenced and the regulated response
    balance        its mean and sd over the images: does it move?

Before stage 2 is what stage 2 started from: stage 1, or the share of it that --experience-share left, mixed with fresh
weights, here of another draw than the run's. All on validation parts, so that the test parts stay unseen. Prints one
JSON line.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import get_model_args
from torch import Tensor, nn

from .answers import BATCH, Answers, answer, check_device, top1
from .data import TARGETS, DataError, ImageSet, load_stimuli, load_target
from .data.controls import predict_rotation
from .data.loader import make_loader
from .emoreg import EmoReg
from .metrics import affect_evaluator, wide_dtype
from .trained import Trained, check_classes, need_affect, trained_model
from .training.checkpoint import CheckpointError
from .training.experience import STIMULI_SETTINGS, find_experience
from .weights import WeightError

__all__ = ['affect_quality', 'diagnose', 'growth', 'main', 'similarity', 'with_constant_state']


class _Constant(nn.Module):
    """One affective state for every image: (B, K) to (B, K)."""

    def __init__(self, state: Tensor):
        super().__init__()
        self.register_buffer('value', state)

    def forward(self, affect: Tensor) -> Tensor:
        return self.value.to(affect).expand_as(affect)


def with_constant_state(trained: Trained, images: ImageSet, state: Tensor, device: torch.device | str) -> Answers:
    """What the model answers if the affective state of every image is `state`, (K,)."""
    own = trained.model.state
    trained.model.state = _Constant(state)
    try:
        return answer(trained, images, device)[0]
    finally:
        trained.model.state = own


def affect_quality(trained: Trained, stimuli: ImageSet, device: torch.device | str) -> dict[str, float]:
    """The metrics of stage 1 for the affect response to some stimuli.

    Raises:
        DataError: If the response does not have the outputs that the stimuli ask for.
    """
    if stimuli.target.names != trained.affect_names:
        raise DataError(f'the stimuli ask for {", ".join(stimuli.target.names)}, the affect response of '
                        f'{trained.source} gives {", ".join(trained.affect_names)}. Give the --stimuli of its stage 1.')
    evaluator = affect_evaluator(stimuli.target.kind, stimuli.target.names)
    evaluator.update(answer(trained, stimuli, device)[0].affect, stimuli.targets)
    return {name: round(float(value), 4) for name, value in evaluator.compute().items()}


@torch.inference_mode()
def similarity(model: EmoReg, images: ImageSet, size: tuple[int, int], device: torch.device | str) -> float:
    """Mean cosine similarity of the pooled features that the affect response reads, over all pairs of images.

    Raises:
        DataError: If there are not two images.
    """
    count, wide = len(images), wide_dtype(torch.device(device))
    if count < 2:
        raise DataError(f'There is {count} image to look at, and how alike features of different images are needs 2. '
                        'Give a set with more of them in its validation part.')
    stream = model.affect_backbone.to(device).eval()
    total = torch.zeros(stream.head_hidden_size, dtype=wide, device=device)
    with_itself = torch.zeros((), dtype=wide, device=device)
    for x, _ in make_loader(images, size, BATCH, resolve_model_data_config(model), device=device):
        h = F.normalize(stream.forward_head(stream.forward_features(x), pre_logits=True).to(total), dim=1)
        total += h.sum(dim=0)
        with_itself += h.square().sum()  # 1 per image, but for features that are all 0
    return round((total.square().sum() - with_itself).item() / (count * (count - 1)), 4)


def _spectral_norm(weight: Tensor) -> float:
    matrix = weight.detach().float().cpu().flatten(1)
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix  # the smaller one
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt().item()


def growth(model: EmoReg, untrained: EmoReg) -> float:
    """Median over the matrices and kernels of the backbone that the affect response reads of their largest singular
    value over that of an untrained model's; a kernel counts as a matrix with a row per output channel."""
    first = dict(untrained.affect_backbone.named_parameters())
    ratios = [_spectral_norm(p) / start for name, p in model.affect_backbone.named_parameters()
              if p.ndim > 1 and (start := _spectral_norm(first[name]))]
    return round(statistics.median(ratios), 4)


def _untrained(model: EmoReg) -> EmoReg:
    """A model of the same form as it is before any training, seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed reseeds those of GPUs, too, which stay as they are
        return timm.create_model(model.pretrained_cfg['architecture'], **get_model_args(model))


def _need_classes(trained: Trained) -> None:
    if not trained.model.num_classes:
        raise DataError(f'{trained.source} is the result of stage 1 and has no response to images. Give a run of '
                        '--task emoreg.')


def diagnose(trained: Trained, before: dict[str, Tensor], stimuli: ImageSet, images: ImageSet,
             device: torch.device | str = 'cpu') -> dict[str, Any]:
    """The numbers of one model.

    Args:
        trained: A model of stage 2.
        before: Weights of its stage 1, of which ``trained.experience_share`` was left.
        stimuli: Stimuli to judge the affect response by.
        images: Downstream images.
        device: Where to compute.

    Raises:
        DataError: If the stimuli are not those of the affect response, or the images not those of the heads, or if the
            model has no heads.
        ValueError: If `before` is of another architecture.
    """
    model = trained.model
    _need_classes(trained)
    check_classes(trained, images.target.names, 'the images')
    after = affect_quality(trained, stimuli, device)
    untrained = _untrained(model)
    alike = {'untrained': similarity(untrained, images, trained.img_size, device),
             'after': similarity(model, images, trained.img_size, device)}
    grown = {'after': growth(model, untrained)}
    own, _ = answer(trained, images, device)
    constant = with_constant_state(trained, images, own.state.mean(dim=0), device)
    start = replace(trained, model=_untrained(model).eval())
    start.model.load_experience(before, trained.experience_share)
    then, _ = answer(start, images, device)
    alike['before'] = similarity(start.model, images, trained.img_size, device)
    grown['before'] = growth(start.model, untrained)
    target = images.targets
    return {
        'model': trained.source, 'stimuli': len(stimuli), 'images': len(images),
        'affect': {'before': affect_quality(start, stimuli, device), 'after': after},
        'similarity': {name: alike[name] for name in ('untrained', 'before', 'after')},
        'growth': {name: grown[name] for name in ('before', 'after')},
        'state': {'moved': round((own.state - then.state).abs().mean().item(), 4),
                  'sd_before': round(then.state.std(dim=0, correction=0).mean().item(), 4),
                  'sd_after': round(own.state.std(dim=0, correction=0).mean().item(), 4)},
        'constant_state': {'top1': round(top1(constant.regulated, target), 2),
                           'changed': int((constant.regulated.argmax(1) != own.regulated.argmax(1)).sum())},
        'top1': {name: round(top1(getattr(own, name), target), 2)
                 for name in ('non_emotional', 'emotional', 'regulated')},
        'balance': {'mean': round(own.balance.mean().item(), 4),
                    'sd': round(own.balance.std(correction=0).item(), 4)}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if the line is printed, 2 if something given cannot be used."""
    parser = argparse.ArgumentParser(prog='python -m timm_emoreg.diagnose', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='folder of a run of train.py with --task emoreg, or one of its checkpoints')
    parser.add_argument('--stimuli', help='a set, folder or csv (default: those of its stage 1)')
    parser.add_argument('--stimuli-labels', help="which labels of them, or 'rotation' as in train.py")
    parser.add_argument('--rating-columns', nargs='+', help='rating columns of a csv')
    parser.add_argument('--rating-scale', nargs=2, type=float, metavar=('LOW', 'HIGH'), help='scale of these ratings')
    parser.add_argument('--dataset', help=f'{", ".join(TARGETS)}, or a folder (default: that of its stage 2)')
    parser.add_argument('--experience', metavar='PATH-or-tag', help='its stage 1, where that lies elsewhere now')
    parser.add_argument('--data-dir', help='data sets (default: the one of the run, $EMOREG_DATA)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args(argv)
    try:
        check_device(args.device)
        trained = need_affect(trained_model(args.run, args.experience))
        _need_classes(trained)
        stage_1 = args.experience or trained.experience
        if stage_1 is None:
            raise DataError(f'{args.run}: started from no stage 1 that could be compared with it. Give a run of --task '
                            'emoreg with an experience.')
        if trained.experience_share < 1 and trained.pretrained_backbone:
            raise DataError(f'{args.run}: started from a share of stage 1 mixed with the pretrained weights of its '
                            'backbone, which a run does not keep. Give one of all of stage 1 or without '
                            '--pretrained-backbone.')
        experience = find_experience(stage_1)
        shown = {} if args.stimuli else dict(experience.stimuli)
        shown |= {name: getattr(args, name) for name in STIMULI_SETTINGS if getattr(args, name) is not None}
        if 'stimuli' not in shown:
            raise DataError(f'{experience.source}: does not tell its stimuli, or had shuffled labels. Give --stimuli.')
        data_dir = args.data_dir or trained.data_dir
        name, labels = shown.pop('stimuli'), shown.pop('stimuli_labels', None)
        rotation = labels == 'rotation'
        stimuli = load_stimuli(name, data_dir, None if rotation else labels, **shown)
        stimuli = (predict_rotation(stimuli, experience.seed) if rotation else stimuli).validation
        images = load_target(args.dataset or trained.dataset, data_dir).validation
        print(json.dumps(diagnose(trained, experience.state_dict, stimuli, images, args.device)))
    except (DataError, CheckpointError, WeightError, ValueError, OSError) as e:
        print(f'diagnose: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
