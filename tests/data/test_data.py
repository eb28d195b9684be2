from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from timm_emoreg.data import DataError, default_data_dir, load_stimuli, load_target

READERS = {
    'emoji': ('load_emoji_stimuli', 'load_emoji_objects'), 'ferplus': ('load_ferplus',), 'oasis': ('load_oasis',),
    'nemo': ('load_nemo',), 'cifar': ('load_cifar',), 'own': ('load_folder', 'load_csv'),
}


@pytest.fixture
def calls(monkeypatch):
    """Replaces every reader by one that returns how it was called."""
    for module, functions in READERS.items():
        fake = types.ModuleType(module)
        for function in functions:
            setattr(fake, function, lambda *args, _name=function, **kwargs: (_name, *args, *kwargs.items()))
        monkeypatch.setitem(sys.modules, f'timm_emoreg.data.{module}', fake)


@pytest.mark.usefixtures('calls')
def test_stimuli_reach_their_reader(tmp_path):
    assert load_stimuli('emoji') == ('load_emoji_stimuli', ('labels', 'valence'))
    assert load_stimuli('emoji', 'D', 'group') == ('load_emoji_stimuli', ('labels', 'group'))
    assert load_stimuli('ferplus', 'D') == ('load_ferplus', 'D', 'majority')
    assert load_stimuli('ferplus', None, 'fer2013') == ('load_ferplus', None, 'fer2013')
    assert load_stimuli('oasis', 'D') == ('load_oasis', 'D', 'ratings')
    assert load_stimuli('nemo', 'D', 'speaker') == ('load_nemo', 'D', 'speaker')
    assert load_stimuli(str(tmp_path)) == ('load_folder', tmp_path)
    table = tmp_path / 'a.csv'
    table.touch()
    assert load_stimuli(str(table), rating_columns=['v'], rating_scale=(1, 7)) == ('load_csv', table, ['v'], (1, 7))


@pytest.mark.usefixtures('calls')
def test_targets_reach_their_reader(tmp_path):
    assert load_target('cifar10', 'D') == ('load_cifar', 'cifar10', 'D')
    assert load_target('cifar100') == ('load_cifar', 'cifar100', None)
    assert load_target('emoji', 'D') == ('load_emoji_objects',)
    assert load_target('oasis', 'D') == ('load_oasis', 'D', 'category')
    assert load_target(str(tmp_path)) == ('load_folder', tmp_path)


def test_own_folder_from_end_to_end(tmp_path):
    for name in ('anger', 'joy'):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new('RGB', (4, 4)).save(tmp_path / name / f'{i}.png')
    assert load_stimuli(str(tmp_path)).target.names == load_target(str(tmp_path)).target.names == ('anger', 'joy')


@pytest.mark.parametrize(('args', 'options', 'message'), [
    (('ferpluss',), {}, r"stimuli 'ferpluss' is unknown\. Known: 'emoji', 'ferplus', 'oasis', 'nemo'\. Did you mean "
                        r"'ferplus'\? Or give the path of a folder with a subfolder per emotion, or of a csv file"),
    (('NEMO',), {}, r"'NEMO' is unknown\..* Did you mean 'nemo'\?"),
    (('',), {}, r"stimuli '' is unknown.* there is none of that name"),
    (('cifar10',), {}, r'^cifar10: has no affective labels\. It can be a classification target; stimuli are emoji, '),
    (('x' * 5000,), {}, r"stimuli 'x{80}' is unknown"),
    (('faces/none.csv',), {}, r"^'faces/none\.csv': there is no such file or folder\. Correct the path, or put back"),
    (('ferplus', None, 'majorty'), {}, r"ferplus: labels 'majorty' is unknown\. Known: 'majority', .*'majority'\?"),
    (('emoji',), {'rating_columns': ['v']}, r'emoji: rating_columns and rating_scale belong to a csv file'),
    (('FOLDER',), {'rating_scale': (1, 7)}, r'rating_columns and rating_scale belong to a csv file'),
    (('FOLDER', None, 'valence'), {}, r"the labels 'valence' cannot be chosen for own data"),
    (('FOLDER/a.csv',), {'rating_columns': ['v']}, r'a\.csv: a csv needs rating_columns.*and rating_scale.*Give both'),
])
def test_stimuli_that_do_not_fit_are_refused(tmp_path, args, options, message):
    (tmp_path / 'a.csv').touch()
    with pytest.raises(DataError, match=message):
        load_stimuli(args[0].replace('FOLDER', str(tmp_path)), *args[1:], **options)


def test_unknown_target_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data set 'cifar-10' is unknown\. Known: 'cifar10', 'cifar100', 'emoji', "
                                        r"'oasis'\. Did you mean 'cifar10'\? Or give the path of a folder with a subf"):
        load_target('cifar-10')
    (tmp_path / 'a.csv').touch()
    with pytest.raises(DataError, match=r'a\.csv: a file is not a classification target'):
        load_target(str(tmp_path / 'a.csv'))


def test_default_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    cache = tmp_path / '.cache' / 'emoreg-data'
    for value, expected in (('', cache), ('~/sets', tmp_path / 'sets'), ('/a', Path('/a'))):
        monkeypatch.setenv('EMOREG_DATA', value)
        assert default_data_dir() == expected
    monkeypatch.delenv('EMOREG_DATA')
    assert default_data_dir() == cache
