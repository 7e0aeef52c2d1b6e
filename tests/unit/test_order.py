"""Order: every sample once an epoch, evenly over the shards, keyed by content, in no memory; parts that partition."""

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import harness
from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.order import Order, Plan, check_owner, permutation, permute, unpermute
from alexnet_ddp.errors import UserError

IDENTITY = "0123456789abcdef" * 4
SIZES = [(1, 1, 1), (1, 8, 64), (2, 1, 1), (7, 3, 2), (10, 4, 3), (64, 64, 64), (65, 64, 64), (100, 7, 8),
         (101, 10, 101), (700, 256, 64), (1003, 32, 7), (1000, 1000, 10), (1000, 2000, 10)]  # samples, batch, shards


def order(samples: int, global_batch: int, shards: int, *, seed: int = 0, identity: str = IDENTITY) -> Order:
    return Order(samples, global_batch=global_batch, seed=seed, shards=shards, identity=identity)


def epoch_of(plan: Order, epoch: int) -> list[int]:
    first = epoch * plan.steps_per_epoch
    return np.concatenate([plan.batch(step) for step in range(first, first + plan.steps_per_epoch)]).tolist()


@pytest.mark.parametrize("size", [*range(1, 70), 97, 128, 255, 256, 257, 1000, 4093, 65_537])
def test_permute_is_a_permutation(size: int) -> None:
    """For every size and several keys each index is sent somewhere else in range, none twice."""
    for key in (0, 1, 2**64 - 1):
        found = permute(np.arange(size), size, key)
        assert found.dtype == np.int64
        assert np.array_equal(np.sort(found), np.arange(size))


