"""Damaged checkpoints are never loaded and cost no more than their interval; a dead owner's lease never blocks."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alexnet_ddp.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_USER
from harness import Ranks
from twins import Bench, Run, fault, resumed_at


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def stopped(bench: Callable[..., Bench]) -> Run:
    """A run of two ranks that was stopped after step 8; its checkpoints are those of steps 6 and 8."""
    run = bench(world=2).run("stopped")
    assert run.go(*fault("signal", step=7, rank=1)).codes == [EXIT_STOPPED] * 2
    assert [path.name for path in run.checkpoints] == ["step_00000006", "step_00000008"]
    return run


@pytest.mark.parametrize("damage, file", [
    (truncate, "model.safetensors"), (flip, "optimizer.safetensors"), (flip, "state.json"),
    (remove, "window.safetensors"), (remove, "manifest.json")])
def test_newest_is_damaged(bench: Callable[..., Bench], stopped: Run, damage: Callable[[Path], None],
                           file: str) -> None:
    """Truncated, one bit flipped, a file gone: the checkpoint before is used, one warning says so, the bad one is
    kept aside, and the run ends bit-equal all the same."""
    run = stopped.copy(f"{damage.__name__}_{file}")
    damage(run.checkpoints[-1] / file)
    result = run.go().check()
    assert resumed_at(result.output) == 6
    warnings = [line for line in result.output.splitlines() if "damaged" in line]
    assert len(warnings) == 1
    assert all(word in warnings[0] for word in ("damaged_step_00000008", file, "Going on from", "step_00000006"))
    assert (run.path / "checkpoints" / "damaged_step_00000008").is_dir()
    bench(world=2).check_equal(run)


def test_all_are_damaged(bench: Callable[..., Bench], stopped: Run) -> None:
    """No checkpoint verifies: refused with 2, each named with what is wrong, the way out told, nothing touched, no
    silent restart; --fresh keeps the old directory and starts over."""
    run = stopped.copy("all_damaged")
    truncate(run.checkpoints[0] / "model.safetensors")
    flip(run.checkpoints[1] / "optimizer.safetensors")
    before = snapshot(run.path)
    for _ in range(2):  # a refusal is no repair
        result = run.go()
        assert result.codes == [EXIT_USER] * 2
        assert result.output.count("error:") == 1 and "Traceback" not in result.output
        assert all(word in result.output for word in (
            "none of the checkpoints", "step_00000006: model.safetensors", "step_00000008: optimizer.safetensors",
            "--fresh"))
        assert snapshot(run.path) == before
    result = run.go("--fresh").check()
    assert resumed_at(result.output) is None
    aside = run.path.with_name("all_damaged.old-1")
    assert f"the old run was kept as {aside}" in result.output
    assert snapshot(aside) == before
    bench(world=2).check_equal(run)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_metrics_and_state_lost(bench: Callable[..., Bench], stopped: Run) -> None:
    """A torn last line in metrics.jsonl and the traces, state.json half written: the checkpoint is what counts."""
    run = stopped.copy("torn")
    for path in [run.path / "metrics.jsonl", *(run.path / "trace").iterdir()]:
        with path.open("a") as file:
            file.write('{"kind": "train", "step": 9, "lo')
    (run.path / "state.json").write_text('{"status": "runn')
    run.go().check()
    bench(world=2).check_equal(run)


# --- the lease --------------------------------------------------------------------------------------------------


def test_stale_lease(bench: Callable[..., Bench], stopped: Run) -> None:
    """The lease of an owner that is gone never blocks: its process killed (as in test_kill), its machine started
    anew since, or the same process number given to another process."""
    here = bench(world=2)
    killed = here.run()
    killed.go(*fault("kill", step=7))
    lease = json.loads((killed.path / "lease.json").read_text())
    alive = {"pid": os.getpid()}
    for name, changes in (("other_boot", {"boot": "another", **alive}), ("other_process", alive)):
        run = stopped.copy(name)
        (run.path / "lease.json").write_text(json.dumps({**lease, **changes}))
        result = run.go().check()
        assert resumed_at(result.output) == 8 and "waiting up to" not in result.output
        here.check_equal(run)


def pause(ranks: Ranks, run: Run) -> None:
    """Suspends the ranks once they own the directory: before the first step."""
    deadline = time.monotonic() + 60.0
    while not (run.path / "lease.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for rank in (0, 1):
        ranks.signal(signal.SIGSTOP, rank=rank)


def go_on(ranks: Ranks) -> None:
    for rank in (0, 1):
        ranks.signal(signal.SIGCONT, rank=rank)


def test_live_lease(bench: Callable[..., Bench]) -> None:
    """A second start while the first runs is refused with 2 and says by whom; the first ends unharmed."""
    here = bench(world=2)
    run = here.run()
    first = run.start()
    pause(first, run)
    second = run.go()
    fresh = run.go("--fresh")
    go_on(first)
    for result in (second, fresh):
        assert result.codes == [EXIT_USER] * 2
        assert f"{run.path} is in use" in result.output and f"process {first.pids[0]} on " in result.output
        assert result.output.count("error:") == 1 and "Traceback" not in result.output
    first.wait().check()
    assert not list(run.path.parent.glob(f"{run.name}.old*"))
    here.check_equal(run)


def test_lease_lost(bench: Callable[..., Bench]) -> None:
    """A run whose directory another has taken over (it was suspended, say) saves nothing, writes no state, gives
    nothing back, and leaves, saying so."""
    run = bench(world=2).run()
    ranks = run.start()
    pause(ranks, run)
    lease = json.loads((run.path / "lease.json").read_text())
    theirs = {"lease.json": json.dumps({**lease, "token": "another"}), "state.json": '{"status": "running"}'}
    for name, text in theirs.items():
        (run.path / "new").write_text(text)
        (run.path / "new").replace(run.path / name)
    go_on(ranks)
    result = ranks.wait()
    assert result.codes == [EXIT_FAILED] * 2
    assert f"no longer owns {run.path}" in result.output
    assert run.checkpoints == []
    assert {name: (run.path / name).read_text() for name in theirs} == theirs
