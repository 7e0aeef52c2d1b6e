"""Ranks in a second: a fork server imports torch once and forks real processes that can really be killed.

    ranks = start(["train", "recipe.yaml", "name=a"], world=2)
    result = ranks.wait()          # exit codes and what was printed

Each rank is the command line's `main` in a process of its own, told its place by torchrun's variables, on gloo.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line does before it imports torch
_context = multiprocessing.get_context("forkserver")
PRELOADED = ["alexnet_ddp.train", "alexnet_ddp.cli", "torch.utils.tensorboard", "yaml"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listen() -> None:
    """In a new process: HUP and INT as in a terminal, though the tests run under nohup or in a script's background."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _rank(words: list[str], environment: dict[str, str], output: str) -> None:
    os.setsid()
    listen()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    for name in [name for name, value in environment.items() if not value]:
        os.environ.pop(name)
    from alexnet_ddp.cli import main

    code = main(words)
    sys.stdout.flush()
    os._exit(code)


@dataclass
class Result:
    """How the ranks of one start ended."""

    codes: list[int]  # exit code by rank; -9 for SIGKILL
    output: str  # what all ranks printed
    seconds: float

    def check(self) -> Result:
        """Asserts that every rank left with 0."""
        assert set(self.codes) == {0}, f"exit codes {self.codes}:\n{self.output}"
        return self


@dataclass
class Ranks:
    """Running ranks."""

    processes: list[BaseProcess]
    output_path: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self.processes]

    def output(self) -> str:
        return self.output_path.read_text(errors="replace") if self.output_path.exists() else ""

    def signal(self, number: int, *, rank: int) -> None:
        os.kill(self.pids[rank], number)

    def wait_for(self, text: str, *, timeout: float = 60.0) -> None:
        """Waits until something was printed."""
        deadline = time.monotonic() + timeout
        while text not in self.output():
            assert time.monotonic() < deadline, f"'{text}' was not printed within {timeout} s:\n{self.output()}"
            assert any(process.is_alive() for process in self.processes), f"all gone:\n{self.output()}"
            time.sleep(0.02)

    def wait(self, *, timeout: float = 100.0) -> Result:
        """Waits for all ranks to end; kills what is left after `timeout` seconds and fails then."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        left = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not left, f"ranks {left} were still running after {timeout} s:\n{self.output()}"
        assert not set(b"\r\x1b") & set(self.output_path.read_bytes()), "a log file is no terminal"
        return Result([int(process.exitcode or 0) for process in self.processes], self.output(),
                      time.monotonic() - self.started)


@functools.cache
def _logs() -> tempfile.TemporaryDirectory[str]:
    """Where ranks print to; gone with the tests. Made when first needed: the ranks themselves import this module."""
    return tempfile.TemporaryDirectory(prefix="ranks-")


def start(words: list[str], *, world: int, environment: dict[str, str] | None = None) -> Ranks:
    """Starts `alexnet-ddp WORDS` on `world` ranks of one node."""
    port = str(free_port())
    output = Path(tempfile.mkstemp(dir=_logs().name, suffix=".log")[1])
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                 "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
        # here, not at the import: the list is the whole process's, and other test files have lists of their own
        _context.set_forkserver_preload(PRELOADED)
        process = _context.Process(target=_rank, args=(words, {**place}, str(output)))
        process.start()
        processes.append(process)
    return Ranks(processes, output)


def run(words: list[str], *, world: int, timeout: float = 100.0, environment: dict[str, str] | None = None) -> Result:
    """Starts ranks and waits for their end."""
    return start(words, world=world, environment=environment).wait(timeout=timeout)


# --- material ---------------------------------------------------------------------------------------------------


def make_images(folder: Path, *, samples: int, classes: int = 3, seed: int = 0, size: int = 40) -> Path:
    """A folder of small JPEGs, `samples` of them dealt to the classes in turn: smooth noise of varied size."""
    random = np.random.default_rng(seed)
    for number in range(samples):
        place = folder / f"class{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        coarse[..., number % classes % 3] //= 3  # something to learn
        width, height = random.integers(size * 3 // 4, size * 3 // 2, 2).tolist()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(
            place / f"{number:05d}.jpg", quality=90)
    return folder


def tiny_recipe(folder: Path, *, train: Path, val: Path | None = None, **changes: Any) -> Path:
    """A recipe of a narrow net on small pictures that takes a step in milliseconds; `changes` by dotted key."""
    tree: dict[str, Any] = {
        "name": "tiny", "runs": str(folder / "runs"), "seed": 3,
        "model": {"name": "alexnet_single", "num_classes": 3, "width": 0.05},
        "data": {"train": str(train), "val": str(val) if val else None, "threads": 1, "shards": 4},
        "augment": {"size": 64, "crop": "random_resized", "scale": [0.3, 1.0]},
        "global_batch": 10, "micro_batch": 3, "epochs": 2, "optim": {"lr": 0.02},
        "schedule": {"name": "cosine", "warmup_epochs": 0.5}, "checkpoint": {"steps": 3, "minutes": None, "keep": 2},
        "evaluate": {"batch": 2}, "log": {"steps": 2, "tensorboard": False, "trace": True}, "torch_threads": 1,
        "device": "cpu",
    }
    for path, value in changes.items():
        here = tree
        *parents, last = path.split("__")
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    recipe = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


TIMES = {"images_per_second", "data_wait", "binds", "cached", "memory_peak", "seconds", "time", "attempt"}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All metric records of a run, without the fields that are times."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def trace(run_dir: Path) -> dict[int, list[tuple[int, tuple[int, ...], bool]]]:
    """step -> (sample, view, flip) of the whole global batch in its order, from the ranks' traces."""
    steps: dict[int, list[tuple[int, tuple[int, ...], bool]]] = {}
    for rank in range(len(list((run_dir / "trace").glob("rank_*.jsonl")))):
        for line in (run_dir / "trace" / f"rank_{rank}.jsonl").read_text().splitlines():
            told = json.loads(line)
            views = [tuple(view) for view in told["views"]]
            steps.setdefault(told["step"], []).extend(zip(told["samples"], views, told["flips"], strict=True))
    return steps


def final_files(run_dir: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint, as bytes: equal exactly when weights and momentum are."""
    last = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    return {"step": last.name.encode(), **{path.name: path.read_bytes() for path in last.glob("*.safetensors")
                                           if path.stem != "window"}}
