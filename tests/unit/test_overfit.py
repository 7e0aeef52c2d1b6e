"""Each of the four nets learns photographs by heart, through the whole trainer, by its own recipe's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import harness
import photographs
from alexnet_ddp.models.zoo import OURS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def learn(name: str, folder: Path, *, samples: int, size: int) -> tuple[int, float, float]:
    """(steps, loss, seconds of the steps) of `--overfit` with the recipe of the net's name, a quarter as wide.

    On ImageNet photographs, one a class, where they are; else on smooth noise.
    """
    tar = photographs.FOLDER / "imagenet-sample.tar"
    if tar.exists():
        train, classes = f"{tar}::train", 700
    else:
        train, classes = str(harness.make_images(folder / "train", samples=samples, classes=samples)), samples
    harness.run(["train", str(CONFIGS / f"{name}.yaml"), "--overfit", str(samples), f"runs={folder}", "device=cpu",
                 f"data.train={train}", f"model.num_classes={classes}", "model.width=0.25", f"augment.size={size}",
                 "torch_threads=1", "log.tensorboard=false"], world=1).check()  # 0 where it has learned them
    lines = (folder / f"{name}-overfit" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return records[-1]["step"], records[-1]["loss"], sum(r["samples"] / r["images_per_second"] for r in records)


@pytest.mark.parametrize("name", OURS)
def test_learns_by_heart(name: str, tmp_path: Path) -> None:
    """Four photographs at 64 pixels: by the recipe's rate, momentum, precision and pixels, without dropout and decay,
    the mean loss of ten steps falls under 0.1 within 300 steps."""
    steps, loss, _ = learn(name, tmp_path, samples=4, size=64)
    assert loss < 0.1 and steps < 300
