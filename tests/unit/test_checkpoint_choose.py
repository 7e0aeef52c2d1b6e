"""Which checkpoint is used and which are kept: the newest that verifies, never fewer than two of those."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alexnet_ddp.checkpoint import store
from alexnet_ddp.checkpoint.choose import Choice, choose, newest, order, retain
from alexnet_ddp.checkpoint.state import TrainState
from alexnet_ddp.errors import UserError

FILES = ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors")


def write(directory: Path, *steps: int) -> list[Path]:
    """Checkpoints of these steps whose weights tell the step."""
    directory.mkdir(exist_ok=True)
    states = [
        TrainState(
            step=step, model={"w": torch.full((4,), float(step))}, optimizer={"m": {"w": torch.ones(4)}}
        )
        for step in steps
    ]
    return [store.write(s, directory=directory, attempt=1, lineage={}, guard=lambda: None) for s in states]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def test_order_is_by_number() -> None:
    """Newest first by number, not by letter; a predecessor after its successor; the rest is ignored."""
    expected = ["step_123456789", "step_00000200", "step_00000200.previous", "step_00000030", "step_9"]
    others = ["damaged_step_00000300", ".tmp-1-400", ".trash-step_00000500", "step_", "step_1x", "best.json"]
    shuffled = expected + others
    random.Random(0).shuffle(shuffled)
    assert order(shuffled) == expected


def test_nothing_yet_is_a_fresh_start(tmp_path: Path) -> None:
    """No directory, an empty one, or one with leftovers of a killed first save: a fresh start, and clean."""
    assert choose(tmp_path / "none") == Choice(None)
    assert not (tmp_path / "none").exists()
    (tmp_path / ".tmp-1-0").mkdir()
    (tmp_path / ".tmp-1-0" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".trash-step_00000001").mkdir()
    (tmp_path / ".tmp-probe").write_bytes(b"")
    assert choose(tmp_path) == Choice(None)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "flipped", "missing"])
def test_damaged_newest_falls_back_to_the_one_before(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    """Each file, each damage: the one before is used, the bad one moved aside, one warning names both."""
    write(tmp_path, 100, 9, 20)
    damage(tmp_path / "step_00000100" / file)
    choice = choose(tmp_path)
    aside = tmp_path / "damaged_step_00000100"
    assert choice.path == tmp_path / "step_00000020"
    assert [path for path, _ in choice.damaged] == [aside] and file in choice.damaged[0][1]
    assert choice.warning is not None
    assert str(aside) in choice.warning and str(choice.path) in choice.warning and file in choice.warning
    assert names(tmp_path) == {"damaged_step_00000100", "step_00000020", "step_00000009"}
    assert choose(tmp_path) == Choice(tmp_path / "step_00000020")
    assert choose(tmp_path).warning is None


def test_several_damaged_and_taken_names(tmp_path: Path) -> None:
    """All damaged newer ones are moved aside, under numbered names where those are taken."""
    write(tmp_path, 1, 2, 3)
    for number in range(3):
        for step in (2, 3):
            truncate(tmp_path / f"step_0000000{step}" / "state.json")
        assert choose(tmp_path).path == tmp_path / "step_00000001"
        suffix = f"_{number + 1}" if number else ""
        assert {f"damaged_step_0000000{step}{suffix}" for step in (2, 3)} <= names(tmp_path)
        write(tmp_path, 2, 3)


@pytest.mark.parametrize("earlier", [False, True])
def test_all_damaged_is_refused(tmp_path: Path, earlier: bool) -> None:
    """None that verifies, or only ones moved aside before: refused, untouched, way out named."""
    for path in write(tmp_path, 1, 2):
        flip(path / "model.safetensors")
        if earlier:
            path.rename(path.with_name(f"damaged_{path.name}"))
    (tmp_path / ".tmp-1-3").mkdir()
    before = names(tmp_path)
    with pytest.raises(UserError, match=r"(?s)none .* verifies.*step_00000002.*--fresh"):
        choose(tmp_path)
    assert names(tmp_path) == before


def test_a_renamed_checkpoint_is_damaged(tmp_path: Path) -> None:
    """A copy under a newer name does not pass for a newer checkpoint."""
    write(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000007")
    choice = choose(tmp_path)
    assert choice.path == tmp_path / "step_00000001"
    assert "name says step 7, its manifest step 1" in choice.damaged[0][1]


def test_newest_changes_nothing(tmp_path: Path) -> None:
    """A reader that doesn't own the run finds the same checkpoint and leaves everything as it is."""
    write(tmp_path, 1, 2)
    flip(tmp_path / "step_00000002" / "state.json")
    (tmp_path / ".tmp-9-3").mkdir()
    before = names(tmp_path)
    path, damaged = newest(tmp_path)
    assert path == tmp_path / "step_00000001" and [bad.name for bad, _ in damaged] == ["step_00000002"]
    assert names(tmp_path) == before


@pytest.mark.parametrize("successor", ["absent", "whole", "damaged"])
def test_kill_between_the_renames_of_a_replacement(tmp_path: Path, successor: str) -> None:
    """A step being replaced is never lost: its predecessor is used unless the successor is whole."""
    write(tmp_path, 4, 5)
    (tmp_path / "step_00000005").rename(tmp_path / "step_00000005.previous")
    if successor != "absent":
        write(tmp_path, 5)
        (tmp_path / "step_00000005.previous").mkdir(exist_ok=True)
        if not (tmp_path / "step_00000005.previous" / "manifest.json").exists():
            shutil.copytree(
                tmp_path / "step_00000005", tmp_path / "step_00000005.previous", dirs_exist_ok=True
            )
    if successor == "damaged":
        flip(tmp_path / "step_00000005" / "model.safetensors")
    choice = choose(tmp_path)
    assert choice.path == tmp_path / "step_00000005"
    assert store.load(choice.path)[0].step == 5
    assert len(choice.damaged) == (successor == "damaged")
    write(tmp_path, 5)
    assert not (tmp_path / "step_00000005.previous").exists()


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    """The newest `keep` stay, in whatever order they were written."""
    paths = write(tmp_path, 10, 9, 100, 11)
    assert retain(tmp_path, keep=2, verified=paths[2]) == []
    assert names(tmp_path) == {"step_00000100", "step_00000011"}
    assert retain(tmp_path, keep=5) == []
    assert names(tmp_path) == {"step_00000100", "step_00000011"}


def test_retention_counts_only_what_verifies(tmp_path: Path) -> None:
    """Damaged ones don't count: the last two that verify stay, even when they are old."""
    paths = write(tmp_path, 1, 2, 3, 4, 5)
    flip(paths[3] / "model.safetensors")
    flip(paths[2] / "state.json")
    damaged = retain(tmp_path, keep=2, verified=paths[4])
    assert [path for path, _ in damaged] == [paths[3], paths[2]]
    assert names(tmp_path) == {path.name for path in paths[1:]}
    flip(paths[4] / "state.json")
    assert len(retain(tmp_path, keep=2)) == 3
    assert names(tmp_path) == {path.name for path in paths[1:]}
