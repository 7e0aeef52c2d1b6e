"""Our loader as the trainer uses it: index, order, draws, decode threads, slots taken and released. The flip is the
device's, so no host work. Every installed decoder with both qualities of resize; the default one from every place."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path

from alexnet_ddp.config import Config
from alexnet_ddp.data.decode import Decoder, create_decoder
from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.loader import Loader
from alexnet_ddp.data.training import open_data, training_works
from alexnet_ddp.errors import UserError
from benchmarks.trial import Case, Data, Options

NEEDS = ("alexnet_ddp", "torch", "numpy", "PIL", "simplejpeg", "cv2")
DECODERS = ("turbojpeg", "nvimgcodec", "simplejpeg", "torchcodec", "pillow")
PLACES = ("pack", "folder", "tar")
RESIZES = ("fast", "antialias")


def decoder_of(name: str, resize: str) -> Decoder:
    """Raises UserError where it isn't installed or doesn't know the resize."""
    if "resize" in inspect.signature(create_decoder).parameters:
        return create_decoder(name, resize=resize)
    if resize != "antialias":
        raise UserError("this version knows resize: antialias only")
    return create_decoder(name)


def cases() -> list[Case]:
    found: list[Case] = []
    best = ""
    for decoder in DECODERS:
        for resize in RESIZES:
            try:
                made = decoder_of(decoder, resize)
            except (UserError, ImportError):
                continue
            best = best or (decoder if decoder != "nvimgcodec" else "")
            places = PLACES if decoder == best else ("pack",)
            found += [Case(f"ours {decoder} {resize} {place}", "ours", ("original", "r256"), resize,
                           f"{made.name} {made.version}", nvidia=decoder == "nvimgcodec",
                           extra={"decoder": decoder, "place": place, "crop": "random_resized"}) for place in places]
    found.append(Case("ours raw crop", "ours", ("raw256",), "none", "none: pixels", stored="raw256 pack",
                      extra={"decoder": "auto", "place": "pack", "crop": "random", "resize": "antialias"}))
    found += [Case(f"ours raw random-resized {resize}", "ours", ("raw256",), resize, "none: pixels",
                   stored="raw256 pack", extra={"decoder": "auto", "place": "pack", "crop": "random_resized"})
              for resize in RESIZES if best]
    return found


def config_of(case: Case, data: Data, options: Options) -> Config:
    place = case.extra["place"]
    where = {"folder": data.folder, "tar": data.tar, "pack": data.pack}[place]
    if not where:
        raise UserError(f"there is no {data.name} pack")
    with open_index(where) as index:
        classes, stage = len(index.classes), index.stage
    resize = case.extra.get("resize", case.resize)
    return Config.model_validate({
        "name": "bench", "model": {"num_classes": classes},
        "data": {"train": where, "stored": stage, "threads": options.threads, "decoder": case.extra["decoder"]},
        "augment": {"crop": case.extra["crop"], "size": 224, "resize": resize},
        "global_batch": options.batch, "micro_batch": options.batch, "epochs": 1_000_000})


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    os.environ["ALEXNET_DDP_CACHE"] = str(Path(options.work) / "index")
    config = config_of(case, data, options)
    opened = open_data(config)
    try:
        with make_loader(config, opened.train, decoder_of(config.data.decoder, config.augment.resize)) as loader:
            for batch in loader.run(training_works(config, opened, first_step=0, rank=0, world=1)):
                count = len(batch.work.samples)
                batch.release()
                yield count
    finally:
        opened.close()


def make_loader(config: Config, index: object, decoder: Decoder, *, pin: bool = False) -> Loader:
    """As the trainer makes it."""
    return Loader(index, decoder, rows=config.micro_batch, size=config.augment.size,  # type: ignore[arg-type]
                  channels=config.model.in_channels, prefetch=config.data.prefetch, stored=config.data.stored,
                  threads=int(config.data.threads), pin=pin)
