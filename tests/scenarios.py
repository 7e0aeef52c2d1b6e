"""What a cluster does to a run, one function each: real Slurm, real DDP, 2 nodes x 2 ranks, real signals.

Every scenario submits as a user does, disturbs the run, and demands of it: final weights bit-equal to those of a run
that nothing disturbed on the same shape, nothing of the job left on any node, and a log and attempts.jsonl that tell
what happened. The returned times are for docs/slurm.md.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import harness
import twins
from alexnet_ddp.checkpoint import store
from alexnet_ddp.runfiles import read_attempts
from cluster import GLANCE, Cluster, Job, slurm, submit_script

PROGRAM = Path(sys.executable).parent / "alexnet-ddp"
ROOT = Path(__file__).parents[1]
# Sixty steps of some milliseconds, evaluated half-way and at the end.
CHANGES: dict[str, Any] = {"epochs": 12, "evaluate__epochs": 6, "checkpoint__epochs": None, "checkpoint__steps": 10}
SEED = 3  # tiny_recipe's
# What is to be met by a signal goes slowly at first. A fault is no part of the experiment: it moves no bit.
SLOW = ("fault.kind=slow", "fault.rank=-1", "fault.seconds=0.15", "fault.times=30")
MEET = 15  # the step at which a slow run is met


@dataclass(frozen=True)
class Times:
    """Seconds after the disturbance at which the job was first seen so; None: not seen, or not asked."""

    requeued: float | None = None  # Slurm counts one restart more
    pending: float | None = None
    running: float | None = None
    first_step: float | None = None  # a step that the run hadn't taken before its last checkpoint


# --- runs -----------------------------------------------------------------------------------------------------------


class Bench(twins.Bench):
    """Pictures, a recipe, and the undisturbed run, which goes through the cluster like all the others."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, world=4, changes=CHANGES)
        self.undisturbed: Future[Run] = Future()

    @property
    def twin(self) -> Run:  # type: ignore[override]
        return self.undisturbed.result(timeout=300)


@dataclass
class Lane:
    """Two nodes that one scenario at a time has for itself."""

    cluster: Cluster
    bench: Bench
    nodes: tuple[str, str]
    jobs: list[Job] = field(default_factory=list)  # that were submitted to it

    @property
    def list(self) -> str:
        return ",".join(self.nodes)

    def run(self, name: str, *, torchrun: bool = False) -> Run:
        return Run(self, f"torchrun_{name}" if torchrun else name, torchrun=torchrun)

    def clear(self) -> None:
        """Ends what a failed scenario left: the next one has the lane for itself."""
        for job in self.jobs:
            job.cancel()
        for node in self.nodes:
            self.cluster.start(node)
        for job in self.jobs:
            job.wait_until_over(timeout=60)
            job.wait_until_gone()

    def job(self, number: str) -> Job:
        self.jobs.append(Job(number))
        return self.jobs[-1]

    def preempt(self, *, seconds: int = 3) -> tuple[Job, float]:
        """A job of a higher partition that wants all of this lane; when it was submitted."""
        sent = time.time()
        job = submit_script("-p", "high", "-N2", "-w", self.list, "--exclusive", "-o", "/dev/null",
                            "--wrap", f"sleep {seconds}")
        return self.job(job), sent


