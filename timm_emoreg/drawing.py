"""What all pictures share: colours, names that fit, files that appear as a whole or not at all."""
from __future__ import annotations

import warnings
from pathlib import Path

from .files import replacing

__all__ = ['BLUE', 'DPI', 'GREY', 'RESPONSES', 'VERMILLION', 'save', 'short']

# Okabe and Ito's colours, told apart by colour-blind readers, too; those of z and z' are the ones of the curves
BLUE, VERMILLION, GREY = '#0072B2', '#D55E00', '#BBBBBB'
RESPONSES = {'non_emotional': ('z, non-emotional', '#56B4E9'), 'emotional': ("z', emotional", '#009E73'),
             'regulated': ('y, regulated', '#000000')}
DPI = 110


def short(name: str, length: int) -> str:
    """A name for a picture: at most `length` characters, its middle left out, no line breaks and no formulas; bytes of
    a file name that are no text become question marks."""
    name = ' '.join(name.encode('utf-8', 'replace').decode().split())
    if len(name) > length:
        tail = length // 3
        name = f'{name[:length - tail - 1]}…{name[-tail:]}'
    return name.replace('$', r'\$')


def save(figure, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    with replacing(path) as part, warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # names in a script that the font lacks
        figure.savefig(part, format='png', dpi=DPI)
