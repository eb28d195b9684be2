from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import loopback_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file
from timm.models import _registry

import timm_emoreg
from timm_emoreg import emoreg_resnet, emoreg_vit, weights, zoo
from timm_emoreg.emoreg import EmoReg
from timm_emoreg.experience import find_experience
from timm_emoreg.weights import (
    NewHeadsWarning,
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
    assert weights.ANSWER_WITHIN < 5
    monkeypatch.setattr(weights, 'ANSWER_WITHIN', 0.4)
    hub.fail('head', loopback_hub.hang, times=9)
    with pytest.raises(WeightUnreachable, match='cannot be reached') as caught:
        find_file(published, LAYOUT, tmp_path)
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
        with pytest.raises(WeightUnreachable, match=r'no answer within 0\.2 s'):
            find_file(published, LAYOUT, tmp_path)
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


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(monkeypatch, make_record, tmp_path):
    """Registers tiny trained-looking weights: ``shelf('emoreg_resnet18', target=...)`` gives record and model."""
    monkeypatch.setenv('EMOREG_WEIGHTS', str(tmp_path))
    monkeypatch.setitem(emoreg_resnet.BACKBONES, 'emoreg_resnet18', 'test_resnet')
    monkeypatch.setitem(emoreg_vit.BACKBONES, 'emoreg_vit_tiny', 'test_vit')
    for name in reversed(list(zoo.WEIGHTS)):  # they come back last one first, and their order is seen elsewhere
        monkeypatch.delitem(zoo.WEIGHTS, name)

    def register(architecture='emoreg_resnet18', **changes):
        backbones = {**emoreg_resnet.BACKBONES, **emoreg_vit.BACKBONES}
        record = make_record(architecture=architecture, **changes)
        torch.manual_seed(0)
        model = EmoReg(backbones[architecture], num_classes=record.num_classes, **record.model_args)
        state = {k: (t.half() if t.is_floating_point() else t) for k, t in model.state_dict().items()}
        state = {k: t + 0.01 if 'modulation' in k else t for k, t in state.items()}
        data = save(state)
        record = make_record(data, architecture=architecture, **changes)
        (tmp_path / record.file).write_bytes(data)
        monkeypatch.setitem(zoo.WEIGHTS, record.name, record)
        cfg = timm.models.PretrainedCfg(**timm_emoreg.emoreg.backbone_cfg(backbones[architecture], **record.cfg()))
        monkeypatch.setitem(_registry._model_pretrained_cfgs, record.name,
                            replace(cfg, architecture=architecture, tag=record.tag))
        model.load_state_dict(state)
        return record, model.eval()
    return register


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_tag_gives_the_weight_in_its_form(shelf):
    record, expected = shelf(target='cifar10')
    model = timm.create_model(record.name, pretrained=True).eval()
    assert torch.equal(model(X), expected(X))
    assert torch.equal(model.forward_affect(X), expected.forward_affect(X))
    assert model.head.weight.dtype == torch.float32
    assert model.pretrained_cfg['input_size'] == (3, 32, 32)
    assert model.pretrained_cfg['label_names'] == ('cat', 'dog', 'cow')
    assert model.affect_kind == 'ratings'
    untrained = timm.create_model(record.name)
    assert untrained.num_affect == 1
    assert untrained.num_classes == 3
    assert not torch.equal(untrained.eval()(X), expected(X))


@torch.no_grad()
def test_default_weight_and_none(shelf):
    record, expected = shelf(target='cifar10', embedded=True, default=True)
    shelf(embedded=True)
    assert torch.equal(timm.create_model('emoreg_resnet18', pretrained=True).eval()(X), expected(X))
    plain = timm.create_model('emoreg_resnet18')
    assert plain.num_classes == 1000
    assert plain.affect_kind == 'emotion'
    assert plain.pretrained_cfg['input_size'] == timm.get_pretrained_cfg('test_resnet').input_size
    with pytest.raises(WeightNotFound, match='emoreg_vit_tiny: there is no such weight'):
        timm.create_model('emoreg_vit_tiny', pretrained=True)
    with pytest.raises(WeightNotFound, match=f'emoreg_resnet18.faces: .*{record.name}'):
        timm.create_model('emoreg_resnet18.faces', pretrained=True)


@pytest.mark.parametrize('architecture', ['emoreg_resnet18', 'emoreg_vit_tiny'])
def test_other_arguments_that_fit(shelf, architecture):
    record, expected = shelf(architecture, target='cifar10')
    with warnings.catch_warnings():
        warnings.simplefilter('error', NewHeadsWarning)
        grey = timm.create_model(record.name, pretrained=True, in_chans=1).eval()
        levels = timm.create_model(record.name, pretrained=True, features_only=True).eval()
        timm.create_model(record.name, pretrained=True, features_only=True, num_classes=5)  # has no heads
        headless = timm.create_model(record.name, pretrained=True, num_classes=0, drop_rate=0.1).eval()
        balanced = timm.create_model(record.name, pretrained=True, balance=0.0,
                                     pretrained_cfg_overlay={'mean': (0.5, 0.5, 0.5)}).eval()
    with torch.no_grad():
        assert torch.equal(grey.head.weight, expected.head.weight)
        assert len(levels(X)) > 1
        assert torch.equal(headless.forward_affect(X), expected.forward_affect(X))
        assert torch.equal(balanced(X), expected.forward_responses(X).non_emotional)
    assert balanced.pretrained_cfg['mean'] == (0.5, 0.5, 0.5)
    state = levels.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in expected.state_dict().items() if k in state and 'num_b' not in k)


