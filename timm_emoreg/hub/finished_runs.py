"""Finished runs of train.py: reading them, comparing their recipes, the command that gives one again."""
from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import timm_emoreg

from ..training.checkpoint import BEST
from ..training.settings import LABELS_OF_STAGE_1, REGULATION
from ..training.train_script import load_parse_args

__all__ = ['ROOT', 'HubError', 'Run', 'check_baseline', 'check_same_recipe', 'recipe_of', 'summary_of']

ROOT = Path(timm_emoreg.__file__).resolve().parents[1]
MACHINE = ('output', 'experiment', 'resume', 'data_dir', 'device', 'workers', 'log_interval', 'seed')
OF_STAGE_1 = ('stimuli', *LABELS_OF_STAGE_1, 'rating_scale', 'affect_epochs')
OF_REGULATION = (*REGULATION, 'rehearsal')
OF_STAGE_2 = ('dataset', 'train_images', 'experience_share', *OF_REGULATION, 'mixup', 'cutmix')
NOT_OF_PLAIN = ('task', 'experience', 'experience_share', *OF_STAGE_1, *OF_REGULATION)


class HubError(RuntimeError):
    """Something that must not be built or published; the message says what and why."""


class Run:
    """One finished stage of train.py: its result, its settings, its best checkpoint."""

    def __init__(self, path: Path):
        path = path / 'result.json' if path.is_dir() else path
        try:
            self.result = json.loads(path.read_text(encoding='utf-8'))
            settings = path.resolve().parent.parent / 'args.json'
            self.args = json.loads(settings.read_text(encoding='utf-8'))
        except (OSError, ValueError) as e:
            raise HubError(f'{path}: no result of a run of train.py with its args.json one folder up ({e}). Give the '
                           'folder of a stage, such as output/RUN/emoreg.') from e
        self.path = path
        self.checkpoint = path.parent / BEST

    def settings(self) -> dict[str, Any]:
        given = {k: v for k, v in self.args.items() if k not in (*MACHINE, 'commit')}
        return {**given, 'task': self.result['task'], 'experience': self.result.get('experience')}

    def resolved(self) -> dict[str, Any]:
        """What the settings came to in the run; empty where an older train.py did not note it."""
        if 'recipe' not in self.result:
            return {}
        return {**self.result['recipe'], 'loader': self.result['loader'], 'precision': self.result['precision'],
                # what they were before there was a choice
                'attention': self.result.get('attention', 'fused'),
                'convolution': self.result.get('convolution', 'torch')}


def _settings_of(*command: str) -> dict[str, Any]:
    """What train.py makes of a command line."""
    return vars(load_parse_args(ROOT / 'train.py')(list(command)))


def _different(one: Run, other: Run, aside: tuple[str, ...] = ()) -> str:
    """The settings in which a run differs from another one, with both values; empty if there are none."""
    own = _settings_of()  # an older train.py did as these say without noting it
    a, b = ({**own, **run.settings()} for run in (one, other))
    if one.resolved() and other.resolved():
        a, b = a | one.resolved(), b | other.resolved()
    return ', '.join(f'{k} {a[k]!r} (there {b[k]!r})' for k in a if k in b and k not in aside and a[k] != b[k])


def check_same_recipe(runs: list[Run]) -> None:
    """Refuse runs that are no repeats of one another.

    Raises:
        HubError: If they differ in more than the seed, or not in that.
    """
    for run in runs[1:]:
        if other := _different(run, runs[0]):
            raise HubError(f'{run.path} has another recipe than {runs[0].path}: {other}. Only seeds may differ.')
    seeds = [run.result['seed'] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise HubError(f'Two of the runs have the same seed ({seeds}): they are no independent results.')


def check_baseline(runs: list[Run], best: Run) -> None:
    """Refuse what a card must not call the plain backbone under the recipe of the weight.

    Raises:
        HubError: If a run is no plain one, has an experience, or differs in data, architecture or a setting.
    """
    model, data = best.result['model'], best.result['data']
    for run in runs:
        if (run.result['task'], run.result['model'], run.result['data']) != ('plain', model, data):
            raise HubError(f'{run.path} is not the plain baseline of {model} on {data}: it is {run.result["task"]} of '
                           f'{run.result["model"]} on {run.result["data"]}. Give runs of --task plain.')
        if run.result.get('experience'):
            raise HubError(f'{run.path} is not the plain baseline: it started from the experience '
                           f'{run.result["experience"]}. Train it without --experience and --stimuli.')
        if different := _different(run, best, NOT_OF_PLAIN):
            raise HubError(f'{run.path} is not the plain baseline of the same recipe as {best.path}: {different}. '
                           "Train the plain backbone with the weight's flags.")


def summary_of(runs: list[Run], names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What a record says of the test part of runs, the released one first: value, n, mean and sd of each metric.

    Args:
        runs: Of one recipe.
        names: Of the affect outputs; where there is one, its own metrics are those of the whole.
    """
    metrics = {}
    for metric, value in runs[0].result['test'].items():
        if metric == 'loss' or (len(names) == 1 and metric.endswith(f'_{names[0]}')):
            continue
        values = [run.result['test'][metric] for run in runs]
        metrics[metric] = {'weight': round(value, 4), 'n': len(values), 'mean': round(statistics.mean(values), 4),
                           'sd': round(statistics.stdev(values), 4) if len(values) > 1 else None}
    return metrics


def recipe_of(run: Run, base: str | None) -> str:
    """The shortest command that gives the run's settings, from train.py's own defaults; it always tells the epochs.

    Args:
        run: Of stage 1 or stage 2.
        base: Name of the released stage 1 that stage 2 started from.
    """
    args = dict(run.args, task=run.result['task'], experience=base if run.result['task'] == 'emoreg' else None)
    rehearsed = args['task'] == 'emoreg' and args.get('rehearsal')
    if args['experience'] and not rehearsed:
        args['stimuli'] = None  # stage 1 is named by its result
    command = ['--model', args['model'], '--task', args['task']]
    for key in ('stimuli', 'experience'):
        command += [f'--{key}', args[key]] if args[key] else []
    if args['task'] != 'affect':
        command += ['--dataset', args['dataset']]
    if rehearsed:
        command += ['--rehearsal', str(rehearsed)]
    given = _settings_of(*command)
    if args['task'] == 'affect':
        aside = (*OF_STAGE_2, *(('momentum',) if not args['opt'] else ()))  # of stage 2's usual optimizer alone
    else:  # a rehearsal shows the stimuli again; no other setting of stage 1 is left beside its result
        aside = ('affect_epochs',) if rehearsed else OF_STAGE_1
    for key, value in args.items():
        if key in (*MACHINE, *aside) or key not in given or (given[key] == value and key != 'epochs'):
            continue
        flag = '--' + key.replace('_', '-')
        if isinstance(value, bool):
            command.append(flag if value else flag.replace('--', '--no-', 1))
        elif isinstance(value, dict):
            command += [flag, *(f'{k}={v}' for k, v in value.items())]
        elif value is not None:
            command += [flag, *map(str, value if isinstance(value, list) else [value])]
    return 'python train.py ' + shlex.join([*command, '--seed', str(run.result['seed'])])
