"""Packing: a source's samples in one stored stage, as a few checksummed tars that are read in place.

A pack can be killed at any moment: shards that were finished stay, and the same command goes on with the others. The
same source gives the same bytes with the same versions, however often it was killed and on any number of threads.
The files are described in pack_format.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet_ddp.amounts import counted, human_bytes
from alexnet_ddp.data.decoding.decode import DamagedImage, open_upright
from alexnet_ddp.data.decoding.stages import CHANNELS, VERSIONS, Stage, parse_stage, to_stage
from alexnet_ddp.data.index import Index, open_index
from alexnet_ddp.data.index.table import IN_A_FILE
from alexnet_ddp.data.packs import pack_format as form
from alexnet_ddp.data.packs.facts import ENLARGED, KINDS, look
from alexnet_ddp.data.packs.outcome import Packed
from alexnet_ddp.data.packs.pack_place import check_empty, check_place, claim, no_write
from alexnet_ddp.data.packs.parallel import cores_here, in_order
from alexnet_ddp.errors import Unreadable, UserError
from alexnet_ddp.progress import Progress

SAMPLES = 5120  # a shard: ImageNet then is 251 shards, no more than an index keeps open; 1 GB each of raw256
CHUNK = 8  # images a task
ESTIMATED_FROM = {"original": 1000, "short": 32, "max": 32}  # samples that the pack's size is estimated from
LISTED = 100  # damaged images that are named at the end


class DamagedSource(UserError):
    """Images that can't be packed; the finished shards are kept."""


@dataclass
class _Chunk:
    """Some samples of one shard, as they will stand in it."""

    shard: int
    last: bool  # of its shard
    pieces: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # of the source's files, bytes
    found: Counter[str] = field(default_factory=Counter)
    damaged: list[dict[str, Any]] = field(default_factory=list)


def pack(locator: str, *, destination: Path, stage: str = "short256", samples_per_shard: int = SAMPLES,
         threads: int | None = None, skip_damaged: bool = False, cache_dir: Path | None = None) -> Packed:
    """Packs the samples that `locator` names into `destination`, or goes on with a pack that was interrupted there.

    Raises UserError: for a place that can't be written or holds something else, a full disk, damaged images (a
    DamagedSource, once all others are packed) unless they are to be skipped, and a source or arguments that differ
    from those the pack was begun with.
    """
    try:
        wanted = parse_stage(stage)
    except ValueError as error:
        raise UserError(f"--stage: {error}.") from None
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard must be at least 1, got {samples_per_shard}.")
    check_place(destination, locator)
    threads = threads or cores_here()
    with open_index(locator, cache_dir=cache_dir) as index:
        if index.stage != "original":
            raise UserError(f"{locator} is a pack of {index.stage} already. Pack the originals it was made from, or "
                            f"use it as it is with data.stored={index.stage}.")
        form.check_classes(index.table)
        try:
            with claim(destination):
                return _Packer(index, destination, wanted, samples_per_shard, threads, skip_damaged).run()
        except OSError as error:
            raise no_write(destination, error) from None


