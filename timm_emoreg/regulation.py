"""The dual head: how an affective state changes a response, and how the two responses are balanced.

Symbols and shapes, for a batch of B images, D features, K affect outputs and C classes::

    h  = pre_logits(x)                       (B, D)  features of the backbone
    a  = A h + a0                            (B, K)  affect response
    e  = softmax(a) or tanh(a)               (B, K)  affective state
    z  = W h + b                             (B, C)  non-emotional response
    z' = W' [h * (1 + G e) + S e] + b'       (B, C)  emotionally-influenced response
    y  = (1 - r) z + r z'                    (B, C)  regulated response, r in [0, 1] the balance

The structure (affective pre-training, then a balance between a non-emotional and an emotionally-influenced response)
is that of Landi, Rodrigues, Chinnici, "Emotional regulation improves deep learning-based image classification",
arXiv 2606.13081, as its abstract states it. The modulation of features by a condition is FiLM (Perez et al. 2018,
arXiv 1709.07871). The formulas of the paper itself were not available; each choice here is an open one.
"""
from __future__ import annotations

import math
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ['AffectiveState', 'Balance', 'Modulation', 'Responses', 'check_balanced_in', 'check_regulation',
           'regulate']

AFFECT_KINDS = ('emotion', 'ratings')
EXPERIENCES = ('shared', 'separate')
BALANCED_IN = ('prediction', 'loss')


class Responses(NamedTuple):
    """Everything the dual head computes for a batch."""

    non_emotional: Tensor  # z (B, C)
    emotional: Tensor  # z' (B, C)
    affect: Tensor  # a (B, K)
    balance: Tensor  # r (B, 1)


def regulate(non_emotional: Tensor, emotional: Tensor, balance: Tensor) -> Tensor:
    """Balance two responses (or two losses): ``(1 - r) z + r z'``.

    Exact at both ends: r = 0 returns z, r = 1 returns z', bit for bit, for finite values.

    Args:
        non_emotional: z, shape (B, C), or a scalar loss.
        emotional: z', same shape.
        balance: r in [0, 1], shape (B, 1), or a scalar.
    """
    return (1 - balance) * non_emotional + balance * emotional


class AffectiveState(nn.Module):
    """The affective state e of an affect response a: (B, K) to (B, K).

    Args:
        kind: ``'emotion'``: categories, ``softmax(a)``, each row in [0, 1] with sum 1;
            ``'ratings'``: independent dimensions such as valence and arousal, ``tanh(a)`` in [-1, 1].
    """

    def __init__(self, kind: str):
        super().__init__()
        self.emotion = kind == 'emotion'

    def forward(self, affect: Tensor) -> Tensor:
        return affect.softmax(dim=-1) if self.emotion else affect.tanh()


class Modulation(nn.Module):
    """Feature modulation by the affective state (FiLM): ``h * (1 + G e) + S e``, (B, D) and (B, K) to (B, D).

    G and S start at zero, so that the emotionally-influenced response starts as an ordinary head.
    """

    def __init__(self, num_affect: int, num_features: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.gain = nn.Linear(num_affect, num_features, bias=False, **dd)
        self.shift = nn.Linear(num_affect, num_features, bias=False, **dd)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, features: Tensor, state: Tensor) -> Tensor:
        return features * (1 + self.gain(state)) + self.shift(state)


