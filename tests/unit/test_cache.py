"""Caches on the node: what they hold, what they survive, what they leave behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alexnet_ddp.data.caches import cache as caches_module
from alexnet_ddp.data.caches import space
from alexnet_ddp.data.caches.cache import CachedRecords, sweep_caches
from alexnet_ddp.data.caches.cache_file import ShardFile
from alexnet_ddp.data.caches.staging import storage_order
from alexnet_ddp.data.decoding.stages import parse_stage, to_stage
from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.order import Order
from alexnet_ddp.errors import RunFailed, UserError
from caches import CountedRecords, Pieces, make_pieces, shares

KINDS = ("disk", "ram")
STAGES = ("original", "raw10")


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder in memory, where data.cache=ram must lie."""
    if space.file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No background thread: the test alone decides what is read."""
    monkeypatch.setattr(caches_module, "Stager", lambda *_: None)


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# --- equality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_record_is_the_sources(tmp_path: Path, base: Path, kind: str, stage: str) -> None:
    """Worlds of 1, 2 and 3 with a switch in mid-epoch read what the source has; once full, without asking it."""
    pieces = make_pieces(tmp_path, base=base, stage=stage)
    first_half = pieces.order.samples_at(0, np.arange(50))
    before = pieces.open(kind, world=2)
    pieces.check(before, first_half.tolist())
    held = sum(cache.progress().held for cache in before)
    assert held >= 50
    for cache in before:
        cache.close()
    for world in (3, 1, 2):
        after = pieces.open(kind, world=world)
        assert sum(cache.progress().held for cache in after) >= held  # nothing is per rank
        pieces.check(after)
        assert all(cache.progress().complete and not cache.progress().refetched for cache in after)
        held = sum(cache.progress().held for cache in after)
        assert held == 101 and sum(cache.progress().bytes for cache in after) == sum(map(len, pieces.truth))
        pieces.source.asked.clear()
        for cache in after:
            mine = [sample for sample in range(101) if cache._home[sample] >= 0]
            pieces.check([cache], mine)
            assert len(mine) == cache.progress().samples
        assert not pieces.source.asked
        for cache in after:
            cache.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["raw16", "short16"])
def test_conversions_are_kept(tmp_path: Path, base: Path, kind: str, stage: str) -> None:
    """A stage that is made from originals is made once, kept as the same bytes, and made anew by other versions."""
    random = np.random.default_rng(3)
    for number in range(6):
        folder = tmp_path / "photographs" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20 + number, 40, 3), np.uint8)).save(folder / f"{number}.jpg")
    pieces = make_pieces(tmp_path, base=base)
    pieces.index = open_index(str(tmp_path / "photographs"), cache_dir=tmp_path / "indexes")
    pieces.order = Order(6, global_batch=2, seed=1, shards=2, identity=pieces.index.identity)
    pieces.source = CountedRecords(pieces.index, stage)
    truth = [to_stage(pieces.index.read(sample), parse_stage(stage)) for sample in range(6)]
    for attempt in range(2):
        cache = pieces.open_one(kind)
        assert [cache.read(sample) for sample in range(6)] == truth
        wait_until(lambda cache=cache: cache.progress().complete)
        cache.close()
        if not attempt:
            pieces.source.asked.clear()
    assert not pieces.source.asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches_module, "VERSIONS", "pillow 0, simplejpeg 0")
        patch.setattr(caches_module, "Stager", lambda *_: None)
        cache = pieces.open_one(kind)
        assert cache.progress().held == 0
        cache.remove()
    assert not pieces.files()


def test_only_some_samples(tmp_path: Path, base: Path) -> None:
    """With data.limit the cache holds those samples and no others."""
    pieces = make_pieces(tmp_path, base=base)
    ids = np.arange(40) * 101 // 40
    pieces.order = type(pieces.order)(40, global_batch=10, seed=1, shards=6, identity=pieces.order.identity)
    caches = pieces.open("ram", world=2, ids=ids)
    pieces.check(caches)
    assert [cache.progress().held for cache in caches] == [cache.progress().samples for cache in caches]
    held = {sample for cache in caches for sample, there in enumerate(shares(cache)) if there}
    assert held == set(ids.tolist())
    for cache in caches:
        cache.close()


def test_staging_reads_as_stored(tmp_path: Path, base: Path) -> None:
    """The background thread fills a rank's whole part, each record once, in the source's order."""
    pieces = make_pieces(tmp_path, base=base)
    cache = pieces.open_one("disk", rank=1, world=2)
    wait_until(lambda: cache.progress().complete)
    asked = np.array(pieces.source.asked)
    assert len(asked) == cache.progress().samples == len(set(asked.tolist()))
    assert (np.diff(pieces.index.table.offsets[asked]) > 0).all()
    assert (storage_order(pieces.index, np.sort(asked)) == asked).all()
    cache.close()


def test_closing_ends_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """close() in the midst of staging returns once the thread has ended, and nothing is read after."""
    pieces = make_pieces(tmp_path)
    read = pieces.source.read

    def slow(sample: int) -> bytes:
        time.sleep(0.02)
        return read(sample)

    monkeypatch.setattr(pieces.source, "read", slow)
    cache = pieces.open_one("disk")
    wait_until(lambda: cache.progress().held)
    cache.close()
    asked = len(pieces.source.asked)
    assert not any(thread.name == "staging" for thread in threading.enumerate())
    assert asked < 101 and cache.progress().held == asked


def test_ram_reads_nothing_of_its_own(tmp_path: Path, base: Path) -> None:
    """data.cache=ram asks the source only for what the loader asked for."""
    pieces = make_pieces(tmp_path, base=base)
    cache = pieces.open_one("ram")
    pieces.check([cache], [3, 99, 3])
    time.sleep(0.05)
    assert pieces.source.asked == [3, 99] and cache.progress().held == 2
    cache.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_eight_threads(tmp_path: Path, base: Path, kind: str, stage: str) -> None:
    """Threads that read the same samples while it fills all get the source's bytes; no record is kept twice."""
    pieces = make_pieces(tmp_path, base=base, stage=stage)
    cache = pieces.open_one(kind)

    def hammer(seed: int) -> None:
        for _ in range(3):
            pieces.check([cache], np.random.default_rng(seed).permutation(101).tolist())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hammer, [1, 1, 2, 2, 3, 3, 4, 4]))
    now = cache.progress()
    assert now.complete and now.bytes == sum(map(len, pieces.truth)) and not now.refetched
    cache.close()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_few_descriptors(tmp_path: Path, base: Path, kind: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more shards than may stay open all is the same, and closing gives back every descriptor and thread."""
    pieces = make_pieces(tmp_path, base=base, stage=stage)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    monkeypatch.setattr(caches_module, "KEPT_OPEN", 2)
    cache = pieces.open_one(kind)
    pieces.check([cache])
    pieces.check([cache])
    cache.close()
    cache.close()  # harmless
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_more_shards_than_samples(tmp_path: Path, base: Path) -> None:
    """Virtual shards without samples have no file."""
    pieces = make_pieces(tmp_path, base=base, samples=5, shards=8)
    cache = pieces.open_one("ram")
    pieces.check([cache])
    assert cache.progress().complete
    assert [path.name for path in pieces.files()] == [*(f"{n:05d}.shard" for n in range(5)), "about.json", "lock"]
    cache.close()


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_kill_while_filling(tmp_path: Path, base: Path, kind: str, stage: str) -> None:
    """After kill -9 of the rank that fills, what it kept is right, and the next attempt goes on with it."""
    pieces = make_pieces(tmp_path, base=base, stage=stage)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            cache = pieces.open_one(kind)
            for sample in range(101):
                pieces.check([cache], [sample])
                os.write(writing, b".")
        finally:
            os._exit(1)
    assert len(os.read(reading, 1)) == 1
    while len(pieces.files()) < 8 or sum(path.stat().st_blocks for path in pieces.files()) < 60:
        os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    cache = pieces.open_one(kind)
    held = cache.progress().held
    assert held > 0
    pieces.check([cache])
    assert cache.progress().complete and not cache.progress().refetched
    assert len(pieces.source.asked) == 101 - held
    cache.remove()
    assert not pieces.files()


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", ["record", "entry", "short", "zeros", "gone"])
def test_damage_is_mended(tmp_path: Path, base: Path, kind: str, stage: str, harm: str) -> None:
    """Flipped bits, a wrong table, a file cut short or emptied: found, counted where a CRC tells, never served."""
    pieces = make_pieces(tmp_path, base=base, stage=stage)
    cache = pieces.open_one(kind)
    pieces.check([cache])
    cache.close()
    shard = next(path for path in pieces.files() if path.name == "00002.shard")
    content = bytearray(shard.read_bytes())
    if harm == "record":
        content[-7] ^= 4
    elif harm == "entry":
        content[5 * 16 + 12] ^= 1  # the CRC of place 5
        content[6 * 16 + 5] ^= 255  # its offset: far outside
    elif harm == "short":
        del content[-150:]
    elif harm == "zeros":  # a power-off: the size was kept, the data was not
        content[4096:] = bytes(len(content) - 4096)
    else:
        content.clear()
    shard.write_bytes(content)
    cache = pieces.open_one(kind)
    pieces.check([cache])
    now = cache.progress()
    assert now.complete and now.refetched == {"record": 1, "entry": 1, "zeros": 17}.get(harm, now.refetched)
    cache.close()
    cache = pieces.open_one(kind)
    pieces.check([cache])
    assert cache.progress().complete and not cache.progress().refetched  # it was mended
    cache.close()


@pytest.mark.usefixtures("unhurried")
def test_a_record_that_goes_later(tmp_path: Path) -> None:
    """A file that is cut short after its records were verified costs reads from the source, not the run."""
    pieces = make_pieces(tmp_path)
    cache = pieces.open_one("disk")
    pieces.check([cache])
    for path in pieces.files():
        if path.suffix == ".shard":
            os.truncate(path, 4096)
    pieces.check([cache])
    assert cache.progress().refetched > 0
    cache.close()


def test_the_source_changed(tmp_path: Path, base: Path) -> None:
    """Other data under the same names is another cache; the old one is taken away."""
    pieces = make_pieces(tmp_path, base=base)
    cache = pieces.open_one("ram")
    pieces.check([cache])
    cache.close()
    tar = Path(pieces.index.source.paths[0])
    old, changed = tar.read_bytes(), bytearray(tar.read_bytes())
    first = int(pieces.index.table.offsets[0])
    changed[first] ^= 255
    assert len(old) == len(changed)
    tar.write_bytes(changed)
    os.utime(tar, ns=(0, 0))
    pieces.index = open_index(str(tar), cache_dir=tmp_path / "indexes")
    pieces.truth[0] = pieces.index.read(0)
    assert pieces.truth[0][0] == changed[first]
    pieces.__post_init__()
    cache = pieces.open_one("ram")
    assert cache.progress().held == 0 and "wants other contents" in pieces.said[-1]
    pieces.check([cache])
    cache.remove()
    assert not pieces.files()


# --- room -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_holds(tmp_path: Path, base: Path, kind: str) -> None:
    """Ranks of a node together stay under the limit, say once that it is reached, and read the rest from the source."""
    pieces = make_pieces(tmp_path, base=base, longest=6000)
    whole = sum(map(len, pieces.truth))
    caches = pieces.open(kind, world=2, limit_bytes=whole // 3)
    for _ in range(2):
        pieces.check(caches)
    assert sum(cache.progress().bytes for cache in caches) <= whole // 3
    assert all(cache.progress().full and cache.progress().held for cache in caches)
    assert sum("takes no more: its limit" in line for line in pieces.said) == 2
    assert sum("share of the records takes" in line for line in pieces.said) == 2
    assert " kB" in pieces.said[0] and not any("0.0 GB" in line for line in pieces.said)
    for cache in caches:
        cache.close()
    used = sum(path.stat().st_blocks * 512 for path in pieces.files())
    caches = pieces.open(kind, world=3, limit_bytes=used)  # what an attempt before wrote counts
    pieces.check(caches)
    assert sum(cache.progress().bytes for cache in caches) <= whole // 3
    for cache in caches:
        cache.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tenth_is_spared(tmp_path: Path, base: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling ends before what is free falls under a tenth of what was free, whoever takes it."""
    pieces = make_pieces(tmp_path, base=base)
    free = [1_000_000]
    monkeypatch.setattr(caches_module, "room", lambda path: free[0])
    monkeypatch.setattr(caches_module, "BETWEEN_LOOKS", 2_000)
    monkeypatch.setattr(caches_module, "Stager", lambda *_: None)
    cache = pieces.open_one(kind)
    pieces.check([cache], range(20))
    free[0] = 101_900  # others have taken the rest
    before = cache.progress().bytes
    pieces.check([cache])
    assert cache.progress().full and cache.progress().bytes - before <= 2_000
    assert sum("a tenth of what was free is spared" in line for line in pieces.said) == 1
    cache.check()
    cache.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(tmp_path: Path, base: Path, kind: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space left: filling stops, one line says so, every read goes on and the run isn't ended."""
    pieces = make_pieces(tmp_path, base=base, stage=stage)
    store, kept = ShardFile.store, []

    def full(self: ShardFile, place: int, data: bytes) -> None:
        if len(kept) >= 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        kept.append(place)
        store(self, place, data)

    monkeypatch.setattr(ShardFile, "store", full)
    cache = pieces.open_one(kind)
    pieces.check([cache])
    pieces.check([cache])
    cache.check()
    assert cache.progress().held == 30 and cache.progress().full
    assert sum("No space left on device" in line for line in pieces.said) == 1
    cache.close()


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("stage", STAGES)
def test_other_faults_reach_the_main_loop(tmp_path: Path, stage: str) -> None:
    """A disk that refuses to be written for another reason (here: a limit on files' sizes) surfaces through check()."""
    pieces = make_pieces(tmp_path, stage=stage)
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            empty = pieces.open_one("disk")
            empty.close()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096 + 300, 4096 + 300))
            if stage != "original":
                os.truncate(empty._folder.shard(0), 4096)  # which the next open must make longer
            cache = pieces.open_one("disk")
            pieces.check([cache])  # the reads themselves go on
            try:
                cache.check()
            except RunFailed as error:
                code = 0 if "can't be written: File too large" in str(error) else 2
        except UserError as error:
            code = 0 if stage != "original" and "File too large" in str(error) else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_bug_in_the_thread_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks in the background is raised by check() and by close(), not lost."""
    pieces = make_pieces(tmp_path)
    monkeypatch.setattr(CachedRecords, "_has", lambda self, spot: 1 / 0)
    cache = pieces.open_one("disk")
    wait_until(lambda: not cache._stager.busy)  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError):
        cache.check()
    with pytest.raises(ZeroDivisionError):
        cache.close()


def test_the_source_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that can't be read is left out by the thread, and raises where the loader reads it."""
    pieces = make_pieces(tmp_path)
    read = pieces.source.read

    def broken(sample: int) -> bytes:
        if sample == 17:
            raise OSError(errno.EIO, "Input/output error")
        return read(sample)

    monkeypatch.setattr(pieces.source, "read", broken)
    cache = pieces.open_one("disk")
    wait_until(lambda: cache.progress().held == 100)
    cache.check()
    with pytest.raises(OSError, match="Input/output error"):
        cache.read(17)
    cache.close()


