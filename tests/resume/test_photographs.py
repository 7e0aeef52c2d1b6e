"""Real photographs, read in place from a tar: trained on once an epoch each, killed, resumed bit-equal."""

from __future__ import annotations

from pathlib import Path

import harness
import photographs

EPOCHS, IMAGES, STEPS = 3, 700, 11  # steps an epoch


def test_photographs_killed_in_the_second_epoch(tmp_path: Path) -> None:
    """700 ImageNet photographs, two ranks: each trained on once in each epoch, the loss falls, and a run killed in the
    second epoch ends in the weights, metrics, samples and crops of one that was not."""
    tar = photographs.archive("imagenet-sample.tar")
    recipe = harness.tiny_recipe(
        tmp_path, train=Path(f"{tar}::train"), model__num_classes=IMAGES, model__width=0.125, augment__size=112,
        global_batch=64, micro_batch=32, epochs=EPOCHS, amp="bf16", log__steps=STEPS, checkpoint__steps=4,
        optim__lr=0.02)
    whole = ["train", str(recipe), "name=whole"]
    harness.run(whole, world=2).check()
    killed = harness.run(["train", str(recipe), "name=killed", "fault.kind=kill", "fault.rank=-1", "fault.step=17"],
                         world=2)
    assert killed.codes == [-9, -9], killed.output
    harness.run(["train", str(recipe), "name=killed"], world=2).check()

    one, other = tmp_path / "runs/whole", tmp_path / "runs/killed"
    assert harness.final_files(one) == harness.final_files(other)
    assert harness.metrics(one) == harness.metrics(other)
    steps = harness.trace(one)
    assert steps == harness.trace(other) and len(steps) == EPOCHS * STEPS
    for epoch in range(EPOCHS):
        samples = [sample for step in range(epoch * STEPS, (epoch + 1) * STEPS) for sample, _, _ in steps[step]]
        assert sorted(samples) == list(range(IMAGES))
    losses = [record["loss"] for record in harness.metrics(one)]
    assert losses[-1] < losses[0]
