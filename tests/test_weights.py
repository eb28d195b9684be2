"""Where weight files are looked for, and what is refused before a model sees a tensor of them."""
from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import loopback_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

import timm_emoreg
from timm_emoreg import weights, zoo
from timm_emoreg.weights import (
    WeightDamaged,
    WeightError,
    WeightMismatch,
    WeightNotFound,
    WeightRefused,
    WeightUnreachable,
    WeightUnwritable,
    find_file,
)
from timm_emoreg.zoo import HUB_FILE

LAYOUT = {'a': (3, 2), 'b': (40_000,)}


def tensors(**changes):
    state = {'a': torch.arange(6.).reshape(3, 2).half(), 'b': torch.ones(40_000).half()}
    return {name: t for name, t in {**state, **changes}.items() if t is not None}


GOOD = save(tensors())


@pytest.fixture
def published(hub, make_record):
    """A record whose file is on the loopback Hub."""
    record = make_record(GOOD)
    return replace(record, hub_commit=hub.put(record.hub_id, {HUB_FILE: GOOD}))


def cached_files(cache):
    return [p for p in Path(cache).rglob('*') if p.is_file() and p.suffix != '.lock' and p.name != 'CACHEDIR.TAG'
            and 'refs' not in p.parts and '.no_exist' not in p.parts]


def assert_only_good(cache):
    """The cache holds no other content than the released file."""
    for path in cached_files(cache):
        assert path.read_bytes() == GOOD, path


def assert_recovers(weight, cache):
    """After a fault the next good attempt gives the file."""
    assert_only_good(cache)
    assert find_file(weight, LAYOUT, cache).read_bytes() == GOOD
    assert_only_good(cache)


# -- places ------------------------------------------------------------------------------------------------------------


def test_places_in_their_order(hub, published, tmp_path, monkeypatch):
    package, folder, cache = tmp_path / 'package', tmp_path / 'mine', tmp_path / 'cache'
    (package / 'weights').mkdir(parents=True)
    folder.mkdir()
    monkeypatch.setattr(zoo, 'ASSETS', package)
    record = replace(published, embedded=True)
    path = find_file(record, LAYOUT, cache)
    assert cache in path.parents
    assert hub.count('GET', '/objects/') == 1
    hub.requests.clear()
    assert find_file(record, LAYOUT, cache) == path
    assert not hub.requests  # from the cache, without a question
    record.embedded_path.write_bytes(GOOD)
    assert find_file(record, LAYOUT, cache) == record.embedded_path
    monkeypatch.setenv('HOME', str(folder.parent))
    monkeypatch.setenv('EMOREG_WEIGHTS', f'~/{folder.name}')
    assert find_file(record, LAYOUT, cache) == record.embedded_path  # the folder holds none
    (folder / record.file).write_bytes(GOOD)
    assert find_file(record, LAYOUT, cache) == folder / record.file
    assert not hub.requests


def test_own_folder_that_is_none(make_record, tmp_path, monkeypatch):
    monkeypatch.setenv('EMOREG_WEIGHTS', str(tmp_path / 'nowhere'))
    with pytest.raises(WeightNotFound, match=r'\$EMOREG_WEIGHTS names .*nowhere, which is no folder'):
        find_file(make_record(GOOD), LAYOUT)


def test_bad_file_in_the_own_folder_is_reported_and_left(published, tmp_path, monkeypatch):
    monkeypatch.setenv('EMOREG_WEIGHTS', str(tmp_path))
    (tmp_path / published.file).write_bytes(GOOD[:-1])
    with pytest.raises(WeightDamaged, match=r'in \$EMOREG_WEIGHTS .*bytes.*Replace or remove it'):
        find_file(published, LAYOUT)
    assert (tmp_path / published.file).exists()


def test_bad_and_missing_embedded_file(make_record, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, 'ASSETS', tmp_path)
    (tmp_path / 'weights').mkdir()
    record = make_record(GOOD, embedded=True)
    with pytest.raises(WeightNotFound, match=r'missing in the package .*Reinstall'):
        find_file(record, LAYOUT)
    record.embedded_path.write_bytes(GOOD[:-1] + b'x')
    with pytest.raises(WeightDamaged, match=r'in the package .*sha256.*Reinstall'):
        find_file(record, LAYOUT)


