from __future__ import annotations

import os

import pytest
import torch

from timm_emoreg.files import read_json, write_text
from timm_emoreg.training import run_folder
from timm_emoreg.training.run_folder import BusyError, make_run, trim


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


HEADER = b'epoch,train_loss,eval_loss,lr\r\n'
RATED = b'epoch,train_loss,"eval_ccc_joy, mean",lr\r\n'  # by a column of a csv of ratings, which may be called anything
ROWS = b'0,2.5,,0.1\r\n', b'1,nan,1e-3,0.1\r\n', b'2,2.3,2.4,0.1\r\n'


@pytest.mark.parametrize(('content', 'left'), [
    ((HEADER, *ROWS), (HEADER, *ROWS[:2])),
    ((HEADER, *ROWS[:2]), (HEADER, *ROWS[:2])),
    ((HEADER, ROWS[0], ROWS[0][:1], b'\r\n', ROWS[1]), (HEADER, *ROWS[:2])),
    ((HEADER, ROWS[0], bytes(9)), (HEADER, ROWS[0])),
    ((HEADER, ROWS[0], bytes(9), b'\r\n', ROWS[1]), (HEADER, *ROWS[:2])),
    ((HEADER, ROWS[0], b'1,2.4,2.5,0.\0\0\r\n'), (HEADER, ROWS[0])),
    ((HEADER, ROWS[0], b'\xff\xfe,,,0.1\r\n'), (HEADER, ROWS[0])),
    ((HEADER, ROWS[0], b'1,2.'), (HEADER, ROWS[0])),
    ((HEADER, ROWS[0], b'1,2.4,2.5,0.'), (HEADER, ROWS[0])),  # to which the next row would be added
    ((HEADER, ROWS[0], b'1,2.1,2.4,2.5,0.1\r\n'), (HEADER, ROWS[0])),  # as it was
    ((HEADER, ROWS[0], b',2.4,2.5,0.1\r\n'), (HEADER, ROWS[0])),
    ((HEADER, ROWS[0], b'1,2.4,2.5,0.1\r'), (HEADER, ROWS[0], b'1,2.4,2.5,0.1\r')),
    ((RATED, *ROWS), (RATED, *ROWS[:2])),
    ((HEADER, ROWS[2]), ()),
    ((HEADER,), ()),
    ((HEADER[:9],), ()),
    ((bytes(9), b'\r\n', ROWS[0]), ()),  # without its header no row can be read
    ((bytes(99),), ()),
    ((), ()),
])
def test_a_resumed_run_keeps_the_rows_that_can_be_read_and_are_not_written_again(tmp_path, content, left):
    summary = tmp_path / 'summary.csv'
    summary.write_bytes(b''.join(content))
    trim(summary, 2)
    assert summary.read_bytes() == b''.join(left)
    assert os.listdir(tmp_path) == ['summary.csv']
