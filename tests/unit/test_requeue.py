"""The requeue decision and the cause of an attempt's end, as full tables, without Slurm."""

import itertools
from typing import Any

import pytest

from alexnet_ddp.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_UNAVAILABLE, EXIT_USER
from launch.requeue import BENIGN, FAILURES, HEALED, Attempt, Caps, Cause, cause_of, decide, stalled_start
from launch.slurm import JobFacts

CAPS = Caps()


def attempts(*causes: Cause, progress: int = 5, seconds: float = 100.0) -> list[Attempt]:
    """One after the other, each with `progress` new steps."""
    return [Attempt(began=number * progress, ended=(number + 1) * progress, cause=cause, seconds=seconds)
            for number, cause in enumerate(causes)]


def facts(state: str = "RUNNING", *, preempt_time: float | None = None, restarts: int = 1,
          reason: str = "None") -> JobFacts:
    """A job that began at 6,400 and may run to 10,000 (unix time), in its second start."""
    return JobFacts(job="12", raw="12", name="run", state=state, reason=reason, partition="low", requeue=True,
                    restarts=restarts, time_limit=3600.0, start_time=6_400.0, end_time=10_000.0,
                    preempt_time=preempt_time)


def state(status: str, **changes: Any) -> dict[str, Any]:
    return {"status": status, "why": "", **changes}


# --- the decision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cause", "action"), [
    (Cause.FINISHED, "stop"), (Cause.USER, "stop"), (Cause.BUG, "stop"), (Cause.STOPPED, "stop"),
    (Cause.SLURM, "slurm"), *((cause, "requeue") for cause in (*BENIGN, *FAILURES))])
def test_first_end(cause: Cause, action: str) -> None:
    """Every cause has its decision after a first attempt with progress, and a reason in words."""
    decision = decide(attempts(cause), caps=CAPS)
    assert decision.action == action
    assert decision.reason


def test_every_cause_is_in_the_table() -> None:
    """No cause is left without a kind: benign, failure, or one that decides by itself."""
    assert set(Cause) == {*BENIGN, *FAILURES, Cause.FINISHED, Cause.USER, Cause.BUG, Cause.STOPPED, Cause.SLURM}


@pytest.mark.parametrize("cause", BENIGN)
def test_benign_without_end(cause: Cause) -> None:
    """Time limits, preemptions and lost nodes come back a thousand times, as long as there is progress."""
    assert decide(attempts(*[cause] * 1000, progress=1), caps=CAPS).action == "requeue"


@pytest.mark.parametrize("cause", [*BENIGN, *FAILURES])
def test_no_progress(cause: Cause) -> None:
    """Three attempts in a row without a new step stop, whatever ended them; two don't."""
    generous = Caps(failures=9, memory=9, nonfinite=9)
    assert decide(attempts(*[cause] * 2, progress=0), caps=generous).action == "requeue"
    decision = decide(attempts(*[cause] * 3, progress=0), caps=generous)
    assert decision.action == "stop"
    assert decision.reason.startswith("3 attempts in a row brought no new step to a checkpoint")
    assert ("checkpoint.minutes" in decision.reason) == (cause in BENIGN)  # no advice where saving more is none


def test_progress_between_resets_the_brake() -> None:
    """One new step between attempts without any begins the count anew."""
    stalled, moved = Attempt(began=4, ended=4, cause=Cause.WALLTIME), Attempt(began=4, ended=5, cause=Cause.WALLTIME)
    assert decide([stalled, stalled, moved, stalled, stalled], caps=CAPS).action == "requeue"
    assert decide([moved, stalled, stalled, stalled], caps=CAPS).action == "stop"


@pytest.mark.parametrize("cause", [cause for cause in FAILURES if cause not in (Cause.MEMORY, Cause.NONFINITE)])
def test_failures_are_capped(cause: Cause) -> None:
    """Three failures in a row are retried, the fourth stops."""
    for count in (1, 2, 3):
        decision = decide(attempts(*[cause] * count), caps=CAPS)
        assert decision.action == "requeue"
        assert f"failure {count} of 3 in a row" in decision.reason
    assert decide(attempts(*[cause] * 4), caps=CAPS).action == "stop"


def test_failures_of_different_kinds_are_one_row() -> None:
    """It is the row of failures that is capped, not each kind for itself."""
    row = (Cause.DEAD, Cause.HUNG, Cause.NETWORK, Cause.DISK)
    assert decide(attempts(*row), caps=CAPS).action == "stop"


