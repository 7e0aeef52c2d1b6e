"""Nets side by side: `alexnet-ddp compare MODEL MODEL ...`.

    from alexnet_ddp.trained.comparison import compare

    found = compare(["alexnet_torchvision", "torchvision:resnet18", "runs/mine"], seconds=5.0)
    print(found.told())

Each net is measured in a process of its own (trained.trial); in every round all of them have their turn, the first of
a round being the second's of the one before.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from alexnet_ddp import plots, tables
from alexnet_ddp.amounts import human_bytes
from alexnet_ddp.cores import usable_cores
from alexnet_ddp.errors import EXIT_FINISHED, OutOfMemory, UserError
from alexnet_ddp.trained import command, scatter
from alexnet_ddp.trained.entry import Entry, look, same
from alexnet_ddp.trained.timing import ROUNDS, Timing, machine, machine_line
from alexnet_ddp.trained.trial import KINDS, Died, Prepared, Process
from alexnet_ddp.words import Parser

UNKNOWN = "-"


@dataclass
class Row:
    """A net as it was measured; `prepared` and `timings` (by trial.KINDS) are missing where it couldn't be."""

    entry: Entry
    prepared: Prepared | None = None
    timings: dict[str, Timing] = field(default_factory=dict)


@dataclass
class Comparison:
    """machine: what the figures hold for; settings: what was asked for; notes: for people, one line each."""

    rows: list[Row]
    machine: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str]

    def plain(self) -> dict[str, Any]:
        """For JSON: seconds, bytes, counts and shares."""
        models = []
        for row in self.rows:
            batch = {"latency": 1, "throughput": row.prepared.best if row.prepared else None,
                     "training": self.settings["train_batch"]}
            timings = {kind: {**asdict(timing), "batch": batch[kind], "images_per_second": batch[kind] / timing.median}
                       for kind, timing in row.timings.items()}
            models.append({**asdict(row.entry), "prepared": asdict(row.prepared) if row.prepared else None,
                           "timings": timings})
        return {"machine": self.machine, "settings": self.settings, "models": models, "notes": self.notes}

    def told(self) -> str:
        """Two tables in Markdown, with what they hold for below."""
        settings = self.settings
        below = [
            "Latency: one image. Throughput: the best batch among powers of two (a call of at most "
            f"{settings['call']:g} s, half of the memory left). Training: forward, backward and a step of SGD with "
            f"momentum, fp32, {settings['train_batch']} images. Synthetic images on the device: no decoding.",
            f"Medians of n = {settings['rounds']} rounds, the nets in turns, (quickest to slowest round); "
            f"{settings['seconds']:g} s for each figure.",
            f"Memory: {MEMORY[settings['device']]}",
            "File: fp32 weights, the file's own size or, where there is none, 4 bytes a value.",
            f"Machine: {machine_line(self.machine)}.", *self.notes]
        return "\n\n".join([tables.markdown(self._known()), tables.markdown(self._measured()),
                            "\n".join(f"- {line}" for line in below)])

    def _known(self) -> list[list[str]]:
        rows = [["model", "image", "classes", "parameters", "MACs", "file", "top-1", "top-1 by"]]
        for entry in (row.entry for row in self.rows):
            rows.append([entry.spec, f"{entry.size}" if entry.size else UNKNOWN, number(entry.classes or None),
                         number(entry.parameters), number(entry.macs),
                         human_bytes(entry.file_bytes) if entry.file_bytes else UNKNOWN,
                         f"{entry.top1:.2%}" if entry.top1 is not None else UNKNOWN, entry.source or UNKNOWN])
        return rows

    def _measured(self) -> list[list[str]]:
        rows = [["model", "latency, ms", "memory", "best batch", "images/s", "memory", "training images/s", "memory"]]
        for row in self.rows:
            found, timings = row.prepared, row.timings
            if found is None:
                rows.append([row.entry.spec, *[UNKNOWN] * 7])
                continue
            training = timings.get("training")
            rows.append([row.entry.spec, timings["latency"].milliseconds, human_bytes(found.memory_one),
                         number(found.best), timings["throughput"].rate(found.best), human_bytes(found.memory_best),
                         training.rate(self.settings["train_batch"]) if training else UNKNOWN,
                         human_bytes(found.memory_train) if found.memory_train else UNKNOWN])
        return rows


MEMORY = {"cpu": "the most that the net's process held in this machine's memory (resident set), less what it held "
                 "before the net was made.",
          "cuda": "the most that torch's allocator held on the GPU, net and activations, without CUDA's own context."}


