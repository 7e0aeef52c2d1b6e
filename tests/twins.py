"""A run that is killed, stopped and resumed, beside its twin that never was: what the two must share.

    bench = Bench(tmp_path, world=3)
    run = bench.run()                      # a run directory of its own
    run.go(*fault("kill", step=7))         # an attempt at it, to whatever end
    run.go().check()
    bench.check_equal(run)                 # bit by bit against bench.twin, which went straight through
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import harness
from alexnet_ddp.checkpoint import store

PYTHON = [sys.executable, "-u", "-m"]

# Everything that could make a resumed run differ: random views of each kind, dropout, low precision, momentum, a
# rate that changes at every step, windows of the log that checkpoints fall into the middle of, epochs that end in
# a smaller batch, parts that differ from rank to rank, several micro-batches a rank.
RECIPE: dict[str, Any] = {
    "amp": "bf16", "epochs": 4, "model__dropout": 0.5, "augment__rotation": 10.0,
    "augment__color_jitter": [0.2, 0.2, 0.2, 0.1], "checkpoint__steps": 3, "evaluate__epochs": 2,
    "evaluate__batch": 1, "log__steps": 4,
}
# Long enough (200 steps, some seconds) to be met in mid-run by a signal from outside.
LONG: dict[str, Any] = {"epochs": 40, "evaluate__epochs": 20, "checkpoint__epochs": None, "checkpoint__steps": 20,
                        "log__steps": 8}
SAMPLES, HELD_OUT = 47, 130  # five steps an epoch; five tiles, so that each of 2 or 3 ranks has several turns


def fault(kind: str, *, step: int, rank: int = -1, at: str = "step", signal: str = "USR1", seconds: float = 1.0
          ) -> list[str]:
    """Words of a command line: a fault once `step` steps are done, on one rank or on all (-1)."""
    return [f"fault.kind={kind}", f"fault.step={step}", f"fault.rank={rank}", f"fault.at={at}",
            f"fault.signal={signal}", f"fault.seconds={seconds}"]


class Run:
    """One run directory, and attempts at it."""

    def __init__(self, recipe: Path, *, name: str, world: int) -> None:
        self.recipe, self.name, self.world = recipe, name, world
        self.path = recipe.parent / "runs" / name

    @property
    def words(self) -> list[str]:
        return ["train", str(self.recipe), f"name={self.name}"]

    def start(self, *words: str, world: int | None = None, environment: dict[str, str] | None = None) -> harness.Ranks:
        return harness.start([*self.words, *words], world=world or self.world, environment=environment)

    def go(self, *words: str, world: int | None = None, environment: dict[str, str] | None = None) -> harness.Result:
        """One attempt, to whatever end it comes."""
        return self.start(*words, world=world, environment=environment).wait()

    @property
    def state(self) -> dict[str, Any]:
        found = json.loads((self.path / "state.json").read_text())
        assert isinstance(found, dict)
        return found

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*"))

    def copy(self, name: str) -> Run:
        """The same run under another name, to end it in another way."""
        other = Run(self.recipe, name=name, world=self.world)
        shutil.copytree(self.path, other.path)
        return other

    def check_whole(self) -> None:
        """Asserts that every checkpoint there is verifies, and that there is one."""
        assert self.checkpoints
        for path in self.checkpoints:
            store.verify(path)

    def check_stopped(self, *, why: str, earliest: int, latest: int) -> None:
        """Asserts that the run was left in good order between two steps: saved, told, given back."""
        state = self.state
        assert (state["status"], state["why"]) == ("preempted", why)
        assert earliest <= state["step"] <= latest
        self.check_whole()
        assert self.checkpoints[-1].name == store.directory_name(state["step"])
        self.check_tidy()

    def check_tidy(self) -> None:
        """Asserts that nothing half-done was left behind, and that nobody holds the directory."""
        left = [path.name for path in [*self.path.iterdir(), *(self.path / "checkpoints").iterdir()]
                if path.name.startswith(".") or path.name in ("lease.json", "STOP")]
        assert not left


def resumed_at(output: str) -> int | None:
    """The step an attempt said it went on from; None when it said nothing of the kind."""
    found = re.search(r"goes on at step (\d+) of", output)
    return int(found[1]) if found else None


@dataclass
class Bench:
    """Pictures, a recipe, and the run on `world` ranks that nothing disturbs."""

    folder: Path
    world: int
    samples: int = SAMPLES
    held_out: int = HELD_OUT
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        train = harness.make_images(self.folder / "train", samples=self.samples)
        val = harness.make_images(self.folder / "val", samples=self.held_out, seed=1)
        self.recipe = harness.tiny_recipe(self.folder, train=train, val=val, **{**RECIPE, **self.changes})
        self._number = 0

    def run(self, name: str = "") -> Run:
        self._number += 1
        return Run(self.recipe, name=name or f"run{self._number}", world=self.world)

    @cached_property
    def twin(self) -> Run:
        run = self.run("twin")
        run.go().check()
        run.check_tidy()
        return run

    def check_equal(self, run: Run) -> None:
        """Asserts that a finished run's weights, momentum, numbers, samples, views, metrics and best are the twin's."""
        twin = self.twin
        assert run.state["status"] == "finished"
        run.check_tidy()
        assert harness.trace(run.path) == harness.trace(twin.path)
        assert harness.metrics(run.path) == harness.metrics(twin.path)
        for name in ("best.safetensors", "best.json"):
            assert (run.path / name).read_bytes() == (twin.path / name).read_bytes(), name
        mine, theirs = (_contents(which.checkpoints[-1]) for which in (run, twin))
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if mine[name] != theirs[name]] == []
        assert run.checkpoints[-1].name == twin.checkpoints[-1].name


def _contents(checkpoint: Path) -> dict[str, bytes]:
    """A checkpoint's files (weights, momentum, window, numbers) but for the manifest, which tells of its origin."""
    return {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "manifest.json"}


