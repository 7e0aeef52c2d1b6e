"""FFCV as in its ImageNet recipe: a .beton written before, RandomResizedCropRGBImageDecoder, order RANDOM, os_cache.

JPEG sets are written as its README's `write_imagenet.sh 500 1.0 90` does: JPEG of quality 90, at most 500 pixels a
side. Images of r256 are re-encoded at their own size. raw256 is written as raw pixels of the central 256 x 256.
FFCV resizes with OpenCV's INTER_AREA.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import ffcv
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import Squeeze, ToTensor
from ffcv.writer import DatasetWriter
from torchvision import datasets, transforms

from benchmarks.trial import Case, Data, Options

NEEDS = ("ffcv", "torch", "torchvision")


def cases() -> list[Case]:
    return [Case("FFCV jpg", "FFCV", ("original", "r256"), "cv2 INTER_AREA", "FFCV (libjpeg-turbo, full)",
                 stored="its own JPEG, quality 90, at most 500 a side", extra={"mode": "jpg"}),
            Case("FFCV raw random-resized", "FFCV", ("raw256",), "cv2 INTER_AREA", "none: pixels",
                 stored="its own raw 256 x 256", extra={"mode": "raw"})]


def converted(case: Case, data: Data, options: Options) -> Path:
    path = Path(options.work) / "converted" / "ffcv" / f"{data.name}.beton"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = case.extra["mode"] == "raw"
        view = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(256)]) if raw else None
        field = RGBImageField(write_mode="raw") if raw else RGBImageField(write_mode="jpg", max_resolution=500,
                                                                         jpeg_quality=90)
        unfinished = path.with_suffix(".tmp")
        writer = DatasetWriter(str(unfinished), {"image": field, "label": IntField()}, num_workers=options.threads)
        writer.from_indexed_dataset(datasets.ImageFolder(data.folder, view))
        os.replace(unfinished, path)
    return path


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    assert ffcv.__version__
    loader = Loader(str(converted(case, data, options)), batch_size=options.batch, num_workers=options.threads,
                    order=OrderOption.RANDOM, os_cache=True, drop_last=True, pipelines={
                        "image": [RandomResizedCropRGBImageDecoder((224, 224)), ToTensor()],
                        "label": [IntDecoder(), ToTensor(), Squeeze()]})
    while True:
        for images, _ in loader:
            yield len(images)
