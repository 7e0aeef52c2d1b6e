"""Saving in the background: the loop is not held up, nothing is lost, and no error stays in the thread."""

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alexnet_ddp.checkpoint import choose, store
from alexnet_ddp.checkpoint.state import TrainState
from alexnet_ddp.checkpoint.writer import SaveFailed, Writer
from alexnet_ddp.errors import RunFailed


def state(step: int, **fields: Any) -> TrainState:
    """A state whose weights tell its step."""
    return TrainState(step=step, model={"w": torch.full((4,), float(step))}, **fields)


def nothing() -> None:
    pass


class Disk:
    """Stands in front of `store.write`: holds saves back until told, and fails those it is told to."""

    def __init__(self, real: Callable[..., Path]) -> None:
        self.real = real
        self.go = threading.Event()
        self.go.set()
        self.started = threading.Event()
        self.errors: list[BaseException] = []
        self.active = 0
        self.most_active = 0

    def write(self, state: TrainState, **options: Any) -> Path:
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        self.started.set()
        try:
            assert self.go.wait(60)
            if self.errors:
                raise self.errors.pop(0)
            return self.real(state, **options)
        finally:
            self.active -= 1


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(store.write)
    monkeypatch.setattr(store, "write", disk.write)
    return disk


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def writer(tmp_path: Path, disk: Disk, lines: list[str]) -> Iterator[Writer]:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    writer = Writer(directory, keep=2, attempt=1, lineage={"a": 1}, guard=nothing, log=lines.append)
    yield writer
    disk.go.set()
    writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_a_slow_disk_does_not_hold_up_the_loop(writer: Writer, disk: Disk) -> None:
    """`submit` returns while the disk still works, and training may change its tensors at once."""
    disk.go.clear()
    live = state(1)
    writer.submit(live)
    assert disk.started.wait(60) and writer.busy and writer.last is None
    live.model["w"].fill_(99)
    writer.poll()
    disk.go.set()
    writer.wait()
    assert not writer.busy and writer.last is not None
    assert (writer.last.step, writer.last.path.name) == (1, "step_00000001")
    found, lineage = store.load(writer.last.path)
    assert found.model["w"].eq(1).all() and lineage == {"a": 1}
    assert writer.last.bytes == sum(
        file.stat().st_size for file in writer.last.path.iterdir() if file.name != store.MANIFEST
    )
    assert writer.last.seconds >= 0 and writer.last.stall >= 0


def test_a_second_save_waits_for_the_first(writer: Writer, disk: Disk) -> None:
    """Two saves are never written at once, and both are whole."""
    disk.go.clear()
    writer.submit(state(1))
    assert disk.started.wait(60)
    release = threading.Timer(0.1, disk.go.set)
    release.start()
    writer.submit(state(2))
    assert disk.go.is_set(), "the second submit returned while the first save was in flight"
    writer.wait()
    release.join()
    assert disk.most_active == 1
    for step in (1, 2):
        found, _ = store.load(writer.directory / store.directory_name(step))
        assert found.model["w"].eq(step).all()


def test_only_the_newest_are_kept(writer: Writer) -> None:
    """After each save the newest `keep` remain."""
    for step in range(5):
        writer.submit(state(step))
    writer.wait()
    assert sorted(entry.name for entry in writer.directory.iterdir()) == ["step_00000003", "step_00000004"]


def test_best_is_written_before_the_checkpoint_that_remembers_it(writer: Writer, disk: Disk) -> None:
    """best.safetensors is there even when the checkpoint itself fails; a later save leaves it alone."""
    run_dir = writer.directory.parent
    disk.errors = [OSError(errno.ENOSPC, "No space left on device")]
    writer.submit(state(3, best={"top1": 0.6, "step": 3}), best_model="alexnet_single")
    writer.wait()
    assert writer.last is None
    assert store.read_best(run_dir) == {"top1": 0.6, "step": 3, "model": "alexnet_single"}
    before = (run_dir / "best.safetensors").read_bytes()
    writer.submit(state(4, best={"top1": 0.6, "step": 3}))
    writer.wait()
    assert (run_dir / "best.safetensors").read_bytes() == before


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[OSError]:
    """What `store.write_best` is to raise, one error a call."""
    errors: list[OSError] = []
    real = store.write_best

    def write_best(*arguments: Any, **options: Any) -> Path:
        if errors:
            raise errors.pop(0)
        return real(*arguments, **options)

    monkeypatch.setattr(store, "write_best", write_best)
    return errors


def test_best_weights_that_could_not_be_written_come_with_the_next_save(writer: Writer, full: list[OSError]) -> None:
    """Two full disks long the best weights wait, as they were, while training moves on; the older best stays whole."""
    run_dir = writer.directory.parent
    writer.submit(state(1, best={"top1": 0.5, "step": 1}), best_model="net")
    writer.wait()
    full += [OSError(errno.ENOSPC, "No space left on device")] * 2
    for step in (3, 4, 5):
        live = state(step, best={"top1": 0.6, "step": 3})
        writer.submit(live, best_model="net" if step == 3 else None)
        live.model["w"].fill_(99)
        writer.wait()
        best = 3 if step == 5 else 1
        assert store.read_best(run_dir) == {"top1": 0.6 if best == 3 else 0.5, "step": best, "model": "net"}
        assert load_file(run_dir / "best.safetensors")["w"].eq(best).all()
        newest = choose.choose(writer.directory).path  # tells of no best that isn't there
        assert newest is not None and newest.name == store.directory_name(5 if step == 5 else 1)
    assert store.load(newest)[0].model["w"].eq(5).all()
    (run_dir / "best.safetensors").unlink()
    writer.submit(state(6, best={"top1": 0.6, "step": 3}))
    writer.wait()
    assert not (run_dir / "best.safetensors").exists(), "written once, not with every save from then on"


