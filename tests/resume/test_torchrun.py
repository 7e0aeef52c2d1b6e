"""The same through torchrun and through our own launcher, as a user types it (the full list is in the drills)."""

import os
import signal
from collections.abc import Callable

from alexnet_ddp.errors import EXIT_FINISHED, EXIT_STOPPED
from twins import LONG, Bench, fault, launched, resumed_at, torchrun


def test_worker_signalled_under_torchrun(bench: Callable[..., Bench]) -> None:
    """USR1 to one rank under torchrun: both leave with 0 (torchrun would call anything else a failure), state.json
    says preempted, nothing is left running; the next torchrun ends in the bits of ranks that knew no torchrun."""
    here = bench(world=2)
    run = here.run()
    assert torchrun(run, *fault("signal", step=7, rank=1)).wait() == EXIT_FINISHED
    run.check_stopped(why="USR1", earliest=7, latest=9)
    again = torchrun(run)
    assert again.wait() == EXIT_FINISHED
    assert resumed_at(again.output()) == 8
    here.check_equal(run)


def test_agent_killed(bench: Callable[..., Bench]) -> None:
    """SIGKILL of torchrun's agent in mid-run: its ranks notice, save and leave; nothing of the run is left; the next
    start goes on to the same bits."""
    here = bench(world=2, **LONG)
    run = here.run()
    command = torchrun(run)
    command.wait_for("step 40/")
    command.process.kill()
    command.wait_until_gone(timeout=30.0)
    run.check_stopped(why="TERM", earliest=40, latest=199)
    run.go().check()
    here.check_equal(run)


def test_launcher(bench: Callable[..., Bench]) -> None:
    """`alexnet-ddp train --nproc-per-node 2`, signalled itself: it passes the signal on and leaves with 75."""
    here = bench(world=2, **LONG)
    run = here.run()
    command = launched(run)
    command.wait_for("step 40/")
    os.kill(command.process.pid, signal.SIGHUP)
    assert command.wait() == EXIT_STOPPED, command.output()
    run.check_stopped(why="HUP", earliest=40, latest=199)
    assert "Traceback" not in command.output()
    run.go().check()
    here.check_equal(run)
