"""What a cluster's configuration means for a run: pure, configuration and partitions in, findings out."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from alexnet_ddp.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_UNAVAILABLE, EXIT_USER
from alexnet_ddp.findings import Finding, note, ok, warn
from launch import slurm
from launch.cluster import Partition

SHORT = 30.0  # seconds in which a large net may not get through a step and a save
SLOW = 60.0  # seconds of a requeue delay worth a word
CODES = {EXIT_FAILED, EXIT_USER, EXIT_UNAVAILABLE, EXIT_STOPPED, EXIT_INTERRUPTED}  # that a run may end with
PERIODIC = "checkpoint.minutes=5, which is then about what a preemption costs at most"


@dataclass(frozen=True)
class Qos:
    """A quality of service: its PreemptMode ("cluster" for the cluster's) and its GraceTime in seconds."""

    name: str
    mode: str
    grace: float


@dataclass(frozen=True)
class Site:
    """What was read. `qos` is None where accounting can't be asked."""

    config: Mapping[str, str]
    partitions: Sequence[Partition] = ()
    qos: Sequence[Qos] | None = None

    def word(self, key: str) -> str:
        """A value of the configuration, "" where there is none."""
        text = self.config.get(key, "").strip()
        return "" if text in slurm.NOTHING else text

    def seconds(self, key: str, default: float) -> float:
        found = slurm.seconds(self.word(key))
        return default if found is None else found

    def option(self, key: str, name: str) -> str | None:
        """`value` of `name=value`, or "" of a bare `name`, in a comma-separated value; None: it isn't there."""
        for part in self.word(key).split(","):
            found, _, value = part.strip().partition("=")
            if found == name:
                return value
        return None

    @property
    def user_signal(self) -> bool:
        """Whether preemption sends the signal of --signal. Newer Slurm has it in PreemptParameters."""
        return (self.option("SlurmctldParameters", "preempt_send_user_signal") is not None
                or self.option("PreemptParameters", "send_user_signal") is not None)


def parse_qos(text: str) -> list[Qos]:
    """The lines of `sacctmgr -nP show qos format=Name,PreemptMode,GraceTime`."""
    parts = [[part.strip() for part in line.split("|")] for line in text.splitlines()]
    return [Qos(part[0], part[1] or "cluster", slurm.seconds(part[2]) or 0.0)
            for part in parts if len(part) == 3 and part[0]]


def findings(site: Site) -> list[Finding]:
    """All that is to be said of a site, in the order in which a run meets it."""
    return [found for part in (_requests, _memory, _tasks, _preemption, _ends, _requeues, _accounting)
            for found in part(site)]


# --- what may be asked for --------------------------------------------------------------------------------------


def _requests(site: Site) -> Iterator[Finding]:
    for limit, names in _grouped((part.max_time, part.name) for part in site.partitions if part.up):
        topic = f"time limit of {names}"
        if limit is None:
            yield ok(topic, "none; a job may ask for any time.")
        else:
            yield ok(topic, f"{_words(limit)}. A longer run saves and is requeued at each limit, without end.",
                     f"--time {_time(limit)} or less")
    if site.word("EnforcePartLimits").upper() in ("", "NO"):
        yield note("EnforcePartLimits=NO", "Slurm takes a job that is over its partition's limits, and it waits "
                   "for ever. `alexnet-ddp submit` refuses it.")
    if site.word("JobSubmitPlugins"):
        yield note("job_submit", f"the site's plugin ({site.word('JobSubmitPlugins')}) may change what is asked "
                   "for.", "once, after submitting: does `scontrol show job ID` say Requeue=1 and your TimeLimit?")
    if site.seconds("MaxArraySize", 1001) < 2:
        yield warn("job arrays", "switched off (MaxArraySize), and with them --seeds.",
                   "one submission a seed: seed=1 name=NAME-seed1")
    if "gpu" not in site.word("GresTypes").split(","):
        yield warn("GPUs", "Slurm schedules none here (GresTypes): a job that asks for one is refused.",
                   "--tasks-per-node N instead of --gpus-per-node N")


def _memory(site: Site) -> Iterator[Finding]:
    scheduled = "MEMORY" in site.word("SelectTypeParameters").upper()
    defaults = {site.word(key) for key in ("DefMemPerNode", "DefMemPerCPU", "DefMemPerGPU")} - {""}
    if scheduled and defaults <= {"UNLIMITED", "0"}:
        yield note("memory", "a job that doesn't say how much it needs gets all of its nodes'; it waits until "
                   "they are empty, and nobody fits beside it.", "--mem 64G (per node)")
    elif scheduled:
        yield note("memory", f"a job that doesn't say how much it needs gets {', '.join(sorted(defaults))} MB "
                   "per CPU, GPU or node, and is killed when it takes more.", "--mem 64G (per node)")


def _tasks(site: Site) -> Iterator[Finding]:
    plugins, tracking = site.word("TaskPlugin"), site.word("ProctrackType")
    if "affinity" in plugins or "cgroup" in plugins:
        yield ok("CPUs", f"a rank gets the cores that were asked for, and no others ({plugins}); one, where "
                 "nothing was.", "--cpus-per-task N: images are decoded on them")
    else:
        yield note("CPUs", f"ranks aren't bound to cores ({plugins or 'no TaskPlugin'}): all jobs of a node "
                   "share them.", "--cpus-per-task N, so that Slurm counts them at least")
    if tracking == "proctrack/cgroup":
        yield ok("processes", "kept in a cgroup: signals reach the ranks alone, and none outlives its job.")
    else:
        yield note("processes", f"not kept in a cgroup ({tracking or 'ProctrackType unknown'}): an orphan may "
                   "outlive its job. The run's lease keeps it from writing.")


# --- preemption -------------------------------------------------------------------------------------------------


def _preemption(site: Site) -> Iterator[Finding]:
    kind, cluster = site.word("PreemptType"), site.word("PreemptMode")
    if kind in ("", "preempt/none"):
        yield ok("preemption", "none: no job makes room for another.")
    elif kind == "preempt/qos" and site.qos is None:
        yield note("preemption", "by quality of service, and accounting doesn't answer: PreemptMode and "
                   "GraceTime are unknown.", PERIODIC)
    elif kind == "preempt/qos":
        for (mode, grace), names in _grouped(((cluster if qos.mode == "cluster" else qos.mode, qos.grace), qos.name)
                                             for qos in site.qos or ()):
            yield _preempted(site, f"preemption in QOS {names}", mode=mode.upper(), grace=grace)
    else:
        top = max((part.tier for part in site.partitions), default=0)
        for (mode, grace), names in _grouped((("OFF", 0.0) if part.tier == top else
                                              (part.preempt_mode or cluster, part.grace), part.name)
                                             for part in site.partitions):
            yield _preempted(site, f"preemption in {names}", mode=mode.upper(), grace=grace)


def _preempted(site: Site, topic: str, *, mode: str, grace: float) -> Finding:
    """What a job meets that is preempted in this mode, with a GraceTime of `grace` seconds."""
    if "SUSPEND" in mode:
        return note(topic, "a job is suspended in memory, with its GPUs, and goes on later. Its time limit may "
                    "pass meanwhile.")
    if "REQUEUE" not in mode and "CANCEL" not in mode:
        return ok(topic, "none: PreemptMode=OFF, or nothing has a higher PriorityTier.")
    cancel = (" Slurm itself would cancel it (PreemptMode=CANCEL): should it deny the batch shell's requeue, the same "
              "submit line goes on.") if "CANCEL" in mode else ""
    if grace == 0:
        sent = "the user signal and TERM at once" if site.user_signal else "TERM only"
        return warn(topic, f"{sent}, GraceTime 0 s, then KILL after KillWait "
                    f"({site.seconds('KillWait', 30):.0f} s): unless a step and a save fit in that, only periodic "
                    f"checkpoints hold.{cancel}", PERIODIC)
    sent = "the user signal" if site.user_signal else "TERM (no preempt_send_user_signal; TERM serves as well)"
    meaning = (f"{sent} and a GraceTime of {grace:.0f} s: the ranks save and leave, and the batch shell requeues the "
               f"job at once, so that the other job needn't wait for the rest.{cancel}")
    if grace < SHORT:
        return note(topic, meaning, f"where a step and a save don't fit in {grace:.0f} s: {PERIODIC}")
    return Finding("note" if cancel else "ok", topic, meaning)


# --- ends and returns -------------------------------------------------------------------------------------------


def _ends(site: Site) -> Iterator[Finding]:
    wait, down = site.seconds("KillWait", 30), site.seconds("SlurmdTimeout", 300)
    meaning = (f"{wait:.0f} s from TERM to KILL, at scancel and at a requeue by hand. Before a time limit the lead "
               "time comes on top.")
    if wait < SHORT:
        yield note("KillWait", meaning, "don't count on a save at scancel: `touch RUN/STOP` saves for certain")
    else:
        yield ok("KillWait", meaning)
    over = site.word("OverTimeLimit").split()[:1]
    if over not in ([], ["0"]):
        yield ok("OverTimeLimit", f"a job may outlive its time limit by {over[0]} min; a run leaves before it.")
    if down:
        yield ok("a lost node", f"is given up after {down:.0f} s (SlurmdTimeout); Slurm requeues the job, which "
                 "goes on from the last periodic checkpoint.")
    else:
        yield note("a lost node", "is never given up (SlurmdTimeout=0); the other ranks notice it themselves.")


def _requeues(site: Site) -> Iterator[Finding]:
    if site.word("JobRequeue") == "0":
        yield ok("JobRequeue=0", "jobs aren't requeued unless they ask for it; `submit` and the scripts do.")
    else:
        yield ok("JobRequeue=1", "jobs may be requeued.")
    newer = site.option("SchedulerParameters", "requeue_delay")
    delay = slurm.seconds(newer or site.option("AuthInfo", "cred_expire") or "") or 120.0
    yield Finding("note" if delay >= SLOW else "ok", "requeue delay",
                  f"a requeued job waits {delay:.0f} s at least ({'requeue_delay' if newer else 'cred_expire'}), as "
                  "PENDING (BeginTime); `scontrol release` doesn't shorten it.")
    for key, held in (("RequeueExit", ""), ("RequeueExitHold", " and holds")):
        codes = sorted(_codes(site.word(key)) & CODES)
        if codes:
            yield warn(key, f"Slurm itself requeues{held} a job that ends with {', '.join(map(str, codes))}, "
                       "also one that the batch shell has decided to stop.",
                       "scancel the job when `status` says: not requeued")


def _accounting(site: Site) -> Iterator[Finding]:
    if site.word("AccountingStorageType") in ("", "accounting_storage/none"):
        age = _words(site.seconds("MinJobAge", 300))
        yield note("accounting", f"none: `status` asks squeue, which forgets a job {age} after its end "
                   "(MinJobAge), and the run directory, which doesn't.")
    else:
        yield ok("accounting", "`status` can tell of a job long after its end.")
    if "jobs" in site.word("PrivateData").split(","):
        yield note("PrivateData", "squeue shows your own jobs alone: of a colleague's run `status` sees the "
                   "directory, not the job.")


# --- words ------------------------------------------------------------------------------------------------------


Key = TypeVar("Key", bound=Hashable)


def _grouped(pairs: Iterable[tuple[Key, str]]) -> list[tuple[Key, str]]:
    """Pairs with the same key as one, their names listed."""
    found: dict[Key, list[str]] = {}
    for key, name in pairs:
        found.setdefault(key, []).append(name)
    return [(key, ", ".join(names)) for key, names in found.items()]


def _codes(text: str) -> set[int]:
    """The exit codes of `1-9,18`."""
    return {code for first, last in re.findall(r"(\d+)(?:-(\d+))?", text)
            for code in range(int(first), min(255, int(last or first)) + 1)}


def _words(seconds: float) -> str:
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f} {unit}{'' if seconds == size else 's'}"
    return f"{seconds:.0f} seconds"


def _time(seconds: float) -> str:
    """As sbatch takes it: [D-]HH:MM:SS."""
    days, rest = divmod(int(seconds), 86400)
    return f"{f'{days}-' if days else ''}{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
