"""torchvision's v2 transforms on uint8 tensors, with the decoders that its documentation names.

`decode_image` of torchvision.io (what references/classification's backend="tensor" uses) and torchcodec's decode_jpeg,
its successor; in DataLoader worker processes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torchvision import datasets
from torchvision.transforms import v2

from benchmarks.peers.torchvision_folder import SETS, loader
from benchmarks.trial import Case, Data, Options

NEEDS = ("torch", "torchvision")


def cases() -> list[Case]:
    found = [Case("torchvision v2, torchvision.io", "torchvision", SETS, "antialias", "torchvision.io decode_image",
                  extra={"decoder": "torchvision"})]
    if importlib.util.find_spec("torchcodec"):
        found.append(Case("torchvision v2, torchcodec", "torchvision", SETS, "antialias", "torchcodec decode_jpeg",
                          extra={"decoder": "torchcodec"}))
    return found


def read_torchvision(path: str) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(path, mode=ImageReadMode.RGB)


def read_torchcodec(path: str) -> torch.Tensor:
    from torchcodec.decoders import decode_jpeg

    data = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
    return decode_jpeg(data)


READ: dict[str, Callable[[str], torch.Tensor]] = {"torchvision": read_torchvision, "torchcodec": read_torchcodec}


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    transform = v2.Compose([v2.RandomResizedCrop(224, antialias=True)])
    dataset = datasets.ImageFolder(data.folder, transform, loader=READ[case.extra["decoder"]])  # type: ignore[arg-type]
    for images, _ in loader(dataset, options):
        yield len(images)
