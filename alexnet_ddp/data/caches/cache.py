"""Caches on the node, in front of the records' source: `data.cache: disk | ram`, under owner assignment.

    cache = open_cache(records, kind="ram", index=index, order=order, rank=0, world=2, neighbours=[0, 1], run_dir=...)
    cache.read(7), cache.read_into(7, out, start), cache.check(), cache.progress(), cache.close() or cache.remove()

A rank keeps the records of its own virtual shards (`shard % world == rank`), byte for byte as the stored stage has
them, a file for each shard (cache_file) in one folder for all ranks of the node (cache_folder). Nothing is per rank: a
later attempt, on another number of ranks, goes on with what it finds.

    ram    every record that is read anyway is kept in tmpfs, so that the first epoch fills the cache; raw records are
           read through a memory map, whose pages all processes share
    disk   the same, and a thread copies what is missing in the background, in the source's order (staging)

The CRC of a record is verified when an attempt first reads it, and trusted after; one that is wrong is read from the
source again and counted. When there is no more room the rest is read from the source, and one line says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from alexnet_ddp.amounts import human_bytes
from alexnet_ddp.data.caches.cache_file import ENTRY, LONGEST, ShardFile
from alexnet_ddp.data.caches.cache_folder import CacheFolder, house_in, sweep, unusable
from alexnet_ddp.data.caches.space import check_system, default_base, room
from alexnet_ddp.data.caches.staging import Stager, storage_order
from alexnet_ddp.data.decoding.stages import VERSIONS, Stage
from alexnet_ddp.data.index import Index
from alexnet_ddp.data.order import Order
from alexnet_ddp.data.records import Records
from alexnet_ddp.errors import RunFailed

if TYPE_CHECKING:
    import torch

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]

NOT_OURS = -2**31  # a sample of another rank's shard
KEPT_OPEN = 128  # shards whose descriptors (two each) are kept: the index leaves 512 of the process's to others
SPARED = 0.1  # share of what was free when the cache was opened that is never filled
BETWEEN_LOOKS = 2**24  # bytes that a rank writes before it looks again at what is free
CHUNK = 2**18  # samples whose places are computed at once: bounds the memory that takes


@dataclass(frozen=True)
class CacheProgress:
    """How far this rank's part of a cache is."""

    held: int  # records in the cache
    samples: int  # records of this rank's shards
    bytes: int  # of the records that are held
    refetched: int  # found damaged in this attempt, and read from the source again
    full: bool  # there is no more room: what isn't held stays with the source

    @property
    def complete(self) -> bool:
        return self.held == self.samples

    def __str__(self) -> str:
        share = self.held / max(1, self.samples)
        damaged = f", {self.refetched:,} damaged and read again" if self.refetched else ""
        return (f"{self.held:,} of {self.samples:,} records ({share:.0%}), {human_bytes(self.bytes)}"
                f"{', full' if self.full and not self.complete else ''}{damaged}")


