"""Slurm's words, parsed: recorded from Slurm 22.05.8, and made up where that is nastier."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launch import cluster, slurm

RECORDED = Path(__file__).parent / "recorded" / "slurm_22_05"

ARRAY = ("JobId=15 ArrayJobId=12 ArrayTaskId=3 ArrayTaskThrottle=2 JobName={name} UserId=ada(1000) GroupId=ada(1000) "
         "MCS_label=N/A JobState=RUNNING Reason=None Requeue=0 Restarts=2 TimeLimit=1-02:03:04 "
         "StartTime=2026-11-22T01:00:00 EndTime=2026-11-23T03:03:04 PreemptTime=None Partition=gpu "
         "Comment={comment} Command=/home/ada/a b.sh x JobState=FAILED Restarts=9 WorkDir=/home/ada")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH: what is written there is what Slurm says."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def say(name: str) -> str:
    """Bash that prints a recorded answer, with nothing of PATH."""
    return f'while read -r line; do echo "$line"; done <{RECORDED / name}'


def put(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


# --- parsers ----------------------------------------------------------------------------------------------------


def local(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def test_recorded_jobs() -> None:
    """Of jobs recorded in six states, each fact is read; what was preempted says when."""
    jobs = {facts.job: facts for facts in slurm.parse_jobs((RECORDED / "jobs.txt").read_text())}
    assert {job: (facts.state, facts.restarts) for job, facts in jobs.items()} == {
        "1": ("COMPLETED", 0), "2": ("FAILED", 0), "3": ("CANCELLED", 0), "8": ("PENDING", 8), "9": ("RUNNING", 7),
        "13": ("RUNNING", 2)}
    assert jobs["2"].preempt_time == local("2026-11-22T00:28:53")
    assert jobs["13"] == slurm.JobFacts(
        job="13", raw="13", name="job.sh", state="RUNNING", reason="", partition="low", requeue=True, restarts=2,
        time_limit=60.0, start_time=local("2026-11-22T00:36:14"), end_time=local("2026-11-22T00:37:14"),
        preempt_time=None)
    assert (jobs["8"].reason, jobs["8"].start_time, jobs["8"].end_time) == ("BeginTime", None, None)


@pytest.mark.parametrize("name", ["plain", "seed 3", "lr=0.1 JobState=FAILED", "x UserId=eve", "", "Restarts=7"])
def test_free_text_fools_no_parser(name: str) -> None:
    """A job's name, comment and command may hold spaces and Slurm's own keys: the facts are the job's."""
    facts = slurm.parse_job(ARRAY.format(name=name, comment="a JobState=CANCELLED PreemptTime=2026-01-01T00:00:00"))
    assert facts is not None
    assert (facts.job, facts.raw, facts.name, facts.state, facts.restarts) == ("12_3", "15", name, "RUNNING", 2)
    assert (facts.requeue, facts.time_limit, facts.preempt_time) == (False, 93784.0, None)


@pytest.mark.parametrize("line", ["", "No jobs in the system", "JobId=", "slurm_load_jobs error: Invalid job id",
                                  "JobId=x JobName=y UserId=a(1) B=c"])
def test_what_is_no_job_is_none(line: str) -> None:
    """Errors and empty answers are no jobs."""
    assert slurm.parse_job(line) is None


@pytest.mark.parametrize(("text", "wanted"), [
    ("00:20:00", 1200), ("1-00:00:00", 86400), ("20:00", 1200), ("30 sec", 30), ("2 min", 120), ("0 min", 0),
    ("120", 120), ("UNLIMITED", None), ("INFINITE", None), ("Partition_Limit", None), ("N/A", None), ("", None)])
def test_lengths_of_time(text: str, wanted: float | None) -> None:
    """Slurm's ways to write a length of time; unlimited and unknown are None."""
    assert slurm.seconds(text) == wanted


@pytest.mark.parametrize("text", ["Unknown", "None", "N/A", "", "INVALID", "2026-13-01T00:00:00"])
def test_no_moment(text: str) -> None:
    """What is no time stamp is None."""
    assert slurm.moment(text) is None


@pytest.mark.parametrize(("text", "wanted"), [
    ("gpu:2", (2, ())), ("gpu:a100:4(S:0-1)", (4, ("a100",))), ("(null)", (0, ())), ("gpu", (1, ())),
    ("shard:16,gpu:1080:8", (8, ("1080",))), ("gpu:a100:4(S:0,1),gpu:h100:2(S:0)", (6, ("a100", "h100"))),
    ("", (0, ())), ("gpu:0", (0, ())), ("craynetwork:4", (0, ())), ("gpu:no_consume:4", (4, ()))])
def test_gpus_of_a_node(text: str, wanted: tuple[int, tuple[str, ...]]) -> None:
    """The number of GPUs and their types, of every way sites write them."""
    assert cluster.gpus(text) == wanted


