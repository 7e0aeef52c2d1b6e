"""WebDataset as in its ImageNet recipe: shards, resampled, a shuffle buffer of 1000, batched in WebLoader's workers.

Decoded by Pillow (`decode("pil")`, its default) or by torchvision.io from the bytes, which is quicker.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.trial import Case, Data, Options

NEEDS = ("webdataset", "torch", "torchvision")
PER_SHARD = 500


def cases() -> list[Case]:
    return [Case(f"webdataset {name}", "webdataset", ("original", "r256"), "antialias", name,
                 stored=f"the files in shards of {PER_SHARD}", extra={"decoder": name})
            for name in ("torchvision.io", "Pillow")]


def converted(data: Data, options: Options) -> list[str]:
    folder = Path(options.work) / "converted" / "webdataset" / data.name
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        classes = sorted(path.name for path in Path(data.folder).iterdir())
        files = sorted(Path(data.folder).glob("*/*"), key=lambda path: (hash_of(path.name), path.name))
        with wds.ShardWriter(str(folder / "%06d.tar"), maxcount=PER_SHARD, verbose=0) as writer:
            for number, path in enumerate(files):
                writer.write({"__key__": f"{number:08d}", "jpg": path.read_bytes(),
                              "cls": classes.index(path.parent.name)})
        (folder / "complete").touch()
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def hash_of(name: str) -> int:
    """Mixes the classes, as its documentation asks for when shards are written."""
    import zlib

    return zlib.crc32(name.encode())


class FromBytes:
    def __init__(self) -> None:
        self._transform = v2.RandomResizedCrop(224, antialias=True)

    def __call__(self, data: bytes) -> torch.Tensor:
        pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self._transform(decode_image(pixels, mode=ImageReadMode.RGB))  # type: ignore[no-any-return]


def same(value: Any) -> Any:
    return value


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    torch.set_num_threads(1)
    dataset = wds.WebDataset(converted(data, options), resampled=True, shardshuffle=False).shuffle(1000)
    if case.extra["decoder"] == "Pillow":
        view: Any = transforms.Compose([transforms.RandomResizedCrop(224, antialias=True), transforms.PILToTensor()])
        dataset = dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(view, same)
    else:
        dataset = dataset.to_tuple("jpg", "cls").map_tuple(FromBytes(), int)
    loader = wds.WebLoader(dataset.batched(options.batch), batch_size=None, num_workers=options.threads)
    for images, _ in loader:
        yield len(images)
