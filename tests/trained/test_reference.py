"""Against torchvision itself: its AlexNet's logits, and the ten crops of real photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

import photographs
from alexnet_ddp import load_model
from alexnet_ddp.data.decoding.decode import open_upright
from alexnet_ddp.trained.pictures import find_pictures
from alexnet_ddp.trained.prediction import classify

PHOTOGRAPHS = 100


def test_torchvisions_alexnet(tmp_path: Path) -> None:
    """torchvision's AlexNet through load_model, by a file as PyTorch's ImageNet example saves it: bit-equal logits.

    In the memory format that we use: in the other one torch itself differs from that in the last bits.
    """
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet(num_classes=12).eval()
    torch.save({"arch": "alexnet", "state_dict": theirs.state_dict()}, tmp_path / "alexnet.pth.tar")
    images = torch.randint(0, 256, (3, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    model = load_model(tmp_path / "alexnet.pth.tar")
    pixels = v2.functional.normalize(v2.functional.to_dtype(images.permute(0, 3, 1, 2), scale=True),
                                     [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(model.pixels(images), pixels, rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = theirs.to(memory_format=torch.channels_last)(model.pixels(images))
    assert torch.equal(model.logits(images), expected)
    assert expected.std() > 0 and model.name == "torchvision:alexnet"


def test_ten_crops_of_photographs() -> None:
    """Ten-crop probabilities of 100 photographs are those of torchvision's Resize, CenterCrop and TenCrop, to 1e-6."""
    tar = photographs.archive("imagenet-sample.tar")
    model = load_model("alexnet_torchvision", ["model.width=0.0625", "model.num_classes=9", "data.decoder=pillow"])
    pictures = find_pictures([f"{tar}::train"], stored="original").first(PHOTOGRAPHS)
    assert len(pictures) == PHOTOGRAPHS
    with torch.no_grad():
        model.net.classifier[-1].weight.mul_(30.0)  # fresh weights hardly tell photographs apart
    ten = v2.Compose([v2.Resize(256), v2.CenterCrop(256), v2.TenCrop(224)])
    seen = set()
    for sample, answer in enumerate(classify(model, pictures, top=9, crops=10)):
        image: Image.Image = open_upright(pictures.read(sample), channels=3)
        crops = torch.stack([v2.functional.to_image(crop) for crop in ten(image)])
        pixels = v2.functional.normalize(v2.functional.to_dtype(crops, scale=True), model.preprocessing.mean,
                                         model.preprocessing.std)
        with torch.no_grad():
            expected = model.net(pixels).softmax(1).double().mean(0).numpy()
        found = np.zeros(9)
        for guess in answer.guesses:
            found[int(guess.label)] = guess.probability
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        seen.add(round(float(expected.max()), 5))
    assert len(seen) > PHOTOGRAPHS / 2  # photographs do differ to this net
