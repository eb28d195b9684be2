#!/usr/bin/env python3
"""timm's own tests over this package's models.

    python tests/timm_suite.py                                  every registered model (hours on a small machine)
    python tests/timm_suite.py --models emoreg_resnet18 emoreg_vit_tiny

The tests are in timm's sdist but not in its wheel: pip fetches the sdist of the installed version, so this needs the
package index. What the tests must know of a model's kind is added to a copy of them: which modules have
forward_intermediates, and which models have features of another shape than (B, C, H, W).

test_models.py runs over the registered models as it is. test_factory.py runs as it is, beside our registrations.
test_model_input.py and some of test_models.py name models of timm: there, each is wrapped in EmoReg as it is created.
"""
import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

import timm_emoreg

MODULES = ('emoreg', 'emoreg_resnet', 'emoreg_vit')
NON_STANDARD = ('emoreg_vit*',)

# The wrapped runs leave out what looks at an attribute of one class of timm (cls_token, patch_drop ...), and one case
# (pit_ti_224) that wants classes without pooling, which EmoReg refuses.
WRAPPED = {
    'test_model_input.py':
        '(resize_hub_roundtrip or windowed_model or test_export_tracks or rejects_conflicting or test_size_roundtrip'
        ' or rectangular_resize) and not omits_in_memory and not pit_ti_224',
    'test_models.py':
        'test_headless_checkpoint_reload or test_prune_intermediate_layers_params_used'
        ' or test_relpos_non_square_checkpoint_reload or test_head_hidden_size',
}
# A plugin for pytest: every model of timm that a test creates is created inside EmoReg.
WRAP = '''
import functools
import timm
import timm_emoreg

real, inside = timm.create_model, []

@functools.wraps(real)
def create_model(model_name, *args, **kwargs):
    if not (inside or ':' in model_name or model_name.startswith('emoreg')):
        model_name, kwargs = 'emoreg', dict(kwargs, backbone=model_name)
    inside.append(1)  # what EmoReg creates in there is the plain backbone
    try:
        return real(model_name, *args, **kwargs)
    finally:
        inside.pop()

timm.create_model = create_model
'''


def fetch_tests(folder: Path) -> Path:
    """Fetch the sdist of the installed timm and give the folder of its tests, adapted."""
    subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-binary', ':all:', '--no-deps',
                    '--dest', str(folder), f'timm=={timm.__version__}'], check=True)
    with tarfile.open(next(folder.glob('timm-*.tar.gz'))) as sdist:
        sdist.extractall(folder, filter='data')
    tests = next(folder.glob('timm-*/tests'))
    # beside the tests, the sdist's own timm would be imported instead of the installed one
    tests = tests.rename(folder / 'tests')
    path = tests / 'test_models.py'
    text, line = path.read_text(), 'NUM_NON_STD = len(NON_STD_FILTERS)\n'
    if text.count(line) != 1:
        raise SystemExit(f'{path.name} of timm {timm.__version__} has another form than expected: no {line!r}')
    path.write_text(text.replace(line, f'FEAT_INTER_FILTERS += {MODULES}\nNON_STD_FILTERS += {NON_STANDARD}\n{line}'))
    (folder / 'emoreg_wrap.py').write_text(WRAP)
    return tests


def run(tests: Path, file: str, *args: str) -> int:
    path = os.pathsep.join([str(tests.parent), str(Path(timm_emoreg.__file__).parents[1])])
    # TIMEOUT: a test of timm may take 6 minutes at most, which a large ViT passes on one core of a small machine
    env = {'TIMEOUT': '1800', **os.environ, 'TORCH_BACKEND': 'timm_emoreg', 'PYTHONPATH': path}
    return subprocess.run([sys.executable, '-m', 'pytest', '-q', '-rfE', '--no-header', '-p', 'no:cacheprovider',
                           '-p', 'timm_emoreg', '-W', 'ignore', file, *args], cwd=tests, env=env).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', help='registered names (default: all)')
    parser.add_argument('--wrapped', action=argparse.BooleanOptionalAction, default=True,
                        help='also the tests that name models of timm, each wrapped')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tests = fetch_tests(Path(folder))
        # a parametrised test is named test_...[1-MODEL] or test_...[MODEL]
        chosen = ' or '.join(f'-{m}] or [{m}]' for m in args.models) if args.models else 'emoreg'
        codes = [run(tests, 'test_models.py', '-k', chosen)]
        codes.append(run(tests, 'test_factory.py'))
        if args.wrapped:
            for file, expression in WRAPPED.items():
                codes.append(run(tests, file, '-p', 'emoreg_wrap', '-k', expression))
    return max(codes)


if __name__ == '__main__':
    sys.exit(main())
