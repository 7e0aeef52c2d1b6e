"""Every mistake and every bad disk as a user meets them: under a bare torchrun, and through our own launcher."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import bad_inputs
import harness
from alexnet_ddp.checkpoint import choose, store
from bad_inputs import REFUSED, messages
from twins import Command, Run, launched, torchrun

pytestmark = [pytest.mark.drill, pytest.mark.timeout(300)]

LAUNCHERS: dict[str, Callable[..., Command]] = {"torchrun": torchrun, "launcher": launched}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bad_inputs.make_material(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def kept(recipe: Path) -> Path:
    """A run that was stopped in the middle."""
    result = harness.run(["train", str(recipe), "name=kept", "fault.kind=signal", "fault.step=3"], world=2)
    assert set(result.codes) == {75}, result.output
    return recipe.parent / "runs" / "kept"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def go(how: str, recipe: Path, name: str, *words: str) -> Command:
    log = recipe.parent / f"{name}.log"
    log.unlink(missing_ok=True)
    return LAUNCHERS[how](Run(recipe, name=name, world=2), *words)


def check_one_message(how: str, command: Command, *says: str, code: int = 2) -> str:
    """One message and no traceback of ours; the exit code is ours through the launcher and 1 under torchrun."""
    assert command.wait() == (code if how == "launcher" else 1), command.output()
    output = command.output()
    ours = output if how == "launcher" else output.partition("W1")[0].partition("E1")[0].partition("Traceback")[0]
    assert "Traceback" not in ours
    if how == "torchrun":  # its own report, with a traceback of its own, comes after ours
        assert output.count("Traceback") == 1 and "ChildFailedError" in output[output.index("Traceback"):]
        assert "ChildFailedError" not in output[: output.index("Traceback")]
    found = messages(output)
    assert len(found) == 1, output
    assert all(part in output for part in says), output
    return found[0]


@pytest.mark.parametrize("how", LAUNCHERS)
@pytest.mark.parametrize("what", REFUSED)
def test_refused(recipe: Path, kept: Path, what: str, how: str) -> None:
    """Each mistake in the restart of a run: said once, non-zero, every byte of the run as it was."""
    case, before = REFUSED[what], contents(kept)
    command = go(how, recipe, "new" if case.new_run else "kept", *case.words(recipe.parent))
    check_one_message(how, command, *case.says)
    assert contents(kept) == before
    assert not list(recipe.parent.glob("runs/new/checkpoints/*"))


@pytest.mark.parametrize("how", LAUNCHERS)
@pytest.mark.parametrize("which", ["train", "val"])
def test_a_damaged_image(recipe: Path, which: str, how: str) -> None:
    """A truncated JPEG met in mid-run ends it on all ranks, named once, with the checkpoints before it intact."""
    name = f"damaged_{which}_{how}"
    damaged = bad_inputs.truncate_one(recipe.parent / which, name)
    command = go(how, recipe, name, f"data.{which}={damaged.parents[1]}", "checkpoint.steps=1")
    told = check_one_message(how, command, "Damaged image", str(damaged))
    run = recipe.parent / "runs" / name
    assert json.loads((run / "state.json").read_text())["why"] == told
    left = choose.choose(run / "checkpoints").path
    assert left is not None
    store.verify(left)


@pytest.mark.parametrize("how", LAUNCHERS)
def test_a_second_run_in_the_same_directory(recipe: Path, how: str) -> None:
    """Refused while the first is alive; the first goes on and is stopped in good order."""
    name, words = f"busy_{how}", ["epochs=3000", "schedule.name=constant", "optim.lr=0.001"]
    first = go(how, recipe, name, *words)
    try:
        first.wait_for("step 4/")
        second = Command(first.process.args[3:], log=recipe.parent / f"{name}_second.log")  # type: ignore[index,arg-type]
        check_one_message(how, second, "is in use")
        first.process.send_signal(signal.SIGTERM)
        first.process.wait(60)
        assert json.loads((recipe.parent / "runs" / name / "state.json").read_text())["status"] == "preempted"
    finally:
        first.kill()


@pytest.mark.parametrize("how", LAUNCHERS)
def test_bad_disks(recipe: Path, how: str) -> None:
    """Read-only, too small, full from the start: refused; full later: a clear end after a while, then on again."""
    with bad_inputs.mounted(recipe.parent / f"ro_{how}", "ro") as place:
        check_one_message(how, go(how, recipe, "r", f"runs={place}"), "Read-only file system")
    with bad_inputs.mounted(recipe.parent / f"small_{how}", "size=400k") as place:
        check_one_message(how, go(how, recipe, "r", f"runs={place}"), "not enough space")
    with bad_inputs.mounted(recipe.parent / f"full_{how}", "size=64k") as place:
        bad_inputs.fill(place)
        check_one_message(how, go(how, recipe, "r", f"runs={place}"), "No space left on device")
    with bad_inputs.mounted(recipe.parent / f"later_{how}", "size=8m") as place:
        words = [f"runs={place}", "schedule.name=constant", "optim.lr=0.001", "checkpoint.steps=10",
                 "log.trace=false", "log.tensorboard=true", "data.val=null"]
        command = go(how, recipe, "r", *words, "epochs=3000")
        command.wait_for("step 20/")
        ballast = bad_inputs.fill(place)
        check_one_message(how, command, "failure 3 in a row", "older ones are intact", code=1)
        left = choose.choose(place / "r" / "checkpoints").path
        assert left is not None
        store.verify(left)
        os.unlink(ballast)
        steps = int(left.name.removeprefix("step_")) // 3 + 2
        assert go(how, recipe, "r", *words, f"epochs={steps}").wait() == 0
