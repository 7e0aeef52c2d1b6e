"""Whether a job comes back, and why: decided in one place, in the batch shell once srun has returned.

    cause      what ended this attempt: read from state.json, srun's exit code and Slurm's word on the job
    decision   from the causes and the progress of this job's attempts, within the caps: pure

Pure: `launch.attempts` gathers the facts, calls this, writes the decision down and asks Slurm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from alexnet_ddp.errors import EXIT_FINISHED, EXIT_STOPPED, EXIT_UNAVAILABLE, EXIT_USER
from launch.slurm import JobFacts

HEALED = 3600.0  # seconds of training with progress after which a failure no longer counts as one in a row
ENDED = ("COMPLETING", "CANCELLED", "COMPLETED", "FAILED")
NEARLY = 120.0  # seconds before the time limit within which a warning is the limit's: Slurm may warn 60 s early


class Cause(StrEnum):
    """What ended an attempt."""

    FINISHED = "finished"
    WALLTIME = "walltime"
    PREEMPTED = "preempted"
    WARNED = "warned"  # USR1 or USR2, and neither the time limit nor a preemption is in sight: a hand, or the site
    NODE = "node lost"  # it ended without a word, and Slurm started the job again
    DEAD = "dead rank"
    HUNG = "hung rank"
    NETWORK = "network"
    DEVICE = "device"
    DISK = "disk"
    MEMORY = "out of memory"
    NONFINITE = "non-finite"
    BUG = "bug"
    USER = "user error"
    STOPPED = "stopped"  # by the user: scancel, STOP file, Ctrl-C, TERM by hand
    SLURM = "ended by Slurm"  # which brings the job back by itself


STOPS = {1: "HUP", 2: "INT", 10: "USR1", 12: "USR2", 15: "TERM"}  # by number, as Linux has them
BENIGN = (Cause.WALLTIME, Cause.PREEMPTED, Cause.WARNED, Cause.NODE)
FAILURES = (Cause.DEAD, Cause.HUNG, Cause.NETWORK, Cause.DEVICE, Cause.DISK, Cause.MEMORY, Cause.NONFINITE)
KINDS = {"user": Cause.USER, "bug": Cause.BUG, "dead": Cause.DEAD, "hung": Cause.HUNG, "network": Cause.NETWORK,
         "device": Cause.DEVICE, "memory": Cause.MEMORY, "nonfinite": Cause.NONFINITE, "disk": Cause.DISK}


@dataclass(frozen=True, kw_only=True)
class Caps:
    """How often a job may come back; time limits and preemptions without end, as long as there is progress."""

    failures: int = 3  # in a row
    memory: int = 1  # out of memory, in all: the same batch needs the same memory again
    nonfinite: int = 1  # in all: exact resume mostly finds the same numbers again
    stalled: int = 3  # attempts in a row without a new step in a checkpoint


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the job: newest checkpoint's step when it began and when it ended, its cause, its seconds."""

    began: int
    ended: int
    cause: Cause
    seconds: float = 0.0


@dataclass(frozen=True)
class Decision:
    action: Literal["requeue", "stop", "slurm"]
    reason: str


def decide(history: Sequence[Attempt], *, caps: Caps) -> Decision:
    """Whether the job comes back: pure. `history`: this job's attempts, oldest first; the last has just ended."""
    last = history[-1]
    match last.cause:
        case Cause.FINISHED:
            return Decision("stop", "the run is finished")
        case Cause.USER | Cause.BUG:
            return Decision("stop", "another start would end the same way: recipe, data or code must change first")
        case Cause.STOPPED:
            return Decision("stop", "it was asked to stop")
        case Cause.SLURM:
            return Decision("slurm", "Slurm decides, or has decided already")
    stalled = stalled_start(history, caps=caps)
    if stalled:
        return Decision("stop", stalled)
    if last.cause in BENIGN:
        return Decision("requeue", f"{last.cause}; {_progress(last)}")
    if last.cause in (Cause.MEMORY, Cause.NONFINITE):
        met = sum(attempt.cause == last.cause for attempt in history)
        cap = caps.memory if last.cause == Cause.MEMORY else caps.nonfinite
        if met > cap:
            return Decision("stop", f"{last.cause} for the {_ordinal(met)} time (at most {cap} may be retried)")
    failed = _failures_in_a_row(history)
    if failed > caps.failures:
        return Decision("stop", f"{_count(failed, 'failure')} in a row (at most {caps.failures} may be retried)")
    return Decision("requeue", f"{last.cause}, failure {failed} of {caps.failures} in a row; {_progress(last)}")


