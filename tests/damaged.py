"""Runs on data with damaged images: what they list, and what those on other numbers of ranks must share with them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import harness
from twins import Run

FP32 = 1e-5  # relative, the design's bound over the first 20 steps


def listed(run: Run) -> list[dict[str, Any]]:
    """damaged.jsonl without what tells of the attempt."""
    lines = (run.path / "damaged.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in ("attempt", "time")}
            for line in lines]


def tensors(run: Run) -> dict[str, Any]:
    return {f"{path.stem}/{name}": value for path in sorted(run.checkpoints[-1].glob("*.safetensors"))
            if path.stem != "window" for name, value in load_file(path).items()}


def check_same(run: Run, reference: Run, *, in_order: bool = True) -> None:
    """Same samples, losses and norms; same counts to the integer; the same weights but for the order of sums.

    `in_order`: a step's samples come in the same order (not between kinds of assignment).
    """
    mine, theirs = harness.trace(run.path), harness.trace(reference.path)
    assert mine == theirs or (not in_order and {step: sorted(samples) for step, samples in mine.items()} == {
        step: sorted(samples) for step, samples in theirs.items()})
    for found, expected in zip(harness.metrics(run.path), harness.metrics(reference.path), strict=True):
        assert found.keys() == expected.keys()
        for name in found:
            if name in ("loss", "grad_norm"):
                np.testing.assert_allclose(found[name], expected[name], rtol=FP32)
            else:
                assert found[name] == expected[name], name
    weights = tensors(run)
    for name, value in tensors(reference).items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)
    assert listed(run) == listed(reference)
