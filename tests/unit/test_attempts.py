"""The batch shell around srun: what it opens, keeps alive, blocks, decides and asks of a Slurm of small scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import harness
from alexnet_ddp import config as recipes
from alexnet_ddp.runfiles import Job, add_attempt, read_attempts, read_state, replace_state
from launch import attempts, batch, slurm, snapshot
from launch.requeue import Cause

# What `scontrol show job -o` prints, as far as it is read. Its day must not come: what has ended is judged otherwise.
FACTS = ("JobId=12 JobName=run UserId=me(0) GroupId=me(0) JobState={state} Reason=None Requeue=1 Restarts={restarts} "
         "RunTime=00:10:00 TimeLimit=04:00:00 StartTime=2099-11-22T00:00:00 EndTime=2099-11-22T04:00:00 "
         "PreemptEligibleTime=2099-11-22T00:00:00 PreemptTime={preempt} Partition=low NodeList=n[1-2]")


class Box:
    """A run directory with a snapshot, and a `scontrol` that answers what it is told to and remembers the rest."""

    def __init__(self, folder: Path) -> None:
        recipe = harness.tiny_recipe(folder, train=folder / "train", val=folder / "val")
        self.config = recipes.load(recipe, [])
        self.snapshot = snapshot.load(snapshot.freeze(self.config, cwd=folder, command="submit", lead=60, caps={}))
        self.run_dir = self.snapshot.run_dir
        self.bin, self.calls = folder / "bin", folder / "calls"
        self.bin.mkdir()
        self.calls.write_text("")
        self.slurm()

    def slurm(self, *, state: str = "RUNNING", restarts: int = 0, preempt: str = "None", refuse: str = "") -> None:
        """What scontrol says from now on."""
        facts = FACTS.format(state=state, restarts=restarts, preempt=preempt)
        script = self.bin / "scontrol"
        script.write_text(f'#!/bin/sh\necho "$@" >> {self.calls}\n[ "$1" = show ] && echo "{facts}" && exit 0\n'
                          + (f'echo "{refuse}" >&2; exit 1\n' if refuse else "exit 0\n"))
        script.chmod(0o755)

    @property
    def requeued(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.startswith("requeue")]

    def state(self, status: str, *, restart: int = 0, job: str = "12", **facts: Any) -> None:
        replace_state(self.run_dir, {"status": status, "job": job, "restart": restart, "total_steps": 40, **facts})

    def checkpoint(self, step: int) -> None:
        place = self.run_dir / "checkpoints" / f"step_{step:08d}"
        place.mkdir(parents=True)
        (place / "manifest.json").write_text("{}")

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.bin}:{Path(sys.executable).parent}:/usr/bin:/bin"
        return {"PATH": path, "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "HOME": "/nowhere", **more}

    def script(self, body: str) -> str:
        lines = [*batch.before([self.snapshot.path], python=sys.executable), body, "", *batch.after()]
        return "\n".join(lines)

    def shell(self, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the batch shell with `body` in the place of srun."""
        return subprocess.run(["bash", "-c", self.script(body)], env=self.environment(**environment), text=True,
                              capture_output=True, timeout=60, check=False)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_header_and_end_time(box: Box) -> None:
    """The shell writes a header, enters the attempt, and tells the ranks when the job ends."""
    box.checkpoint(8)
    box.state("preempted", why="USR2", restart=0)
    done = box.shell('echo "end $SLURM_JOB_END_TIME code $PYTHONPATH"; exit 3', SLURM_RESTART_COUNT="1",
                     PYTHONPATH="/mine", TZ="UTC")
    assert f"end 4099003200 code {box.snapshot.path}:/mine" in done.stdout
    assert f"=== {box.run_dir}: job 12 start 1 on n[1-2], " in done.stderr
    assert ", from step 8 of 40" in done.stderr
    begun = read_attempts(box.run_dir)[0]
    assert (begun["event"], begun["job"], begun["restart"], begun["step"], begun["nodes"]) == (
        "begin", "12", 1, 8, "n[1-2]")


