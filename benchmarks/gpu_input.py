"""Input into AlexNet's real training step on a GPU: synthetic data there, host memory over PCIe, GPU-memory cache.

    python -m benchmarks.gpu_input --json result.json            # on the day there is a GPU: this one command
    python -m benchmarks.gpu_input --device cpu --quick          # does it work?

For each batch size, in one process on one GPU, interleaved in shuffled order over --rounds rounds:

    synthetic   uint8 images that lie on the device already: what the step alone takes
    ram         raw256 records in host memory -> the loader's pinned slots -> the device; random crops, flips there
    gpu         data.cache=gpu: the same records kept in the device's memory after they were sent once

Each goes through the trainer's own Feed, Transfer, Augment and Step (DDP of one rank, bf16). Ratios are to synthetic in
the same round. Records are noise of the right size unless --images names a raw pack: their bytes don't change the work.
The device is waited for before and after each trial, and at each 50th step, as the trainer's log does.

--jpegs WHERE also prints how many JPEGs a second the GPU's engine decodes, through nvImageCodec and through torchcodec
where they are installed. It is printed only: NVIDIA's terms for nvImageCodec (LICENSE.txt of its wheel, 2.11) forbid
telling others its performance without written permission, and the same engine is behind torchcodec's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_ddp import distributed
from alexnet_ddp.config import Config
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.caches.device_cache import DeviceCache
from alexnet_ddp.data.decoding import views
from alexnet_ddp.data.decoding.decode import create_decoder
from alexnet_ddp.data.decoding.stages import Stage
from alexnet_ddp.data.feed import Feed
from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.order import Order
from alexnet_ddp.data.randomness import draw, dropout_rows
from alexnet_ddp.data.records import Records, StoredRecords
from alexnet_ddp.data.training import Data, training_works
from alexnet_ddp.distributed import World
from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.loss import Targets
from alexnet_ddp.metrics import Window
from alexnet_ddp.models import create_model
from alexnet_ddp.optim import create_optimizer, create_scaler
from alexnet_ddp.step import MicroBatch, Step, wrap
from alexnet_ddp.words import Parser, answer
from benchmarks.pipeline import machine

SOURCES = ("synthetic", "ram", "gpu")
LOG_STEPS = 50


class Noise:
    """Raw records of random bytes in host memory."""

    def __init__(self, samples: int, side: int) -> None:
        self.stage = Stage("raw", side)
        self._pixels = np.random.default_rng(0).integers(0, 256, (samples, side * side * 3), dtype=np.uint8)
        self._bytes = torch.from_numpy(self._pixels).view(-1)

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, sample: int) -> bytes:
        return self._pixels[sample].tobytes()

    def read_into(self, sample: int, out: np.ndarray, start: int = 0) -> None:
        flat = out.reshape(-1)
        np.copyto(flat, self._pixels[sample, start:start + flat.size])

    def copy_into(self, samples: np.ndarray, starts: np.ndarray, out: torch.Tensor) -> bool:
        size = out.shape[1]
        records = self._bytes.as_strided((len(self._bytes) - size + 1, size), (1, 1))  # row i: the bytes from i on
        torch.index_select(records, 0, torch.from_numpy(samples * self._pixels.shape[1] + starts), out=out)
        return True

    def where(self, sample: int) -> str:
        return f"sample {sample} of the noise"


class Rig:
    """The net's step for one batch size, and what feeds it."""

    def __init__(self, options: argparse.Namespace, world: World, records: Records, samples: int, batch: int) -> None:
        self.batch, self.world, self._stack = batch, world, ExitStack()
        self.config = config = Config.model_validate({
            "name": "bench", "amp": options.amp, "global_batch": batch, "micro_batch": batch, "epochs": 10**6,
            "model": {"name": options.model, "width": options.width},
            "augment": {"crop": "random", "size": options.size},
            "data": {"stored": str(records.stage), "assignment": "owner", "threads": options.threads}})
        order = Order(samples, global_batch=batch, seed=0, shards=config.data.shards, identity="0" * 64)
        self._data = Data(None, None, order)  # type: ignore[arg-type]  # works need no index
        labels = np.random.default_rng(1).integers(0, config.model.num_classes, samples).astype(np.int32)
        net = create_model(config.model.name, num_classes=config.model.num_classes, in_channels=3,
                           width=config.model.width, dropout=config.model.dropout, image_size=options.size,
                           lrn_after=tuple(config.model.lrn_after))
        net = net.to(world.device).to(memory_format=torch.channels_last)
        self.step = Step(wrap(net, world.device), create_optimizer(net, config.optim),
                         create_scaler(config.amp, world.device), amp=config.amp, clip_norm=None, tick=lambda _: None)
        self.window = Window(LOG_STEPS, device=world.device)
        self.augment = Augment(config.augment, channels=3, device=world.device)
        self.kept = DeviceCache(np.arange(samples), side=records.stage.pixels, most_rows=batch, device=world.device,
                                limit=None)
        self._steps = 0
        self.sources: dict[str, Iterator[MicroBatch]] = {"synthetic": self._synthetic()}
        for name, cache in (("ram", None), ("gpu", self.kept)):
            self.sources[name] = self._from_loader(records, labels, cache, threads=options.threads)

    def _micro(self, images: torch.Tensor, labels: torch.Tensor, samples: np.ndarray, draws: Any) -> MicroBatch:
        rows = torch.from_numpy(dropout_rows(samples, seed=0, step=self._steps))
        return MicroBatch(self.augment(images, draws), Targets(labels), rows.to(self.world.device, non_blocking=True),
                          True)

    def _synthetic(self) -> Iterator[MicroBatch]:
        size, samples = self.config.augment.size, np.arange(self.batch)
        images = torch.randint(0, 256, (self.batch, size, size, 3), dtype=torch.uint8, device=self.world.device)
        labels = torch.randint(0, self.config.model.num_classes, (self.batch,), device=self.world.device)
        draws = draw(samples, seed=0, epoch=0, flip=0.5, rotation=0.0, color_jitter=(0, 0, 0, 0), pca_lighting=0.0)
        while True:
            yield self._micro(images, labels, samples, draws)

    def _from_loader(self, records: Records, labels: np.ndarray, cache: DeviceCache | None, *, threads: int
                     ) -> Iterator[MicroBatch]:
        feed = Feed(self.config, records, labels, create_decoder("auto"), crop="random", device=self.world.device,
                    threads=threads, kept=cache)
        loader = self._stack.enter_context(feed.loader(rows=self.batch))
        for batch in loader.run(training_works(self.config, self._data, first_step=0, rank=0, world=1)):
            images, targets = feed.transfer(batch)
            yield self._micro(images, targets, batch.work.samples, batch.work.draws)

    def take(self, name: str) -> int:
        """One step from a source; returns its images."""
        micro = next(self.sources[name])
        self.step([micro], lr=1e-4, planned=len(micro.targets.labels), window=self.window)
        self._steps += 1
        if self.window.full:
            self.window.summary()
        return len(micro.targets.labels)

    def trial(self, name: str, *, seconds: float, ramp: float) -> float:
        """Images a second."""
        began = time.perf_counter()
        while time.perf_counter() - began < ramp:
            self.take(name)
        self._wait()
        began, images = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            images += self.take(name)
        self._wait()
        return images / (time.perf_counter() - began)

    def fill(self) -> float:
        """Sends every record once; returns the share that the device keeps."""
        for _ in range(self._data.order.steps_per_epoch):
            self.take("gpu")
        self._wait()
        return self.kept.share

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        self._stack.close()


