"""A small net for all tests of what comes after training, and the commands as a user gives them."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLASSES, PER_CLASS = 4, 64


@dataclass(frozen=True)
class Trained:
    """`run`: a finished run of two epochs on `data`/train (4 kinds of figure), evaluated on `data`/val (50 of each)."""

    run: Path
    data: Path

    @property
    def val(self) -> Path:
        return self.data / "val"


def command(*words: object, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """`alexnet-ddp WORDS` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "alexnet_ddp", *map(str, words)], cwd=cwd, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=100)


def train_small(folder: Path) -> Trained:
    """By the commands that a user would give; about 10 s. Its accuracy is over 60 % (guessing: 25 %)."""
    for words in (["data", "demo", folder / "data", "--classes", CLASSES, "--per-class", PER_CLASS],
                  ["train", "configs/demo.yaml", "name=small", f"runs={folder / 'runs'}",
                   f"data.train={folder / 'data' / 'train'}", f"data.val={folder / 'data' / 'val'}",
                   f"model.num_classes={CLASSES}", "model.width=0.125", "global_batch=16", "epochs=6",
                   "evaluate.epochs=6", "checkpoint.epochs=6", "log.tensorboard=false"]):
        done = command(*words)
        assert done.returncode == 0, done.stderr
    return Trained(folder / "runs" / "small", folder / "data")
