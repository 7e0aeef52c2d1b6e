"""Damaged images under `data.on_error: skip`: the same weights on any number of ranks, the same bits after a kill."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bad_inputs
import harness
from alexnet_ddp.checkpoint import store
from damaged import check_same, listed
from twins import Run, resumed_at

SAMPLES, HELD_OUT = 300, 70
SPOILT, SPOILT_HELD_OUT = 3, 2  # 1 per cent of what is trained on
STEPS = 12  # two epochs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    return harness.tiny_recipe(
        folder, train=harness.make_images(folder / "train", samples=SAMPLES),
        val=harness.make_images(folder / "val", samples=HELD_OUT, seed=1), global_batch=50, micro_batch=10,
        checkpoint__steps=4, log__steps=1, optim__lr=0.02, data__on_error="skip", data__max_damaged=0.03,
        augment__mixup=0.2, evaluate__epochs=2)


@pytest.fixture(scope="module")
def spoilt(recipe: Path) -> dict[str, str]:
    return {**bad_inputs.damage(recipe.parent / "train", samples=SPOILT),
            **bad_inputs.damage(recipe.parent / "val", samples=SPOILT_HELD_OUT)}


@pytest.fixture(scope="module")
def one_rank(recipe: Path, spoilt: dict[str, str]) -> Run:
    """The run that all are compared with."""
    run = Run(recipe, name="one", world=1)
    run.go().check()
    return run


def test_each_damaged_image_is_named_once_with_its_reason(one_rank: Run, spoilt: dict[str, str]) -> None:
    """1 per cent of the images, cut short, of garbage and of zeros: all steps taken, each file listed once with reason
    and first step, counted in metrics, state.json and the checkpoint, and left out of the numbers."""
    found = listed(one_rank)
    assert {record["file"] for record in found} == set(spoilt) and len(found) == len(spoilt)
    assert all(re.search(spoilt[record["file"]], record["reason"]) for record in found)
    steps = harness.trace(one_rank.path)
    assert len(steps) == STEPS
    bad = {record["sample"] for record in found if record["kind"] == "train"}
    records = [record for record in harness.metrics(one_rank.path) if record["kind"] == "train"]
    assert [record["samples"] for record in records] == [
        sum(sample not in bad for sample, _, _ in steps[step]) for step in range(STEPS)]
    for record in found:
        if record["kind"] == "train":
            first = min(step for step in steps if record["sample"] in [sample for sample, _, _ in steps[step]])
            assert record["step"] == first + 1
    assert records[-1]["damaged"] == SPOILT == one_rank.state["damaged"]["train"]
    assert one_rank.state["damaged"]["evaluate"] == SPOILT_HELD_OUT
    assert store.load(one_rank.checkpoints[-1])[0].damaged == SPOILT


def test_damaged_held_out_images_count_as_wrong(one_rank: Run) -> None:
    """An evaluation counts every image, the damaged ones as wrong, and its loss is that of the others."""
    evaluation, = (record for record in harness.metrics(one_rank.path) if record["kind"] == "evaluate")
    assert (evaluation["samples"], evaluation["damaged"]) == (HELD_OUT, SPOILT_HELD_OUT)
    assert evaluation["correct1"] <= HELD_OUT - SPOILT_HELD_OUT and evaluation["top1"] == (
        evaluation["correct1"] / HELD_OUT)
    assert evaluation["correct5"] == HELD_OUT - SPOILT_HELD_OUT  # of three classes
    assert 0 < evaluation["loss"] < 5


def test_world_size_changes_nothing(recipe: Path, one_rank: Run) -> None:
    """3 ranks, micro-batches of 3: samples, losses, counts, weights and the list are those of one rank (of 2 ranks: the
    test below)."""
    run = Run(recipe, name="world3", world=3)
    run.go("micro_batch=3").check()
    check_same(run, one_rank)


def test_killed_and_gone_on_with_on_the_same_ranks_and_on_others(recipe: Path, one_rank: Run) -> None:
    """2 ranks killed in the second epoch: gone on with there, the bits of a run that wasn't; on 3 ranks, its list and
    its count all the same, whatever the dead ranks had met."""
    whole = Run(recipe, name="whole", world=2)
    whole.go().check()
    check_same(whole, one_rank)
    run = Run(recipe, name="killed", world=2)
    killed = run.go("fault.kind=kill", "fault.step=9", "fault.rank=-1")
    assert set(killed.codes) == {-9}
    other, lost = run.copy("other"), run.copy("lost")
    run.go().check()
    assert harness.metrics(run.path) == harness.metrics(whole.path)
    assert harness.final_files(run.path) == harness.final_files(whole.path)
    assert listed(run) == listed(whole)
    other.go(world=3).check()
    assert listed(other) == listed(one_rank) and other.state["damaged"] == one_rank.state["damaged"]
    assert store.load(other.checkpoints[-1])[0].damaged == SPOILT
    (lost.path / "damaged.jsonl").unlink()  # what is counted stays, and isn't counted again
    result = lost.go()
    result.check()
    assert "has lost" in result.output and lost.state["damaged"]["train"] == SPOILT
    assert harness.final_files(lost.path) == harness.final_files(whole.path)


def test_too_many(recipe: Path, spoilt: dict[str, str]) -> None:
    """Beyond data.max_damaged the run ends with one message: how many, the first of them, and the way out; with a
    larger share the same command goes on."""
    run, words = Run(recipe, name="too_many", world=2), ["epochs=1", "schedule.name=constant", "data.val=null"]
    result = run.go("data.max_damaged=0.005", *words)
    assert result.codes == [2, 2], result.output
    last, = bad_inputs.messages(result.output)
    assert f"data.train: {SPOILT} of {SAMPLES} images are damaged" in last and "raise data.max_damaged" in last
    told = result.output[result.output.index("too many damaged images in data.train:\n"):].splitlines()
    assert [line.startswith("  ") and line.partition(": ")[0].strip() in spoilt for line in told[1:1 + SPOILT]] == (
        [True] * SPOILT)
    assert store.load(run.checkpoints[-1])[0].damaged <= 0.005 * SAMPLES
    run.go(*words).check()


def test_too_many_held_out(recipe: Path, spoilt: dict[str, str]) -> None:
    """More damaged held-out images than data.max_damaged allows end the run after a save, so that nothing trained is
    lost; with a larger share the same command makes that evaluation again, and the list has each image once."""
    run = Run(recipe, name="too_many_held_out", world=2)
    words = ["epochs=1", "schedule.name=constant", "evaluate.epochs=1", "checkpoint.steps=null",
             "checkpoint.epochs=null"]
    result = run.go("data.max_damaged=0.02", *words)
    assert result.codes == [2, 2], result.output
    last, = bad_inputs.messages(result.output)
    assert f"data.val: {SPOILT_HELD_OUT} of {HELD_OUT} images are damaged" in last and "raise data.max_damaged" in last
    assert "too many damaged images in data.val:\n  " in result.output
    assert run.checkpoints[-1].name == "step_00000006" and run.state["status"] == "failed"
    again = run.go(*words)
    again.check()
    assert resumed_at(again.output) == 6 and run.state["best"]["step"] == 6
    assert len(listed(run)) == SPOILT + SPOILT_HELD_OUT
