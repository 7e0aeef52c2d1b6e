"""What features are to be computed, and what an earlier attempt has left of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_ddp.amounts import human_bytes
from alexnet_ddp.checkpoint import files
from alexnet_ddp.errors import UserError
from alexnet_ddp.evaluate import TILE
from alexnet_ddp.trained import packed_weights
from alexnet_ddp.trained.feature_file import DTYPES, FRESH, Part, part_path, read_part, task_of
from alexnet_ddp.trained.layers import Layer, Tap, find_layer
from alexnet_ddp.trained.model import Model
from alexnet_ddp.trained.tiles import Source

PART = 1024  # samples in a part, where that isn't more than PART_BYTES
PART_BYTES = 64e6
TASK, LOCK = "task.json", "lock"


@dataclass(frozen=True)
class Work:
    """Features to be computed. `task`: what they are, plain; two works with equal tasks have equal bits."""

    out: Path
    layer: Layer
    dimension: int
    dtype: str
    samples: int
    part: int  # samples in a part, a multiple of TILE
    task: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the parts lie."""
        return self.out.with_name(self.out.name + ".parts")

    @property
    def parts(self) -> int:
        return -(-self.samples // self.part)

    @cached_property
    def name(self) -> str:
        """Of the task, and of the cut into parts."""
        return hashlib.sha256(json.dumps([self.task, self.part], sort_keys=True).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Of all features."""
        return self.samples * self.dimension * DTYPES[self.dtype][1].itemsize

    def rows(self, number: int) -> range:
        """The samples of a part."""
        return range(number * self.part, min((number + 1) * self.part, self.samples))

    def read(self, number: int) -> Part:
        """Raises Damaged."""
        return read_part(self.folder, number, task=self.name, shape=(len(self.rows(number)), self.dimension),
                         dtype=self.dtype)


def plan(model: Model, source: Source, *, layer: str, out: Path, dtype: str = "float32", part: int = PART) -> Work:
    """What is to be computed; asks the net for the layer's size. Raises UserError.

    `part`: samples in a part, a multiple of TILE; fewer where they would be more than PART_BYTES.
    """
    if part < TILE or part % TILE:
        raise UserError(f"--part must be a multiple of {TILE}, got {part}.")
    if out.suffix != ".safetensors":
        raise UserError(f"--out takes a name that ends in .safetensors, got '{out}'.")
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be {' or '.join(DTYPES)}, got '{dtype}'.")
    found = find_layer(model.net, layer)
    size, channels = model.preprocessing.size, model.preprocessing.channels
    with Tap(model.net, found) as tap:
        black = torch.zeros(TILE, size, size, channels, dtype=torch.uint8, device=model.device)
        dimension = tap(model.pixels(black)).shape[1]
    on_gpu = model.device.type == "cuda"
    task = {
        "layer": {"name": found.name, "module": found.module, "side": found.side}, "dimension": dimension,
        "dtype": dtype, "net": model.config.model.model_dump(mode="json"), "weights": weights_id(model),
        "preprocessing": model.preprocessing.plain(), "samples": len(source), "data": source.index.identity,
        "stored": source.stored, "decoder": model.preprocessing.decoder(model.config.data.decoder).name,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu", "torch": str(torch.__version__),
    }
    fits = max(1, int(PART_BYTES // (dimension * DTYPES[dtype][1].itemsize * TILE)))
    return Work(out, found, dimension, dtype, len(source), min(part, fits * TILE), json.loads(json.dumps(task)))


def weights_id(model: Model) -> str:
    """A name for the weights: the checksum of their file, else (fresh ones) of themselves."""
    if told := model.facts.get("sha256"):
        return str(told)
    digest = hashlib.sha256()
    for name, tensor in model.net.state_dict().items():
        digest.update(name.encode() + np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()


@contextmanager
def claimed(work: Work) -> Iterator[None]:
    """For the process that prepares and assembles: no other one may be at work there. Raises UserError where it is."""
    if work.out.exists():
        yield
        return
    with ExitStack() as held:
        try:
            work.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.locked(work.folder / LOCK, otherwise=f"{work.folder}: another process is "
                                            "computing features there. Wait for it, or choose another --out."))
        except OSError as error:
            raise UserError(f"{work.folder} can't be written: {error.strerror or error}. Choose another --out.") from (
                None)
        yield
    if work.out.exists():
        shutil.rmtree(work.folder, ignore_errors=True)  # NFS keeps a folder as long as the lock in it is open


def prepare(work: Work) -> list[int] | None:
    """Parts that are there, as far as their names tell, in a folder made for them; None where the whole is done.

    Removes what a kill has left half written: call it where the work is `claimed`. Raises UserError where other
    features are, or where there is no room.
    """
    if work.out.exists():
        _refuse_others(work.task, task_of(work.out), work.out, "holds")
        return None
    task, told = {**work.task, "part": work.part}, work.folder / TASK
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        is_new = not told.exists()
        _refuse_others(task, task if is_new else dict(json.loads(told.read_text())), work.folder, "is the beginning of")
        for left in (*packed_weights.left_over(work.out), *work.folder.glob(f"{FRESH}*")):
            left.unlink(missing_ok=True)
        there = [number for number in range(work.parts) if part_path(work.folder, number).exists()]
        needed = work.bytes * (work.parts - len(there)) / max(1, work.parts) + work.bytes
        free = shutil.disk_usage(work.folder).free
        if is_new and needed <= free:
            files.replace(told, content=json.dumps(task, indent=1).encode() + b"\n")
    except UserError:  # a ValueError, too
        raise
    except OSError as error:
        raise UserError(f"{work.folder} can't be written: {error.strerror or error}. Choose another --out.") from None
    except (ValueError, TypeError):
        raise UserError(f"{told} is damaged. Remove {work.folder} and start over.") from None
    if needed > free:
        smaller = ""
        if is_new:
            shutil.rmtree(work.folder, ignore_errors=True)
            smaller = ", or --dtype float16" if work.dtype == "float32" else ""
        raise UserError(f"{work.out} and its parts need {human_bytes(needed)} for a while, {human_bytes(free)} are "
                        f"free there. Choose another --out{smaller}.")
    return there


def _refuse_others(task: dict[str, Any], there: dict[str, Any], path: Path, what: str) -> None:
    """Raises UserError unless `there` is the task."""
    differ = [f"{key}: {_short(there.get(key))} there, {_short(task.get(key))} here"
              for key in sorted({*there, *task}) if there.get(key) != task.get(key)]
    if differ:
        raise UserError(f"{path} {what} other features ({'; '.join(differ[:3])}). Choose another --out, or remove it.")


def _short(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
