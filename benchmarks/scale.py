"""How index and order fare at the size of ImageNet: time and memory, each figure from fresh processes.

    python benchmarks/scale.py [--json scale.json]

open         an index of 1,281,167 samples from the cache, imports not counted
permutation  of 14,197,122 samples (ImageNet-21k): the whole of it as one array
batch        the order and all draws of a global batch of 256, at three places of an epoch of 1,281,167
first        from opening the index to the first decoded batch of 256 (224 x 224, all cores), at three places
epochs       two whole epochs of a rank's work over 1,281,167 samples
scan         headers of a tar of tars as ImageNet's own, in the page cache: the images are holes

Growth is that of the process's resident memory over what it was after the imports; peak is its highest.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_ddp.data.index import Index, index_cache, open_index
from alexnet_ddp.data.index.sources import find_source, stamp_of
from alexnet_ddp.data.index.table import Table
from alexnet_ddp.data.order import Order, permutation

IMAGENET, IMAGENET_21K = 1_281_167, 14_197_122  # samples
CLASSES = 1000
BYTES = 110_000  # of an image
PHOTOGRAPHS = 16  # different ones, whose bytes all samples share
LONG_AGO = 1_600_000_000  # a time of change that is settled
PLACES = (0, 50, 99)  # per cent of an epoch

Figures = dict[str, float]


# --- material ---------------------------------------------------------------------------------------------------


def imagenet_like(samples: int = IMAGENET, *, classes: int = CLASSES) -> Table:
    """A table with ImageNet's names (n01440764_10026), as one tar of tars would give it."""
    labels = np.arange(samples, dtype=np.int64) * classes // samples
    wnids = [f"n{1_440_764 + 7919 * label:08d}" for label in range(classes)]
    within = np.arange(samples) - np.searchsorted(labels, labels)
    stems: list[str] = []
    for wnid, count in zip(wnids, np.bincount(labels).tolist(), strict=True):
        stems += sorted(f"{wnid}_{37 * place % 99_991}" for place in range(count))
    joined, ends = "".join(stems).encode(), np.cumsum(np.fromiter(map(len, stems), np.int64, len(stems)))
    return Table(
        classes=tuple(wnid.encode() for wnid in wnids), suffixes=(b".JPEG",), base=b"", class_in_path=True,
        class_suffix=b".tar", labels=labels.astype(np.int32),
        offsets=(labels + 1) * 1024 + (labels * (samples // classes) + within) * (BYTES + 512),
        sizes=np.full(samples, BYTES, np.int32), containers=np.zeros(samples, np.uint8),
        suffix_codes=np.zeros(samples, np.uint8), name_ends=ends.astype(np.uint32),
        names=np.frombuffer(joined, dtype=np.uint8))


def keep_imagenet(folder: Path, *, samples: int = IMAGENET) -> Path:
    """A hole of a tar whose index lies in the cache below `folder`; returns the tar."""
    tar = folder / "ILSVRC2012_img_train.tar"
    table, images = imagenet_like(samples), photographs(PHOTOGRAPHS)
    starts = np.cumsum([0, *map(len, images)])
    with open(tar, "wb") as file:
        file.write(b"".join(images))
        file.truncate(samples * (BYTES + 1024))
    os.utime(tar, (LONG_AGO, LONG_AGO))
    which = np.arange(samples) % PHOTOGRAPHS  # every sample is one of these
    table = replace(table, offsets=starts[which], sizes=np.diff(starts)[which].astype(np.int32))
    source = find_source(str(tar))
    problem = index_cache.store(index_cache.cache_path(source, folder / "cache"), source,
                                (table, [stamp_of(str(tar))], []))
    assert problem is None, problem
    return tar


def photographs(count: int) -> list[bytes]:
    """JPEGs of the size of ImageNet's, 500 x 375 and about BYTES long: noise that falls with frequency."""
    random, made = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        pixels += random.integers(-12, 13, pixels.shape)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
        made.append(file.getvalue())
    return made


def nested_tar(path: Path, *, classes: int, each: int, first: int = 0, size: int = BYTES) -> Path:
    """A tar of class tars, from class number `first`, with real headers and holes for images; old enough to cache."""

    def header(name: str, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)

    with open(path, "wb") as file:
        for number in range(first, first + classes):
            wnid, start = f"n{1_440_764 + 7919 * number:08d}", file.tell()
            file.seek(tarfile.BLOCKSIZE, os.SEEK_CUR)
            for place in range(each):
                file.write(header(f"{wnid}_{37 * place % 99_991}.JPEG", size))
                file.seek(-(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, os.SEEK_CUR)
            end = file.seek(2 * tarfile.BLOCKSIZE, os.SEEK_CUR)
            file.seek(start)
            file.write(header(f"{wnid}.tar", end - start - tarfile.BLOCKSIZE))
            file.seek(end)
        file.truncate(file.tell() + 2 * tarfile.BLOCKSIZE)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


# --- what is measured, each in a process of its own --------------------------------------------------------------


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start_peak() -> int:
    """From here on `peak` tells the most that is held; returns what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_open(folder: Path) -> Figures:
    before, began = start_peak(), time.perf_counter()
    index = open_index(str(folder / "ILSVRC2012_img_train.tar"), cache_dir=folder / "cache")
    seconds = time.perf_counter() - began
    assert index.cache.startswith("read from") and index.name(7).startswith("n01440764/n01440764_")
    return {"seconds": seconds, "growth_mb": (resident() - before) / 1e6, "peak_mb": (peak() - before) / 1e6,
            "columns_mb": index.table.nbytes / 1e6}


def measure_permutation(folder: Path) -> Figures:
    permutation(1000, 1)
    before, began = start_peak(), time.perf_counter()
    found = permutation(IMAGENET_21K, 5)
    seconds = time.perf_counter() - began
    figures = {"seconds": seconds, "peak_mb": (peak() - before) / 1e6}
    seen = np.zeros(IMAGENET_21K, dtype=bool)
    seen[found] = True
    assert seen.all()
    return figures


def _order() -> Order:
    return Order(IMAGENET, global_batch=256, seed=0, shards=64, identity="5" * 64)


def measure_batch(folder: Path) -> Figures:
    from alexnet_ddp.data.randomness import draw

    order, figures = _order(), {}

    def batch(step: int) -> float:
        began = time.perf_counter()
        draw(order.batch(step), seed=0, epoch=order.plan(step).epoch, flip=0.5, rotation=0.0,
             color_jitter=(0.4, 0.4, 0.4, 0.1), pca_lighting=0.1)
        return (time.perf_counter() - began) * 1000

    first = batch(3 * order.steps_per_epoch)
    for place in PLACES:
        step = 40 * order.steps_per_epoch + order.steps_per_epoch * place // 100
        figures[f"at_{place}_ms"] = statistics.median(batch(step + number) for number in range(50))
    return {"very_first_ms": first, **figures}


def measure_first(folder: Path) -> Figures:
    import torch

    from alexnet_ddp.config import apply_overrides, build
    from alexnet_ddp.data.decoding.decode import create_decoder
    from alexnet_ddp.data.feed import Feed
    from alexnet_ddp.data.records import StoredRecords
    from alexnet_ddp.data.training import Data, training_works

    config = build(apply_overrides({}, ["name=scale", "data.train=there", "epochs=90", "global_batch=256",
                                        "micro_batch=256"]))
    figures = {}
    for place in PLACES:
        began = time.perf_counter()
        index = open_index(str(folder / "ILSVRC2012_img_train.tar"), cache_dir=folder / "cache")
        data = Data(train=index, val=None, order=Order(len(index), global_batch=256, seed=0, shards=64,
                                                       identity=index.identity))
        feed = Feed(config, StoredRecords(index, "original"), index.labels, create_decoder("auto"),
                    crop="random_resized", device=torch.device("cpu"), threads=len(os.sched_getaffinity(0)))
        step = 40 * data.order.steps_per_epoch + data.order.steps_per_epoch * place // 100
        with feed.loader(rows=256) as loader:
            batch = next(loader.run(training_works(config, data, first_step=step, rank=0, world=1)))
            figures[f"at_{place}_seconds"] = time.perf_counter() - began
            assert batch.work.step == step and batch.images.float().std() > 10
        data.close()
    return figures


def measure_epochs(folder: Path, *, steps: int | None = None) -> Figures:
    """`steps` at the beginning of each of two epochs, all unless told otherwise."""
    from alexnet_ddp.config import apply_overrides, build
    from alexnet_ddp.data.training import Data, training_works

    index = open_index(str(folder / "ILSVRC2012_img_train.tar"), cache_dir=folder / "cache")
    config = build(apply_overrides({}, ["name=scale", "data.train=there", "epochs=2", "global_batch=256",
                                        "augment.color_jitter=[0.4,0.4,0.4,0.1]"]))
    data = Data(train=index, val=None, order=Order(len(index), global_batch=256, seed=0, shards=64,
                                                   identity=index.identity))
    whole = data.order.steps_per_epoch
    seen = np.zeros(len(index), dtype=np.uint8)
    open_before, before, began = len(os.listdir("/proc/self/fd")), start_peak(), time.perf_counter()
    for epoch in range(2):
        stop = epoch * whole + min(steps or whole, whole)
        for work in training_works(config, data, first_step=epoch * whole, rank=0, world=1):
            if work.step >= stop:
                break
            seen[work.samples] += 1
            index.where(int(work.samples[0]))
    seconds = time.perf_counter() - began
    assert steps is not None or (seen == 2).all()
    return {"seconds": seconds, "growth_mb": (resident() - before) / 1e6, "peak_mb": (peak() - before) / 1e6,
            "handles": len(os.listdir("/proc/self/fd")) - open_before}


def measure_scan(folder: Path) -> Figures:
    tar = folder / "nested.tar"
    if not tar.exists():
        nested_tar(tar, classes=50, each=400)
    began = time.perf_counter()
    index: Index = open_index(str(tar), cache_dir=folder / f"scan-{os.getpid()}")
    seconds = time.perf_counter() - began
    return {"images": len(index), "images_per_second": len(index) / seconds}


MEASURES: dict[str, tuple[Callable[..., Figures], int]] = {  # and how often
    "open": (measure_open, 5), "permutation": (measure_permutation, 5), "batch": (measure_batch, 5),
    "first": (measure_first, 5), "epochs": (measure_epochs, 1), "scan": (measure_scan, 3),
}


# --- putting it together ------------------------------------------------------------------------------------------


def fresh(name: str, folder: Path, **settings: Any) -> Figures:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", name, str(folder), json.dumps(settings)]
    result = subprocess.run(command, capture_output=True, text=True, check=False,
                            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])})
    if result.returncode:
        raise RuntimeError(f"{name} failed:\n{result.stderr}")
    return json.loads(result.stdout)


def machine() -> dict[str, Any]:
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
            "numpy": np.__version__, "system": platform.platform()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "FOLDER", "SETTINGS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, folder, settings = options.one
        print(json.dumps(MEASURES[name][0](Path(folder), **json.loads(settings))))
        return

    result: dict[str, Any] = {"machine": machine(), "samples": {"imagenet": IMAGENET, "imagenet_21k": IMAGENET_21K}}
    with tempfile.TemporaryDirectory() as place:
        keep_imagenet(Path(place))
        for name, (_, times) in MEASURES.items():
            runs = [fresh(name, Path(place)) for _ in range(times)]
            figures = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
            result[name] = {"n": times, **figures}
            row = "   ".join(f"{key} {value:,}" for key, value in figures.items())
            print(f"{name:<12} n={times}   {row}", flush=True)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
