from __future__ import annotations

import os
import subprocess

import pytest

from timm_emoreg.training.commit import project_commit


@pytest.fixture
def git(tmp_path):
    """Runs git in a repository at `tmp_path`."""
    def run(*command):
        subprocess.run(['git', '-C', str(tmp_path), '-c', 'user.name=n', '-c', 'user.email=e', *command], check=True,
                       capture_output=True)
    run('init', '-q')
    return run


@pytest.fixture
def checkout(git, tmp_path):
    """A checkout as far as it counts here, with one commit."""
    write(tmp_path)
    git('add', '.')
    git('commit', '-qm', 'm')
    return tmp_path


def write(folder):
    (folder / 'timm_emoreg' / 'assets').mkdir(parents=True)
    (folder / 'timm_emoreg' / '__init__.py').write_text('')
    (folder / 'train.py').write_text('1')


def test_commit_of_the_project(checkout):
    commit = project_commit(checkout)
    assert len(commit) == 40
    (checkout / 'timm_emoreg' / 'assets' / 'weights.json').write_text('[]')
    (checkout / 'README.md').write_text('')
    assert project_commit(checkout) == commit  # neither records nor texts train a weight
    (checkout / 'train.py').write_text('2')
    assert project_commit(checkout) == f'{commit}-dirty'


def test_no_commit_of_the_project(tmp_path, git):
    assert project_commit(tmp_path / 'nowhere') == 'unknown'
    write(tmp_path)
    assert project_commit(tmp_path) == 'unknown'
    git('add', '.')
    assert project_commit(tmp_path) == 'unknown'  # not committed yet


def test_no_repository(tmp_path):
    write(tmp_path)
    assert project_commit(tmp_path) == 'unknown'


@pytest.mark.parametrize('ignored', [True, False])
def test_installed_within_another_repository(tmp_path, git, ignored):
    (tmp_path / '.gitignore').write_text('.venv/' if ignored else '')
    git('add', '.')
    git('commit', '-qm', 'm')
    packages = tmp_path / '.venv' / 'lib' / 'python3' / 'site-packages'
    packages.mkdir(parents=True)
    write(packages)
    assert project_commit(packages) == 'unknown'


def test_another_folder_of_the_checkout(checkout):
    assert project_commit(checkout / 'timm_emoreg') == 'unknown'


def test_nothing_is_written(checkout):
    index = checkout / '.git' / 'index'
    os.utime(checkout / 'train.py', (1, 1))  # which `git status` would note in the index
    before = index.read_bytes()
    assert len(project_commit(checkout)) == 40
    assert index.read_bytes() == before


def test_without_git(checkout, monkeypatch):
    monkeypatch.setenv('PATH', str(checkout))
    assert project_commit(checkout) == 'unknown'
