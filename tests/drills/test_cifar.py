"""CIFAR-10 as a user trains it: the whole of it, on two CPU cores, by the recipe in configs/."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import photographs

pytestmark = pytest.mark.drill
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(3600)
def test_quarter_width_reaches_75_per_cent(tmp_path: Path) -> None:
    """configs/cifar10_cpu.yaml, trained on all 50,000 and tested on all 10,000, reaches 75 per cent top-1."""
    tar = photographs.archive("cifar10-jpeg.tar")
    subprocess.run([sys.executable, "-m", "alexnet_ddp", "train", "configs/cifar10_cpu.yaml", f"runs={tmp_path}",
                    f"data.train={tar}::train", f"data.val={tar}::test", "--nproc-per-node", "2"], cwd=ROOT, check=True)
    records = [json.loads(line) for line in (tmp_path / "cifar10_cpu/metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "evaluate"][-1]
    seconds = records[-1]["time"] - records[0]["time"]
    print(f"top-1 {last['top1']:.2%}, {seconds:.0f} s from the first logged step to the last")
    assert last["samples"] == 10_000 and last["top1"] >= 0.75
