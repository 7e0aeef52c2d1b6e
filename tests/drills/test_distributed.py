"""The full matrices of world sizes, switches and failures, under real torchrun where a user would use it."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from typing import Any

import numpy as np
import pytest

import harness
from alexnet_ddp.checkpoint import choose, store
from twins import Bench, Command, Run, launched, torchrun

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]

QUICK = ["limits.step=3", "limits.first_step=60"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Four epochs of 47 samples by 10 with every kind of randomness, in fp32, and what one rank makes of them."""
    changes = {"amp": "none", "log__steps": 1, "data__shards": 12}
    return Bench(tmp_path_factory.mktemp("worlds"), world=1, changes=changes)


def losses(run: Run) -> list[float]:
    return [record["loss"] for record in harness.metrics(run.path) if record["kind"] == "train"]


def check_same(run: Run, bench: Bench) -> None:
    assert harness.trace(run.path) == harness.trace(bench.twin.path)
    np.testing.assert_allclose(losses(run), losses(bench.twin), rtol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 10])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_world_size_and_micro_batch(bench: Bench, world: int, micro_batch: int) -> None:
    """1 to 4 ranks by micro-batches of 1, 2, 3 and 10: the samples, views and losses of one rank."""
    run = bench.run()
    run.go(f"micro_batch={micro_batch}", world=world).check()
    check_same(run, bench)


@pytest.mark.parametrize(("before", "after"), [pair for pair in itertools.product([1, 2, 3, 4], repeat=2)
                                               if pair[0] != pair[1]])
def test_every_switch_at_every_place_of_an_epoch(bench: Bench, before: int, after: int) -> None:
    """From each number of ranks to each other, at five places of an epoch of five steps: nothing changes."""
    for step in range(3, 8):
        run = bench.run()
        stopped = run.go("fault.kind=signal", f"fault.step={step}", world=before)
        assert set(stopped.codes) == {75}, stopped.output
        run.go(world=after).check()
        check_same(run, bench)


# --- failures, as a user meets them -----------------------------------------------------------------------------

FAULTS: dict[str, tuple[list[str], str]] = {
    "kill": (["fault.kind=kill"], "its process is gone"),
    "hang": (["fault.kind=hang"], "no progress for"),
    "hang in evaluation": (["fault.kind=hang", "fault.at=evaluate", "fault.step=10"], "no progress for"),
    "error": (["fault.kind=error"], "RuntimeError: this error was asked for"),
    "oom": (["fault.kind=oom"], "out of memory with micro_batch=3"),
}


def check_told(command: Command, run: Run, *, rank: int, cause: str) -> dict[str, Any]:
    """One line names rank, host, step and cause; it is the last one but for torchrun's own report."""
    output = command.output()
    told = [line for line in output.splitlines() if " failed at step " in line]
    assert len(told) == 1, output
    found = re.fullmatch(r"alexnet-ddp: rank (\d+) on (\S+) failed at step (\d+): (.*)", told[0])
    assert found is not None and int(found[1]) == rank and cause in found[4], told[0]
    ours = [line for line in output.splitlines() if line.startswith(("alexnet-ddp", "epoch"))]
    assert ours[-1] == told[0]
    state = json.loads((run.path / "state.json").read_text())
    if not (rank == 0 and "gone" in cause):
        assert state["status"] == "failed" and state["why"] == told[0]
    error = json.loads((run.path / "errors" / f"rank_{rank}.json").read_text())
    left = choose.choose(run.path / "checkpoints").path
    assert left is not None
    store.verify(left)
    return dict(error)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("what", FAULTS)
def test_one_of_three_ranks_under_torchrun(bench: Bench, what: str, rank: int) -> None:
    """Each fault on each of three ranks: gone within a minute, nothing left running, named, and the run goes on."""
    words, cause = FAULTS[what]
    run = bench.run()
    agent = ("--standalone", "--nproc-per-node=3")
    command = torchrun(run, *QUICK, f"fault.rank={rank}", "fault.step=6", *words, agent=agent)
    assert command.wait(timeout=60 + 30) == 1  # torch's import, and at most a minute from the fault
    check_told(command, run, rank=rank, cause=cause)
    command = torchrun(run, agent=agent, log=run.recipe.parent / "again.log")
    assert command.wait() == 0, command.output()


@pytest.mark.parametrize(("what", "code"), [("kill", 1), ("hang", 1), ("error", 1), ("oom", 2)])
def test_one_of_two_ranks_through_the_launcher(bench: Bench, what: str, code: int) -> None:
    """`alexnet-ddp train --nproc-per-node 2`: the line is the very last, the exit code is ours."""
    words, cause = FAULTS[what]
    run = bench.run()
    command = launched(run, *QUICK, "fault.rank=1", "fault.step=6", *words)
    assert command.wait() == code, command.output()
    check_told(command, run, rank=1, cause=cause)
    assert " failed at step " in command.output().strip().splitlines()[-1]
    assert "ChildFailedError" not in command.output()


@pytest.mark.parametrize("how", ["torchrun", "launcher"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank(bench: Bench, how: str, rank: int) -> None:
    """SIGSTOP on one of two ranks, which no SIGTERM of an agent can move: named, ended, gone within a minute."""
    run = bench.run()
    command = (torchrun if how == "torchrun" else launched)(run, *QUICK, "epochs=2000")
    command.wait_for("step 8/")
    os.kill(command.workers()[rank], signal.SIGSTOP)
    assert command.wait(timeout=60) == 1
    output = command.output()
    told = [line for line in output.splitlines() if " failed at step " in line]
    assert len(told) == 1 and f"rank {rank} on " in told[0] and "its process is stopped (SIGSTOP)" in told[0], output


def test_two_agents_and_a_rank_that_dies(bench: Bench) -> None:
    """Two torchrun agents of two ranks each (as on two nodes): rank 3 is killed, both agents end, one line says so."""
    run, port = bench.run(), harness.free_port()
    words = [*QUICK, "fault.kind=kill", "fault.rank=3", "fault.step=6"]
    commands = [torchrun(run, *words, agent=("--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2",
                                             "--master-addr=127.0.0.1", f"--master-port={port}"),
                         log=run.recipe.parent / f"agent{node}.log") for node in (0, 1)]
    codes = [command.wait(timeout=120) for command in commands]
    assert codes == [1, 1]
    told = [line for command in commands for line in command.output().splitlines() if " failed at step " in line]
    assert len(told) == 1 and "rank 3 on " in told[0] and "its process is gone" in told[0]


def test_no_failure_published_a_damaged_checkpoint(bench: Bench) -> None:
    """Every checkpoint that the failed runs of this file left behind verifies."""
    for path in sorted(bench.recipe.parent.glob("runs/*/checkpoints/step_*")):
        store.verify(path)