def measure(options: argparse.Namespace, world: World, records: Records, samples: int) -> list[dict[str, Any]]:
    """A row for each batch size and source."""
    rows = []
    for batch in options.batches:
        rig = Rig(options, world, records, samples, batch)
        try:
            kept = rig.fill()
            rates: dict[str, list[float]] = {name: [] for name in SOURCES}
            for number in range(-1, options.rounds):  # -1: warm-up
                for name in random.Random(number).sample(SOURCES, len(SOURCES)):
                    rate = rig.trial(name, seconds=options.seconds, ramp=options.seconds / 4)
                    if number >= 0:
                        rates[name].append(rate)
            for name in SOURCES:
                ratios = [rate / other for rate, other in zip(rates[name], rates["synthetic"], strict=True)]
                rows.append({"batch": batch, "source": name, "rate": statistics.median(rates[name]),
                             "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
                             "rates": rates[name], "kept": kept if name == "gpu" else None})
                told = "  {batch:6} {source:10} {rate:10,.0f} img/s  {ratio:5.2f}".format(**rows[-1])
                print(f"{told} ({min(ratios):.2f}-{max(ratios):.2f})"
                      + (f"  {kept:.0%} of the records on the device" if name == "gpu" else ""), flush=True)
        finally:
            rig.close()
    return rows


