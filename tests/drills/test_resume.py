"""Every kill, every stop, every damage: the full matrices behind tests/resume (`make drills`; an hour on two cores)."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harness
from alexnet_ddp.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER
from twins import LONG, Bench, Run, fault, in_sessions, launched, resumed_at, torchrun

pytestmark = pytest.mark.drill

SIGNALS = ("INT", "TERM", "HUP", "USR1", "USR2")


# --- SIGKILL ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("world", [2, 3])
def test_killed_after_every_step(bench: Callable[..., Bench], world: int, steps: int | None) -> None:
    """A run of its own for every step: SIGKILL of all ranks after it, the same command again, the same bits."""
    here = bench(world=world, checkpoint__steps=steps, checkpoint__epochs=None if steps is None else 1)
    for step in range(21):
        run = here.run()
        result = run.go(*fault("kill", step=step))
        assert result.codes == ([-9] if step else [0]) * world, result.output  # 0: before any step is never after one
        run.go().check()
        here.check_equal(run)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_killed_after_every_step(bench: Callable[..., Bench], world: int) -> None:
    """One rank SIGKILLed after every step, each in turn: the others leave with 1 and name it; the same bits."""
    here = bench(world=world)
    for step in range(1, 21):
        run, victim = here.run(), step % world
        result = run.go(*fault("kill", step=step, rank=victim))
        assert result.codes == [-9 if rank == victim else EXIT_FAILED for rank in range(world)], result.output
        assert f"rank {victim} on " in result.output
        run.go().check()
        here.check_equal(run)


# At 32 pixels the last batch norm sees one value a channel and image, so that no forward may be of one image.
BATCH_NORM = {"augment__size": 32, "micro_batch": 6, "global_batch": 12, "data__limit": 46, "evaluate__epochs": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "clipped": {"clip_norm": 0.5},
    "one sample a forward": {"micro_batch": 1},
    "owner": {"data__assignment": "owner", "data__shards": 6},
    "two decode threads": {"data__threads": 2, "data__prefetch": 2},
    "two torch threads": {"torch_threads": 2},
    "lighting, grey": {"augment__pca_lighting": 0.1, "model__in_channels": 1},
    "nesterov": {"optim__nesterov": True},
    "stored": {"data__stored": "short256"},
    "deterministic": {"deterministic": True},
    "alexnet_torchvision": {"model__name": "alexnet_torchvision"},
    "alexnet_paper": {"model__name": "alexnet_paper", "augment__pca_lighting": 0.1},
    "alexnet_bn, recomputed": {"model__name": "alexnet_bn", "memory__checkpoint": "blocks"},
    "batch norm": {"model__name": "torchvision:resnet18", "model__width": 1.0, **BATCH_NORM},
    "torch's dropout": {"model__name": "torchvision:mobilenet_v3_small", "model__width": 1.0, **BATCH_NORM},
    "fp16": {"amp": "fp16", "model__width": 0.02},
    "fp32": {"amp": "none"},
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world", [2, 3])
def test_variants(bench: Callable[..., Bench], world: int, variant: str) -> None:
    """SIGKILL after every step of one run, for every other way to train: the same bits."""
    here = bench(world=world, epochs=2, **VARIANTS[variant])
    run = here.run()
    steps = int(here.twin.state["step"])
    went_on = set()
    for step in range(1, steps):
        result = run.go(*fault("kill", step=step))
        assert result.codes == [-9] * world, result.output
        went_on.add(resumed_at(result.output))
    result = run.go().check()
    went_on.add(resumed_at(result.output))
    assert len(went_on) > 2
    here.check_equal(run)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("at", ["evaluate", "save"])
@pytest.mark.parametrize("world", [2, 3])
def test_killed_within(bench: Callable[..., Bench], world: int, at: str) -> None:
    """SIGKILL in every evaluation and every save, of each rank that does it and of all: the same bits."""
    here = bench(world=world)
    for victim in range(-1, world) if at == "evaluate" else (0,):
        run = here.run()
        for step in (10, 20) if at == "evaluate" else (0, 3, 5, 6, 9, 10, 12, 15, 18, 20):
            result = run.go(*fault("kill", step=step, rank=victim, at=at))
            assert -9 in result.codes and 0 not in result.codes
            if step:
                run.check_whole()
        run.go().check()
        here.check_equal(run)


@pytest.mark.timeout(900)
def test_killed_at_any_moment(bench: Callable[..., Bench]) -> None:
    """60 SIGKILLs of all ranks at random moments, from the first import on: no partial checkpoint, the same bits."""
    here, moments = bench(world=2), random.Random(7)
    span, ended = here.run().go().check().seconds, 0
    run = here.run()
    for _ in range(60):
        ranks = run.start()
        time.sleep(moments.uniform(0.0, span))
        for rank in (0, 1):
            ranks.signal(signal.SIGKILL, rank=rank)
        ranks.wait()
        if run.checkpoints:
            run.check_whole()
        if run.path.exists() and (run.path / "state.json").exists() and run.state["status"] == "finished":
            here.check_equal(run)
            run, ended = here.run(), ended + 1
    run.go().check()
    here.check_equal(run)


# --- stops ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_signal(bench: Callable[..., Bench], world: int, everyone: bool) -> None:
    """Signals in turn to each rank or to all, at every other step: left within two steps, resumed there, same bits."""
    here = bench(world=world)
    for rank in [-1] if everyone else range(world):
        run, step = here.run(), 0
        for name in (SIGNALS * 2)[:9]:
            ranks = run.start(*fault("signal", step=step + 1, rank=rank, signal=name))
            result = ranks.wait()
            assert result.codes == [EXIT_STOPPED] * world, result.output
            assert resumed_at(result.output) == (step or None)
            assert in_sessions(ranks.pids) == []
            run.check_stopped(why=name, earliest=step + 1, latest=step + 3)
            step = int(run.state["step"])
        run.go().check()
        here.check_equal(run)


@pytest.mark.timeout(1800)
def test_200_signals(bench: Callable[..., Bench]) -> None:
    """200 stop signals of random kinds, to one rank or to all, at random moments of setting up, training, evaluating
    and saving: every attempt ends in good order, no checkpoint is partial, nothing hangs, the bits stay."""
    here, moments = bench(world=2, **LONG), random.Random(11)
    span = here.run().go().check().seconds
    run, sent, finished = here.run(), 0, 0
    while sent < 200:
        ranks = run.start()
        deadline = time.monotonic() + 60.0
        while not (run.path / "lease.json").exists():  # from here on all ranks have their handlers
            assert time.monotonic() < deadline, ranks.output()
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, span / 4))
        name = moments.choice(SIGNALS)
        for rank in moments.choice([(0,), (1,), (0, 1)]):
            if ranks.processes[rank].is_alive():
                ranks.signal(getattr(signal, f"SIG{name}"), rank=rank)
        result = ranks.wait(timeout=60.0)
        sent += 1
        if result.codes == [EXIT_FINISHED] * 2:
            here.check_equal(run)
            run, finished = here.run(), finished + 1
        else:
            assert result.codes == [EXIT_STOPPED] * 2, result.output
            run.check_stopped(why=name, earliest=0, latest=200)
        assert in_sessions(ranks.pids) == []
    run.go().check()
    here.check_equal(run)
    assert finished > 0


# --- through torchrun -------------------------------------------------------------------------------------------


def finish(here: Bench, run: Run) -> None:
    """The same command again, through torchrun, ends in the bits of the undisturbed twin."""
    again = torchrun(run)
    assert again.wait(timeout=250.0) == EXIT_FINISHED, again.output()
    here.check_equal(run)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_torchrun_signalled(bench: Callable[..., Bench], name: str) -> None:
    """A signal to torchrun's agent: it passes it on, the ranks save and leave, nothing is left; torchrun's own exit
    code says failed, state.json knows better."""
    here = bench(world=2, **LONG)
    run = here.run()
    command = torchrun(run)
    command.wait_for("step 40/")
    command.process.send_signal(getattr(signal, f"SIG{name}"))
    assert command.wait() != EXIT_FINISHED
    run.check_stopped(why=name, earliest=40, latest=199)
    finish(here, run)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SIGNALS)
def test_torchrun_worker_signalled(bench: Callable[..., Bench], name: str) -> None:
    """A signal to one rank from outside: all leave, torchrun exits 0."""
    here = bench(world=2, **LONG)
    run = here.run()
    command = torchrun(run)
    command.wait_for("step 40/")
    os.kill(command.workers()[1], getattr(signal, f"SIG{name}"))
    assert command.wait() == EXIT_FINISHED, command.output()
    run.check_stopped(why=name, earliest=40, latest=199)
    finish(here, run)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["STOP file", "deadline"])
def test_torchrun_stop_file_and_deadline(bench: Callable[..., Bench], how: str) -> None:
    """A STOP file made in mid-run, and a deadline that comes in mid-run: all leave, torchrun exits 0."""
    here = bench(world=2, **{**LONG, "epochs": 200, "evaluate__epochs": 100})
    run = here.run()
    command = torchrun(run, *(["deadline=6s"] if how == "deadline" else []))
    command.wait_for("step 40/")
    if how == "STOP file":
        (run.path / "STOP").touch()
    assert command.wait() == EXIT_FINISHED, command.output()
    run.check_stopped(why=how, earliest=40, latest=999)
    finish(here, run)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("at, step", [("evaluate", 10), ("save", 9), ("step", 7)])
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_killed_within(bench: Callable[..., Bench], at: str, step: int, rank: int) -> None:
    """A rank SIGKILLed in an evaluation, a save, after a step: torchrun fails, names are named, nothing is left, the
    same bits."""
    if (at, rank) == ("save", 1):
        pytest.skip("rank 0 alone saves")
    here = bench(world=2)
    run = here.run()
    command = torchrun(run, *fault("kill", step=step, rank=rank, at=at))
    assert command.wait() == EXIT_FAILED
    run.check_whole()
    finish(here, run)


@pytest.mark.timeout(300)
def test_agent_and_ranks_killed(bench: Callable[..., Bench]) -> None:
    """Everything SIGKILLed at once, as when the power fails: the lease is stale, the next start goes on."""
    here = bench(world=2, **LONG)
    run = here.run()
    command = torchrun(run)
    command.wait_for("step 40/")
    for pid in command.processes():
        os.kill(pid, signal.SIGKILL)
    command.wait_until_gone()
    assert (run.path / "lease.json").exists()
    run.check_whole()
    finish(here, run)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_two_agents(bench: Callable[..., Bench], rendezvous: str, how: str) -> None:
    """Two agents with a rank each, as on two machines: a stop of one rank stops both, a killed rank ends both, and
    the same two commands go on to the same bits."""
    here = bench(world=2)
    run = here.run()

    def both(*words: str) -> tuple[list[int], str]:
        port = harness.free_port()
        commands = []
        for node in (0, 1):
            agent = ["--nnodes=2", "--nproc-per-node=1"]
            if rendezvous == "c10d":
                agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=drill"]
            else:
                agent += [f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
            log = run.recipe.parent / f"{run.name}.{node}.{port}.log"
            commands.append(torchrun(run, *words, agent=agent, log=log))
        return [command.wait() for command in commands], "".join(command.output() for command in commands)

    codes, output = both(*fault(how, step=7, rank=1))
    if how == "signal":
        assert codes == [EXIT_FINISHED] * 2, output
        run.check_stopped(why="USR1", earliest=7, latest=9)
    else:
        assert EXIT_FINISHED not in codes
        assert output.count("alexnet-ddp: rank 1 on ") == 1
    codes, output = both()
    assert codes == [EXIT_FINISHED] * 2, output
    assert resumed_at(output) is not None
    here.check_equal(run)


# --- through our own launcher -----------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SIGNALS)
def test_launcher_signalled(bench: Callable[..., Bench], name: str) -> None:
    """Every stop signal to `alexnet-ddp train --nproc-per-node 2`: passed on, left with 75; the next one with 0."""
    here = bench(world=2, **LONG)
    run = here.run()
    command = launched(run)
    command.wait_for("step 40/")
    command.process.send_signal(getattr(signal, f"SIG{name}"))
    assert command.wait() == EXIT_STOPPED, command.output()
    run.check_stopped(why=name, earliest=40, latest=199)
    assert "Traceback" not in command.output()
    again = launched(run)
    assert again.wait() == EXIT_FINISHED, again.output()
    here.check_equal(run)
    again = launched(run)
    assert again.wait() == EXIT_FINISHED and "is finished" in again.output()


@pytest.mark.timeout(600)
def test_launcher_keeps_exit_codes(bench: Callable[..., Bench]) -> None:
    """A stop 75, a user's mistake 2 (told once), a broken or killed rank 1; the next start finishes with 0."""
    here = bench(world=2)
    run = here.run()
    for words, code in ((["data.train=/nowhere"], EXIT_USER), (["optim.lr=fast"], EXIT_USER),
                        (fault("signal", step=3, rank=1), EXIT_STOPPED), (["seed=5"], EXIT_USER),
                        (fault("error", step=6, rank=1), EXIT_FAILED), (fault("kill", step=8, rank=0), EXIT_FAILED)):
        run_of = Run(run.recipe, name=run.name, world=2)
        command = launched(run_of, *words)
        assert command.wait() == code, f"{words}: {command.output()}"
        if code == EXIT_USER:
            said = command.output()
            assert said.count("error:") == 1 and "Traceback" not in said, said
            command.log.write_text("")
    command = launched(run)
    assert command.wait() == EXIT_FINISHED, command.output()
    here.check_equal(run)


