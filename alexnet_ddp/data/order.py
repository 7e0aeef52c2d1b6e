"""Which samples make up which step, and which rank gets which of them: pure functions, nothing is kept.

A fixed permutation of the data set (keyed by its identity, the same for every seed) deals the samples round-robin
into V virtual shards whose sizes differ by at most one. In each epoch the shards, and the samples within each, are
permuted, and positions walk over the shards in turn, so that every global batch takes evenly from all of them.

The permutations are computed point by point, so that resuming costs nothing and an epoch of any size takes no
memory: a generalised Feistel network on a grid a x b >= n, walked until it lands below n (Black and Rogaway:
Ciphers with Arbitrary Finite Domains, CT-RSA 2002, sections 4 and 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alexnet_ddp.data.randomness import U64, key, mix
from alexnet_ddp.errors import UserError

I64 = NDArray[np.int64]

_ROUNDS = 8  # four make a strong pseudo-random permutation of a large domain; small domains like some more


def permute(index: ArrayLike, size: ArrayLike, keys: ArrayLike) -> I64:
    """Where the permutation of `range(size)` under `keys` sends each index (arguments broadcast, int64 out)."""
    index, size, keys = np.broadcast_arrays(np.asarray(index, dtype=np.uint64), np.asarray(size, dtype=np.uint64),
                                            np.asarray(keys, dtype=np.uint64))
    rows = np.maximum(np.ceil(np.sqrt(size.astype(np.float64))), 1).astype(np.uint64)
    columns = np.maximum((size + rows - np.uint64(1)) // rows, np.uint64(1))
    result = np.asarray(_feistel(index, rows, columns, keys))
    outside = result >= size
    while outside.any():  # under 2 sqrt(n) of the grid's points lie outside, so this ends soon
        result[outside] = _feistel(result[outside], rows[outside], columns[outside], keys[outside])
        outside = result >= size
    return result.astype(np.int64)


def _feistel(x: U64, rows: U64, columns: U64, keys: U64) -> U64:
    left, right = x % rows, x // rows  # left in range(rows), right in range(columns)
    with np.errstate(over="ignore"):
        for turn in range(_ROUNDS):
            salted = keys + np.uint64(0x9E3779B97F4A7C15) * np.uint64(turn + 1)
            if turn % 2 == 0:
                left = (left + (mix(right ^ salted) >> np.uint64(16))) % rows
            else:
                right = (right + (mix(left ^ salted) >> np.uint64(16))) % columns
    return left + rows * right


@dataclass(frozen=True)
class Plan:
    """One step's place in the run."""

    epoch: int
    first: int  # position in the epoch of its first sample
    count: int  # samples of its global batch; the last batch of an epoch may be smaller


@dataclass(frozen=True)
class Order:
    """The order of a data set of `samples` samples with identity fingerprint `identity` (hex) under a seed."""

    samples: int
    global_batch: int
    seed: int
    shards: int
    identity: str

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.global_batch)

    def plan(self, step: int) -> Plan:
        """Epoch, first position and count of the global batch that step number `step` (from 0) consumes."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.global_batch
        return Plan(epoch, first, min(self.global_batch, self.samples - first))

    def shard_of(self, epoch: int, positions: ArrayLike) -> tuple[I64, I64]:
        """The virtual shard that each position of an epoch draws from, and the place within it (int64 each)."""
        positions = np.asarray(positions, dtype=np.int64)
        rounds, over = divmod(self.samples, self.shards)
        turn, column = np.divmod(positions, self.shards)
        # After the full rounds only the `over` shards that hold one sample more are left to visit.
        last = turn == rounds
        shard = permute(column, np.where(last, max(over, 1), self.shards), key(self.seed, epoch, "shards", last))
        size = rounds + (shard < over)
        return shard, permute(turn, size, key(self.seed, epoch, "within", shard))

    def samples_at(self, epoch: int, positions: ArrayLike) -> I64:
        """Sample ids at positions of an epoch: int64 [n]. Over all positions each id occurs exactly once."""
        shard, place = self.shard_of(epoch, positions)
        return permute(place * self.shards + shard, self.samples, key(int(self.identity[:16], 16), "deal"))

    def batch(self, step: int) -> I64:
        """Sample ids of the whole global batch of a step, in order: int64 [count]."""
        plan = self.plan(step)
        return self.samples_at(plan.epoch, np.arange(plan.first, plan.first + plan.count))

    def part(self, step: int, *, rank: int, world: int, assignment: str = "contiguous") -> I64:
        """Places (0 .. count-1) in the global batch of a step that a rank trains on: int64 [m], possibly empty."""
        plan = self.plan(step)
        if assignment == "contiguous":  # parts differ by at most one
            return np.arange(rank * plan.count // world, (rank + 1) * plan.count // world)
        shard, _ = self.shard_of(plan.epoch, np.arange(plan.first, plan.first + plan.count))
        return np.flatnonzero(shard % world == rank)


def check_owner(*, shards: int, world: int) -> None:
    """Owner assignment gives every rank the same number of shards. Raises UserError with the next good number."""
    if shards % world:
        good = -(-shards // world) * world
        raise UserError("data.assignment=owner needs data.shards to be a multiple of the number of ranks, got "
                        f"{shards} shards for {world} ranks. Use data.shards={good} (a new run: it changes the order).")
