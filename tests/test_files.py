"""Files that appear as a whole or not at all."""
from __future__ import annotations

import os
import time

import pytest

from timm_emoreg.files import LEFT_BEHIND, replacing, write_text


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / 'table.md'
    with replacing(path) as slow:
        slow.write_text('half')
        write_text(path, 'whole')
        assert path.read_text() == 'whole'
        slow.write_text('later')
    assert path.read_text() == 'later'
    assert os.listdir(tmp_path) == ['table.md']


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / 'table.md'
    write_text(path, 'before')

    def fill_the_disk():
        with replacing(path) as part:
            part.write_text('half')
            raise OSError(28, 'No space left on device')

    with pytest.raises(OSError, match='No space left'):
        fill_the_disk()
    assert (path.read_text(), os.listdir(tmp_path)) == ('before', ['table.md'])


@pytest.mark.parametrize('umask', [0o022, 0o007, 0o077])
def test_the_rights_of_a_file_are_those_of_any_new_one(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / 'table.md', 'text')
    finally:
        os.umask(before)
    assert (tmp_path / 'table.md').stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_killed_writers_left_goes_in_time(tmp_path):
    path = tmp_path / 'table[1].md'
    old, new, other, own = (tmp_path / name for name in (
        'table[1].md.0123abcd.part', 'table[1].md.4567abcd.part', 'table1.md.0123abcd.part', 'table[1].md.mine.part'))
    for part in (old, new, other, own):
        part.touch()
        if part is not new:
            os.utime(part, (time.time() - LEFT_BEHIND - 60,) * 2)
    write_text(path, 'text')
    assert sorted(tmp_path.iterdir()) == sorted((path, new, other, own))
