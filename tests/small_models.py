"""Models, images and answers small enough for a test."""
import timm
import torch

from timm_emoreg import EmoReg
from timm_emoreg.data import ImageSet, Target
from timm_emoreg.trained import Trained

BACKBONES = {'test_resnet': {}, 'test_vit': {'img_size': 32}}


def create(backbone='test_resnet', **kwargs) -> EmoReg:
    torch.manual_seed(0)
    return timm.create_model('emoreg', backbone=backbone, **{'num_classes': 5, **BACKBONES.get(backbone, {}), **kwargs})


def images(batch=2, chans=3, size=32):
    return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(1))


def stir(model):
    """Random values where the model starts at zero, so that every part shows in the output."""
    torch.manual_seed(2)
    with torch.no_grad():
        for part in (model.modulation, model.regulation, model.head_affect):
            for p in part.parameters() if part is not None else ():
                p.normal_(std=0.3)
    return model


def build_trained(backbone='test_resnet', names=('joy', 'fear', 'anger'), num_classes=4, **kwargs) -> Trained:
    torch.manual_seed(0)
    model = timm.create_model('emoreg', backbone=backbone, num_classes=num_classes, num_affect=len(names),
                              img_size=32 if 'vit' in backbone else None, small_image='vit' in backbone,
                              **{'affect_kind': 'emotion', **kwargs}).eval()
    for parameter in model.parameters():  # G, S and the gate start at zero
        if not parameter.any():
            parameter.data.normal_(std=0.3)
    return Trained('a model', model, (32, 32), names, ('cat', 'dog', 'cow', 'bee')[:num_classes])


def animals(n=5, size=32) -> ImageSet:
    pixels = torch.randint(0, 256, (n, size, size, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return ImageSet(pixels.numpy(), torch.arange(n) % 4, Target('class', ('cat', 'dog', 'cow', 'bee')))
