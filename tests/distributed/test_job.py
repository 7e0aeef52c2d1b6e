"""A job's tasks as srun starts them, without Slurm: two processes with its variables meet, train and leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import harness
from alexnet_ddp import config as recipes
from alexnet_ddp.errors import EXIT_USER
from alexnet_ddp.runfiles import read_state
from launch import agent, snapshot

SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


class Step:
    """A job step of two tasks on this machine."""

    def __init__(self, folder: Path, *, samples: int = 30, job: str = "", **changes: object) -> None:
        recipe = harness.tiny_recipe(folder, train=harness.make_images(folder / "train", samples=samples),
                                     log__trace=False, **changes)
        self.job = job or str(os.getpid())  # ports are of the job
        self.run_dir = recipes.load(recipe, []).run_dir
        self.snapshot = snapshot.freeze(recipes.load(recipe, []), cwd=folder, command="submit", lead=60, caps={})

    def start(self, rank: int, *, restart: int = 0, module: str = "launch.job", **more: str) -> subprocess.Popen[str]:
        """Starts a task as the batch shell does: signals blocked, code from the snapshot."""
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith(("SLURM", "RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GLOO"))}
        environment |= {
            "SLURM_JOB_ID": self.job, "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_TASKS_PER_NODE": "2",
            "SLURM_RESTART_COUNT": str(restart), "PYTHONPATH": str(self.snapshot), "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", **more}
        words = ["--nproc-per-node", "1"] if module == "launch.agent" else []
        return subprocess.Popen([sys.executable, "-P", "-u", "-m", module, str(self.snapshot), *words], env=environment,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def ends(tasks: list[subprocess.Popen[str]], *, timeout: float = 90.0) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    try:
        said = [task.communicate(timeout=timeout)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    return [(task.returncode, output) for task, output in zip(tasks, said, strict=True)]


def test_tasks_meet_and_train(tmp_path: Path) -> None:
    """Two tasks under Slurm's variables alone find each other and finish; a signal during imports is not lost.

    The first start gets USR2 while torch is being imported: it stops in good order, with 75, and the second goes on.
    """
    step = Step(tmp_path, samples=60, epochs=30)
    tasks = [step.start(rank) for rank in range(2)]
    time.sleep(0.5)  # torch takes seconds
    tasks[1].send_signal(signal.SIGUSR2)
    stopped = ends(tasks)
    assert [code for code, _ in stopped] == [75, 75], stopped
    assert "rank 1 of 2 on" in stopped[1][1]
    state = read_state(step.run_dir)
    assert (state["status"], state["why"], state["job"], state["restart"]) == ("preempted", "USR2", step.job, 0)
    assert state["step"] < state["total_steps"]

    finished = ends([step.start(rank, restart=1) for rank in range(2)])
    assert [code for code, _ in finished] == [0, 0], finished
    assert f"goes on at step {state['step']} of" in finished[0][1]
    state = read_state(step.run_dir)
    assert (state["status"], state["world_size"], state["restart"]) == ("finished", 2, 1)


def test_code_of_the_snapshot_is_what_runs(tmp_path: Path) -> None:
    """The tasks run the frozen text, whatever lies in the folder that the job runs in."""
    step = Step(tmp_path)
    (tmp_path / "alexnet_ddp").mkdir()
    (tmp_path / "alexnet_ddp" / "__init__.py").write_text("raise SystemExit('the checkout was edited')\n")
    version = step.snapshot / "alexnet_ddp" / "errors.py"
    version.write_text(version.read_text() + "\nprint('of the snapshot')\n")
    code, output = ends([step.start(0, SLURM_TASKS_PER_NODE="1", SLURM_NTASKS="1")])[0]
    assert code == 0, output
    assert "of the snapshot" in output
    assert "edited" not in output


def test_rank_that_never_comes(tmp_path: Path) -> None:
    """A job whose other task doesn't come ends with 69, within the bound, and names the rank and its host."""
    step = Step(tmp_path)
    place = step.snapshot / "launch" / "rendezvous.py"
    place.write_text(place.read_text().replace("PATIENCE = 120.0", "PATIENCE = 1.0"))
    code, output = ends([step.start(0)])[0]
    assert code == 69
    assert "localhost (rank 1) didn't reach localhost:" in output
    assert "Traceback" not in output
    code, output = ends([step.start(1)])[0]
    assert code == 69
    assert "can't reach the head node localhost" in output


def test_host_that_does_not_see_the_snapshot(tmp_path: Path) -> None:
    """A node without the shared file system says so, by its name."""
    step = Step(tmp_path)
    elsewhere = step.snapshot.rename(tmp_path / "away")  # the code is found, as from an installed copy
    code, output = ends([step.start(0, PYTHONPATH=str(elsewhere))])[0]
    assert code == 2
    assert "doesn't see what the job runs" in output
    assert "Traceback" not in output


def test_agents_host_does_not_see_the_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A torchrun agent without the shared file system says so as a task does, and with the same exit code."""
    assert agent.main([str(tmp_path / "nowhere"), "--nproc-per-node", "2"]) == EXIT_USER
    assert "doesn't see what the job runs" in capsys.readouterr().err


def test_agents_only_rank_is_killed(tmp_path: Path) -> None:
    """Under torchrun, too, a rank that is killed and leaves nobody to tell it isn't taken for a bug: 137."""
    step = Step(tmp_path, fault={"kind": "kill", "rank": 0, "step": 2})
    code, output = ends([step.start(0, module="launch.agent", SLURM_TASKS_PER_NODE="1", SLURM_NTASKS="1")])[0]
    assert (code, read_state(step.run_dir)["status"]) == (137, "running"), output
    assert "rank 0 was ended by SIGKILL" in output