def test_waiting_weight_comes_from_a_checkout(make_record, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, 'ASSETS', tmp_path / 'timm_emoreg/assets')
    record = make_record(GOOD)
    assert record.waiting_path == tmp_path / 'hub_cards' / record.name / 'model.safetensors'
    record.waiting_path.parent.mkdir(parents=True)
    record.waiting_path.write_bytes(GOOD)
    assert find_file(record, LAYOUT) == record.waiting_path
    record.waiting_path.write_bytes(GOOD[:-1] + b'x')
    with pytest.raises(WeightDamaged, match=r'in hub_cards .*sha256.*Restore the checkout'):
        find_file(record, LAYOUT)


def test_waiting_weight_names_what_there_is(make_record):
    with pytest.raises(WeightNotFound, match=r'EMOREG_WEIGHTS \(unset\), and it waits for publication.*embedded'):
        find_file(make_record(GOOD), LAYOUT)


def test_errors_are_of_the_expected_kinds():
    for kind, usual in ((WeightNotFound, FileNotFoundError), (WeightUnreachable, ConnectionError),
                        (WeightRefused, PermissionError), (WeightUnwritable, OSError), (WeightMismatch, ValueError)):
        assert issubclass(kind, WeightError)
        assert issubclass(kind, usual)
        assert issubclass(kind, RuntimeError)


# -- content -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('changes', 'found'), [
    ({'b': None}, 'lacks the tensors b'),
    ({'c': torch.zeros(1)}, 'does not know: c'),
    ({'a': torch.zeros(2, 3).half()}, r'a has the shape \(2, 3\), expected \(3, 2\)'),
    ({'b': torch.full((40_000,), float('nan')).half()}, 'b holds values that are not finite'),
    ({'b': torch.full((40_000,), float('inf')).half()}, 'b holds values that are not finite'),
])
def test_content_that_the_record_vouches_for_and_is_wrong(hub, make_record, tmp_path, changes, found):
    data = save(tensors(**changes))
    record = make_record(data)
    record = replace(record, hub_commit=hub.put(record.hub_id, {HUB_FILE: data}))
    with pytest.raises(WeightDamaged, match=f'{found}.*fetched twice and removed'):
        find_file(record, LAYOUT, tmp_path)
    assert not cached_files(tmp_path)


def test_not_a_safetensors_file(make_record, tmp_path):
    record = make_record(b'\x80\x02}q\x00.')  # a pickle
    (tmp_path / 'f').write_bytes(b'\x80\x02}q\x00.')
    with pytest.raises(WeightDamaged, match='not a safetensors file'):
        weights.check_file(tmp_path / 'f', record, LAYOUT)


def test_a_folder_in_place_of_the_file(make_record, tmp_path):
    record = replace(make_record(GOOD), size=tmp_path.stat().st_size)
    with pytest.raises(WeightUnwritable, match='cannot be read'):
        weights.check_file(tmp_path, record, LAYOUT)


@pytest.mark.parametrize('damage', [
    lambda data: data[:1000], lambda data: b'', lambda data: data + b'x',
    lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
])
def test_bad_cached_file_is_fetched_again(hub, published, tmp_path, damage):
    path = find_file(published, LAYOUT, tmp_path)
    path.resolve().write_bytes(damage(GOOD))
    hub.requests.clear()
    assert_recovers_after = find_file(published, LAYOUT, tmp_path)
    assert assert_recovers_after.read_bytes() == GOOD
    assert hub.count('GET', '/objects/') == 1
    assert_only_good(tmp_path)


def test_a_cached_file_that_another_process_is_just_replacing(published, tmp_path, monkeypatch):
    path, check = find_file(published, LAYOUT, tmp_path), weights.check_file

    def after_the_other(file, *rest):
        if rest[-1] == 'in the Hub cache' and not calls:
            calls.append(file)
            file.unlink()
        return check(file, *rest)

    calls = []
    monkeypatch.setattr(weights, 'check_file', after_the_other)
    assert find_file(published, LAYOUT, tmp_path) == path
    assert calls == [path]
    assert path.read_bytes() == GOOD


