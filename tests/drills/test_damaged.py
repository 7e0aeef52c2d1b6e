"""1 per cent damaged images from every storage and through every cache, on 1, 2 and 3 ranks, killed again and again."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import bad_inputs
import harness
from alexnet_ddp.checkpoint import store
from damaged import check_same, listed
from twins import Run, launched

pytestmark = [pytest.mark.drill, pytest.mark.timeout(300)]

SAMPLES, SPOILT, STEPS = 500, 5, 20  # two epochs
WAYS: dict[str, dict[str, Any]] = {
    "folder": {}, "tar": {}, "pillow": {"data__decoder": "pillow"}, "short80": {"data__stored": "short80"},
    "raw73": {"data__stored": "raw73"},
    "raw73 in ram": {"data__stored": "raw73", "data__cache": "ram", "data__assignment": "owner"},
    "short80 on disk": {"data__stored": "short80", "data__cache": "disk", "data__assignment": "owner"},
    "raw73 on the device": {"data__stored": "raw73", "data__cache": "gpu", "data__cache_gb": 0.1,
                            "data__assignment": "owner"},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("images")
    train = harness.make_images(folder / "train", samples=SAMPLES)
    told = bad_inputs.damage(train, samples=SPOILT)
    for image in told:  # a tar with an empty image is refused
        Path(image).write_bytes(Path(image).read_bytes() or b"GIF89a")
    told = {image: reason.replace("no bytes", "not a JPEG or PNG") for image, reason in told.items()}
    subprocess.run(["tar", "cf", str(folder / "train.tar"), "-C", str(folder), "train"], check=True)
    return train, folder / "train.tar", told


@pytest.mark.parametrize("way", WAYS)
def test_same_weights_on_any_number_of_ranks(images: tuple[Path, Path, dict[str, str]], way: str, tmp_path: Path
                                             ) -> None:
    """1, 2 and 3 ranks end in the same weights, losses and counts, each file is named once with its reason; killed
    after steps 3, 8, 13 and 18 on 2 ranks, in the same bits."""
    train, tar, told = images
    recipe = harness.tiny_recipe(
        tmp_path, train=Path(f"{tar}::train") if way == "tar" else train, global_batch=50, micro_batch=9,
        log__steps=1, optim__lr=0.02, data__on_error="skip", data__shards=6, augment__crop="random", **WAYS[way])
    one = Run(recipe, name="one", world=1)
    one.go("data.cache=none").check()
    assert len(listed(one)) == SPOILT and len(harness.trace(one.path)) == STEPS
    if way == "tar":
        assert all(record["file"] == str(tar) and record["offset"] > 0 for record in listed(one))
    else:
        assert {record["file"] for record in listed(one)} == set(told)
    for world in (2, 3):
        run = Run(recipe, name=f"world{world}", world=world)
        run.go().check()
        check_same(run, one, in_order="data__assignment" not in WAYS[way])
        assert store.load(run.checkpoints[-1])[0].damaged == SPOILT
    whole, killed = Run(recipe, name="world2", world=2), Run(recipe, name="killed", world=2)
    for step in (3, 8, 13, 18):
        assert set(killed.go("fault.kind=kill", f"fault.step={step}", "fault.rank=-1").codes) == {-9}
    killed.go().check()
    assert harness.final_files(killed.path) == harness.final_files(whole.path)
    assert harness.metrics(killed.path) == harness.metrics(whole.path)
    assert listed(killed) == listed(whole)


def test_held_out_images_beyond_the_bound(images: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    """Too many damaged images of data.val end the run in its evaluation, named; a larger bound lets it go on."""
    train, _, told = images
    whole = harness.make_images(tmp_path / "whole", samples=20)
    recipe = harness.tiny_recipe(tmp_path, train=whole, val=train, data__on_error="skip", epochs=1,
                                 data__max_damaged=0.009)
    run = Run(recipe, name="val", world=2)
    result = run.go()
    assert result.codes == [2, 2]
    last, = bad_inputs.messages(result.output)
    assert f"data.val: {SPOILT} of {SAMPLES} images are damaged" in last
    assert sum(path in result.output for path in told) >= 3
    run.go("data.max_damaged=0.01").check()
    evaluation = harness.metrics(run.path)[-1]
    assert (evaluation["samples"], evaluation["damaged"]) == (SAMPLES, SPOILT)


def test_seeds_through_the_launcher(images: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    """`train seed=0..1 --nproc-per-node 2`: Ctrl-C in the first run saves it and ends the sequence with 75; the same
    command ends both, and tells their mean."""
    train, _, _ = images
    recipe = harness.tiny_recipe(tmp_path, train=train, val=harness.make_images(tmp_path / "val", samples=40),
                                 data__on_error="skip", epochs=2)
    first = launched(Run(recipe, name="five", world=2), "seed=0..1")
    first.wait_for("step 10/")
    first.process.send_signal(2)
    assert first.wait() == 75, first.output()
    assert "stopped by INT at run 1 of 2" in first.output()
    again = launched(Run(recipe, name="five", world=2), "seed=0..1")
    assert again.wait() == 0, again.output()
    assert "mean ± standard deviation, n = 2" in again.output() and "goes on at step" in again.output()
