from __future__ import annotations

import os

import pytest
import torch

from timm_emoreg.files import read_json, write_text
from timm_emoreg.training import run_folder
from timm_emoreg.training.run_folder import BusyError, make_run


def test_two_runs_that_want_one_name_do_not_share_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / 'run'
    pid = os.getpid()

    def after_another(path, content):
        monkeypatch.undo()
        make_run(folder, {'seed': 0})
        write_text(path, content)

    monkeypatch.setattr(run_folder, 'write_text', after_another)
    monkeypatch.setattr(os, 'getpid', lambda: pid + 1)
    with pytest.raises(BusyError, match=r'exists\. Continue it with --resume .*, or choose another --experiment'):
        make_run(folder, {'seed': 1})
    assert read_json(folder / 'args.json') == {'seed': 0}
    assert os.listdir(tmp_path) == ['run']


def test_what_a_killed_process_left_is_no_obstacle(tmp_path):
    (tmp_path / f'run.{os.getpid()}.part').mkdir()
    make_run(tmp_path / 'run', {'seed': 0})
    assert os.listdir(tmp_path) == ['run']


def test_what_a_device_lacks_is_no_fault_of_the_folder(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), run_folder.writing(tmp_path):
        raise torch.OutOfMemoryError
    with pytest.raises(run_folder.WriteError, match=r'cannot be written \(no room\)'), run_folder.writing(tmp_path):
        raise RuntimeError('no room')