def test_bad_cached_file_and_no_hub(published, tmp_path, monkeypatch):
    path = find_file(published, LAYOUT, tmp_path)
    path.resolve().write_bytes(GOOD[:1000])
    with monkeypatch.context() as m:
        m.setattr(constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(WeightUnreachable, match='HF_HUB_OFFLINE'):
            find_file(published, LAYOUT, tmp_path)
    assert_recovers(published, tmp_path)


# -- the Hub -----------------------------------------------------------------------------------------------------------


def flipped(data):
    return data[:700] + bytes([data[700] ^ 4]) + data[701:]


def test_damaged_on_the_way_once(hub, published, tmp_path):
    hub.fail('large', loopback_hub.sending(flipped))
    assert find_file(published, LAYOUT, tmp_path).read_bytes() == GOOD
    assert hub.count('GET', '/objects/') == 2
    assert_only_good(tmp_path)


@pytest.mark.parametrize(('change', 'found'), [
    (flipped, 'sha256'), (lambda data: data[:5000], 'Consistency check failed'),
    (lambda data: data + b'more', 'Consistency check failed')])
def test_damaged_on_the_way_always(hub, published, tmp_path, change, found):
    hub.fail('large', loopback_hub.sending(change), times=2)
    with pytest.raises(WeightDamaged, match=f'(?s){found}.*fetched twice and removed from the cache'):
        find_file(published, LAYOUT, tmp_path)
    assert hub.count('GET', '/objects/') == 2  # once more and no more
    assert_recovers(published, tmp_path)


def test_cut_connection_is_resumed(hub, make_record, tmp_path):
    layout = {'b': (12_000_000,)}  # the client keeps what it has by blocks of 10 MiB
    data = save({'b': torch.ones(12_000_000).half()})
    record = make_record(data)
    record = replace(record, hub_commit=hub.put(record.hub_id, {HUB_FILE: data}))
    hub.fail('large', loopback_hub.cut)
    assert find_file(record, layout, tmp_path).read_bytes() == data
    assert len(hub.ranges) == 1
    assert 0 < hub.ranges[0] <= len(data) // 2  # it went on where it had been cut
    assert [p.read_bytes() == data for p in cached_files(tmp_path) if not p.is_symlink()] == [True]


@pytest.mark.parametrize(('data', 'what'), [(GOOD[:-2], 'size'), (flipped(GOOD), 'sha256')])
def test_another_file_on_the_hub_is_not_fetched(hub, make_record, tmp_path, data, what):
    record = make_record(GOOD)
    record = replace(record, hub_commit=hub.put(record.hub_id, {HUB_FILE: data}))
    with pytest.raises(WeightDamaged, match=f'offers a file of {what}'):
        find_file(record, LAYOUT, tmp_path)
    assert hub.count('GET', '/objects/') == 0
    assert_recovers(replace(record, hub_commit=hub.put(record.hub_id, {HUB_FILE: GOOD})), tmp_path)


@pytest.mark.parametrize(('fault', 'kind', 'words'), [
    (loopback_hub.status(401, **{'X-Error-Message': 'Invalid credentials in Authorization header'}), WeightRefused,
     'wants another token .401'),
    (loopback_hub.status(403, 'GatedRepo'), WeightRefused, 'gated.*Agree to its terms'),
    (loopback_hub.status(403), WeightRefused, 'forbidden .403'),
    (loopback_hub.status(429), WeightUnreachable, 'too many requests .429'),
    (loopback_hub.status(500), WeightUnreachable, 'HTTP status 500'),
    (loopback_hub.status(503), WeightUnreachable, 'HTTP status 503'),
])
def test_refusals_of_the_hub(hub, published, tmp_path, fault, kind, words):
    if '429' in words and huggingface_hub.__version__.startswith('1.'):
        pytest.skip('huggingface_hub 1.x repeats by itself what it had too much of')
    hub.fail('head', fault)
    with pytest.raises(kind, match=words) as caught:
        find_file(published, LAYOUT, tmp_path)
    assert published.name in str(caught.value)
    assert published.hub_id in str(caught.value)
    assert 'EMOREG_WEIGHTS' in str(caught.value)
    assert len(hub.requests) == 1  # no retries: an answer at once
    assert_recovers(published, tmp_path)


@pytest.mark.parametrize(('place', 'words'), [
    ('repository', 'no such repository'), ('commit', 'no such commit'), ('file', f'holds no {HUB_FILE}')])
def test_things_that_are_not_there(hub, published, tmp_path, place, words):
    wrong = {'repository': replace(published, hub_id='timm-emoreg/other'),
             'commit': replace(published, hub_commit='0' * 40),
             'file': replace(published, hub_commit=hub.put('timm-emoreg/bare', {'README.md': b''}),
                             hub_id='timm-emoreg/bare')}[place]
    with pytest.raises(WeightNotFound, match=words):
        find_file(wrong, LAYOUT, tmp_path)
    assert_recovers(published, tmp_path)


def test_missing_repository_as_the_real_hub_hides_it(hub, published, tmp_path):
    hub.fail('head', loopback_hub.status(401, 'RepoNotFound'))
    with pytest.raises(WeightNotFound, match=r'no such repository, or it is private .401'):
        find_file(published, LAYOUT, tmp_path)


def elsewhere(monkeypatch, endpoint):
    monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                        endpoint + '/{repo_id}/resolve/{revision}/{filename}')


