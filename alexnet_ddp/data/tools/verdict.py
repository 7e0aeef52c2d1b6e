"""What measured speeds and sizes mean for training: pure, facts in, findings out, advice in the order to try it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from alexnet_ddp.amounts import human_bytes
from alexnet_ddp.findings import Finding, note, ok, warn

# Images/s that AlexNet's training step may take on one large GPU: an assumption, measured by nobody here. A step is 6.8
# GFLOP an image (alexnet_single at 224: 1.14 G multiply-adds forward, and twice that backward), so that it stands for
# 41 % of the 989 TFLOP/s that NVIDIA's data sheet gives an H100 or H200 in dense bf16.
ASSUMED_GPU_RATE = 60_000.0
ASSUMED_FROM = ("an assumption: what AlexNet's step would take at 41 % of the bf16 peak in an H100's data sheet; "
                "--gpu-rate says otherwise")
UNSTEADY = 0.25  # share of its median by which a speed's pieces may lie apart before it is worth a word
SCALES = 0.7  # of cores times one core's rate: below, something else limits or takes the cores


@dataclass(frozen=True)
class Speed:
    """Images a second: the median of `pieces` measurements, the least and the most of them."""

    median: float
    least: float
    most: float
    pieces: int

    @property
    def unsteady(self) -> bool:
        return self.pieces > 1 and self.most - self.least > 2 * UNSTEADY * self.median

    def __str__(self) -> str:
        spread = f" ({self.least:,.0f} to {self.most:,.0f}, n={self.pieces})" if self.pieces > 1 else " (n=1)"
        return f"{self.median:,.0f} images/s{spread}"


@dataclass(frozen=True)
class Room:
    """Free bytes for a cache, and where."""

    free: int
    place: str


@dataclass(frozen=True)
class Facts:
    """What was measured, or assumed. Sizes in bytes, rates in images a second."""

    where: str
    kind: str  # folder | tar | shards | pack, as the index says
    stage: str  # what is stored there
    samples: int
    record_bytes: float  # mean over the records that were read
    cores: int
    threads: int
    decoder: str  # name, version and resize; for raw stages the copy
    warm: Speed  # random reads of records, from the page cache
    cold: Speed | None  # the same after the kernel was told to forget them; None: it can't be told here
    still_cached: float | None  # share of the records that were in memory all the same; None: unknown
    one_thread: Speed  # records in the page cache -> batches, the whole loader
    all_threads: Speed
    sizes: dict[str, int]  # stage -> bytes of the whole set
    packed: Speed | None = None  # all_threads if the set were packed as short256, from a converted sample
    disk: Room | None = None
    ram: Room | None = None
    gpu_memory: int = 0  # bytes free over all GPUs
    gpus: int = 0  # here
    gpu_rate: float = ASSUMED_GPU_RATE
    gpu_rate_from: Literal["measured", "given", "assumed"] = "assumed"
    recipe_threads: int | None = None  # data.threads of the recipe, where it is a number
    notes: tuple[str, ...] = field(default=())

    @property
    def supply(self) -> float:
        """Images a second that a first pass gets: the slower of storage and loader."""
        storage = self.cold.median if self.cold is not None else self.warm.median
        return min(storage, self.all_threads.median)

    @property
    def storage_binds(self) -> bool:
        return self.cold is not None and self.cold.median < self.all_threads.median

    @property
    def raw_stages(self) -> list[str]:
        """Those that could be kept instead, largest first."""
        return sorted((stage for stage in self.sizes if stage.startswith("raw")), key=lambda stage: -self.sizes[stage])

    @property
    def a_core(self) -> float:
        """Images a second of one core; where others disturb, the better of what one and all threads showed."""
        return max(self.one_thread.median, self.all_threads.median / min(self.threads, self.cores))

    @property
    def wanted(self) -> float:
        """Images a second that the GPUs here take; one GPU's where there is none."""
        return self.gpu_rate * max(1, self.gpus)

    @property
    def knows_demand(self) -> bool:
        """Whether the GPUs' rate was measured here or given: of what is merely assumed there is no verdict."""
        return self.gpu_rate_from != "assumed"


def findings(facts: Facts) -> list[Finding]:
    """All that is to be said: what there is, how quick it is, what fits, what binds, what to do."""
    return [found for part in (_storage, _decode, _caches, _feeds, _advice) for found in part(facts)]


# --- speeds ---------------------------------------------------------------------------------------------------------


