"""The attempts at a run within a job: opened in the batch shell before srun, closed there after it.

    python -m launch.attempts begin SNAPSHOT                 the log's header; prints lines for the shell to evaluate
    python -m launch.attempts end SNAPSHOT --exit-code N     decides (launch.requeue), tells it, asks Slurm

It runs on the host, so that a run in a container without `scontrol` is requeued all the same. What happened is kept
in the run directory's attempts.jsonl, the last decision in its state.json, and one line at the end of the log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from alexnet_ddp.errors import EXIT_FAILED, UserError
from alexnet_ddp.runfiles import (
    ATTEMPTS,
    Job,
    add_attempt,
    job_of,
    newest_checkpoint,
    read_attempts,
    read_state,
    replace_state,
)
from launch.requeue import FAILURES, Attempt, Caps, Cause, Decision, cause_of, decide, stalled_start
from launch.slurm import JobFacts, job_facts
from launch.snapshot import Snapshot, load

HOLD = 120.0  # seconds to stay when TERM came and Slurm can't be asked why: if it preempts, it ends the job itself
PAUSE = 10.0  # seconds after which it is asked again meanwhile
KNOWN = {str(cause): cause for cause in Cause}
ASK = (0, 2, 5, 10, 20, 20)  # seconds between two tries to requeue: slurmctld may be restarting


def wrote(state: dict[str, Any], job: Job) -> bool:
    """Whether state.json is this very start's."""
    return bool(state) and state.get("job") == job.id and int(state.get("restart") or 0) == job.restart


def history(run_dir: Path, job: Job, *, ended: int) -> list[Attempt]:
    """The job's earlier starts, oldest first. One that was never closed was cut off: its node was lost.

    Once it was decided to stop, the job only comes back by hand, or it is another of the same number: that counts anew.
    `ended` is the newest checkpoint's step now, where a start that was cut off has ended if none began after it.
    """
    begins = _of_job("begin", run_dir, job)
    ends = {record["restart"]: record for record in _of_job("end", run_dir, job)}
    found: list[Attempt] = []
    for begin, following in zip_longest(begins, begins[1:]):
        if begin["restart"] == job.restart:
            break
        end = ends.get(begin["restart"])
        cause = KNOWN.get(str(end.get("cause")), Cause.NODE) if end else Cause.NODE
        if cause == Cause.SLURM:  # it has brought the job back
            cause = Cause.PREEMPTED
        until = end or following
        found.append(Attempt(began=begin["step"], ended=until["step"] if until else ended, cause=cause,
                             seconds=_seconds(begin["time"], until["time"]) if until else 0.0))
        if end and end.get("decision") == "stop":
            found.clear()
    return found


def beginning(run_dir: Path, job: Job, *, now: float) -> tuple[int, float]:
    """Newest checkpoint's step when this start began, and the seconds since; (0, 0) for one that was never entered."""
    for record in reversed(_of_job("begin", run_dir, job)):
        if record["restart"] == job.restart:
            return record["step"], max(0.0, now - datetime.fromisoformat(record["time"]).timestamp())
    return 0, 0.0


def open_attempt(run_dir: Path, job: Job, *, nodes: str, snapshot: str) -> str:
    """Enters the attempt and returns the header of its log."""
    step = _newest_step(run_dir)
    before = [record for record in read_attempts(run_dir) if record.get("event") in ("begin", "end")]
    try:
        add_attempt(run_dir, "begin", **job.facts, step=step, nodes=nodes, snapshot=snapshot)
    except OSError as error:  # the ranks may still do better
        say(f"this attempt can't be entered in {run_dir / ATTEMPTS} ({error.strerror}).")
    total = read_state(run_dir).get("total_steps")
    header = (f"=== {run_dir}: job {job.name} start {job.restart} on {nodes}, "
              f"{time.strftime('%Y-%m-%d %H:%M:%S')}, from step {step}{f' of {total}' if total else ''}")
    if before and before[-1].get("event") == "end":
        header += f"; the attempt before: {before[-1].get('cause')}"
    elif before:
        header += "; the attempt before ended without a word (lost node, power, KILL)"
    return header