def open_cache(records: Records, *, kind: Literal["disk", "ram"], index: Index, order: Order, rank: int, world: int,
               neighbours: Collection[int], run_dir: Path, ids: I64 | None = None, base: Path | None = None,
               limit_bytes: int | None = None, say: Callable[[str], None] = lambda line: None) -> CachedRecords:
    """This rank's part of the run's cache on this node.

    `records` is the source, of `index`. `neighbours`: the ranks on this node, this one among them. `ids`: index sample
    of each of the order's samples (`data.limit`), None where they are the same. `base`: where the folder lies, None for
    default_base(kind). `limit_bytes`: most that the node may use; never more than SPARED leaves. `say` is given a line
    now and then, also from other threads. Not collective: ranks may open in any order. Raises UserError.
    """
    base = base or default_base(kind)
    check_system(base, kind)
    stage = records.stage
    folder = CacheFolder.open(base, run_dir=run_dir, facts={
        "identity": index.identity, "storage": index.storage, "samples": order.samples, "shards": order.shards,
        "stage": str(stage), "made_with": VERSIONS if index.stage != str(stage) else ""})
    files: dict[int, ShardFile] = {}
    try:
        for line in folder.swept:
            say(line)
        on_node = {shard for shard in range(order.shards) if shard % world in set(neighbours)}
        if gone := folder.evict(on_node):
            say(f"{folder.path}: {gone} shards were taken away, they are other nodes' now")
        used, free = folder.used(), room(folder.path)
        allowance = None if limit_bytes is None else max(0, limit_bytes - used) // len(neighbours)
        home = home_of(order, samples=len(index), rank=rank, world=world, ids=ids)
        own = np.flatnonzero(home != NOT_OURS)
        fits = used + int(free * (1 - SPARED))
        fits = fits if limit_bytes is None else min(fits, max(used, limit_bytes))
        needed = needed_bytes(index, stage, own) * len(neighbours)  # ranks have equal shares
        if needed > fits:
            say(f"{folder.path}: the node's share of the records takes {human_bytes(needed)}, and {human_bytes(fits)} "
                f"fit ({human_bytes(free)} are free, of which a tenth is spared"
                f"{'' if limit_bytes is None else f'; data.cache_gb={limit_bytes / 1e9:g}'}); the rest will be read "
                "from the source")
        rounds, over = divmod(order.samples, order.shards)
        for shard in range(rank, order.shards, world):
            if places := rounds + (shard < over):
                files[shard] = ShardFile(
                    folder.shard(shard), places=places, record_bytes=stage.record_bytes, mapped=kind == "ram",
                    keep_open=order.shards // world <= KEPT_OPEN)
    except BaseException as error:
        for file in files.values():
            file.close()
        folder.close()
        if isinstance(error, OSError):
            raise unusable(base, error) from None
        raise
    return CachedRecords(records, folder=folder, files=files, home=home, shards=order.shards, allowance=allowance,
                         reserve=int(free * SPARED), say=say,
                         staged=storage_order(index, own) if kind == "disk" else None)


def sweep_caches(kind: Literal["disk", "ram"], *, base: Path | None = None) -> list[str]:
    """Takes away caches on this node that nobody wants (cache_folder has the rule), without opening one: for a run that
    turns out to be finished. Returns a line for each. Never raises for a folder that can't be read."""
    with contextlib.suppress(OSError):
        return sweep(house_in(base or default_base(kind)))
    return []


def needed_bytes(index: Index, stage: Stage, samples: I64) -> int:
    """Bytes that the records of these samples take, 0 where nobody knows (files of their own, conversions)."""
    if stage.record_bytes is not None:
        return len(samples) * stage.record_bytes
    return int(index.table.sizes[samples].sum(dtype=np.int64)) if index.stage == str(stage) else 0


def home_of(order: Order, *, samples: int, rank: int, world: int, ids: I64 | None = None) -> I32:
    """int32 [samples of the index]: ~(place * shards + shard) of a rank's own samples, NOT_OURS of others'."""
    assert samples < 2**31 - 1
    home = np.full(samples, NOT_OURS, np.int32)
    for first in range(0, order.samples, CHUNK):
        those = np.arange(first, min(first + CHUNK, order.samples))
        shard, place = order.home(those)
        own = shard % world == rank
        home[(those if ids is None else ids[those])[own]] = ~(place * order.shards + shard)[own]
    return home


class Memory:
    """The maps of all shards as one range of addresses, so that one call copies records of many shards.

    What lies between the maps is never touched. Slices, one a record, would hold the interpreter's lock for 2 us each:
    beside the 15 us of the copy, decode threads would wait for each other.
    """

    def __init__(self, maps: dict[int, U8], *, shards: int, record_bytes: int) -> None:
        import torch  # packs and their tools, which don't get here, do without its two seconds

        self._kept, self._shards, self._record_bytes = list(maps.values()), shards, record_bytes
        starts = {shard: mapped.ctypes.data for shard, mapped in maps.items()}
        low = min(starts.values())
        self._bytes = max(starts[shard] + mapped.size for shard, mapped in maps.items()) - low
        self._from = np.zeros(shards, np.int64)  # of each shard's first record, in bytes
        for shard, start in starts.items():
            self._from[shard] = start - low
        self._range = torch.frombuffer((ctypes.c_ubyte * self._bytes).from_address(low), dtype=torch.uint8)

    def copy(self, spots: I64, starts: I64, out: torch.Tensor) -> None:
        """Bytes `starts` and after of records (place * shards + shard) into `out`: uint8 [n, bytes]."""
        import torch

        place, shard = np.divmod(spots, self._shards)
        first = self._from[shard] + place * self._record_bytes + starts
        size = out.shape[1]
        records = self._range.as_strided((self._bytes - size + 1, size), (1, 1))  # row i: the bytes from i on
        torch.index_select(records, 0, torch.from_numpy(first), out=out)


class CachedRecords:
    """Records with a cache in front of them (see the module). Made by open_cache; safe from any number of threads.

    Raises what the source raises. What goes wrong with the cache itself never stops a read: `check` raises it.
    """

    def __init__(self, source: Records, *, folder: CacheFolder, files: dict[int, ShardFile], home: I32, shards: int,
                 allowance: int | None, reserve: int, say: Callable[[str], None], staged: I32 | None) -> None:
        self.stage, self._source, self._folder, self._files = source.stage, source, folder, files
        # By sample: place * shards + shard once its record was verified, ~ of that before, NOT_OURS. A memoryview gives
        # plain ints, five times as quick as an array.
        self._home, self._homes = home.data, home
        self._shards, self._say = shards, say
        self._record_bytes = self.stage.record_bytes or 0
        self._maps = {shard: file.mapped for shard, file in files.items() if file.mapped is not None}
        self._memory = Memory(self._maps, shards=shards, record_bytes=self._record_bytes) if self._maps else None
        self._allowance, self._reserve = allowance, reserve  # bytes this rank may write; bytes to be left free
        self._lock = threading.Lock()  # of all that follows
        self._written = self._looked = 0
        self._held = sum(int(file.places().sum()) for file in files.values())
        self._bytes = sum(file.filled for file in files.values())
        self._samples = int((home != NOT_OURS).sum())
        self._refetched = 0
        self._full = False
        self._failure: BaseException | None = None
        self._closed = False
        self._stager = Stager(staged, self._fill, self._fail) if staged is not None else None

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, sample: int) -> bytes:
        spot = self._home[sample]
        if spot >= 0:
            place, shard = divmod(spot, self._shards)
            try:
                return self._files[shard].read(place)
            except OSError:
                self._home[sample] = spot = ~spot
        return self._fetch(sample, spot)

    def read_into(self, sample: int, out: U8, start: int = 0) -> None:
        flat = out.reshape(-1)
        spot = self._home[sample]
        if spot >= 0:
            place, shard = divmod(spot, self._shards)
            if self._maps:
                assert start + flat.size <= self._record_bytes
                first = place * self._record_bytes + start
                flat[:] = self._maps[shard][first:first + flat.size]
                return
            try:
                self._files[shard].read_into(place, flat, start)
                return
            except OSError:
                self._home[sample] = spot = ~spot
        if spot == NOT_OURS or (self._full and not self._has(spot)):
            self._source.read_into(sample, out, start)
        else:
            flat[...] = np.frombuffer(self._fetch(sample, spot), np.uint8)[start:start + flat.size]

    def copy_into(self, samples: I64, starts: I64, out: torch.Tensor) -> bool:
        if self._memory is None:
            return False
        spots = self._homes[samples].astype(np.int64)
        if (spots < 0).any():
            return False
        self._memory.copy(spots, starts, out)
        return True

    def where(self, sample: int) -> str:
        return self._source.where(sample)

    def _has(self, spot: int) -> bool:
        place, shard = divmod(~spot, self._shards)
        return self._files[shard].has(place)

    def _fetch(self, sample: int, spot: int) -> bytes:
        """A record that wasn't verified yet, or isn't there: `spot` is negative."""
        if spot == NOT_OURS:
            return self._source.read(sample)
        place, shard = divmod(~spot, self._shards)
        file = self._files[shard]
        if file.has(place):
            data = file.checked(place)
            if data is None:
                with file.lock:  # another thread may have mended it
                    data = file.checked(place) if file.has(place) else None
                    if data is None and file.has(place):
                        self._count(-1, -file.length(place), refetched=1)
                        file.forget(place)
            if data is not None:
                self._home[sample] = ~spot
                return data
        data = self._source.read(sample)
        self._keep(sample, spot, data)
        return data

    # --- filling ----------------------------------------------------------------------------------------------------

    def _fill(self, sample: int) -> bool:
        """Keeps a record that isn't there yet; False when there is no use in going on."""
        spot = self._home[sample]
        if spot < 0 and spot != NOT_OURS and not self._has(spot) and not self._full and self._failure is None:
            self._keep(sample, spot, self._source.read(sample))
        return not self._full and self._failure is None

    def _keep(self, sample: int, spot: int, data: bytes) -> None:
        fitting = len(data) == (self._record_bytes or len(data)) and 0 < len(data) <= LONGEST
        if self._full or self._failure is not None or not fitting or not self._take(len(data) + ENTRY.itemsize):
            return
        place, shard = divmod(~spot, self._shards)
        file = self._files[shard]
        try:
            with file.lock:
                if not file.has(place):
                    file.store(place, data)
                    self._count(1, len(data))
            self._home[sample] = ~spot
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
                self._stop(f"{error.strerror}")
            else:
                self._fail(error)

    def _count(self, records: int, size: int, *, refetched: int = 0) -> None:
        with self._lock:
            self._held += records
            self._bytes += size
            self._refetched += refetched

    def _take(self, size: int) -> bool:
        """Room for so many bytes, by the limit and, every now and then, by what is free."""
        with self._lock:
            if self._allowance is not None and self._written + size > self._allowance:
                why = "its limit is reached (data.cache_gb)"
            elif self._written >= self._looked and room(self._folder.path) - self._reserve < BETWEEN_LOOKS:
                why = f"a tenth of what was free is spared ({human_bytes(self._reserve)})"
            else:
                if self._written >= self._looked:
                    self._looked = self._written + BETWEEN_LOOKS
                self._written += size
                return True
        self._stop(why)
        return False

    def _stop(self, why: str) -> None:
        with self._lock:
            first, self._full = not self._full, True
        if first:
            self._say(f"the cache in {self._folder.path} takes no more: {why}. Of this rank's share it holds "
                      f"{self.progress()}; the rest is read from the source")

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error

    # --- the main loop ----------------------------------------------------------------------------------------------

    def progress(self) -> CacheProgress:
        with self._lock:
            return CacheProgress(self._held, self._samples, self._bytes, self._refetched, self._full)

    def check(self) -> None:
        """Raises what went wrong with the cache in any thread: RunFailed for the disk's faults."""
        error = self._failure
        if isinstance(error, OSError):
            raise RunFailed(f"the cache {self._folder.path} can't be written: {error.strerror or error}. The same "
                            "command goes on from the newest checkpoint; with data.cache=none, or another "
                            "data.cache_dir, without that disk") from error
        if error is not None:
            raise error

    def close(self) -> None:
        """Joins the thread and leaves the folder to the next attempt; no read may be under way. Raises as `check`."""
        self._release()
        self._folder.close()
        self.check()

    def remove(self) -> None:
        """The run has finished: as `close`, and the last rank of the node to say so takes the folder away."""
        self._release()
        self._folder.remove()
        self.check()

    def _release(self) -> None:
        if self._stager is not None:
            self._stager.close()
        if not self._closed:
            self._closed = True
            self._maps.clear()
            self._memory = None
            for file in self._files.values():
                file.close()