# --- the GPU's JPEG engine ------------------------------------------------------------------------------------------


def decode_nvimgcodec(files: list[bytes]) -> Callable[[], None]:
    from nvidia import nvimgcodec

    decoder = nvimgcodec.Decoder(device_id=0)

    def decode() -> None:
        if any(image is None for image in decoder.decode(files)):
            raise UserError("nvImageCodec could not decode all of the images on the GPU.")

    return decode


def decode_torchcodec(files: list[bytes]) -> Callable[[], None]:
    from torchcodec.decoders import decode_jpeg

    return lambda: decode_jpeg(files, device="cuda") and None  # type: ignore[func-returns-value]


def print_jpeg_rates(where: str, *, seconds: float, batch: int = 256) -> None:
    """Decode rates of the GPU in full, uncropped, on standard output only."""
    with open_index(where) as index:
        files = [index.read(row * len(index) // batch) for row in range(batch)]
    for name, make in (("nvImageCodec", decode_nvimgcodec), ("torchcodec", decode_torchcodec)):
        try:
            decode = make(files)
        except ImportError as error:
            print(f"JPEG on the GPU, {name}: not installed ({error.name})")
            continue
        for _ in range(3):
            decode()
        torch.cuda.synchronize()
        began, images = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            decode()
            images += batch
        torch.cuda.synchronize()
        print(f"JPEG on the GPU, {name}: {images / (time.perf_counter() - began):,.0f} img/s, full decode, {batch} a "
              "batch (printed only: see --help)")


# --- the command ----------------------------------------------------------------------------------------------------


def parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.gpu_input", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one trial, after a quarter of that as ramp")
    parser.add_argument("--samples", type=int, default=16_384, help="records of noise: 3.2 GB of raw256")
    parser.add_argument("--images", metavar="PACK", help="a raw pack instead of noise")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--model", default="alexnet_single")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--amp", choices=["none", "bf16", "fp16"], default="bf16")
    parser.add_argument("--jpegs", metavar="WHERE", help="photographs for the GPU's JPEG engine")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny net and a moment each: does it work?")
    return parser


def run(words: list[str]) -> int:
    options = parser().parse_args(words)
    if options.quick:
        options.batches, options.rounds, options.seconds, options.samples = [4, 8], 1, 0.05, 24
        options.width, options.size, options.threads = 0.05, 64, 2
    if options.device == "cpu":
        options.amp = "none"  # bf16 is emulated there
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("benchmarks.gpu_input measures a GPU, and torch finds none here. On a machine without: "
                        "--device cpu --quick shows that it works.")
    if min(options.batches) < 1 or max(options.batches) > options.samples:
        raise UserError(f"--batches must be from 1 to --samples ({options.samples}), got {options.batches}.")
    world = distributed.join(device=options.device, timeout=60)
    try:
        torch.backends.cudnn.benchmark = world.on_gpu
        with ExitStack() as stack:
            side = views.short_for(options.size)
            if options.images:
                index = stack.enter_context(open_index(options.images))
                if index.stage != f"raw{side}":
                    raise UserError(f"--images must be a pack of raw{side} for --size {options.size}, "
                                    f"{options.images} holds {index.stage}.")
                records: Records = StoredRecords(index, index.stage)
                samples = len(index)
            else:
                records, samples = Noise(options.samples, side), options.samples
            device = torch.cuda.get_device_name() if world.on_gpu else "CPU"
            print(f"{device}, {options.model}, {options.amp}, {records.stage} -> {options.size}, {options.threads} "
                  f"threads; ratio to synthetic: median of {options.rounds} (least-most)")
            rows = measure(options, world, records, samples)
        if options.jpegs and world.on_gpu:
            print_jpeg_rates(options.jpegs, seconds=options.seconds)
    finally:
        distributed.leave()
    if options.json:
        told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "machine": machine(),
                                            "options": told, "rows": rows}, indent=1) + "\n")
    return EXIT_FINISHED


def main() -> int:
    return answer(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
