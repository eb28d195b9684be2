"""Build, check and publish released weights.

    python -m timm_emoreg.hub build NAME RESULT... [--plain RESULT...]    from runs of train.py to record, card and file
    python -m timm_emoreg.hub check NAME... | --all                       everything a reader would rely on
    python -m timm_emoreg.hub publish NAME... | --all [--push]            a dry run, unless --push
    python -m timm_emoreg.hub card NAME... | --all                        cards anew from their records
    python -m timm_emoreg.hub table [--write README.md]                   the table of all weights

NAME is architecture and tag, such as emoreg_resnet18.emoji or emoreg_resnet18.ferplus_ft_cifar10. RESULT is a
result.json of train.py, one for each seed; the released weight is that of the best validation among them.
Publishing needs a token with write permission (`hf auth login`, or HF_TOKEN).
"""
from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, errors, hf_hub_download

from .. import BACKBONES, __version__
from ..data import DataError
from ..marks import write_between_marks
from ..training.checkpoint import CheckpointError
from ..weights import WeightError, check_file, layout_of
from ..zoo import HUB_FILE, Weight, read_records
from .card_lint import lint_card, run_snippets
from .cards import eight_bit_cost, make_card, make_table, rounded_up
from .finished_runs import ROOT, HubError
from .release import ORGANISATION, Checkout, build, config_text
from .terms import licence_terms

__all__ = ['HubError', 'build', 'check', 'main', 'publish']

EMBEDDED_LIMIT = 90_000_000  # bytes of all embedded files; the wheel has to stay below 100 MB
WAITING_LIMIT = 60_000_000  # bytes of a file that waits in hub_cards
PARTS = ('config.json', 'README.md', HUB_FILE)


# -- check -------------------------------------------------------------------------------------------------------------


def check(name: str, home: Path = ROOT, run: bool = True) -> list[str]:
    """What is wrong with a weight: its file, its card, its numbers, its licence, its snippets.

    Args:
        name: Name of the weight.
        home: The checkout.
        run: Run the snippets, where the file is here: the embedded one, or the folder's in place of the Hub's.
    """
    place = Checkout(home)
    weight = place.find(name)
    problems = []
    folder, file = place.cards / name, place.file(weight)
    try:
        licence = licence_terms(weight).licence
    except ValueError as e:
        return [str(e)]
    if weight.licence != licence:
        problems.append(f'the record says licence {weight.licence}, the stimuli {weight.stimuli} allow {licence} only')
    numbers = [v[key] for v in (*weight.metrics.values(), *weight.baseline.values())
               for key in ('weight', 'mean', 'sd')]
    if not weight.metrics:
        problems.append('the record holds no numbers')
    if not all(n is None or math.isfinite(n) for n in numbers):
        problems.append('a number of the record is not finite')
    try:
        if file.exists():
            check_file(file, weight, layout_of(weight, BACKBONES[weight.architecture]), 'of the release')
        elif weight.embedded or weight.hub_commit is None:
            problems.append(f'{file} is missing')
    except WeightError as e:
        problems.append(str(e))
    limit = EMBEDDED_LIMIT if weight.embedded else WAITING_LIMIT
    total = sum(w.size for w in read_records(place.records).values() if w.embedded) if weight.embedded else weight.size
    if total > limit:
        problems.append(f'{total:,} bytes are too many {"embedded" if weight.embedded else "for a waiting file"}, '
                        f'at most {limit:,}')
    for path in sorted(folder.glob('*')):
        if path.name not in PARTS or (path.name == HUB_FILE and weight.embedded):
            problems.append(f'{path} does not belong there; no pickles and no other files are published')
    for part, expected in (('config.json', config_text(weight)), ('README.md', make_card(weight))):
        path = folder / part
        if not path.is_file():
            problems.append(f'{path} is missing')
        elif path.read_text(encoding='utf-8') != expected:
            problems.append(f'{path} is not what the record says; `hub card {name}` writes it anew')
    if (folder / 'README.md').is_file():
        text = (folder / 'README.md').read_text(encoding='utf-8')
        problems += [f'card: {problem}' for problem in lint_card(text, weight)]
        if run and not problems and file.exists():
            local = {} if weight.embedded else {f'hf-hub:{weight.hub_id}': f'local-dir:{folder}'}
            try:
                run_snippets(text, local)
            except RuntimeError as e:
                problems.append(f'card: {e}')
    return problems


