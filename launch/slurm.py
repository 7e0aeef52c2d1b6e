"""What Slurm says, asked by its read-only commands and parsed tolerantly (written for 22.05, newer ones add words).

Everything returns None where Slurm can't be asked: no such command, no cluster, no answer in time, accounting switched
off. Nothing here raises, and nothing here changes anything.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass

PATIENCE = 10.0  # seconds for one command's answer


# --- asking -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    code: int
    text: str
    errors: str


def ask(words: list[str], *, timeout: float = PATIENCE) -> Answer | None:
    """Runs a command of Slurm's; None where it isn't there, can't be run, or gives no answer in `timeout` seconds."""
    # A user's SQUEUE_STATES, SINFO_FORMAT or time format would change what we parse.
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("SQUEUE_", "SINFO_", "SACCT_", "SCONTROL_"))}
    environment |= {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
    try:
        # A session of its own, so that what a site's wrapper script has started can be ended with it.
        command = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, start_new_session=True)
    except OSError:
        return None
    try:
        text, errors = command.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
            command.communicate()
    return Answer(command.returncode, text.decode(errors="replace"), errors.decode(errors="replace"))


def said(words: list[str], timeout: float) -> str | None:
    answer = ask(words, timeout=timeout)
    return answer.text if answer is not None and answer.code == 0 else None


# --- words ------------------------------------------------------------------------------------------------------

NOTHING = {"", "(null)", "N/A", "None", "NONE", "Unknown", "UNKNOWN", "n/a", "NULL"}


def seconds(text: str) -> float | None:
    """Seconds of a length of time as Slurm prints it: `1-02:03:04`, `20:00`, `30 sec`; None: unlimited or unknown."""
    text = text.strip()
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match:
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        return days * 86400.0 + hours * 3600 + minutes * 60 + rest
    match = re.fullmatch(r"(\d+)\s*(s|sec|secs|m|min|mins)?", text)  # `show config` names its unit
    return float(match[1]) * (60 if (match[2] or "s").startswith("m") else 1) if match else None


