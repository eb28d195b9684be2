"""Every block of hub_cards/WALK.md, in its order, in one folder."""
import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
WALK = ROOT / 'hub_cards' / 'WALK.md'


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder that has, like a checkout, train.py in it; `python` is the interpreter of this test."""
    (tmp_path / 'train.py').symlink_to(ROOT / 'train.py')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    return tmp_path


def bash(block: str) -> str:
    done = subprocess.run(['bash', '-euo', 'pipefail', '-c', block], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f'{block}\n{done.stderr}'
    return done.stdout


def python(block: str, session: dict) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block, 'WALK.md', 'exec'), session)
    return out.getvalue()


@pytest.mark.skipif(not WALK.exists(), reason='the cards are not part of a source distribution')
def test_the_walk_can_be_walked(here):
    blocks = re.findall(r'^```(\w*)\n(.*?)^```$', WALK.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)
    assert {language for language, _ in blocks} == {'python', 'bash'}
    assert WALK.read_text(encoding='utf-8').count('```') == 2 * len(blocks)
    session = {}
    said = [bash(block) if language == 'bash' else python(block, session) for language, block in blocks]

    assert len(list((here / 'output/walk/pictures').glob('*/*.png'))) == 60
    assert re.search(r'^[+-]\d\.\d\d  Food & Drink/\d+\.png$', said[1], re.MULTILINE)
    for name in ('images.png', 'set.png'):
        assert np.asarray(Image.open(here / 'output/walk' / name).convert('L'), dtype=float).std() > 10
    assert said[2].count('"affective_state": {"valence"') >= 3
    assert re.fullmatch(r'regulated: \d+ % of 6 test images, \d+ s\nplain: \d+ % of 6 test images, \d+ s\n', said[4])
    assert '"images": 6,' in said[5]
    assert said[6] == "('Animals & Nature', 'Food & Drink', 'Symbols') True\n"
    assert 'dry run; --push publishes' in said[7]
    assert sorted(p.name for p in (here / 'output/walk/mine').iterdir()) == ['config.json', 'model.safetensors']
