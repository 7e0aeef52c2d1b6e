"""torchvision's ImageFolder, Pillow and a DataLoader of worker processes: what nearly everyone uses, the baseline.

As in torchvision's references/classification (presets.py with backend="pil", train.py): RandomResizedCrop, flip,
PILToTensor, ConvertImageDtype(float), Normalize, default collation. `uint8` leaves flip, float and normalisation out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from benchmarks.trial import Case, Data, Options

NEEDS = ("torch", "torchvision", "PIL")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SETS = ("original", "r256")


def cases() -> list[Case]:
    return [Case("ImageFolder PIL float (baseline)", "torchvision", SETS, "antialias", "Pillow", output="float32",
                 extra={"float": True}),
            Case("ImageFolder PIL uint8", "torchvision", SETS, "antialias", "Pillow", extra={"float": False})]


def transform(*, to_float: bool) -> transforms.Compose:
    steps = [transforms.RandomResizedCrop(224, interpolation=InterpolationMode.BILINEAR, antialias=True)]
    if to_float:
        steps += [transforms.RandomHorizontalFlip(0.5), transforms.PILToTensor(),
                  transforms.ConvertImageDtype(torch.float), transforms.Normalize(MEAN, STD)]
    else:
        steps.append(transforms.PILToTensor())
    return transforms.Compose(steps)


def loader(dataset: Dataset, options: Options, **more: object) -> DataLoader:
    """A DataLoader whose epoch never ends: RandomSampler shuffles the images anew each time through."""
    torch.set_num_threads(1)
    return DataLoader(dataset, batch_size=options.batch, num_workers=options.threads,
                      sampler=RandomSampler(dataset, num_samples=100_000_000), **more)  # type: ignore[arg-type]


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    dataset = datasets.ImageFolder(data.folder, transform(to_float=case.extra["float"]))
    for images, _ in loader(dataset, options):
        yield len(images)
