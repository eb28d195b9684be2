"""Model cards, configurations and the README's table, made from the records."""
from __future__ import annotations

import json
import re
import shlex
from decimal import ROUND_CEILING, Decimal
from itertools import pairwise
from typing import Any

import yaml

from ..backbone import backbone_cfg
from ..zoo import Weight
from .terms import TARGET_TERMS, licence_terms

__all__ = ['PAPER', 'eight_bit_cost', 'make_card', 'make_config', 'make_table', 'metric_name', 'rounded_up']

PAPER = 'arXiv 2606.13081'
PERCENT = ('top1', 'top5', 'uar')
METRICS = {'top1': ('accuracy', 'accuracy'), 'top5': ('top_5_accuracy', 'top-5 accuracy'),
           'uar': ('recall', 'mean recall'), 'ccc': ('ccc', 'CCC'),
           'pcc': ('pearsonr', 'Pearson correlation'), 'rmse': ('rmse', 'RMSE')}


def make_config(weight: Weight, backbone: str) -> dict[str, Any]:
    """The ``config.json`` that timm builds the model from; what is ours lies under ``emoreg``."""
    cfg = {**backbone_cfg(backbone, **weight.cfg()), 'architecture': weight.architecture, 'tag': weight.tag}
    cfg = {k: v for k, v in cfg.items() if v is not None and k not in ('file', 'hf_hub_id', 'hf_hub_filename')}
    own = weight.to_dict()
    for changing in ('embedded', 'default', 'hub_commit'):
        del own[changing]
    config = {'architecture': weight.architecture, 'num_classes': weight.num_classes, 'pretrained_cfg': cfg,
              'model_args': weight.model_args, 'emoreg': own}
    return json.loads(json.dumps(config))  # tuples become the lists that a reader will see


def _metadata(weight: Weight) -> dict[str, Any]:
    terms = licence_terms(weight)
    on = TARGET_TERMS[weight.target] if weight.target else terms
    data = {'library_name': 'timm_emoreg',
            'pipeline_tag': 'image-classification' if weight.target else 'image-feature-extraction',
            'tags': ['timm', 'timm_emoreg', 'affective-computing', 'emotional-regulation'],
            'license': weight.licence}
    if terms.licence == 'other':
        data |= {'license_name': terms.licence_name, 'license_link': terms.licence_link}
    data['datasets'] = list(dict.fromkeys((*terms.datasets, *(on.datasets if weight.target else ()))))
    if weight.base:
        ours = weight.base.startswith('emoreg_')
        data['base_model'] = f'{weight.hub_id.split("/")[0] if ours else "timm"}/{weight.base}'
    data['model-index'] = [{
        'name': weight.name,
        'results': [{
            'task': {'type': data['pipeline_tag']},
            'dataset': {'name': on.title, 'type': on.datasets[0], 'split': 'test'},
            'metrics': [{'type': METRICS.get(_base(name), (name,))[0], 'name': metric_name(name),
                         'value': values['weight']} for name, values in weight.metrics.items()],
        }],
    }]
    return data


def _base(metric: str) -> str:
    return metric.split('_')[0].split('/')[0]


def metric_name(metric: str) -> str:
    """A metric's name for people: ``'ccc_valence'`` becomes ``'CCC valence'``."""
    base = _base(metric)
    return METRICS.get(base, (base, base))[1] + metric.removeprefix(base).replace('_', ' ').replace('/', ' ')


def _spread(values: dict[str, Any], metric: str) -> str:
    digits = 1 if _base(metric) in PERCENT else 3
    unit = ' %' if _base(metric) in PERCENT else ''
    sd = '' if values['sd'] is None else f' ± {values["sd"]:.{digits}f}'
    return f'{values["mean"]:.{digits}f}{sd}{unit} (n = {values["n"]})'


