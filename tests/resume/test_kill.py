"""SIGKILL, anywhere: the same command again ends in the bits of the run that was never killed."""

from collections.abc import Callable

import pytest

from twins import Bench, fault, resumed_at

DUE = [0, 3, 5, 6, 9, 10, 12, 15, 18, 20]  # checkpoints: every third step, every epoch of five


def check_progress(output: str, *, killed_at: int) -> None:
    """A save is waited for by the next one, so of the checkpoints that were due the last but one is surely there."""
    due = [step for step in DUE if step < killed_at]
    if len(due) > 1:
        found = resumed_at(output)
        assert found is not None and found >= due[-2], output


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_killed(bench: Callable[..., Bench], world: int) -> None:
    """All ranks SIGKILLed before, on and after checkpoints, in mid-window and at an epoch's end, over and over in
    one run: weights, momentum, samples, views, metrics and best end bit-equal."""
    here = bench(world=world)
    run, killed_at = here.run(), 0
    for step in (1, 3, 4, 5, 8, 11, 18):
        result = run.go(*fault("kill", step=step))
        assert result.codes == [-9] * world, result.output
        assert (run.path / "lease.json").exists()  # nobody gave it back; it stops nobody
        check_progress(result.output, killed_at=killed_at)
        killed_at = step
    result = run.go().check()
    check_progress(result.output, killed_at=killed_at)
    here.check_equal(run)


@pytest.mark.parametrize("world", [2, 3])
def test_one_rank_killed(bench: Callable[..., Bench], world: int) -> None:
    """One rank SIGKILLed: the others leave with 1 and name it, and the same command goes on to the same bits."""
    here = bench(world=world)
    run = here.run()
    for step, victim in ((2, world - 1), (6, 0), (13, 1)):
        result = run.go(*fault("kill", step=step, rank=victim))
        assert result.codes == [-9 if rank == victim else 1 for rank in range(world)], result.output
        assert f"rank {victim} on " in result.output and "its process is gone" in result.output
        assert (run.path / "errors" / f"rank_{victim}.json").exists()
        if victim:
            assert run.state["status"] == "failed" and f"rank {victim} on " in run.state["why"]
    run.go().check()
    here.check_equal(run)


@pytest.mark.parametrize("at, rank", [("evaluate", -1), ("evaluate", 1), ("save", 0)])
def test_killed_within(bench: Callable[..., Bench], at: str, rank: int) -> None:
    """SIGKILL in mid-evaluation, and while a checkpoint is being written: no partial checkpoint, the same bits."""
    here = bench(world=2)
    run = here.run()
    for step in (10, 20) if at == "evaluate" else (0, 9, 10, 20):
        result = run.go(*fault("kill", step=step, rank=rank, at=at))
        assert -9 in result.codes and 0 not in result.codes, result.output
        if step:
            run.check_whole()
    run.go().check()
    here.check_equal(run)
