"""This box: one rank per GPU through torchrun's own launcher, with our exit codes and without its traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from alexnet_ddp.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USER, UserError
from alexnet_ddp.stop import SIGNALS, quit_on_second_interrupt

SHUTDOWN = 600  # seconds the ranks may take to save once a stop signal was passed on


def ranks_wanted(text: str) -> int:
    """`--nproc-per-node`: a number, or auto: one per GPU, one per core where there is none. Raises UserError."""
    if text == "auto":
        import torch

        return torch.cuda.device_count() or len(os.sched_getaffinity(0))
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--nproc-per-node takes a number of ranks above 0, or auto, got '{text}'.")
    return int(text)


def launch(arguments: list[str], *, ranks: int, run_dir: Path) -> int:
    """Runs `alexnet-ddp ARGUMENTS` on `ranks` ranks of this machine and returns the run's exit code.

    Stop signals reach the ranks, which save and leave, but a second Ctrl-C ends all at once; no port is fixed, so
    several runs fit on one machine.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from alexnet_ddp.runfiles import read_state

    logging.disable(logging.CRITICAL)  # of the agent in this process: the ranks themselves say what went wrong
    wanted: dict[str, Any] = {"shutdown_timeout": SHUTDOWN, "signals_to_handle": ",".join(f"SIG{s}" for s in SIGNALS)}
    known = {field.name for field in dataclasses.fields(LaunchConfig)}  # older torch lacks the newest of them
    agent = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
        **{name: value for name, value in wanted.items() if name in known})
    began = time.time()
    quit_on_second_interrupt(_kill_ranks)
    try:
        elastic_launch(agent, sys.executable)("-u", "-m", "alexnet_ddp", *arguments)
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        reports = (run_dir / "errors").glob("rank_*.json")
        if first.exitcode < 0 and not any(report.stat().st_mtime >= began for report in reports):
            name = signal.Signals(-first.exitcode).name  # no rank was left to tell
            print(f"alexnet-ddp: rank {rank} was ended by {name}. The same command goes on from the newest checkpoint.",
                  file=sys.stderr, flush=True)
        return EXIT_USER if first.exitcode == EXIT_USER else EXIT_FAILED
    except SignalException:
        pass  # passed on to the ranks, which have left by now; state.json says whether in good order
    status = read_state(run_dir).get("status")
    return {"finished": EXIT_FINISHED, "preempted": EXIT_STOPPED}.get(str(status), EXIT_FAILED)


def _kill_ranks() -> None:
    """Ends the ranks, the only children of this process, hard."""
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # any process may end while we look
            parent = place.read_text(errors="replace").rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                os.kill(int(place.parent.name), signal.SIGKILL)
