"""The requeue plan: what happens to a job from its submission to the run's end, in words. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from alexnet_ddp.config import Config
from alexnet_ddp.errors import EXIT_STOPPED
from launch import durations
from launch.preflight import Request
from launch.requeue import Caps

NO_LIMIT = "without a time limit"
LOCAL_STARTS = 6  # of submitit's local executor


def requeue_plan(request: Request, config: Config, *, caps: Caps, cluster: str, limit: float | None,
                 site: Mapping[str, str] | None, rate: float | None) -> list[str]:
    """Lines of text.

    Args:
        limit: seconds; None: not known.
        site: the cluster's configuration, None where it can't be asked.
        rate: images per second that the run is known to make, None where it isn't.
    """
    if cluster == "debug":
        return ["It runs in this process, as a single rank, and nobody brings it back: the same command goes on."]
    lead = durations.words(request.lead)
    words = limit_in_words(limit, cluster=cluster)
    early = " (Slurm looks every 30 s, so it may come up to a minute earlier)" if cluster == "slurm" else ""
    rows = [("time limit", [f"{words}; USR2 to all ranks {lead} before its end{early}.",
                            f"They finish the step, save, and leave with {EXIT_STOPPED}.", _who(cluster)])]
    if cluster == "local" and words == NO_LIMIT:
        rows = [("time limit", [f"{words}; a signal to the ranks ends an attempt. {_who(cluster)}"])]
    if cluster == "slurm":
        rows += [("preemption", _preemption(site)),
                 ("lost node", ["Slurm requeues the job by itself (--requeue)."])]
    rows += [
        ("failure", [f"dead or hung rank, network, device, disk: comes back, at most {caps.failures} in a row; out of "
                     f"memory: at most {_times(caps.memory)};",
                     f"non-finite: at most {_times(caps.nonfinite)}."]),
        ("no progress", [f"{caps.stalled} attempts in a row without a new step in a checkpoint end it."]),
        ("never back", [("scancel, a" if cluster == "slurm" else "A") + " STOP file in the run directory, Ctrl-C, a "
                        "user error, a bug: another start would end the same way."]),
        ("costs", interval_cost(config, rate=rate))]
    return [f"  {title if number == 0 else '':12s} {line}" for title, lines in rows
            for number, line in enumerate(lines)]


def limit_in_words(limit: float | None, *, cluster: str) -> str:
    if limit is None:
        return "the partition's default time at a time" if cluster == "slurm" else NO_LIMIT
    return NO_LIMIT if math.isinf(limit) else f"{durations.words(limit)} at a time"


def _who(cluster: str) -> str:
    if cluster == "slurm":
        return "The batch shell decides, and asks `scontrol requeue`: same job id, same log."
    return f"submitit's local executor starts them again, up to {LOCAL_STARTS} starts."


def _preemption(site: Mapping[str, str] | None) -> list[str]:
    comes_back = "They save and leave; it comes back without end, as long as there is progress."
    if site is None:
        return ["USR2 where the cluster sends it (preempt_send_user_signal), else TERM.", comes_back]
    if site.get("PreemptType", "preempt/none") == "preempt/none":
        return ["This cluster preempts no jobs."]
    if "preempt_send_user_signal" in site.get("SlurmctldParameters", "") + site.get("PreemptParameters", ""):
        return ["USR2 (this cluster has preempt_send_user_signal), where the partition has a GraceTime.", comes_back]
    return ["TERM (this cluster sends no user signal), KILL after the partition's GraceTime.", comes_back]


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def interval_cost(config: Config, *, rate: float | None) -> list[str]:
    """What is trained again after an end without a warning: the work since the last checkpoint."""
    periods: list[str] = []
    checkpoint = config.checkpoint
    if checkpoint.minutes is not None:
        periods.append(f"{checkpoint.minutes:g} min (checkpoint.minutes)")
    if checkpoint.steps is not None:
        images = checkpoint.steps * config.global_batch
        periods.append(f"{checkpoint.steps} steps (checkpoint.steps; {images:,} images)")
    if checkpoint.epochs is not None:
        periods.append(f"{checkpoint.epochs} epoch{'s' * (checkpoint.epochs > 1)} (checkpoint.epochs)")
    if not periods:
        return ["An end without a warning costs all that was trained: set checkpoint.minutes."]
    line = "An end without a warning costs at most " + ", or ".join(periods) + ", whichever is less."
    if len(periods) == 1:
        line = f"An end without a warning costs at most {periods[0]} of training."
    if checkpoint.minutes is None:
        return [line]
    if rate is None:
        return [line, "How many images that is will be known once the run has trained."]
    return [line, f"{checkpoint.minutes:g} min are {60 * checkpoint.minutes * rate:,.0f} images at the {rate:,.0f} a "
            "second that it last made."]


def rate_of(records: Sequence[Mapping[str, object]]) -> float | None:
    """Images per second over the newest training records; None without any."""
    rates = [float(rate) for record in records if isinstance(rate := record.get("images_per_second"), int | float)]
    return sum(rates) / len(rates) if rates else None