@torch.no_grad()
def test_another_size_of_a_vit(shelf):
    record, expected = shelf('emoreg_vit_tiny', target='cifar10')
    model = timm.create_model(record.name, pretrained=True, img_size=48).eval()
    assert model.backbone.patch_embed.patch_size == (6, 6)
    assert torch.equal(model.head.weight, expected.head.weight)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 3)


@pytest.mark.parametrize(('stage', 'wanted', 'warns'), [
    ('cifar10', 5, True), ('cifar10', 3, False), ('cifar10', 0, False), (None, 5, True), (None, 0, False)])
def test_another_number_of_classes_warns_once(shelf, stage, wanted, warns):
    record, expected = shelf(target=stage)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = timm.create_model(record.name, pretrained=True, num_classes=wanted)
    caught = [w for w in caught if w.category is NewHeadsWarning]
    assert len(caught) == warns
    if warns:
        assert f'the model {wanted}: both heads are new' in str(caught[0].message)
        assert caught[0].filename == __file__
    assert model.num_classes == wanted
    assert torch.equal(model.head_affect.weight, expected.head_affect.weight)


@pytest.mark.parametrize(('arguments', 'words'), [
    ({'num_affect': 8}, r'num_affect=8: it needs num_affect=1'),
    ({'affect_kind': 'emotion'}, r"affect_kind='emotion': it needs affect_kind='ratings'"),
    ({'experience': 'separate'}, r"experience='separate': it needs experience='shared'"),
    ({'modulation': False}, r'modulation=False: it needs modulation=True'),
    ({'num_classes': 5, 'modulation': False}, r'modulation=False: it needs modulation=True'),
    ({'balance': 'gate'}, r"balance='gate': it needs balance=0.5.*set afterwards"),
    ({'num_classes': 5, 'balance': 'learned'}, r"balance='learned': it needs balance=0.5"),
])
def test_arguments_that_do_not_fit_stage_2(shelf, arguments, words):
    record, _ = shelf(target='cifar10')
    with pytest.raises(WeightMismatch, match=words) as caught:
        timm.create_model(record.name, pretrained=True, **arguments)
    assert record.name in str(caught.value)


@pytest.mark.parametrize('classes', [3, 5])
def test_stem_that_does_not_fit(shelf, classes, monkeypatch):
    monkeypatch.setitem(emoreg_resnet.BACKBONES, 'emoreg_resnet18', 'resnet10t')
    record, _ = shelf(target='cifar10')
    with pytest.warns(NewHeadsWarning) if classes == 5 else warnings.catch_warnings(), \
            pytest.raises(WeightMismatch, match='block_args'):
        timm.create_model(record.name, pretrained=True, num_classes=classes, block_args={'attn_layer': 'se'})


@pytest.mark.parametrize('target', [None, 'cifar10'])
@pytest.mark.parametrize('arguments', [{}, {'img_size': 64}])
def test_small_image_that_does_not_fit(shelf, arguments, target):
    record, _ = shelf(target=target)
    with pytest.raises(WeightMismatch, match=r'small_image=False.*: it needs small_image=True'):
        timm.create_model(record.name, pretrained=True, small_image=False, **arguments)


