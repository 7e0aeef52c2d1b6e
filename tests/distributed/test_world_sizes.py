"""World-size freedom: the same samples, shown the same way, and the same losses on any number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import harness
from recipes import COVERING

SAMPLES = 47  # by 10: four whole batches and one of 7
STEPS = 20  # four epochs
FP32 = 1e-5  # relative, the design's bound over the first 20 steps


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    return harness.tiny_recipe(
        folder, train=harness.make_images(folder / "train", samples=SAMPLES), epochs=4, log__steps=1,
        micro_batch=10, data__shards=12)


@pytest.fixture(scope="module")
def one_rank(recipe: Path) -> Path:
    """The run that all are compared with."""
    return train(recipe, "one", world=1)


def train(recipe: Path, name: str, *overrides: str, world: int) -> Path:
    harness.run(["train", str(recipe), f"name={name}", *overrides], world=world).check()
    return recipe.parent / "runs" / name


def train_in_parts(recipe: Path, name: str, *overrides: str, parts: list[tuple[int, int]]) -> Path:
    """A run that is stopped after (about) each part's step and goes on with the next part's number of ranks."""
    for world, stop_at in parts[:-1]:
        result = harness.run(["train", str(recipe), f"name={name}", *overrides, "fault.kind=signal",
                              f"fault.step={stop_at}", f"fault.rank={world - 1}"], world=world)
        assert set(result.codes) == {75}, result.output
    return train(recipe, name, *overrides, world=parts[-1][0])


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in harness.metrics(run) if record["kind"] == "train"]


def norms(run: Path) -> list[float]:
    return [record["grad_norm"] for record in harness.metrics(run) if record["kind"] == "train"]


def assert_same_samples(run: Path, reference: Path) -> None:
    """Same ids, views and flips in the same order at every step."""
    assert harness.trace(run) == harness.trace(reference)


def assert_each_once(run: Path, *, samples: int, steps_per_epoch: int, epochs: int) -> None:
    steps = harness.trace(run)
    assert sorted(steps) == list(range(steps_per_epoch * epochs))
    for epoch in range(epochs):
        seen = Counter(sample for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
                       for sample, _, _ in steps[step])
        assert seen == Counter(range(samples)), f"epoch {epoch}"


def assert_same_losses(run: Path, reference: Path) -> None:
    found, expected = losses(run), losses(reference)
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=FP32)
    np.testing.assert_allclose(norms(run), norms(reference), rtol=FP32)


def assert_same_run(run: Path, reference: Path) -> None:
    assert_same_samples(run, reference)
    assert_same_losses(run, reference)
    assert [record["samples"] for record in harness.metrics(run)] == [
        record["samples"] for record in harness.metrics(reference)]


def test_reference_takes_every_sample_once_an_epoch_and_learns(one_rank: Path) -> None:
    """One rank trains on each of 47 samples once in each of 4 epochs, in batches of 10, 10, 10, 10 and 7."""
    assert_each_once(one_rank, samples=SAMPLES, steps_per_epoch=5, epochs=4)
    assert [len(step) for step in harness.trace(one_rank).values()] == [10, 10, 10, 10, 7] * 4
    assert len({tuple(view) for step in harness.trace(one_rank).values() for _, view, _ in step}) > 100  # real crops


@pytest.mark.parametrize("world", [2, 3, 4])
def test_world_size_changes_nothing(recipe: Path, one_rank: Path, world: int) -> None:
    """2, 3 and 4 ranks: same ids, views, flips at every step and, with dropout, the same losses to 1e-5."""
    run = train(recipe, f"world{world}", world=world)
    assert_same_run(run, one_rank)
    for rank in range(world):  # contiguous parts that differ by at most one
        sizes = [len(json.loads(line)["samples"])
                 for line in (run / "trace" / f"rank_{rank}.jsonl").read_text().splitlines()]
        assert set(sizes) <= {7 // world, 7 // world + 1, 10 // world, 10 // world + 1}


def test_switching_world_sizes_in_mid_epoch_changes_nothing(recipe: Path, one_rank: Path) -> None:
    """1 -> 3 -> 2 -> 4 ranks, each switch within an epoch: samples, views and losses are those of one rank."""
    run = train_in_parts(recipe, "switched", parts=[(1, 2), (3, 6), (2, 12), (4, 0)])
    assert_same_run(run, one_rank)
    state = json.loads((run / "state.json").read_text())
    assert state["attempt"] == 4 and not state["exact"] and "ranks 2 -> 4" in state["why_not_exact"]


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_change_nothing(recipe: Path, one_rank: Path, micro_batch: int) -> None:
    """Micro-batches of 1, 2 and 3 on 3 ranks: samples, views, dropout and losses are those of one whole batch."""
    run = train(recipe, f"micro{micro_batch}", f"micro_batch={micro_batch}", world=3)
    assert_same_run(run, one_rank)


@pytest.mark.parametrize("row", COVERING)
def test_every_way_to_move_weights(recipe: Path, row: str) -> None:
    """Other optimizers, schedules, a mean of the weights: 1 -> 3 ranks in mid-epoch, with the losses of one rank."""
    words = [f"{name.replace('__', '.')}={value}" for name, value in COVERING[row].items()]
    reference = train(recipe, f"{row} 1".replace(", ", "_").replace(" ", "_"), *words, world=1)
    run = train_in_parts(recipe, f"{row} 3".replace(", ", "_").replace(" ", "_"), *words, parts=[(1, 6), (3, 0)])
    assert_same_run(run, reference)


def test_fewer_samples_than_ranks(recipe: Path) -> None:
    """A global batch of 2 on 4 ranks (two never get a sample, one often gets none) trains as on one rank."""
    small = harness.make_images(recipe.parent / "small", samples=5)
    words = [f"data.train={small}", "global_batch=2", "data.shards=2", "schedule.warmup_epochs=0"]
    reference = train(recipe, "small1", *words, world=1)
    run = train(recipe, "small4", *words, world=4)
    assert_same_run(run, reference)
    assert_each_once(run, samples=5, steps_per_epoch=3, epochs=4)
    parts = [[len(json.loads(line)["samples"]) for line in
              (run / "trace" / f"rank_{rank}.jsonl").read_text().splitlines()] for rank in range(4)]
    assert [sum(step) for step in zip(*parts, strict=True)] == [2, 2, 1] * 4
    assert [sum(part) for part in parts] == [0, 8, 0, 12]


def test_owner_assignment(recipe: Path, one_rank: Path) -> None:
    """data.assignment=owner: same batches as contiguous, each rank only ever sees the samples of its own shards."""
    run = train(recipe, "owner", "data.assignment=owner", world=3)
    found, expected = harness.trace(run), harness.trace(one_rank)
    assert {step: sorted(samples) for step, samples in found.items()} == {
        step: sorted(samples) for step, samples in expected.items()}
    assert_same_losses(run, one_rank)
    seen = [{sample for line in (run / "trace" / f"rank_{rank}.jsonl").read_text().splitlines()
             for sample in json.loads(line)["samples"]} for rank in range(3)]
    assert sum(len(part) for part in seen) == len(set.union(*seen)) == SAMPLES


def test_owner_assignment_needs_a_multiple_of_the_ranks(recipe: Path) -> None:
    """4 shards on 3 ranks are refused before anything is written, with the next good number of shards."""
    result = harness.run(["train", str(recipe), "name=owner5", "data.assignment=owner", "data.shards=4"], world=3)
    assert set(result.codes) == {2} and "Use data.shards=6" in result.output
    assert not (recipe.parent / "runs" / "owner5").exists()


def test_batch_norm_nets_see_the_same_samples(recipe: Path) -> None:
    """A net with batch norm (statistics are each rank's own): the samples and views of 1 and 3 ranks are equal."""
    words = ["model.name=torchvision:shufflenet_v2_x0_5", "epochs=1", "model.width=1"]
    reference = train(recipe, "bn1", *words, world=1)
    run = train(recipe, "bn3", *words, world=3)
    assert_same_samples(run, reference)
    assert all(np.isfinite(loss) for loss in losses(run))


def test_batch_norm_nets_bear_ranks_without_samples(recipe: Path) -> None:
    """A net with batch norm on 4 ranks of which two never get a sample trains to the end, finite."""
    small = harness.make_images(recipe.parent / "small_bn", samples=5)
    run = train(recipe, "bn4", f"data.train={small}", "model.name=torchvision:shufflenet_v2_x0_5", "epochs=1",
                "model.width=1", "global_batch=2", "data.shards=2", "schedule.warmup_epochs=0", world=4)
    assert_each_once(run, samples=5, steps_per_epoch=3, epochs=1)


def test_batch_norm_of_a_single_value_is_refused(recipe: Path) -> None:
    """Batch norm over one value a sample with forwards of one sample: refused before a step; without such it trains."""
    words = ["model.name=torchvision:shufflenet_v2_x0_5", "epochs=1", "model.width=1", "augment.size=32"]
    result = harness.run(["train", str(recipe), "name=bn_lone", *words, "micro_batch=3"], world=2)
    assert set(result.codes) == {2} and "Traceback" not in result.output, result.output
    assert all(words in result.output for words in ("'stage4.0.", "micro_batch=3", "on 2 ranks")), result.output
    assert not list((recipe.parent / "runs" / "bn_lone").glob("checkpoints/*"))
    train(recipe, "bn_pairs", *words, "micro_batch=5", world=2)  # 5 and 5, 4 and 3


def weights(run: Path) -> dict[str, Any]:
    last = sorted((run / "checkpoints").glob("step_*"))[-1]
    found: dict[str, Any] = {}
    for path in sorted(last.glob("*.safetensors")):
        if path.stem != "window":
            found |= {f"{path.stem}/{name}": value for name, value in load_file(path).items()}
    return found


@pytest.mark.parametrize(("samples", "steps"), [(10, 1), (13, 2)])
def test_one_update_is_the_same_on_one_rank_and_on_three(recipe: Path, samples: int, steps: int) -> None:
    """Weights and momentum after one update (and after a second one of only 3 samples) agree to rounding."""
    few = harness.make_images(recipe.parent / f"few{samples}", samples=samples)
    words = [f"data.train={few}", "epochs=1", "schedule.name=constant", "schedule.warmup_epochs=0", "micro_batch=2"]
    one = weights(train(recipe, f"update{samples}_1", *words, world=1))
    three = weights(train(recipe, f"update{samples}_3", *words, world=3))
    before = weights(train(recipe, f"update{samples}_0", *words, "optim.lr=1e-30", world=1))
    assert one.keys() == three.keys() and any("momentum" in name for name in one)
    for name in one:
        moved = np.abs(one[name] - before[name]).max() if "momentum" not in name else np.abs(one[name]).max()
        assert moved > 0, name
        np.testing.assert_allclose(three[name], one[name], rtol=0, atol=2e-5 * moved + 1e-9, err_msg=name)
