"""A run resumed with another recipe: accepted, accepted and said to be inexact, or refused with the ways out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harness
from alexnet_ddp.errors import EXIT_STOPPED, EXIT_USER
from twins import Bench, Run, fault, resumed_at


@pytest.fixture(scope="module")
def stopped(bench: Callable[..., Bench]) -> Run:
    """A run of two ranks that was stopped after step 7, in the middle of a window of the log."""
    run = bench(world=2).run("stopped_to_change")
    assert run.go(*fault("signal", step=6, rank=0)).codes == [EXIT_STOPPED] * 2
    assert (run.state["step"], run.state["exact"]) == (7, True)
    return run


def check_refused(run: Run, *words: str, says: tuple[str, ...]) -> None:
    """Asserts that an attempt is refused with 2, in one message, and that the run is as it was."""
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    result = run.go(*words)
    assert result.codes == [EXIT_USER] * 2, result.output
    assert result.output.count("error:") == 1 and "Traceback" not in result.output
    assert [word for word in says if word not in result.output] == [], result.output
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_free_fields(bench: Callable[..., Bench], stopped: Run, tmp_path: Path) -> None:
    """Fields that move no bit, other times of saving and a folder of data that has moved: the same bits, and said
    to be exact."""
    moved = shutil.copytree(bench(world=2).folder / "train", tmp_path / "moved")
    run = stopped.copy("free")
    result = run.go(f"data.train={moved}", "data.threads=2", "data.prefetch=7", "checkpoint.steps=4",
                    "checkpoint.keep=3", "evaluate.batch=3", "limits.step=50").check()
    assert resumed_at(result.output) == 7 and "exact: yes" in result.output
    assert run.state["exact"] is True and run.state["why_not_exact"] == ""
    bench(world=2).check_equal(run)


def test_bits_fields(bench: Callable[..., Bench], stopped: Run) -> None:
    """Another micro_batch: accepted, the same samples and views; `exact` is false, with the reason, from then on."""
    run = stopped.copy("bits")
    result = run.go("micro_batch=5", *fault("signal", step=10, rank=0))
    assert result.codes == [EXIT_STOPPED] * 2
    assert "exact: no, because micro_batch: 3 -> 5" in result.output
    assert run.state["exact"] is False and "micro_batch: 3 -> 5" in run.state["why_not_exact"]
    result = run.go("micro_batch=5").check()
    assert run.state["exact"] is False and run.state["why_not_exact"] == "an earlier attempt was not"
    twin = bench(world=2).twin
    assert harness.trace(run.path) == harness.trace(twin.path)
    check_close(run, twin)


@pytest.mark.parametrize("steps", [2, 3, 20])
def test_window_of_the_log(bench: Callable[..., Bench], stopped: Run, steps: int) -> None:
    """Another window of the log, also a smaller one than is open: the weights keep their bits."""
    run = stopped.copy(f"window{steps}")
    result = run.go(f"log.steps={steps}").check()
    assert f"log.steps: 4 -> {steps}" in result.output
    assert harness.final_files(run.path) == harness.final_files(bench(world=2).twin.path)
    told = [record for record in harness.metrics(run.path) if record["kind"] == "train"]
    assert sum(record["samples"] for record in told) == 4 * 47


def check_close(run: Run, twin: Run) -> None:
    """Asserts equal places of all records, and losses that differ by rounding alone."""
    def places(run: Run) -> list[tuple[str, int, int]]:
        return [(record["kind"], record["step"], record["samples"]) for record in harness.metrics(run.path)]

    def losses(run: Run) -> list[float]:
        return [record["loss"] for record in harness.metrics(run.path)]

    assert places(run) == places(twin)
    assert losses(run) == pytest.approx(losses(twin), rel=0.2)  # in bf16 a rounding grows fast


def test_other_world_size(bench: Callable[..., Bench], stopped: Run) -> None:
    """Resumed on three ranks: the same samples and views at every step, `exact` false, the reason said."""
    run = stopped.copy("three")
    result = run.go(world=3).check()
    assert "exact: no, because ranks 2 -> 3" in result.output
    assert run.state["exact"] is False and run.state["world_size"] == 3
    assert harness.trace(run.path) == harness.trace(bench(world=2).twin.path)
    check_close(run, bench(world=2).twin)


@pytest.mark.parametrize("change", ["optim.lr=0.01", "seed=4", "augment.size=72"])
def test_order_fields(stopped: Run, change: str) -> None:
    """A change that would make another experiment of the run: refused, the field and all ways out named."""
    check_refused(stopped, change, says=(
        f"{change.split('=')[0]}: ", f"-> {change.split('=')[1]}", "name=stopped_to_change_2", "--fresh",
        "undo the change", "--accept-changes"))


def test_several_order_fields(stopped: Run) -> None:
    """All refused fields are named at once; what no flag makes possible is not offered."""
    check_refused(stopped, "optim.momentum=0.8", "augment.flip=0",
                  says=("optim.momentum: 0.9 -> 0.8", "augment.flip: 0.5 -> 0"))
    run = stopped.copy("wider")
    check_refused(run, "model.width=0.06", "--accept-changes", says=("model.width: 0.05 -> 0.06", "--fresh"))
    assert "--accept-changes" not in run.go("global_batch=9").output


def test_accepted_changes(stopped: Run) -> None:
    """--accept-changes goes on with the new recipe, says that it is not exact, and asks no second time."""
    run = stopped.copy("accepted")
    result = run.go("optim.lr=0.01", "--accept-changes", *fault("signal", step=9, rank=1))
    assert result.codes == [EXIT_STOPPED] * 2
    assert resumed_at(result.output) == 7 and "exact: no, because optim.lr: 0.02 -> 0.01" in result.output
    assert run.state["exact"] is False and "optim.lr: 0.02 -> 0.01" in run.state["why_not_exact"]
    run.go("optim.lr=0.01").check()
    assert run.state["exact"] is False
    rates = {record["step"]: record["lr"] for record in harness.metrics(run.path) if record["kind"] == "train"}
    assert rates[12] == pytest.approx(0.005)  # half-way down the cosine


def test_fresh(bench: Callable[..., Bench], stopped: Run) -> None:
    """--fresh with a changed recipe, the way out that the refusal names: a new run, and the old one is kept."""
    run = stopped.copy("anew")
    result = run.go("seed=4", "--fresh").check()
    assert resumed_at(result.output) is None and run.state["attempt"] == 1 and run.state["exact"] is True
    kept = run.path.with_name("anew.old-1")
    assert json.loads((kept / "state.json").read_text())["step"] == 7
    assert harness.trace(run.path) != harness.trace(bench(world=2).twin.path)


# --- a finished run, and training longer ------------------------------------------------------------------------


def test_finished(bench: Callable[..., Bench]) -> None:
    """A finished run started again says so and how to train longer, leaves with 0 and touches nothing."""
    run = bench(world=2).twin
    names = ("metrics.jsonl", "state.json", "best.json", "config.yaml")
    before = [(run.path / name).read_bytes() for name in names]
    result = run.go().check()
    assert "is finished: 4 epochs, 20 steps, best held-out top-1" in result.output
    assert "to train longer, start another" in result.output  # a cosine has ended
    assert [(run.path / name).read_bytes() for name in names] == before
    assert run.checkpoints[-1].name == "step_00000020"


def test_killed_before_it_said_finished(bench: Callable[..., Bench]) -> None:
    """Killed after the last checkpoint and before state.json said so (or state.json was lost): the next start does."""
    for number, left in enumerate(['{"status": "running", "attempt": 1}', None]):
        run = bench(world=2).twin.copy(f"almost{number}")
        (run.path / "state.json").unlink()
        if left is not None:
            (run.path / "state.json").write_text(left)
        result = run.go().check()
        assert "is finished" in result.output and "best held-out top-1" in result.output
        assert run.state["status"] == "finished" and run.state["step"] == 20


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_longer(bench: Callable[..., Bench], schedule: str) -> None:
    """More epochs where the rates so far stay: accepted for a stopped and for a finished run, exact, and bit-equal to
    a run that had them from the start."""
    here = bench(world=2, schedule__name=schedule, schedule__step_epochs=1.5)
    for name, words in (("longer_stopped", fault("signal", step=6, rank=0)), ("longer_finished", [])):
        run = here.run(name)
        result = run.go("epochs=2", *words)
        assert run.state["status"] == ("preempted" if words else "finished")
        assert words or "To train longer, give the same command with more epochs (epochs=4)" in result.output
        result = run.go().check()
        assert resumed_at(result.output) == (7 if words else 10) and "exact: yes" in result.output
        twin = here.twin
        assert harness.trace(run.path) == harness.trace(twin.path)
        assert harness.final_files(run.path) == harness.final_files(twin.path)
        if words:  # a finished run has closed its last, shorter window of the log
            here.check_equal(run)


def test_longer_under_cosine(bench: Callable[..., Bench], stopped: Run) -> None:
    """More epochs under cosine would have had other rates from the start: refused, also for a finished run."""
    check_refused(stopped, "epochs=6", says=("epochs: 4 -> 6", "--accept-changes"))
    check_refused(bench(world=2).twin, "epochs=8", says=("epochs: 4 -> 8", "--accept-changes"))


# --- what is told of a run --------------------------------------------------------------------------------------


def test_metrics_and_tensorboard(bench: Callable[..., Bench]) -> None:
    """After kills and stops metrics.jsonl and TensorBoard's event files hold every step once, with the same values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    here = bench(world=2)
    run = here.run()
    words = ["log.tensorboard=true", "log.steps=1"]
    assert run.go(*words, *fault("kill", step=8)).codes == [-9, -9]
    assert run.go(*words, *fault("signal", step=11, rank=1)).codes == [EXIT_STOPPED] * 2
    run.go(*words).check()

    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 21))
    assert [r["step"] for r in records if r["kind"] == "evaluate"] == [10, 20]
    assert {r["attempt"] for r in records} == {1, 2, 3}
    expected: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "time", "attempt"):
                point = (record["step"], pytest.approx(value, rel=1e-6))  # TensorBoard keeps float32
                expected.setdefault(f"{record['kind']}/{name}", []).append(point)
    board = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(expected) >= {"train/loss", "train/lr", "evaluate/top1"}
    for tag, points in expected.items():
        assert [(event.step, event.value) for event in board.Scalars(tag)] == points, tag


def test_best_survives(bench: Callable[..., Bench]) -> None:
    """The best evaluation of an earlier attempt stays the best, with its weights (all tie here: the first counts)."""
    here = bench(world=2, optim__lr=1.0e-12, evaluate__epochs=1)
    run = here.run()
    assert run.go(*fault("kill", step=8)).codes == [-9, -9]
    assert run.go(*fault("signal", step=11, rank=1)).codes == [EXIT_STOPPED] * 2
    run.go().check()
    here.check_equal(run)
    assert run.state["best"]["step"] == json.loads((run.path / "best.json").read_text())["step"] == 5