def test_better_weights_take_the_place_of_those_that_wait(writer: Writer, full: list[OSError]) -> None:
    """A better evaluation before the retry: only its weights are written."""
    full.append(OSError(errno.ENOSPC, "No space left on device"))
    writer.submit(state(3, best={"top1": 0.6, "step": 3}), best_model="net")
    writer.submit(state(4, best={"top1": 0.7, "step": 4}), best_model="net")
    writer.wait()
    assert store.read_best(writer.directory.parent) == {"top1": 0.7, "step": 4, "model": "net"}
    assert load_file(writer.directory.parent / "best.safetensors")["w"].eq(4).all()


@pytest.mark.parametrize("report", ["poll", "submit", "wait", "close"])
def test_errors_come_out_in_the_loop(writer: Writer, disk: Disk, report: str) -> None:
    """A lost lease, or any bug, is raised by whatever the loop calls next, once."""
    disk.errors = [RunFailed("lease lost")]
    writer.submit(state(1))
    while writer.busy:
        pass
    with pytest.raises(RunFailed, match="lease lost"):
        writer.submit(state(2)) if report == "submit" else getattr(writer, report)()
    writer.poll()


def test_a_refusing_guard_is_raised_and_nothing_published(tmp_path: Path) -> None:
    """A lease lost while the files were written stops the publish of checkpoint and best weights."""
    (tmp_path / "checkpoints").mkdir()

    def refuse() -> None:
        raise RunFailed("lease lost")

    writer = Writer(tmp_path / "checkpoints", keep=2, attempt=1, lineage={}, guard=refuse, log=print)
    for options in ({}, {"best_model": "m"}):
        writer.submit(state(1, best={"top1": 0.5, "step": 1}), **options)
        with pytest.raises(RunFailed, match="lease lost"):
            writer.wait()
    writer.close()
    assert [entry.name for entry in tmp_path.rglob("*")] == ["checkpoints"]


def test_not_finite_is_raised(writer: Writer) -> None:
    """Weights that are not finite end the run instead of being counted as a failing disk."""
    writer.submit(TrainState(model={"w": torch.tensor([1.0, float("nan")])}))
    with pytest.raises(store.NotFinite, match="w "):
        writer.wait()
    assert writer.failures_in_a_row == 0


def test_what_is_not_plain_fails_in_the_callers_thread(writer: Writer) -> None:
    """A state that can't be saved raises in `submit`, where the traceback shows who made it."""
    with pytest.raises(TypeError, match="phase"):
        writer.submit(TrainState(phase="lunch"))


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (store.Damaged(Path("x"), "model.safetensors differs"), "read back wrong: model.safetensors differs"),
    ],
    ids=["full", "quota", "lies"],
)
def test_a_failing_disk_is_tried_again(
    writer: Writer, disk: Disk, lines: list[str], error: Exception, why: str
) -> None:
    """A failure costs a line with numbers; a success clears the count; the older checkpoint stays."""
    writer.submit(state(1))
    writer.wait()
    for round_ in range(2):
        disk.errors = [error, error]
        for failures in (1, 2):
            writer.submit(state(2))
            writer.wait()
            assert writer.failures_in_a_row == failures and writer.failure == lines[-1]
            assert why in lines[-1] and " needed, " in lines[-1] and "B free" in lines[-1]
            assert "\n" not in lines[-1]
            assert choose.choose(writer.directory).path == writer.directory / "step_00000001"
        assert len(lines) == 2 * (round_ + 1)
        writer.submit(state(1))
        writer.wait()
        assert (writer.failures_in_a_row, writer.failure) == (0, None)


def test_the_third_failure_in_a_row_ends_the_run(writer: Writer, disk: Disk, lines: list[str]) -> None:
    """A disk that stays full is not put up with for ever: SaveFailed, with the older checkpoint intact."""
    writer.submit(state(1))
    disk.errors = []
    writer.wait()
    disk.errors = [OSError(errno.ENOSPC, "No space left on device")] * 3
    for step in (2, 3, 4):
        writer.submit(state(step))
        if step < 4:
            writer.wait()
    with pytest.raises(SaveFailed, match="step 4 .*No space left.*3 in a row"):
        writer.wait()
    assert len(lines) == 2
    assert choose.choose(writer.directory).path == writer.directory / "step_00000001"


def test_a_lost_lease_is_not_taken_for_a_failing_disk(tmp_path: Path, disk: Disk) -> None:
    """When a new owner cleaned our unfinished files away, the lost lease is what is reported."""
    (tmp_path / "checkpoints").mkdir()

    def refuse() -> None:
        raise RunFailed("lease lost")

    writer = Writer(tmp_path / "checkpoints", keep=2, attempt=1, lineage={}, guard=refuse, log=print)
    disk.errors = [FileNotFoundError(errno.ENOENT, "No such file or directory")]
    writer.submit(state(1))
    with pytest.raises(RunFailed, match="lease lost"):
        writer.close()


def test_a_damaged_older_checkpoint_is_told(writer: Writer, lines: list[str]) -> None:
    """A checkpoint found damaged while old ones are deleted is named, and one more good one is kept."""
    for step in (1, 2):
        writer.submit(state(step))
    writer.wait()
    (writer.directory / "step_00000002" / "state.json").unlink()
    writer.submit(state(3))
    writer.wait()
    assert len(lines) == 1 and "step_00000002" in lines[0] and "state.json is missing" in lines[0]
    assert (writer.directory / "step_00000001").exists()