def _storage(facts: Facts) -> Iterator[Finding]:
    size = facts.record_bytes
    if facts.cold is None:
        yield note("storage", f"reads from memory alone were measured: {facts.warm}. These files can't be dropped "
                   "from memory (tmpfs, a file system with a cache of its own, or files that others read or have just "
                   "written), so that nothing is known of a first pass.")
    else:
        told = (f"first reads {facts.cold}, {human_bytes(facts.cold.median * size)}/s by {facts.threads} threads, "
                f"records of {human_bytes(size)} at random; from memory {facts.warm}.")
        if facts.still_cached is not None and facts.still_cached > 0.05:
            yield note("storage", f"{told} {facts.still_cached:.0%} of the records were still in memory: the first "
                       "rate is too high.", "on a quiet machine, or on files that no other process reads")
        else:
            yield ok("storage", f"{told} What the disk or its server keeps in a cache of its own can't be seen.")
    if any(speed is not None and speed.unsteady for speed in (facts.cold, facts.all_threads)):
        yield note("noise", f"speeds vary by more than {UNSTEADY:.0%} about their medians: other work on this machine "
                   "or its storage.", "the same command again when it is quiet, with --seconds 20")


def _decode(facts: Facts) -> Iterator[Finding]:
    one, every = facts.one_thread, facts.all_threads
    meaning = f"{facts.decoder}: {one} on one thread, {every} on {facts.threads}."
    if facts.threads > 1 and every.median < SCALES * one.median * min(facts.threads, facts.cores):
        yield warn("decoding", f"{meaning} That is {every.median / one.median:.1f} times one thread's on {facts.cores} "
                   "cores: other processes take them, or memory limits.",
                   "look at `top`; ask for whole cores (--cpus-per-task) under Slurm")
    else:
        yield ok("decoding", meaning)
    if facts.recipe_threads is not None and facts.recipe_threads < facts.cores:
        yield warn("data.threads", f"the recipe decodes with {facts.recipe_threads} threads, this process may use "
                   f"{facts.cores} cores.", "data.threads=auto")


# --- what fits ------------------------------------------------------------------------------------------------------


def _caches(facts: Facts) -> Iterator[Finding]:
    for kind, room in _rooms(facts):
        fits = [f"{stage} ({human_bytes(size)})" for stage, size in facts.sizes.items() if size <= room.free]
        lacks = [f"{stage} ({human_bytes(size)})" for stage, size in facts.sizes.items() if size > room.free]
        told = f"{human_bytes(room.free)} free in {room.place}: " + (f"{', '.join(fits)} would fit" if fits else
                                                                   "nothing of this set would fit")
        if lacks:
            told += f"{'; ' + ', '.join(lacks) + ' would not' if fits else ' (' + ', '.join(lacks) + ')'}"
        yield ok(f"cache {kind}", told + ".")


def _rooms(facts: Facts) -> Iterator[tuple[str, Room]]:
    if facts.disk is not None:
        yield "disk", facts.disk
    if facts.ram is not None:
        yield "ram", facts.ram
    if facts.gpu_memory:
        yield "gpu", Room(facts.gpu_memory, f"the memory of {facts.gpus} GPU{'s' if facts.gpus > 1 else ''}")


def fits(facts: Facts, kind: str, stage: str) -> bool:
    """Whether the whole set in a stage goes into a cache of this node."""
    return stage in facts.sizes and any(name == kind and facts.sizes[stage] <= room.free
                                        for name, room in _rooms(facts))


# --- the verdict ----------------------------------------------------------------------------------------------------


def _feeds(facts: Facts) -> Iterator[Finding]:
    if not facts.gpus:
        yield note("GPU", "none was found here, so that nothing about one was measured.",
                   "this command again on the machine that has them" if facts.knows_demand else
                   "this command again on the machine that has them, or --gpu-rate with what one of them takes")
    if not facts.knows_demand:
        yield note("feeds", f"input gives {facts.supply:,.0f} images/s. How many GPUs that feeds isn't known; for "
                   f"scale: {facts.gpu_rate:,.0f} images/s for one is {ASSUMED_FROM}.")
        yield note("the slower part", _binding(facts))
        return
    source = "measured on this machine's GPU" if facts.gpu_rate_from == "measured" else \
        "as given by --gpu-rate, not measured"
    feeds = f"{facts.supply / facts.gpu_rate:.2g}"
    told = (f"{facts.supply:,.0f} images/s are enough for {feeds} GPU{'' if feeds == '1' else 's'}; one GPU takes "
            f"{facts.gpu_rate:,.0f} images/s ({source}).")
    if facts.supply >= facts.wanted:
        yield ok("feeds", told + " Input isn't what limits here.")
        return
    yield warn("feeds", told)
    yield warn("what binds", _binding(facts))