# --- the end of an attempt ------------------------------------------------------------------------------------------


def judge(snapshot: Snapshot, job: Job, *, exit_code: int, facts: JobFacts | None) -> Decision:
    """Finds the cause, decides, and tells it: state.json, attempts.jsonl, one line at the end of the log."""
    run_dir, now = snapshot.run_dir, time.time()
    state = read_state(run_dir)
    began, seconds = beginning(run_dir, job, now=now)
    mine = state if wrote(state, job) else None
    if mine is None or mine.get("status") == "running":  # rank 0 was killed, or its disk is full: another may have told
        mine = reported(run_dir, since=now - seconds) or mine
    cause, why = cause_of(mine, exit_code=exit_code, facts=facts, restart=job.restart, now=now)
    step = _newest_step(run_dir)
    caps = Caps(**snapshot.caps)
    this = Attempt(began=began, ended=step, cause=cause, seconds=seconds)
    decision = decide([*history(run_dir, job, ended=step), this], caps=caps)
    try:
        record(snapshot, job, decision, cause=cause, step=step, exit_code=exit_code, why=why, mine=wrote(state, job))
    except OSError as error:  # no reason to lose a job to a preemption
        said = f"its end can't be written down ({error.strerror})"
        decision = (Decision("stop", f"{said}, and failures that can't be counted have no cap")
                    if decision.action == "requeue" and cause in FAILURES else
                    Decision(decision.action, f"{decision.reason}; {said}"))
    words = {"requeue": "Requeued", "stop": "Not requeued", "slurm": "Left to Slurm"}[decision.action]
    because = f"{cause} ({why})" if why and why != cause else str(cause)
    say(f"job {job.name} start {job.restart} ended at step {step}: {because}. {words}: {decision.reason}.")
    return decision


