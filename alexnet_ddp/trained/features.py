"""The features of photographs: what a layer of a trained net makes of them, for another learner.

Samples are cut into the tiles of every evaluation (32 in a row, alone and whole through the net, in fp32 and on a CPU
by one thread), and the tiles into parts. Ranks take parts in turn and write each in one atomic step, so that a kill
loses at most the parts that were under way, and any number of ranks can go on, to the same bits; at the end the parts
are put together into one file. No more than a part is held in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from alexnet_ddp.amounts import counted, human_bytes
from alexnet_ddp.checkpoint import files
from alexnet_ddp.cores import usable_cores
from alexnet_ddp.data.index import open_index
from alexnet_ddp.distributed import World, everywhere, on_rank_0
from alexnet_ddp.errors import UserError
from alexnet_ddp.evaluate import TILE, tiles_of
from alexnet_ddp.hardware import cores
from alexnet_ddp.progress import Progress
from alexnet_ddp.trained.feature_file import (
    DTYPES,
    Damaged,
    Part,
    part_path,
    read_features,
    read_reasons,
    write_part,
    write_whole,
)
from alexnet_ddp.trained.feature_work import PART, Work, claimed, plan, prepare
from alexnet_ddp.trained.layers import Tap
from alexnet_ddp.trained.model import Model
from alexnet_ddp.trained.tiles import Source, stage_of, tiles

T = TypeVar("T")

BATCH = 4  # tiles decoded at a time
FLOAT16 = float(np.finfo(np.float16).max)


def extract_features(model: Model, data: str, *, layer: str, out: str | Path, dtype: str = "float32",
                     part: int = PART, world: World | None = None) -> Path | None:
    """Writes the features of all photographs of `data` (any form that training takes, of any classes) to `out`.

    Goes on with what an earlier call has left; does nothing where the file is there already. Collective where there is
    a `world`; rank 0 then returns the file's path, the others None, without waiting for it. Raises UserError: no such
    layer, other features under the same name, no room.
    """
    with open_photographs(data, model) as source, ExitStack() as held:
        work = _all(world, lambda: plan(model, source, layer=layer, out=Path(out), dtype=dtype, part=part))
        claim(work, held, world=world)
        compute(work, model, source, world=world)
        if world is not None and world.rank:
            return None
        assemble(work, source)
        return work.out


def open_photographs(place: str, model: Model) -> Source:
    """The photographs at `place` with the classes they have there: they need not be the net's. Raises UserError."""
    index = open_index(place)
    return Source(index, index.labels, stage_of(index, model))


# --- computing --------------------------------------------------------------------------------------------------


def _all(world: World | None, work: Callable[[], T]) -> T:
    return work() if world is None else everywhere(world, work)


def claim(work: Work, held: ExitStack, *, world: World | None = None) -> None:
    """Has rank 0 hold the work until `held` is closed; collective. Raises UserError where another process does."""
    def take() -> None:
        held.enter_context(claimed(work))

    take() if world is None else on_rank_0(world, take)


def compute(work: Work, model: Model, source: Source, *, world: World | None = None) -> int:
    """Computes the parts that aren't there; collective. Returns how many that were. Raises UserError on all ranks."""
    rank, size = (world.rank, world.size) if world is not None else (0, 1)
    there = prepare(work) if world is None else on_rank_0(world, lambda: prepare(work))
    if there is None:
        return 0
    good = _all(world, lambda: [number for number in there[rank::size] if _verifies(work, number)])
    if world is not None:
        told: list[Any] = [None] * size
        dist.all_gather_object(told, (good, work.name), group=world.control)
        if len({name for _, name in told}) > 1:
            raise UserError("The ranks would compute different features: their weights, data, decoders or devices "
                            "differ. Give all of them the same files, and data.decoder by name.")
        good = [number for part, _ in told for number in part]
    missing = sorted(set(range(work.parts)) - set(good))
    mine = missing[rank::size]
    threads = usable_cores() if world is None else cores(world)
    done = work.samples - sum(len(work.rows(number)) for number in missing)
    if rank == 0 and good:
        print(f"going on: {done:,} of {work.samples:,} images were done", flush=True)
    computed = _computed(work, model, source, mine, threads=threads)

    def write_next() -> None:
        number, part = next(computed)
        _write(work, number, part)

    before = torch.get_num_threads()
    if model.device.type == "cpu":  # how a product is shared out among threads can move its last bits
        torch.set_num_threads(1)
    try:
        with Progress(work.samples, what="features", done=done) if rank == 0 else _Silent() as progress:
            for turn in range(0, len(missing), size):
                _all(world, write_next if turn + rank < len(missing) else lambda: None)
                progress.update(sum(len(work.rows(number)) for number in missing[turn:turn + size]))
    finally:
        computed.close()
        torch.set_num_threads(before)
    return len(missing)


