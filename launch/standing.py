"""Where a run stands, judged from the facts: pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from launch.facts import Facts
from launch.slurm import Past, Queued


@dataclass(frozen=True, kw_only=True)
class Row:
    """Where a run stands: the keys of --json. None: not known (or no such thing)."""

    name: str
    run_dir: str
    state: str  # new queued starting running saving suspended ending requeued preempted finished failed lost unknown
    why: str
    exact: bool | None  # bit-equal to an undisturbed run so far
    why_not_exact: str
    step: int | None  # the newest known
    total_steps: int | None
    epoch: int | None  # the current one, from 1
    epochs: int | None
    images_per_second: float | None  # of the last training record, while the run is on
    seconds_left: float | None  # at the rate of the last training records
    attempt: int | None  # of the run, from 1
    restarts: int | None  # of its job
    job: str | None  # 12, or 12_3 for a task of an array
    job_state: str | None  # Slurm's word for it
    nodes: str | None
    checkpoint_step: int | None
    checkpoint_age: float | None  # seconds
    requeue: dict[str, str] | None  # the last decision: decision, cause, reason, time
    damaged: int | None  # images left out (data.on_error=skip)
    updated: str | None  # when state.json was last written


def judge(facts: Facts) -> Row:
    """The row of a run: pure, and content with any JSON in the run's files."""
    state, record = facts.state, facts.records[-1] if facts.records else {}
    if record.get("attempt") != state.get("attempt"):  # of before the last start
        record = {}
    job, begun = _job(facts), _begun(facts)
    word, why = _word(facts, job, begun)
    total = _whole(state.get("total_steps"))
    step = _newest(state.get("step"), record.get("step"), facts.saved.step if facts.saved else None)
    epoch = _newest(state.get("epoch"), record.get("epoch"))
    requeue = state.get("requeue")
    return Row(
        name=facts.run_dir.name,
        run_dir=str(facts.run_dir),
        state=word,
        why=why,
        exact=state["exact"] if isinstance(state.get("exact"), bool) else None,
        why_not_exact=_text(state.get("why_not_exact")) if state.get("exact") is False else "",
        step=step,
        total_steps=total,
        epoch=None if epoch is None else min(epoch + 1, facts.epochs or epoch + 1),
        epochs=facts.epochs,
        images_per_second=_number(record.get("images_per_second")) if word in ("running", "saving") else None,
        seconds_left=_left(facts.records, step, total),
        attempt=_whole(state.get("attempt")),
        restarts=_whole((begun or state).get("restart")) if facts.jobs else None,
        job=job.job if job else facts.jobs[0] if facts.jobs else None,
        job_state=job.state if job else None,
        nodes=job.nodes or None if isinstance(job, Queued) and job.living else None,
        checkpoint_step=facts.saved.step if facts.saved else None,
        checkpoint_age=max(0.0, facts.now - facts.saved.time) if facts.saved else None,
        requeue={key: _text(requeue.get(key)) for key in ("decision", "cause", "reason", "time")}
        if isinstance(requeue, dict) else None,
        damaged=_sum(state.get("damaged")),
        updated=_text(state.get("updated")) or None)


def _word(facts: Facts, job: Queued | Past | None, begun: dict[str, Any] | None) -> tuple[str, str]:
    """The run's state in a word, and why. `begun`: the newest start of a job in it."""
    state = facts.state
    status, why = _text(state.get("status")), _text(state.get("why")).removeprefix("alexnet-ddp: ")
    if status == "preempted" and why:
        why = f"stopped by {why}"
    if isinstance(job, Queued) and job.living:
        started = any(_of(job, one) for one in [state, *facts.attempts] if one.get("event") in ("begin", "end", None))
        if job.waiting:
            return ("requeued" if started else "queued"), _waiting(job, now=facts.now)
        if not _heard(job, state, begun):
            return "starting", f"job {job.job} is {job.state}; its ranks have not begun yet"
        if status == "running":
            quiet = f"no sign of life for {span(facts.beat.age)}" if facts.beat and facts.beat.silent else ""
            words = {"SUSPENDED": "suspended", "STOPPED": "suspended", "COMPLETING": "ending"}
            return words.get(job.state, _busy(facts)), quiet
    elif status == "running":
        return (_busy(facts), "") if facts.beat and not facts.beat.silent else ("lost", _lost(facts, job))
    elif status in ("preempted", "failed"):
        return _over(facts, job, status=status, why=why)
    elif not status and facts.jobs:
        if job is None and facts.queued is None:
            return ("starting" if begun else "queued"), "Slurm can't be asked"
        return "lost", f"{_gone(facts, job)}, and it never trained"
    elif not status:
        if facts.saved:
            return "unknown", "its state.json is missing or can't be read"
        return "new", "it has not trained yet"
    return (status, why) if status in ("preempted", "failed", "finished") else ("unknown", f"state.json says {status}")