@pytest.mark.parametrize("code", [0, 137])
def test_exit_code_is_sruns(box: Box, code: int) -> None:
    """Whatever is decided, the batch shell leaves with srun's exit code."""
    assert box.shell(f"(exit {code})").returncode == code


def test_exit_code_although_the_decision_breaks(box: Box) -> None:
    """Even when the decision itself can't be made the exit code is srun's."""
    done = box.shell(f"rm {box.snapshot.path}/snapshot.json; (exit 7)")
    assert done.returncode == 7
    assert "Traceback" not in done.stderr


def test_signals_are_blocked_for_the_ranks(box: Box) -> None:
    """The ranks begin with the five stop signals blocked, by env or, where coreutils are old, by our own shim."""
    body = '$BLOCK "$PYTHON" -P -c "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"'
    wanted = str(sorted([signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]))
    assert wanted in box.shell(body).stdout
    old = box.bin / "env"
    old.write_text("#!/bin/sh\necho \"env: unrecognized option '$1'\" >&2; exit 125\n")
    old.chmod(0o755)
    done = box.shell('echo "by $BLOCK"; ' + body)
    assert wanted in done.stdout
    assert "-m launch.block" in done.stdout


def test_shell_outlives_a_strict_setup(box: Box) -> None:
    """A setup, or a file that it sources, makes the shell leave at the first error: it decides all the same."""
    script = "set -euo pipefail\n" + box.script(rank(box, "preempted", why="USR2") + "\n(exit 75)")
    done = subprocess.run(["bash", "-c", script], env=box.environment(), text=True, capture_output=True, timeout=60,
                          check=False)
    assert (done.returncode, box.requeued) == (75, ["requeue 12"]), done.stderr


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM", "HUP"])
def test_shell_outlives_signals(box: Box, name: str) -> None:
    """A signal that reaches the batch shell as well doesn't end it before it has decided."""
    shell = subprocess.Popen(["bash", "-c", box.script("touch started; sleep 1; (exit 75)")], text=True,
                             env=box.environment(), cwd=box.snapshot.cwd, stderr=subprocess.PIPE)
    while not (box.snapshot.cwd / "started").exists():
        time.sleep(0.02)
    shell.send_signal(getattr(signal, f"SIG{name}"))
    _, errors = shell.communicate(timeout=30)
    assert shell.returncode == 75
    assert read_attempts(box.run_dir)[-1]["event"] == "end", errors


def rank(box: Box, status: str, **facts: Any) -> str:
    """Shell words that write state.json as the ranks of this start would, with progress."""
    told = json.dumps({"status": status, "job": "12", "restart": 0, "total_steps": 40, **facts})
    step = box.run_dir / "checkpoints" / "step_00000016"
    return f"mkdir -p {step} && echo '{{}}' > {step}/manifest.json && echo '{told}' > {box.run_dir}/state.json"


def test_requeue_after_a_warning(box: Box) -> None:
    """USR2, saved, 75: Slurm is asked to requeue; state.json, history and the log's last line say so."""
    done = box.shell(rank(box, "preempted", why="USR2") + "; (exit 75)")
    assert box.requeued == ["requeue 12"]
    state = read_state(box.run_dir)
    assert (state["status"], state["requeue"]["decision"]) == ("preempted", "requeue")
    assert state["requeue"]["cause"] in ("warned", "walltime")
    end = read_attempts(box.run_dir)[-1]
    assert (end["event"], end["step"], end["decision"], end["exit_code"]) == ("end", 16, "requeue", 75)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("alexnet-ddp: job 12 start 0 ended at step 16: ")
    assert last.endswith("Requeued: " + end["reason"] + ".")
    assert "16 new steps saved" in last