def test_memory_is_counted_as_the_kernel_does(tmp_path: Path) -> None:
    """A control group's limit less its usage, where cached files count as free; without a limit it bounds nothing."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 100\ninactive_file 150\nshmem 50\n")
    names = ("memory.max", "memory.current", "")
    assert space._group_left(tmp_path, *names) == 1000 - 700 + 250
    (tmp_path / "memory.max").write_text("max\n")
    assert space._group_left(tmp_path, *names) == 2**63
    assert 0 < space.memory_left() < 2**50


# --- the folder -----------------------------------------------------------------------------------------------------


def leave_behind(pieces: Pieces) -> Path:
    """The folder of a cache of pieces.run_dir, closed."""
    cache = pieces.open_one("ram")
    pieces.check([cache], range(5))
    cache.close()
    return cache._folder.path


STOPPED = {"status": "failed", "job": "7", "restart": 2,
           "requeue": {"decision": "stop", "job": "7", "restart": 2}}


@pytest.mark.parametrize(("state", "hours", "stays"), [
    ({"status": "running"}, 0, True),
    ({"status": "preempted"}, 23, True),
    ({"status": "failed"}, 1, True),
    ({}, 1, True),
    ({**STOPPED, "requeue": {"decision": "requeue", "job": "7", "restart": 2}}, 1, True),
    ({**STOPPED, "restart": 3}, 1, True),  # the decision was about an earlier start
    ({**STOPPED, "status": "running"}, 1, True),
    (STOPPED, 0, False),
    ({"status": "finished"}, 0, False),
    ({"status": "running"}, 25, False),
    (None, 0, False),  # the run directory has gone
])
def test_left_overs(tmp_path: Path, base: Path, state: dict[str, Any] | None, hours: float, stays: bool) -> None:
    """What another run left on the node goes at the next open, unless that run may come back for it."""
    pieces = make_pieces(tmp_path, base=base)
    left = leave_behind(pieces)
    if state is None:
        pieces.run_dir.rmdir()
    else:
        (pieces.run_dir / "state.json").write_text(json.dumps(state))
    then = time.time() - hours * 3600
    os.utime(left / "lock", (then, then))
    pieces.run_dir = tmp_path / "runs" / "two"
    pieces.run_dir.mkdir()
    cache = pieces.open_one("ram")
    assert left.exists() == stays
    assert any(f"{left} was taken away" in line for line in pieces.said) == (not stays)
    cache.remove()
    assert base.joinpath(f"alexnet-ddp-{os.geteuid()}").exists() == stays


def test_the_file_system_of_runs_is_away(tmp_path: Path, base: Path) -> None:
    """Without its folder of runs a run directory isn't known to have gone: its cache stays for a day."""
    pieces = make_pieces(tmp_path, base=base)
    left = leave_behind(pieces)
    pieces.run_dir.parent.rename(tmp_path / "unmounted")
    pieces.run_dir = tmp_path / "two"
    pieces.open_one("ram").remove()
    assert left.exists()