@pytest.mark.parametrize("between", BENIGN)
def test_anything_benign_ends_a_row(between: Cause) -> None:
    """A time limit or preemption between failures begins the row anew."""
    row = (Cause.DEAD, Cause.DEAD, Cause.DEAD, between, Cause.DEAD)
    assert decide(attempts(*row), caps=CAPS).action == "requeue"


def test_a_long_attempt_heals() -> None:
    """A run that fails now and then in weeks is not stopped for it: an hour with progress begins a new row."""
    assert decide(attempts(*[Cause.DEAD] * 50, seconds=HEALED), caps=CAPS).action == "requeue"
    assert decide(attempts(*[Cause.DEAD] * 50, seconds=HEALED - 1), caps=CAPS).action == "stop"
    assert decide(attempts(*[Cause.DEAD] * 3, seconds=HEALED, progress=0), caps=CAPS).action == "stop"


@pytest.mark.parametrize("cause", [Cause.MEMORY, Cause.NONFINITE])
def test_what_repeats_itself_is_retried_once(cause: Cause) -> None:
    """Out of memory and non-finite gradients are tried once more in the whole job, not once in a row."""
    assert decide(attempts(cause), caps=CAPS).action == "requeue"
    decision = decide(attempts(cause, Cause.WALLTIME, cause), caps=CAPS)
    assert (decision.action, decision.reason) == ("stop", f"{cause} for the second time (at most 1 may be retried)")


def test_caps_of_nothing() -> None:
    """A cap of 0 retries nothing."""
    none = Caps(failures=0, memory=0, nonfinite=0)
    for cause in FAILURES:
        assert decide(attempts(cause), caps=none).action == "stop"


def test_start_that_is_not_begun() -> None:
    """A job that Slurm itself brings back without end is stopped at its start after three without a new step."""
    assert stalled_start([], caps=CAPS) == ""
    assert stalled_start(attempts(*[Cause.NODE] * 3), caps=CAPS) == ""
    assert stalled_start(attempts(*[Cause.NODE] * 2, progress=0), caps=CAPS) == ""
    assert "3 attempts in a row" in stalled_start(attempts(*[Cause.NODE] * 3, progress=0), caps=CAPS)


def test_decisions_are_pure() -> None:
    """The same history gives the same decision, and is left as it was."""
    for causes in itertools.product(Cause, repeat=2):
        history = attempts(*causes)
        before = list(history)
        assert decide(history, caps=CAPS) == decide(history, caps=CAPS)
        assert history == before


# --- the cause -----------------------------------------------------------------------------------------------------

SOON, LATER, OVER = 10_000.0 - 60.0, 10_000.0 - 3000.0, 10_001.0  # unix times before and after the job's end