# --- whole commands, as a user types them ------------------------------------------------------------------------


class Command:
    """A command in a session of its own; all its descendants are known by a mark in their environment."""

    def __init__(self, words: list[str], *, log: Path) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FORKSERVER")}
        environment = {**inherited, "ALEXNET_TEST_MARK": self.mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("ab") as file:
            self.process = subprocess.Popen([*PYTHON, *words], stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                                            env=environment, start_new_session=True, preexec_fn=harness.listen,
                                            cwd=Path(__file__).parents[1])

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Process numbers of all that runs of this command, itself included."""
        return [pid for pid in _all_pids() if f"ALEXNET_TEST_MARK={self.mark}".encode() in _environment(pid)]

    def workers(self) -> list[int]:
        """Process numbers by rank."""
        ranks = {}
        for pid in self.processes():
            found = re.search(rb"(?:^|\0)RANK=(\d+)\0", _environment(pid))
            if found:
                ranks[int(found[1])] = pid
        return [ranks[rank] for rank in sorted(ranks)]

    def wait_for(self, text: str, *, timeout: float = 60.0) -> None:
        """Waits until something was printed."""
        deadline = time.monotonic() + timeout
        while text not in self.output():
            assert time.monotonic() < deadline, f"'{text}' was not printed within {timeout} s:\n{self.output()}"
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.output()}"
            time.sleep(0.02)

    def wait(self, *, timeout: float = 90.0) -> int:
        """Waits for the command's end, and asserts that nothing of it is left running; its exit code."""
        try:
            code = self.process.wait(timeout)
            self.wait_until_gone(timeout=10.0)
        finally:
            self.kill()
        return code

    def wait_until_gone(self, *, timeout: float = 30.0) -> None:
        """Asserts that in the end no process of this command is left."""
        deadline = time.monotonic() + timeout
        while left := self.processes():
            assert time.monotonic() < deadline, f"{left} still run:\n{self.output()}"
            time.sleep(0.05)

    def kill(self) -> None:
        """Ends whatever is left, for tests that fail."""
        for pid in self.processes():
            os.kill(pid, 9)
        self.process.wait()


def torchrun(run: Run, *words: str, agent: Iterable[str] = ("--standalone", "--nproc-per-node=2"),
             log: Path | None = None) -> Command:
    """One torchrun agent on this machine, with its ranks."""
    return Command(["torch.distributed.run", *agent, "-m", "alexnet_ddp", *run.words, *words],
                   log=log or run.recipe.parent / f"{run.name}.log")


def launched(run: Run, *words: str) -> Command:
    """`alexnet-ddp train --nproc-per-node 2`."""
    return Command(["alexnet_ddp", *run.words, "--nproc-per-node", "2", *words],
                   log=run.recipe.parent / f"{run.name}.log")


def in_sessions(sessions: Iterable[int]) -> list[int]:
    """Process numbers of all that runs in these sessions (each rank of the harness leads one)."""
    wanted = {str(session) for session in sessions}
    found = []
    for pid in _all_pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[3] in wanted and fields[0] not in ("Z", "X"):
            found.append(pid)
    return found


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def stop_in_the_first(tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """Begins the runs tiny-seed4 and tiny-seed5 by one command, and stops it by TERM in the first: it is saved, the
    code is 75, the second isn't begun, and how to go on is told. Returns the recipe, the folder of the runs and the
    command's words."""
    recipe = harness.tiny_recipe(
        tmp_path, train=harness.make_images(tmp_path / "train", samples=20),
        val=harness.make_images(tmp_path / "val", samples=32, seed=1), epochs=20, schedule__warmup_epochs=0,
        evaluate__epochs=20, checkpoint__epochs=None, checkpoint__steps=None)
    runs, words = tmp_path / "runs", ["alexnet_ddp", "train", str(recipe), "seed=4..5"]
    stopped = Command(words, log=tmp_path / "first.log")
    stopped.wait_for("step 4/")
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75, stopped.output()
    assert "stopped by TERM at run 1 of 2; the same command goes on" in stopped.output()
    assert json.loads((runs / "tiny-seed4" / "state.json").read_text())["status"] == "preempted"
    assert not (runs / "tiny-seed5").exists()
    return recipe, runs, words
