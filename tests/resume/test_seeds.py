"""Runs of several seeds by one command, stopped in the first; gone on with in tests/drills/test_seeds.py."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import harness
from twins import Command


def test_a_stop_in_the_first_stops_them_all(tmp_path: Path) -> None:
    """TERM in the first of two runs is passed on once: saved, 75, the second not begun, and how to go on is told."""
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
