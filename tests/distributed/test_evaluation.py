"""Exact evaluation: every sample once, the same integers and the same loss bits on any ranks and for any batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import harness
import pieces

HELD_OUT = 1003  # 31 tiles of 32 and one of 11


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step at a learning rate that moves no fp32 weight: every run evaluates the very same net."""
    folder = tmp_path_factory.mktemp("evaluation")
    harness.make_images(folder / "val", samples=HELD_OUT, classes=8, seed=1)
    return harness.tiny_recipe(
        folder, train=harness.make_images(folder / "train", samples=16, classes=8), val=folder / "val", epochs=1,
        global_batch=16, micro_batch=16, model__num_classes=8, optim__lr=1e-30, schedule__warmup_epochs=0,
        log__trace=False)


def evaluation(recipe: Path, name: str, *overrides: str, world: int) -> dict[str, Any]:
    harness.run(["train", str(recipe), f"name={name}", *overrides], world=world).check()
    (record,) = (record for record in harness.metrics(recipe.parent / "runs" / name) if record["kind"] == "evaluate")
    return record


@pytest.fixture(scope="module")
def reference(recipe: Path) -> dict[str, Any]:
    found = evaluation(recipe, "reference", "evaluate.batch=1", world=1)
    assert found["samples"] == HELD_OUT
    assert 0 < found["correct1"] < found["correct5"] < HELD_OUT  # counts that could come out otherwise
    assert found["top1"] == found["correct1"] / HELD_OUT and found["top5"] == found["correct5"] / HELD_OUT
    return found


@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_counts_and_loss_are_equal(recipe: Path, reference: dict[str, Any], world: int, batch: int) -> None:
    """1003 images on 1 to 4 ranks, 1, 7 and 32 tiles a fetch (some ranks with none): equal integers, equal loss."""
    assert evaluation(recipe, f"w{world}b{batch}", f"evaluate.batch={batch}", world=world) == reference


def test_ties_go_to_the_lower_class(recipe: Path) -> None:
    """Exact ties: 6 and 7 are highest, then 0, 1, 2 come before the equal 3, 4, 5; the loss is the known one.

    Other weights that are evaluated beside the net's own, as the mean of them is, have counts of their own.
    """
    folder = recipe.parent / "val"
    per_class = [len(list((folder / f"class{number}").iterdir())) for number in range(8)]
    found = pieces.on_ranks(pieces.evaluate_ties, str(folder), 7, world=3)
    assert found[0] == found[1] == found[2]
    assert found[0][:3] == (HELD_OUT, per_class[6], sum(per_class[number] for number in (6, 7, 0, 1, 2)))
    assert found[0][4:] == (per_class[0], sum(per_class[:5]))
    likely = per_class[6] + per_class[7]  # samples whose own logit is 1, the others' is 0
    assert found[0][3] == pytest.approx(math.log(6 + 2 * math.e) - likely / HELD_OUT, rel=1e-6)


def test_fewer_tiles_than_ranks(recipe: Path, reference: dict[str, Any]) -> None:
    """A held-out set smaller than a tile, on more ranks than it has tiles, is counted exactly, too."""
    few = harness.make_images(recipe.parent / "few", samples=9, classes=8, seed=2)
    one = evaluation(recipe, "few1", f"data.val={few}", world=1)
    assert evaluation(recipe, "few4", f"data.val={few}", "evaluate.batch=1", world=4) == one
    assert one["samples"] == 9
