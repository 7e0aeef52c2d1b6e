"""Infinite gradients: skipped on all ranks alike, counted, never saved; logged norms are the true ones."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import harness
import pieces
from alexnet_ddp.checkpoint import choose, store

LAST = "step_00000006"  # of two epochs of three steps


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nonfinite")
    return harness.tiny_recipe(folder, train=harness.make_images(folder / "train", samples=23), log__steps=1,
                               checkpoint__steps=1, checkpoint__keep=10)


def run(recipe: Path, name: str, *words: str, world: int = 3) -> tuple[harness.Result, Path]:
    return harness.run(["train", str(recipe), f"name={name}", *words], world=world), recipe.parent / "runs" / name


def tensors(checkpoint: Path, kind: str) -> dict[str, Any]:
    """Weights ("model") or momentum ("optimizer") by name."""
    return load_file(checkpoint / f"{kind}.safetensors")


def column(run: Path, name: str) -> list[Any]:
    return [record[name] for record in harness.metrics(run)]


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_one_inf_on_one_rank_is_one_skipped_update(recipe: Path, amp: str) -> None:
    """An infinite batch on rank 1 of 3 in step 3: exactly one update is skipped, all others are made and finite."""
    result, path = run(recipe, f"inf_{amp}", f"amp={amp}", "fault.kind=inf", "fault.rank=1", "fault.step=3")
    result.check()
    assert column(path, "skipped") == [0, 0, 0, 1, 1, 1]
    assert [step for step, loss in enumerate(column(path, "loss")) if loss is None] == [3]  # strict JSON has no nan
    assert [step for step, norm in enumerate(column(path, "grad_norm")) if norm is None] == [3]
    kinds: dict[str, list[dict[str, Any]]] = {"model": [], "optimizer": []}
    for step in range(7):
        checkpoint = path / "checkpoints" / f"step_{step:08d}"
        store.verify(checkpoint)
        for kind in kinds:
            kinds[kind].append(tensors(checkpoint, kind))
    for kind, states in kinds.items():
        assert all(np.isfinite(value).all() for state in states for value in state.values())
        moved = [any(not np.array_equal(after[name], before[name]) for name in after)
                 for before, after in zip(states, states[1:], strict=False)]
        assert moved == [True, True, True, False, True, True], kind  # the skipped step moves nothing at all


def test_the_count_survives_a_resume(recipe: Path) -> None:
    """One epoch with a skipped update, then a second one on another number of ranks: it still tells of one."""
    words = ["schedule.name=constant", "schedule.warmup_epochs=0"]
    result, path = run(recipe, "counted", *words, "epochs=1", "fault.kind=inf", "fault.rank=1", "fault.step=1")
    result.check()
    run(recipe, "counted", *words, "epochs=2", world=2)[0].check()
    assert column(path, "skipped") == [0, 1, 1, 1, 1, 1]


def test_checkpoints_and_a_kill_within_the_window_of_the_inf(recipe: Path) -> None:
    """Saved and killed while the open logging window holds an infinite loss: bit-equal to the run that wasn't."""
    words = ["log.steps=4", "fault.step=2", "fault.rank=1"]
    result, straight = run(recipe, "window", *words, "fault.kind=inf")
    result.check()
    assert column(straight, "skipped") == [1, 1] and column(straight, "loss")[0] is None
    stopped = harness.start(["train", str(recipe), "name=window_killed", *words, "fault.kind=inf"], world=3)
    while not list((recipe.parent / "runs").glob("window_killed/checkpoints/step_00000003")):
        assert stopped.processes[0].is_alive(), stopped.output()
    for rank in range(3):
        stopped.signal(signal.SIGKILL, rank=rank)
    stopped.wait()
    killed = run(recipe, "window_killed", *words)  # the step of the inf is behind it
    killed[0].check()
    assert harness.final_files(killed[1]) == harness.final_files(straight)
    assert harness.metrics(killed[1]) == harness.metrics(straight)


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (3, 1), (3, 0)])
def test_weights_stay_equal_on_all_ranks_and_the_others_steps_are_the_formula(world: int, rank: int) -> None:
    """Every rank holds the same finite weights after the inf, which are plain torch's with that one step left out."""
    losses, weights = pieces.train_by_the_formula(8, skip=4)
    found = pieces.on_ranks(pieces.train_in_float64, 8, 3, (4, rank), world=world)
    for rank_losses, rank_weights, skipped in found:
        assert skipped == [1, 0] and not np.isfinite(rank_losses[4])
        np.testing.assert_allclose(rank_losses[:4] + rank_losses[5:], losses[:4] + losses[5:], rtol=1e-9)
        for name, expected in weights.items():
            assert rank_weights[name].tobytes() == found[0][1][name].tobytes()
            np.testing.assert_allclose(rank_weights[name], expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_fewer_in_a_row_than_the_limit_go_on(recipe: Path) -> None:
    """Two in a row under a limit of three: the run finishes, two updates are counted."""
    result, path = run(recipe, "two", "fault.kind=inf", "fault.step=2", "fault.times=2", "fault.rank=2",
                       "limits.nonfinite=3")
    result.check()
    assert column(path, "skipped") == [0, 0, 1, 2, 2, 2]


def test_too_many_in_a_row_end_the_run(recipe: Path) -> None:
    """Three in a row under a limit of three: one clear line, exit code 2, the last good checkpoint is gone on from."""
    result, path = run(recipe, "three", "fault.kind=inf", "fault.step=2", "fault.times=3", "fault.rank=1",
                       "limits.nonfinite=3")
    assert result.codes == [2, 2, 2] and "Traceback" not in result.output
    lines = [line for line in result.output.splitlines() if "failed at step 5" in line]
    assert len(lines) == 1 and "not finite in 3 steps in a row" in lines[0] and "optim.lr" in lines[0]
    state = json.loads((path / "state.json").read_text())
    assert state["status"] == "failed" and state["failure"]["kind"] == "nonfinite"
    chosen = choose.choose(path / "checkpoints").path
    assert chosen is not None and chosen.name <= "step_00000004"
    assert all(np.isfinite(value).all() for value in tensors(chosen, "model").values())
    run(recipe, "three")[0].check()
    assert (path / "checkpoints" / LAST).exists()


def test_a_diverging_run_never_saves_what_is_not_finite(recipe: Path) -> None:
    """A learning rate of 1e30: the run ends by itself, and every checkpoint it left is finite and verifies."""
    result, path = run(recipe, "diverged", "optim.lr=1e30", "schedule.name=constant", "schedule.warmup_epochs=0",
                       "limits.nonfinite=3")
    assert result.codes == [2, 2, 2]
    left = sorted((path / "checkpoints").glob("step_*"))
    assert left
    for checkpoint in left:
        store.verify(checkpoint)
        for kind in ("model", "optimizer"):
            assert all(np.isfinite(value).all() for value in tensors(checkpoint, kind).values())


def one_update(recipe: Path, name: str, *words: str) -> tuple[float, float]:
    """(logged norm, true norm) of a run of one step: without weight decay its momentum is the gradient it used."""
    few = harness.make_images(recipe.parent / "few", samples=10)
    result, path = run(recipe, name, f"data.train={few}", "epochs=1", "optim.weight_decay=0", "schedule.name=constant",
                       "schedule.warmup_epochs=0", *words)
    result.check()
    assert column(path, "skipped") == [0]
    momentum = tensors(path / "checkpoints" / "step_00000001", "optimizer")
    return column(path, "grad_norm")[0], float(np.sqrt(sum((value.astype(np.float64) ** 2).sum()
                                                           for value in momentum.values())))


def test_logged_norms_are_unscaled_and_from_before_clipping(recipe: Path) -> None:
    """fp32, fp16 under a loss scale of 65536, and clipping log the same norm; clipping uses a gradient of its own."""
    logged, used = one_update(recipe, "norm")
    assert logged == pytest.approx(used, rel=1e-5)
    scaled, scaled_used = one_update(recipe, "norm_fp16", "amp=fp16")
    assert scaled == pytest.approx(scaled_used, rel=1e-5) and scaled == pytest.approx(logged, rel=0.05)
    clip = logged / 8
    clipped, clipped_used = one_update(recipe, "norm_clipped", f"clip_norm={clip}")
    assert clipped == pytest.approx(logged, rel=1e-5) and clipped_used == pytest.approx(clip, rel=1e-4)
    both, both_used = one_update(recipe, "norm_both", f"clip_norm={clip}", "amp=fp16")
    assert both == pytest.approx(scaled, rel=1e-5) and both_used == pytest.approx(clip, rel=1e-3)
