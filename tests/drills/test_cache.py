"""Kill -9 at random while caches are staged and filled: the rerun ends with the source's records and nothing else."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from alexnet_ddp.data.caches import cache as caches_module
from alexnet_ddp.data.caches.space import file_system
from caches import Pieces, make_pieces, shares

pytestmark = pytest.mark.drill
KILLS = 20
SAMPLES = 6000


@pytest.fixture(params=["disk", "ram"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(kind: str, tmp_path: Path) -> Iterator[Path]:
    """Where a cache of this kind lies: on the disk of the tests' own folder, or in memory."""
    if kind == "ram" and file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if kind == "ram" else tmp_path) as folder:
        yield Path(folder)


def fill(pieces: Pieces, kind: str, *, rank: int, world: int) -> None:
    """A rank's first epoch: four threads read its samples in a random order, while `disk` is staged as well."""
    cache = pieces.open_one(kind, rank=rank, world=world)
    mine = [sample for sample in range(SAMPLES) if cache._home[sample] != -2**31]
    random.shuffle(mine)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda sample: pieces.check([cache], [sample]), mine))
    while kind == "disk" and cache._stager is not None and cache._stager.busy:
        time.sleep(0.001)
    assert cache.progress().complete
    cache.close()


def start(pieces: Pieces, kind: str, *, rank: int, world: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        random.seed()
        fill(pieces, kind, rank=rank, world=world)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["original", "raw10"])
def test_kills(tmp_path: Path, base: Path, kind: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 times a world of 1 to 3 ranks is killed in the middle: what is left is right, and the rerun, on another world,
    ends with every record byte-equal, no CRC wrong, and no file but those of a cache that was never killed."""
    pieces = make_pieces(tmp_path, base=base, stage=stage, samples=SAMPLES, shards=12, longest=3000)
    dice = random.Random(f"{kind} {stage}")
    began = time.monotonic()
    child = start(pieces, kind, rank=0, world=1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    whole = time.monotonic() - began  # seconds of a fill that isn't killed
    expected = pieces.files()
    pieces.open_one(kind).remove()
    assert pieces.files() == []

    kills = partial = 0
    while partial < KILLS:
        kills += 1
        assert kills <= 10 * KILLS
        world = dice.choice([1, 2, 3])
        children = [start(pieces, kind, rank=rank, world=world) for rank in range(world)]
        time.sleep(dice.uniform(0.0, whole))
        for child in dice.sample(children, world):
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)

        with monkeypatch.context() as patch:  # a look at what is left, by ranks that fill nothing in the background
            patch.setattr(caches_module, "Stager", lambda *_: None)
            left = pieces.open(kind, world=2)
            held = sum(cache.progress().held for cache in left)
            partial += 0 < held < SAMPLES
            for cache in left:
                assert sum(shares(cache)) == cache.progress().held, f"kill {kills}: an entry without its record"
                cache.close()

        again = dice.choice([1, 2, 3])
        children = [start(pieces, kind, rank=rank, world=again) for rank in range(again)]
        for child in children:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pieces.files() == expected, f"kill {kills}: stray files"
        pieces.source.asked.clear()
        done = pieces.open_one(kind)
        pieces.check([done])
        assert done.progress().complete and not done.progress().refetched and not pieces.source.asked
        done.remove()
        assert list(base.iterdir()) == []
    print(f"{kind} {stage}: {kills} kills within {whole:.2f} s each, {partial} of them in the middle of filling")
