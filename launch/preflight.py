"""Is what was asked for possible? Said at submission, not after hours in the queue. Pure.

A check refuses only what it knows to be impossible: where Slurm can't be asked, nothing about the cluster is refused.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from launch import durations
from launch.cluster import Nodes, Partition

STARTUP = 15.0  # seconds that a job needs at least besides its lead time to be of any use
LEAD = 120.0  # seconds: default lead time
SHARE = 4  # ... and it takes at most this part of the time limit, or half of it where the run is known to need more


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the cluster."""

    nodes: int = 1
    gpus: int = 0  # of a node
    gpu_type: str = ""
    gpus_per_task: int | None = None  # where it was asked for by the task
    tasks: int = 1  # of a node
    cpus: int | None = None  # of a task
    memory: float | None = None  # MB of a node
    limit: float | None = None  # seconds; None: the partition's default
    lead: float = LEAD  # seconds
    partitions: tuple[str, ...] = ()  # any of them will do; none: the cluster's default
    qos: str | None = None
    jobs: int = 1  # tasks of the job array


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What Slurm says of itself; None: it can't be asked."""

    partitions: Sequence[Partition] | None = None
    config: dict[str, str] | None = None


@dataclass(frozen=True)
class Known:
    """What is known of a run that has trained before; seconds, None where it isn't known."""

    step: float | None = None
    save: float | None = None
    needed: float | None = None  # what leaving takes in all: alexnet_ddp.stop.lead_time


@dataclass(frozen=True)
class Refusal:
    """Why a request is refused."""

    rule: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule}; found {self.found}. {self.fix}"


@dataclass
class Verdict:
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # possible, but worth a word


