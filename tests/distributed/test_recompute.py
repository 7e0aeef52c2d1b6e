"""memory.checkpoint under DDP: blocks computed again in backward, on two ranks, with accumulation."""

from __future__ import annotations

from pathlib import Path

import harness


def test_two_ranks_move_no_bit(tmp_path: Path) -> None:
    """Batch norm, dropout, bf16, several micro-batches a rank: weights, statistics and momentum after two epochs are
    those of the run that keeps its activations."""
    train = harness.make_images(tmp_path / "train", samples=16)
    recipe = harness.tiny_recipe(tmp_path, train=train, model__name="alexnet_bn", amp="bf16", global_batch=8,
                                 micro_batch=2)
    for name in ("none", "blocks"):
        harness.run(["train", str(recipe), f"name={name}", f"memory.checkpoint={name}"], world=2).check()
    kept, recomputed = (harness.final_files(tmp_path / "runs" / name) for name in ("none", "blocks"))
    assert kept.keys() == recomputed.keys() and len(kept) > 2
    for name, content in kept.items():
        assert content == recomputed[name], name
