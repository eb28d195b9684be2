from __future__ import annotations

import csv
import io
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_emoreg.data.sets import DataError
from timm_emoreg.data.table import read_table


@pytest.fixture
def table_of(tmp_path):
    def read(content: str | bytes):
        path = tmp_path / 't.csv'
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_table(path)
    return read


def test_rows_columns_and_lines(table_of):
    table = table_of(b'\xef\xbb\xbfimage, valence\r\n\r\n"a,1.png", 2.5\r\n"two\nlines",3\r\nb.png,1\r\n')
    assert table.columns == ('image', 'valence')
    assert table.column('image') == ['a,1.png', 'two\nlines', 'b.png']
    assert table.numbers('valence', 1, 7).tolist() == [2.5, 3, 1]
    assert table.lines == (3, 4, 6)
    assert table.subset([2]).lines == (6,)
    assert table.subset([2]).column('image') == ['b.png']


@pytest.mark.parametrize(('content', 'message'), [
    (b'', r't\.csv: the table is empty\. Its first line must name the columns'),
    (b'\n\n', r't\.csv: the table is empty'),
    (b'a,b\n', r't\.csv: the table has a header but no row'),
    (b'a,b,a\n1,2,3\n', r"t\.csv, line 1: columns 1 and 3 are both named 'a'\. Rename"),
    (b'a,b\n1,2\n\n1,2,3\n', r't\.csv, line 4: 3 fields where the header has 2 columns\. Correct'),
    (b'a,b\n1,2\n3\n', r't\.csv, line 3: 1 fields where the header has 2 columns'),
    (b'a,b\n1,2\nf\xfcr,2\n', r't\.csv, line 3: byte 0xfc is not UTF-8\. Save the file with UTF-8'),
    (b'\xff\xfea\x00', r't\.csv, line 1: byte 0xff is not UTF-8'),
    (b'a,b\n1,2\n"open,3\n', r't\.csv, line 3: not comma-separated values .*Correct the line'),
    (b'image;joy\na.png;1\n', r"t\.csv, line 1: the columns are separated by ';'\. Save the file with commas between"),
    (b'\n"image";"joy"\n"a.png";"1,5"\n', r"t\.csv, line 2: the columns are separated by ';'\. Save the file with"),
    (b'"image"|"joy"\n"a.png"|"1"\n', r"t\.csv, line 1: the columns are separated by '\|'\. Save"),
    (b'image\tjoy\na.png\t1\n', r"t\.csv, line 1: the columns are separated by '\\t'\. Save"),
    (b'a\n' + b'x' * 200_000, r't\.csv, line 2: not comma-separated values \(field larger'),
])
def test_what_is_no_table_is_refused(table_of, content, message):
    with pytest.raises(DataError, match=message):
        table_of(content)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r'no\.csv: the table cannot be read \(No such file.*correct its path'):
        read_table(tmp_path / 'no.csv')


def test_unknown_column_lists_the_known_ones(table_of):
    with pytest.raises(DataError, match=r"line 1: column 'Valance' is unknown\. Known: 'image', 'valence'\. "
                                        r"Did you mean 'valence'\?"):
        table_of('image,valence\na,1\n').column('Valance')


@pytest.mark.parametrize('value', ['', 'x', 'nan', 'inf', '-inf', '1_5', '"3,5"', '1e999'])
def test_numbers_are_finite(table_of, value):
    with pytest.raises(DataError, match=r"t\.csv, line 3: r is '.*', not a finite number\. Correct it or remove"):
        table_of(f'r\n2\n{value or chr(34) * 2}\n').numbers('r', 1, 7)


@pytest.mark.parametrize('value', ['0.99', '7.01', '-3'])
def test_numbers_stay_in_their_scale(table_of, value):
    with pytest.raises(DataError, match=rf't\.csv, line 2: r is {value}, outside its scale 1 to 7\. Correct'):
        table_of(f'r\n{value}\n7\n').numbers('r', 1, 7)


def test_choices(table_of):
    table = table_of('e\njoy\nfear\njoy\n')
    assert table.choices('e', ('fear', 'joy')).tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"t\.csv, line 3: e 'fear' is unknown\. Known: 'joy', 'feat'\. .*'feat'\?"):
        table.choices('e', ('joy', 'feat'))


