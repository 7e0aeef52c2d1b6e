"""SPDL as its documentation builds pipelines: sampler, decode in threads, aggregate, one conversion a batch.

spdl.io decodes with FFmpeg; the random-resized crop is its `crop` and `scale` filters (bilinear, which swscale widens
when it shrinks), so that decode, crop and resize are one native call.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import spdl.io
from spdl.pipeline import PipelineBuilder

from benchmarks.trial import Case, Data, Options

NEEDS = ("spdl.io", "spdl.pipeline")


def cases() -> list[Case]:
    return [Case("SPDL", "SPDL", ("original", "r256"), "swscale bilinear", "FFmpeg (spdl.io)")]


def crop(width: int, height: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box: width, height, left, top."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return w, h, random.randint(0, width - w), random.randint(0, height - h)
    side = min(width, height)
    return side, side, (width - side) // 2, (height - side) // 2


def load(path: str) -> spdl.io.ImageFrames:
    packets = spdl.io.demux_image(path)
    w, h, x, y = crop(packets.width, packets.height)
    steps = f"crop={w}:{h}:{x}:{y}:exact=1,scale=224:224:flags=bilinear,format=pix_fmts=rgb24"
    return spdl.io.decode_packets(packets, filter_desc=steps)


def convert(frames: list[spdl.io.ImageFrames]) -> object:
    return spdl.io.to_numpy(spdl.io.convert_frames(frames))


class Endless:
    """The paths, shuffled anew each time through."""

    def __init__(self, folder: str) -> None:
        self._paths = sorted(str(path) for path in Path(folder).glob("*/*"))

    def __iter__(self) -> Iterator[str]:
        while True:
            yield from random.sample(self._paths, len(self._paths))


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    builder = PipelineBuilder().add_source(Endless(data.folder)).pipe(load, concurrency=options.threads)
    builder = builder.aggregate(options.batch).pipe(convert).add_sink(3)
    pipeline = builder.build(num_threads=options.threads)
    with pipeline.auto_stop():
        for images in pipeline:
            yield len(images)
