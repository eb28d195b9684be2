"""Emotional regulation for timm: importing this package registers the models ``emoreg_*`` and ``emoreg``."""
__version__ = '0.1.0'

try:
    import torchvision as _torchvision  # noqa: F401  timm imports it too, with an error that hides the cause
except RuntimeError as e:
    if 'torchvision::nms' not in str(e):
        raise
    import torch as _torch
    raise ImportError(
        f'torch {_torch.__version__} and the installed torchvision do not fit each other ({e}). Reinstall the two '
        'together from one index: pip install --force-reinstall torch torchvision'
    ) from None

from . import emoreg_resnet, emoreg_vit
from .emoreg import EmoReg
from .regulation import Responses

BACKBONES = {**emoreg_resnet.BACKBONES, **emoreg_vit.BACKBONES}  # registered name -> timm's name of its backbone

__all__ = ['BACKBONES', 'EmoReg', 'Responses', '__version__', 'emoreg_resnet', 'emoreg_vit']