@pytest.mark.parametrize(("told", "code", "job", "now", "cause"), [
    # In good order.
    (state("finished"), EXIT_FINISHED, facts(), LATER, Cause.FINISHED),
    (state("finished"), EXIT_FINISHED, facts("COMPLETING"), LATER, Cause.FINISHED),
    (state("finished"), EXIT_FINISHED, None, LATER, Cause.FINISHED),
    (None, EXIT_FINISHED, facts(), LATER, Cause.FINISHED),
    # USR2: the limit's, a preemption's, or by hand.
    (state("preempted", why="USR2"), EXIT_STOPPED, facts(), SOON, Cause.WALLTIME),
    (state("preempted", why="USR2"), EXIT_STOPPED, facts(), LATER, Cause.WARNED),
    (state("preempted", why="USR2"), EXIT_STOPPED, facts(preempt_time=LATER), LATER, Cause.PREEMPTED),
    (state("preempted", why="USR2"), EXIT_STOPPED, None, LATER, Cause.WARNED),
    (state("preempted", why="USR1"), EXIT_STOPPED, facts(), LATER, Cause.WARNED),
    (state("preempted", why="deadline"), EXIT_STOPPED, facts(), SOON, Cause.WALLTIME),
    (state("preempted", why="deadline"), EXIT_STOPPED, None, LATER, Cause.WALLTIME),
    # TERM: a preemption's, Slurm's own end of the job, or by hand.
    (state("preempted", why="TERM"), EXIT_STOPPED, facts(preempt_time=LATER), LATER, Cause.PREEMPTED),
    (state("preempted", why="TERM"), EXIT_STOPPED, facts("COMPLETING"), LATER, Cause.STOPPED),  # scancel
    (state("preempted", why="TERM"), EXIT_STOPPED, facts("CANCELLED"), LATER, Cause.STOPPED),
    (state("preempted", why="TERM"), EXIT_STOPPED, facts("COMPLETING", restarts=2), LATER, Cause.SLURM),  # requeued
    (state("preempted", why="TERM"), EXIT_STOPPED, facts("PENDING", restarts=2), LATER, Cause.SLURM),
    (state("preempted", why="TERM"), EXIT_STOPPED, facts("COMPLETING"), OVER, Cause.WALLTIME),
    (state("preempted", why="TERM"), EXIT_STOPPED, facts(), LATER, Cause.STOPPED),
    (state("preempted", why="TERM"), EXIT_STOPPED, facts(preempt_time=6_000.0), LATER, Cause.STOPPED),  # long ago
    (state("preempted", why="TERM"), EXIT_STOPPED, None, LATER, Cause.SLURM),
    (state("preempted", why="TERM"), EXIT_STOPPED, facts("TIMEOUT"), SOON, Cause.WALLTIME),
    # By the user.
    (state("preempted", why="STOP file"), EXIT_STOPPED, facts(), LATER, Cause.STOPPED),
    (state("preempted", why="INT"), EXIT_STOPPED, facts(), LATER, Cause.STOPPED),
    (state("preempted", why="HUP"), EXIT_STOPPED, facts(), LATER, Cause.STOPPED),
    # Failures that a rank could tell.
    *((state("failed", failure={"kind": kind}), EXIT_FAILED, facts(), LATER, cause) for kind, cause in [
        ("user", Cause.USER), ("bug", Cause.BUG), ("dead", Cause.DEAD), ("hung", Cause.HUNG),
        ("network", Cause.NETWORK), ("device", Cause.DEVICE), ("memory", Cause.MEMORY),
        ("nonfinite", Cause.NONFINITE), ("disk", Cause.DISK), ("", Cause.BUG)]),
    (state("failed"), EXIT_FAILED, facts(), LATER, Cause.BUG),
    (state("failed", failure={"kind": "network"}), EXIT_FAILED, facts("COMPLETING", restarts=2), LATER,
     Cause.SLURM),  # a node was lost
    (state("failed", failure={"kind": "network"}), EXIT_FAILED, facts("COMPLETING"), LATER, Cause.STOPPED),
    # Failures without a word.
    (state("running"), 137, facts(), LATER, Cause.DEAD),
    (None, 137, facts(), LATER, Cause.DEAD),
    (None, 139, facts(), LATER, Cause.DEAD),
    (None, EXIT_USER, facts(), LATER, Cause.USER),
    (None, EXIT_UNAVAILABLE, facts(), LATER, Cause.NETWORK),
    (None, EXIT_FAILED, facts(), LATER, Cause.BUG),
    (None, 127, facts(), LATER, Cause.BUG),
    (state("running"), EXIT_FAILED, facts("TIMEOUT"), OVER, Cause.WALLTIME),
    (state("running"), 137, facts("COMPLETING"), OVER, Cause.WALLTIME),
    (state("running"), 137, facts("COMPLETING", reason="TimeLimit"), SOON, Cause.WALLTIME),
    (None, 137, facts("COMPLETING"), LATER, Cause.STOPPED),
    (None, 137, facts("COMPLETING", restarts=2), LATER, Cause.SLURM),
    # Stop signals that came before the ranks could say so.
    (None, 128 + 12, facts(), SOON, Cause.WALLTIME),
    (None, 128 + 12, facts(), LATER, Cause.WARNED),
    (None, 128 + 15, facts(preempt_time=LATER), LATER, Cause.PREEMPTED),
    (None, 128 + 15, facts(), LATER, Cause.STOPPED),
    (None, EXIT_STOPPED, facts(preempt_time=LATER), LATER, Cause.PREEMPTED),
])
def test_cause(told: dict[str, Any] | None, code: int, job: JobFacts | None, now: float, cause: Cause) -> None:
    """Each end of an attempt is put down to its cause, from state.json, srun's exit code and Slurm's word."""
    assert cause_of(told, exit_code=code, facts=job, restart=1, now=now)[0] == cause
