"""The learning rate a run really uses is the pure function of the step, straight and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

import harness
from alexnet_ddp import config
from alexnet_ddp.schedule import learning_rate

SCHEDULES = {
    "constant": ["schedule.name=constant", "schedule.warmup_epochs=0"],
    "constant_warm": ["schedule.name=constant", "schedule.warmup_epochs=1.5"],
    "step": ["schedule.name=step", "schedule.warmup_epochs=0.5", "schedule.step_epochs=1.5", "schedule.gamma=0.1"],
    "cosine": ["schedule.name=cosine", "schedule.warmup_epochs=0.5", "schedule.eta_min=0.001"],
    "one_cycle": ["schedule.name=one_cycle", "schedule.warmup_epochs=0.5"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    return harness.tiny_recipe(folder, train=harness.make_images(folder / "train", samples=35), epochs=4,
                               log__steps=1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_straight_and_resumed(recipe: Path, name: str) -> None:
    """What a straight run and one stopped twice (3, 2, then 1 ranks) log at all 16 steps is the function's value."""
    words = SCHEDULES[name]
    wanted = config.load(recipe, words)
    expected = [learning_rate(step, base=wanted.optim.lr, schedule=wanted.schedule, steps_per_epoch=4, epochs=4)
                for step in range(16)]
    assert len(set(expected)) > 1 or name == "constant"

    runs = recipe.parent / "runs"
    harness.run(["train", str(recipe), f"name={name}", *words], world=2).check()
    assert [record["lr"] for record in harness.metrics(runs / name)] == expected
    for world, stop_at in ((3, 3), (2, 9)):
        stopped = harness.run(["train", str(recipe), f"name={name}_parts", *words, "fault.kind=signal",
                               f"fault.step={stop_at}"], world=world)
        assert set(stopped.codes) == {75}, stopped.output
    harness.run(["train", str(recipe), f"name={name}_parts", *words], world=1).check()
    assert [record["lr"] for record in harness.metrics(runs / f"{name}_parts")] == expected
