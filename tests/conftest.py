"""Every test runs offline: the Hub is the one of `loopback_hub`, and nothing connects to another machine."""
from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from loopback_hub import LoopbackHub

# Several workers share the cores; torch reads this when it is imported, here and in the processes that tests start.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ['OMP_NUM_THREADS'] = '1'

# The client reads its environment when it is imported.
assert 'huggingface_hub' not in sys.modules, 'a plugin imported huggingface_hub before the loopback Hub was there'
HUB = LoopbackHub()
HOME = tempfile.mkdtemp(prefix='emoreg-hub-')
for name in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'HF_TOKEN',
             'HUGGING_FACE_HUB_TOKEN', 'HUGGINGFACE_CO_STAGING', 'HF_TOKEN_PATH', 'EMOREG_WEIGHTS', 'TIMM_FUSED_ATTN'):
    os.environ.pop(name, None)
os.environ |= {'HF_ENDPOINT': HUB.endpoint, 'HF_HOME': HOME, 'HF_HUB_DISABLE_XET': '1',
               'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1',
               'HF_HUB_DISABLE_UPDATE_CHECK': '1', 'NO_PROXY': '127.0.0.1,localhost', 'no_proxy': '127.0.0.1,localhost'}

import pytest  # noqa: E402

_connect = socket.socket.connect


def _connect_here(self, address):
    here = ('127.', '::1', 'localhost')
    if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(here):
        raise OSError(f'a test wants to connect to {address}; tests are offline')
    return _connect(self, address)


socket.socket.connect = _connect_here


def pytest_collection_modifyitems(items):
    """The longest tests go first: started last, they would leave the other processes without work."""
    longest = ('test_the_walk_can_be_walked', 'test_the_real_training_script', 'test_nothing_is_compiled')
    items.sort(key=lambda item: not item.name.startswith(longest))


def pytest_unconfigure(config):
    HUB.released.set()
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture
def hub():
    """The loopback Hub, empty."""
    HUB.reset()
    yield HUB
    HUB.reset()


@pytest.fixture
def make_record():
    """Makes the record of a weight whose file has the given bytes."""
    import hashlib

    from timm_emoreg.zoo import Weight

    def make(data: bytes = b'', **changes) -> Weight:
        architecture = changes.get('architecture', 'emoreg_resnet18')
        stimuli, target = changes.get('stimuli', 'emoji'), changes.get('target')
        tag = changes.get('tag', stimuli + (f'_ft_{target}' if target else ''))
        number = {'weight': 0.5, 'n': 2, 'mean': 0.45, 'sd': 0.07}
        fields = {
            'architecture': architecture, 'tag': tag, 'file': f'{architecture}.{tag}.safetensors',
            'sha256': hashlib.sha256(data).hexdigest(), 'size': len(data), 'precision': 'float16',
            'logit_difference': 0.001, 'parameters': 1000, 'stimuli': stimuli, 'stimuli_labels': 'valence',
            'target': target, 'input_size': (3, 32, 32), 'form': '3x3 stem of stride 1, no max-pool',
            'affect_names': ('valence',), 'label_names': ('cat', 'dog', 'cow') if target else (),
            'model_args': {'num_affect': 1, 'affect_kind': 'ratings', 'balance': 0.5, 'modulation': True,
                           'experience': 'shared', 'small_image': True, 'img_size': 32},
            'metric': 'top1' if target else 'ccc', 'metrics': {'top1' if target else 'ccc': number},
            'baseline': {'top1': number} if target else {}, 'seeds': (0, 1), 'seconds': 60.0,
            'hardware': 'CPU, 2 threads', 'recipe': 'python train.py --seed 0', 'commit': '1' * 40,
            'licence': 'cc-by-sa-4.0',
            'base': f'{architecture}.{stimuli}' if target else None, 'embedded': False, 'default': False,
            'hub_id': f'timm-emoreg/{architecture}.{tag}', 'hub_commit': None, **changes}
        return Weight(**fields)

    return make


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    saved, plain = [], Figure.savefig

    def savefig(self, *args, **kwargs):
        saved.append(self)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', savefig)
    return saved


@pytest.fixture(scope='session')
def colours(tmp_path_factory) -> Path:
    """A folder per class: three colours with noise, 20 images each."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp('colours')
    rng = np.random.default_rng(0)
    for name, colour in (('blue', (40, 60, 200)), ('green', (40, 200, 60)), ('red', (200, 40, 60))):
        (root / name).mkdir()
        for i in range(20):
            pixels = np.clip(rng.normal(colour, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f'{i}.png')
    return root


@pytest.fixture
def train():
    """train.py as a module."""
    from train_module import load_train

    return load_train()


@pytest.fixture(scope='session')
def trained_run(colours, tmp_path_factory) -> Path:
    """Both stages as train.py leaves them; the emotions are the colours."""
    import signal

    from train_module import load_train

    train = load_train()
    output = tmp_path_factory.mktemp('output')
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [
            'train.py', '--model', 'test_resnet', '--stimuli', str(colours), '--dataset', str(colours),
            '--img-size', '32', '-b', '8', '--epochs', '2', '--balance', 'gate', '--model-ema', '--model-ema-decay',
            '0.8', '--no-amp', '--output', str(output), '--experiment', 'run'])
        try:
            assert train.main() == 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return output / 'run'
