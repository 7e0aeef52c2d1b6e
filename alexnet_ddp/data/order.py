"""Which samples make up which step, and which rank gets which of them: pure functions, nothing is kept.

A fixed permutation of the data set (keyed by its identity, the same for every seed) deals the samples round-robin
into V virtual shards whose sizes differ by at most one. In each epoch the shards, and the samples within each, are
permuted, and positions walk over the shards in turn, so that every global batch takes evenly from all of them.

The permutations are computed point by point, so that resuming costs nothing and an epoch of any size takes no
memory: a generalised Feistel network on a grid a x b >= n, walked until it lands below n (Black and Rogaway:
Ciphers with Arbitrary Finite Domains, CT-RSA 2002, sections 4 and 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alexnet_ddp.data.randomness import U64, key, mix
from alexnet_ddp.errors import UserError

I64 = NDArray[np.int64]

_ROUNDS = 8  # four make a strong pseudo-random permutation of a large domain; small domains like some more
_CHUNK = 1 << 14  # indices at a time: the few arrays of 128 KiB stay in a core's cache


def permute(index: ArrayLike, size: ArrayLike, keys: ArrayLike) -> I64:
    """Where the permutation of `range(size)` under `keys` sends each index (arguments broadcast, int64 out)."""
    return _in_chunks(_feistel, index, size, keys)


def unpermute(image: ArrayLike, size: ArrayLike, keys: ArrayLike) -> I64:
    """Which index `permute` sends to each image (arguments broadcast, int64 out)."""
    return _in_chunks(_unfeistel, image, size, keys)


def permutation(size: int, keys: ArrayLike) -> I64:
    """The whole permutation of `range(size)` under a key: int64 [size], and no other array of that length."""
    result = np.empty(size, dtype=np.int64)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        result[start:stop] = permute(np.arange(start, stop), size, keys)
    return result


Network = Callable[[U64, U64, U64, U64], U64]


def _in_chunks(network: Network, index: ArrayLike, size: ArrayLike, keys: ArrayLike) -> I64:
    index, size, keys = np.asarray(index), np.asarray(size), np.asarray(keys)
    result = np.empty(np.broadcast_shapes(index.shape, size.shape, keys.shape), dtype=np.int64)
    flat, index = result.reshape(-1), np.broadcast_to(index, result.shape).reshape(-1)
    # Sizes and keys that are the same for all stay single numbers: dividing by one number is quick.
    rest = [each.reshape(()) if each.size == 1 else np.broadcast_to(each, result.shape).reshape(-1)
            for each in (size, keys)]
    for start in range(0, flat.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        flat[part] = _walk(network, *(each[part].astype(np.uint64) if each.ndim else each.astype(np.uint64)
                                      for each in (index, *rest)))
    return result


def _walk(network: Network, x: U64, size: U64, keys: U64) -> U64:
    """The network on the smallest grid for `size`, again and again for what lands outside `range(size)`."""
    rows = np.maximum(np.ceil(np.sqrt(size.astype(np.float64))), 1).astype(np.uint64)
    columns = np.maximum((size + rows - np.uint64(1)) // rows, np.uint64(1))
    result = network(x, rows, columns, keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:  # under 2 sqrt(n) of the grid's points lie outside, so this ends soon
        again = network(result[outside], *(each[outside] if each.ndim else each for each in (rows, columns, keys)))
        result[outside] = again
        outside = outside[again >= (size[outside] if size.ndim else size)]
    return result


def _feistel(x: U64, rows: U64, columns: U64, keys: U64) -> U64:
    right, left = _divided(x, rows)  # left in range(rows), right in range(columns)
    with np.errstate(over="ignore"):
        for turn in range(_ROUNDS):
            if turn % 2 == 0:
                left = _divided(left + _round(right, keys, turn), rows)[1]
            else:
                right = _divided(right + _round(left, keys, turn), columns)[1]
    return left + rows * right


def _unfeistel(x: U64, rows: U64, columns: U64, keys: U64) -> U64:
    """The inverse of _feistel: its rounds backwards, subtracted."""
    right, left = _divided(x, rows)
    with np.errstate(over="ignore"):
        for turn in reversed(range(_ROUNDS)):
            if turn % 2 == 0:
                left = _divided(left + rows - _divided(_round(right, keys, turn), rows)[1], rows)[1]
            else:
                right = _divided(right + columns - _divided(_round(left, keys, turn), columns)[1], columns)[1]
    return left + rows * right


def _round(half: U64, keys: U64, turn: int) -> U64:
    return mix(half ^ (keys + np.uint64(0x9E3779B97F4A7C15) * np.uint64(turn + 1))) >> np.uint64(16)


def _divided(x: U64, by: U64) -> tuple[U64, U64]:
    """Quotient and remainder; NumPy has SIMD for dividing by one number, but none for a remainder."""
    quotient = x // by
    return quotient, x - quotient * by


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
        return permute(place * self.shards + shard, self.samples, self._deal)

    def home(self, samples: ArrayLike) -> tuple[I64, I64]:
        """The virtual shard that each sample id lies in, and its place there: the same in every epoch (int64 each).

        The inverse of the deal: over all samples each (shard, place) occurs once, places of a shard without holes.
        """
        place, shard = np.divmod(unpermute(samples, self.samples, self._deal), self.shards)
        return shard, place

    @property
    def _deal(self) -> U64:
        return key(int(self.identity[:16], 16), "deal")

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

    def parts(self, steps: range, *, rank: int, world: int, assignment: str = "contiguous") -> tuple[I64, I64]:
        """`part` of many steps of one epoch at once: positions in the epoch, int64 [m], and where each step's begin
        among them, int64 [steps + 1]. A hundred times as quick as one by one."""
        plans = [self.plan(step) for step in steps]
        assert all(plan.epoch == plans[0].epoch for plan in plans)
        ends = np.array([plan.first for plan in plans] + [plans[-1].first + plans[-1].count])
        if assignment == "contiguous":
            mine = np.concatenate([plan.first + np.arange(rank * plan.count // world, (rank + 1) * plan.count // world)
                                   for plan in plans])
        else:
            positions = np.arange(ends[0], ends[-1])
            mine = positions[self.shard_of(plans[0].epoch, positions)[0] % world == rank]
        return mine, np.searchsorted(mine, ends)


def check_owner(*, shards: int, world: int) -> None:
    """Owner assignment gives every rank the same number of shards. Raises UserError with the next good number."""
    if shards % world:
        good = -(-shards // world) * world
        raise UserError("data.assignment=owner needs data.shards to be a multiple of the number of ranks, got "
                        f"{shards} shards for {world} ranks. Use data.shards={good} (a new run: it changes the order).")
