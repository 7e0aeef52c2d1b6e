"""RandAugment and TrivialAugment: torchvision's pixels to the bit, for every operation, strength and sign."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from alexnet_ddp.data import policy
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.policy import NAMES, Policy
from alexnet_ddp.data.randomness import BINS, OPERATIONS, draw
from alexnet_ddp.sections import AugmentSection

CPU = torch.device("cpu")
THEIRS = {"randaugment": v2.RandAugment, "trivial": v2.TrivialAugmentWide}


def pictures(n: int, size: int, channels: int = 3) -> Tensor:
    """uint8 [n, s, s, c]: noise, smooth colours, one grey, one of a single value, one of few values."""
    random = np.random.default_rng(n)
    pixels = random.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    pixels[1::2] = np.linspace(20, 230, size).astype(np.uint8)[:, None, None] // np.array([1, 2, 3][:channels])
    pixels[2 % n], pixels[3 % n, :9] = 77, 200
    return torch.from_numpy(pixels)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of many small operations: a team of threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def every_draw(name: str, *, every: int) -> np.ndarray:
    """Draws [n, 3] of each operation and sign there is, in every so many of its bins."""
    bins = range(0, BINS, every) if name == "trivial" else [0]
    return np.array([(number, strength, sign) for number in range(OPERATIONS) for strength in bins for sign in (1, -1)])


def by_torchvision(image: Tensor, name: str, number: int, strength: int, sign: int, magnitude: int) -> Tensor:
    """The operation by torchvision's class itself, on uint8 [c, s, s], with the magnitude of its own table."""
    made = THEIRS[name]()
    operation = list(made._AUGMENTATION_SPACE)[number]
    table, signed = made._AUGMENTATION_SPACE[operation]
    found = table(31, *image.shape[-2:])
    chosen = 0.0 if found is None else float(found[strength if name == "trivial" else magnitude])
    return made._apply_image_or_video_transform(
        image, operation, sign * chosen if signed else chosen, interpolation=InterpolationMode.NEAREST, fill=made._fill)


@pytest.mark.parametrize(("channels", "size"), [(3, 33), (3, 64), (1, 32)])
@pytest.mark.parametrize(("name", "magnitude"), [("trivial", 9), ("randaugment", 0), ("randaugment", 9),
                                                 ("randaugment", 30)])
def test_every_operation_is_torchvision_s(name: str, magnitude: int, channels: int, size: int) -> None:
    """Each operation at each strength with each sign, all in one batch: torchvision's own result, to the bit; in other
    sizes and in grey at some strengths."""
    section = AugmentSection(size=size, policy=name, policy_magnitude=magnitude)
    draws = every_draw(name, every=1 if (channels, size) == (3, 33) else 6)
    images = pictures(len(draws), size, channels)
    found = Policy(section, device=CPU)(images, draws[:, None])
    changed = 0
    for image, mine, (number, strength, sign) in zip(images, found, draws.tolist(), strict=True):
        wanted = by_torchvision(image.permute(2, 0, 1), name, number, strength, sign, magnitude).permute(1, 2, 0)
        assert torch.equal(mine, wanted), (NAMES[number], strength, sign)
        changed += not torch.equal(mine, image)
    assert changed > len(draws) // (3 if magnitude else 9)


def test_at_the_size_of_imagenet() -> None:
    """At 224 pixels, too: rotations, shears, contrast and sharpness give torchvision's bits."""
    section = AugmentSection(size=224, policy="trivial")
    draws = np.array([(NAMES.index(name), strength, sign) for name in ("Rotate", "ShearX", "TranslateY", "Contrast",
                                                                       "Sharpness", "Equalize")
                      for strength, sign in ((13, 1), (29, -1))])
    images = pictures(len(draws), 224)
    for image, mine, drawn in zip(images, Policy(section, device=CPU)(images, draws[:, None]), draws.tolist(),
                                  strict=True):
        assert torch.equal(mine.permute(2, 0, 1), by_torchvision(image.permute(2, 0, 1), "trivial", *drawn, 9)), drawn


def test_names_are_torchvision_s() -> None:
    """Operations have torchvision's names and order, and its tables of strengths and signs."""
    for name, made in THEIRS.items():
        space = made._AUGMENTATION_SPACE
        assert tuple(space) == NAMES and len(NAMES) == OPERATIONS
        found = policy.strengths(name, size=96)
        for number, (table, signed) in enumerate(space.values()):
            theirs = table(BINS, 96, 96)
            assert found[number].tolist() == ([0.0] * BINS if theirs is None else theirs.double().tolist())
            assert signed == (number in policy.SIGNED)


def test_one_after_the_other() -> None:
    """RandAugment's operations follow each other on each image, in any mixture over a batch; alone the same bits."""
    section = AugmentSection(size=40, policy="randaugment", policy_ops=3, policy_magnitude=12)
    draws = draw(np.arange(64), seed=1, epoch=0, flip=0.0, rotation=0.0, color_jitter=(0, 0, 0, 0), pca_lighting=0.0,
                 policy_ops=3).policy
    images = pictures(64, 40)
    before, made = images.clone(), Policy(section, device=CPU)
    found = made(images, draws)
    assert torch.equal(images, before) and found.is_contiguous()
    for row in range(64):
        image = images[row].permute(2, 0, 1)
        for number, strength, sign in draws[row].tolist():
            image = by_torchvision(image, "randaugment", number, strength, sign, 12)
        assert torch.equal(found[row], image.permute(1, 2, 0)), draws[row].tolist()
        if row % 8 == 0:
            assert torch.equal(made(images[row:row + 1], draws[row:row + 1])[0], found[row])


def test_between_flip_and_the_rest() -> None:
    """The policy sees the mirrored uint8 image; colours, normalisation and erasing come after it."""
    settings = {"size": 40, "flip": 1.0, "policy": "trivial", "color_jitter": (0.4, 0, 0, 0), "erasing": 0.5}
    draws = draw(np.arange(12), seed=1, epoch=0, flip=1.0, rotation=0.0, color_jitter=(0.4, 0, 0, 0),
                 pca_lighting=0.0, policy_ops=1, erasing=0.5, size=40)
    images = pictures(12, 40)
    found = Augment(AugmentSection(**settings), channels=3, device=CPU)(images, draws)
    changed = Policy(AugmentSection(**settings), device=CPU)(images.flip(2), draws.policy)
    rest = AugmentSection(**{**settings, "policy": "none", "flip": 0.0})
    assert torch.equal(found, Augment(rest, channels=3, device=CPU)(changed, draws))
    assert found.is_contiguous(memory_format=torch.channels_last)
