"""A rank that dies, hangs, raises or runs out of memory: the job is gone soon, and its last line says who and why."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import harness
from alexnet_ddp.checkpoint import choose, store
from twins import in_sessions

GONE = 60.0  # seconds until nothing of a failed job is left
QUICK = ["limits.step=3", "limits.first_step=20"]  # seconds without progress, so that a test needn't wait for 45


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    return harness.tiny_recipe(
        folder, train=harness.make_images(folder / "train", samples=23),
        val=harness.make_images(folder / "val", samples=200, seed=1), evaluate__batch=1)


def fail(recipe: Path, name: str, *words: str, world: int = 3) -> harness.Result:
    ranks = harness.start(["train", str(recipe), f"name={name}", *QUICK, *words], world=world)
    result = ranks.wait(timeout=GONE)
    assert in_sessions(ranks.pids) == [], "a process was left behind"
    return result


def check_told(result: harness.Result, run: Path, *, rank: int, step: int, cause: str, kind: str, code: int = 1
               ) -> dict[str, Any]:
    """One line for all ranks, at the very end, with rank, host, step and cause; the same in errors/ and state.json."""
    lines = result.output.strip().splitlines()
    told = [line for line in lines if " failed at step " in line]
    assert len(told) == 1 and told[0] == lines[-1], result.output
    found = re.fullmatch(r"alexnet-ddp: rank (\d+) on (\S+) failed at step (\d+): (.*)", told[0])
    assert found is not None, told[0]
    assert int(found[1]) == rank and int(found[3]) == step and re.search(cause, found[4]), told[0]

    (file,) = (run / "errors").glob("*.json")
    error: dict[str, Any] = json.loads(file.read_text())
    assert file.name == f"rank_{rank}.json"
    assert (error["rank"], error["host"], error["step"], error["kind"]) == (rank, found[2], step, kind)
    assert {exit_code for exit_code in result.codes if exit_code != -9} == {code}, result.codes
    if result.codes[0] != -9:  # rank 0 writes it
        state = json.loads((run / "state.json").read_text())
        assert state["status"] == "failed" and state["why"] == told[0]
        assert state["failure"] == {name: error[name] for name in ("rank", "host", "step", "cause", "kind")}
        assert not (run / "lease.json").exists()
    return error


@pytest.mark.parametrize(("rank", "words"), [(1, ["fault.kind=error", "fault.step=4"]),
                                             (2, ["fault.kind=oom", "fault.step=4"]),
                                             (0, ["fault.kind=error", "fault.step=4"])])
def test_state_is_written_before_a_rank_leaves(recipe: Path, rank: int, words: list[str]) -> None:
    """When all others are killed at once as the first rank leaves (srun --kill-on-bad-exit), state.json has it all."""
    run = recipe.parent / "runs" / f"killed_by_srun{rank}"
    ranks = harness.start(["train", str(recipe), f"name={run.name}", *QUICK, *words, f"fault.rank={rank}"], world=3)
    while all(process.is_alive() for process in ranks.processes):
        time.sleep(0.001)
    for process in ranks.processes:
        process.kill()
    result = ranks.wait()
    state = json.loads((run / "state.json").read_text())
    assert state["status"] == "failed" and state["failure"]["rank"] == rank, result.output
    assert not (run / "lease.json").exists()
    assert result.codes[rank] in (1, 2)  # it left first


def check_goes_on(recipe: Path, name: str) -> None:
    """What was saved verifies, and the same command without the fault finishes the run."""
    run = recipe.parent / "runs" / name
    chosen = choose.choose(run / "checkpoints")
    assert chosen.path is not None
    store.verify(chosen.path)
    result = harness.run(["train", str(recipe), f"name={name}"], world=3).check()
    assert "exact: yes" in result.output
    state = json.loads((run / "state.json").read_text())
    assert (state["status"], state["failure"], state["nodes"]) == ("finished", None, 1)
    assert state["step_seconds"] > 0 and state["save_seconds"] > 0


@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize(("fault", "cause", "kind", "code"), [
    ("kill", r"its process is gone \(killed, or out of memory\)", "dead", 1),
    ("error", r"RuntimeError: this error was asked for", "bug", 1),
    ("oom", r"out of memory with micro_batch=3, peak \d+ MB\. Set micro_batch=1; the global batch stays 10", "memory",
     2),
    ("hang", r"no progress for \d+ s in stage 'log'", "hung", 1),  # after the line of step 4
])
def test_one_of_three_ranks_fails(recipe: Path, fault: str, cause: str, kind: str, code: int, rank: int) -> None:
    """SIGKILL, an exception, out of memory, a hang on one of three ranks: named, all gone, the run can go on."""
    name = f"{fault}{rank}"
    result = fail(recipe, name, f"fault.kind={fault}", "fault.step=4", f"fault.rank={rank}")
    error = check_told(result, recipe.parent / "runs" / name, rank=rank, step=4, cause=cause, kind=kind, code=code)
    if fault == "hang":
        assert "time.sleep(3600)" in error["detail"] and "time.sleep(3600)" in result.output  # where it hangs
    if fault in ("kill", "oom"):
        assert "Traceback" not in result.output
    check_goes_on(recipe, name)


@pytest.mark.parametrize("rank", [1, 0])
def test_a_stopped_process_is_named_and_ended(recipe: Path, rank: int) -> None:
    """SIGSTOP on one of three ranks (rank 0 hosts the store, too): named by the others, who don't leave it behind."""
    name = f"stopped{rank}"
    ranks = harness.start(["train", str(recipe), f"name={name}", *QUICK, "epochs=2000"], world=3)
    ranks.wait_for("step 6/")
    ranks.signal(signal.SIGSTOP, rank=rank)
    result = ranks.wait(timeout=GONE)
    step = int(re.findall(r"failed at step (\d+)", result.output)[0])
    check_told(result, recipe.parent / "runs" / name, rank=rank, step=step, kind="hung",
               cause=r"its process is stopped \(SIGSTOP\)")
    assert result.codes[rank] == -9


