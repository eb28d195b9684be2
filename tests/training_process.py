"""train.py in processes of their own that start at once: they are forked from one that has imported torch already."""
from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from train_module import load_train

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['timm_emoreg.task', 'timm_emoreg.data.loader', 'timm.optim', 'timm.scheduler'])


def colours(root: Path, train: int, validation: int, test: int) -> Path:
    """A folder per part and class, with that many images: three colours that noise all but hides."""
    rng = np.random.default_rng(0)
    for part, count in (('train', train), ('validation', validation), ('test', test)):
        for i in range(count):
            name, colour = (('b', (120, 120, 130)), ('g', (120, 130, 120)), ('r', (130, 120, 120)))[i % 3]
            (root / part / name).mkdir(parents=True, exist_ok=True)
            pixels = np.clip(rng.normal(colour, 90, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / part / name / f'{i}.png')
    return root


def _train(out: Connection, argv: tuple, environment: dict[str, object], prepare: Callable | None) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    module = load_train()
    # to draw takes as long as to train so little
    module.draw_curves = lambda summary, picture, *_: picture.touch()
    if prepare is not None:
        prepare(module)
    sys.argv = ['train.py', *map(str, argv)]
    sys.exit(module.main())


class Training:
    """A run of train.py.

    Args:
        argv: Its arguments.
        prepare: A function of the module train.py, called in the process before the run, or None.
        environment: Added to the environment.
    """

    def __init__(self, *argv: object, prepare: Callable[[ModuleType], None] | None = None, **environment: object):
        out, there = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_train, args=(there, argv, environment, prepare), daemon=True)
        self.process.start()
        there.close()
        self._out = os.fdopen(os.dup(out.fileno()))
        self.text = ''

    def until(self, start: str) -> None:
        """Read what it prints up to the line that begins with `start`."""
        for line in self._out:
            self.text += line
            if line.startswith(start):
                return
        raise AssertionError(f'the run ended without a line {start!r}:\n{self.text}')

    def end(self) -> tuple[int, str]:
        """Wait for its end: the exit status, negative for a signal, and all that it printed."""
        self.text += self._out.read()
        self.process.join()
        return self.process.exitcode, self.text
