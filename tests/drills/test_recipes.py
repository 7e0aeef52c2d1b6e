"""Every schedule, optimizer, averaging and loss: exact resume on two and three ranks, and world-size freedom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harness
from recipes import SCHEDULES, WAYS
from twins import Bench, fault, resumed_at

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]

ROWS: dict[str, dict[str, Any]] = {**SCHEDULES, **WAYS}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("world", [2, 3])
def test_killed_again_and_again(bench: Callable[..., Bench], world: int, row: str) -> None:
    """All ranks SIGKILLed in both epochs and around the evaluation between them: the bits of the run left alone."""
    here = bench(world=world, **{"epochs": 2, "evaluate__epochs": 1, **ROWS[row]})
    steps = int(here.twin.state["step"])
    run, went_on = here.run(), set()
    for step in (2, steps // 2 - 1, steps // 2 + 1, steps - 1):
        result = run.go(*fault("kill", step=step))
        assert result.codes == [-9] * world, result.output
        went_on.add(resumed_at(result.output))
    went_on.add(resumed_at(run.go().check().output))
    assert len(went_on) > 2
    here.check_equal(run)


@pytest.mark.parametrize("row", [row for row in ROWS if "batch norm" not in row])  # its statistics are per rank
def test_other_numbers_of_ranks(tmp_path: Path, row: str) -> None:
    """1 -> 3 -> 2 ranks within epochs: samples, views and rates of one rank, its losses to 1e-5 (fp16: to 1e-2)."""
    train = harness.make_images(tmp_path / "train", samples=47)
    changes = {"epochs": 2, "log__steps": 1, "micro_batch": 10, "data__shards": 12, **ROWS[row]}
    recipe = harness.tiny_recipe(tmp_path, train=train, **changes)
    words = ["train", str(recipe)]
    harness.run([*words, "name=one"], world=1).check()
    for world, step in ((1, 3), (3, 7)):
        result = harness.run([*words, "name=parts", *fault("signal", step=step, rank=0)], world=world)
        assert set(result.codes) == {75}, result.output
    harness.run([*words, "name=parts"], world=2).check()
    one, parts = (tmp_path / "runs" / name for name in ("one", "parts"))
    assert harness.trace(parts) == harness.trace(one)
    expected, found = harness.metrics(one), harness.metrics(parts)
    assert [record["lr"] for record in found] == [record["lr"] for record in expected] and len(found) == 10
    np.testing.assert_allclose([record["loss"] for record in found], [record["loss"] for record in expected],
                               rtol=1e-2 if ROWS[row].get("amp") == "fp16" else 1e-5)
