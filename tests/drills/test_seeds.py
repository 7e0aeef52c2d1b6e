"""Runs of several seeds by one command, to the end: gone on with after a stop, each the run that it would be alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import harness
from twins import Command, Run, stop_in_the_first

pytestmark = [pytest.mark.drill, pytest.mark.timeout(300)]


def test_two_seeds_stopped_and_gone_on_with(tmp_path: Path) -> None:
    """TERM in the first of two runs: saved, 75, the second not begun. The same command ends both and tells their mean;
    the weights are those of a run of its own."""
    recipe, runs, words = stop_in_the_first(tmp_path)

    again = Command(words, log=tmp_path / "again.log")
    assert again.wait() == 0, again.output()
    assert "goes on at step" in again.output() and "mean ± standard deviation, n = 2" in again.output()

    alone = Run(recipe, name="alone", world=1)
    alone.go("seed=5").check()
    assert harness.final_files(alone.path) == harness.final_files(runs / "tiny-seed5")
    assert harness.final_files(alone.path) != harness.final_files(runs / "tiny-seed4")
