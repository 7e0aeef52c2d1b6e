"""A stop asked for in any way: all ranks leave together within two steps, in good order, and go on to the same bits."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pieces
from alexnet_ddp.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from harness import Result
from twins import Bench, Run, fault, in_sessions, resumed_at

SIGNALS = ("INT", "TERM", "HUP", "USR1", "USR2")


def check_left(result: Result, run: Run, *, why: str, struck: int) -> int:
    """Asserts that all ranks left in good order within two steps of the request; the step they left at."""
    assert result.codes == [EXIT_STOPPED] * run.world, result.output
    run.check_stopped(why=why, earliest=struck, latest=struck + 2)
    return int(run.state["step"])


@pytest.mark.parametrize("world, everyone", [(3, False), (2, True)])
def test_signals(bench: Callable[..., Bench], world: int, everyone: bool) -> None:
    """INT, TERM, HUP, USR1, USR2 in turn, to one rank or to all: every attempt saves where it stood, says why and is
    gone; the next goes on exactly there, and the run ends bit-equal."""
    here = bench(world=world)
    run, step = here.run(), 0
    for number, name in enumerate(SIGNALS):
        struck = step + 1 + number % 2
        ranks = run.start(*fault("signal", step=struck, rank=-1 if everyone else number % world, signal=name))
        result = ranks.wait()
        assert resumed_at(result.output) == (step or None)
        step = check_left(result, run, why=name, struck=struck)
        assert in_sessions(ranks.pids) == []
        assert f"stopped by {name} after step {step} of 20; saved." in result.output
    result = run.go().check()
    assert resumed_at(result.output) == step
    here.check_equal(run)


def test_rate_after_a_resume(bench: Callable[..., Bench]) -> None:
    """A logging window that began before the stop tells the rate of the steps since the resume, not of all its steps.

    Every step of the second attempt takes 0.3 s on purpose, so that more than 51 images a second can't be true.
    """
    run = bench(world=2).run()
    run.go("log.steps=10", *fault("signal", step=5))
    step = run.state["step"]
    assert 5 <= step <= 7
    run.go("log.steps=10", *fault("slow", step=step + 1), "fault.seconds=0.3", "fault.times=20").check()
    first = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["kind"], first["step"]) == ("train", 10)
    assert first["images_per_second"] <= 51


def test_no_rank_leaves_before_all_is_done(tmp_path: Path) -> None:
    """srun kills the other ranks when the first leaves with 75: by then the slow rank 0 has given the directory back.
    """
    (tmp_path / "lease.json").touch()
    assert pieces.on_ranks(pieces.let_go_slowly, str(tmp_path), world=2) == [True, True]


def test_stop_file_and_deadlines(bench: Callable[..., Bench]) -> None:
    """A STOP file, the recipe's deadline and Slurm's end the attempt as a signal does; the file is used up."""
    here = bench(world=2)
    run = here.run()
    run.path.mkdir(parents=True)
    (run.path / "STOP").touch()
    step = check_left(run.go(), run, why="STOP file", struck=0)
    step = check_left(run.go("deadline=1s"), run, why="deadline", struck=step)
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 1)}
    step = check_left(run.go(environment=end), run, why="deadline", struck=step)
    assert 3 <= step < 10  # each got on
    run.go().check()
    here.check_equal(run)


def test_stopped_in_evaluation(bench: Callable[..., Bench]) -> None:
    """A signal in mid-evaluation: it is left at the next fetch, and done anew, whole, before the next step."""
    here = bench(world=2)
    run = here.run()
    for step in (10, 20):
        result = run.go(*fault("signal", step=step, rank=1, at="evaluate", signal="TERM"))
        check_left(result, run, why="TERM", struck=step)
        assert run.state["step"] == step
        saved = json.loads((run.checkpoints[-1] / "state.json").read_text())
        assert (saved["phase"], saved["evaluated_step"]) == ("evaluate", 10 if step == 20 else None)
        assert f"step {step}  held-out" not in result.output
    result = run.go().check()
    assert "step 20  held-out" in result.output
    here.check_equal(run)


def test_stopped_in_a_save(bench: Callable[..., Bench]) -> None:
    """A signal while a checkpoint is being written in the background: that one and the last are whole."""
    here = bench(world=2)
    run = here.run()
    for step in (3, 10):
        check_left(run.go(*fault("signal", step=step, rank=0, at="save", signal="USR2")), run, why="USR2", struck=step)
    run.go().check()
    here.check_equal(run)


def test_signal_while_a_save_is_written(bench: Callable[..., Bench]) -> None:
    """A signal while the disk is slow: training has gone on meanwhile; the save under way and the last are whole."""
    here = bench(world=2)
    run = here.run()
    ranks = run.start(*fault("slow", step=3, rank=0, at="save", seconds=2.0))
    ranks.wait_for("step 4/")  # beside the write of step 3, which lies there unpublished
    assert [path.name for path in (run.path / "checkpoints").iterdir() if path.name.startswith(".tmp-")]
    assert run.checkpoints[-1].name == "step_00000000"
    ranks.signal(signal.SIGUSR2, rank=1)
    assert ranks.wait().codes == [EXIT_STOPPED] * 2
    run.check_stopped(why="USR2", earliest=4, latest=8)  # the next save, at step 5, waits for that of step 3
    run.go().check()
    here.check_equal(run)


def test_at_the_start(bench: Callable[..., Bench]) -> None:
    """Late before its first step, on one rank, and a signal there: the attempt leaves where it began, bit-equal."""
    here = bench(world=2)
    run = here.run()
    began = time.monotonic()
    check_left(run.go(*fault("signal", step=0, rank=1, at="start")), run, why="USR1", struck=0)
    assert run.state["step"] <= 1
    run.go(*fault("slow", step=run.state["step"], rank=1, at="start", seconds=3.0)).check()
    assert time.monotonic() - began > 3.0
    here.check_equal(run)


def test_stop_at_the_end(bench: Callable[..., Bench]) -> None:
    """A signal during the last save finds nothing left to stop: the run finishes."""
    here = bench(world=2)
    run = here.run()
    run.go(*fault("signal", step=20, rank=0, at="save")).check()
    here.check_equal(run)


def test_second_interrupt(bench: Callable[..., Bench]) -> None:
    """Ctrl-C twice quits at once, also the rank whose main thread waits in a collective for one that hangs; what was
    saved before is gone on from."""
    here = bench(world=2)
    run = here.run()
    ranks = run.start(*fault("hang", step=9, rank=1))
    ranks.wait_for("step 8/20")
    for _ in range(2):
        for rank in (0, 1):
            ranks.signal(signal.SIGINT, rank=rank)
        time.sleep(0.2)  # two signals of a kind at once count as one
    result = ranks.wait(timeout=30.0)
    assert result.codes == [EXIT_INTERRUPTED] * 2, result.output
    run.check_whole()
    result = run.go().check()
    assert resumed_at(result.output) in (5, 6)
    here.check_equal(run)
