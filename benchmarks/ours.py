"""Our loader as the trainer uses it: index, order, draws, decode threads, slots taken and released.

Flips are the device's, so no host work; so are crops and resizes of raw records. Every installed decoder with both
qualities of resize from a pack, the best free one also from a folder and from a tar in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from alexnet_ddp.config import Config
from alexnet_ddp.data.decoding.decode import create_decoder
from alexnet_ddp.data.feed import Feed, training_records
from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.training import open_data, training_works
from alexnet_ddp.errors import UserError
from benchmarks.trial import Case, Data, Options

NEEDS = ("alexnet_ddp", "torch", "numpy", "PIL", "simplejpeg", "cv2", "turbojpeg", "torchcodec")
DECODERS = ("turbojpeg", "nvimgcodec", "simplejpeg", "torchcodec", "pillow")  # best first
PLACES = ("pack", "folder", "tar")
QUALITIES = ("fast", "antialias")
STRIPS = "the 224 rows that each crop shows"
WHOLE = "whole records, the device crops and resizes"


def cases() -> list[Case]:
    found: list[Case] = []
    best = ""
    for decoder in DECODERS:
        for quality in QUALITIES:
            try:
                made = create_decoder(decoder, quality=quality)  # type: ignore[arg-type]
            except (UserError, ImportError):
                continue
            best = best or (decoder if decoder != "nvimgcodec" else "")
            for place in PLACES if decoder == best else ("pack",):
                found.append(Case(f"ours {decoder} {quality} {place}", "ours", ("original", "r256"), quality,
                                  f"{made.name} {made.version}", nvidia=decoder == "nvimgcodec",
                                  extra={"decoder": decoder, "place": place, "crop": "random_resized"}))
    for cache in ("none", "ram"):
        for crop, what in (("random", STRIPS), ("random_resized", WHOLE)):
            found.append(Case(f"ours raw cache={cache} crop={crop}", "ours", ("raw256",), "none", "none: pixels",
                              output=what, stored="raw256 pack",
                              extra={"decoder": "auto", "place": "pack", "crop": crop, "cache": cache}))
    return found


def config_of(case: Case, data: Data, options: Options) -> Config:
    where = {"folder": data.folder, "tar": data.tar, "pack": data.pack}[case.extra["place"]]
    if not where:
        raise UserError(f"there is no {data.name} pack")
    with open_index(where) as index:
        classes, stage = len(index.classes), index.stage
    quality = case.resize if case.resize in QUALITIES else "antialias"
    return Config.model_validate({
        "name": f"bench-{os.getpid()}", "runs": str(Path(options.work) / "runs"), "model": {"num_classes": classes},
        "data": {"train": where, "stored": stage, "threads": options.threads, "decoder": case.extra["decoder"],
                 "cache": case.extra.get("cache", "none"), "assignment": "owner"},
        "augment": {"crop": case.extra["crop"], "size": 224, "resize": quality},
        "global_batch": options.batch, "micro_batch": options.batch, "epochs": 1_000_000})


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    os.environ["ALEXNET_DDP_CACHE"] = str(Path(options.work) / "index")
    config = config_of(case, data, options)
    opened = open_data(config)
    try:
        decoder = create_decoder(config.data.decoder, quality=config.augment.resize)
        records = training_records(config, opened, rank=0, world=1, neighbours=[0], say=print)
        feed = Feed(config, records, opened.train.labels, decoder, crop=config.augment.crop,
                    device=torch.device("cpu"), threads=options.threads)
        try:
            with feed.loader(rows=options.batch) as loader:
                for batch in loader.run(training_works(config, opened, first_step=0, rank=0, world=1)):
                    count = len(batch.work.samples)
                    batch.release()
                    if config.data.cache == "none" or feed.cached == 1.0:  # a cache is timed once it is full
                        yield count
        finally:
            feed.close(finished=True)
    finally:
        opened.close()