class _Silent:
    """The progress of ranks that say nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, count: int = 1) -> None: ...


def _verifies(work: Work, number: int) -> bool:
    try:
        work.read(number)
    except Damaged:
        return False
    return True


def _computed(work: Work, model: Model, source: Source, numbers: list[int], *, threads: int
              ) -> Generator[tuple[int, Part], None, None]:
    """The parts of these numbers, in turn."""
    def fetches() -> Iterator[range]:
        for number in numbers:
            first, last = number * work.part // TILE, tiles_of(work.rows(number).stop)
            yield from (range(tile, min(tile + BATCH, last)) for tile in range(first, last, BATCH))

    if not numbers:
        return
    kind = DTYPES[work.dtype][1]
    rows = work.rows(numbers[0])
    turn, part = 0, _empty(len(rows), work.dimension, kind)
    with Tap(model.net, work.layer) as tap:
        for tile in tiles(model, source, batch=BATCH, threads=threads, only=fetches()):
            found = tap(model.pixels(tile.images[:, 0])).cpu().numpy()
            whole = tile.whole.cpu().numpy()
            place = tile.first - rows.start
            count = min(TILE, len(rows) - place)
            part.whole[place:place + count] = whole[:count]
            part.features[place:place + count] = _as(kind, np.where(whole[:count, None], found[:count], np.float32(0)))
            part.reasons.update(tile.reasons)
            if place + count == len(rows):
                yield numbers[turn], part
                turn += 1
                if turn < len(numbers):
                    rows = work.rows(numbers[turn])
                    part = _empty(len(rows), work.dimension, kind)


def _empty(samples: int, dimension: int, kind: np.dtype[Any]) -> Part:
    return Part(np.zeros((samples, dimension), kind), np.zeros(samples, np.bool_), {})


def _as(kind: np.dtype[Any], values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Raises UserError where a value is too large for float16."""
    if kind == np.float16 and (largest := float(np.abs(values).max(initial=0))) > FLOAT16:
        raise UserError(f"A feature of {largest:.6g} doesn't fit float16 (up to 65504). Use --dtype float32.")
    return values.astype(kind)


def _write(work: Work, number: int, part: Part) -> None:
    try:
        write_part(work.folder, number, part, task=work.name)
    except OSError as error:
        raise UserError(f"{work.folder} can't be written: {error.strerror or error}. Make room; the same command then "
                        "goes on.") from None


# --- putting together -------------------------------------------------------------------------------------------


def assemble(work: Work, source: Source) -> files.Written | None:
    """Puts the parts together and removes them; None where the file was there already. On one rank, after `compute`.

    Raises UserError.
    """
    if work.out.exists():
        shutil.rmtree(work.folder, ignore_errors=True)  # of a kill just after the file was done
        return None

    def parts() -> Iterator[Part]:
        for number in range(work.parts):
            try:
                yield work.read(number)
            except Damaged as error:
                path = part_path(work.folder, number)
                raise UserError(f"{path} isn't there whole ({error}). Several hosts need a folder that they share. The "
                                "same command computes it anew.") from None

    try:
        damaged: dict[int, str] = {}
        for number in range(work.parts):
            damaged.update(read_reasons(work.folder, number))
        written = write_whole(work.out, index=source.index, task=work.task, dimension=work.dimension,
                              dtype=work.dtype, damaged=damaged, parts=parts)
    except OSError as error:
        raise UserError(f"{work.out} can't be written: {error.strerror or error}. Make room; the same command then "
                        "goes on.") from None
    shutil.rmtree(work.folder, ignore_errors=True)
    return written


def told(work: Work, written: files.Written | None, source: Source) -> str:
    """For people: what lies in the file, and which images were damaged."""
    found = read_features(work.out)
    size = work.out.stat().st_size
    lines = [f"{work.out}: {len(found):,} x {work.dimension:,} {work.dtype} features of {work.layer.told}, "
             f"{counted(len(found.classes), 'class', 'classes')}, {human_bytes(size)}"]
    if written is None:
        lines = [f"{lines[0]}: it was finished already; nothing was computed"]
    else:
        lines.append(f"sha256 {written.sha256}")
    if missing := int((~found.whole).sum()):
        lines.append(f"damaged images: {missing:,}; their features are zeros, and `whole` says false")
        lines += [f"  {source.index.where(sample)}: {why}" for sample, why in list(found.damaged.items())[:3]]
    return "\n".join(lines)