def reported(run_dir: Path, *, since: float) -> dict[str, Any] | None:
    """What a rank of this start wrote into errors/ of its job's failure, as state.json would tell it."""
    for path in sorted((run_dir / "errors").glob("rank_*.json"), key=os.path.getmtime, reverse=True):
        try:
            failure = json.loads(path.read_text())
            if path.stat().st_mtime < since:
                break
            why = f"rank {failure['rank']} on {failure['host']} failed at step {failure['step']}: {failure['cause']}"
            return {"status": "failed", "why": why, "failure": failure}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def record(snapshot: Snapshot, job: Job, decision: Decision, *, cause: Cause, step: int | None, exit_code: int,
           why: str = "", mine: bool = True) -> None:
    """Writes a decision to attempts.jsonl, and to state.json unless another attempt owns that by now."""
    facts = {"cause": str(cause), "decision": decision.action, "reason": decision.reason}
    place = job.facts
    add_attempt(snapshot.run_dir, "end", **place, step=step, exit_code=exit_code, why=why, **facts)
    state = read_state(snapshot.run_dir)
    newer = state.get("job") == job.id and int(state.get("restart") or 0) > job.restart
    others = state.get("job") != job.id and state.get("status") == "running"
    if newer or others:
        return
    state["requeue"] = {**facts, **place, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    if state.get("status") == "running" and mine:  # the ranks were killed before they could write how it ended
        state |= {"status": "failed", "why": why or str(cause)}
    elif not mine and cause not in (Cause.SLURM, Cause.FINISHED) and state.get("status") != "finished":
        state |= {"status": "failed", "why": why or str(cause), "job": job.id, "restart": job.restart}
    replace_state(snapshot.run_dir, state)


def ask_slurm(job: Job) -> str:
    """Requeues the job; returns Slurm's refusal, or "". Tried for about a minute."""
    scontrol = shutil.which("scontrol") or shutil.which("scontrol", path="/usr/bin:/usr/local/bin:/opt/slurm/bin")
    if scontrol is None:
        return "there is no scontrol on this host's PATH"
    said = ""
    for pause in ASK:
        time.sleep(pause)
        try:
            asked = subprocess.run([scontrol, "requeue", job.array or job.id], capture_output=True, text=True,
                                   timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
            continue
        if asked.returncode == 0:
            return ""
        said = (asked.stderr or asked.stdout).strip().splitlines()[-1] if asked.stderr or asked.stdout else "no reason"
        if "denied" in said or "disabled" in said:
            break
    return said


def say(text: str) -> None:
    """To the log, of which this is then the last line."""
    print(f"alexnet-ddp: {text}", file=sys.stderr, flush=True)


def _of_job(event: str, run_dir: Path, job: Job) -> list[dict[str, Any]]:
    """What attempts.jsonl tells of the job's starts; a line of another version, or a damaged one, tells nothing."""
    return [record for record in read_attempts(run_dir)
            if record.get("event") == event and record.get("job") == job.id and _is_time(record.get("time"))
            and isinstance(record.get("restart"), int) and isinstance(record.get("step"), int)]


def _is_time(text: Any) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _newest_step(run_dir: Path) -> int:
    saved = newest_checkpoint(run_dir)
    return saved.step if saved else 0


def _seconds(first: str, last: str) -> float:
    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()


# --- in the batch shell --------------------------------------------------------------------------------------------


def begin(snapshot: Snapshot, job: Job) -> list[str]:
    """Opens an attempt; returns lines for the shell."""
    run_dir = snapshot.run_dir
    nodes = os.environ.get("SLURM_JOB_NODELIST", "this machine")
    print(open_attempt(run_dir, job, nodes=nodes, snapshot=snapshot.id), file=sys.stderr, flush=True)
    step = _newest_step(run_dir)
    reason = stalled_start(history(run_dir, job, ended=step), caps=Caps(**snapshot.caps))
    if reason:  # Slurm has brought it back by itself, again and again
        record(snapshot, job, Decision("stop", reason), cause=Cause.NODE, step=step, exit_code=EXIT_FAILED, why=reason,
               mine=False)
        say(f"job {job.name} start {job.restart} doesn't train. Not requeued: {reason}.")
        return [f"exit {EXIT_FAILED}"]
    facts = job_facts(job.id) if job.id and "SLURM_JOB_END_TIME" not in os.environ else None  # Slurm has it from 23.02
    return [f"export SLURM_JOB_END_TIME={facts.end_time:.0f}"] if facts and facts.end_time is not None else []


def end(snapshot: Snapshot, job: Job, *, exit_code: int) -> None:
    """Closes an attempt, and asks Slurm to bring the job back where that was decided."""
    facts = job_facts(job.id) if job.id else None
    decision = judge(snapshot, job, exit_code=exit_code, facts=facts)
    held = 0.0
    while decision.action == "slurm" and facts is None and held < HOLD:
        time.sleep(PAUSE)  # were this shell to leave now, a preempted job would end rather than come back
        held += PAUSE
        facts = job_facts(job.id) if job.id else None
        if facts is not None:  # slurmctld was being restarted, say
            decision = judge(snapshot, job, exit_code=exit_code, facts=facts)
    if decision.action == "requeue":
        refusal = ask_slurm(job)
        if refusal:
            with contextlib.suppress(OSError):
                record(snapshot, job, Decision("stop", f"Slurm refused the requeue: {refusal}"), cause=Cause.SLURM,
                       step=None, exit_code=exit_code)
            say(f"Slurm refused to requeue job {job.name}: {refusal}. "
                f"alexnet-ddp submit {snapshot.path / 'recipe.yaml'} goes on from the newest checkpoint.")


def main(words: list[str]) -> int:
    """For the batch shell; returns 0, whatever was decided: the shell keeps srun's exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.attempts")
    parser.add_argument("what", choices=["begin", "end"])
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("--exit-code", type=int, default=0)
    options = parser.parse_args(words)
    try:
        snapshot, job = load(options.snapshot), job_of(os.environ)
    except UserError as mistake:  # without it there is nothing to go on from; the shell leaves with srun's code
        say(f"error: {mistake}")
        return 0
    if options.what == "begin":
        print("\n".join(begin(snapshot, job)))
    else:
        end(snapshot, job, exit_code=options.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
