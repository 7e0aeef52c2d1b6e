"""Trials of one pipeline in a process of its own, told what to do by benchmarks.pipeline through JSON lines.

    python -m benchmarks.trial MODULE        # such as benchmarks.ours or benchmarks.peers.tfdata

A pipeline's module offers

    NEEDS    names of the packages it imports; where one is missing, its cases are skipped with a line that says so
    cases()  the Case list, without doing any work
    batches(case, data, options)   a generator: opens the pipeline, yields the number of images of each batch once it
             is there, and closes everything when it is closed. Whatever it converts first, it converts before the
             first batch. `data` is the Data of the case's set, `options` the Options below.

A trial opens the pipeline, takes batches for RAMP seconds, then counts images for the wanted time: from one batch's
arrival to another's, so that queues are as full at the end as at the beginning. CPU seconds are those of this process
and all its descendants between the same two moments. The pipeline is closed again after the trial.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import locked

RAMP = 1.0  # seconds: fills every queue of every pipeline here at 2 threads
QUICK_RAMP = 0.2


@dataclass(frozen=True)
class Case:
    """One row of the result. `resize`: antialias | fast | none, or the peer's own word."""

    name: str
    family: str  # limit | ours | the peer's name
    sets: tuple[str, ...]  # original | r256 | raw256
    resize: str
    decoder: str
    output: str = "uint8"  # what a batch holds
    stored: str = "as given"  # what it reads, where it isn't the set's own files
    nvidia: bool = False  # its terms forbid publishing figures: off by default, never recorded
    extra: dict[str, Any] = field(default_factory=dict)  # the module's own


@dataclass(frozen=True)
class Data:
    """Where a set lies. All forms hold the same images under the same names."""

    name: str  # original | r256 | raw256
    folder: str  # CLASS/NAME.jpg; for raw256 the originals
    tar: str  # "" for raw256
    pack: str  # "" until there is one
    images: int


@dataclass(frozen=True)
class Options:
    threads: int
    batch: int
    work: str  # a folder for what is converted


def cpu_seconds() -> float:
    """Of this process and all its living descendants, and of the dead ones that were waited for (Linux)."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            number = int(path.parent.name)
            parents[number] = int(fields[1])
            ticks[number] = sum(map(int, fields[11:15] if number == os.getpid() else fields[11:13]))
    family = {os.getpid()}
    while more := {number for number, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks.get(number, 0) for number in family) / os.sysconf("SC_CLK_TCK")


def measure(batches: Iterator[int], *, seconds: float, ramp: float = RAMP) -> dict[str, float]:
    """Images, wall seconds and CPU seconds from one batch's arrival to another's, after `ramp` seconds of batches."""
    next(batches)
    began = time.perf_counter()
    while time.perf_counter() - began < ramp:
        next(batches)
    cpu, began, images = cpu_seconds(), time.perf_counter(), 0
    while True:
        images += next(batches)
        if (wall := time.perf_counter() - began) >= seconds:
            return {"images": images, "seconds": wall, "cpu": cpu_seconds() - cpu}


def missing(names: tuple[str, ...]) -> list[str]:
    """Those of the packages that aren't installed here."""
    found = []
    for name in names:
        try:
            here = importlib.util.find_spec(name) is not None
        except ImportError:
            here = False
        if not here:
            found.append(name)
    return found


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """The versions of the packages that were imported."""
    owners = importlib.metadata.packages_distributions()
    return {owner: importlib.metadata.version(owner)
            for name in names for owner in owners.get(name.split(".")[0], [])[:1]}


def serve(module_name: str) -> None:
    # What libraries print must not get among the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module: Any = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["do"] == "cases":
                module = importlib.import_module(module_name)
                absent = missing(module.NEEDS)
                answer: dict[str, Any] = {"absent": absent, "cases": [asdict(case) for case in module.cases()],
                                          "versions": versions(module.NEEDS)}
            elif order["do"] == "lock":
                answer = {"wrong": locked.lock_program()}
            else:
                case = Case(**{**order["case"], "sets": tuple(order["case"]["sets"])})
                batches = module.batches(case, Data(**order["data"]), Options(**order["options"]))
                with contextlib.closing(batches):
                    answer = measure(batches, seconds=order["seconds"], ramp=order["ramp"])
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
