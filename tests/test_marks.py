from __future__ import annotations

import pytest

from timm_emoreg.marks import MarksError, between_marks, write_between_marks

TEXT = 'a\n<!-- weights -->\nold\n\n1 \\g<1>\n<!-- /weights -->\n<!-- study -->\nother\n<!-- /study -->\nb\n'


def test_only_what_stands_between_is_replaced(tmp_path):
    path = tmp_path / 'README.md'
    path.write_text(TEXT)
    assert between_marks(path, 'weights') == 'old\n\n1 \\g<1>'
    write_between_marks(path, 'study', '| \\1 |\n| new |\n')
    assert path.read_text() == TEXT.replace('other', '| \\1 |\n| new |')
    write_between_marks(path, 'study', 'other')
    assert path.read_text() == TEXT
    assert [file.name for file in tmp_path.iterdir()] == ['README.md']


def test_marks_with_nothing_between_them_are_filled(tmp_path):
    path = tmp_path / 'README.md'
    path.write_text('a\n<!-- study -->\n<!-- /study -->\nb\n')
    assert between_marks(path, 'study') == ''
    for _ in range(2):
        write_between_marks(path, 'study', '| x |\n')
        assert path.read_text() == 'a\n<!-- study -->\n| x |\n<!-- /study -->\nb\n'


def test_a_file_without_the_marks_stays_as_it_is(tmp_path):
    path = tmp_path / 'README.md'
    path.write_text(TEXT)
    with pytest.raises(MarksError, match=r'README\.md: holds no <!-- speed --> \.\.\. <!-- /speed --> to write'):
        write_between_marks(path, 'speed', 'x')
    assert path.read_text() == TEXT
    with pytest.raises(MarksError, match=r'NONE\.md: is no file\. Give a text that holds <!-- speed --> and'):
        write_between_marks(tmp_path / 'NONE.md', 'speed', 'x')
