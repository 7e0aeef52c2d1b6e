"""Runs that are killed and go on from other storage, through other caches: the same bits within one stored stage."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import harness
import storage
from alexnet_ddp.errors import EXIT_STOPPED
from twins import Bench, fault, resumed_at

OWNER = {"data__assignment": "owner", "data__shards": 6}


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Where each kind of cache may lie."""
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    yield from storage.cache_folders(tmp_path)


@pytest.mark.parametrize("stage", ["raw73", "short80"])
def test_from_storage_to_storage(bench: Callable[..., Bench], tmp_path: Path, caches: dict[str, Path],
                                 stage: str) -> None:
    """A run whose ranks are SIGKILLed four times, each time going on from another storage (folder, tar, tar of tars,
    pack) through another cache, ends in the bits of one that read the folder without a cache."""
    here = bench(world=2, data__stored=stage, **OWNER)
    places = storage.make_storages(here.folder / "train", tmp_path / "stored", stage=stage)
    device = "gpu" if stage.startswith("raw") else "none"
    stops = zip((2, 6, 9, 13, None), ("folder", "tar", "nested tar", "pack", "folder"),
                ("ram", device, "disk", "ram", "disk"), strict=True)
    run = here.run()
    for step, place, cache in stops:
        words = [f"data.train={places[place]}", f"data.cache={cache}", f"data.cache_dir={caches[cache]}"]
        result = run.go(*words, *(fault("kill", step=step) if step else []))
        assert step is None or result.codes == [-9, -9], result.output
        assert "exact: no" not in result.output
    assert result.codes == [0, 0], result.output
    here.check_equal(run)


def test_other_ranks_through_caches(bench: Callable[..., Bench], tmp_path: Path, caches: dict[str, Path]) -> None:
    """Stopped on two ranks in mid-epoch, gone on with on three and then on one, through the caches: the same samples
    and crops at every step as without."""
    here = bench(world=2, data__stored="raw73", **OWNER)
    run = here.run()
    for step, cache, world in ((7, "ram", 2), (13, "gpu", 3), (None, "ram", 1)):
        words = [f"data.cache={cache}", f"data.cache_dir={caches[cache]}"]
        result = run.go(*words, *(fault("signal", step=step - 1, rank=0) if step else []), world=world)
        assert result.codes == [EXIT_STOPPED if step else 0] * world, result.output
    assert resumed_at(result.output) == 13
    found, expected = harness.trace(run.path), harness.trace(here.twin.path)
    assert {step: sorted(rows) for step, rows in found.items()} == {
        step: sorted(rows) for step, rows in expected.items()}