def stalled_start(history: Sequence[Attempt], *, caps: Caps) -> str:
    """Why there should be no further attempt, or "". Slurm restarts some by itself: then it is asked at their start."""
    stalled = _in_a_row(history, lambda attempt: attempt.ended <= attempt.began)
    if stalled < caps.stalled:
        return ""
    reason = f"{_count(stalled, 'attempt')} in a row brought no new step to a checkpoint"
    if all(attempt.cause in BENIGN for attempt in history[-stalled:]):  # cut off while all was well
        reason += "; to save more often, submit it again with a smaller checkpoint.minutes=..."
    return reason


def _in_a_row(history: Sequence[Attempt], fits: Callable[[Attempt], bool]) -> int:
    count = 0
    for attempt in reversed(history):
        if not fits(attempt):
            break
        count += 1
    return count


def _failures_in_a_row(history: Sequence[Attempt]) -> int:
    """Up to the latest attempt that didn't fail, or got on for so long before it failed that it begins a new row."""
    count = 0
    for attempt in reversed(history):
        if attempt.cause not in FAILURES:
            break
        count += 1
        if attempt.seconds >= HEALED and attempt.ended > attempt.began:
            break
    return count


def _progress(attempt: Attempt) -> str:
    return f"{_count(attempt.ended - attempt.began, 'new step')} saved"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


# --- the cause -----------------------------------------------------------------------------------------------------


def cause_of(state: dict[str, Any] | None, *, exit_code: int, facts: JobFacts | None, restart: int,
             now: float) -> tuple[Cause, str]:
    """What ended an attempt, and why in words: pure.

    Args:
        state: state.json if this very attempt wrote it, else None.
        exit_code: srun's.
        facts: what Slurm says of the job now, None where it can't be asked.
        restart: SLURM_RESTART_COUNT of this attempt.
        now: unix time.
    """
    status = state["status"] if state else ""
    if state and status == "finished":
        return Cause.FINISHED, ""
    if facts is not None and facts.restarts > restart:
        return Cause.SLURM, "Slurm is requeueing the job: preempted, a lost node, or scontrol requeue"
    if facts is not None and facts.state in ENDED and not _time_is_up(facts, now=now):
        return Cause.STOPPED, f"the job was cancelled (it is {facts.state})"
    if state and status == "preempted":
        return _cause_of_stop(str(state.get("why")), facts=facts, now=now)
    if state and status == "failed":
        failure = state.get("failure") or {}
        return KINDS.get(failure.get("kind", ""), Cause.BUG), str(state.get("why", ""))
    if facts is not None and _time_is_up(facts, now=now):
        return Cause.WALLTIME, "the time limit came before the ranks had left"
    # No word of this attempt's ranks.
    if exit_code == EXIT_FINISHED:
        return Cause.FINISHED, "the run was finished before"
    if exit_code == EXIT_USER:
        return Cause.USER, "refused before the run directory was touched: see the log above"
    if exit_code == EXIT_UNAVAILABLE:
        return Cause.NETWORK, "the hosts didn't find each other: see the log above"
    if exit_code == EXIT_STOPPED or exit_code - 128 in STOPS:  # a signal that came before the ranks stood
        return _cause_of_stop(STOPS.get(exit_code - 128, "a signal"), facts=facts, now=now)
    if exit_code > 128:
        return Cause.DEAD, f"a rank was ended by signal {exit_code - 128} (9: killed, or out of memory)"
    return Cause.BUG, f"the ranks ended with {exit_code} before they could say why: see the log above"


def _time_is_up(facts: JobFacts, *, now: float) -> bool:
    """Whether the job is over its time limit: while it is COMPLETING, Slurm doesn't say TIMEOUT."""
    if facts.state == "TIMEOUT" or facts.reason == "TimeLimit":
        return True
    return (facts.start_time is not None and facts.time_limit is not None
            and now - facts.start_time >= facts.time_limit)


def _cause_of_stop(why: str, *, facts: JobFacts | None, now: float) -> tuple[Cause, str]:
    """What stood behind a stop that the ranks agreed on."""
    if why in ("INT", "HUP", "STOP file"):
        return Cause.STOPPED, why
    # A time before this start's beginning would be an earlier preemption's.
    if facts is not None and facts.preempt_time is not None and facts.preempt_time >= (facts.start_time or 0.0):
        return Cause.PREEMPTED, f"{why}: Slurm is preempting the job"
    if facts is not None and _time_is_up(facts, now=now):
        return Cause.WALLTIME, f"{why}: the time is up"
    if why == "TERM":
        if facts is None:
            return Cause.SLURM, "TERM, and Slurm can't be asked why"
        return Cause.STOPPED, "TERM, sent by hand: the job is neither preempted nor at its time limit"
    ending = facts is not None and facts.end_time is not None and facts.end_time - now < NEARLY
    if why == "deadline" or ending:
        return Cause.WALLTIME, f"{why}: the time is nearly up"
    return Cause.WARNED, f"{why}: by hand, or by a warning of the site's"