def moment(text: str) -> float | None:
    """Unix time of a time stamp in this machine's time zone, `2026-11-22T01:02:03`; None: none or unknown."""
    try:
        return time.mktime(time.strptime(text.strip(), "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def state_word(text: str) -> str:
    """`CANCELLED by 1000` and `COMPLETING*` as one plain word in capitals; empty: unknown."""
    match = re.match(r"[A-Za-z_]+", text.strip())
    return match[0].upper() if match else ""


def plain(text: str) -> str:
    return "" if text.strip() in NOTHING else text.strip()


def whole(text: str) -> int | None:
    match = re.match(r"\d+", text.strip())
    return int(match[0]) if match else None


def words_of(line: str) -> dict[str, str]:
    """Slurm's `Key=value Key=value` line. Values may hold spaces and equal signs: of two keys the first one counts."""
    found: dict[str, str] = {}
    keys = list(re.finditer(r"(?:^|(?<=\s))([A-Za-z][\w/:.\[\]]*)=", line))
    ends = [key.start() for key in keys[1:]] + [len(line)]
    for key, end in zip(keys, ends, strict=False):
        found.setdefault(key[1], line[key.end():end].strip())
    return found


# --- jobs: scontrol show job ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobFacts:
    """A job as slurmctld knows it. Times are unix seconds, lengths seconds; None: none, unlimited or unknown."""

    job: str  # 12, and 12_3 for a task of an array
    raw: str  # SLURM_JOB_ID: 12, of its own for every task of an array
    name: str
    state: str  # RUNNING, COMPLETING, CANCELLED ...
    reason: str
    partition: str
    requeue: bool  # Slurm may requeue it
    restarts: int
    time_limit: float | None
    start_time: float | None
    end_time: float | None
    preempt_time: float | None  # when it was chosen to be preempted


# JobName is free text and comes before everything of interest; other free text (Comment, Command) comes after.
HEAD = re.compile(r"^(?P<ids>JobId=.*?)\bJobName=(?P<name>.*?)\s(?P<rest>UserId=\S+\(\d+\)\s.*)$", re.DOTALL)


def parse_job(line: str) -> JobFacts | None:
    """One line of `scontrol show job -o`; None if it tells of no job."""
    match = HEAD.match(line.strip())
    if not match:
        return None
    ids, facts = words_of(match["ids"]), words_of(match["rest"])
    raw = ids.get("JobId", "")
    if not raw.isdigit():
        return None
    array, task = ids.get("ArrayJobId", ""), ids.get("ArrayTaskId", "")
    return JobFacts(
        job=f"{array}_{task}" if array and task else raw,
        raw=raw,
        name=match["name"],
        state=state_word(facts.get("JobState", "")),
        reason=plain(facts.get("Reason", "")),
        partition=plain(facts.get("Partition", "")),
        requeue=facts.get("Requeue") == "1",
        restarts=whole(facts.get("Restarts", "")) or 0,
        time_limit=seconds(facts.get("TimeLimit", "")),
        start_time=moment(facts.get("StartTime", "")),
        end_time=moment(facts.get("EndTime", "")),
        preempt_time=moment(facts.get("PreemptTime", "")))


def parse_jobs(text: str) -> list[JobFacts]:
    return [facts for facts in map(parse_job, text.splitlines()) if facts]


def job_facts(job: str, *, timeout: float = PATIENCE) -> JobFacts | None:
    """What slurmctld knows of a job (12, or 12_3 for a task of an array); None: it can't be asked, or knows none."""
    text = said(["scontrol", "show", "job", "-o", str(job)], timeout)
    jobs = parse_jobs(text or "")
    own = [facts for facts in jobs if str(job) in (facts.job, facts.raw)] or jobs
    return own[0] if own else None


# --- jobs: squeue and sacct -------------------------------------------------------------------------------------


WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
LIVING = WAITING | {"CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING",
                    "STAGE_OUT"}


@dataclass(frozen=True)
class Queued:
    """A job in the queue, or lately there."""

    job: str
    raw: str
    name: str
    state: str
    reason: str
    partition: str
    start_time: float | None  # of a pending job: when Slurm expects to start it
    nodes: str

    @property
    def waiting(self) -> bool:
        return self.state in WAITING

    @property
    def living(self) -> bool:
        """It runs, or may still."""
        return self.state in LIVING


QUEUE = "%i|%A|%T|%P|%S|%N|%r|%j"  # the name last: it may hold anything


def parse_queue(text: str) -> list[Queued]:
    """The lines of `squeue -h -o QUEUE`."""
    jobs = []
    for line in text.splitlines():
        parts = line.split("|", 7)
        if len(parts) == 8 and parts[1].strip().isdigit():
            job, raw, state, partition, start, nodes, reason, name = (part.strip() for part in parts)
            jobs.append(Queued(job, raw, name, state_word(state), plain(reason), partition, moment(start), nodes))
    return jobs


def queue(jobs: Iterable[str], *, timeout: float = PATIENCE) -> list[Queued] | None:
    """Those of `jobs` (12, 12_3) that slurmctld still knows, in any state; None: it can't be asked."""
    wanted = sorted(set(jobs))
    if not wanted:
        return []
    answer = ask(["squeue", "-h", "-a", "-r", "-t", "all", "-o", QUEUE, "-j", ",".join(wanted)], timeout=timeout)
    if answer is None:
        return None
    if answer.code:
        return [] if "invalid job id" in answer.errors.lower() else None  # so it says when it knows none of them
    return parse_queue(answer.text)


@dataclass(frozen=True)
class Past:
    """A job as accounting remembers it."""

    job: str
    raw: str
    state: str
    exit_code: str  # code:signal
    end_time: float | None
    reason: str


HISTORY = "JobID,JobIDRaw,State,ExitCode,End,Reason"


def parse_history(text: str) -> list[Past]:
    """The lines of `sacct -X -n -P -o HISTORY`."""
    jobs = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|", 5)]
        if len(parts) == 6 and parts[1].isdigit():
            job, raw, state, exit_code, end, reason = parts
            jobs.append(Past(job, raw, state_word(state), exit_code, moment(end), plain(reason)))
    return jobs


def history(jobs: Iterable[str], *, timeout: float = PATIENCE) -> list[Past] | None:
    """`jobs` in accounting; None: there is none, or it can't be asked."""
    wanted = sorted(set(jobs))
    if not wanted:
        return []
    text = said(["sacct", "-X", "-n", "-P", "-o", HISTORY, "-j", ",".join(wanted)], timeout)
    return None if text is None else parse_history(text)
