"""Augmentation on the device: torchvision's operations for the same parameters, on whole batches."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as theirs

from alexnet_ddp.data import augment
from alexnet_ddp.data.augment import PCA_EIGENVALUES, PCA_VECTORS, Augment
from alexnet_ddp.data.randomness import Draws, draw
from alexnet_ddp.sections import AugmentSection

CPU = torch.device("cpu")
N, SIZE = 12, 33


def section(**changes: object) -> AugmentSection:
    """Nothing but what is asked for."""
    return AugmentSection(**{"flip": 0.0, "size": SIZE, **changes})  # type: ignore[arg-type]


def drawn(section: AugmentSection, n: int = N) -> Draws:
    return draw(np.arange(n), seed=0, epoch=1, flip=section.flip, rotation=section.rotation,
                color_jitter=section.color_jitter, pca_lighting=section.pca_lighting, erasing=section.erasing,
                size=SIZE, policy_ops=0 if section.policy == "none" else 2)


@pytest.fixture
def images() -> Tensor:
    """uint8 [n, s, s, 3]: blocks of colour, greys, black, white and primary colours among them."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8)
    pixels[1] = pixels[1, ..., :1]  # grey
    pixels[2, :10], pixels[2, 10:20], pixels[2, 20:] = 0, 255, (255, 0, 0)
    pixels[3] = np.repeat(np.repeat(random.integers(0, 256, (3, 3, 3)), 11, 0), 11, 1)
    return torch.from_numpy(pixels)


def planes(images: Tensor) -> Tensor:
    """What torchvision takes: float32 [n, c, s, s] in 0..1."""
    return images.permute(0, 3, 1, 2).float() / 255


def normalised(pixels: Tensor, section: AugmentSection) -> Tensor:
    return theirs.normalize(pixels, list(section.mean), list(section.std))