def _results(weight: Weight) -> str:
    plain, several = bool(weight.baseline), len(weight.seeds) > 1
    titles = ['test part', 'this weight', *['mean ± sd over seeds'] * several,
              *['plain backbone, same recipe'] * plain]
    rows = [f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']
    for name, values in weight.metrics.items():
        one = _spread({'mean': values['weight'], 'sd': None, 'n': 1}, name)
        row = [metric_name(name), *([one.split(' (')[0], _spread(values, name)] if several else [one])]
        if plain:
            row.append(_spread(weight.baseline[name], name) if name in weight.baseline else '')
        rows.append(f'| {" | ".join(row)} |')
    text = '\n'.join(rows)
    if weight.target:
        text += '\n\n' + _behind(weight) + ('' if plain else 'No plain backbone was trained beside it. ') + NO_EVIDENCE
    elif not plain:
        if weight.model_args['affect_kind'] == 'ratings':
            text += '\n\nFor comparison: the plain backbone gives no ratings, and any constant answer has CCC 0.'
        else:
            chance = 100 / len(weight.affect_names)
            text += ('\n\nFor comparison: the plain backbone names no emotions, and guessing has a mean recall of '
                     f'{chance:.1f} %.')
            if weight.stimuli in COMMONEST:
                name, share = COMMONEST[weight.stimuli]
                text += f' Always answering {name!r} has an accuracy of {share} %.'
    return text


def _behind(weight: Weight) -> str:
    """What a weight is below the plain backbone of the same recipe, in a sentence; empty if it is not."""
    baseline = weight.baseline.get(weight.metric)
    # of the means themselves, so it may differ by 0.1 from what the rounded ones of the table give
    below = baseline['mean'] - weight.metrics[weight.metric]['mean'] if baseline else 0
    if round(below, 1) <= 0:
        return ''
    return (f'**It is {below:.1f} points below the plain backbone with the same recipe**: for classification alone, '
            'take that one.\n\n')


def _flags(weight: Weight) -> dict[str, str]:
    """The flags of the recipe that have one value."""
    return dict(pairwise(shlex.split(weight.recipe)))


def _choice(weight: Weight) -> str:
    """How the epoch was chosen, by the recipe."""
    flags = _flags(weight)
    epochs = (None if weight.target else flags.get('--affect-epochs')) or flags.get('--epochs')
    if epochs is not None and int(flags.get('--val-interval', 1)) >= int(epochs):
        return 'The last epoch was taken, the only one that was looked at on validation data'
    return f'The best epoch was chosen on validation data by {metric_name(weight.metric)}'


def _snippets(weight: Weight) -> tuple[str, str]:
    name = weight.name if weight.embedded else f'hf-hub:{weight.hub_id}'
    if weight.target:
        show = """
with torch.no_grad():
    answer = model(x)[0].softmax(dim=0)
    z, z_emo, affect, balance = model.forward_responses(x)  # what the answer is made of
names = model.pretrained_cfg['label_names']
for p, i in zip(*answer.topk(3)):
    print(f'{names[i]}: {p:.2f}')"""
    else:
        state = '.softmax(dim=0)' * (weight.model_args['affect_kind'] == 'emotion')
        show = f"""
with torch.no_grad():
    response = model.forward_affect(x)[0]{state}
for name, value in zip({list(weight.affect_names)}, response.tolist()):
    print(f'{{name}}: {{value:.2f}}')"""
    use = f"""import timm
import timm_emoreg  # registers the models
import torch
from PIL import Image

model = timm.create_model('{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.new('RGB', (64, 64), 'orange')  # your image
x = transform(image).unsqueeze(0)
{show.strip()}"""
    tune = f"""import timm
import timm_emoreg  # registers the models
import torch
from timm_emoreg.task import EmoRegTask

model = timm.create_model('{name}', pretrained=True, num_classes=5)  # with new heads
task = EmoRegTask(model)
loss = task(torch.randn(2, *model.pretrained_cfg['input_size']), torch.tensor([0, 4]))['loss']
loss.backward()"""
    return use, tune


# the commonest label of a set, and its share of the test part in percent
COMMONEST = {'ferplus': ('neutral', 34.5)}  # 1,089 of 3,152 faces

NO_EVIDENCE = """These numbers are no evidence that emotion helps: no control of the labels was trained beside them. The
project's study compares the method with such controls, over several seeds."""

FACES = """
**Faces.** This weight was trained on photographs of faces. The EU AI Act, Art. 5(1)(f), prohibits AI systems that infer
emotions of natural persons in the areas of workplace and education institutions, except for medical or safety reasons.
Do not use it so, there or elsewhere: votes on posed and found photographs say what raters saw, not what anyone felt.
"""


def rounded_up(value: float, digits: int = 2) -> str:
    """A bound with two digits, or as many as are asked for, none of which makes it smaller."""
    number = Decimal(repr(value))
    return f'{float(number.quantize(Decimal(1).scaleb(number.adjusted() + 1 - digits), ROUND_CEILING)):.{digits}g}'


def eight_bit_cost(weight: Weight) -> str:
    """What the rounding of a weight to 8 bits costs, in a sentence."""
    found = weight.eight_bits
    return (f'Computed in float32, the weight answers {found["float32"]:.2f} % of the {found["images"]:,} test images '
            f'correctly before it was rounded to 8 bits and {found["int8"]:.2f} % as the file has it; '
            f'{found["changed"]:,} predictions change.')


def make_card(weight: Weight) -> str:
    """The ``README.md`` of a weight, made from its record alone."""
    terms = licence_terms(weight)
    use, tune = _snippets(weight)
    target = TARGET_TERMS[weight.target] if weight.target else None
    size = 'x'.join(str(s) for s in weight.input_size[1:])
    if target:
        what = (f'A classifier for {target.title} ({weight.num_classes} classes) with emotional regulation:\n'
                'it balances a non-emotional response and one that an affect response has influenced.\n'
                f'The affect response was learnt before, from {terms.title}.')
    else:
        what = (f'A backbone with an affect response ({", ".join(weight.affect_names)}), trained on {terms.title}.\nIt '
                'is stage 1 of emotional regulation, the start for a classifier; it has no classes of its own.')
    kind = 'classifier' if target else 'model'
    share = _flags(weight).get('--experience-share')
    start = (f'a share of {share} of ' if share else '') + f'`{weight.base}`'
    trained = f'from {start if weight.base else "scratch"}, project commit `{weight.commit}`'
    several = len(weight.seeds) > 1
    seeds = (f'seed{"s" * several} {", ".join(map(str, sorted(weight.seeds)))}'
             + f' (released: {weight.seeds[0]}, the best on validation data)' * several
             + f', {weight.seconds:,.0f} s{" per run" * several}')
    hardware = re.sub(r'\b1 threads', '1 thread', weight.hardware)
    again = ', and again for what the 8 bits cost, by which nothing was chosen' if weight.eight_bits else ''
    precision = 'int8 with a scale per output channel' if weight.eight_bits else weight.precision
    rounding = f'\n{eight_bit_cost(weight)}\n' if weight.eight_bits else ''
    moved = rounded_up(weight.logit_difference)
    data = [f'- Stimuli: {terms.title}; labels: {weight.stimuli_labels}. {terms.text}']
    if target:
        data.append(f'- Target: {target.title}. {target.text}')
    if terms.licence == 'other':
        licence = f'{terms.licence_name} ({terms.licence_link})'
    else:
        licence = weight.licence
    front = yaml.safe_dump(_metadata(weight), sort_keys=False, allow_unicode=True, width=110)
    return f"""---
{front}---
# {weight.name}

{what}

An implementation, in the package `timm_emoreg`, of the published abstract of Landi, Rodrigues, Chinnici, "Emotional
regulation improves deep learning-based image classification", {PAPER}. The formulas and numbers of the
paper were not available; no number of the paper is claimed here.

| | |
|---|---|
| model | `{weight.architecture}`, {weight.form}, {size} px, {weight.parameters:,} parameters |
| trained | {trained}, {seeds} ({hardware}) |
| file | {weight.size:,} bytes, safetensors, {precision}: moves outputs for noise by at most {moved} |
| sha256 | `{weight.sha256}` |
| licence | {licence} |

## Use

With the package `timm_emoreg` installed (`pip install .` in a checkout of the project):

```python
{use}
```

To train on classes of your own:

```python
{tune}
```

## What it is and what it is not

It is an image {kind} with an affect response: numbers that imitate labels which people gave to pictures. It
is no judge of anyone's feelings, neither of the person in a picture nor of the one who looks at it, and no ground for a
decision about a person.
{FACES if terms.faces else ''}
## Results

{_results(weight)}
{rounding}
{_choice(weight)}; the test part was looked at once{again}.

## Training data and their terms

{chr(10).join(data)}

Licence of this weight: {licence}. {terms.reason}

Recipe:

    {weight.recipe}

## Limits

Trained at {size} px on a small data set; other sizes and other kinds of pictures lower its quality. The labels carry
the culture and the time of their raters. It was not tested for fairness between groups of people.

## Citation

```bibtex
@article{{landi2026emotional,
  title={{Emotional regulation improves deep learning-based image classification}},
  author={{Landi and Rodrigues and Chinnici}},
  journal={{arXiv preprint arXiv:2606.13081}}
}}
```
"""


def make_table(weights: dict[str, Weight]) -> str:
    """A markdown table of all weights, for the project's README."""
    rows = ['| weight | MB | licence | where | test result | plain backbone |', '|---|---|---|---|---|---|']
    for name in sorted(weights):
        weight = weights[name]
        places = ['in the package'] * weight.embedded
        if weight.hub_commit:
            places.append(f'Hub: `{weight.hub_id}`')
        where = ', '.join(places) or 'waits for publication'
        metric = weight.metric if weight.metric in weight.metrics else next(iter(weight.metrics))
        plain = _spread(weight.baseline[metric], metric) if metric in weight.baseline else ''
        star = ' (default)' * weight.default
        licence = licence_terms(weight).licence_name or weight.licence
        size = f'{weight.size / 1e6:.1f}' + ' (8 bits)' * bool(weight.eight_bits)
        rows.append(f'| `{name}`{star} | {size} | {licence} | {where} | '
                    f'{metric_name(metric)} {_spread(weight.metrics[metric], metric)} | {plain} |')
    return '\n'.join(rows)