def test_requeue_of_one_array_task(box: Box) -> None:
    """A task of an array is requeued by its own name, the others are left alone."""
    done = subprocess.run(
        ["bash", "-c", "\n".join([*batch.before([Path("/none"), box.snapshot.path], python=sys.executable),
                                  rank(box, "preempted", why="USR2", array="11_1") + "; (exit 75)", *batch.after()])],
        env=box.environment(SLURM_ARRAY_JOB_ID="11", SLURM_ARRAY_TASK_ID="1"), text=True, capture_output=True,
        timeout=60, check=False)
    assert box.requeued == ["requeue 11_1"]
    assert "job 11_1 start 0" in done.stderr


def test_preempted_without_a_user_signal(box: Box) -> None:
    """TERM in a preemption's grace: requeued by us, because a batch script that ends by itself is not by Slurm."""
    box.slurm(preempt="2099-11-22T00:05:00")
    box.shell(rank(box, "preempted", why="TERM") + "; (exit 75)")
    assert box.requeued == ["requeue 12"]
    assert read_state(box.run_dir)["requeue"]["cause"] == "preempted"


@pytest.mark.parametrize(("slurm", "cause"), [
    ({"state": "COMPLETING"}, "stopped"), ({"state": "COMPLETING", "restarts": 1}, "ended by Slurm"), ({}, "stopped")])
def test_term_that_is_no_preemption(box: Box, slurm: dict[str, Any], cause: str) -> None:
    """Cancelled, requeued by hand, or TERM by hand: nothing is asked of Slurm."""
    box.slurm(**slurm)
    done = box.shell(rank(box, "preempted", why="TERM") + "; (exit 75)", TZ="UTC")
    assert box.requeued == []
    assert read_state(box.run_dir)["requeue"]["cause"] == cause, done.stderr


def test_stale_state_is_not_believed(box: Box) -> None:
    """What an earlier start wrote says nothing of this one: refused with 2, it is not requeued."""
    box.state("preempted", why="USR2", restart=0)
    box.shell("(exit 2)", SLURM_RESTART_COUNT="1")
    assert box.requeued == []
    state = read_state(box.run_dir)
    assert (state["status"], state["restart"], state["requeue"]["cause"]) == ("failed", 1, "user error")


def test_ranks_killed_without_a_word(box: Box) -> None:
    """Killed while state.json says running: it says failed afterwards, and the job is requeued."""
    box.shell(rank(box, "running") + "; (exit 137)")
    assert box.requeued == ["requeue 12"]
    state = read_state(box.run_dir)
    assert (state["status"], state["requeue"]["cause"]) == ("failed", "dead rank")


def test_another_rank_has_told_why(box: Box) -> None:
    """Rank 0 was killed and state.json says running: what another rank wrote of it decides, if it is this start's."""
    report = {"rank": 0, "host": "n1", "step": 18, "cause": "its process is gone", "kind": "dead"}
    errors = box.run_dir / "errors"
    write = f"mkdir -p {errors}; echo '{json.dumps(report)}' > {errors}/rank_0.json"
    done = box.shell(rank(box, "running") + f"; {write}; (exit 1)")
    assert box.requeued == ["requeue 12"]
    assert "dead rank (rank 0 on n1 failed at step 18: its process is gone)" in done.stderr
    os.utime(errors / "rank_0.json", (1.0, 1.0))  # of long ago
    box.shell(rank(box, "running") + "; (exit 1)")
    assert read_state(box.run_dir)["requeue"]["cause"] == "bug"


def test_finished_run_stays_finished(box: Box) -> None:
    """A job that is refused in the directory of a finished run doesn't make it a failed one."""
    box.state("finished", job="5")
    box.shell("(exit 2)")
    state = read_state(box.run_dir)
    assert (state["status"], state["job"], state["requeue"]["cause"]) == ("finished", "5", "user error")


