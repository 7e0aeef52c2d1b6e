"""A trained net with all that is needed to use it: classes, preprocessing, tiles, load_model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from alexnet_ddp import load_model
from alexnet_ddp.data.decoding.decode import PillowDecoder
from alexnet_ddp.errors import UserError
from alexnet_ddp.trained import classes
from alexnet_ddp.trained.preprocessing import Preprocessing


def test_imagenet_names() -> None:
    """The 1000 WordNet ids are sorted, unlike, and stand at the places of torchvision's names."""
    names = classes.imagenet()
    assert list(names) == sorted(names) and len(names) == 1000
    assert names["n01440764"] == "tench" and names["n02124075"] == "Egyptian cat" and names["n15075141"] == (
        "toilet tissue")


def test_labels_of_some_of_the_classes() -> None:
    """Data with fewer classes, in another order, keep their meaning; a class that the net doesn't know is refused."""
    labels = np.array([0, 1, 1], np.int32)
    assert classes.mapped(labels, of=["dog", "ant"], to=["ant", "cat", "dog"], source="x").tolist() == [2, 0, 0]
    with pytest.raises(UserError, match="cow"):
        classes.mapped(labels, of=["dog", "cow"], to=["ant", "cat", "dog"], source="x")


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (300, 2000), (40, 60)])
def test_ten_crops_are_the_papers(size: tuple[int, int]) -> None:
    """The five views are torchvision's FiveCrop of the central square of short side 256, in its order, to the pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    import io

    held = io.BytesIO()
    image.save(held, "png")
    square = v2.CenterCrop(256)(v2.Resize(256)(image))
    expected = [np.asarray(crop) for crop in v2.FiveCrop(224)(square)]
    shown = np.empty((224, 224, 3), np.uint8)
    for choose, wanted in zip(Preprocessing(size=224, short=256).choose(crops=10), expected, strict=True):
        PillowDecoder(quality="antialias")(held.getvalue(), choose, shown)
        assert np.array_equal(shown, wanted)


def test_ten_crops_of_a_net_that_sees_whole_images() -> None:
    """Are refused, as is any number of crops but one and ten."""
    with pytest.raises(UserError, match="squashed"):
        Preprocessing(size=224, short=None).choose(crops=10)
    with pytest.raises(UserError, match="got 5"):
        Preprocessing(size=224, short=256).choose(crops=5)


def test_preprocessing_travels() -> None:
    """What is written beside a net reads back to the same."""
    one = Preprocessing(size=64, short=73, channels=1, resize="fast", mean=(0.1, 0.2, 0.3))
    assert Preprocessing.from_plain(one.plain()) == one


def test_probabilities_of_views_and_mirrors() -> None:
    """Ten crops: the mean of the ten softmaxes, five of them of mirrored images (float64 reference, 1e-6)."""
    model = load_model("alexnet_single", ["model.width=0.0625", "model.num_classes=7", "augment.size=64"])
    images = torch.randint(0, 256, (3, 5, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = model.net.double()
    shown = [view for place in range(5) for view in (images[:, place], images[:, place].flip(2))]
    expected = torch.stack([net(model.pixels(view).double()).softmax(1) for view in shown]).mean(0)
    model.net.float()
    assert torch.allclose(model.probabilities(images).double(), expected, atol=1e-6)
    assert model.notes and "fresh" in model.notes[0]