def _busy(facts: Facts) -> str:
    return "saving" if facts.saving else "running"


def _lost(facts: Facts, job: Queued | Past | None) -> str:
    """Why a run that calls itself running is not: nobody beats its lease, and no job of it lives."""
    if not facts.jobs:
        return "its process has gone without a word (KILL, power); the same command goes on"
    if job is None and facts.queued is None:
        return "no sign of life from its ranks, and Slurm can't be asked"
    return f"no sign of life from its ranks, and {_gone(facts, job)}; the same command goes on"


def _over(facts: Facts, job: Queued | Past | None, *, status: str, why: str) -> tuple[str, str]:
    """A run that has stopped or failed, and no job of it lives: whether one is believed to come back."""
    requeue = facts.state.get("requeue")
    decision = requeue.get("decision") if isinstance(requeue, dict) else None
    if not facts.jobs:
        return status, _join(why, "the same command goes on" if status == "preempted" else "")
    if decision not in ("requeue", "slurm"):
        return status, why
    if job is None and facts.queued is None:
        if decision == "requeue":
            return "requeued", _join(why, "Slurm can't be asked whether it waits")
        return status, _join(why, "left to Slurm, which can't be asked")
    return status, _join(why, f"{'it was requeued, but ' if decision == 'requeue' else ''}{_gone(facts, job)}")


def _job(facts: Facts) -> Queued | Past | None:
    """The run's living job, else what is known of the newest."""
    living: Queued | Past | None = None
    newest: Queued | Past | None = None
    known: list[Queued | Past] = [*(facts.past or ()), *(facts.queued or ())]
    for one in known:
        names = {one.job, one.raw} & set(facts.jobs)
        if names and isinstance(one, Queued) and one.living:
            living = one
        if facts.jobs and facts.jobs[0] in names:
            newest = one
    return living or newest


def _begun(facts: Facts) -> dict[str, Any] | None:
    return next((one for one in reversed(facts.attempts) if one.get("event") == "begin"), None)


def _of(job: Queued | Past, told: dict[str, Any]) -> bool:
    """Whether state.json, or a line of attempts.jsonl, tells of this job."""
    return told.get("array") == job.job or told.get("job") in (job.raw, job.job)


def _heard(job: Queued, state: dict[str, Any], begun: dict[str, Any] | None) -> bool:
    """Whether this very start of the job has written state.json."""
    restart = _whole(begun.get("restart")) or 0 if begun and _of(job, begun) else 0
    return _of(job, state) and (_whole(state.get("restart")) or 0) >= restart


def _waiting(job: Queued, *, now: float) -> str:
    late = job.start_time is not None and job.start_time > now + 60  # of a requeued job it is the delay's end
    when = f"; Slurm expects to start it at {_clock(job.start_time)}" if late and job.start_time else ""
    return f"job {job.job} is {job.state}{f' ({job.reason})' if job.reason else ''}{when}"


def _gone(facts: Facts, job: Queued | Past | None) -> str:
    if job is None:
        return f"Slurm doesn't know job {facts.jobs[0]} any more"
    reason = f" ({job.reason})" if job.reason and job.state != "CANCELLED" else ""  # then it is of before
    return f"job {job.job} is {job.state}{reason}"


def _left(records: Sequence[dict[str, Any]], step: int | None, total: int | None) -> float | None:
    """Seconds to the end at the rate of the newest records of one attempt, with its pauses to evaluate and save."""
    if step is None or total is None or step >= total or not records:
        return None
    points = [(_whole(one.get("step")), _number(one.get("time"))) for one in records
              if one.get("attempt") == records[-1].get("attempt")]
    known = [(at, when) for at, when in points if at is not None and when is not None]
    if len(known) < 2 or known[-1][0] <= known[0][0] or known[-1][1] <= known[0][1]:
        return None
    return (total - step) * (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])


def _newest(*values: Any) -> int | None:
    return max((value for value in map(_whole, values) if value is not None), default=None)


def _text(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else None


def _sum(value: Any) -> int | None:
    """The sum of an object's numbers."""
    numbers = [_whole(number) for number in value.values()] if isinstance(value, dict) else []
    return sum(filter(None, numbers)) if numbers else None


def _number(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2.0**53:
        return float(value) if math.isfinite(value) else None
    return None


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _clock(when: float) -> str:
    then = datetime.fromtimestamp(when)
    return then.strftime("%H:%M" if then.date() == datetime.now().date() else "%Y-%m-%d %H:%M")


def span(seconds: float) -> str:
    """A length of time in a few characters: 59s, 59m, 23h59m, 9d23h."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{int(seconds)}s"
    if hours < 1:
        return f"{minutes}m"
    return f"{hours}h{minutes % 60:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24:02d}h"
