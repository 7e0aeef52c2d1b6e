"""Users' mistakes and machines' faults: one clear message, no traceback, exit code 2, and nothing lost."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

import bad_inputs
import harness
from alexnet_ddp.checkpoint import choose, store
from bad_inputs import REFUSED, messages
from twins import Run, launched


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bad_inputs.make_material(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def kept(recipe: Path) -> Path:
    """A run that was stopped in the middle: what a mistake in its next start must not touch."""
    result = harness.run(["train", str(recipe), "name=kept", "fault.kind=signal", "fault.step=3"], world=2)
    assert set(result.codes) == {75}, result.output
    return recipe.parent / "runs" / "kept"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_one_message(output: str, *says: str) -> None:
    assert "Traceback" not in output and "Error:" not in output, output
    found = messages(output)
    assert len(found) == 1, output
    told = output[output.index(found[0]):]
    assert all(part in told for part in says), output
    assert len(told.strip().splitlines()) <= 5, "a message is short"


# One of each kind; all of them, through torchrun and through our launcher, are drills.
@pytest.mark.parametrize("what", ["unknown key", "wrong type", "missing training data", "empty class",
                                  "wrong number of classes", "half a tar", "no GPU here", "image too small",
                                  "a sample alone in a batch norm"])
def test_refused(recipe: Path, kept: Path, what: str) -> None:
    """Each mistake, in the restart of a run with checkpoints: said once by two ranks, code 2, the run as it was."""
    case, before = REFUSED[what], contents(kept)
    name = "new" if case.new_run else "kept"
    result = harness.run(["train", str(recipe), f"name={name}", *case.words(recipe.parent)], world=2)
    assert result.codes == [2, 2], result.output
    check_one_message(result.output, *case.says)
    assert contents(kept) == before
    assert not list(recipe.parent.glob("runs/new/checkpoints/*"))


@pytest.mark.parametrize("what", ["missing training data", "image too small", "no GPU here"])
def test_refused_in_a_slurm_job(recipe: Path, what: str) -> None:
    """A mistake found before the ranks meet, before the directory is taken or after: state.json tells it for this job.
    """
    case, name = REFUSED[what], "refused_" + what.replace(" ", "_")
    result = harness.run(["train", str(recipe), f"name={name}", *case.words(recipe.parent)], world=2,
                         environment={"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"})
    assert result.codes == [2, 2], result.output
    check_one_message(result.output, *case.says)
    state = json.loads((recipe.parent / "runs" / name / "state.json").read_text())
    assert (state["status"], state["job"], state["restart"]) == ("failed", "77", 1)
    assert state["failure"]["kind"] == "user" and all(part in state["failure"]["cause"] for part in case.says)
    assert not (recipe.parent / "runs" / name / "lease.json").exists()


def test_what_is_left_goes_on(recipe: Path, kept: Path) -> None:
    """After all those mistakes the right command finishes the run."""
    assert choose.choose(kept / "checkpoints").path is not None
    harness.run(["train", str(recipe), "name=copy", "epochs=1"], world=2).check()


def test_ranks_that_cannot_meet(recipe: Path) -> None:
    """Started by hand without an address, or with a port that is taken: told by rank 0, with what ranks need."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for wrong in ({"MASTER_ADDR": ""}, {"MASTER_PORT": str(taken.getsockname()[1])}):
            result = harness.run(["train", str(recipe), "name=lonely"], world=1,
                                 environment={"WORLD_SIZE": "2", **wrong})
            assert result.codes == [2], result.output
            check_one_message(result.output, "2 ranks could not meet", "MASTER_ADDR", "torchrun")


@pytest.mark.parametrize("which", ["train", "val"])
def test_a_damaged_image_in_mid_run(recipe: Path, which: str) -> None:
    """A truncated JPEG met in training, or in the evaluation: named with its file, what was saved before is intact."""
    damaged = bad_inputs.truncate_one(recipe.parent / which, f"damaged_{which}")
    name = f"damaged_{which}"
    result = harness.run(["train", str(recipe), f"name={name}", f"data.{which}={damaged.parents[1]}",
                          "checkpoint.steps=1"], world=2)
    assert result.codes == [2, 2], result.output
    check_one_message(result.output, "Damaged image", str(damaged), "Replace or remove that file")
    state = json.loads((recipe.parent / "runs" / name / "state.json").read_text())
    assert state["status"] == "failed" and str(damaged) in state["why"]
    left = choose.choose(recipe.parent / "runs" / name / "checkpoints").path
    assert left is not None
    store.verify(left)


def test_a_changed_recipe_and_changed_data(recipe: Path, kept: Path) -> None:
    """Another learning rate, or data with an image less, for a run that has begun: refused with the ways out."""
    result = harness.run(["train", str(recipe), "name=kept", "optim.lr=0.5"], world=2)
    assert result.codes == [2, 2]
    check_one_message(result.output, "optim.lr: 0.02 -> 0.5", "name=kept_2", "--fresh", "--accept-changes")
    fewer = harness.make_images(recipe.parent / "fewer", samples=22)
    result = harness.run(["train", str(recipe), "name=kept", f"data.train={fewer}"], world=2)
    assert result.codes == [2, 2]
    check_one_message(result.output, "other samples", "name=...")


