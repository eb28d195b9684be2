"""The formulas, against sums written out by hand."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_emoreg.regulation import AffectiveState, Balance, Modulation, check_regulation, regulate

numbers = st.floats(-1e6, 1e6, width=32)
normal = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)  # of which a part has as many digits


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5))
def test_the_ends_of_the_balance_are_exact(pairs):
    z, z_emo = torch.tensor([pairs]).unbind(-1)
    assert torch.equal(regulate(z, z_emo, torch.zeros(1, 1)), z)
    assert torch.equal(regulate(z, z_emo, torch.ones(1, 1)), z_emo)


def check_between(z, z_emo, r, dtype):
    y = regulate(*(torch.tensor(value, dtype=dtype) for value in (z, z_emo, r))).item()
    slack = 1e-6 * (abs(z) + abs(z_emo))
    assert math.isclose(y, (1 - r) * z + r * z_emo, rel_tol=1e-5, abs_tol=slack)
    assert min(z, z_emo) - slack <= y <= max(z, z_emo) + slack


@given(numbers, numbers, st.floats(0, 1))
def test_the_balance_lies_between(z, z_emo, r):
    check_between(z, z_emo, r, torch.float64)  # which has the half of the smallest number of 32 bits, too


@given(normal, normal, st.floats(0, 1))
def test_the_balance_lies_between_in_32_bits(z, z_emo, r):
    check_between(z, z_emo, r, torch.float32)


def test_the_balance_of_each_image_is_its_own():
    y = regulate(torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[5., 6.], [7., 8.]]), torch.tensor([[0.], [0.25]]))
    assert torch.equal(y, torch.tensor([[1., 2.], [4., 5.]]))


def test_affective_state():
    a = torch.tensor([[0., math.log(3.)], [50., -50.]])
    torch.testing.assert_close(AffectiveState('emotion')(a), torch.tensor([[0.25, 0.75], [1., 0.]]))
    torch.testing.assert_close(AffectiveState('ratings')(a), torch.tensor([[0., 0.8], [1., -1.]]))


def test_modulation_starts_as_identity_and_is_film():
    h, e = torch.tensor([[1., -2., 3.]]), torch.tensor([[0.5, 2.]])
    film = Modulation(2, 3)
    assert torch.equal(film(h, e), h)
    with torch.no_grad():
        film.gain.weight.copy_(torch.tensor([[1., 0.], [0., 1.], [0., 0.]]))
        film.shift.weight.copy_(torch.tensor([[0., 0.], [0., 0.], [2., 1.]]))
    torch.testing.assert_close(film(h, e), torch.tensor([[1.5, -6., 6.]]))


@pytest.mark.parametrize(('balance', 'kind', 'parameters'), [
    (0.3, 'fixed', 0), (1, 'fixed', 0), ('learned', 'learned', 1), ('gate', 'gate', 5)])
def test_balance(balance, kind, parameters):
    state = torch.rand(3, 4)
    module = Balance(balance, 4)
    r = module(state)
    assert r.shape == (3, 1)
    assert torch.allclose(r, torch.tensor(0.5 if kind != 'fixed' else float(balance)))
    assert module.kind == kind
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_learned_and_gated_balance_follow_their_parameters():
    learned, gate = Balance('learned', 2), Balance('gate', 2)
    with torch.no_grad():
        learned.rho.fill_(math.log(3.))
        gate.gate.weight.copy_(torch.tensor([[math.log(3.), 0.]]))
    torch.testing.assert_close(learned(torch.zeros(2, 2)), torch.full((2, 1), 0.75))
    torch.testing.assert_close(gate(torch.tensor([[1., 5.], [-1., 5.]])), torch.tensor([[0.75], [0.25]]))


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(balance=1.01), r'balance=1.01 is outside \[0, 1\]'),
    (dict(balance=-0.1), 'outside'),
    (dict(balance=float('nan')), 'outside'),
    (dict(balance=None), r"balance=None is a NoneType. Give a number in \[0, 1\], 'learned' or 'gate'"),
    (dict(balance=True), 'balance=True is a bool. Give a number'),
    (dict(balance=torch.tensor(0.3)), r'balance=tensor\(0.3000\) is a Tensor. Give a number'),
    (dict(num_affect=2.5), 'num_affect=2.5 is a float. Give a whole number'),
    (dict(num_affect='8'), "num_affect='8' is a str"),
    (dict(balance='half'), "balance='half' is unknown.*'learned' or 'gate'"),
    (dict(balance='gate', balanced_in='loss'), 'cannot be balanced in the loss'),
    (dict(balance='learned', balanced_in='loss'), 'cannot be balanced in the loss'),
    (dict(affect_kind='mood'), "affect_kind='mood' is unknown, expected one of 'emotion', 'ratings'"),
    (dict(experience='none'), "expected one of 'shared', 'separate'"),
    (dict(balanced_in='head'), "expected one of 'prediction', 'loss'"),
    (dict(keep_affect=-0.5), 'keep_affect=-0.5 is no weight of a loss: give 0 for none, or more'),
    (dict(keep_affect=float('nan')), 'keep_affect=nan is no weight'),
    (dict(rehearsal=float('inf')), 'rehearsal=inf is no weight'),
    (dict(rehearsal=-1.0), 'rehearsal=-1.0 is no weight of a loss: give 0 for none, or more'),
    (dict(rehearsal=1.0, experience='separate'), "rehearsal=1.0 has nothing to keep: with experience='separate'"),
    (dict(keep_affect=1.0, experience='separate'), "nothing to keep: with experience='separate'"),
    (dict(num_affect=1), 'softmax over one emotion is always 1'),
    (dict(num_affect=0, affect_kind='ratings'), 'nothing to respond with'),
])
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_regulation(**{**dict(balance=0.5, num_affect=8, affect_kind='emotion', experience='shared'), **arguments})


@pytest.mark.parametrize('arguments', [
    dict(balance=0), dict(balance=1.0, balanced_in='loss'), dict(balance='gate', num_affect=1, affect_kind='ratings')])
def test_what_works_is_let_through(arguments):
    check_regulation(**{**dict(balance=0.5, num_affect=8, affect_kind='emotion', experience='shared'), **arguments})


def test_a_fixed_balance_has_the_precision_of_the_state():
    assert Balance(0.3, 1)(torch.zeros(1, 1, dtype=torch.bfloat16)).item() == 0.30078125
    assert Balance(0.3, 1)(torch.zeros(1, 1)).item() == pytest.approx(0.3)
