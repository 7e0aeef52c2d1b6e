"""A small net for all tests of what comes after training, and the commands as a user gives them."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import harness
from alexnet_ddp.data.tools.demo import draw

ROOT = Path(__file__).parents[1]
KINDS = ("dots", "ring", "stripes_horizontal", "stripes_vertical")
PER_CLASS, HELD_OUT = 96, 50


@dataclass(frozen=True)
class Trained:
    """`run`: a finished run on `data`/train (4 kinds of figure), evaluated on `data`/val (50 of each)."""

    run: Path
    data: Path

    @property
    def val(self) -> Path:
        return self.data / "val"


def command(*words: object, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """`alexnet-ddp WORDS` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "alexnet_ddp", *map(str, words)], cwd=cwd, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=100)


def draw_pictures(folder: Path) -> Path:
    """Pictures of four kinds of figure that are learned soon: PER_CLASS of each in `folder`/train, HELD_OUT in /val."""
    for split, count in enumerate((PER_CLASS, HELD_OUT)):
        for label, kind in enumerate(KINDS):
            place = folder / ("train", "val")[split] / kind
            place.mkdir(parents=True)
            random = np.random.default_rng((split, label))
            for number in range(count):
                Image.fromarray(draw(kind, random)).save(place / f"{number:04}.jpg", quality=90)
    return folder


def train_small(folder: Path) -> Trained:
    """A net of a quarter's width at 64 pixels; about 10 s. Its accuracy is over 60 % (guessing: 25 %)."""
    data = draw_pictures(folder / "data")
    harness.run(["train", str(ROOT / "configs" / "demo.yaml"), "name=small", f"runs={folder / 'runs'}",
                 f"data.train={data / 'train'}", f"data.val={data / 'val'}", f"model.num_classes={len(KINDS)}",
                 "model.dropout=0", "global_batch=32", "epochs=14", "optim.lr=0.05", "evaluate.epochs=14",
                 "checkpoint.epochs=14", "log.tensorboard=false"], world=1).check()
    return Trained(folder / "runs" / "small", data)
