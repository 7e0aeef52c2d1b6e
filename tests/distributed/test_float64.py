"""The gradient formula in float64: DDP, parts and micro-batches only move the order of sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pieces

STEPS = 20
FLOAT64 = 1e-9  # relative, the design's bound


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 10), (1, 3), (2, 3), (3, 2), (4, 10)])
def test_float64_is_the_formula_on_any_number_of_ranks(world: int, micro_batch: int) -> None:
    """Losses and weights of 20 steps (dropout, momentum, a last batch of 6) are plain torch's to 1e-9."""
    check(pieces.train_by_the_formula(STEPS), pieces.on_ranks(pieces.train_in_float64, STEPS, micro_batch, world=world))


def test_damaged_samples_weigh_nothing_on_any_number_of_ranks() -> None:
    """Without three damaged samples, losses divided by the planned batch size: 3 ranks' weights are the formula's."""
    damaged = (3, 11, 20)
    check(pieces.train_by_the_formula(STEPS, damaged=damaged),
          pieces.on_ranks(pieces.train_in_float64, STEPS, 2, (-1, -1), damaged, world=3))


def check(formula: tuple[list[float], dict[str, Any]], found: list[Any]) -> None:
    losses, weights = formula
    for rank, (rank_losses, rank_weights, skipped) in enumerate(found):
        np.testing.assert_allclose(rank_losses, losses, rtol=FLOAT64, err_msg=f"rank {rank}")
        assert skipped == [0, 0]
        for name, expected in weights.items():
            np.testing.assert_allclose(rank_weights[name], expected, rtol=0, atol=FLOAT64 * np.abs(expected).max(),
                                       err_msg=f"rank {rank} {name}")
            assert rank_weights[name].tobytes() == found[0][1][name].tobytes(), "ranks hold different weights"