def test_unreachable_network_is_answered_within_5_seconds(hub, published, tmp_path, monkeypatch, make_record):
    monkeypatch.setitem(zoo.WEIGHTS, 'embedded', make_record(GOOD, embedded=True, architecture='emoreg_vit_tiny'))
    hub.fail('head', loopback_hub.hang, times=9)
    start = time.perf_counter()
    with pytest.raises(WeightUnreachable, match='cannot be reached') as caught:
        find_file(published, LAYOUT, tmp_path)
    assert time.perf_counter() - start < 5
    assert 'emoreg_vit_tiny.emoji' in str(caught.value)
    assert 'EMOREG_WEIGHTS' in str(caught.value)
    hub.faults.clear()
    assert_recovers(published, tmp_path)


def test_name_that_is_looked_up_forever(published, tmp_path, monkeypatch):
    ended = threading.Event()
    with monkeypatch.context() as m:
        elsewhere(m, 'http://hub.invalid')
        m.setattr(weights, 'ANSWER_WITHIN', 0.2)
        m.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: ended.wait() or [])
        start = time.perf_counter()
        try:
            with pytest.raises(WeightUnreachable, match=r'no answer within 0\.2 s'):
                find_file(published, LAYOUT, tmp_path)
            assert time.perf_counter() - start < 5
        finally:
            ended.set()
    assert_recovers(published, tmp_path)


def test_refused_connection(published, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    with monkeypatch.context() as m:
        elsewhere(m, f'http://127.0.0.1:{port}')
        with pytest.raises(WeightUnreachable, match=r'cannot be reached.*ConnectError'):
            find_file(published, LAYOUT, tmp_path)
    assert_recovers(published, tmp_path)


def test_offline_mode_with_and_without_cache(hub, published, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(WeightUnreachable, match='HF_HUB_OFFLINE is set, and the cache has no copy'):
            find_file(published, LAYOUT, tmp_path)
        assert not hub.requests
    path = find_file(published, LAYOUT, tmp_path)
    with monkeypatch.context() as m:
        m.setattr(constants, 'HF_HUB_OFFLINE', True)
        assert find_file(published, LAYOUT, tmp_path) == path


# -- the disk ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, resource, sys
import torch
from timm_emoreg.weights import WeightError, find_file
from timm_emoreg.zoo import Weight
torch.set_num_threads(1)
for line in sys.stdin:
    if os.fork():
        continue
    order = json.loads(line)
    if order['limit']:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order['limit'], order['limit']))
    if order['user']:
        os.setgroups([])
        os.setgid(order['user'])
        os.setuid(order['user'])
    try:
        path = find_file(Weight(**order['weight']), {'a': (3, 2), 'b': (40_000,)}, order['cache'])
        out = f'found {path.stat().st_size}'
    except WeightError as e:
        out = f'{type(e).__name__}: {e}'
    os.write(1, (json.dumps(out) + chr(10)).encode())
    os._exit(0)