def number(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def compare(specs: Sequence[str], overrides: Sequence[str] = (), *, device: str = "auto", threads: int | None = None,
            seconds: float = 5.0, rounds: int = ROUNDS, train_batch: int = 32,
            say: Callable[[str], None] = lambda line: None) -> Comparison:
    """Measures the nets that `specs` name, `seconds` for each of its three figures.

    overrides     key=value as in a recipe, for every net (augment.size, model.num_classes, model.name of a bare file)
    threads       torch's, on the CPU; None: as many as there are cores
    train_batch   images of a training step
    say           hears how far it is

    A net that doesn't fit the memory has its row, without figures, and a note. Raises UserError for names that mean
    nothing, damaged weights and options that a net doesn't have, before anything is timed.
    """
    if not specs:
        raise UserError("compare takes one MODEL or more, such as alexnet_single torchvision:resnet18 runs/NAME.")
    for name, value, least in (("seconds", seconds, 0.0), ("rounds", rounds, 1), ("train_batch", train_batch, 1),
                               ("threads", usable_cores() if threads is None else threads, 1)):
        if not least <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be at least {least:g}, got {value}.")
    place = _device(device)
    chosen, notes = same(specs)
    threads = threads or usable_cores()
    told = {**machine(place), "threads": threads}
    settings = {"device": place.type, "seconds": seconds, "rounds": rounds, "train_batch": train_batch,
                "call": seconds / rounds, "overrides": list(overrides)}
    for spec in chosen:
        look(spec, overrides)  # so that what can't be made is told before anything is
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        processes: dict[str, Process] = {}
        for spec in chosen:
            say(f"opening {spec}")
            try:
                processes[spec] = Process(spec, overrides, device=str(place), threads=threads)
            except (Died, OutOfMemory) as error:
                rows.append(Row(look(spec, overrides)))
                notes.append(f"{spec}: not measured, {error}")
                continue
            stack.callback(processes[spec].close)
            rows.append(Row(processes[spec].entry))
        _measure(rows, processes, settings, notes, say)
    for row in rows:
        notes += row.entry.notes + (row.prepared.notes if row.prepared else [])
    if len({row.entry.classes for row in rows if row.entry.top1 is not None}) > 1:
        notes.append("the nets tell different numbers of classes apart: their top-1 are of different tasks")
    return Comparison(rows, told, settings, list(dict.fromkeys(notes)))


def _measure(rows: list[Row], processes: dict[str, Process], settings: dict[str, Any], notes: list[str],
             say: Callable[[str], None]) -> None:
    """Fills the rows in. A net whose process dies is left without figures, and so are its earlier rounds."""
    slice_ = settings["seconds"] / settings["rounds"]
    alive = [row for row in rows if row.entry.spec in processes]

    def lose(row: Row, error: Exception) -> None:
        alive.remove(row)
        row.prepared = None
        taken[row.entry.spec].clear()
        notes.append(f"{row.entry.spec}: not measured, {error}")
        processes[row.entry.spec].close()

    taken: dict[str, dict[str, list[list[float]]]] = {row.entry.spec: {} for row in rows}
    for row in list(alive):
        say(f"looking for the best batch of {row.entry.spec}")
        try:
            row.prepared = processes[row.entry.spec].prepare(train_batch=settings["train_batch"], seconds=slice_)
        except (Died, OutOfMemory) as error:
            lose(row, error)
    for turn in range(settings["rounds"]):
        say(f"round {turn + 1} of {settings['rounds']}")
        first = turn % max(1, len(alive))
        for row in alive[first:] + alive[:first]:
            try:
                for kind in KINDS:
                    if kind == "training" and (row.prepared is None or row.prepared.memory_train is None):
                        continue
                    calls = processes[row.entry.spec].measure(kind, seconds=slice_)
                    taken[row.entry.spec].setdefault(kind, []).append(calls)
            except (Died, OutOfMemory) as error:
                lose(row, error)
    for row in alive:
        row.timings = {kind: Timing.of(calls) for kind, calls in taken[row.entry.spec].items()}


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here. Use --device cpu, or auto.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


# --- the command ------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    parser = Parser(prog="alexnet-ddp compare", description="Nets side by side: parameters, MACs, published or reached "
                    "accuracy, size, latency, throughput, memory and training speed. torchvision's nets are timed with "
                    "fresh weights; nothing is fetched.")
    parser.add_argument("models", metavar="MODEL", nargs="+", help="a run, a checkpoint, a file of weights, "
                        "torchvision:NAME, or a net's name; key=value (augment.size=192) holds for all")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda where it is")
    parser.add_argument("--threads", type=int, help="torch's on the CPU (default: the cores)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure of each net (default: 5)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"into which they are divided (default: {ROUNDS})")
    parser.add_argument("--train-batch", type=int, default=32, help="images of a training step (default: 32)")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE", help="accuracy against latency and MACs, .png or .svg")
    options = parser.parse_intermixed_args(words)
    overrides, specs = command.overrides_among(options.models)
    if options.plot:
        plots.check(options.plot, flag=scatter.FLAG)
    found = compare(specs, overrides, device=options.device, threads=options.threads, seconds=options.seconds,
                    rounds=options.rounds, train_batch=options.train_batch,
                    say=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(found.plain(), indent=1) if options.json else found.told())
    if options.plot:
        scatter.draw([scatter.Point(row.entry.spec, row.entry.top1, row.timings["latency"].median, row.entry.macs,
                                    row.entry.parameters) for row in found.rows if "latency" in row.timings],
                     Path(options.plot), title=machine_line(found.machine))
    return EXIT_FINISHED
