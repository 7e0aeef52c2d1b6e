"""Exact resume of every way to move weights: quick rows here, all of them in tests/drills/test_recipes.py."""

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

import harness
from alexnet_ddp.checkpoint import store
from recipes import COVERING
from twins import Bench, fault, resumed_at


@pytest.mark.parametrize("row", COVERING)
def test_killed_and_resumed(bench: Callable[..., Bench], row: str) -> None:
    """SIGKILL in mid-epoch, the same command again: weights, optimizer, mean of the weights, metrics and best have the
    bits of the run that was left alone."""
    here = bench(world=2, epochs=2, **COVERING[row])
    run = here.run()
    assert run.go(*fault("kill", step=7)).codes == [-9, -9]
    assert resumed_at(run.go().check().output) in (3, 5, 6)  # a save that was being written is none
    here.check_equal(run)


def test_the_mean_is_what_counts_and_what_is_published(bench: Callable[..., Bench]) -> None:
    """With a mean of the weights both nets are evaluated, the best goes by the mean's top-1, best.safetensors holds it;
    with --accept-changes it can be taken away from a run and added to one, and another optimizer begin at zero."""
    here = bench(world=2, epochs=2, **COVERING["adamw, mean, one_cycle, smoothing"])
    run = here.twin
    record, = [record for record in harness.metrics(run.path) if record["kind"] == "evaluate"]
    assert record["ema_top1"] == record["ema_correct1"] / record["samples"] and "ema_samples" not in record
    assert record["ema_loss"] != record["loss"]
    assert json.loads((run.path / "best.json").read_text())["top1"] == record["ema_top1"]
    state, _ = store.load(run.checkpoints[-1])
    best = load_file(run.path / "best.safetensors")
    assert best.keys() == state.model.keys() and best.keys() >= state.ema.keys() != set()
    assert all(torch.equal(best[name], state.ema[name]) for name in state.ema)
    assert not any(torch.equal(state.model[name], state.ema[name]) for name in state.ema)

    changed = here.run()
    changed.go(*fault("signal", step=3, rank=0))
    without = changed.go("ema.decay=null", "optim.name=sgd", "--accept-changes", *fault("signal", step=6, rank=0))
    assert "exact: no, because optim.name: adamw -> sgd; ema.decay: 0.9 -> null" in without.output
    now, _ = store.load(changed.checkpoints[-1])
    assert now.ema == {} and now.optimizer.keys() == {"momentum_buffer"}
    changed.go("ema.decay=0.9", "optim.name=adamw", "--accept-changes").check()
    last, _ = store.load(changed.checkpoints[-1])
    assert last.ema.keys() == state.ema.keys() and last.optimizer.keys() == state.optimizer.keys()
    assert {float(count) for count in last.optimizer["step"].values()} == {last.step - now.step}


def test_smoothing_reaches_the_training_loss(bench: Callable[..., Bench]) -> None:
    """The very run without label_smoothing logs another training loss from the first window on."""
    here = bench(world=2, epochs=2, **COVERING["adamw, mean, one_cycle, smoothing"])
    plain = here.run()
    plain.go("label_smoothing=0", *fault("signal", step=4, rank=0))
    found, smoothed = (harness.metrics(run.path)[0] for run in (plain, here.twin))
    assert found["step"] == smoothed["step"] == 4 and found["lr"] == smoothed["lr"]
    assert found["loss"] != smoothed["loss"]
