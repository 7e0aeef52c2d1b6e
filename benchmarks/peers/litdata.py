"""LitData as in its README: `optimize` beforehand, StreamingDataset with shuffle, StreamingDataLoader.

A Pillow JPEG image is stored as the file's own bytes and comes back as a tensor, decoded by torchvision.io where that
is installed. Epochs follow each other; their seams are part of the figure.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize
from PIL import Image
from torchvision.transforms import v2

from benchmarks.trial import Case, Data, Options

NEEDS = ("litdata", "torch", "torchvision")


def cases() -> list[Case]:
    return [Case("litdata", "litdata", ("original", "r256"), "antialias", "torchvision.io (its JPEG serializer)",
                 stored="its own chunks of 64 MB, the files' own bytes")]


def sample_of(item: tuple[str, int]) -> dict[str, Any]:
    return {"image": Image.open(item[0]), "class": item[1]}


def converted(data: Data, options: Options) -> Path:
    folder = Path(options.work) / "converted" / "litdata" / data.name
    if not (folder / "index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        classes = sorted(path.name for path in Path(data.folder).iterdir())
        items = [(str(path), classes.index(path.parent.name)) for path in sorted(Path(data.folder).glob("*/*"))]
        optimize(fn=sample_of, inputs=items, output_dir=str(folder), num_workers=options.threads, chunk_bytes="64MB")
    return folder


class Dataset(StreamingDataset):
    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), shuffle=True)
        self._view = v2.Compose([v2.RGB(), v2.RandomResizedCrop(224, antialias=True)])

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        return self._view(sample["image"]), sample["class"]


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    torch.set_num_threads(1)
    dataset = Dataset(converted(data, options))
    loader = StreamingDataLoader(dataset, batch_size=options.batch, num_workers=options.threads, drop_last=True,
                                 persistent_workers=True)
    while True:
        for images, _ in loader:
            yield len(images)
