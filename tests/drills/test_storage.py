"""Every storage through every cache, killed in every epoch: the same bits."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import storage
from twins import Bench, fault

pytestmark = pytest.mark.drill


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Where each kind of cache may lie."""
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    yield from storage.cache_folders(tmp_path)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("cache", ["none", "disk", "ram", "gpu"])
@pytest.mark.parametrize("place", ["folder", "tar", "nested tar", "pack"])
@pytest.mark.parametrize(("world", "stage"), [(1, "raw73"), (2, "raw73"), (3, "raw73"), (2, "short80"), (3, "max60")])
def test_storage_and_cache(bench: Callable[..., Bench], tmp_path: Path, caches: dict[str, Path], place: str, cache: str,
                           world: int, stage: str) -> None:
    """SIGKILL of all ranks in each of four epochs, for each storage, cache, stage and number of ranks: the bits of an
    undisturbed run that read the folder without a cache."""
    if cache == "gpu" and not stage.startswith("raw"):
        pytest.skip("the device keeps raw records only")
    here = bench(world=world, data__stored=stage, data__assignment="owner", data__shards=6)
    places = storage.make_storages(here.folder / "train", tmp_path / "stored", stage=stage)
    words = [f"data.train={places[place]}", f"data.cache={cache}", f"data.cache_dir={caches[cache]}"]
    run = here.run()
    for step in (2, 7, 11, 17):
        assert run.go(*words, *fault("kill", step=step)).codes == [-9] * world
    run.go(*words).check()
    here.check_equal(run)