def test_newer_owner_is_left_alone(box: Box) -> None:
    """Another job that has the run directory by now keeps its state.json."""
    theirs = {"status": "running", "job": "13", "restart": 0}
    box.shell(f"echo '{json.dumps(theirs)}' > {box.run_dir}/state.json; (exit 1)")
    assert read_state(box.run_dir) == theirs


def test_refused_requeue(box: Box) -> None:
    """When Slurm refuses the requeue the log says why and what to do, and state.json that the job doesn't come back."""
    box.slurm(refuse="Requested operation is presently disabled for job 12")
    done = box.shell(rank(box, "preempted", why="USR2") + "; (exit 75)")
    assert done.returncode == 75
    assert "refused to requeue job 12: Requested operation is presently disabled" in done.stderr
    assert "alexnet-ddp submit" in done.stderr.splitlines()[-1]
    assert read_state(box.run_dir)["requeue"]["decision"] == "stop"


def test_slurm_away_for_a_moment(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slurmctld that is being restarted is asked again."""
    monkeypatch.setattr(attempts, "ASK", (0, 0, 0))
    counter = box.bin / "scontrol"
    counter.write_text(f'#!/bin/sh\necho x >> {box.calls}\n[ $(wc -l < {box.calls}) -ge 3 ] && exit 0\n'
                       'echo "Unable to contact slurm controller (connect failure)" >&2; exit 1\n')
    monkeypatch.setenv("PATH", f"{box.bin}:/usr/bin:/bin")
    assert attempts.ask_slurm(Job("12")) == ""
    assert len(box.calls.read_text().splitlines()) == 3


def test_no_scontrol_at_all(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scontrol, TERM means waiting for Slurm to end the job; nothing is guessed."""
    held: list[float] = []
    monkeypatch.setattr(attempts.time, "sleep", held.append)
    monkeypatch.setattr(attempts, "job_facts", lambda _: None)
    box.state("preempted", why="TERM")
    attempts.end(box.snapshot, Job("12"), exit_code=75)
    assert sum(held) == attempts.HOLD
    assert read_state(box.run_dir)["requeue"]["decision"] == "slurm"


def test_slurm_away_during_a_preemption(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """TERM while slurmctld is being restarted: asked again, it tells of the preemption, and the job comes back."""
    known = slurm.parse_job(FACTS.format(state="RUNNING", restarts=0, preempt="2099-11-22T00:05:00"))
    answers = iter([None, None, known])
    asked: list[Job] = []

    def ask(job: Job) -> str:
        asked.append(job)
        return ""

    monkeypatch.setattr(attempts.time, "sleep", lambda _: None)
    monkeypatch.setattr(attempts, "job_facts", lambda _: next(answers))
    monkeypatch.setattr(attempts, "ask_slurm", ask)
    box.state("preempted", why="TERM")
    box.checkpoint(8)
    attempts.end(box.snapshot, Job("12"), exit_code=75)
    assert asked == [Job("12")]
    assert read_state(box.run_dir)["requeue"]["cause"] == "preempted"


def test_start_without_progress_is_refused(box: Box) -> None:
    """A job that Slurm brings back by itself after lost nodes stops at its fourth start without a new step."""
    for restart in range(3):
        add_attempt(box.run_dir, "begin", job="12", array=None, restart=restart, step=0, nodes="n1")
    done = box.shell("echo trained", SLURM_RESTART_COUNT="3")
    assert done.returncode == 1
    assert "trained" not in done.stdout
    assert "doesn't train. Not requeued: 3 attempts in a row brought no new step" in done.stderr
    state = read_state(box.run_dir)
    assert (state["status"], state["requeue"]["decision"]) == ("failed", "stop")


def test_history_of_a_job(box: Box) -> None:
    """Starts with their ends, those cut off up to where the next began, those of other jobs left out."""
    def begin(restart: int, step: int, job: str = "12") -> None:
        add_attempt(box.run_dir, "begin", job=job, array=None, restart=restart, step=step, nodes="n1")

    begin(0, 0, job="11")
    begin(0, 0)
    add_attempt(box.run_dir, "end", job="12", restart=0, step=8, cause="walltime", decision="requeue", reason="")
    begin(1, 8)  # cut off
    begin(2, 12)
    add_attempt(box.run_dir, "end", job="12", restart=2, step=12, cause="ended by Slurm", decision="slurm", reason="")
    begin(3, 12)
    found = [(attempt.began, attempt.ended, attempt.cause) for attempt in
             attempts.history(box.run_dir, Job("12", 3), ended=20)]
    assert found == [(0, 8, Cause.WALLTIME), (8, 12, Cause.NODE), (12, 12, Cause.PREEMPTED)]


def test_line_cut_off_by_a_power_off(box: Box) -> None:
    """Half a line in attempts.jsonl costs that line alone."""
    add_attempt(box.run_dir, "begin", job="12", array=None, restart=0, step=0, nodes="n1")
    with (box.run_dir / "attempts.jsonl").open("a") as file:
        file.write('{"event": "en')
    add_attempt(box.run_dir, "begin", job="12", array=None, restart=1, step=0, nodes="n1")
    assert [record["restart"] for record in read_attempts(box.run_dir)] == [0, 1]


@pytest.mark.parametrize("line", [
    b"\x80\xff\x00", b'{"event": "begin", "job": "12"}', b'{"event": "begin", "job": "12", "restart": 0, "step": null}',
    b'{"event": "end", "job": "12", "restart": 0, "step": 4, "time": "2026-11-22T00:00:00+0000", "cause": "moths"}'])
def test_history_that_cannot_be_read(box: Box, line: bytes) -> None:
    """Rubbish, or words of another version, in attempts.jsonl doesn't keep a job from coming back."""
    add_attempt(box.run_dir, "begin", job="12", array=None, restart=0, step=0, nodes="n1")
    with (box.run_dir / "attempts.jsonl").open("ab") as file:
        file.write(line + b"\n")
    done = box.shell(rank(box, "preempted", why="USR2", restart=1) + "; (exit 75)", SLURM_RESTART_COUNT="1")
    assert box.requeued == ["requeue 12"], done.stderr


@pytest.mark.parametrize(("status", "requeued"), [("preempted", ["requeue 12"]), ("failed", [])])
def test_history_that_cannot_be_written(box: Box, status: str, requeued: list[str]) -> None:
    """A disk that takes not a line more loses no job to a time limit; a failure, which could not be counted, stops."""
    (box.run_dir / "attempts.jsonl").mkdir()
    failure = {"kind": "disk", "cause": "No space left on device"}
    done = box.shell(rank(box, status, why="USR2", failure=failure) + "; (exit 75)")
    assert box.requeued == requeued
    assert "Traceback" not in done.stderr
    assert "its end can't be written down" in done.stderr.splitlines()[-1]


def test_stop_ends_the_count(box: Box) -> None:
    """A job that is brought back by hand after it was decided to stop, or another of the same number, counts anew."""
    for restart in range(4):
        add_attempt(box.run_dir, "begin", job="12", array=None, restart=restart, step=8, nodes="n1")
        if restart != 3:
            add_attempt(box.run_dir, "end", job="12", restart=restart, step=8, cause="dead rank", reason="",
                        decision="stop" if restart == 2 else "requeue")
    assert attempts.history(box.run_dir, Job("12", 3), ended=8) == []
    assert len(attempts.history(box.run_dir, Job("12", 2), ended=8)) == 2


def test_requeue_needs_no_torch(box: Box) -> None:
    """What the batch shell runs imports no torch: it answers on a busy head node."""
    code = ("import sys, launch.attempts, launch.batch, launch.job, launch.rendezvous, launch.agent, launch.snapshot; "
            "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), timeout=60)