def test_recorded_queue() -> None:
    """A recorded queue: living and finished jobs, names with bars in them, tasks of an array."""
    jobs = {job.job: job for job in slurm.parse_queue((RECORDED / "queue.txt").read_text())}
    assert len(jobs) == 14
    assert (jobs["8"].waiting, jobs["8"].living, jobs["8"].reason) == (True, True, "BeginTime")
    assert (jobs["9"].waiting, jobs["9"].living, jobs["9"].nodes) == (False, True, "n[1-2]")
    assert not jobs["3"].living
    (task,) = slurm.parse_queue("CLUSTER: lab\n12_3|15|RUNNING|gpu|2026-11-22T01:00:00|a[1-2]|None|my|odd|name\n")
    assert (task.job, task.raw, task.name) == ("12_3", "15", "my|odd|name")


def test_history() -> None:
    """sacct's states are plain words, whoever cancelled; steps and cut lines are left out."""
    text = ("12_3|15|CANCELLED by 1000|0:15|2026-11-22T01:00:00|None\n"
            "12.batch|12.batch|FAILED|1:0|2026-11-22T01:00:00|\n"
            "9|9|NODE_FAIL|1:0|Unknown|NodeDown\n8|8|RUN")
    assert [(job.job, job.raw, job.state, job.reason) for job in slurm.parse_history(text)] == [
        ("12_3", "15", "CANCELLED", ""), ("9", "9", "NODE_FAIL", "NodeDown")]


def test_recorded_config() -> None:
    """A recorded configuration: values with spaces, equal signs and brackets, both sections."""
    config = cluster.parse_config((RECORDED / "config.txt").read_text())
    assert config["KillWait"] == "5 sec"
    assert config["AuthInfo"].endswith(",cred_expire=5")
    assert config["SlurmctldHost[0]"] == "head(10.0.0.1)"
    assert (config["PowerPlugin"], config["CgroupPlugin"], config["SLURM_VERSION"]) == ("", "cgroup/v1", "22.05.8")


# --- asking -----------------------------------------------------------------------------------------------------


def test_no_slurm_no_answer(commands: Path) -> None:
    """Without Slurm's commands every answer is None, and nothing raises."""
    assert slurm.job_facts("1") is slurm.queue(["1"]) is slurm.history(["1"]) is None
    assert cluster.config() is cluster.partitions() is None
    assert slurm.queue([]) == slurm.history([]) == []


def test_partitions_with_their_nodes(commands: Path) -> None:
    """Partitions come with limits, preemption and nodes; without sinfo with everything but the nodes."""
    put(commands, "scontrol", f'[ "$2" = partition ] && {say("partitions.txt")}')
    low, high = cluster.partitions() or []
    assert (low.name, low.default, low.grace, low.preempt_mode, low.max_time, low.tier) == (
        "low", True, 20.0, "REQUEUE", 86400.0, 1)
    assert (high.default, high.preempt_mode, high.max_nodes, high.nodes) == (False, "OFF", None, ())
    put(commands, "sinfo", say("nodes.txt"))
    low, high = cluster.partitions() or []
    assert low.nodes == (cluster.Nodes(2, 8, 8000, 2, (), "mixed"), cluster.Nodes(2, 8, 8000, 2, (), "idle"))


def test_accounting_switched_off(commands: Path) -> None:
    """sacct without accounting exits 1: the past is unknown, not empty."""
    put(commands, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert slurm.history(["1"]) is None


def test_unknown_job_is_not_an_unreachable_slurm(commands: Path) -> None:
    """squeue's complaint of an invalid job id means that it knows none of them; any other failure means nothing."""
    put(commands, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.queue(["999"]) == []
    put(commands, "squeue", "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1")
    assert slurm.queue(["999"]) is None


def test_slow_or_broken_commands(commands: Path) -> None:
    """A command that hangs is given up in time; one that can't be executed, or prints rubbish, gives nothing."""
    put(commands, "scontrol", "(while :; do :; done) & wait")  # as a site's wrapper: its child holds the pipe
    began = time.monotonic()
    assert cluster.config(timeout=0.3) is None
    assert time.monotonic() - began < 5
    (commands / "scontrol").write_bytes(b"\x00\x01")
    assert cluster.config() is None
    put(commands, "scontrol", "printf '\\xff\\xfe = rubbish\\n'")
    assert cluster.config() is slurm.job_facts("1") is None
    assert cluster.partitions() == []


def test_users_format_variables_change_nothing(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQUEUE_STATES, SLURM_TIME_FORMAT and the like would change what is parsed: the commands don't see them."""
    monkeypatch.setenv("SQUEUE_STATES", "FAILED")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    put(commands, "squeue", 'echo "1|1|RUNNING|${SQUEUE_STATES-none}|x|$SLURM_CONF|$SLURM_TIME_FORMAT|n"')
    (job,) = slurm.queue(["1"]) or []
    assert (job.partition, job.nodes, job.reason) == ("none", "/etc/slurm.conf", "standard")


def test_job_of_an_array(commands: Path) -> None:
    """Of an array's tasks the one that is asked for is told, by its own number or by the array's."""
    lines = "\n".join(ARRAY.format(name=f"t{task}", comment="").replace("JobId=15", f"JobId={14 + task}", 1)
                      .replace("ArrayTaskId=3", f"ArrayTaskId={task}") for task in (1, 2, 3))
    put(commands, "scontrol", f"echo '{lines}'")
    assert [(facts.name if (facts := slurm.job_facts(job)) else None) for job in ("12_2", "17")] == ["t2", "t3"]
