"""Importing the package: what it registers, what it leaves alone, and the one thing that can be wrong with it."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import timm_emoreg

ROOT = Path(__file__).parents[1]


def python(code: str, *path: Path) -> subprocess.CompletedProcess:
    prelude = f'import sys; sys.path[:0] = {[str(p) for p in (*path, ROOT)]!r}\n'
    return subprocess.run([sys.executable, '-c', prelude + code], capture_output=True, text=True, timeout=240)


def test_import_registers_the_models():
    assert timm.list_models('emoreg*') == [
        'emoreg', 'emoreg_resnet18', 'emoreg_resnet34', 'emoreg_resnet50', 'emoreg_resnet101', 'emoreg_resnet152',
        'emoreg_vit_base', 'emoreg_vit_large', 'emoreg_vit_small', 'emoreg_vit_tiny']
    assert set(timm_emoreg.BACKBONES) == set(timm.list_models('emoreg_*'))
    assert timm.list_models(module='resnet', filter='emoreg*') == []


@pytest.mark.parametrize('room', ['study', 'hub', 'look', 'bench', 'diagnose'])
def test_nothing_uses_a_command(room):
    """Each command stands at the top: it uses the package, and neither the package nor another command uses it."""
    package = ROOT / 'timm_emoreg'
    for file in package.rglob('*.py'):
        where = file.relative_to(ROOT).with_suffix('').parts
        if where[1] == room:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom):
                base = where[:len(where) - node.level] if node.level else ()
                name = '.'.join([*base, *([node.module] if node.module else [])])
                names = [name, *(f'{name}.{alias.name}' for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            assert not any(f'{name}.'.startswith(f'timm_emoreg.{room}.') for name in names), (file, names)


def test_a_torchvision_that_does_not_fit_is_named_with_the_remedy(tmp_path):
    (tmp_path / 'torchvision').mkdir()
    (tmp_path / 'torchvision/__init__.py').write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')")
    done = python('import timm_emoreg', tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('ImportError: torch ')
    assert 'do not fit each other (operator torchvision::nms does not exist)' in last
    assert last.endswith('pip install --force-reinstall torch torchvision')


def test_the_licence_of_the_package_names_all_that_its_notice_does():
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    licences = set(re.search(r'^license = "(.*?)"', project, re.MULTILINE)[1].split(' AND '))
    notice = (ROOT / 'timm_emoreg/assets/NOTICE').read_text(encoding='utf-8')
    spelled = {'Apache License 2.0': 'Apache-2.0', 'CC-BY 4.0': 'CC-BY-4.0', 'CC BY-SA 4.0': 'CC-BY-SA-4.0',
               'MIT': 'MIT', 'Unicode License v3': 'Unicode-3.0'}
    told = {re.search('|'.join(spelled), line)[0] for line in re.findall(r'^ +Licence: .*', notice, re.MULTILINE)}
    assert {spelled[name] for name in told} == licences