class Balance(nn.Module):
    """The balance r of each image, from its affective state: (B, K) to (B, 1).

    Args:
        balance: a number in [0, 1]: the same for every image, configuration and not state;
            ``'learned'``: one scalar, ``r = sigmoid(rho)``;
            ``'gate'``: one balance per image, ``r = sigmoid(g e + c)``: appraisal decides how much
                emotion to let through.
            Both learned forms start at 0.5.
            A number has the type of the state, which may have 16 bits under autocast: 0.3 is 0.3008 then.
        num_affect: K.
    """

    def __init__(self, balance: float | str, num_affect: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.kind = balance if isinstance(balance, str) else 'fixed'
        self.number = 0.0 if isinstance(balance, str) else float(balance)
        self.rho = nn.Parameter(torch.zeros((), **dd)) if self.kind == 'learned' else None
        self.gate = nn.Linear(num_affect, 1, **dd) if self.kind == 'gate' else nn.Identity()
        if self.kind == 'gate':
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, state: Tensor) -> Tensor:
        if self.kind == 'gate':
            return self.gate(state).sigmoid()
        if self.rho is not None:
            return self.rho.sigmoid().expand(state.shape[0], 1)
        return torch.full_like(state[:, :1], self.number)

    def extra_repr(self) -> str:
        return f'{self.kind} {self.number}' if self.kind == 'fixed' else self.kind


def check_balanced_in(balance: float | str, balanced_in: str) -> None:
    """Refuse to balance a learned or gated balance in the loss.

    Raises:
        ValueError: If that is what is asked for.
    """
    if balanced_in == 'loss' and isinstance(balance, str):
        raise ValueError(
            f"balance={balance!r} cannot be balanced in the loss: (1 - r) CE(z) + r CE(z') would only teach r to "
            "pick the smaller of the two losses. Use balanced_in='prediction', or a fixed number.")


def check_regulation(
        balance: float | str,
        num_affect: int,
        affect_kind: str,
        experience: str,
        balanced_in: str = 'prediction',
        keep_affect: float = 0.0,
        rehearsal: float = 0.0,
) -> None:
    """Refuse what cannot work, with the reason.

    Raises:
        ValueError: For an unknown choice, a balance outside [0, 1], an affective state that cannot vary, a learned or
            gated balance that is balanced in the loss, and a `keep_affect` or `rehearsal` that is negative or has
            nothing to keep.
    """
    for name, value, known in (
            ('affect_kind', affect_kind, AFFECT_KINDS),
            ('experience', experience, EXPERIENCES),
            ('balanced_in', balanced_in, BALANCED_IN),
    ):
        if value not in known:
            raise ValueError(f'{name}={value!r} is unknown, expected one of {", ".join(map(repr, known))}.')
    if isinstance(balance, str):
        if balance not in ('learned', 'gate'):
            raise ValueError(f"balance={balance!r} is unknown, expected a number in [0, 1], 'learned' or 'gate'.")
        check_balanced_in(balance, balanced_in)
    elif isinstance(balance, bool) or not isinstance(balance, Real):
        raise ValueError(f'balance={balance!r} is a {type(balance).__name__}. Give a number in [0, 1], '
                         "'learned' or 'gate'.")
    elif not 0 <= balance <= 1:
        raise ValueError(f'balance={balance!r} is outside [0, 1]: 0 is the non-emotional response alone, '
                         "1 the emotionally-influenced one. Give a number between them, 'learned' or 'gate'.")
    for name, weight in (('keep_affect', keep_affect), ('rehearsal', rehearsal)):
        if not 0 <= weight < math.inf:
            raise ValueError(f'{name}={weight!r} is no weight of a loss: give 0 for none, or more.')
        if weight and experience == 'separate':
            raise ValueError(f"{name}={weight!r} has nothing to keep: with experience='separate' the affect "
                             'response comes from a frozen stream. Leave one of the two out.')
    if isinstance(num_affect, bool) or not isinstance(num_affect, Integral):
        raise ValueError(f'num_affect={num_affect!r} is a {type(num_affect).__name__}. Give a whole number.')
    least = 2 if affect_kind == 'emotion' else 1
    if num_affect < least:
        why = 'softmax over one emotion is always 1' if num_affect == 1 else 'there is nothing to respond with'
        raise ValueError(f'num_affect={num_affect} is too small for affect_kind={affect_kind!r}: {why}. '
                         f'Give at least {least}.')
