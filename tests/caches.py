"""Small data sets in front of which caches are opened, in unit tests and drills.

    pieces = make_pieces(tmp_path)                     # 101 samples in a tar of random bytes
    caches = pieces.open("ram", world=3)               # one a rank
    pieces.check(caches)                               # every rank reads every sample as the source has it
"""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_ddp.data.caches.cache import CachedRecords, open_cache
from alexnet_ddp.data.index import Index, open_index
from alexnet_ddp.data.order import Order
from alexnet_ddp.data.records import StoredRecords

RAW_SIDE = 10  # pixels of the raw stage's records: 300 bytes


class CountedRecords(StoredRecords):
    """The source, and what was read from it, in order."""

    def __init__(self, index: Index, stage: str) -> None:
        super().__init__(index, stage)
        self.asked: list[int] = []
        self._counting = threading.Lock()

    def read(self, sample: int) -> bytes:
        with self._counting:
            self.asked.append(sample)
        return super().read(sample)

    def read_into(self, sample: int, out: Any, start: int = 0) -> None:
        with self._counting:
            self.asked.append(sample)
        super().read_into(sample, out, start)


@dataclass
class Pieces:
    index: Index
    order: Order
    stage: str
    truth: list[bytes]  # the record of each sample
    run_dir: Path
    base: Path  # where caches lie
    said: list[str] = field(default_factory=list)
    source: CountedRecords = field(init=False)

    def __post_init__(self) -> None:
        self.source = CountedRecords(self.index, self.stage)

    def open_one(self, kind: Any, *, rank: int = 0, world: int = 1, neighbours: Any = None, **more: Any
                 ) -> CachedRecords:
        return open_cache(self.source, kind=kind, index=self.index, order=self.order, rank=rank, world=world,
                          neighbours=range(world) if neighbours is None else neighbours, run_dir=self.run_dir,
                          base=self.base, say=self.said.append, **more)

    def open(self, kind: str, *, world: int = 1, **more: Any) -> list[CachedRecords]:
        return [self.open_one(kind, rank=rank, world=world, **more) for rank in range(world)]

    def check(self, caches: list[CachedRecords], samples: Any = None) -> None:
        """Every rank gives each sample as the source has it, whole and, of raw stages, in part."""
        for cache in caches:
            for sample in range(len(self.truth)) if samples is None else samples:
                assert cache.read(sample) == self.truth[sample]
                if self.stage.startswith("raw"):
                    out = np.empty((RAW_SIDE // 2, RAW_SIDE, 3), np.uint8)
                    cache.read_into(sample, out, 30)
                    assert out.tobytes() == self.truth[sample][30:30 + out.size]

    def files(self) -> list[Path]:
        """All that lies in the caches' folder, but folders."""
        return sorted(path for path in self.base.rglob("*") if not path.is_dir())


def make_pieces(folder: Path, *, base: Path | None = None, stage: str = "original", samples: int = 101,
                shards: int = 6, longest: int = 600) -> Pieces:
    """A tar of `samples` records of random bytes (of raw stages 300 bytes each), its index and an order."""
    random = np.random.default_rng(7)
    stored = folder / "stored.tar"
    raw = stage.startswith("raw")
    with tarfile.open(stored, "w") as tar:
        for number in random.permutation(samples):  # ids don't follow the places in the tar
            member = tarfile.TarInfo(f"class{number % 3}/{number:06d}.jpg")
            data = random.bytes(RAW_SIDE**2 * 3 if raw else int(random.integers(1, longest)))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    index = open_index(str(stored), cache_dir=folder / "indexes")
    index.stage = stage  # as of a pack that holds it
    run_dir = folder / "runs" / "one"
    run_dir.mkdir(parents=True)
    order = Order(samples, global_batch=10, seed=1, shards=shards, identity=index.identity)
    return Pieces(index, order, stage, [index.read(sample) for sample in range(samples)], run_dir,
                  folder / "cache" if base is None else base)


def shares(cache: CachedRecords) -> Iterator[bool]:
    """For each sample whether the cache holds it, checked."""
    for sample in range(len(cache._home)):
        spot = cache._home[sample]
        place, shard = divmod(spot if spot >= 0 else ~spot, cache._shards)
        file = cache._files.get(shard)
        yield file is not None and spot != -2**31 and file.has(place) and file.checked(place) is not None