def test_another_form_than_that_of_the_weight_has_its_usual_size_without_it():
    small, usual = (timm.create_model('emoreg_vit_tiny.emoji', small_image=small) for small in (None, False))
    assert [model.backbone.patch_embed.num_patches for model in (small, usual)] == [64, 196]
    assert usual.pretrained_cfg['input_size'] == (3, 224, 224)


def test_stage_1_is_open_in_what_it_did_not_train(shelf):
    record, expected = shelf()
    for arguments in ({'balance': 'gate'}, {'balance': 'learned'}, {'modulation': False}):
        with pytest.warns(NewHeadsWarning):
            model = timm.create_model(record.name, pretrained=True, num_classes=4, **arguments)
        assert torch.equal(model.head_affect.weight, expected.head_affect.weight)
        timm.create_model(record.name, pretrained=True, **arguments)
    with pytest.raises(WeightMismatch, match='experience'):
        timm.create_model(record.name, pretrained=True, experience='separate')


@torch.no_grad()
def test_sources_of_the_caller_are_not_second_guessed(shelf, tmp_path):
    record, expected = shelf(target='cifar10', embedded=True, default=True)
    own = {k: v + 1 if k == 'head.bias' else v for k, v in expected.state_dict().items()}
    save_file(own, tmp_path / 'own.safetensors')
    form = {**record.model_args, 'num_classes': 3}
    for model in (
            timm.create_model(record.name, pretrained=True, pretrained_cfg_overlay={'state_dict': own}),
            timm.create_model(record.name, pretrained=True,
                              pretrained_cfg_overlay={'file': str(tmp_path / 'own.safetensors')}),
            timm.create_model('emoreg_resnet18', checkpoint_path=str(tmp_path / 'own.safetensors'), **form),
            timm.create_model('emoreg_resnet18', pretrained=True,
                              pretrained_cfg_overlay={'state_dict': own, 'num_classes': 3}, **form)):
        assert torch.allclose(model.eval()(X), expected(X) + 0.5)


@torch.no_grad()
@pytest.mark.parametrize(('architecture', 'target', 'classes'), [
    ('emoreg_resnet18', 'cifar10', 3), ('emoreg_resnet18', 'cifar10', 7), ('emoreg_vit_tiny', None, 7)])
def test_checkpoint_of_a_weight_comes_back_by_its_tag(shelf, tmp_path, monkeypatch, architecture, target, classes):
    monkeypatch.setitem(emoreg_resnet.BACKBONES, 'emoreg_resnet18', 'resnet18')
    record, _ = shelf(architecture, target=target, embedded=True, default=True)
    with pytest.warns(NewHeadsWarning) if classes == 7 else warnings.catch_warnings():
        model = timm.create_model(architecture, pretrained=True, num_classes=classes).eval()
    path = tmp_path / 'own.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    (tmp_path / record.file).unlink()  # the name alone says the form
    for arguments in ({'model_name': record.name}, timm.models.resolve_model_input_args(record.name)):  # timm's scripts
        again = timm.create_model(**arguments, num_classes=classes, checkpoint_path=str(path)).eval()
        assert torch.equal(again(X), model(X))
        assert again.pretrained_cfg['input_size'] == (3, 32, 32)
        assert again.affect_kind == 'ratings'
    with pytest.raises(RuntimeError, match=rf"another form than the model.* by that one's name: .*{record.name}"):
        timm.create_model(architecture, num_classes=classes, checkpoint_path=str(path))


@torch.no_grad()
def test_source_on_the_hub_of_the_caller_wins_over_the_embedded_file(hub, shelf, tmp_path):
    record, expected = shelf(target='cifar10', embedded=True, default=True)
    own = {k: v + 1 if k == 'head.bias' else v for k, v in expected.state_dict().items()}
    hub.put('me/mine', {HUB_FILE: save(own)})
    model = timm.create_model(record.name, pretrained=True, cache_dir=tmp_path / 'cache', pretrained_cfg_overlay={
        'hf_hub_id': 'me/mine', 'hf_hub_filename': HUB_FILE})
    assert torch.allclose(model.eval()(X), expected(X) + 0.5)