def _binding(facts: Facts) -> str:
    """What holds input itself up: measured, whatever takes it."""
    if facts.storage_binds:
        return f"storage: first reads give {facts.cold}, the loader could take {facts.all_threads.median:,.0f}."
    if facts.stage.startswith("raw"):
        return "copying records on the host."
    cores = math.ceil(facts.gpu_rate / facts.a_core)
    return f"decoding: {cores:,} cores like these would feed one GPU." if facts.knows_demand else "decoding."


def _advice(facts: Facts) -> Iterator[Finding]:
    """In the order to try; nothing where input is known not to be the wall."""
    if facts.knows_demand and facts.supply >= facts.wanted:
        return
    where, number = shlex.quote(facts.where), 0

    def step(meaning: str, advice: str, *, stage: str = facts.stage) -> Finding:
        nonlocal number
        number += 1
        other = f" {_another(facts.stage)}" if stage != facts.stage else ""
        return note(f"{number}. try", meaning + other, advice)

    def packing(stage: str) -> str:
        return f"alexnet-ddp data pack {where} PACK --stage {stage}; then data.train=PACK data.stored={stage}"

    owner = "data.assignment=owner"
    reach = facts.raw_stages if facts.stage in ("original", *facts.raw_stages) else []  # of what is stored
    gpu = next((stage for stage in reach if fits(facts, "gpu", stage)), "")
    if gpu:
        yield step(f"{_what(gpu)} fits in the GPUs' memory: after the first epoch the host has nothing left to do.",
                   f"data.stored={gpu} data.cache=gpu {owner}", stage=gpu)
    ram = next((stage for stage in reach if fits(facts, "ram", stage)), "")
    if ram:
        yield step(f"{_what(ram)} fits in memory: after the first epoch no image is decoded or read from storage.",
                   f"data.stored={ram} data.cache=ram {owner}", stage=ram)
    elif facts.stage == "original" and (raw := next((stage for stage in reach if fits(facts, "disk", stage)), "")):
        yield step(f"{_what(raw)} fits on {facts.disk.place if facts.disk else 'the disk'}: packed once, no image "
                   f"is decoded again; a record costs {human_bytes(facts.sizes[raw] / facts.samples)} of reading.",
                   packing(raw), stage=raw)
    if facts.stage == "original" and not facts.storage_binds and facts.packed is not None:
        gain = facts.packed.median / facts.all_threads.median
        if gain > 1.2:
            yield step(f"smaller JPEGs decode {gain:.1f} times as fast (a converted sample: {facts.packed}), and take "
                       f"{human_bytes(facts.sizes['short256'])} instead of {human_bytes(facts.sizes['original'])}.",
                       packing("short256"), stage="short256")
    if not reach and (raw := next((stage for stage in facts.raw_stages for kind in ("gpu", "ram", "disk")
                                   if fits(facts, kind, stage)), "")):
        yield step(f"{_what(raw)} would fit here and needs no decoding at all; it is made of the originals.",
                   f"alexnet-ddp data pack ORIGINALS PACK --stage {raw}; then data.train=PACK data.stored={raw}",
                   stage=raw)
    if facts.storage_binds:
        kind = next((kind for kind in ("ram", "disk") if fits(facts, kind, facts.stage)), "")
        if kind:
            yield step(f"the set as it is fits in {'memory' if kind == 'ram' else 'the node disk'}: storage is read "
                       "once, in the first epoch.", f"data.cache={kind} {owner}")
        elif facts.stage == "original" and "short256" in facts.sizes:
            yield step("fewer bytes an image make storage quicker by as much.",
                       packing("short256"), stage="short256")
        if facts.kind == "folder":
            yield step("a file each costs an open, which network file systems answer slowly: of a pack, few files are "
                       "read at many places.", packing("original"))
    if facts.gpus > 1 and facts.supply < facts.gpu_rate * (facts.gpus - 1):
        need = max(1, -(-int(facts.supply) // max(1, int(facts.gpu_rate))))
        yield step(f"{need} of the {facts.gpus} GPUs would train as fast as all of them, with input as it is.",
                   f"--nproc-per-node {need} (the run goes on with any number of ranks)")
    if facts.gpus <= 1 and not number:
        yield step("more cores: decoding scales with them.", "--cpus-per-task N under Slurm")


def _another(stage: str) -> str:
    """Said with every advice that changes what is stored."""
    return (f"Another stored stage is another experiment: start a new run, one that was begun with "
            f"data.stored={stage} can't switch.")


def _what(raw: str) -> str:
    """A raw stage and what the net sees of an image with it."""
    side = raw.removeprefix("raw")
    return f"{raw} (the central {side} x {side} pixels of short side {side}, crops are taken from these)"