def test_a_run_that_is_finished_already(tmp_path: Path, base: Path) -> None:
    """What a run left that was killed between its end and the removal goes without a cache being opened."""
    pieces = make_pieces(tmp_path, base=base)
    left = leave_behind(pieces)
    assert sweep_caches("ram", base=base) == [] and left.exists()
    (pieces.run_dir / "state.json").write_text(json.dumps({"status": "finished"}))
    assert len(sweep_caches("ram", base=base)) == 1 and not left.exists()
    assert sweep_caches("ram", base=tmp_path / "nowhere") == []


def test_a_living_runs_folder_stays(tmp_path: Path, base: Path) -> None:
    """No folder goes while a process holds its lock, even of a run that says it is finished."""
    pieces = make_pieces(tmp_path, base=base)
    (pieces.run_dir / "state.json").write_text(json.dumps({"status": "finished"}))
    alive = pieces.open_one("ram")
    pieces.run_dir = tmp_path / "runs" / "two"
    pieces.open_one("ram").close()
    pieces.check([alive])
    assert alive.progress().complete and alive._folder.path.exists()
    alive.close()
    pieces.run_dir = tmp_path / "runs" / "three"
    pieces.open_one("ram").close()
    assert not alive._folder.path.exists()


def test_an_unfinished_folder_goes_when_it_is_old(tmp_path: Path, base: Path) -> None:
    """A folder without about.json is being made, or was left by a kill: an hour tells which."""
    pieces = make_pieces(tmp_path, base=base)
    house = base / f"alexnet-ddp-{os.geteuid()}"
    old, young = house / "old", house / "young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    pieces.open_one("ram").close()
    assert not old.exists() and young.exists()


