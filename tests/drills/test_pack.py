"""Packs under SIGKILL, and of real photographs (`make drills`; some three minutes on two cores)."""

import multiprocessing
import os
import random
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

import harness
import packs
from alexnet_ddp.data.decoding.stages import parse_stage, to_stage
from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.packs.pack import pack
from alexnet_ddp.data.packs.verify import verify
from photographs import archive

pytestmark = pytest.mark.drill

KILLS = 20
# One server imports all that is needed and forks the packs, so that kills strike the work and not Python's start.
_context = multiprocessing.get_context("forkserver")
PRELOADED = ["alexnet_ddp.data.packs.pack", "alexnet_ddp.cli"]


def _pack(words: list[str], cache: str, output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["ALEXNET_DDP_CACHE"] = cache
    from alexnet_ddp.cli import main

    sys.exit(main(["data", "pack", *words]))


@dataclass
class Packs:
    """Starts packs of one source, with what they say in one file."""

    folder: Path
    words: list[str]

    def start(self, to: Path, *words: str) -> BaseProcess:
        _context.set_forkserver_preload(PRELOADED)  # the whole process's, so not at the import, for other files' sake
        process = _context.Process(target=_pack, args=([self.words[0], str(to), *self.words[1:], *words],
                                                       str(self.folder / "cache"), str(self.folder / "said")))
        process.start()
        return process

    def finish(self, to: Path) -> None:
        """Asserts that a pack ends well."""
        process = self.start(to)
        process.join()
        assert process.exitcode == 0, (self.folder / "said").read_text()[-3000:]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["short256", "raw64"])
def test_killed_at_random(tmp_path: Path, stage: str) -> None:
    """SIGKILL at 20 random moments of packs of 300 images, each gone on with on other threads: the same bytes.

    Half of the kills strike one pack again and again, half a fresh one each; all end with no stray file.
    """
    source = harness.make_images(tmp_path / "source", samples=300, size=120)
    runs = Packs(tmp_path, [str(source), "--stage", stage, "--samples-per-shard", "13"])
    draw = random.Random(stage)
    runs.finish(tmp_path / "first")  # the server's start, the index
    began = time.perf_counter()
    runs.finish(tmp_path / "whole")
    seconds, whole = time.perf_counter() - began, packs.content(tmp_path / "whole")
    assert len(whole) == 25  # 24 shards and pack.json
    struck = 0
    left_over = []  # finished shards that each kill left
    while struck < KILLS:
        to = tmp_path / ("often" if struck % 2 else f"once{struck}")
        process = runs.start(to, "--threads", str(draw.choice([1, 2, 5])))
        time.sleep(draw.uniform(0, seconds) * (0.6 if struck % 2 else 1.0))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it had finished: that is no kill
            assert packs.content(to) == whole
            to.rename(tmp_path / f"finished{draw.random()}")
            continue
        assert process.exitcode == -9, (tmp_path / "said").read_text()[-3000:]
        struck += 1
        left_over.append(len(list(to.glob("[0-9]*.tar"))))
        if to.name != "often":
            runs.finish(to)
            assert packs.content(to) == whole
    runs.finish(tmp_path / "often")
    assert packs.content(tmp_path / "often") == whole
    print(f"{KILLS} kills; finished shards, of 24, that they left: {sorted(left_over)}")
    assert len(set(left_over)) >= 5, f"the kills struck at few places: {left_over}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["original", "short256", "max500", "raw256"])
def test_photographs(tmp_path: Path, stage: str) -> None:
    """700 photographs in each stage: the tar's ids, labels and identity, and the bytes that are made at each read."""
    source = f"{archive('imagenet-sample.tar')}::train"
    made = pack(source, destination=tmp_path / "pack", stage=stage, samples_per_shard=150, cache_dir=tmp_path)
    assert (made.samples, made.damaged, made.shards) == (700, [], 5)
    with open_index(source, cache_dir=tmp_path) as before, open_index(str(tmp_path / "pack"),
                                                                      cache_dir=tmp_path) as after:
        assert (after.stage, after.identity, after.classes) == (stage, before.identity, before.classes)
        assert np.array_equal(after.labels, before.labels)
        for sample in range(700):
            assert after.name(sample) == before.name(sample)
        for sample in range(0, 700, 7):
            assert after.read(sample) == to_stage(before.read(sample), parse_stage(stage))
    report = verify(str(tmp_path / "pack"), decode=True, cache_dir=tmp_path)
    assert report.is_well, report.summary()
