"""Runs of several seeds by one command, to the end: gone on with after a stop, each the run that it would be alone."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

import harness
from twins import Command, Run

pytestmark = [pytest.mark.drill, pytest.mark.timeout(300)]


def test_two_seeds_stopped_and_gone_on_with(tmp_path: Path) -> None:
    """TERM in the first of two runs: saved, 75, the second not begun. The same command ends both and tells their mean;
    the weights are those of a run of its own."""
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

    again = Command(words, log=tmp_path / "again.log")
    assert again.wait() == 0, again.output()
    assert "goes on at step" in again.output() and "mean ± standard deviation, n = 2" in again.output()

    alone = Run(recipe, name="alone", world=1)
    alone.go("seed=5").check()
    assert harness.final_files(alone.path) == harness.final_files(runs / "tiny-seed5")
    assert harness.final_files(alone.path) != harness.final_files(runs / "tiny-seed4")
