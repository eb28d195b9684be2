from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import loopback_hub
import pytest
import timm
import torch
from releasing import COMMIT, NAME, alter, settings

import timm_emoreg
from timm_emoreg import weights, zoo
from timm_emoreg.emoreg import EmoReg
from timm_emoreg.files import sha256_of
from timm_emoreg.hub.card_lint import run_snippets
from timm_emoreg.hub.command import check, main, publish
from timm_emoreg.hub.finished_runs import ROOT, HubError
from timm_emoreg.hub.release import build
from timm_emoreg.zoo import HUB_FILE, read_records, write_records

# -- check -------------------------------------------------------------------------------------------------------------


def spoil(name, change):
    def do(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
    return do


@pytest.mark.parametrize(('damage', 'words'), [
    (spoil(HUB_FILE, lambda b: b[:-1] + bytes([b[-1] ^ 1])), 'sha256'),
    (spoil(HUB_FILE, lambda b: b[:-1]), 'bytes'),
    (lambda folder: (folder / HUB_FILE).unlink(), f'{HUB_FILE} is missing'),
    (lambda folder: (folder / 'README.md').unlink(), 'README.md is missing'),
    (lambda folder: (folder / 'pytorch_model.bin').write_bytes(b''), 'pytorch_model.bin does not belong there'),
    (spoil('config.json', lambda b: b.replace(b'"small_image": true', b'"small_image": 1')), 'config.json is not what'),
    (spoil('README.md', lambda b: b.replace(b'0.4', b'0.9')), 'README.md is not what the record says'),
    (spoil('README.md', lambda b: b.replace(b'license: cc-by-sa-4.0', b'license: mit')), 'allow cc-by-sa-4.0 only'),
])
def test_check_finds_damage(built, home, damage, words):
    damage(home / 'hub_cards' / NAME)
    assert words in '\n'.join(check(NAME, home, run=False))


@pytest.mark.parametrize(('changes', 'words'), [
    ({'licence': 'mit'}, 'allow cc-by-sa-4.0 only'),
    ({'metrics': {}}, 'the record holds no numbers'),
    ({'metrics': {'ccc': {'weight': float('nan'), 'n': 1, 'mean': 0.0, 'sd': None}}}, 'not finite'),
    ({'size': 5}, 'expected 5'),
    ({'affect_names': ('a', 'b'), 'model_args': {'num_affect': 2}}, 'shape'),
])
def test_check_finds_a_wrong_record(built, home, changes, words):
    if 'model_args' in changes:
        changes = {**changes, 'model_args': {**built.model_args, **changes['model_args']}}
    alter(home, **changes)
    assert words in '\n'.join(check(NAME, home, run=False))


def test_check_weighs_the_files(built, home, monkeypatch):
    monkeypatch.setattr('timm_emoreg.hub.command.WAITING_LIMIT', built.size - 1)
    assert 'bytes are too many for a waiting file' in '\n'.join(check(NAME, home, run=False))


def test_check_weighs_all_embedded_files_together(built, home, make_record, monkeypatch):
    records = home / 'timm_emoreg/assets/weights.json'
    others = [make_record(architecture='emoreg_vit_tiny', embedded=True, size=7),
              make_record(architecture='emoreg_resnet50', size=100)]  # the one that waits takes no room of the package
    write_records({weight.name: weight for weight in (replace(built, embedded=True), *others)}, records)
    words = f'{built.size + 7:,} bytes are too many embedded, at most {built.size + 6:,}'
    monkeypatch.setattr('timm_emoreg.hub.command.EMBEDDED_LIMIT', built.size + 6)
    assert words in check(NAME, home, run=False)
    monkeypatch.setattr('timm_emoreg.hub.command.EMBEDDED_LIMIT', built.size + 7)
    assert 'too many' not in '\n'.join(check(NAME, home, run=False))


def test_check_runs_the_snippets(built, home, monkeypatch):
    monkeypatch.setattr(EmoReg, 'forward_affect', lambda self, x: 1 / 0)
    assert 'snippet 1 fails: ZeroDivisionError' in '\n'.join(check(NAME, home))


# -- publish -----------------------------------------------------------------------------------------------------------


def test_dry_run_shows_everything_and_sends_nothing(hub, built, home, capsys):
    publish(NAME, home)
    out = capsys.readouterr().out
    for part in ('config.json', 'README.md', HUB_FILE):
        path = home / 'hub_cards' / NAME / part
        assert f'{path.stat().st_size:,} bytes  sha256 {sha256_of(path)}' in out
    assert 'dry run' in out
    assert not hub.requests
    assert read_records(home / 'timm_emoreg/assets/weights.json')[NAME].hub_commit is None


@pytest.mark.parametrize('commit', ['unknown', 'a' * 40 + '-dirty', ''])
def test_publish_refuses_a_dirty_record(hub, run, home, commit):
    build(NAME, [run()], home=home, commit=commit or 'unknown')
    alter(home, commit=commit)
    with pytest.raises(HubError, match=r'the record is dirty: .* train it in a clean checkout, or name the commit'):
        publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    assert not hub.requests


def test_publish_refuses_what_check_finds(hub, built, home):
    (home / 'hub_cards' / NAME / 'optimizer.pkl').write_bytes(b'')
    with pytest.raises(HubError, match='no pickles'):
        publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    assert not hub.requests


def test_push(hub, built, home, capsys, monkeypatch):
    weight = publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    repository = hub.repositories[built.hub_id]
    assert len(repository.commits) == 2  # the Hub's own first one, and one for all files
    files = repository.commits[weight.hub_commit]
    assert sorted(files) == ['.gitattributes', 'README.md', 'config.json', HUB_FILE]
    assert repository.tags == {f'v{timm_emoreg.__version__}-{built.sha256[:8]}': weight.hub_commit}
    assert weight.hub_commit in capsys.readouterr().out
    assert read_records(home / 'timm_emoreg/assets/weights.json')[NAME] == weight
    assert hub.count('GET', '/objects/') == 1  # fetched again

    card = files['README.md'].decode()
    assert f"'hf-hub:{built.hub_id}'" in card
    assert 'valence' in run_snippets(card)[0]  # as printed, from the Hub
    model = timm.create_model(f'hf-hub:{built.hub_id}@{weight.hub_commit}', pretrained=True)
    assert model.num_affect == 1

    monkeypatch.setitem(zoo.WEIGHTS, NAME, weight)
    layout = weights.layout_of(weight, 'test_resnet')
    found = weights.find_file(weight, layout, home / 'cache')
    assert found.read_bytes() == files[HUB_FILE]

    again = publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    assert again.hub_commit == weight.hub_commit
    assert len(repository.commits) == 2  # nothing new, no new commit


def test_push_of_a_newer_card_moves_the_tag(hub, built, home):
    first = publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    alter(home, seconds=3.0)
    assert main(['card', NAME, '--home', str(home)]) == 0
    second = publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    assert second.hub_commit != first.hub_commit
    assert list(hub.repositories[built.hub_id].tags.values()) == [second.hub_commit]


def test_a_dry_run_for_another_owner_writes_nothing(built, home, capsys):
    before = {path: path.read_bytes() for path in home.rglob('*') if path.is_file()}
    publish(NAME, home, organisation='someone')
    assert f'{NAME} -> someone/{NAME} (dry run' in capsys.readouterr().out
    assert {path: path.read_bytes() for path in home.rglob('*') if path.is_file()} == before


def test_a_build_for_another_owner_has_no_published_commit(run, home):
    build(NAME, [run()], home=home, commit=COMMIT)
    alter(home, hub_commit='b' * 40)
    again = run(folder=home.parent / 'again')  # gives the same bytes
    assert build(NAME, [again], home=home, commit=COMMIT).hub_commit == 'b' * 40
    other = build(NAME, [again], home=home, commit=COMMIT, organisation='other')
    assert (other.hub_id, other.hub_commit) == (f'other/{NAME}', None)


def test_push_under_another_owner(hub, built, home):
    weight = publish(NAME, home, push=True, organisation='someone', token=loopback_hub.TOKEN)
    assert list(hub.repositories) == [f'someone/{NAME}']
    assert f"'hf-hub:someone/{NAME}'" in (home / 'hub_cards' / NAME / 'README.md').read_text()
    assert read_records(home / 'timm_emoreg/assets/weights.json')[NAME] == weight


def test_a_push_that_fails_under_another_owner_leaves_record_and_card(hub, built, home, monkeypatch):
    before = {path: path.read_bytes() for path in home.rglob('*') if path.is_file()}

    def cut(*_, **__):
        raise ConnectionResetError('the cable')
    monkeypatch.setattr('timm_emoreg.hub.command.HfApi.create_commit', cut)
    with pytest.raises(HubError, match=r'could not be published, ConnectionResetError: the cable\. Nothing'):
        publish(NAME, home, push=True, organisation='someone', token=loopback_hub.TOKEN)
    assert {path: path.read_bytes() for path in home.rglob('*') if path.is_file()} == before


def test_the_commands_need_a_checkout(tmp_path, home, capsys):
    (home / 'train.py').unlink()  # as an installed package has none
    assert main(['table', '--home', str(home)]) == 2
    assert f'hub: {home} is no checkout of the project' in capsys.readouterr().err


def test_what_comes_back_with_other_bytes_is_not_recorded(hub, built, home):
    hub.fail('large', loopback_hub.sending(lambda data: bytes(len(data))))
    with pytest.raises(HubError, match=r'came back .* other bytes'):
        publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    assert hub.repositories[built.hub_id].tags == {}
    assert read_records(home / 'timm_emoreg/assets/weights.json')[NAME].hub_commit is None
    assert publish(NAME, home, push=True, token=loopback_hub.TOKEN).hub_commit


@pytest.mark.parametrize('token', [None, 'hf_stranger'])
def test_push_without_permission(hub, built, home, token):
    with pytest.raises(HubError, match=r'the Hub refuses.*hf auth login'):
        publish(NAME, home, push=True, token=token)
    assert not hub.repositories


def test_pushed_weight_loads_in_a_clean_process(hub, home, tmp_path):
    """With the real architecture, since a clean process knows of no other."""
    net = EmoReg('resnet18', num_classes=0, num_affect=1, affect_kind='ratings', small_image=True, img_size=32).eval()
    out = tmp_path / 'real' / 'affect'
    out.mkdir(parents=True)
    torch.save({'state_dict': net.state_dict(), 'task_state': {'target_kind': 'ratings', 'names': ['valence']}},
               out / 'model_best.pth.tar')
    (out.parent / 'args.json').write_text(json.dumps(settings('--task', 'affect')))
    (out / 'result.json').write_text(json.dumps({
        'task': 'affect', 'model': 'emoreg_resnet18', 'form': 'small', 'img_size': 32, 'data': 'emoji', 'metric': 'ccc',
        'validation': 0.1, 'test': {'ccc': 0.1}, 'seed': 0, 'seconds': 1.0}))
    built = build(NAME, [out], home=home, commit=COMMIT)
    publish(NAME, home, push=True, token=loopback_hub.TOKEN)
    script = ('import timm, torch, timm_emoreg\n'
              f'm = timm.create_model("hf-hub:{built.hub_id}", pretrained=True).eval()\n'
              'print(m.forward_affect(torch.ones(1, 3, 32, 32)).item())')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HOME': str(tmp_path / 'hf')}
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    net.load_state_dict({k: t.half() if t.is_floating_point() else t for k, t in net.state_dict().items()})
    with torch.no_grad():
        assert float(done.stdout) == pytest.approx(net.forward_affect(torch.ones(1, 3, 32, 32)).item(), rel=1e-5)


# -- command line ------------------------------------------------------------------------------------------------------


def test_command_line(run, home, capsys, tmp_path):
    place = ['--home', str(home)]
    assert main(['build', NAME, str(run()), '--commit', COMMIT, *place]) == 0
    assert 'sha256' in capsys.readouterr().out
    assert main(['check', '--all', *place]) == 0
    assert capsys.readouterr().out == f'{NAME}: good\n'
    assert main(['publish', NAME, *place]) == 0
    assert 'dry run' in capsys.readouterr().out
    assert main(['table', *place]) == 0
    table = capsys.readouterr().out.strip()
    assert NAME in table
    readme = tmp_path / 'README.md'
    readme.write_text('a\n<!-- weights -->\nold\n<!-- /weights -->\nb\n')
    assert main(['table', '--write', str(readme), *place]) == 0
    assert readme.read_text() == f'a\n<!-- weights -->\n{table}\n<!-- /weights -->\nb\n'
    readme.write_text('nothing')
    assert main(['table', '--write', str(readme), *place]) == 2
    assert 'README.md: holds no <!-- weights --> ... <!-- /weights --> to write between' in capsys.readouterr().err
    (home / 'hub_cards' / NAME / 'README.md').write_text('x')
    assert main(['check', NAME, *place]) == 1
    assert main(['publish', '--all', *place]) == 1
    assert 'is not published' in capsys.readouterr().err
    assert main(['check', 'emoreg_resnet18.faces', *place]) == 2
    assert f'Known: {NAME}' in capsys.readouterr().err
    assert main(['check', '--all', '--home', str(tmp_path)]) == 2
    for wrong in (['check'], ['publish', NAME, '--all'], []):
        with pytest.raises(SystemExit):
            main([*wrong, *place])
