"""The terms of the data sets, and the licence that follows for a weight that was trained on them."""
from __future__ import annotations

from dataclasses import dataclass

from ..zoo import Weight

__all__ = ['STIMULI_TERMS', 'TARGET_TERMS', 'Terms', 'licence_terms']


@dataclass(frozen=True)
class Terms:
    """What is known of a data set, and what follows for a weight that was trained on it.

    Args:
        title: What it is.
        datasets: Its names in the metadata of a card.
        text: Its terms.
        licence: Identifier that the weight must have, None where the data set decides nothing.
        licence_name: Needed by the Hub where `licence` is ``other``.
        licence_link: Likewise.
        reason: Why this licence.
        faces: Whether it shows faces of people.
    """

    title: str
    datasets: tuple[str, ...]
    text: str
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    reason: str = ''
    faces: bool = False


STIMULI_TERMS = {
    'emoji': Terms(
        'drawings of emoji in three styles, rated by the tone of the tweets that used them',
        ('emoji-sentiment-ranking',),
        'Drawings: Noto Emoji (Apache-2.0), Twemoji (CC-BY 4.0), Fluent Emoji (MIT). Ratings: Emoji Sentiment Ranking '
        '1.0, Kralj Novak, Smailović, Sluban, Mozetič 2015, doi 10.1371/journal.pone.0144296 (CC BY-SA 4.0). The whole '
        'set, with its NOTICE, is in the package timm_emoreg.',
        'cc-by-sa-4.0',
        reason='The ratings, which every label comes from, are CC BY-SA 4.0. Whether a weight adapts its labels is not '
               'settled; the same licence is right either way, and the terms of the drawings allow it.'),
    'ferplus': Terms(
        'photographs of faces (FER2013) with the votes of FER+',
        ('ferplus',),
        'FER+ labels: MIT. The photographs of FER2013 were gathered by web search and have no licence.',
        'other', 'research-use-only-ferplus', 'https://github.com/microsoft/FERPlus',
        'The photographs have no licence, so the weight is for research only.', faces=True),
    'oasis': Terms(
        'photographs of scenes, objects, animals and people, rated for valence and arousal (OASIS)',
        ('oasis',),
        'OASIS, Kurdi, Lozano, Banaji 2017, doi 10.3758/s13428-016-0715-3: free to use and modify for research.',
        'other', 'research-use-only-oasis', 'https://doi.org/10.3758/s13428-016-0715-3',
        'The photographs are free for research, so the weight is for research only.'),
    'nemo': Terms(
        'log-mel spectrograms of acted Polish speech (nEMO)',
        ('amu-cai/nEMO',),
        'nEMO, Christop 2024: CC BY-NC-SA 4.0.',
        'cc-by-nc-sa-4.0',
        reason='The recordings are CC BY-NC-SA 4.0; the weight is shared alike.'),
}

TARGET_TERMS = {
    'cifar10': Terms('CIFAR-10', ('uoft-cs/cifar10',),
                     'CIFAR-10, Krizhevsky 2009: its makers state no licence.'),
    'cifar100': Terms('CIFAR-100', ('uoft-cs/cifar100',),
                      'CIFAR-100, Krizhevsky 2009: its makers state no licence.'),
    'emoji': Terms('drawings of emoji that are no stimuli, by Unicode\'s group', ('emoji',),
                   'Drawings: Noto Emoji (Apache-2.0), Twemoji (CC-BY 4.0), Fluent Emoji (MIT); the groups are '
                   'Unicode\'s (Unicode License v3).'),
    'oasis': Terms('photographs of OASIS, by category', ('oasis',),
                   'OASIS: free to use and modify for research.',
                   'other', 'research-use-only-oasis', 'https://doi.org/10.3758/s13428-016-0715-3'),
}


def licence_terms(weight: Weight) -> Terms:
    """The terms that decide the licence of a weight: those of its stimuli, which those of its target must allow.

    Raises:
        ValueError: If the terms of its stimuli or its target are not known, or contradict each other.
    """
    if weight.stimuli not in STIMULI_TERMS or (weight.target is not None and weight.target not in TARGET_TERMS):
        raise ValueError(f'{weight.name}: nothing is known of the terms of {weight.stimuli!r} and {weight.target!r}, '
                         'so no licence can be given to the weight. Only weights of '
                         f'{", ".join(STIMULI_TERMS)} can be released.')
    stimuli, target = STIMULI_TERMS[weight.stimuli], TARGET_TERMS.get(weight.target)
    if target is not None and target.licence not in (None, stimuli.licence):
        demanded = [terms.licence_name or terms.licence for terms in (stimuli, target)]
        raise ValueError(f'{weight.name}: the stimuli {weight.stimuli} demand {demanded[0]}, the target '
                         f'{weight.target} demands {demanded[1]}. No licence is sure to fulfil both, so such a weight '
                         'cannot be released. Take another target for these stimuli.')
    return stimuli
