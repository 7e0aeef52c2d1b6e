"""What making a net smaller has cost and gained: accuracy, size on the disk and latency, before and after."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alexnet_ddp import tables
from alexnet_ddp.distributed import pick_device
from alexnet_ddp.errors import UserError
from alexnet_ddp.evaluate import Evaluation
from alexnet_ddp.trained.evaluation import evaluate_model
from alexnet_ddp.trained.model import Model
from alexnet_ddp.trained.tiles import Source, open_source
from alexnet_ddp.trained.timing import Timing, latencies, machine, machine_line

BATCHES = (1, 32)  # images
SECONDS = 2.0  # of timing, per net and batch


@dataclass(frozen=True)
class Measured:
    """One net. evaluation: on data.val, None without; bytes: of the file Model.save writes; timings: by BATCHES."""

    name: str
    evaluation: Evaluation | None
    bytes: int
    timings: tuple[Timing, ...]


def measure(models: Sequence[tuple[str, Model]], *, seconds: float = SECONDS) -> list[Measured]:
    """Measures nets of one kind of input, by name; the first is what the others are compared with.

    All see the same images of the first one's data.val, where it has one, labelled by each net's own classes. Raises
    UserError where that can't be read, or has other classes.
    """
    evaluations = _evaluations(models)
    sizes = [_bytes(model) for _, model in models]
    first = models[0][1]
    size, channels = first.preprocessing.size, first.preprocessing.channels
    timings = []
    for batch in BATCHES:
        pixels = torch.randn(batch, channels, size, size, device=first.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        timings.append(latencies([model.net for _, model in models], [pixels] * len(models), seconds=seconds))
    return [Measured(name, evaluation, count, tuple(taken)) for (name, _), evaluation, count, *taken in
            zip(models, evaluations, sizes, *timings, strict=True)]


def _evaluations(models: Sequence[tuple[str, Model]]) -> list[Evaluation | None]:
    place = models[0][1].config.data.val
    if place is None:
        return [None] * len(models)
    found: list[Evaluation | None] = []
    for _, model in models:  # classes of a net that was trained on may stand in another order
        with _open(place, model) as source:
            found.append(evaluate_model(model, source).evaluation)
    return found


def check_held_out(model: Model) -> None:
    """Raises UserError where `measure` couldn't evaluate this net on its data.val."""
    if (place := model.config.data.val) is not None:
        _open(place, model).index.close()


def _open(place: str, model: Model) -> Source:
    try:
        return open_source(place, model)
    except UserError as error:
        raise UserError(f"data.val={error}\nOr leave accuracy out: data.val=null") from None


def _bytes(model: Model) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return model.save(Path(folder) / "net.safetensors").bytes


def table(measured: Sequence[Measured]) -> str:
    """Markdown; the first row is what the changes are told against. Pure."""
    heads = ["net", "top-1 %", "change", "top-5 %", "file MB", *(f"ms, batch {batch}" for batch in BATCHES)]
    before, rows = measured[0], [heads]
    for one in measured:
        accuracy = ["-", "-", "-"]
        if one.evaluation is not None and before.evaluation is not None:
            change = 100 * (one.evaluation.top1 - before.evaluation.top1)
            accuracy = [f"{100 * one.evaluation.top1:.2f}", "" if one is before else f"{change:+.2f}",
                        f"{100 * one.evaluation.top5:.2f}"]
        rows.append([one.name, *accuracy, f"{one.bytes / 1e6:.2f}", *(taken.milliseconds for taken in one.timings)])
    return tables.markdown(rows)


def conditions(measured: Sequence[Measured], models: Sequence[tuple[str, Model]]) -> list[str]:
    """What the table's figures hold for: lines for people."""
    first, model = measured[0], models[0][1]
    seen = ("no data.val: accuracy was not measured" if first.evaluation is None else
            f"accuracy on {model.config.data.val}: {first.evaluation.samples:,} images, one crop")
    return [seen, "size of the .safetensors file, 1 MB = 1e6 bytes",
            f"latency of the forward in eager mode: median of {first.timings[0].n} rounds (quickest to slowest), "
            f"{model.preprocessing.size} x {model.preprocessing.size} pixels; {machine_line(machine(model.device))}"]


def keep(model: Model, out: Path | None) -> None:
    """Writes the result where that is asked for, and says so. Raises UserError."""
    if out is None:
        print("nothing was written: --out FILE.safetensors keeps it")
        return
    model.save(out)
    print(f"written: {out}")


def add_seconds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S",
                        help=f"of timing, per net and batch (default: {SECONDS:g})")


def one_process(name: str, device: str) -> torch.device:
    """The device that a command works on. Raises UserError on a rank of torchrun."""
    if "RANK" in os.environ:
        raise UserError(f"{name} takes one process, and this is a rank of torchrun. Use alexnet-ddp {name} ...")
    return pick_device(device, local_rank=0, local_size=1)