@pytest.mark.timeout(300)
def test_launcher_interrupted_twice(bench: Callable[..., Bench]) -> None:
    """Ctrl-C twice on the launcher, while a rank hangs: all gone at once, with 130; the next start goes on."""
    here = bench(world=2)
    run = here.run()
    command = launched(run, *fault("hang", step=9, rank=1))
    command.wait_for("step 8/20")
    for _ in range(2):
        command.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert command.wait(timeout=20.0) == EXIT_INTERRUPTED, command.output()
    finish(here, run)


@pytest.mark.timeout(300)
def test_launcher_killed(bench: Callable[..., Bench]) -> None:
    """SIGKILL of the launcher: its ranks notice, save and leave."""
    here = bench(world=2, **LONG)
    run = here.run()
    command = launched(run)
    command.wait_for("step 40/")
    command.process.kill()
    command.wait_until_gone(timeout=30.0)
    run.check_stopped(why="TERM", earliest=40, latest=199)
    finish(here, run)


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_every_file_damaged(bench: Callable[..., Bench]) -> None:
    """Each file of the newest checkpoint truncated to nothing and to half, with its first, middle and last byte
    flipped, and gone: never loaded, the one before is, and the run ends bit-equal."""
    here = bench(world=2)
    stopped = here.run("stopped")
    assert stopped.go(*fault("signal", step=15, rank=1)).codes == [EXIT_STOPPED] * 2
    assert stopped.state["step"] == 16

    def flip(path: Path, at: int) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    damages: dict[str, Callable[[Path], None]] = {
        "empty": lambda path: os.truncate(path, 0),
        "half": lambda path: os.truncate(path, path.stat().st_size // 2),
        "first": lambda path: flip(path, 0), "last": lambda path: flip(path, -1),
        "middle": lambda path: flip(path, path.stat().st_size // 2), "gone": lambda path: path.unlink()}
    files = [path.name for path in stopped.checkpoints[-1].iterdir()]
    assert len(files) == 5
    for name, damage in damages.items():
        for file in files:
            run = stopped.copy(f"{name}_{file}")
            damage(run.checkpoints[-1] / file)
            result = run.go().check()
            assert resumed_at(result.output) == 15 and result.output.count("damaged, moved aside") == 1
            here.check_equal(run)


def test_git_state_is_told(bench: Callable[..., Bench]) -> None:
    """A checkpoint of a run from a checkout names the commit it was made with."""
    manifest = json.loads((bench(world=2).twin.checkpoints[-1] / "manifest.json").read_text())
    home = Path(__file__).parents[2]
    if not (home / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True, check=True)
    assert manifest["lineage"]["code"]["commit"] == head.stdout.strip()
