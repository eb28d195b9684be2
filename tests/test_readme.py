"""What README.md says to type, links to and lists is there as it stands."""
import re
import shlex
from pathlib import Path

import pytest

from timm_emoreg.hub import command as hub
from timm_emoreg.hub.card_lint import run_snippets
from timm_emoreg.study import command as study

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'

pytestmark = pytest.mark.skipif(not README.is_file(), reason='an installed package has no README beside it')


@pytest.fixture(scope='module')
def text():
    return README.read_text(encoding='utf-8')


def commands(text, program):
    """The arguments of each call of a program, in tables and blocks."""
    lines = re.findall(rf'python {re.escape(program)}((?: [^`|\n&]+)?)', text)
    return [[word for word in shlex.split(line, comments=True) if word != '...'] for line in lines]


def test_the_python_blocks_run(text, trained_run):
    printed = run_snippets(text, {"'output/RUN'": repr(str(trained_run))})
    assert len(printed) == text.count('```python') == 5
    assert printed[0] == 'torch.Size([2, 10]) torch.Size([2, 8]) 0.5\n'


def test_the_commands_of_train_py_are_taken(text, train, trained_run):
    calls = [call for call in commands(text, 'train.py') if '--device-modules' not in call]  # that is timm's script
    assert len(calls) > 12
    for call in calls:
        found = [word.replace('output/RUN', str(trained_run)) for word in call]
        if found:
            train.parse_args(found)


@pytest.mark.parametrize(('module', 'least'), [(study, 2), (hub, 4)])
def test_the_commands_of_the_package_are_taken(text, module, least):
    calls = commands(text, f'-m {module.__package__}')
    for call in calls:
        module._parser().parse_args(call[:call.index('--')] if '--' in call else call)
    assert len(calls) >= least


def modules(folder):
    return {p.name for p in folder.glob('*.py')} - {'__init__.py', '__main__.py'}


def test_every_file_has_its_subject(text):
    rows = re.findall(r'^\| `.*', text[text.index('| file | subject |'):text.index('## Limits')], re.MULTILINE)
    package = ROOT / 'timm_emoreg'
    listed = [name for row in rows for name in re.findall(r'`(\w+(?:\.py|/))`', row.split(' | ')[0])]
    folders = {f'{p.name}/' for p in package.iterdir() if (p / '__init__.py').is_file()}
    assert sorted(listed) == sorted(modules(package) | folders)
    inside = {row[3:row.index('/')]: re.findall(r'`(\w+\.py)`', row) for row in rows if '/` |' in row}
    assert inside.pop('data') == ['sets.py']  # its readers are told by the table of the sets
    for name, told in inside.items():
        assert sorted(told) == sorted(modules(package / name)), name


@pytest.mark.parametrize('page', ['README.md', 'hub_cards/RESULTS.md', 'hub_cards/WALK.md', 'hub_cards/study/README.md',
                                  'hub_cards/study/recipes.md'])
def test_links_lead_somewhere(page):
    if not (ROOT / 'hub_cards').is_dir():
        pytest.skip('the cards are not part of a source distribution')

    def anchors(path):
        titles = re.findall(r'^#+ (.*)$', path.read_text(encoding='utf-8'), re.MULTILINE)
        return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}

    here = ROOT / page
    links = re.findall(r'\]\(([^)]+)\)', here.read_text(encoding='utf-8'))
    for link in links:
        if not link.startswith('https://'):
            path, _, anchor = link.partition('#')
            target = (here.parent / path).resolve() if path else here
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