def test_a_suspended_job_goes_on(recipe: Path) -> None:
    """SIGSTOP on all ranks for longer than the limit, then SIGCONT, as a scheduler does it: the run goes on."""
    words = ["train", str(recipe), "name=suspended", *QUICK, "epochs=2000", "schedule.name=constant"]
    ranks = harness.start(words, world=3)
    ranks.wait_for("step 6/")
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in range(3):
            ranks.signal(number, rank=rank)
        time.sleep(6 if number == signal.SIGSTOP else 0)
    before = ranks.output().count("epoch ")
    while ranks.output().count("epoch ") < before + 5:
        assert all(process.is_alive() for process in ranks.processes), ranks.output()
        time.sleep(0.05)
    ranks.signal(signal.SIGTERM, rank=0)
    assert set(ranks.wait(timeout=GONE).codes) == {75}


@pytest.mark.parametrize("rank", [2, 0])
def test_a_hang_in_an_evaluation(recipe: Path, rank: int) -> None:
    """A rank that hangs within an evaluation is named, not one of those that wait for it."""
    name = f"evaluation{rank}"
    result = fail(recipe, name, "fault.kind=hang", "fault.at=evaluate", "fault.step=3", f"fault.rank={rank}")
    check_told(result, recipe.parent / "runs" / name, rank=rank, step=3, kind="hung",
               cause=r"no progress for \d+ s in stage 'evaluate'")
    check_goes_on(recipe, name)


def test_an_error_in_an_evaluation_and_one_in_a_save(recipe: Path) -> None:
    """Exceptions at the other places where ranks wait for each other end the job as quickly."""
    result = fail(recipe, "evaluation_error", "fault.kind=error", "fault.at=evaluate", "fault.step=3", "fault.rank=1")
    check_told(result, recipe.parent / "runs" / "evaluation_error", rank=1, step=3, cause="RuntimeError", kind="bug")
    result = fail(recipe, "save_error", "fault.kind=error", "fault.at=save", "fault.step=3", "fault.rank=0")
    check_told(result, recipe.parent / "runs" / "save_error", rank=0, step=3, cause="RuntimeError", kind="bug")
    check_goes_on(recipe, "save_error")


def test_nothing_is_said_after_the_failure(recipe: Path) -> None:
    """A save under way that fails while the job does: the line that names the rank is the last one all the same."""
    ranks = harness.start(["train", str(recipe), "name=last_word", *QUICK, "fault.kind=slow", "fault.at=save",
                           "fault.step=4", "fault.seconds=6", "checkpoint.steps=4"], world=3)
    ranks.wait_for("step 6/")
    run = recipe.parent / "runs" / "last_word"
    staged, = (run / "checkpoints").glob(".tmp-*")
    shutil.rmtree(staged)  # as if the disk had lost it
    ranks.signal(signal.SIGKILL, rank=1)
    result = ranks.wait(timeout=GONE)
    step = int(re.findall(r"failed at step (\d+)", result.output)[0])
    check_told(result, run, rank=1, step=step, cause="its process is gone", kind="dead")
    assert not (run / "checkpoints" / "step_00000004").exists()


def test_a_rank_that_dies_while_setting_up(recipe: Path) -> None:
    """SIGKILL before the first step, while the others wait in the set-up: still one line that names the rank."""
    ranks = harness.start(["train", str(recipe), "name=early", *QUICK, "model.width=1"], world=3)
    while not (recipe.parent / "runs" / "early" / "lease.json").exists():  # making so large a net takes a second
        time.sleep(0.01)
    ranks.signal(signal.SIGKILL, rank=2)
    result = ranks.wait(timeout=GONE)
    check_told(result, recipe.parent / "runs" / "early", rank=2, step=0, cause="its process is gone", kind="dead")


def test_all_ranks_out_of_memory_at_once(recipe: Path) -> None:
    """Every rank fails in the same step: still one line, and one way out."""
    result = fail(recipe, "all_oom", "fault.kind=oom", "fault.step=4", "fault.rank=-1")
    told = [line for line in result.output.splitlines() if " failed at step 4: out of memory" in line]
    assert len(told) == 1 and result.codes == [2, 2, 2]
    assert len(list((recipe.parent / "runs" / "all_oom" / "errors").glob("*.json"))) == 1