# -- publish -----------------------------------------------------------------------------------------------------------


def _upload(api: HfApi, weight: Weight, contents: dict[str, bytes]) -> str:
    """One commit, fetched again and compared; gives its hash."""
    operations = [CommitOperationAdd(part, content) for part, content in contents.items()]
    message = f'{weight.name}, sha256 {weight.sha256[:12]}'
    commit = api.create_commit(weight.hub_id, operations, commit_message=message).oid
    with tempfile.TemporaryDirectory() as cache:
        for part, content in contents.items():
            back = hf_hub_download(weight.hub_id, part, revision=commit, cache_dir=cache, token=api.token)
            if Path(back).read_bytes() != content:
                raise HubError(f'{weight.name}: {part} came back from {weight.hub_id}@{commit} with other bytes. '
                               'It is neither tagged nor recorded; publish it again.')
    return commit


def _tag(api: HfApi, weight: Weight, tag: str, commit: str) -> None:
    try:
        api.create_tag(weight.hub_id, tag=tag, revision=commit)
    except errors.HfHubHTTPError as e:
        tagged = {ref.name: ref.target_commit for ref in api.list_repo_refs(weight.hub_id).tags}
        if e.response.status_code != 409 or tag not in tagged:
            raise
        if tagged[tag] != commit:  # the same file under a newer card
            api.delete_tag(weight.hub_id, tag=tag)
            api.create_tag(weight.hub_id, tag=tag, revision=commit)


def publish(name: str, home: Path = ROOT, push: bool = False, organisation: str | None = None,
            private: bool = False, token: str | None = None) -> Weight:
    """Show what would be published, or publish it: one commit, fetched again and compared, tagged, recorded.

    Args:
        name: Name of the weight.
        home: The checkout.
        push: Publish it; without, nothing leaves the machine.
        organisation: Another owner of the repository than the record's.
        private: Create the repository as a private one.
        token: A token of the Hub, the stored one if None.

    Returns:
        The record, with the published commit if `push`.

    Raises:
        HubError: If the weight must not be published, or does not come back as it was sent.
    """
    place = Checkout(home)
    weight = place.find(name)
    if organisation is not None:
        weight = replace(weight, hub_id=f'{organisation}/{name}',
                         hub_commit=weight.hub_commit if weight.hub_id == f'{organisation}/{name}' else None)
    problems = check(name, home)
    if not re.fullmatch('[0-9a-f]{40}', weight.commit):
        problems.append(f'the record is dirty: its project commit is {weight.commit!r}; train it in a clean checkout, '
                        'or name the commit that its code is in with `hub build --commit`')
    if not place.file(weight).is_file() and not problems:
        problems.append(f'{place.file(weight)} is not here')
    if problems:
        raise HubError(f'{name} is not published:\n' + '\n'.join(f'  - {problem}' for problem in problems))
    print(f'{name} -> {weight.hub_id}' + ('' if push else ' (dry run; --push publishes)'))
    # the texts as the record makes them, which another organisation changes; nothing is written before it is published
    contents = {'config.json': config_text(weight).encode(), 'README.md': make_card(weight).encode(),
                HUB_FILE: place.file(weight).read_bytes()}
    for part, content in contents.items():
        print(f'  {part:18} {len(content):>12,} bytes  sha256 {hashlib.sha256(content).hexdigest()}')
    if not push:
        return weight
    api = HfApi(token=token, library_name='timm_emoreg', library_version=__version__)
    tag = f'v{__version__}-{weight.sha256[:8]}'
    try:
        api.create_repo(weight.hub_id, private=private, exist_ok=True)
        commit = _upload(api, weight, contents)
        _tag(api, weight, tag, commit)
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as e:
        raise HubError(f'{name}: the Hub refuses: {" ".join(str(e).split())}. Publishing needs a token with write '
                       f'permission for {weight.hub_id.split("/")[0]}: run `hf auth login`.') from e
    except HubError:
        raise
    except Exception as e:  # the clients below have many types of error for a network that fails
        raise HubError(f'{name}: could not be published, {type(e).__name__}: {" ".join(str(e).split())[:300]}. Nothing '
                       'is recorded; publish it again.') from e
    weight = replace(weight, hub_commit=commit)
    place.write_card(weight)
    place.save(weight)
    print(f'  published and compared; tag {tag}; hub_commit {commit} is in {place.records.name}')
    return weight


