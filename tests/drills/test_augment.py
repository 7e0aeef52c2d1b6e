"""Every blend, erasure and policy, on every number of ranks, through every assignment and cache, stopped anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harness
from twins import Bench, Run, fault, resumed_at

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]

WAYS: dict[str, dict[str, Any]] = {
    "mixup": {"augment__mixup": 0.2},
    "cutmix": {"augment__cutmix": 1.0},
    "erasing": {"augment__erasing": 0.5},
    "randaugment": {"augment__policy": "randaugment", "augment__policy_ops": 3, "augment__policy_magnitude": 15},
    "trivial": {"augment__policy": "trivial"},
    "everything": {"augment__mixup": 0.4, "augment__cutmix": 1.0, "augment__erasing": 0.5, "label_smoothing": 0.1,
                   "augment__policy": "randaugment", "augment__pca_lighting": 0.1},
    "everything, grey": {"augment__mixup": 0.4, "augment__cutmix": 1.0, "augment__erasing": 0.5,
                         "augment__policy": "trivial", "model__in_channels": 1},
    # At a rate of 0.02 a gradient comes so near to a kink at the eighth step that rounding decides (docs/drills.md).
    "everything, raw": {"augment__mixup": 0.4, "augment__cutmix": 1.0, "augment__erasing": 0.5, "optim__lr": 0.005,
                        "augment__policy": "trivial", "data__stored": "raw73", "augment__crop": "random"},
}
SHORT = {"epochs": 2, "evaluate__epochs": 2, "data__shards": 12}


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    """Two epochs of 47 samples by 10 in fp32, and what one rank makes of them in one micro-batch; by way."""
    made: dict[str, Bench] = {}

    def get(way: str) -> Bench:
        if way not in made:
            changes = {**SHORT, **WAYS[way], "amp": "none", "log__steps": 1, "micro_batch": 10}
            made[way] = Bench(tmp_path_factory.mktemp("blended"), world=1, held_out=30, changes=changes)
        return made[way]

    return get


def losses(run: Run) -> list[float]:
    return [record["loss"] for record in harness.metrics(run.path) if record["kind"] == "train"]


def check_same(run: Run, bench: Bench) -> None:
    """Asserts the samples and views of one rank (under owner in another order of a step), and its losses."""
    found, expected = harness.trace(run.path), harness.trace(bench.twin.path)
    assert {step: sorted(rows) for step, rows in found.items()} == {
        step: sorted(rows) for step, rows in expected.items()}
    np.testing.assert_allclose(losses(run), losses(bench.twin), rtol=1e-5)


@pytest.mark.parametrize("assignment", ["contiguous", "owner"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_every_world_size_and_micro_batch(benches: Callable[[str], Bench], way: str, world: int,
                                          assignment: str) -> None:
    """1 to 4 ranks by micro-batches of 1, 3 and 10, either assignment: the samples, views and losses of one rank."""
    here = benches(way)
    for micro_batch in (1, 3, 10):
        run = here.run()
        run.go(f"micro_batch={micro_batch}", f"data.assignment={assignment}", world=world).check()
        check_same(run, here)


@pytest.mark.parametrize("assignment", ["contiguous", "owner"])
@pytest.mark.parametrize(("before", "after"), [pair for pair in itertools.product([1, 2, 3, 4], repeat=2)
                                               if pair[0] != pair[1]])
def test_every_switch_in_an_epoch(benches: Callable[[str], Bench], before: int, after: int, assignment: str) -> None:
    """From each number of ranks to each other, after each step of an epoch: nothing changes."""
    here = benches("everything")
    for step in range(2, 6):
        run = here.run()
        words = [f"data.assignment={assignment}", "micro_batch=3"]
        stopped = run.go(*words, "fault.kind=signal", f"fault.step={step}", world=before)
        assert set(stopped.codes) == {75}, stopped.output
        run.go(*words, world=after).check()
        check_same(run, here)


KILLED: dict[str, tuple[str, list[str]]] = {
    "contiguous": ("everything", []), "grey": ("everything, grey", []), "trivial": ("trivial", []),
    "owner": ("everything", ["data.assignment=owner"]),
    "disk": ("everything", ["data.assignment=owner", "data.cache=disk"]),
    "raw": ("everything, raw", []),
    "raw, ram": ("everything, raw", ["data.assignment=owner", "data.cache=ram"]),
    "raw, gpu": ("everything, raw", ["data.assignment=owner", "data.cache=gpu"]),
}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", KILLED)
def test_killed_after_every_step(tmp_path: Path, case: str, world: int) -> None:
    """All ranks SIGKILLed after every step of one run in bf16, the same command again: the bits of one that never
    was, which had no cache."""
    way, words = KILLED[case]
    changes = {**SHORT, **WAYS[way], "checkpoint__steps": 1}
    if words:
        changes["data__assignment"] = "owner"
    if "data.cache=disk" in words:
        words = [*words, f"data.cache_dir={tmp_path}"]
    here = Bench(tmp_path, world=world, held_out=30, changes=changes)
    run = here.run()
    for step in range(1, 11):
        result = run.go(*words, *fault("kill", step=step))
        assert result.codes == [-9] * world, result.output
    last = run.go(*words)
    assert resumed_at(last.output) is not None or "is finished" in last.output
    last.check()
    here.check_equal(run)