"""


@pytest.fixture(scope='module')
def processes():
    """Runs orders in processes of their own, all at once, and gives what they report, sorted."""
    env = {**os.environ, 'PYTHONPATH': str(Path(timm_emoreg.__file__).parents[1])}
    with subprocess.Popen([sys.executable, '-c', SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=env) as process:
        def run(*orders):
            for weight, cache, more in orders:
                order = {'weight': weight.to_dict(), 'cache': str(cache), 'limit': 0, 'user': 0, **more}
                process.stdin.write(json.dumps(order) + '\n')
            process.stdin.flush()
            return sorted(json.loads(process.stdout.readline()) for _ in orders)

        yield run
        process.stdin.close()


def test_two_processes_at_once(hub, published, tmp_path, processes):
    assert processes(*[(published, tmp_path, {})] * 3) == [f'found {len(GOOD)}'] * 3
    assert hub.count('GET', '/objects/') == 1
    assert_only_good(tmp_path)


def test_two_processes_at_once_on_a_bad_file(hub, published, tmp_path, processes):
    find_file(published, LAYOUT, tmp_path).resolve().write_bytes(flipped(GOOD))
    hub.requests.clear()
    assert processes(*[(published, tmp_path, {})] * 3) == [f'found {len(GOOD)}'] * 3
    assert hub.count('GET', '/objects/') == 1
    assert_only_good(tmp_path)


def test_full_disk(published, tmp_path, processes):
    [full] = processes((published, tmp_path, {'limit': 10_000}))
    assert full.startswith('WeightUnwritable')
    assert f'{tmp_path}) is full' in full
    assert f'{len(GOOD):,} bytes are needed' in full
    assert_recovers(published, tmp_path)


def test_repair_by_another_process_is_seen(hub, published, tmp_path, monkeypatch):
    path = find_file(published, LAYOUT, tmp_path)
    path.resolve().write_bytes(GOOD[:100])
    hub.requests.clear()

    @contextmanager
    def lock(weight, cache_dir):
        path.resolve().write_bytes(GOOD)  # while this process waited
        yield
    monkeypatch.setattr(weights, '_lock', lock)
    assert find_file(published, LAYOUT, tmp_path) == path
    assert not hub.requests


def test_one_repairs_at_a_time(hub, published, tmp_path):
    done = threading.Event()

    def other():
        find_file(published, LAYOUT, tmp_path)
        done.set()

    with weights._lock(published, tmp_path):
        threading.Thread(target=other, daemon=True).start()
        assert not done.wait(0.5)
        assert not hub.requests
    assert done.wait(30)
    assert_only_good(tmp_path)


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_by_its_other_names(published, tmp_path, monkeypatch, number):
    with monkeypatch.context() as m:
        def download(*args, **kwargs):
            raise OSError(number, os.strerror(number), str(tmp_path / 'blob'))
        m.setattr(weights, 'hf_hub_download', download)
        with pytest.raises(WeightUnwritable, match='is full'):
            find_file(published, LAYOUT, tmp_path)
    assert_recovers(published, tmp_path)


def test_cache_that_cannot_be_written(published, tmp_path):
    (tmp_path / 'cache').write_bytes(b'a file where the folder should be')  # permissions do not bind root
    with pytest.raises(WeightUnwritable, match=r'cannot be written.*HF_HOME or cache_dir'):
        find_file(published, LAYOUT, tmp_path / 'cache')
    assert_recovers(published, tmp_path / 'other')


@pytest.mark.skipif(os.getuid() != 0, reason='only root can become another user')
def test_read_only_cache(published, tmp_path, processes):
    cache = tmp_path / 'cache'
    path = find_file(published, LAYOUT, cache)
    empty = tmp_path / 'empty'
    empty.mkdir()
    for folder in (cache, empty):
        for p in (folder, *folder.rglob('*')):
            p.chmod(0o555 if p.is_dir() else 0o444)
    for parent in (*tmp_path.parents, tmp_path):
        if parent.stat().st_uid == 0 and parent != Path('/'):
            parent.chmod(parent.stat().st_mode | 0o055)
    none, full = processes((published, cache, {'user': 65534}), (published, empty, {'user': 65534}))
    assert full == f'found {len(GOOD)}'
    assert none.startswith('WeightUnwritable')
    assert 'cannot be written' in none
    path.resolve().write_bytes(GOOD[:100])
    [bad] = processes((published, cache, {'user': 65534}))
    assert bad.startswith('WeightUnwritable')
    assert_recovers(published, tmp_path / 'other')


def test_the_client_is_the_real_one():
    assert constants.ENDPOINT.startswith('http://127.0.0.1:')
    assert 'httpx' not in vars(weights)
    assert weights.hf_hub_download is huggingface_hub.hf_hub_download