def default_lead(limit: float | None, *, needed: float | None = None) -> float:
    """Seconds of lead for a time limit (None or inf: none), where the user doesn't say.

    `needed`: what leaving takes, where that is known.
    """
    lead = LEAD if limit is None else max(1.0, min(LEAD, limit // SHARE))
    return max(lead, needed) if needed is not None and (limit is None or needed <= limit / 2) else lead


def check(request: Request, cluster: Cluster, *, known: Known | None = None) -> Verdict:
    """What is impossible in a request, and what is worth a word."""
    verdict = Verdict()
    verdict.refusals += _refused(_shape(request))
    if verdict.refusals:
        return verdict  # the others would only tell the same again
    chosen = candidates(request, cluster)
    verdict.refusals += _refused([_times(request, chosen), _leads(request, known or Known()),
                                  _array(request, cluster)])
    if cluster.partitions is None:
        return verdict
    if not chosen:
        verdict.refusals.append(_no_partition(request, cluster.partitions))
        return verdict
    found: list[list[Refusal]] = [_refused(rule(request, partition) for rule in RULES) for partition in chosen]
    if all(found):  # of several partitions, one will do
        verdict.refusals += sorted(found, key=len)[0]
    verdict.notes += _notes(request, chosen[0], cluster)
    return verdict


def _refused(answers: Iterable[Refusal | None]) -> list[Refusal]:
    return [answer for answer in answers if answer is not None]


def candidates(request: Request, cluster: Cluster) -> list[Partition]:
    """The partitions that a request may go to; [] where nothing is known of them."""
    known = cluster.partitions or []
    if request.partitions:
        return [partition for partition in known if partition.name in request.partitions]
    return [partition for partition in known if partition.default]


def limit_of(request: Request, cluster: Cluster) -> float | None:
    """The time limit in seconds that the job will have; None: not known."""
    if request.limit is not None:
        return request.limit
    limits = [partition.default_time or partition.max_time for partition in candidates(request, cluster)]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


# --- the request alone ------------------------------------------------------------------------------------------


def _shape(request: Request) -> list[Refusal | None]:
    refusals: list[Refusal | None] = []
    if request.gpus_per_task not in (None, 1):
        refusals.append(Refusal(
            "A rank trains on one GPU, so a task has one", f"--gpus-per-task {request.gpus_per_task}",
            "Use --gpus-per-node N (one task per GPU), or --gpus-per-task 1 --tasks-per-node N."))
    elif request.gpus and request.tasks != request.gpus:
        refusals.append(Refusal(
            "There is one task per GPU", f"{_count(request.tasks, 'task')} and {_count(request.gpus, 'GPU')} a node",
            f"Leave out --tasks-per-node, or ask for --gpus-per-node {request.tasks}."))
    return refusals


def _times(request: Request, chosen: Sequence[Partition]) -> Refusal | None:
    limit, told = request.limit, "--time"
    if limit is None and len(chosen) == 1:
        limit, told = chosen[0].default_time, f"the default of partition {chosen[0].name},"
    least = request.lead + STARTUP
    if limit is None or limit >= least:
        return None
    return Refusal(f"A job needs its lead time ({durations.words(request.lead)}) and {STARTUP:.0f} s to start in",
                   f"{told} {durations.words(limit)}",
                   f"Use --time {durations.words(60 * -(-least // 60))} or more (Slurm counts in minutes), or a "
                   "shorter --lead-time.")


def _leads(request: Request, known: Known) -> Refusal | None:
    if known.needed is None or request.lead >= known.needed:
        return None
    least = math.ceil(known.needed)
    return Refusal(
        "The lead time must be long enough for two steps, a save and a margin",
        f"{durations.words(request.lead)}, and in this run the slowest step took {known.step or 0:.1f} s and the last "
        f"save {known.save or 0:.1f} s", f"Use --lead-time {least}s or more, and a --time well above it.")


def _array(request: Request, cluster: Cluster) -> Refusal | None:
    most = (cluster.config or {}).get("MaxArraySize", "")
    if not most.isdigit() or request.jobs <= int(most):
        return None
    return Refusal(f"A job array of this cluster has at most {most} tasks (MaxArraySize)", f"{request.jobs} seeds",
                   "Submit them in parts.")


# --- the cluster ------------------------------------------------------------------------------------------------


def _no_partition(request: Request, partitions: Sequence[Partition]) -> Refusal:
    names = [partition.name for partition in partitions]
    there = f"There are: {', '.join(names[:12])}."
    if not request.partitions:
        return Refusal("This cluster has no default partition, so a job has to name one", "none",
                       f"Use --partition, or partition: in a profile. {there}")
    near = difflib.get_close_matches(request.partitions[0], names, n=1)
    return Refusal("A job goes to a partition of the cluster", f"--partition {','.join(request.partitions)}",
                   f"Did you mean {near[0]}?" if near else there)


def _within_time(request: Request, partition: Partition) -> Refusal | None:
    if request.limit is None or partition.max_time is None or request.limit <= partition.max_time or request.qos:
        return None
    longest = durations.slurm(partition.max_time)
    return Refusal(f"Jobs in partition {partition.name} end after {longest} (MaxTime)",
                   f"--time {durations.slurm(request.limit)}",
                   f"Use --time {longest}: the run comes back after it, as often as it takes.")


def _within_nodes(request: Request, partition: Partition) -> Refusal | None:
    if partition.max_nodes is None or request.nodes <= partition.max_nodes or request.qos:
        return None
    return Refusal(f"Jobs in partition {partition.name} have at most {partition.max_nodes} nodes (MaxNodes)",
                   f"--nodes {request.nodes}", f"Use --nodes {partition.max_nodes}, or another partition.")


def _fits(request: Request, partition: Partition) -> Refusal | None:
    """Whether so many nodes of the partition have what is asked of one, whether or not they are up just now."""
    kinds = partition.nodes
    if not kinds:
        return None
    total = sum(kind.count for kind in kinds)
    if total < request.nodes:
        return Refusal(f"Partition {partition.name} has {_count(total, 'node')}", f"--nodes {request.nodes}",
                       f"Use --nodes {total}, or another partition.")
    wants: list[tuple[str, str, Callable[[Nodes], bool], str]] = []  # what, asked how, who has it, who has most
    if request.gpus:
        most = max(kind.gpus for kind in kinds)
        wants.append((f"{_count(request.gpus, 'GPU')} each", f"--gpus-per-node {request.gpus}",
                      lambda kind: kind.gpus >= request.gpus,
                      f"The most that a node has is {_count(most, 'GPU')}: use more --nodes with fewer GPUs each."
                      if most else "Its nodes have no GPUs: use another partition."))
    if request.gpu_type:
        types = sorted({name for kind in kinds for name in kind.gpu_types})
        wants.append((f"GPUs of type {request.gpu_type}", f"the type {request.gpu_type}",
                      lambda kind: not types or request.gpu_type in kind.gpu_types,
                      f"The types there are: {', '.join(types)}."))
    cpus = request.tasks * (request.cpus or 1)
    most = max(kind.cpus for kind in kinds)
    asked = f"--cpus-per-task {request.cpus}" if request.cpus else "one CPU"
    asked += f" for each of {_count(request.tasks, 'task')}"
    wants.append((f"{_count(cpus, 'CPU')} each", asked, lambda kind: kind.cpus >= cpus,
                  f"The most that a node has is {_count(most, 'CPU')}: use --cpus-per-task "
                  f"{most // request.tasks} or less." if most >= request.tasks else
                  f"The most that a node has is {_count(most, 'CPU')}: use more --nodes with fewer tasks each."))
    if request.memory is not None:
        memory = request.memory
        largest = max(kind.memory for kind in kinds)
        wants.append((f"{memory:.0f} MB of memory each", f"--mem {memory:.0f}M", lambda kind: kind.memory >= memory,
                      f"The most that a node has is {largest} MB."))
    for what, asked, has, advice in wants:
        there = sum(kind.count for kind in kinds if has(kind))
        if there < request.nodes:
            found = f"{asked} on {_count(request.nodes, 'node')}"
            if there:
                advice = f"Use --nodes {there} or fewer, or ask less of each."
            return Refusal(f"Partition {partition.name} has {_count(there, 'node')} with {what}", found, advice)
    there = sum(kind.count for kind in kinds if all(has(kind) for _, _, has, _ in wants))
    if there < request.nodes:
        return Refusal(f"Partition {partition.name} has {_count(there, 'node')} with "
                       + " and ".join(what.removesuffix(" each") for what, *_ in wants),
                       f"--nodes {request.nodes} that ask for all of it", "Ask less of each node.")
    return None


RULES = (_within_time, _within_nodes, _fits)


def _notes(request: Request, partition: Partition, cluster: Cluster) -> list[str]:
    notes = []
    if not partition.up:
        notes.append(f"partition {partition.name} is not up: the job waits until it is")
    alike = [kind for kind in partition.nodes if kind.gpus >= request.gpus and kind.cpus]
    if request.cpus is None and alike:
        fair = min(kind.cpus // max(kind.gpus if request.gpus else request.tasks, 1) for kind in alike)
        if fair > 1:
            notes.append("without --cpus-per-task a rank gets one CPU, and decoding images takes more: the nodes of "
                         f"partition {partition.name} have {fair} for each {'GPU' if request.gpus else 'task'} "
                         f"(--cpus-per-task {fair})")
    if (cluster.config or {}).get("JobRequeue") == "0":
        notes.append("this cluster requeues no job by default (JobRequeue=0); this one says --requeue")
    return notes


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}" if number == 1 else f"{number or 'no'} {what}s"


def megabytes(text: str) -> float | None:
    """Slurm's `64G` in MB; None: all of the node's. Raises ValueError."""
    text = text.strip().upper().removesuffix("B")
    factor = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}.get(text[-1:])
    number = float(text if factor is None else text[:-1])
    return number * (factor or 1.0) or None