def test_the_last_rank_removes(tmp_path: Path, base: Path) -> None:
    """A finished run's folder goes with the last rank of the node, and nothing stays behind."""
    pieces = make_pieces(tmp_path, base=base)
    caches = pieces.open("ram", world=3)
    pieces.check(caches)
    for cache in caches[:2]:
        cache.remove()
        assert pieces.files()
    caches[2].remove()
    assert list(base.iterdir()) == []


def test_shards_of_other_nodes_go(tmp_path: Path, base: Path) -> None:
    """When shards belong to another node after a resume, their files make room."""
    pieces = make_pieces(tmp_path, base=base)
    cache = pieces.open_one("ram")
    pieces.check([cache])
    cache.close()
    cache = pieces.open_one("ram", rank=2, world=3, neighbours=[1, 2])
    assert [path.name for path in pieces.files() if path.suffix] == [
        "00001.shard", "00002.shard", "00004.shard", "00005.shard", "about.json"]
    assert cache.progress().complete and "2 shards were taken away" in pieces.said[-1]
    cache.close()


def test_for_nobody_else(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are 0700 and files 0600, also where they were found wider; another user's folder is refused."""
    pieces = make_pieces(tmp_path, base=base)
    house = base / f"alexnet-ddp-{os.geteuid()}"
    house.mkdir(mode=0o755)
    cache = pieces.open_one("ram")
    pieces.check([cache])
    assert {path.stat().st_mode & 0o777 for path in (house, cache._folder.path)} == {0o700}
    assert all(path.stat().st_mode & 0o077 == 0 for path in pieces.files() if path.name != "about.json")
    cache.close()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    house.rename(base / "alexnet-ddp-12345")
    with pytest.raises(UserError, match="folder of one's own.*data.cache_dir"):
        pieces.open_one("ram")
    (base / "alexnet-ddp-12345").rename(base / "real")
    (base / "alexnet-ddp-12345").symlink_to(base / "real")
    with pytest.raises(UserError, match="is no folder"):
        pieces.open_one("ram")


@pytest.mark.parametrize(("kind", "system", "said"), [
    ("ram", "ext4", "needs a folder in memory"), ("disk", "nfs4", "shared by nodes"), ("ram", "lustre", "shared")])
def test_the_wrong_sort_of_folder(tmp_path: Path, kind: str, system: str, said: str,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """A ram cache on a disk, and any cache on a network's file system, are refused with the way out."""
    pieces = make_pieces(tmp_path)
    monkeypatch.setattr(space, "file_system", lambda path: system)
    with pytest.raises(UserError, match=f"{said}.*data.cache"):
        pieces.open_one(kind)


def test_a_folder_that_cant_be_made(tmp_path: Path) -> None:
    """A file in the way of data.cache_dir is told as a mistake, not a traceback."""
    pieces = make_pieces(tmp_path)
    pieces.base.write_text("")
    with pytest.raises(UserError, match="can't be used: .*data.cache_dir"):
        pieces.open_one("disk")
