"""MosaicML Streaming as in its documentation's vision examples: MDS shards, StreamingDataset, a torch DataLoader.

The `jpeg` column keeps a file's own bytes and gives a Pillow image; `torchvision.io` decodes a `bytes` column instead.
Epochs follow each other through one DataLoader with persistent workers; their seams are part of the figure.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.trial import Case, Data, Options

NEEDS = ("streaming", "torch", "torchvision")
COLUMN = {"Pillow": "jpeg", "torchvision.io": "bytes"}


def cases() -> list[Case]:
    return [Case(f"streaming {name}", "streaming", ("original", "r256"), "antialias", name,
                 stored=f"MDS, {column} column, the files' own bytes", extra={"decoder": name, "column": column})
            for name, column in COLUMN.items()]


def converted(case: Case, data: Data, options: Options) -> Path:
    column = case.extra["column"]
    folder = Path(options.work) / "converted" / "streaming" / f"{data.name}-{column}"
    if not (folder / "index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        classes = sorted(path.name for path in Path(data.folder).iterdir())
        with MDSWriter(out=str(folder), columns={"x": column, "y": "int"}) as writer:
            for path in sorted(Path(data.folder).glob("*/*")):
                image = Image.open(path) if column == "jpeg" else path.read_bytes()
                writer.write({"x": image, "y": classes.index(path.parent.name)})
    return folder


class Dataset(StreamingDataset):
    def __init__(self, folder: Path, *, decoder: str, batch: int) -> None:
        super().__init__(local=str(folder), shuffle=True, batch_size=batch)
        pillow = transforms.Compose([transforms.Lambda(rgb), transforms.RandomResizedCrop(224, antialias=True),
                                     transforms.PILToTensor()])
        tensor = transforms.Compose([decode, v2.RandomResizedCrop(224, antialias=True)])
        self._view: Any = pillow if decoder == "Pillow" else tensor

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        return self._view(sample["x"]), sample["y"]


def rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def decode(data: bytes) -> torch.Tensor:
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    torch.set_num_threads(1)
    folder = converted(case, data, options)
    clean_stale_shared_memory()
    dataset = Dataset(folder, decoder=case.extra["decoder"], batch=options.batch)
    loader = DataLoader(dataset, batch_size=options.batch, num_workers=options.threads, persistent_workers=True)
    while True:
        for images, _ in loader:
            yield len(images)
