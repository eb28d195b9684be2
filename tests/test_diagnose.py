"""What stage 2 left of stage 1: every number against one computed another way."""
import copy
import json
from dataclasses import replace

import pytest
import timm
import torch
from small_models import animals, build_trained

from timm_emoreg.answers import answer
from timm_emoreg.data import DataError, ImageSet, Target, load_target
from timm_emoreg.data.controls import ROTATIONS
from timm_emoreg.diagnose import affect_quality, diagnose, growth, main, similarity, with_constant_state


def stimuli_like(trained, n=9):
    names = trained.affect_names
    ratings = trained.model.affect_kind == 'ratings'
    targets = torch.rand(n, len(names)) * 2 - 1 if ratings else torch.arange(n) % len(names)
    pixels = torch.randint(0, 256, (n, 32, 32, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return ImageSet(pixels.numpy(), targets, Target('ratings' if ratings else 'class', names))


@pytest.mark.parametrize('kind', ['emotion', 'ratings'])
@pytest.mark.parametrize('experience', ['shared', 'separate'])
def test_constant_state_takes_away_what_differs_between_images(kind, experience):
    trained, shown = build_trained(affect_kind=kind, balance='gate', experience=experience), animals()
    model, own = trained.model, answer(trained, shown)[0]
    state = torch.tensor([0.2, 0.7, 0.1])
    found = with_constant_state(trained, shown, state, 'cpu')
    assert torch.equal(found.non_emotional, own.non_emotional)
    assert torch.equal(found.affect, own.affect)
    assert found.balance.std() < 1e-6
    assert own.balance.std() > 1e-4
    stream = model.backbone if model.backbone_emo is None else model.backbone_emo
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ('mean', 'std'))
    x = (torch.from_numpy(shown.images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        h = stream.forward_head(stream.forward_features(x), pre_logits=True)
        gain, shift = model.modulation.gain.weight @ state, model.modulation.shift.weight @ state
        torch.testing.assert_close(found.emotional, model.head_emo(h * (1 + gain) + shift), atol=1e-4, rtol=1e-4)
    assert torch.equal(answer(trained, shown)[0].emotional, own.emotional)  # the model is as it was


def test_quality_is_that_of_stage_1(trained_run, colours):
    from timm_emoreg.trained import trained_model

    test = load_target(str(colours)).test
    told = json.loads((trained_run / 'affect/result.json').read_text())['test']
    found = affect_quality(trained_model(trained_run / 'affect'), test, 'cpu')
    assert found == pytest.approx(told, abs=1e-3)


def test_a_model_that_stage_2_left_alone_kept_everything():
    trained = build_trained()
    before = {k: v.clone() for k, v in trained.model.state_dict().items()}
    found = diagnose(trained, before, stimuli_like(trained), animals())
    assert found['affect']['before'] == found['affect']['after']
    assert found['state']['moved'] == 0
    assert found['similarity']['before'] == found['similarity']['after'] != found['similarity']['untrained']
    assert found['state']['sd_before'] == found['state']['sd_after'] > 0
    assert found['balance'] == {'mean': 0.5, 'sd': 0.0}


def test_a_model_that_changed_is_compared_with_what_it_was():
    trained, stimuli, shown = build_trained(), stimuli_like(build_trained()), animals()
    before = {k: v.clone() for k, v in trained.model.state_dict().items()}
    then = answer(trained, shown)[0].state
    quality = affect_quality(trained, stimuli, 'cpu')
    with torch.no_grad():
        trained.model.head_affect.bias.add_(torch.tensor([3.0, 0.0, -3.0]))
    now = answer(trained, shown)[0]
    found = diagnose(trained, before, stimuli, shown)
    assert found['affect']['before'] == quality != found['affect']['after']
    moved = (now.state - then).abs().mean().item()
    assert moved > 0.1
    assert found['state']['moved'] == pytest.approx(moved, abs=1e-4)
    assert found['top1']['regulated'] == 100 * (now.regulated.argmax(1) == shown.targets).float().mean()
    assert (found['stimuli'], found['images']) == (9, 5)


def test_a_share_of_stage_1_is_what_stage_2_started_from():
    trained, shown, stimuli = build_trained(), animals(), stimuli_like(build_trained())
    model = trained.model
    with torch.no_grad():
        for p in model.affect_backbone.parameters():  # stage 1 let them grow
            p.mul_(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    own = answer(trained, shown)[0].regulated
    found = {share: diagnose(replace(trained, experience_share=share), before, stimuli, shown) for share in (1.0, 0.1)}
    assert torch.equal(answer(trained, shown)[0].regulated, own)  # the model is as it was
    assert found[1.0]['state']['moved'] == 0
    assert found[1.0]['growth']['before'] == found[1.0]['growth']['after'] == pytest.approx(3, rel=1e-3)
    assert found[0.1]['growth']['after'] == found[1.0]['growth']['after']
    # the weights that grew threefold were drawn as the fresh ones are, with seed 0
    assert found[0.1]['growth']['before'] == pytest.approx(0.1 * 3 + 0.9, rel=1e-3)
    assert found[0.1]['state']['moved'] > 0
    assert found[0.1]['similarity']['before'] != found[1.0]['similarity']['before']


@pytest.mark.parametrize('experience', ['shared', 'separate'])
def test_similarity_is_the_mean_cosine_of_different_images(experience):
    trained, shown = build_trained(experience=experience), animals()
    model = trained.model
    stream = model.backbone if experience == 'shared' else model.backbone_emo
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ('mean', 'std'))
    x = (torch.from_numpy(shown.images).permute(0, 3, 1, 2) / 255 - mean) / std
    forward_head = stream.forward_head
    with torch.no_grad():
        h = forward_head(stream.forward_features(x), pre_logits=True)
        middle = 0.99 * h.mean(dim=0)  # without it, features that are all positive are all alike
        h -= middle
    stream.forward_head = lambda features, pre_logits: forward_head(features, pre_logits=pre_logits) - middle
    pairs = torch.stack([torch.cosine_similarity(h[i], h[j], dim=0) for i in range(5) for j in range(5) if i != j])
    assert pairs.mean() < 0.9
    model.train()  # it is looked at as it answers, not as it learns
    assert similarity(model, shown, (32, 32), 'cpu') == pytest.approx(pairs.mean().item(), abs=1e-4)
    with pytest.raises(DataError, match='There is 1 image to look at, and how alike features of different'):
        similarity(model, shown.subset([0]), (32, 32), 'cpu')


def test_the_untrained_model_is_that_of_seed_0():
    shown, found = animals(), []
    for seed in (1, 2):
        trained = build_trained()
        before = {k: v.clone() for k, v in trained.model.state_dict().items()}
        torch.manual_seed(seed)
        found.append(diagnose(trained, before, stimuli_like(trained), shown)['similarity']['untrained'])
    torch.manual_seed(0)
    model = timm.create_model('emoreg', backbone='test_resnet', num_classes=4, num_affect=3, affect_kind='emotion')
    expected = similarity(model.eval(), shown, (32, 32), 'cpu')
    assert found == [expected] * 2
    torch.manual_seed(1)
    other = timm.create_model('emoreg', backbone='test_resnet', num_classes=4, num_affect=3, affect_kind='emotion')
    assert similarity(other, shown, (32, 32), 'cpu') != expected  # or this test could not fail


def test_features_that_are_all_zero_are_like_no_others():
    model = build_trained().model
    model.backbone.forward_head = lambda features, pre_logits: torch.zeros(len(features), model.num_features)
    assert similarity(model, animals(), (32, 32), 'cpu') == 0


@pytest.mark.parametrize('experience', ['shared', 'separate'])
def test_growth_is_that_of_the_largest_singular_values(experience):
    trained = build_trained(experience=experience)
    model, untrained = trained.model, copy.deepcopy(trained.model)
    assert growth(model, untrained) == 1
    if experience == 'separate':  # the other stream tells nothing of stage 1
        for p in model.backbone.parameters():
            torch.nn.init.ones_(p)
        assert growth(model, untrained) == 1
    stream = model.backbone if experience == 'shared' else model.backbone_emo
    matrices = [p for p in stream.parameters() if p.ndim > 1]
    with torch.no_grad():
        for p in stream.parameters():
            p += 0.1 * torch.randn_like(p)
    first = untrained.backbone if experience == 'shared' else untrained.backbone_emo
    ratios = [torch.linalg.svdvals(p.flatten(1))[0] / torch.linalg.svdvals(q.flatten(1))[0]
              for p, q in zip(matrices, (q for q in first.parameters() if q.ndim > 1), strict=True)]
    assert growth(model, untrained) == pytest.approx(torch.stack(ratios).quantile(0.5).item(), abs=2e-4)


def test_what_does_not_belong_together_is_refused():
    trained = build_trained()
    with pytest.raises(DataError, match='the stimuli ask for joy, fear, the affect response of a model gives joy, '):
        affect_quality(trained, stimuli_like(build_trained(names=('joy', 'fear'))), 'cpu')
    with pytest.raises(DataError, match=r'the images: 4 classes \(cat, .*\), where a model answers with 3 others'):
        diagnose(build_trained(num_classes=3), {}, stimuli_like(trained), animals())
    with pytest.raises(DataError, match='a model is the result of stage 1 and has no response to images'):
        diagnose(build_trained(num_classes=0), {}, stimuli_like(trained), animals())
    with pytest.raises(DataError, match=r'4 classes \(.*\), where a model answers with 4 others \(w, x, y, z\)'):
        diagnose(replace(trained, label_names=tuple('wxyz')), {}, stimuli_like(trained), animals())


def test_command(trained_run, colours, capsys):
    argv = [str(trained_run), '--experience', str(trained_run), '--stimuli', str(colours), '--dataset', str(colours)]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {'model', 'stimuli', 'images', 'affect', 'similarity', 'growth', 'state', 'constant_state',
                          'top1', 'balance'}
    assert found['growth']['before'] > 0
    assert found['state']['moved'] > 0
    assert main([str(trained_run / 'nothing'), *argv[1:]]) == 2
    assert capsys.readouterr().err.startswith('diagnose: ')
    assert main([*argv, '--device', 'abacus']) == 2
    assert capsys.readouterr().err.startswith('diagnose: --device abacus: torch cannot compute there (')
    assert main([*argv, '--stimuli-labels', 'rotation']) == 2  # is known, but not what this run learned
    assert 'the stimuli ask for 0 degrees, 90 degrees, ' in capsys.readouterr().err
    assert main([str(trained_run / 'affect'), *argv[1:3]]) == 2  # which has no --dataset of its own
    assert 'is the result of stage 1 and has no response to images. Give a run of' in capsys.readouterr().err


def test_rotations_are_drawn_as_in_stage_1(trained_run, monkeypatch):
    seeds = []
    monkeypatch.setattr('timm_emoreg.diagnose.predict_rotation', lambda stimuli, seed: seeds.append(seed) or stimuli)
    main([str(trained_run), '--stimuli-labels', 'rotation'])
    assert seeds == [json.loads((trained_run / 'args.json').read_text())['seed']] != [0]


def test_stimuli_images_and_stage_1_are_those_of_the_run(trained_run, colours, capsys, tmp_path):
    assert main([str(trained_run)]) == 0
    found = capsys.readouterr().out
    assert main([str(trained_run), '--experience', str(trained_run), '--stimuli', str(colours), '--dataset',
                 str(colours)]) == 0
    assert capsys.readouterr().out == found
    assert main([str(trained_run), '--stimuli-labels', 'rotation']) == 2  # the run's stimuli, with other labels
    assert 'the stimuli ask for 0 degrees, 90 degrees, ' in capsys.readouterr().err
    stage_2 = torch.load(trained_run / 'emoreg/model_best.pth.tar', weights_only=False)
    stage_2['args'].experience = 'none'
    torch.save(stage_2, tmp_path / 'random.pth.tar')
    assert main([str(tmp_path / 'random.pth.tar')]) == 2
    assert 'started from no stage 1 that could be compared with it. Give a run' in capsys.readouterr().err
    stage_2['args'].experience = str(trained_run)
    for pretrained, status in ((False, 0), (True, 2)):
        stage_2['args'].experience_share, stage_2['args'].pretrained_backbone = 0.2, pretrained
        torch.save(stage_2, tmp_path / 'share.pth.tar')
        assert main([str(tmp_path / 'share.pth.tar')]) == status
    assert ('share.pth.tar: started from a share of stage 1 mixed with the pretrained weights of its backbone, which a '
            'run does not keep. Give one of all of stage 1 or without --pretrained-b') in capsys.readouterr().err
    stage_1 = torch.load(trained_run / 'affect/model_best.pth.tar', weights_only=False)
    stage_1['args'].shuffle_stimuli_labels = True
    torch.save(stage_1, tmp_path / 'shuffled.pth.tar')
    assert main([str(trained_run), '--experience', str(tmp_path / 'shuffled.pth.tar')]) == 2
    assert 'shuffled.pth.tar: does not tell its stimuli, or had shuffled labels. Give --stim' in capsys.readouterr().err


def test_every_number_is_of_the_response_and_of_the_weights_that_it_names():
    trained, stimuli, shown = build_trained(balance='gate'), stimuli_like(build_trained()), animals(80)
    before = {k: v.clone() for k, v in trained.model.state_dict().items()}
    then = answer(trained, shown)[0]
    with torch.no_grad():
        trained.model.head_affect.weight.mul_(3)
        trained.model.modulation.shift.weight.mul_(20)
        now = answer(trained, shown)[0]
        for head, z in ((trained.model.head, now.non_emotional), (trained.model.head_emo, now.emotional)):
            head.bias.sub_(z.mean(dim=0))  # untrained, they answer all images alike
    now = answer(trained, shown)[0]
    constant = with_constant_state(trained, shown, now.state.mean(dim=0), 'cpu').regulated

    def top1(response):
        return round(100 * (response.argmax(1) == shown.targets).double().mean().item(), 2)

    found = diagnose(trained, before, stimuli, shown)
    expected = {name: top1(getattr(now, name)) for name in ('non_emotional', 'emotional', 'regulated')}
    changed = int((constant.argmax(1) != now.regulated.argmax(1)).sum())
    assert len({*expected.values(), top1(constant)}) == 4  # or this test could not fail
    assert found['top1'] == expected
    assert found['constant_state'] == {'top1': top1(constant), 'changed': changed}
    assert 0 < changed < 80
    sd = {name: answers.state.std(dim=0, correction=0).mean().item()
          for name, answers in (('sd_before', then), ('sd_after', now))}
    assert sd['sd_after'] > sd['sd_before'] + 1e-3
    assert {name: found['state'][name] for name in sd} == pytest.approx(sd, abs=1e-4)


def test_the_command_leaves_the_test_parts_unseen(trained_run, colours, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr('timm_emoreg.diagnose.diagnose', lambda *args: seen.extend(args[2:4]) or {})
    assert main([str(trained_run), '--experience', str(trained_run), '--stimuli', str(colours), '--dataset',
                 str(colours)]) == 0
    assert main([str(trained_run), '--stimuli-labels', 'rotation']) == 0
    unseen = load_target(str(colours)).test.images
    assert [images.images for images in seen] == [load_target(str(colours)).validation.images] * 4
    assert not {*unseen} & {*seen[0].images}
    assert seen[2].target.names == ROTATIONS