class _Packer:
    """One pack, under its lock."""

    def __init__(self, index: Index, folder: Path, stage: Stage, per_shard: int, threads: int,
                 skip_damaged: bool) -> None:
        self._index, self._folder, self._stage, self._threads = index, folder, stage, threads
        self._per_shard, self._skip_damaged = per_shard, skip_damaged
        self._job = {"schema": form.SCHEMA, "stage": str(stage), "source_identity": index.identity,
                     "source_samples": len(index), "samples_per_shard": per_shard, "made_with": VERSIONS}

    def run(self) -> Packed:
        finished = form.read_pack(self._folder)
        if finished is not None:
            return self._is_there(finished)
        begun = form.read_json(self._folder / form.JOB)
        if begun is None:
            check_empty(self._folder)
        elif begun != self._job:
            raise self._other_job(begun)
        shards = range(-(-len(self._index) // self._per_shard))
        done = {number: facts for number in shards if (facts := self._kept(number)) is not None}
        todo = [number for number in shards if number not in done]
        self._clear(todo)
        self._check_space(todo)
        if begun is None:
            form.write_json(self._folder / form.JOB, self._job)
        started, made = time.perf_counter(), sum(len(self._ids(number)) for number in todo)
        done |= self._make(todo, already=len(self._index) - made)
        seconds = time.perf_counter() - started
        ordered = [done[number] for number in shards]
        content = self._content(ordered)
        form.write_json(self._folder / form.PACK, content)
        form.sync_folder(self._folder.absolute().parent)
        self._clear_all()
        return self._packed(content, made=made, seconds=seconds)

    def _ids(self, shard: int) -> range:
        """Ids in the source of a shard's samples."""
        return range(shard * self._per_shard, min((shard + 1) * self._per_shard, len(self._index)))

    # --- what is there already --------------------------------------------------------------------------------------

    def _is_there(self, content: dict[str, Any]) -> Packed:
        """A finished pack: fine if it is this one."""
        wanted = {name: value for name, value in self._job.items() if name not in ("source_samples", "made_with")}
        if differing := [name for name, value in wanted.items() if content.get(name) != value]:
            raise UserError(f"{self._folder}: holds a finished pack already, with another {_words(differing)}: "
                            f"{content.get('samples')} samples as {content.get('stage')}. Give another folder, or "
                            f"remove that one first.")
        for shard in content["shards"]:
            path = self._folder / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise UserError(f"{path}: must have {shard['bytes']:,} bytes by {form.PACK} and hasn't. Remove "
                                f"{self._folder} and pack again.")
        self._clear_all()
        return self._packed(content, made=0, seconds=0.0)

    def _other_job(self, begun: dict[str, Any]) -> UserError:
        differing = [name for name in self._job if begun.get(name) != self._job[name]]
        lines = [f"{self._folder}: holds an unfinished pack with another {_words(differing)}:"]
        lines += [f"  {_words([name])}: {begun.get(name)}, now {self._job[name]}" for name in differing]
        lines.append("Go on with what it was begun with, give another folder, or remove this one to start over.")
        if "source_identity" in differing:
            lines.append("(Another identity: samples or classes were added, removed or renamed, so all ids move.)")
        return UserError("\n".join(lines))

    def _kept(self, number: int) -> dict[str, Any] | None:
        """The facts of a finished shard, None where it must be made (again)."""
        facts = form.read_json(self._folder / form.done_name(number))
        if facts is None:
            return None
        if facts["damaged"] and not self._skip_damaged:
            return None  # perhaps they were mended
        path = self._folder / form.shard_name(number)
        there = path.stat().st_size if path.is_file() else 0
        if there != facts["bytes"]:
            return None
        if self._sizes_now(number) != facts["source_sizes"]:
            raise UserError(f"{self._index.source}: files have changed (their sizes) since {path.name} was packed from "
                            f"them. Remove {self._folder} to pack all of it again, or give another folder.")
        return facts

    def _sizes_now(self, number: int) -> str:
        table, root = self._index.table, self._index.source.paths[0]
        cuts = [self._ids(number)[first:first + 256] for first in range(0, self._per_shard, 256)]
        sizes = in_order(lambda ids: [form.source_size(table, row, root) for row in ids], cuts, threads=self._threads)
        return form.sizes_digest(np.array([size for some in sizes for size in some], dtype=np.int64))

    def _clear(self, todo: list[int]) -> None:
        """What a killed pack left half-written, and the facts of shards that are made again."""
        for path in self._folder.glob(".tmp-*"):
            if path.name not in (form.LOCK, form.JOB):
                path.unlink(missing_ok=True)
        for number in todo:
            (self._folder / form.done_name(number)).unlink(missing_ok=True)
        form.sync_folder(self._folder)

    def _clear_all(self) -> None:
        """Nothing but shards and pack.json; the lock's file last."""
        for path in [*self._folder.glob(".done-*"), *self._folder.glob(".tmp-*")]:
            if path.name != form.LOCK:
                path.unlink(missing_ok=True)
        (self._folder / form.LOCK).unlink(missing_ok=True)
        form.sync_folder(self._folder)

    # --- making -----------------------------------------------------------------------------------------------------

    def _check_space(self, todo: list[int]) -> None:
        """Says how much will be written; UserError where that can't fit."""
        if not todo:
            return
        ids = np.concatenate([np.arange(len(self._index))[self._ids(number).start:self._ids(number).stop]
                              for number in todo])
        needed, exact = self._estimate(ids)
        free = shutil.disk_usage(self._folder).free
        needs = f"{'' if exact else 'about '}{human_bytes(needed)}"
        print(f"{counted(len(ids), 'image')} as {self._stage}: {needs} will be written, {human_bytes(free)} are free "
              "there", file=sys.stderr, flush=True)
        if needed * (1.0 if exact else 0.9) > free:  # the estimate's own error
            raise UserError(f"{self._folder}: {human_bytes(free)} are free, {needs} will be needed. Free some, give a "
                            f"folder on another disk, or choose a smaller --stage.")

    def _estimate(self, ids: NDArray[np.int64]) -> tuple[int, bool]:
        """(bytes of the pack of these samples, whether that is exact but for names too long for a plain header)."""
        table, root = self._index.table, self._index.source.paths[0]
        if (record := self._stage.record_bytes) is not None:
            return len(ids) * _blocks(form.NPY_HEADER + record), True
        if self._stage.kind == "original" and (table.offsets[ids] != IN_A_FILE).all():
            sizes = table.sizes[ids].astype(np.int64)
            return int((512 + -(-sizes // 512) * 512).sum()), True

        def size(row: int) -> int:
            if self._stage.kind == "original":
                return max(0, form.source_size(table, row, root))
            try:
                return len(to_stage(self._index.read(row), self._stage))
            except (DamagedImage, OSError):  # told when it is packed
                return 0

        count = min(ESTIMATED_FROM[self._stage.kind], len(ids))
        some = ids[np.arange(count) * len(ids) // count].tolist()
        known = [_blocks(size) for size in in_order(size, some, threads=self._threads) if size]
        return int(len(ids) * sum(known) / max(1, len(known))), False

    def _make(self, todo: list[int], *, already: int) -> dict[int, dict[str, Any]]:
        """Makes shards in turn; their facts by number."""
        made: dict[int, dict[str, Any]] = {}
        writer: form.ShardWriter | None = None
        chunks = in_order(self._convert, self._cuts(todo), threads=self._threads)
        try:
            with Progress(len(self._index), what=f"packing {self._stage}", done=already) as progress:
                for chunk in chunks:
                    if writer is None:
                        writer, whole = form.ShardWriter(self._folder, chunk.shard), _Chunk(chunk.shard, True)
                    for piece in chunk.pieces:
                        writer.write(piece)
                    whole.sizes += chunk.sizes
                    whole.found += chunk.found
                    whole.damaged += chunk.damaged
                    if chunk.last:
                        made[chunk.shard] = self._finish(writer, whole)
                        writer = None
                    progress.update(len(chunk.sizes))
        finally:
            chunks.close()  # type: ignore[attr-defined]  # joins the threads
            if writer is not None:
                writer.abandon()
        return made

    def _cuts(self, todo: list[int]) -> Iterator[tuple[int, range, bool]]:
        for number in todo:
            ids = self._ids(number)
            for first in range(0, len(ids), CHUNK):
                yield number, ids[first:first + CHUNK], first + CHUNK >= len(ids)

    def _convert(self, cut: tuple[int, range, bool]) -> _Chunk:
        """In a thread: reads, checks and converts a few samples."""
        number, ids, last = cut
        chunk, table = _Chunk(number, last), self._index.table
        for row in ids:
            try:
                data = self._index.read(row)
            except OSError as error:
                raise Unreadable(f"Can't read {self._index.where(row)} (sample {row}): {error.strerror or error}. "
                                 f"The shards finished so far are kept: mend that and run the same again.") from None
            chunk.sizes.append(len(data))
            try:
                facts = look(data)
                if self._stage.kind == "original":
                    open_upright(data, channels=CHANNELS)  # for its verdict
                record = to_stage(data, self._stage)
            except DamagedImage as error:
                chunk.damaged.append({"sample": row, "name": self._index.name(row), "why": str(error)})
                continue
            chunk.found.update(facts.kinds)
            if self._stage.kind in ("short", "raw") and min(facts.width, facts.height) < self._stage.pixels:
                chunk.found[ENLARGED] += 1
            chunk.pieces.append(form.member(form.member_name(table, row, self._stage), record, self._stage))
        return chunk

    def _finish(self, writer: form.ShardWriter, whole: _Chunk) -> dict[str, Any]:
        samples = len(whole.sizes) - len(whole.damaged)
        if samples:
            sha256, size = writer.finish(), writer.bytes
        else:  # not one sample is left of it
            writer.abandon()
            (self._folder / form.shard_name(whole.shard)).unlink(missing_ok=True)
            sha256, size = "", 0
        facts = {"schema": form.SCHEMA, "name": form.shard_name(whole.shard), "samples": samples, "bytes": size,
                 "sha256": sha256, "source_bytes": sum(whole.sizes),
                 "source_sizes": form.sizes_digest(np.array(whole.sizes, dtype=np.int64)),
                 "found": _known(whole.found), "damaged": whole.damaged}
        form.write_json(self._folder / form.done_name(whole.shard), facts)
        return facts

    # --- the end ----------------------------------------------------------------------------------------------------

    def _content(self, shards: list[dict[str, Any]]) -> dict[str, Any]:
        """pack.json. Raises DamagedSource unless damaged images are to be skipped."""
        damaged = [one for facts in shards for one in facts["damaged"]]
        if damaged and not self._skip_damaged:
            raise self._damaged(damaged)
        identity, table = self._index.identity, self._index.table
        if damaged:
            skipped = [one["sample"] for one in damaged]
            left = np.bincount(np.delete(table.labels, skipped), minlength=len(table.classes))
            if not left.all():
                raise UserError(f"Every image of class {self._index.classes[int(left.argmin())]} is damaged: a pack "
                                f"without it would number the classes anew. Replace its images, or remove the class "
                                f"from the source, and pack into a new folder.")
            identity = form.without(table, skipped).identity()
        found: Counter[str] = Counter()
        for facts in shards:
            found.update(facts["found"])
        return {
            "schema": form.SCHEMA, "stage": str(self._stage), "identity": identity,
            "source_identity": self._index.identity, "samples": len(table) - len(damaged),
            "classes": len(table.classes), "made_with": VERSIONS, "samples_per_shard": self._per_shard,
            "source_bytes": sum(facts["source_bytes"] for facts in shards),
            "found": _known(found),
            "shards": [{name: facts[name] for name in ("name", "samples", "bytes", "sha256")}
                       for facts in shards if facts["samples"]],
            "damaged": damaged,
        }

    def _damaged(self, damaged: list[dict[str, Any]]) -> DamagedSource:
        named = [f"  {self._index.where(one['sample'])} (sample {one['sample']}): {one['why']}"
                 for one in damaged[:LISTED]]
        if len(damaged) > LISTED:
            named.append(f"  and {len(damaged) - LISTED} more: `alexnet-ddp data verify {self._index.source} --decode` "
                         f"names all")
        return DamagedSource("\n".join([
            f"{len(damaged)} of {len(self._index):,} images {'is' if len(damaged) == 1 else 'are'} damaged:", *named,
            "All others are packed, and what was finished is kept. Replace these files under their names and run the "
            "same again,", "or add --skip-damaged: the pack then leaves them out and lists them in pack.json. Its ids "
            "and identity are then other",
            "than the source's, so that a run begun on the source can't go on with the pack."]))

    def _packed(self, content: dict[str, Any], *, made: int, seconds: float) -> Packed:
        return Packed(
            folder=self._folder, stage=content["stage"], samples=content["samples"], classes=content["classes"],
            shards=len(content["shards"]), source_bytes=content["source_bytes"],
            bytes=sum(shard["bytes"] for shard in content["shards"]), found=content["found"],
            damaged=content["damaged"], threads=self._threads, made=made, seconds=seconds, notes=self._index.notes)


def _known(found: Counter[str]) -> dict[str, int]:
    """What was counted, in one order."""
    return {kind: found[kind] for kind in (*KINDS, ENLARGED) if found[kind]}


def _words(names: list[str]) -> str:
    """The names of a job's facts, as a user knows them."""
    known = {"source_identity": "source", "source_samples": "number of samples", "samples_per_shard":
             "--samples-per-shard", "stage": "--stage", "made_with": "version of Pillow or simplejpeg",
             "schema": "format"}
    return ", ".join(known.get(name, name) for name in names)


def _blocks(record: int) -> int:
    """Bytes of a member of so many bytes in a tar: its header and whole blocks."""
    return 512 + -(-record // 512) * 512