def test_files_stay_inside_their_root(table_of, tmp_path):
    root = tmp_path / 'root'
    (root / 'sub').mkdir(parents=True)
    for path in (root / 'sub' / 'a.png', tmp_path / 'secret.png'):
        path.touch()
    (root / 'link.png').symlink_to(tmp_path / 'secret.png')
    (root / 'loop').symlink_to(root / 'loop')
    table = table_of('f\nx\n')
    assert table.files(['sub/../sub/a.png'], root) == [(root / 'sub' / 'a.png').resolve()]
    assert table.files([str(root / 'sub' / 'a.png')], root) == [(root / 'sub' / 'a.png').resolve()]
    for name in ('../secret.png', str(tmp_path / 'secret.png'), 'link.png'):
        with pytest.raises(DataError, match=r't\.csv, line 2: .* lies outside the folder .*root\. Move the image'):
            table.files([name], root)
    for name in ('b.png', 'sub', ''):
        with pytest.raises(DataError, match=rf"t\.csv, line 2: there is no image file '{name}' in .*Restore"):
            table.files([name], root)
    several = table_of('f\n' + 'x\n' * 13)
    with pytest.raises(DataError, match=r"line 2: .*'b\.png' in .* the row\. Nor are those of line 4, 14\.$"):
        several.files(['b.png', 'sub/a.png', 'b.png', *['sub/a.png'] * 9, 'c.png'], root)
    with pytest.raises(DataError, match=r' Nor are those of line 3, 4, 5, 6, 7, 8, 9, 10, 11, \.\.\.$'):
        several.files(['b.png'] * 13, root)
    for name in ('a\0.png', 'x' * 5000):
        with pytest.raises(DataError, match=r't\.csv, line 2: .* is not a usable path'):
            table.files([name], root)
    with pytest.raises(DataError, match=r'line 2: .*loop'):
        table.files(['loop/a.png'], root)


def result_or_message(call):
    try:
        return call(), None
    except DataError as e:
        return None, str(e)


@settings(deadline=None)  # a busy disk is no failure
@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda text: text.encode('utf-8', 'surrogatepass')),
                 st.text(alphabet='ab1.,"\n\r\0 ', max_size=40).map(str.encode)))
def test_any_bytes_give_a_table_or_a_data_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / 'fuzz.csv'
    path.write_bytes(content)
    table, message = result_or_message(lambda: read_table(path))
    if table is None:
        assert message.startswith(str(path))
        return
    assert len(table) == len(table.lines) >= 1
    assert all(len(row) == len(table.columns) == len(set(table.columns)) for row in table.rows)
    for read in (lambda name: table.numbers(name, 0, 1), lambda name: table.files(table.column(name), path.parent)):
        for name in table.columns:
            result, message = result_or_message(partial(read, name))
            assert result is not None or f'{path}, line ' in message


fields = st.text(st.characters(codec='utf-8', exclude_characters='\0'), max_size=12).map(str.strip)


@settings(deadline=None)  # a busy disk is no failure
@given(st.lists(fields, min_size=2, max_size=4, unique=True), st.data(), st.sampled_from(['\n', '\r\n']),
       st.sampled_from(['utf-8', 'utf-8-sig']))
def test_well_formed_tables_round_trip(tmp_path_factory, columns, data, newline, encoding):
    rows = data.draw(st.lists(st.lists(fields, min_size=len(columns), max_size=len(columns)), min_size=1, max_size=5))
    text = io.StringIO(newline='')
    csv.writer(text, lineterminator=newline, quoting=csv.QUOTE_ALL).writerows([columns, *rows])
    path = tmp_path_factory.getbasetemp() / 'trip.csv'
    path.write_bytes(text.getvalue().encode(encoding))
    table = read_table(path)
    assert table.columns == tuple(columns)
    assert table.rows == tuple(map(tuple, rows))


@settings(deadline=None)  # a busy disk is no failure
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_numbers_round_trip(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / 'numbers.csv'
    path.write_text('r\n' + ''.join(f'{value!r}\n' for value in values))
    assert np.array_equal(read_table(path).numbers('r', -5, 5), values)
