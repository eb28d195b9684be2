"""Nothing is imported before it is needed: not by the package, not by train.py, and not by look."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_nothing_is_imported_before_it_is_needed():
    code = f'import sys; sys.path.insert(0, {str(ROOT)!r})\n'
    for name in ('timm', 'timm_emoreg', 'train', 'timm_emoreg.look.command'):
        code += f'before = set(sys.modules)\nimport {name}\nprint(*set(sys.modules) - before)\n'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    _, package, script, look = (line.split() for line in done.stdout.splitlines())

    added = {name for name in package if name.split('.')[0] not in sys.stdlib_module_names}
    assert 'timm_emoreg.emoreg' in added
    assert not {name for name in added if name.startswith('timm_emoreg.data')}
    # beyond what timm has imported: no plotting, no image decoder, no data set reader, nothing of torch
    assert {name for name in added if not name.startswith('timm_emoreg')} <= {
        name for name in added if name.startswith('timm.optim')}
    assert {name.split('.')[0] for name in script} - sys.stdlib_module_names <= {'timm', 'timm_emoreg', 'train', 'tqdm'}
    assert 'timm_emoreg.look.image_picture' in look
    assert not {name for name in look if name.startswith('matplotlib')}
