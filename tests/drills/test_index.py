"""Indexing killed at random, and index and order at the full size of ImageNet."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.index.devkit import find_devkit
from benchmarks import scale
from stores import devkit, make_devkit, settle

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]

KILLS = 20
# A journal that is written at every container, so that a kill at any time finds one half done.
INDEXING = """
import sys; from pathlib import Path
from alexnet_ddp.data import journal; from alexnet_ddp.data.index import open_index
journal.SECONDS_BETWEEN_WRITES = float(sys.argv[3])
print("ready", flush=True)
print(open_index(sys.argv[1], cache_dir=Path(sys.argv[2])).identity)
"""


def start(store: str, cache: Path, between: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", INDEXING, store, str(cache), str(between)], text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def told_by(process: subprocess.Popen[str]) -> str:
    """What it printed after `ready`, once it has ended (communicate would lose what readline has taken already)."""
    assert process.stdout is not None
    with process.stdout:
        told = process.stdout.read()
    process.wait()
    return told


def contents(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def stores(folder: Path) -> dict[str, str]:
    """Forty containers each, real headers and holes for images; a class directory for each in the folder."""
    nested = scale.nested_tar(folder / "ILSVRC2012_img_train.tar", classes=40, each=250)
    (folder / "shards").mkdir()
    for number in range(40):
        scale.nested_tar(folder / f"shards/{number:02d}.tar", classes=1, each=250, first=number)
        for place in range(100):
            image = folder / f"folder/n{number:08d}/{place}.JPEG"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.touch()
    settle(folder / "folder")
    return {"nested": str(nested), "shards": str(folder / "shards"), "folder": str(folder / "folder")}


@pytest.mark.parametrize("kind", ["nested", "shards", "folder"])
def test_indexing_killed_at_random(kind: str, tmp_path: Path) -> None:
    """SIGKILL at twenty random moments, rerun after each: byte-equal cache and no stray file; killed over and over
    again without a rerun in between it comes to its end, too."""
    store = stores(tmp_path)[kind]
    process = start(store, tmp_path / "whole", 0)
    began = time.perf_counter()
    identity = told_by(process)
    whole, scan = contents(tmp_path / "whole"), time.perf_counter() - began  # seconds
    assert process.returncode == 0 and len(whole) == 1 and len(identity) == 65

    chance, found_at_work = random.Random(kind), 0
    for kill in range(KILLS):
        cache, between = tmp_path / f"cache{kill}", 0.0 if kill % 2 else 0.02  # seconds between the journal's writes
        for _ in range(1 + kill % 3):
            process = start(store, cache, between)
            time.sleep(chance.uniform(0, scan))
            process.send_signal(signal.SIGKILL)
            told_by(process)
            found_at_work += process.returncode == -signal.SIGKILL
        assert told_by(start(store, cache, between)) == identity
        assert contents(cache) == whole, kill
    assert found_at_work > KILLS // 2


def test_the_devkit_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own reader gets the same WordNet ids from the same development kit."""
    imagenet = pytest.importorskip("torchvision.datasets.imagenet")
    monkeypatch.setattr(imagenet, "_verify_archive", lambda *_: None)  # the published kit's MD5
    make_devkit(tmp_path, devkit(["n01484850", "n01440764", "n01443537"], [3, 1, 1, 2, 3, 2]))
    imagenet.parse_devkit_archive(str(tmp_path))
    kit = find_devkit([str(tmp_path)])
    assert kit is not None
    assert [wnid.encode() for wnid in imagenet.load_meta_file(str(tmp_path))[1]] == list(kit.classes)


def test_the_whole_of_imagenet(tmp_path: Path) -> None:
    """1.28 million samples open within a second in under 64 MB; two epochs of work grow by under 100 MB, no handle."""
    scale.keep_imagenet(tmp_path)
    opened = [scale.fresh("open", tmp_path) for _ in range(3)]
    assert sorted(run["seconds"] for run in opened)[1] < 1.0
    assert max(run["peak_mb"] for run in opened) < 64
    epochs = scale.fresh("epochs", tmp_path)
    assert epochs["peak_mb"] < 100 and epochs["handles"] == 0


def test_fourteen_million(tmp_path: Path) -> None:
    """A permutation of ImageNet-21k's size takes seconds at most on any machine, and under 200 MB."""
    run = scale.fresh("permutation", tmp_path)
    assert run["peak_mb"] < 200 and run["seconds"] < 5


def test_a_tar_of_a_million_images(tmp_path: Path) -> None:
    """A tar of tars with 1.28 million headers: killed twice on its way it ends with the index of an unbroken scan."""
    tar = scale.nested_tar(tmp_path / "ILSVRC2012_img_train.tar", classes=1000, each=1281, size=512)
    try:
        for seconds in (8, 12):
            process = start(str(tar), tmp_path / "cache", 2.0)
            time.sleep(seconds)
            process.kill()
            told_by(process)
            assert [Path(name).name[:6] for name in contents(tmp_path / "cache")] == [".part-"]
        with open_index(str(tar), cache_dir=tmp_path / "cache") as index:
            assert len(index) == 1_281_000
            assert os.path.basename(index.where(0)).startswith("n01440764_0.JPEG at offset ")
        (kept,) = contents(tmp_path / "cache").values()
        open_index(str(tar), cache_dir=tmp_path / "whole")
        assert list(contents(tmp_path / "whole").values()) == [kept]
    finally:
        tar.unlink()