def test_weight_from_the_hub_into_the_given_cache(hub, shelf, tmp_path, monkeypatch):
    record, expected = shelf(target='cifar10')
    data = (tmp_path / record.file).read_bytes()
    (tmp_path / record.file).unlink()
    record = replace(record, hub_commit=hub.put(record.hub_id, {HUB_FILE: data}))
    monkeypatch.setitem(zoo.WEIGHTS, record.name, record)
    model = timm.create_model(record.name, pretrained=True, cache_dir=tmp_path / 'cache').eval()
    with torch.no_grad():
        assert torch.equal(model(X), expected(X))
    assert (tmp_path / 'cache') in Path(model.pretrained_cfg['file']).parents


@torch.no_grad()
def test_export_rebuilds_the_form(shelf, tmp_path):
    record, expected = shelf(target='cifar10')
    model = timm.create_model(record.name, pretrained=True)
    timm.models.save_for_hf(model, tmp_path / 'export', safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "export"}', pretrained=True).eval()
    assert torch.equal(again(X), expected(X))
    with pytest.warns(NewHeadsWarning, match='has 3 classes, the model 7'):
        timm.create_model(f'local-dir:{tmp_path / "export"}', pretrained=True, num_classes=7)


def test_a_file_of_other_classes_warns_of_new_heads(shelf, tmp_path):
    record, _ = shelf(target='cifar10')
    file = tmp_path / 'seven.pth'
    torch.save(timm.create_model(record.name, num_classes=7).state_dict(), file)
    overlay = {'file': str(file)}
    with pytest.warns(NewHeadsWarning, match='^the file of the overlay has 3 classes, the model 7'):
        timm.create_model(record.name, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    with warnings.catch_warnings():
        warnings.simplefilter('error', NewHeadsWarning)
        model = timm.create_model(record.name, pretrained=True, pretrained_cfg_overlay={**overlay, 'num_classes': 7})
    assert torch.equal(model.head.weight, torch.load(file)['head.weight'])


def test_classes_of_an_overlay_are_new_heads_for_stage_1(shelf):
    record, _ = shelf()
    with pytest.warns(NewHeadsWarning, match='has no classes, the model 4'):
        timm.create_model(record.name, pretrained=True, pretrained_cfg_overlay={'num_classes': 4})


def test_experience_by_tag(shelf, tmp_path):
    record, expected = shelf()
    found = find_experience(record.name)
    assert (found.affect_kind, found.num_affect, found.names) == ('ratings', 1, ('valence',))
    assert torch.equal(found.state_dict['head_affect.weight'], expected.head_affect.weight)
    (tmp_path / record.file).write_bytes(b'')
    with pytest.raises(ValueError, match=r'--experience .*0 bytes'):
        find_experience(record.name)


def test_building_draws_the_same_random_numbers(shelf):
    record, _ = shelf(target='cifar10')
    drawn = []
    for pretrained in (False, True):
        torch.manual_seed(5)
        timm.create_model(record.name, pretrained=pretrained)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_the_client_is_the_real_one():
    assert constants.ENDPOINT.startswith('http://127.0.0.1:')
    assert 'httpx' not in vars(weights)
    assert weights.hf_hub_download is huggingface_hub.hf_hub_download


@pytest.mark.parametrize('name', ['emoreg_resnet18.emoji', 'emoreg_resnet18.emoji_ft_cifar10', 'emoreg_vit_tiny.emoji'])
def test_timm_scripts_hand_over_the_whole_cfg_and_get_the_weight_in_its_form(name):
    expected = timm.create_model(name, pretrained=True)
    model = timm.create_model(**timm.models.resolve_model_input_args(name), pretrained=True)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(),
                                                 strict=True))
    architecture = name.split('.')[0]
    default = timm.create_model(**timm.models.resolve_model_input_args(architecture), pretrained=True)
    expected = timm.create_model(zoo.find(architecture).name, pretrained=True)
    assert torch.equal(default.head_affect.weight, expected.head_affect.weight)


def test_a_changed_cfg_is_taken_as_it_is():
    cfg = timm.get_pretrained_cfg('emoreg_resnet18.emoji').to_dict()
    model = timm.create_model('emoreg_resnet18', pretrained_cfg=dict(cfg, num_classes=5))
    assert model.num_affect == 8  # not the weight's 1
    assert model.pretrained_cfg['num_classes'] == 5
    untagged = timm.get_pretrained_cfg('emoreg_resnet18')
    assert timm.create_model('emoreg_resnet18', pretrained_cfg=untagged).small_image is False