def test_permute_mixes() -> None:
    """Where an index lands is unrelated to where it was and to other keys; every place is equally likely."""
    n = 10_000
    one, other = permute(np.arange(n), n, 1), permute(np.arange(n), n, 2)
    for a, b in ((one, np.arange(n)), (one, other), (one[:-1], one[1:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(n)
    assert (np.diff(one) == 1).sum() < 10  # neighbours part
    small = permute(np.zeros(70_000), 7, np.arange(70_000))
    assert ((np.bincount(small) - 10_000) ** 2 / 10_000).sum() < 30  # chi-square, 6 degrees of freedom


def test_permute_broadcasts() -> None:
    """Sizes and keys may differ from index to index: each result is that of its own permutation."""
    index, size, keys = np.array([0, 3, 4, 9]), np.array([1, 4, 9, 10]), np.array([5, 6, 7, 8])
    found = permute(index, size, keys).tolist()
    assert found == [int(permute(i, s, k)) for i, s, k in zip(index, size, keys, strict=True)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 64, 65, 1000, 4093, 40_000])
def test_unpermute_is_the_inverse(size: int) -> None:
    """What permute sends somewhere comes back, one size or many; `permutation` is all of it at once."""
    for key in (0, 1, 2**64 - 1):
        found = permutation(size, key)
        assert found.tolist() == permute(np.arange(size), size, key).tolist()
        assert unpermute(found, size, key).tolist() == list(range(size))
    index, sizes, keys = np.arange(size) % 7, np.arange(size) % 5 + 7, np.arange(size)
    assert unpermute(permute(index, sizes, keys), sizes, keys).tolist() == index.tolist()


def test_golden_order() -> None:
    """These orders never change: a run of any age goes on with the samples that it was begun with."""
    small = order(10, 4, 3, seed=1)
    assert [small.batch(step).tolist() for step in range(6)] == [
        [7, 4, 9, 6], [8, 0, 2, 5], [1, 3], [4, 3, 9, 5], [6, 1, 8, 2], [0, 7]]
    imagenet = order(1_281_167, 256, 64, identity="ff" * 32)
    assert imagenet.batch(0)[:6].tolist() == [491046, 486785, 1166902, 43866, 722056, 1182001]
    assert imagenet.batch(5004)[:3].tolist() == [687734, 1001287, 361685]
    assert imagenet.batch(123_456)[:3].tolist() == [153833, 1031674, 439178]


@pytest.mark.parametrize(("samples", "global_batch", "shards"), SIZES)
def test_every_sample_once_an_epoch(samples: int, global_batch: int, shards: int) -> None:
    """In every epoch each sample comes exactly once, none is dropped or padded, and no two epochs are alike."""
    plan = order(samples, global_batch, shards)
    epochs = [epoch_of(plan, epoch) for epoch in range(3)]
    for found in epochs:
        assert sorted(found) == list(range(samples))
    if samples > 10:
        assert epochs[0] != epochs[1] != epochs[2]


def test_plan() -> None:
    """A plan is pure: epoch, first position and count of every step; only an epoch's last batch is smaller."""
    plan = order(10, 4, 3)
    assert plan.steps_per_epoch == 3
    assert [plan.plan(step) for step in range(5)] == [Plan(0, 0, 4), Plan(0, 4, 4), Plan(0, 8, 2), Plan(1, 0, 4),
                                                      Plan(1, 4, 4)]
    assert order(8, 4, 3).plan(1) == Plan(0, 4, 4)
    assert order(3, 8, 1).plan(7) == Plan(7, 0, 3)
    for samples, global_batch, shards in SIZES:
        plan = order(samples, global_batch, shards)
        assert sum(plan.plan(step).count for step in range(plan.steps_per_epoch)) == samples


def test_steps_are_independent() -> None:
    """A step's samples are the same whether or not any step before it was asked for, and for any cut of positions."""
    plan = order(1003, 32, 7)
    assert plan.batch(57).tolist() == order(1003, 32, 7).batch(57).tolist()
    whole = plan.samples_at(2, np.arange(1003))
    for cut in (np.arange(5), np.array([1002, 0, 500]), np.arange(0)):
        assert plan.samples_at(2, cut).tolist() == whole[cut].tolist()
    # The order is one of positions: another batch size cuts the same epoch elsewhere.
    assert epoch_of(order(1003, 32, 7), 1) == epoch_of(order(1003, 100, 7), 1)


@pytest.mark.parametrize(("samples", "global_batch", "shards"), SIZES)
def test_batches_take_evenly_from_shards(samples: int, global_batch: int, shards: int) -> None:
    """Shards differ by at most one sample, and no batch takes over one more from one than from another.

    Where the shards' sizes differ the last samples of an epoch can't come from all: there it is two.
    """
    plan = order(samples, global_batch, shards)
    even = samples // shards * shards  # positions below take from all shards in turn
    for step in range(2 * plan.steps_per_epoch):
        where = plan.plan(step)
        shard, _ = plan.shard_of(where.epoch, np.arange(where.first, where.first + where.count))
        taken = np.bincount(shard, minlength=shards)
        assert taken.max() - taken.min() <= (1 if where.first + where.count <= even else 2)
    sizes = np.bincount(plan.shard_of(0, np.arange(samples))[0], minlength=shards)
    assert sizes.max() - sizes.min() <= 1


def test_shards_hold_the_same_samples_for_ever() -> None:
    """Which shard a sample lies in depends on no seed and no epoch, so that a rank can stage the shards it owns."""
    def members(plan: Order, epoch: int) -> list[set[int]]:
        shard, _ = plan.shard_of(epoch, np.arange(plan.samples))
        ids = plan.samples_at(epoch, np.arange(plan.samples))
        return [set(ids[shard == number].tolist()) for number in range(plan.shards)]

    first = members(order(1003, 32, 7), 0)
    assert members(order(1003, 32, 7), 5) == first
    assert members(order(1003, 100, 7, seed=9), 2) == first
    assert members(order(1003, 32, 7, identity="f" * 64), 0) != first


@pytest.mark.parametrize(("samples", "global_batch", "shards"), SIZES)
def test_home_is_where_a_sample_is_drawn_from(samples: int, global_batch: int, shards: int) -> None:
    """Any sample's shard and place are those that every epoch draws it from; a shard's places have no holes."""
    plan = order(samples, global_batch, shards)
    shard, place = plan.home(np.arange(samples))
    for epoch in (0, 3):
        ids = plan.samples_at(epoch, np.arange(samples))
        assert np.array_equal((shard[ids], place[ids]), plan.shard_of(epoch, np.arange(samples)))
    for number in range(shards):
        assert sorted(place[shard == number]) == list(range((shard == number).sum()))


@pytest.mark.parametrize("assignment", ["contiguous", "owner"])
@pytest.mark.parametrize("world", range(1, 9))
def test_parts_partition_each_batch(world: int, assignment: str) -> None:
    """The ranks' parts of each batch are disjoint, in order and make it up, also with more ranks than samples."""
    for samples, global_batch, shards in SIZES:
        plan = order(samples, global_batch, shards * world if assignment == "owner" else shards)
        for step in {0, 1, plan.steps_per_epoch - 1, plan.steps_per_epoch}:
            parts = [plan.part(step, rank=rank, world=world, assignment=assignment) for rank in range(world)]
            places = np.concatenate(parts)
            count = plan.plan(step).count
            assert sorted(places.tolist()) == list(range(count))
            assert all((np.diff(part) > 0).all() for part in parts)
            if assignment == "contiguous":
                assert places.tolist() == list(range(count))  # in rank order, so that traces of any world compare
                assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("assignment", ["contiguous", "owner"])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_parts_of_many_steps(world: int, assignment: str) -> None:
    """Parts of many steps computed at once are those of each step, whatever steps of an epoch are taken together."""
    for samples, global_batch, shards in SIZES:
        plan = order(samples, global_batch, shards * world if assignment == "owner" else shards)
        per_epoch = plan.steps_per_epoch
        for first, last in ((0, per_epoch), (per_epoch, per_epoch + 1), (per_epoch + per_epoch // 2, 2 * per_epoch)):
            for rank in range(world):
                found, bounds = plan.parts(range(first, last), rank=rank, world=world, assignment=assignment)
                for number, step in enumerate(range(first, last)):
                    part = plan.part(step, rank=rank, world=world, assignment=assignment)
                    assert found[bounds[number]:bounds[number + 1]].tolist() == (plan.plan(step).first + part).tolist()
                assert bounds[-1] == len(found)


def test_owners_own_shards() -> None:
    """Under owner assignment a rank gets samples of the shards `v % world == rank` and of no other, in any epoch."""
    plan = order(1003, 32, 12)
    shard_of_sample = np.zeros(1003, np.int64)
    positions = np.arange(1003)
    shard_of_sample[plan.samples_at(0, positions)] = plan.shard_of(0, positions)[0]
    for step in (0, 5, 31, 40, 100):
        for rank in range(4):
            part = plan.part(step, rank=rank, world=4, assignment="owner")
            assert set(shard_of_sample[plan.batch(step)[part]] % 4) <= {rank}


def test_owner_needs_a_multiple() -> None:
    """Shards that aren't a multiple of the world are refused with the next number that is."""
    check_owner(shards=64, world=8)
    with pytest.raises(UserError, match=r"Use data\.shards=66 "):
        check_owner(shards=64, world=3)


def test_seeds_and_identities_differ() -> None:
    """Another seed or another content gives another order; the same content under another path the same."""
    base = epoch_of(order(1003, 32, 7), 0)
    for changes in ({"seed": 1}, {"seed": 2**63 - 1}, {"identity": "f" * 64}):
        found = epoch_of(order(1003, 32, 7, **changes), 0)
        assert np.equal(found, base).mean() < 0.02
        assert sorted(found) == sorted(base)


def test_content_not_path_keys_the_order(tmp_path: Path) -> None:
    """A copy of the data under another path has the same order; one more file makes it another."""
    first = harness.make_images(tmp_path / "a" / "train", samples=9)
    copy = tmp_path / "other" / "place"
    shutil.copytree(first, copy)

    def batches(folder: Path) -> list[int]:
        with open_index(str(folder), cache_dir=tmp_path / "cache") as index:
            return epoch_of(order(len(index), 4, 3, identity=index.identity), 0)

    assert batches(copy) == batches(first)
    (copy / "class0" / "00000.jpg").rename(copy / "class0" / "renamed.jpg")
    with open_index(str(copy), cache_dir=tmp_path / "cache") as index, \
            open_index(str(first), cache_dir=tmp_path / "cache") as before:
        assert index.identity != before.identity


def test_fourteen_million_take_no_memory() -> None:
    """Any step of ImageNet-21k's size, first or last of any epoch, is computed in under a megabyte."""
    plan = order(14_197_122, 256, 64)
    tracemalloc.start()
    try:
        batches = [plan.batch(step) for step in (0, 1, 27_728, 55_457, 55_458, 4_000_000)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    for batch in batches:
        assert len(np.unique(batch)) == len(batch) > 0
        assert batch.min() >= 0
        assert batch.max() < 14_197_122