class Run(twins.Run):
    """A run directory on a lane, and the jobs that train it: submitted, or with torchrun from slurm/torchrun.sbatch."""

    def __init__(self, lane: Lane, name: str, *, torchrun: bool) -> None:
        super().__init__(lane.bench.recipe, name=name, world=4)
        self.lane, self.torchrun = lane, torchrun

    def submit(self, *words: str, nodes: int = 2, time: str = "20", where: str = "") -> Job:
        """`alexnet-ddp submit`, as a user types it, or `sbatch` of the script for torchrun."""
        if self.torchrun:
            return self._sbatch(*words, time=time)
        said = command("submit", str(self.recipe), f"name={self.name}", *words, "--nodes", str(nodes),
                       "--gpus-per-node", "2", "--time", time, "-w", where or self.lane.list)
        return self.lane.job(job_told(said))

    def _sbatch(self, *words: str, time: str) -> Job:
        text = (ROOT / "slurm" / "torchrun.sbatch").read_text()
        edits = {"CONFIG": shlex.quote(str(self.recipe)), "PYTHON": sys.executable,
                 "OVERRIDES": f"({shlex.join([f'name={self.name}', *words])})"}
        for name, value in edits.items():  # what the script asks its user to edit
            text, edited = re.subn(rf"^{name}=.*$", lambda _, new=f"{name}={value}": new, text, flags=re.MULTILINE)
            assert edited == 1, name
        script = self.recipe.parent / f"{self.name}.sbatch"
        script.write_text(text)
        (self.path / "slurm").mkdir(parents=True, exist_ok=True)
        lead = 15 if time == "1" else 120
        log = self.path / "slurm" / "%j_0_log.out"
        return self.lane.job(submit_script("--gpus-per-node=2", "--cpus-per-task=2", f"--time={time}", "-o", str(log),
                                           f"--signal=USR2@{lead}", "-w", self.lane.list, str(script)))

    def log(self, job: Job) -> str:
        path = self.path / "slurm" / f"{job.id}_0_log.out"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def step(self) -> int:
        """Steps that rank 0 has begun by now, in any attempt."""
        path = self.path / "trace" / "rank_0.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"]) + 1
            except ValueError:  # it is being written just now
                continue
        return 0

    def wait_for_step(self, step: int, job: Job, *, timeout: float = 150.0) -> None:
        self._wait(lambda: self.step >= step, job, timeout, f"step {step}")

    def wait_for_log(self, text: str, job: Job, *, timeout: float = 150.0) -> None:
        self._wait(lambda: text in self.log(job), job, timeout, f"'{text}' in the log")

    def _wait(self, there: Callable[[], bool], job: Job, timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not there():
            assert time.monotonic() < deadline, f"no {what} within {timeout:.0f} s: {job.moments}\n{self.log(job)}"
            time.sleep(GLANCE / 4)

    def recovery(self, job: Job, *, since: float, start: int = 1, log_of: Job | None = None) -> Times:
        """Waits until the job's start number `start` takes a new step."""
        requeued = job.wait_for("COMPLETING", "PENDING", "RUNNING", restarts=start, timeout=90)
        running = job.wait_for("RUNNING", restarts=start, timeout=90)
        told = re.compile(rf"start {start} on .*?(?:goes on at step (\d+) of|global batch)", re.DOTALL)
        self._wait(lambda: bool(told.search(self.log(job))), job, 90, f"start {start}")
        found = told.search(self.log(job))
        assert found
        self.wait_for_step(int(found[1] or 0) + 1, job)
        now = time.time()
        pending = job.first("PENDING", restarts=start)
        return Times(requeued - since, pending and pending - since, running - since, now - since)

    def finish(self, job: Job, *causes: str | None | Sequence[str], equal: bool = True, earlier: int = 0) -> None:
        """Waits for the job's end, and asserts all that must be so then.

        Args:
            causes: of the job's attempts in order, a choice of several where more than one word is true; None for one
                that was cut off without a word.
            equal: the weights are those of the undisturbed run, to the bit.
            earlier: entries of attempts.jsonl that belong to jobs before this one.
        """
        last = job.wait_until_over()
        job.wait_until_gone()
        assert last == "COMPLETED", f"{last}:\n{self.log(job)}"
        self.check_story(job, *causes, earlier=earlier)
        assert self.state["requeue"]["decision"] == "stop"
        if equal:
            assert self.state["exact"] is True
            self.lane.bench.check_equal(self)

    def check_story(self, job: Job, *causes: str | None | Sequence[str], earlier: int = 0) -> None:
        """Asserts that attempts.jsonl and the log tell of these attempts, in this order, and of no others."""
        log = self.log(job)
        told = [record for record in read_attempts(self.path)[earlier:] if record["event"] in ("begin", "end")]
        expected = [event for cause in causes for event in (["begin"] if cause is None else ["begin", "end"])]
        assert [record["event"] for record in told] == expected, (told, log)
        assert {record["job"] for record in told} == {job.raw}
        assert [record["restart"] for record in told if record["event"] == "begin"] == list(range(len(causes)))
        ends = {record["restart"]: record for record in told if record["event"] == "end"}
        for start, cause in enumerate(causes):
            assert f"job {job.id} start {start} on " in log
            if cause is not None:
                wanted = [cause] if isinstance(cause, str) else list(cause)
                assert ends[start]["cause"] in wanted, (start, ends[start], log)
                assert f"job {job.id} start {start} ended at step {ends[start]['step']}: {ends[start]['cause']}" in log
        assert log.rstrip().splitlines()[-1].startswith(f"alexnet-ddp: job {job.id} start {len(causes) - 1} ended")
        assert "\r" not in log and "Traceback" not in log, log


def command(*words: str, code: int = 0) -> str:
    """`alexnet-ddp WORDS`, given in a folder that isn't the checkout; what it prints."""
    done = subprocess.run([PROGRAM, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=60, cwd=tempfile.gettempdir())
    assert done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def job_told(said: str) -> str:
    found = re.search(r"\bjobs? (\d+)", said)
    assert found, said
    return found[1]


# --- 1-4: warnings, limits, preemption ------------------------------------------------------------------------------


def undisturbed(lane: Lane) -> Times:
    """Nothing happens: submitted, trained, finished. The others are compared with this one."""
    run = lane.run("twin")
    sent = time.time()
    job = run.submit()
    running = job.wait_for("RUNNING")
    run.wait_for_step(1, job)
    first_step = time.time() - sent
    last = job.wait_until_over()
    job.wait_until_gone()
    assert last == "COMPLETED", run.log(job)
    run.check_tidy()
    lane.bench.undisturbed.set_result(run)
    run.check_story(job, "finished")
    return Times(running=running - sent, first_step=first_step)


def user_signal(lane: Lane) -> Times:
    """`scancel --signal=USR2`: saved, requeued, finished; `status` knows where the run stands at each moment."""
    return _user_signal(lane.run("user_signal"))


def _user_signal(run: Run) -> Times:
    job = run.submit(*SLOW)
    run.wait_for_step(MEET, job)
    assert told_by_status(run)["state"] == "running"
    sent = job.signal("USR2")
    job.wait_for("PENDING", restarts=1)
    between = told_by_status(run)
    times = run.recovery(job, since=sent)
    assert between["state"] == "requeued", between
    run.finish(job, "warned", "finished")
    assert told_by_status(run)["state"] == "finished"
    return times


def told_by_status(run: Run) -> dict[str, Any]:
    told: list[dict[str, Any]] = json.loads(command("status", str(run.path), "--json"))
    return told[0]


def walltime(lane: Lane) -> Times:
    """A limit of one minute on a run that needs longer: warned, saved, requeued; then the limit is raised."""
    return _walltime(lane.run("walltime"), limits=1)


def walltime_again_and_again(lane: Lane) -> Times:
    """The same several times over: time limits are no failures, and come without end as long as there is progress."""
    return _walltime(lane.run("walltime_again_and_again"), limits=4)


def _walltime(run: Run, *, limits: int) -> Times:
    # Slurm looks every half-minute, and warns when less than 45 s are left: 15 to 45 s after the start.
    slow = ["fault.seconds=1.5", "fault.times=28"] if limits == 1 else ["fault.seconds=3", "fault.times=60"]
    job = run.submit("fault.kind=slow", "fault.rank=-1", *slow, time="1")
    times = Times()
    for start in range(limits):
        run.wait_for_log(f"start {start} ended", job, timeout=150)
        left = time.time()
        if start == limits - 1:
            job.wait_for("PENDING", restarts=limits)
            job.limit(20)
        times = run.recovery(job, since=left, start=start + 1)
    job.wait_until_over(timeout=300)  # many slow steps may be left
    run.finish(job, *["walltime"] * limits, "finished")
    return times


def preempted_with_user_signal(lane: Lane) -> Times:
    """A higher partition takes the nodes, Slurm sends the job's own signal first (preempt_send_user_signal)."""
    with lane.cluster.configured(user_signal=True):
        return _preempted(lane.run("preempted_with_user_signal"), why="USR2")


def preempted_with_term(lane: Lane) -> Times:
    """A higher partition takes the nodes, and all the ranks ever hear is TERM: saved all the same."""
    with lane.cluster.configured(user_signal=False):
        return _preempted(lane.run("preempted_with_term"), why="TERM")


def _preempted(run: Run, *, why: str) -> Times:
    job = run.submit(*SLOW)
    run.wait_for_step(MEET, job)
    high, sent = run.lane.preempt()
    times = run.recovery(job, since=sent)
    high.wait_until_over()
    first = next(record for record in read_attempts(run.path) if record["event"] == "end")
    assert first["step"] >= MEET, "what was trained since the last checkpoint was lost"
    assert why in first["why"], first
    run.finish(job, "preempted", "finished")
    return times


# --- 5-8: lost nodes, hands, lost ranks, arrays ---------------------------------------------------------------------


def power_off(lane: Lane) -> Times:
    """A node loses its power: everything on it is gone at once, and the job comes back when there are nodes for it."""
    return _power_off(lane.run("power_off"), lane.nodes[1], ("ended by Slurm", "dead rank", "network"))


def power_off_of_the_head(lane: Lane) -> Times:
    """The node with the batch shell loses its power: nobody of ours is left to decide, Slurm itself brings it back."""
    return _power_off(lane.run("power_off_of_the_head"), lane.nodes[0], None)


def _power_off(run: Run, node: str, cause: Sequence[str] | None) -> Times:
    cluster = run.lane.cluster
    job = run.submit(*SLOW)
    run.wait_for_step(MEET, job)
    with cluster.configured():
        sent = time.time()
        cluster.power_off(node)
        job.wait_for("COMPLETING", "PENDING", restarts=1)
        cluster.wait_for_node(node, "down")
        cluster.start(node)
    times = run.recovery(job, since=sent)
    run.finish(job, cause, "finished")
    return times


def requeued_by_hand(lane: Lane) -> Times:
    """`scontrol requeue`: TERM comes, the run is saved, and Slurm starts the job again; we don't ask a second time."""
    run = lane.run("requeued_by_hand")
    job = run.submit(*SLOW)
    run.wait_for_step(MEET, job)
    sent = time.time()
    slurm("scontrol", "requeue", job.id)
    times = run.recovery(job, since=sent)
    first = next(record for record in read_attempts(run.path) if record["event"] == "end")
    assert first["step"] >= MEET and first["decision"] == "slurm", first
    run.finish(job, "ended by Slurm", "finished")
    return times


def rank_killed(lane: Lane) -> Times:
    """One rank is killed with -9 (as the kernel does when memory runs out): named, and the job comes back."""
    run = lane.run("rank_killed")
    job = run.submit(*SLOW)
    run.wait_for_step(MEET, job)
    victim = job.ranks()[3]
    sent = time.time()
    os.kill(victim, signal.SIGKILL)
    times = run.recovery(job, since=sent)
    first = next(record for record in read_attempts(run.path) if record["event"] == "end")
    where = {lane.nodes[1], socket.gethostname()}  # the machine's, where nodes can't have names of their own
    assert any(f"rank 3 on {host} " in first["why"] for host in where), first
    run.finish(job, "dead rank", "finished")
    return times


def one_array_task(lane: Lane) -> Times:
    """Of an array over seeds one task is signalled: it alone comes back, under its own number."""
    said = command("submit", str(lane.bench.recipe), "name=array", *SLOW, "--nodes", "2", "--tasks-per-node", "2",
                   "--time", "20", "-w", lane.list, "--seeds", f"{SEED}-{SEED + 1}")
    number = job_told(said)
    runs = [lane.run(f"array-seed{seed}") for seed in (SEED, SEED + 1)]
    jobs = [lane.job(f"{number}_{index}") for index in range(2)]
    runs[0].wait_for_step(MEET, jobs[0])
    sent = jobs[0].signal("USR2")
    times = runs[0].recovery(jobs[0], since=sent)
    runs[0].finish(jobs[0], "warned", "finished")
    runs[1].finish(jobs[1], "finished", equal=False)
    assert (jobs[0].restarts, jobs[1].restarts) == (1, 0)
    return times


# --- 9-12: bad moments, ends that are ends --------------------------------------------------------------------------


def signal_during_imports(lane: Lane) -> Times:
    """USR2 while the ranks are still importing torch, at the first start and at the second: heard, not fatal."""
    run = lane.run("signal_during_imports")
    job = run.submit()
    times = Times()
    for start, late in enumerate((0.0, 1.5)):
        job.wait_for("RUNNING", restarts=start)
        job.wait_for_ranks(4)
        time.sleep(late)
        before = run.step
        sent = job.signal("USR2")
        assert f"start {start} on" in run.log(job) and run.step == before, "the imports were over"
        times = run.recovery(job, since=sent, start=start + 1) if start else times
        run.wait_for_log(f"start {start} ended", job)
        job.wait_for("PENDING", restarts=start + 1)
    run.finish(job, "warned", "warned", "finished")
    return times


def signal_during_a_save(lane: Lane) -> Times:
    """USR2 while a checkpoint is being written: that one is whole, the run leaves after it."""
    run = lane.run("signal_during_a_save")
    job = run.submit("fault.kind=slow", "fault.at=save", "fault.step=20", "fault.seconds=5")
    run.wait_for_step(21, job)
    sent = job.signal("USR2")
    assert not (run.path / "checkpoints" / store.directory_name(20)).exists(), "the save was over"
    times = run.recovery(job, since=sent)
    run.check_whole()
    run.finish(job, "warned", "finished")
    return times


def signal_during_evaluation(lane: Lane) -> Times:
    """USR2 within an evaluation: left there, and evaluated after the resume."""
    run = lane.run("signal_during_evaluation")
    job = run.submit("fault.kind=slow", "fault.at=evaluate", "fault.step=30", "fault.rank=-1", "fault.seconds=2")
    run.wait_for_step(30, job)
    time.sleep(1.5)
    sent = job.signal("USR2")
    times = run.recovery(job, since=sent)
    first = next(record for record in read_attempts(run.path) if record["event"] == "end")
    assert first["step"] == 30, first
    run.finish(job, "warned", "finished")
    return times


def signal_while_a_rank_is_late(lane: Lane) -> Times:
    """USR2 while one rank stands still for 20 s (SIGSTOP): the others wait for it, and all leave at one step."""
    run = lane.run("signal_while_a_rank_is_late")
    job = run.submit(*SLOW)
    run.wait_for_step(MEET, job)
    late = job.ranks()[2]
    os.kill(late, signal.SIGSTOP)
    time.sleep(2)
    sent = job.signal("USR2")
    time.sleep(18)
    os.kill(late, signal.SIGCONT)
    times = run.recovery(job, since=sent)
    run.finish(job, "warned", "finished")
    return times


def cancelled(lane: Lane) -> Times:
    """`scancel`: saved, ended, not requeued; the same command later goes on."""
    run = lane.run("cancelled")
    job = run.submit(*SLOW)
    run.wait_for_step(MEET, job)
    job.cancel()
    assert job.wait_until_over() == "CANCELLED"
    job.wait_until_gone()
    run.check_story(job, "stopped")
    told = read_attempts(run.path)
    assert told[-1]["decision"] == "stop" and told[-1]["step"] >= MEET
    assert job.restarts == 0 and run.state["status"] == "preempted"
    again = run.submit()
    run.finish(again, "finished", earlier=len(told))
    return Times()


def bug(lane: Lane) -> Times:
    """A bug in the run: it fails once, is named last in the log, and isn't requeued; mended, it goes on."""
    run = lane.run("bug")
    job = run.submit("fault.kind=error", f"fault.step={MEET}", "fault.rank=1")
    assert job.wait_until_over() == "FAILED"
    job.wait_until_gone()
    run.check_story(job, "bug")
    told = read_attempts(run.path)
    assert told[-1]["decision"] == "stop" and job.restarts == 0
    assert "rank 1" in told[-1]["why"] and "this error was asked for" in told[-1]["why"]
    again = run.submit("--accept-changes")
    run.finish(again, "finished", earlier=len(told))
    return Times()


# --- 13-16: torchrun, other shapes, containers, standstill ----------------------------------------------------------


def torchrun_user_signal(lane: Lane) -> Times:
    """torchrun on each node: USR2 reaches the ranks, the agents survive it, and nothing is left of any of them."""
    return _user_signal(lane.run("user_signal", torchrun=True))


def torchrun_walltime(lane: Lane) -> Times:
    """The same with a time limit."""
    return _walltime(lane.run("walltime", torchrun=True), limits=1)


def torchrun_preempted(lane: Lane) -> Times:
    """The same, preempted."""
    with lane.cluster.configured(user_signal=True):
        return _preempted(lane.run("preempted", torchrun=True), why="USR2")


def fewer_nodes(lane: Lane) -> Times:
    """Begun on two nodes, ended on one: the same samples and crops, not the same bits, and the run says so."""
    run = lane.run("fewer_nodes")
    job = run.submit(*SLOW)
    run.wait_for_step(MEET, job)
    job.cancel()
    job.wait_until_over()
    earlier = len(read_attempts(run.path))
    again = run.submit(nodes=1, where=lane.nodes[0])
    run.finish(again, "finished", earlier=earlier, equal=False)
    twin = lane.bench.twin
    assert samples(run) == samples(twin)
    assert run.state["exact"] is not True and run.state["step"] == twin.state["step"]
    return Times()


def samples(run: Run) -> dict[int, list[Any]]:
    """step -> all (sample, view, flip) of its global batch, sorted: the ranks may share them out in any way."""
    return {step: sorted(batch) for step, batch in harness.trace(run.path).items()}


def task_without_scontrol(lane: Lane) -> Times:
    """The tasks run in a container of sorts, without Slurm's commands on their PATH: requeued all the same."""
    run = lane.run("task_without_scontrol")
    folder = run.recipe.parent
    inside = folder / "inside-python"
    inside.write_text(f'#!/bin/sh\nexport PATH=/nowhere\nexec {sys.executable} "$@"\n')
    inside.chmod(0o755)
    profile = folder / "container.yaml"
    profile.write_text(yaml.safe_dump({"python": str(inside)}))
    job = run.submit(*SLOW, "--profile", str(profile))
    run.wait_for_step(MEET, job)
    ranks = job.ranks()
    assert len(ranks) == 4
    assert all(b"PATH=/nowhere" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in ranks.values())
    sent = job.signal("USR2")
    times = run.recovery(job, since=sent)
    run.finish(job, "warned", "finished")
    return times


def no_progress(lane: Lane) -> Times:
    """Three attempts in a row that bring no new step: it stops and says why; later the same command goes on."""
    run = lane.run("no_progress")
    job = run.submit("fault.kind=kill", "fault.step=5", "fault.rank=1")  # and the first checkpoint is that of step 10
    assert job.wait_until_over(timeout=300) == "FAILED"
    job.wait_until_gone()
    run.check_story(job, "dead rank", "dead rank", "dead rank")
    told = read_attempts(run.path)
    assert told[-1]["decision"] == "stop" and "3 attempts in a row brought no new step" in told[-1]["reason"], told[-1]
    again = run.submit()
    run.finish(again, "finished", earlier=len(told))
    return Times()


def slurms_own_floor(lane: Lane) -> Times:
    """An empty job on the same nodes, requeued with scontrol: what Slurm itself needs."""
    job = lane.job(submit_script("-N2", "-w", lane.list, "--requeue", "-o", "/dev/null", "--wrap", "sleep 600"))
    job.wait_for("RUNNING")
    time.sleep(3)
    sent = time.time()
    slurm("scontrol", "requeue", job.id)
    running = job.wait_for("RUNNING", restarts=1)
    requeued = job.wait_for("COMPLETING", "PENDING", restarts=1)
    pending = job.first("PENDING", restarts=1)
    job.cancel()
    job.wait_until_over()
    return Times(requeued - sent, pending and pending - sent, running - sent)


Scenario = Callable[[Lane], Times]
# The long ones first, so that the lanes end together.
QUICK: list[Scenario] = [walltime, power_off, preempted_with_term, user_signal, rank_killed, signal_during_imports,
                         cancelled, bug]
ALL: list[Scenario] = [
    walltime_again_and_again, power_off, power_off_of_the_head, preempted_with_user_signal, preempted_with_term,
    user_signal, requeued_by_hand, rank_killed, one_array_task, signal_during_imports, signal_during_a_save,
    signal_during_evaluation, signal_while_a_rank_is_late, cancelled, bug, fewer_nodes, task_without_scontrol,
    no_progress, torchrun_user_signal, torchrun_walltime, torchrun_preempted]