def test_a_second_run_in_the_same_directory(recipe: Path) -> None:
    """While a run is alive, the same command again is refused at once, and the first doesn't notice."""
    first = harness.start(["train", str(recipe), "name=busy", "epochs=3000", "schedule.name=constant"], world=2)
    first.wait_for("step 4/")
    second = harness.run(["train", str(recipe), "name=busy", "epochs=3000", "schedule.name=constant"], world=2,
                         environment={"SLURM_JOB_ID": "77"})
    assert second.codes == [2, 2], second.output
    check_one_message(second.output, "is in use", "name=...")
    state = json.loads((recipe.parent / "runs" / "busy" / "state.json").read_text())
    assert (state["status"], state["job"]) == ("running", None)  # the first one's
    first.signal(15, rank=0)
    assert set(first.wait().codes) == {75}


def test_a_read_only_place(recipe: Path) -> None:
    """A file system that is mounted read-only, or has become so: refused before a step."""
    with bad_inputs.mounted(recipe.parent / "read_only", "ro") as place:
        result = harness.run(["train", str(recipe), f"runs={place}"], world=2)
        assert result.codes == [2, 2], result.output
        check_one_message(result.output, "Read-only file system", "runs=")


def test_a_disk_too_small(recipe: Path) -> None:
    """Less free than the checkpoints take: refused before the first step with both numbers, nothing half-written."""
    with bad_inputs.mounted(recipe.parent / "small", "size=400k") as place:
        result = harness.run(["train", str(recipe), f"runs={place}"], world=2)
        assert result.codes == [2, 2], result.output
        check_one_message(result.output, "not enough space", "needed", "free")
        assert not list(place.rglob("*.safetensors"))


def test_a_full_disk(recipe: Path) -> None:
    """Not a byte free at the start: refused, and the place named."""
    with bad_inputs.mounted(recipe.parent / "full", "size=64k") as place:
        bad_inputs.fill(place)
        result = harness.run(["train", str(recipe), f"runs={place}"], world=2)
        assert result.codes == [2, 2], result.output
        check_one_message(result.output, "No space left on device", str(place))


@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_a_disk_that_fills_up_in_mid_run(recipe: Path, tensorboard: str) -> None:
    """Training goes on over two failed saves, told; the third ends it, named; room made, the same command goes on."""
    with bad_inputs.mounted(recipe.parent / f"fills_{tensorboard}", "size=8m") as place:
        words = ["train", str(recipe), f"runs={place}", "name=r", "schedule.name=constant", "optim.lr=0.001",
                 "checkpoint.steps=10", "checkpoint.epochs=null", "log.trace=false", f"log.tensorboard={tensorboard}",
                 "data.val=null"]
        ranks = harness.start([*words, "epochs=3000"], world=2)
        ranks.wait_for("step 20/")
        ballast = bad_inputs.fill(place)
        result = ranks.wait(timeout=60)
        assert set(result.codes) == {1}, result.output
        told = [line for line in result.output.splitlines() if "was not saved" in line]
        assert [f"failure {number} in a row" in line for number, line in enumerate(told, 1)] == [True] * 3
        check_one_message(result.output, "No space left on device", "older ones are intact")
        assert messages(result.output)[0] == result.output.strip().splitlines()[-1]

        run = place / "r"
        left = choose.choose(run / "checkpoints").path
        assert left is not None
        store.verify(left)
        assert not (run / "lease.json").exists()
        os.unlink(ballast)
        state = json.loads((run / "state.json").read_text())
        assert state["status"] in ("failed", "running")  # a disk without a byte can't take the word
        steps = int(left.name.removeprefix("step_")) // 3 + 2
        again = harness.run([*words, f"epochs={steps}"], world=2).check()
        assert f"goes on at step {int(left.name.removeprefix('step_'))} " in again.output
        written = harness.metrics(run)
        assert [record["step"] for record in written] == sorted({record["step"] for record in written})


def test_a_last_save_that_fails_is_no_success(recipe: Path) -> None:
    """A run asked to stop on a disk that has filled up ends with a failure that says so, never as saved."""
    with bad_inputs.mounted(recipe.parent / "last", "size=8m") as place:
        ranks = harness.start(["train", str(recipe), f"runs={place}", "name=r", "epochs=3000", "log.trace=false",
                               "schedule.name=constant", "optim.lr=0.001", "checkpoint.steps=null",
                               "checkpoint.epochs=null", "data.val=null"], world=2)
        ranks.wait_for("step 10/")
        bad_inputs.fill(place)
        ranks.signal(15, rank=0)
        result = ranks.wait(timeout=60)
        assert set(result.codes) == {1}, result.output
        assert "stopped by" not in result.output
        check_one_message(result.output, "was not saved", "No space left on device")


def test_through_the_launcher(recipe: Path, kept: Path) -> None:
    """`alexnet-ddp train --nproc-per-node 2`: the same one message, exit code 2, not a word of torchrun's."""
    case, before = REFUSED["empty class"], contents(kept)
    command = launched(Run(recipe, name="kept", world=2), *case.words(recipe.parent))
    assert command.wait() == 2
    check_one_message(command.output(), *case.says)
    assert command.output().startswith("alexnet-ddp: error: ")
    assert contents(kept) == before
