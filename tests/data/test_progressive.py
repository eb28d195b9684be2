"""Progressive resizing: which size when, and that only the size of a batch changes."""
import numpy as np
import pytest
import torch
from PIL import Image

from timm_emoreg.data.loader import make_loader
from timm_emoreg.data.progressive import ProgressiveLoader, size_of_epoch
from timm_emoreg.data.sets import ImageSet, Target

CONFIG = {'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.25, 0.3)}


def make(size=(32, 32), **kwargs):
    images = np.random.default_rng(0).integers(0, 256, (10, *size, 3), dtype=np.uint8)
    images = ImageSet(images, torch.arange(10), Target('class', tuple('abcdefghij')))
    return make_loader(images, size, 4, CONFIG, training=True, seed=3, **kwargs)


@pytest.mark.parametrize(('epochs', 'start', 'sizes'), [
    (6, 16, [16, 20, 24, 28, 32, 32]),
    (5, 16, [16, 20, 24, 28, 32]),
    (3, 26, [26, 26, 32]),
    (2, 8, [8, 32]),
    (1, 16, [32]),
    (4, 32, [32, 32, 32, 32]),
])
def test_size_grows_to_the_final_one(epochs, start, sizes):
    assert [size_of_epoch(epoch, epochs, start, 32) for epoch in range(epochs)] == sizes


@pytest.mark.parametrize('epochs', range(1, 40))
def test_no_size_shrinks_and_the_last_epoch_has_the_final_one(epochs):
    sizes = [size_of_epoch(epoch, epochs, 10, 32) for epoch in range(epochs)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 32
    assert min(sizes) == (10 if epochs > 1 else 32)


@pytest.mark.parametrize('kind', ['resident', 'timm'])
@pytest.mark.parametrize('channels_last', [False, True])
def test_batches_are_those_of_the_loader_shrunk(kind, channels_last):
    options = {'kind': kind, 'workers': 0, 'channels_last': channels_last}
    plain, loader = make(**options), ProgressiveLoader(make(**options), 16, 3)
    assert len(loader) == len(plain) == 2
    for epoch, size in enumerate((16, 24, 32)):
        plain.set_epoch(epoch, 1)
        loader.set_epoch(epoch, 1)
        (expected, target), = plain
        (found, found_target), = loader
        assert found.shape == (4, 3, size, size)
        assert found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        assert torch.equal(found_target, target)
        # Pillow's filter is the same one, computed by another library
        twin = torch.stack([torch.stack([torch.from_numpy(np.array(Image.fromarray(channel.numpy()).resize(
            (size, size), Image.Resampling.BILINEAR))) for channel in image]) for image in expected])
        assert torch.allclose(found, twin, atol=1e-4)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(('size', 'start', 'message'), [
    ((32, 32), 4, r'start=4 must lie in 8\.\.32, for square images; these are 32x32'),
    ((32, 32), 36, r'start=36 must lie in 8\.\.32'),
    ((32, 24), 16, 'these are 32x24'),
])
def test_a_size_that_does_not_fit_is_refused(size, start, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveLoader(make(size), start, 2)