def close(found: Tensor, expected: Tensor, *, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= tolerance


def test_evaluation_only_normalises(images: Tensor) -> None:
    """Without draws a batch is normalised as torchvision does it and nothing else, whatever the recipe asks for."""
    wild = section(flip=1.0, rotation=90, color_jitter=[1, 1, 1, 0.5], pca_lighting=1)
    found = Augment(wild, channels=3, device=CPU)(images, None)
    close(found, normalised(planes(images), wild))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_flip(images: Tensor) -> None:
    """Exactly the images drawn for it are mirrored, left to right."""
    half = section(flip=0.5)
    draws = drawn(half)
    assert 0 < draws.flip.sum() < N
    found = Augment(half, channels=3, device=CPU)(images, draws)
    expected = torch.stack([theirs.horizontal_flip(image) if flip else image
                            for image, flip in zip(planes(images), draws.flip, strict=True)])
    close(found, normalised(expected, half))


@pytest.mark.parametrize("size", [32, 33, 224])
def test_rotate(size: int) -> None:
    """Each image turns by its own angle as in torchvision: nearest, black corners; under 1 % of pixels round off."""
    pixels = torch.rand(7, 3, size, size, generator=torch.Generator().manual_seed(0))
    degrees = torch.tensor([0.0, 10.0, -10.0, 45.0, 90.0, 179.0, -3.3])
    found = augment.rotate(pixels, degrees)
    expected = torch.stack([theirs.rotate(image, angle, InterpolationMode.NEAREST, fill=[0.0])
                            for image, angle in zip(pixels, degrees.tolist(), strict=True)])
    assert (found != expected).any(1).float().mean((1, 2)).max() < 0.01
    assert torch.equal(found[0], pixels[0])
    assert (found[3, :, 0, 0] == 0).all()  # a corner


def test_rotation_in_the_pipeline(images: Tensor) -> None:
    """The recipe's angle reaches the image: black corners are normalised as black is."""
    turned = section(rotation=45)
    draws = drawn(turned)
    found = Augment(turned, channels=3, device=CPU)(images, draws)
    expected = torch.stack([theirs.rotate(image, float(angle), InterpolationMode.NEAREST, fill=[0.0])
                            for image, angle in zip(planes(images), draws.angle, strict=True)])
    differing = ((found - normalised(expected, turned)).abs() > 1e-5).any(1).float().mean()
    assert differing < 0.01


@pytest.mark.parametrize(("ours", "reference", "factors"), [
    (augment.brightness, theirs.adjust_brightness, (0.0, 0.5, 1.0, 1.7, 3.0)),
    (augment.contrast, theirs.adjust_contrast, (0.0, 0.5, 1.0, 1.7, 3.0)),
    (augment.saturation, theirs.adjust_saturation, (0.0, 0.5, 1.0, 1.7, 3.0)),
    (augment.hue, theirs.adjust_hue, (-0.5, -0.17, 0.0, 0.1, 1 / 3, 0.5)),
], ids=["brightness", "contrast", "saturation", "hue"])
def test_colours(ours: object, reference: object, factors: tuple[float, ...], images: Tensor) -> None:
    """Brightness, contrast, saturation and hue are torchvision's for every factor, on greys, black and pure colours."""
    pixels = planes(images)
    for factor in factors:
        found = ours(pixels.clone(), torch.full((N, 1, 1, 1), factor))  # type: ignore[operator]
        close(found, reference(pixels, factor), tolerance=1e-5)  # type: ignore[operator]
    own = torch.linspace(min(factors), max(factors), N)  # each image its own
    found = ours(pixels.clone(), own.view(-1, 1, 1, 1))  # type: ignore[operator]
    expected = torch.stack([reference(image, float(f)) for image, f in zip(pixels, own, strict=True)])  # type: ignore
    close(found, expected, tolerance=1e-5)


def test_jitter_in_each_image_s_order(images: Tensor) -> None:
    """Colour jitter applies the four operations with each image's own factors, in each image's own order."""
    jittered = section(color_jitter=[0.4, 0.4, 0.4, 0.2])
    draws = drawn(jittered)
    operations = (theirs.adjust_brightness, theirs.adjust_contrast, theirs.adjust_saturation, theirs.adjust_hue)
    expected = []
    for image, factors, order in zip(planes(images), draws.jitter, draws.jitter_order, strict=True):
        for number in order:
            image = operations[number](image, float(factors[number]))
        expected.append(image)
    assert len(np.unique(draws.jitter_order, axis=0)) > 6
    found = Augment(jittered, channels=3, device=CPU)(images, draws)
    close(found, normalised(torch.stack(expected), jittered), tolerance=1e-4)


def test_only_the_operations_asked_for(images: Tensor) -> None:
    """A jitter of one operation leaves the three others out."""
    bright = section(color_jitter=[0.4, 0, 0, 0])
    draws = drawn(bright)
    expected = torch.stack([theirs.adjust_brightness(image, float(factor))
                            for image, factor in zip(planes(images), draws.jitter[:, 0], strict=True)])
    close(Augment(bright, channels=3, device=CPU)(images, draws), normalised(expected, bright))


def test_lighting(images: Tensor) -> None:
    """The 2012 paper's lighting adds sum of p_i a_i lambda_i to the colours of every pixel, the same over an image."""
    lit = section(pca_lighting=0.1)
    draws = drawn(lit)
    expected = planes(images).double()
    for row in range(N):
        for component in range(3):
            vector = torch.tensor([PCA_VECTORS[channel][component] for channel in range(3)], dtype=torch.float64)
            amount = float(draws.lighting[row, component]) * PCA_EIGENVALUES[component]
            expected[row] += (vector * amount)[:, None, None]
    close(Augment(lit, channels=3, device=CPU)(images, draws), normalised(expected, lit).float())
    vectors = np.asarray(PCA_VECTORS)
    assert np.abs(vectors.T @ vectors - np.eye(3)).max() < 1e-3  # eigenvectors, columns


def test_lighting_of_other_data(images: Tensor) -> None:
    """Eigenvalues and eigenvectors of a recipe are used in place of ImageNet's: one vector a row, as `data stats`
    prints them."""
    values, rows = (0.3, 0.02, 0.001), ((0.6, 0.8, 0.0), (-0.8, 0.6, 0.0), (0.0, 0.0, 1.0))
    lit = section(pca_lighting=0.1, pca_eigenvalues=values, pca_eigenvectors=rows)
    draws = drawn(lit)
    expected = planes(images).double()
    for image, amounts in zip(expected, draws.lighting.tolist(), strict=True):
        for amount, value, vector in zip(amounts, values, rows, strict=True):
            image += amount * value * torch.tensor(vector, dtype=torch.float64)[:, None, None]
    found = Augment(lit, channels=3, device=CPU)(images, draws)
    close(found, normalised(expected, lit).float())
    published = section(pca_lighting=0.1, pca_eigenvalues=PCA_EIGENVALUES,
                        pca_eigenvectors=np.transpose(PCA_VECTORS).tolist())
    assert torch.equal(Augment(published, channels=3, device=CPU)(images, draws),
                       Augment(section(pca_lighting=0.1), channels=3, device=CPU)(images, draws))


def test_erasing(images: Tensor) -> None:
    """The box of each image that has one is 0 after normalisation, as torchvision's erase makes it; all else stays."""
    boxed = section(erasing=0.6)
    draws = drawn(boxed)
    whole = Augment(section(), channels=3, device=CPU)(images, None)
    found = Augment(boxed, channels=3, device=CPU)(images, draws)
    assert 0 < draws.erased.any(1).sum() < N
    for image, mine, (top, left, height, width) in zip(whole, found, draws.erased.tolist(), strict=True):
        assert torch.equal(mine, theirs.erase(image, top, left, height, width, torch.zeros(1, 1, 1)))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(Augment(boxed, channels=3, device=CPU)(images, None), whole)  # evaluation sees all


def test_order_of_operations(images: Tensor) -> None:
    """All together: flip, rotation, colours, lighting, normalisation, in this order."""
    full = section(flip=0.5, rotation=30, color_jitter=[0.2, 0.2, 0.2, 0.1], pca_lighting=0.1)
    draws = drawn(full)
    pixels = torch.where(torch.from_numpy(draws.flip).view(-1, 1, 1, 1), planes(images).flip(-1), planes(images))
    pixels = augment.rotate(pixels, torch.from_numpy(draws.angle))
    operations = (theirs.adjust_brightness, theirs.adjust_contrast, theirs.adjust_saturation, theirs.adjust_hue)
    for row in range(N):
        for number in draws.jitter_order[row]:
            pixels[row] = operations[number](pixels[row], float(draws.jitter[row, number]))
    added = torch.from_numpy(draws.lighting) @ (torch.tensor(PCA_VECTORS) * torch.tensor(PCA_EIGENVALUES)).T
    close(Augment(full, channels=3, device=CPU)(images, draws), normalised(pixels + added[..., None, None], full),
          tolerance=1e-4)


def test_an_image_s_neighbours_don_t_matter(images: Tensor) -> None:
    """Augmented alone, in pieces or in a batch, an image comes out the same to the bit, and the input is untouched."""
    full = section(flip=0.5, rotation=30, color_jitter=[0.2, 0.2, 0.2, 0.1], pca_lighting=0.1, policy="randaugment",
                   erasing=0.5)
    draws, before = drawn(full), images.clone()
    transform = Augment(full, channels=3, device=CPU)
    whole = transform(images, draws)
    for cut in (slice(0, 1), slice(3, 8), slice(8, N)):
        assert torch.equal(transform(images[cut], draws[cut]), whole[cut])
    assert torch.equal(images, before)


def test_empty_batch() -> None:
    """A rank without samples gets an empty batch of the right shape through, in training and evaluation."""
    full = section(flip=0.5, rotation=30, color_jitter=[0.2, 0.2, 0.2, 0.1], pca_lighting=0.1, policy="randaugment",
                   erasing=0.5)
    for channels in (1, 3):
        transform = Augment(full, channels=channels, device=CPU)
        empty = torch.empty(0, SIZE, SIZE, channels, dtype=torch.uint8)
        for draws in (None, drawn(full, 0)):
            assert transform(empty, draws).shape == (0, channels, SIZE, SIZE)


def test_grey(images: Tensor) -> None:
    """A grey net's images go through every operation as the grey they are; saturation and hue leave them alone."""
    grey = images[..., :1].contiguous()
    plain = section()
    mean = float(np.dot(plain.mean, augment.GREY))
    std = float(np.dot(plain.std, augment.GREY))
    found = Augment(plain, channels=1, device=CPU)(grey, None)
    close(found, (planes(grey) - mean) / std)
    full = section(flip=0.5, rotation=30, color_jitter=[0.2, 0.2, 0.2, 0.1], pca_lighting=0.1)
    assert Augment(full, channels=1, device=CPU)(grey, drawn(full)).shape == (N, 1, SIZE, SIZE)
    faded = section(color_jitter=[0, 0, 0.9, 0.5])
    assert torch.equal(Augment(faded, channels=1, device=CPU)(grey, drawn(faded)), found)
    pixels = planes(grey)
    for factor in (0.5, 1.7):
        close(augment.contrast(pixels, torch.full((N, 1, 1, 1), factor)),
              theirs.adjust_contrast(pixels, factor), tolerance=1e-5)


def test_lighting_on_grey_is_the_luminance_of_that_on_colour() -> None:
    """A grey net's lighting is the luminance (BT.601) of what the same draws add to a colour image."""
    section = AugmentSection(pca_lighting=0.5, flip=0, mean=(0, 0, 0), std=(1, 1, 1))
    draws = draw(np.arange(4), seed=0, epoch=0, flip=0, rotation=0, color_jitter=(0, 0, 0, 0), pca_lighting=0.5)
    cpu = torch.device("cpu")
    colour = Augment(section, channels=3, device=cpu)(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), draws)
    grey = Augment(section, channels=1, device=cpu)(torch.zeros(4, 8, 8, 1, dtype=torch.uint8), draws)
    weights = torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    # the weights add up to 0.9999, which the grey std then holds
    torch.testing.assert_close((colour * weights).sum(1, keepdim=True), grey, rtol=2e-4, atol=1e-6)
    assert grey.abs().max() > 0.01
