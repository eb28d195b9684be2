from __future__ import annotations

import hashlib
import http.server
import pickle
import shutil
import socket
import tarfile
import threading
import urllib.error
from functools import partial

import numpy as np
import pytest
from torchvision import datasets

from timm_emoreg.data import cifar
from timm_emoreg.data.cifar import load_cifar
from timm_emoreg.data.sets import DataError

MAKERS = {'cifar10': datasets.CIFAR10, 'cifar100': datasets.CIFAR100}
LABELS = {'cifar10': 'labels', 'cifar100': 'fine_labels'}
NAMES = {'cifar10': ['cat', 'dog'], 'cifar100': ['oak', 'elm']}


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Writes a tiny set of two classes in the official layout and has torchvision take it for the official one."""
    def write(name):
        maker = MAKERS[name]
        folder = tmp_path / 'made' / maker.base_folder
        folder.mkdir(parents=True)

        def save(file, content):
            (folder / file).write_bytes(pickle.dumps(content))
            return hashlib.md5((folder / file).read_bytes()).hexdigest()

        start = 0
        for part in ('train_list', 'test_list'):
            published = []
            for file, _ in getattr(maker, part):
                numbers = np.arange(start, start + 20)  # every picture has its own number as its first red pixel
                data = np.zeros((20, 3072), np.uint8)
                data[:, 0] = numbers
                published.append([file, save(file, {'data': data, LABELS[name]: (numbers % 2).tolist()})])
                start += 20
            monkeypatch.setattr(maker, part, published)
        meta = {**maker.meta, 'md5': save(maker.meta['filename'], {maker.meta['key']: NAMES[name]})}
        monkeypatch.setattr(maker, 'meta', meta)
        return folder
    return write


@pytest.fixture
def present(publish, tmp_path):
    def move(name):
        (tmp_path / 'data').mkdir(exist_ok=True)
        return publish(name).rename(tmp_path / 'data' / MAKERS[name].base_folder)
    return move


@pytest.mark.parametrize(('name', 'files', 'held_out'), [
    ('cifar10', 5, [4, 5, 20, 22, 27, 33, 47, 56, 61, 82]), ('cifar100', 1, [4, 7])])
def test_present_set_is_used_without_network(present, tmp_path, monkeypatch, name, files, held_out):
    present(name)
    monkeypatch.setattr(MAKERS[name], 'download', lambda _: pytest.fail('downloaded a set that is there'))
    splits = load_cifar(name, tmp_path / 'data')
    total = 20 * files
    assert splits.name == name
    assert splits.target.names == tuple(NAMES[name])
    assert len(splits.train) == total * 9 // 10
    numbers = [part.images[:, 0, 0, 0].tolist() for part in (splits.train, splits.validation, splits.test)]
    assert sorted(numbers[0] + numbers[1]) == list(range(total))
    assert numbers[1] == held_out  # another split would judge published weights by what they were trained on
    assert numbers[2] == list(range(total, total + 20))
    for part, values in zip((splits.train, splits.validation, splits.test), numbers, strict=True):
        assert part.images.shape[1:] == (32, 32, 3)
        assert part.images.flags['C_CONTIGUOUS']
        assert part.targets.tolist() == [value % 2 for value in values]
    assert sum(splits.validation.targets.tolist()) * 2 == len(splits.validation)
    assert load_cifar(name, tmp_path / 'data').validation.images.tobytes() == splits.validation.images.tobytes()


def test_pictures_are_those_of_torchvision(publish, tmp_path, monkeypatch):
    folder = publish('cifar100')
    data = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    for (file, _), part in zip((*datasets.CIFAR100.train_list, *datasets.CIFAR100.test_list),
                               ('train_list', 'test_list'), strict=True):
        (folder / file).write_bytes(pickle.dumps({'data': data, 'fine_labels': [0, 1] * 10}))
        monkeypatch.setattr(datasets.CIFAR100, part, [[file, hashlib.md5((folder / file).read_bytes()).hexdigest()]])
    theirs, ours = datasets.CIFAR100(folder.parent), load_cifar('cifar100', folder.parent)
    assert np.array_equal(ours.test.images, theirs.data)
    rows = np.array([12, 3, 4, 19, 0])
    for block in (2, 5, 100):
        assert np.array_equal(cifar._pixel_by_pixel(theirs.data, rows, block), theirs.data[rows])


def test_each_file_is_checked_once(present, tmp_path, monkeypatch):
    folder = present('cifar10')
    checked = []
    check = datasets.cifar.check_integrity
    monkeypatch.setattr(datasets.cifar, 'check_integrity', lambda path, md5: checked.append(path) or check(path, md5))
    load_cifar('cifar10', tmp_path / 'data')
    batches = [str(path) for path in folder.iterdir() if 'batch_' in path.name or path.name == 'test_batch']
    assert sorted(path for path in checked if 'meta' not in path) == sorted(batches)


def test_default_folder_comes_from_the_environment(present, tmp_path, monkeypatch):
    present('cifar100')
    monkeypatch.setenv('EMOREG_DATA', str(tmp_path / 'data'))
    assert len(load_cifar('cifar100').test) == 20


@pytest.fixture
def archive(publish, tmp_path, monkeypatch):
    """The tiny CIFAR-10 as an archive, offered by a server on this machine."""
    folder = publish('cifar10')
    path = tmp_path / 'cifar-10-python.tar.gz'
    with tarfile.open(path, 'w:gz') as file:
        file.add(folder, folder.name)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(datasets.CIFAR10, 'url', f'http://127.0.0.1:{server.server_port}/{path.name}')
    monkeypatch.setattr(datasets.CIFAR10, 'tgz_md5', hashlib.md5(path.read_bytes()).hexdigest())
    yield path
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures('archive')
def test_download_leaves_the_set_and_nothing_else(tmp_path, monkeypatch, capsys):
    download = datasets.CIFAR10.download
    monkeypatch.setattr(datasets.CIFAR10, 'download', lambda self: print('Extracting') or download(self))
    with cifar._patience(60):  # of the caller
        splits = load_cifar('cifar10', tmp_path / 'new' / 'data')
        assert socket.getdefaulttimeout() == 60
    assert len(splits.train) == 90
    assert [path.name for path in (tmp_path / 'new' / 'data').iterdir()] == ['cifar-10-batches-py']
    out, err = capsys.readouterr()
    assert out == ''
    assert '100%' in err  # the progress bar


def fail_offline(self):
    assert socket.getdefaulttimeout() == cifar._SILENCE
    with open(f'{self.root}/cifar-10-python.tar.gz', 'wb') as file:
        file.write(b'half')
    raise urllib.error.URLError('Name or service not known')


OFFLINE = (r'cifar-10-batches-py: cifar10 is not there and cannot be downloaded \(.*\)\. Put the folder '
           r"'cifar-10-batches-py' .*data, point --data-dir .*--dataset emoji\.$")


@pytest.mark.parametrize('existed', [True, False])
def test_without_network_nothing_is_left(tmp_path, monkeypatch, existed):
    monkeypatch.setattr(datasets.CIFAR10, 'download', fail_offline)
    data = tmp_path / 'new' / 'data'
    if existed:
        data.mkdir(parents=True)
    before = socket.getdefaulttimeout()
    with pytest.raises(DataError, match=OFFLINE) as e:
        load_cifar('cifar10', data)
    assert str(data / 'cifar-10-batches-py') in str(e.value)
    assert (tmp_path / 'new').exists() == data.exists() == existed
    assert not existed or not list(data.iterdir())
    assert socket.getdefaulttimeout() == before


def test_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(self):
        (tmp_path / 'seen').write_text(str(self.root))
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.CIFAR10, 'download', interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_cifar('cifar10', tmp_path / 'data')
    assert (tmp_path / 'seen').read_text().startswith(str(tmp_path / 'data'))  # beside its final place
    assert not (tmp_path / 'data').exists()


def test_damaged_archive_is_refused(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=OFFLINE):
        load_cifar('cifar10', tmp_path / 'data')
    assert not (tmp_path / 'data').exists()


def test_silent_server_is_given_up(tmp_path, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as server:  # accepts and never answers
        monkeypatch.setenv('no_proxy', '127.0.0.1')
        monkeypatch.setattr(datasets.CIFAR10, 'url', f'http://127.0.0.1:{server.getsockname()[1]}/a.tar.gz')
        monkeypatch.setattr(cifar, '_SILENCE', 0.2)
        with pytest.raises(DataError, match=OFFLINE):
            load_cifar('cifar10', tmp_path / 'data')
    assert not (tmp_path / 'data').exists()


@pytest.mark.usefixtures('archive')
def test_two_processes_may_download_at_once(tmp_path, monkeypatch):
    download = datasets.CIFAR10.download

    def slower_than_another(self):
        download(self)
        shutil.copytree(f'{self.root}/cifar-10-batches-py', tmp_path / 'data' / 'cifar-10-batches-py')

    monkeypatch.setattr(datasets.CIFAR10, 'download', slower_than_another)
    assert len(load_cifar('cifar10', tmp_path / 'data').train) == 90
    assert [path.name for path in (tmp_path / 'data').iterdir()] == ['cifar-10-batches-py']


def test_data_dir_that_is_a_file(tmp_path):
    (tmp_path / 'data').touch()
    with pytest.raises(DataError, match=OFFLINE):
        load_cifar('cifar10', tmp_path / 'data')


def test_damaged_and_missing_files_are_named(present, tmp_path):
    folder = present('cifar10')
    for file in ('data_batch_3', 'test_batch'):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(b'')
        with pytest.raises(DataError, match=rf'{file}: its md5 is not the published one\. Restore the file, or'):
            load_cifar('cifar10', tmp_path / 'data')
        (folder / file).unlink()
        with pytest.raises(DataError, match=rf'{file}: the file is missing\. Restore'):
            load_cifar('cifar10', tmp_path / 'data')
        (folder / file).write_bytes(content)
    folder = present('cifar100')
    (folder / 'meta').write_bytes(b'x')
    with pytest.raises(DataError, match=r'cifar-100-python.meta: its md5 is not'):
        load_cifar('cifar100', tmp_path / 'data')


def test_unknown_name(tmp_path):
    with pytest.raises(DataError, match=r"set 'cifar1' is unknown\. Known: 'cifar10', 'cifar100'"):
        load_cifar('cifar1', tmp_path)
