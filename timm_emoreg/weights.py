"""Finding a weight file, and letting no tensor of it near a model before it is known to be the right one.

timm's own path loads a file with a flipped byte or with NaN, fails forever on a truncated file in the cache, and waits
half a minute for a dead network.
Here a file is looked for in ``$EMOREG_WEIGHTS``, the package, the Hub's cache and the Hub; size, sha256, names and
shapes and finite values are checked before `timm_emoreg.factory` hands it to timm.
"""
from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open

from . import zoo
from .eight_bit import eight_bit_layout
from .emoreg import EmoReg
from .files import sha256_of
from .zoo import HUB_FILE, Weight

__all__ = ['NewHeadsWarning', 'WeightDamaged', 'WeightError', 'WeightMismatch', 'WeightNotFound', 'WeightRefused',
           'WeightUnreachable', 'WeightUnwritable', 'check_file', 'find_file', 'layout_of']

FOLDER_VARIABLE = 'EMOREG_WEIGHTS'
ANSWER_WITHIN = 4.0  # seconds for the Hub's first answer, looking up its address included, which no timeout bounds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WeightError(RuntimeError):
    """A weight that cannot be had; the message names it, the place looked at, what was found, and the remedy."""


class WeightNotFound(WeightError, FileNotFoundError):
    """There is no such weight, or no file of it in any of the places."""


class WeightUnreachable(WeightError, ConnectionError):
    """The Hub did not answer, or not usefully."""


class WeightRefused(WeightError, PermissionError):
    """The Hub wants a token, or an agreement to the terms."""


class WeightUnwritable(WeightError, OSError):
    """The cache could not be written."""


class WeightDamaged(WeightError):
    """A file that is not the released one: another size or sha256, no safetensors, not the tensors, not finite."""


class WeightMismatch(WeightError, ValueError):
    """An argument under which the weight does not fit the model."""


class NewHeadsWarning(UserWarning):
    """Both heads are untrained, because the model has another number of classes than the weight."""


# -- checking ----------------------------------------------------------------------------------------------------------


