"""Augmentation that blends samples with each other: free of ranks, micro-batches and stops, and traced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harness
from alexnet_ddp.data.mixing import draw_mixing
from alexnet_ddp.sections import AugmentSection
from twins import Bench, Run, fault, resumed_at

BLENDED = {"augment__mixup": 0.4, "augment__cutmix": 1.0, "augment__erasing": 0.5, "augment__policy": "randaugment"}
FP32 = 1e-5  # relative, the design's bound over the first 20 steps


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Three epochs of 47 samples by 10 with every kind of randomness, in fp32, and what one rank makes of them."""
    changes = {**BLENDED, "amp": "none", "epochs": 3, "evaluate__epochs": 3, "log__steps": 1, "data__shards": 12,
               "micro_batch": 10}
    return Bench(tmp_path_factory.mktemp("blended"), world=1, held_out=30, changes=changes)


def told(run: Run) -> dict[int, dict[int, dict[str, Any]]]:
    """step -> sample -> all that its trace tells of it, with its partner's view and operations in place of its id."""
    steps: dict[int, dict[int, dict[str, Any]]] = {}
    for path in sorted((run.path / "trace").glob("rank_*.jsonl")):
        for line in path.read_text().splitlines():
            one = json.loads(line)
            of_step = {"share": one["share"], "box": one.get("box")}
            for row, sample in enumerate(one["samples"]):
                own = {name: one[name][row] for name in ("views", "flips", "erased", "policy", "partners")}
                assert steps.setdefault(one["step"], {}).setdefault(sample, own | of_step) == own | of_step
    return steps


def losses(run: Run) -> list[float]:
    return [record["loss"] for record in harness.metrics(run.path) if record["kind"] == "train"]


def check_same(run: Run, bench: Bench) -> None:
    assert told(run) == told(bench.twin)
    np.testing.assert_allclose(losses(run), losses(bench.twin), rtol=FP32)
    counts = [[record["samples"] for record in harness.metrics(which.path)] for which in (run, bench.twin)]
    assert counts[0] == counts[1]


def test_the_trace_tells_what_was_trained_on(bench: Bench) -> None:
    """Every sample once an epoch, with its operations, box and partner (the one before it in its step), and the step's
    share and box; guests are nobody's samples."""
    steps, samples = told(bench.twin), harness.trace(bench.twin.path)
    assert sorted(steps) == list(range(15))
    for epoch in range(3):
        ids = [sample for step in range(5 * epoch, 5 * epoch + 5) for sample in steps[step]]
        assert sorted(ids) == list(range(47))
    section = AugmentSection(size=64, mixup=0.4, cutmix=1.0)
    kinds = set()
    for step, found in steps.items():
        order = [sample for sample, _, _ in samples[step]]
        wanted = draw_mixing(section, seed=3, step=step)
        for sample, partner in zip(order, [order[-1], *order[:-1]], strict=True):
            assert found[sample]["partners"] == partner
            assert found[sample]["share"] == wanted.share
            assert found[sample]["box"] == (list(wanted.box) if wanted.box else None)
        kinds.add(wanted.box is None)
    drawn = [one for found in steps.values() for one in found.values()]
    assert kinds == {True, False} and 0 < sum(any(one["erased"]) for one in drawn) < len(drawn)
    assert len({operation for one in drawn for operation, _, _ in one["policy"]}) == 14


def test_ranks_and_micro_batches_change_nothing(bench: Bench) -> None:
    """3 ranks by micro-batches of 2, stopped in mid-epoch and gone on with by 2 ranks: one rank's blends and losses."""
    run = bench.run()
    stopped = run.go("micro_batch=2", "fault.kind=signal", "fault.step=7", world=3)
    assert set(stopped.codes) == {75}, stopped.output
    run.go("micro_batch=2", world=2).check()
    check_same(run, bench)


def test_owners_read_their_guests(bench: Bench, tmp_path: Path) -> None:
    """Under owner assignment partners are of other ranks' shards: blends and losses are those of one rank, through a
    cache of the rank's own, killed on the way, and each rank is only told to have trained on its own."""
    run = bench.run()
    words = ["data.assignment=owner", "micro_batch=3", "data.cache=disk", f"data.cache_dir={tmp_path}"]
    assert run.go(*words, *fault("kill", step=8), world=3).codes == [-9] * 3
    run.go(*words, world=3).check()
    check_same(run, bench)
    ids = [{sample for line in (run.path / "trace" / f"rank_{rank}.jsonl").read_text().splitlines()
            for sample in json.loads(line)["samples"]} for rank in range(3)]
    assert sum(len(part) for part in ids) == len(set.union(*ids)) == 47


def test_raw_records_in_the_device_s_memory(tmp_path: Path) -> None:
    """data.cache=gpu keeps a rank's own records; guests of other ranks are sent in every epoch, and the weights are
    those without a cache, to the bit."""
    here = Bench(tmp_path, world=2, held_out=30, changes={**BLENDED, "data__stored": "raw73", "epochs": 2,
                                                           "data__assignment": "owner"})
    run = here.run()
    run.go("data.cache=gpu").check()
    here.check_equal(run)


def test_killed_and_resumed(tmp_path: Path) -> None:
    """Three ranks in bf16, TrivialAugment, killed and stopped within epochs: the weights of a run that never was."""
    changes = {**BLENDED, "augment__policy": "trivial", "label_smoothing": 0.1, "epochs": 2}
    here = Bench(tmp_path, world=3, held_out=30, changes=changes)
    run = here.run()
    assert run.go(*fault("kill", step=4)).codes == [-9] * 3
    assert run.go(*fault("signal", step=6, rank=1)).codes == [75] * 3
    assert resumed_at(run.go().check().output) == 7
    here.check_equal(run)
    assert told(run) == told(here.twin)