# -- command line ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m timm_emoreg.hub', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)

    def command(name: str, text: str, names: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument('--home', type=Path, default=ROOT, help='checkout of the project')
        if names:
            sub.add_argument('names', nargs='*', metavar='NAME')
            sub.add_argument('--all', action='store_true', help='all records')
        return sub

    sub = command('build', 'make record, card and file of a weight from runs of train.py')
    sub.add_argument('name', metavar='NAME')
    sub.add_argument('results', nargs='+', type=Path, metavar='RESULT', help='result.json or its folder, one per seed')
    sub.add_argument('--plain', nargs='+', type=Path, default=[], metavar='RESULT', help='runs of the plain backbone')
    sub.add_argument('--embed', action='store_true', help='put the file into the package')
    sub.add_argument('--eight-bits', action='store_true',
                     help='round matrices and kernels to int8, and measure on the test part what that costs')
    sub.add_argument('--default', action='store_true', help='what pretrained=True means for this architecture')
    sub.add_argument('--org', help=f"owner of the repository on the Hub (default: the record's, else {ORGANISATION})")
    sub.add_argument('--commit',
                     help="commit that the runs were made with (default: their note of it, or the checkout's)")
    sub.add_argument('--experience', help='result of stage 1, if it lies elsewhere now')
    sub.add_argument('--data-dir', help='where data sets are')
    sub = command('check', 'check files, cards, numbers, licences and snippets', names=True)
    sub.add_argument('--no-run', action='store_true', help='do not run the snippets')
    sub = command('publish', 'publish weights on the Hub; a dry run without --push', names=True)
    sub.add_argument('--push', action='store_true', help='really publish')
    sub.add_argument('--org', help="another owner than the record's; also written into record and card")
    sub.add_argument('--private', action='store_true', help='create private repositories')
    command('card', 'write cards anew from their records', names=True)
    sub = command('table', 'print the table of all weights')
    sub.add_argument('--write', type=Path, metavar='README',
                     help='put it there, between <!-- weights --> and <!-- /weights -->')
    return parser


def _table(args: argparse.Namespace) -> None:
    table = make_table(read_records(Checkout(args.home).records))
    if args.write is None:
        print(table)
        return
    write_between_marks(args.write, 'weights', table)


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if a weight was found wrong or not published, 2 if something was refused."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.command == 'build':
            weight = build(args.name, args.results, args.plain, args.home, args.embed, args.default, args.org,
                           args.commit, args.experience, args.data_dir, 'int8' if args.eight_bits else 'float16')
            print(f'{weight.name}: {weight.size:,} bytes, sha256 {weight.sha256}, seed {weight.seeds[0]} of '
                  f'{len(weight.seeds)}; {weight.precision} moves an output by at most '
                  f'{rounded_up(weight.logit_difference)}; '
                  + (f'{eight_bit_cost(weight)} ' if weight.eight_bits else '') + f'{Checkout(args.home).file(weight)}')
            return 0
        if args.command == 'table':
            _table(args)
            return 0
        place = Checkout(args.home)
        known = list(read_records(place.records))
        if bool(args.names) == args.all:
            parser.error('give the names of weights, or --all')
        failed = False
        for name in known if args.all else args.names:
            if args.command == 'check':
                problems = check(name, args.home, not args.no_run)
                print(f'{name}: ' + ('good' if not problems else '\n' + '\n'.join(f'  - {p}' for p in problems)))
                failed |= bool(problems)
            elif args.command == 'card':
                print(place.write_card(place.find(name)))
            else:
                try:
                    publish(name, args.home, args.push, args.org, args.private)
                except HubError as e:
                    print(f'hub: {e}', file=sys.stderr)
                    failed = True
        return int(failed)
    except (HubError, WeightError, CheckpointError, DataError, OSError, ValueError) as e:
        print(f'hub: {e}', file=sys.stderr)
        return 2