def layout_of(weight: Weight, backbone: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the weight's tensors must have; costs no memory and draws no random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device('meta'):
        model = EmoReg(backbone, num_classes=weight.num_classes, **weight.model_args)
    layout = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return eight_bit_layout(layout) if weight.precision == 'int8' else layout


def _some(names: set[str]) -> str:
    return ', '.join(sorted(names)[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _check(path: Path, weight: Weight, layout: dict[str, tuple[int, ...]], where: str) -> None:
    def damaged(found: str) -> WeightDamaged:
        return WeightDamaged(f'{weight.name}: the file {where} ({path}) is not the released weight: {found}')

    size = path.stat().st_size
    if size != weight.size:
        raise damaged(f'it has {size:,} bytes, expected {weight.size:,}.')
    if (found := sha256_of(path)) != weight.sha256:
        raise damaged(f'its sha256 is {found}, expected {weight.sha256}.')
    try:
        with safe_open(path, framework='pt') as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            if missing := layout.keys() - found.keys():
                raise damaged(f'it lacks the tensors {_some(missing)}.')
            if extra := found.keys() - layout.keys():
                raise damaged(f'it has tensors that the model does not know: {_some(extra)}.')
            for name, shape in found.items():
                if shape != layout[name]:
                    raise damaged(f'{name} has the shape {shape}, expected {layout[name]}.')
            for name in found:
                if not tensors.get_tensor(name).isfinite().all():
                    raise damaged(f'{name} holds values that are not finite.')
    except SafetensorError as e:
        raise damaged(f'it is not a safetensors file ({e}).') from None


def check_file(path: Path, weight: Weight, layout: dict[str, tuple[int, ...]], where: str = 'given') -> Path:
    """The path of a file that is the released weight: its size, sha256, tensor names and shapes, finite values.

    Raises:
        WeightDamaged: If it is not.
        WeightUnwritable: If it cannot be read.
    """
    try:
        _check(path, weight, layout, where)
    except OSError as e:
        if isinstance(e, WeightError):
            raise
        raise WeightUnwritable(f'{weight.name}: the file {where} ({path}) cannot be read ({e.strerror or e}). '
                               'Repair its permissions, or remove it.') from None
    return path


# -- the Hub -----------------------------------------------------------------------------------------------------------


def _offer() -> str:
    embedded = ', '.join(sorted(w.name for w in zoo.WEIGHTS.values() if w.embedded)) or 'none'
    return (f'Without the Hub there are the embedded weights ({embedded}) and the files '
            f'<architecture>.<tag>.safetensors in the folder that ${FOLDER_VARIABLE} names.')


def _hub_error(weight: Weight, error: Exception, cache_dir: str | Path | None = None) -> WeightError:
    """What the Hub, its client or the disk said, as one of our errors. The client's HTTP library is never imported."""
    place = f'{weight.name}: {weight.hub_id} at commit {weight.hub_commit} on the Hub ({constants.ENDPOINT})'
    cause = error
    while isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__
    status = getattr(getattr(cause, 'response', None), 'status_code', None)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return WeightUnreachable(f'{place} was not asked, because HF_HUB_OFFLINE is set, and the cache has no copy. '
                                 f'Unset it once. {_offer()}')
    if isinstance(cause, errors.GatedRepoError) or status == 403:
        return WeightRefused(f'{place} is gated or forbidden (403). Agree to its terms on its page with the account of '
                             f'your token, then try again. {_offer()}')
    if isinstance(cause, errors.RevisionNotFoundError):
        return WeightNotFound(f'{place}: there is no such commit. Update timm_emoreg, whose record has it. {_offer()}')
    if isinstance(cause, errors.EntryNotFoundError) and status == 404:
        return WeightNotFound(f'{place} holds no {HUB_FILE}. Update timm_emoreg, whose record names it. {_offer()}')
    if status == 401 and not isinstance(cause, errors.RepositoryNotFoundError):
        return WeightRefused(f'{place} wants another token (401). Run `hf auth login`, or unset HF_TOKEN. {_offer()}')
    if isinstance(cause, errors.RepositoryNotFoundError):
        return WeightNotFound(f'{place}: there is no such repository, or it is private ({status}). Update timm_emoreg, '
                              f'or run `hf auth login` with an account that may see it. {_offer()}')
    if status == 429:
        return WeightUnreachable(f'{place} answered that there were too many requests (429). Wait some minutes, or run '
                                 f'`hf auth login`, which raises the limit. {_offer()}')
    if status is not None:
        return WeightUnreachable(f'{place} answered with HTTP status {status}. Try again later. {_offer()}')
    number = getattr(cause, 'errno', None)
    if number in FULL:
        return WeightUnwritable(f'{weight.name}: the disk of the Hub cache ({cache_dir or constants.HF_HUB_CACHE}) is '
                                f'full ({cause.strerror}), {weight.size:,} bytes are needed. Free them, or name '
                                'another folder with HF_HOME or cache_dir.')
    if number is not None and getattr(cause, 'filename', None) is not None:
        return WeightUnwritable(f'{weight.name}: the Hub cache cannot be written ({cause.strerror}: {cause.filename}). '
                                f'Name another folder with HF_HOME or cache_dir. {_offer()}')
    return WeightUnreachable(f'{place} cannot be reached ({type(cause).__name__}: {cause}). Check the network, the '
                             f'proxy and HF_ENDPOINT. {_offer()}')


def _ask(weight: Weight):
    """The Hub's metadata of the file, in a thread, because neither resolvers nor address lists heed a timeout."""
    answer = []

    def ask() -> None:
        try:
            url = hf_hub_url(weight.hub_id, HUB_FILE, revision=weight.hub_commit)
            answer.append(get_hf_file_metadata(url, timeout=ANSWER_WITHIN * 0.75))
        except Exception as e:
            answer.append(e)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_WITHIN)
    if not answer:
        raise _hub_error(weight, TimeoutError(f'no answer within {ANSWER_WITHIN:g} s'))
    if isinstance(answer[0], Exception):
        raise _hub_error(weight, answer[0]) from answer[0]
    return answer[0]


def _cached(weight: Weight, cache_dir: str | Path | None) -> Path | None:
    path = try_to_load_from_cache(weight.hub_id, HUB_FILE, cache_dir=cache_dir, revision=weight.hub_commit)
    return Path(path) if isinstance(path, str) else None


def _discard(path: Path) -> None:
    """Remove a file from the cache: the link of the snapshot and all that it leads to."""
    while True:
        following = path.parent / os.readlink(path) if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if following is None:
            return
        path = following


def _part(weight: Weight, cache_dir: str | Path | None) -> Path:
    """Where huggingface_hub 1.x leaves a download that failed, to go on with it; 2.x leaves nothing."""
    folder = Path(cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=weight.hub_id, repo_type='model')
    return folder / 'blobs' / f'{weight.sha256}.incomplete'


@contextmanager
def _lock(weight: Weight, cache_dir: str | Path | None) -> Iterator[None]:
    """One process at a time repairs or fetches this weight."""
    folder = Path(cache_dir or constants.HF_HUB_CACHE) / '.locks'
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / f'emoreg-{weight.sha256}.lock'):
        yield


def _fetch(weight: Weight, layout: dict[str, tuple[int, ...]], cache_dir: str | Path | None) -> Path:
    """Fetch the file from the Hub, once more if it came damaged; a damaged one does not stay in the cache."""
    offered = _ask(weight)
    for what, found, expected in (('size', offered.size, weight.size), ('sha256', offered.etag, weight.sha256)):
        if found != expected:
            raise WeightDamaged(f'{weight.name}: {weight.hub_id} at commit {weight.hub_commit} on the Hub offers a '
                                f'file of {what} {found}, expected {expected}. Nothing was fetched. '
                                'Update timm_emoreg.')
    damage = None
    for _ in range(2):
        try:
            path = Path(hf_hub_download(weight.hub_id, HUB_FILE, revision=weight.hub_commit, cache_dir=cache_dir,
                                        etag_timeout=ANSWER_WITHIN, library_name='timm_emoreg'))
        except Exception as e:
            if 'Consistency check failed' in str(e):  # the client's plain OSError for a file of another length
                _part(weight, cache_dir).unlink(missing_ok=True)
            elif type(e).__name__ != 'RemoteProtocolError' or damage is not None:  # cut off; 2.x goes on by itself
                raise
            damage = e
            continue
        try:
            return check_file(path, weight, layout, 'from the Hub')
        except WeightDamaged as e:
            _discard(path)
            damage = e
    raise WeightDamaged(f'{damage} It was fetched twice and removed from the cache. Try another network, or report it '
                        f'at the repository {weight.hub_id}.') from damage


def _from_hub(weight: Weight, layout: dict[str, tuple[int, ...]], cache_dir: str | Path | None) -> Path:
    def good(path: Path | None) -> bool:
        try:
            return path is not None and bool(check_file(path, weight, layout, 'in the Hub cache'))
        except WeightDamaged:
            return False
        except WeightUnwritable:
            if path.exists():
                raise
            return False  # another process is just replacing a damaged one

    path = _cached(weight, cache_dir)
    if good(path):
        return path
    try:
        with _lock(weight, cache_dir):
            path = _cached(weight, cache_dir)  # another process may have repaired it meanwhile
            if good(path):
                return path
            if path is not None:
                _discard(path)
            return _fetch(weight, layout, cache_dir)
    except WeightError:
        raise
    except Exception as e:
        raise _hub_error(weight, e, cache_dir) from e


# -- the places in their order -----------------------------------------------------------------------------------------


def find_file(weight: Weight, layout: dict[str, tuple[int, ...]], cache_dir: str | Path | None = None) -> Path:
    """The checked file of a weight: from ``$EMOREG_WEIGHTS``, the package, the Hub's cache or the Hub; while it
    waits for publication, from ``hub_cards`` of a checkout.

    Args:
        weight: The record.
        layout: Names and shapes of its tensors, from `layout_of`.
        cache_dir: The Hub's cache, its usual place if None.

    Raises:
        WeightError: One of its subclasses. A file that was found and is not the released one is an error in the first
            two places, which are the user's and the installer's; in the cache it is fetched again.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        folder = os.path.expanduser(folder)
        if not Path(folder).is_dir():
            raise WeightNotFound(f'{weight.name}: ${FOLDER_VARIABLE} names {folder}, which is no folder. '
                                 'Correct it, or unset it.')
        path = Path(folder) / weight.file
        if path.exists():
            try:
                return check_file(path, weight, layout, f'in ${FOLDER_VARIABLE}')
            except WeightDamaged as e:
                raise WeightDamaged(f'{e} Replace or remove it.') from None
    if weight.embedded and weight.embedded_path.exists():
        try:
            return check_file(weight.embedded_path, weight, layout, 'in the package')
        except WeightDamaged as e:
            raise WeightDamaged(f'{e} Reinstall timm_emoreg.') from None
    if weight.hub_commit is not None:
        return _from_hub(weight, layout, cache_dir)
    if weight.waiting_path.exists():
        try:
            return check_file(weight.waiting_path, weight, layout, 'in hub_cards')
        except WeightDamaged as e:
            raise WeightDamaged(f'{e} Restore the checkout of the project.') from None
    looked = f'it is not in ${FOLDER_VARIABLE} ({folder or "unset"})'
    if weight.embedded:
        raise WeightNotFound(f'{weight.name}: {looked}, and missing in the package ({weight.embedded_path}). '
                             'Reinstall timm_emoreg.')
    raise WeightNotFound(f'{weight.name}: {looked}, and it waits for publication on the Hub. {_offer()}')
