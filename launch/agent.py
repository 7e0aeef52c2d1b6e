"""One torchrun agent and its ranks on this machine, with our exit codes and without torchrun's traceback.

`alexnet-ddp train --nproc-per-node N` uses it on a single machine. In a Slurm job there is one a node:

    srun --ntasks-per-node=1 $BLOCK python -P -u -m launch.agent SNAPSHOT --nproc-per-node N

A plain torchrun dies of USR1 and USR2, or of any signal that comes during its own imports; this agent passes all stop
signals on to its ranks and waits for them to save.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet_ddp.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USER, UserError
from alexnet_ddp.runfiles import read_state
from alexnet_ddp.stop import SIGNALS, quit_on_second_interrupt
from alexnet_ddp.words import leave
from launch.snapshot import opened

SHUTDOWN = 600  # seconds the ranks may take to save once a stop signal was passed on


@dataclass(frozen=True)
class Nodes:
    """Which of several agents this is, and where they meet."""

    node: int = 0
    nodes: int = 1
    endpoint: str = "localhost:0"
    name: str = ""


def ranks_wanted(text: str) -> int:
    """`--nproc-per-node`: a number, or auto: one per GPU, one per core where there is none. Raises UserError."""
    if text == "auto":
        import torch

        return torch.cuda.device_count() or len(os.sched_getaffinity(0))
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--nproc-per-node takes a number of ranks above 0, or auto, got '{text}'.")
    return int(text)


def launch(arguments: Sequence[str], *, ranks: int, run_dir: Path | None = None, place: Nodes | None = None) -> int:
    """Runs `alexnet-ddp ARGUMENTS` on `ranks` ranks of this machine and returns the exit code: that of the run in
    `run_dir`, or without one that of a command which can't be stopped and go on.

    Stop signals reach the ranks, which save and leave, but a second Ctrl-C ends all at once. On a single machine no
    port is fixed, so several runs fit on it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    place = place or Nodes()
    logging.disable(logging.CRITICAL)  # of the agent in this process: the ranks themselves say what went wrong
    wanted: dict[str, Any] = {"shutdown_timeout": SHUTDOWN, "signals_to_handle": ",".join(f"SIG{s}" for s in SIGNALS)}
    known = {field.name for field in dataclasses.fields(LaunchConfig)}  # older torch lacks the newest of them
    agent = LaunchConfig(
        min_nodes=place.nodes, max_nodes=place.nodes, nproc_per_node=ranks, run_id=place.name or uuid.uuid4().hex,
        rdzv_backend="static" if place.nodes > 1 else "c10d", rdzv_endpoint=place.endpoint,
        rdzv_configs={"rank": place.node} if place.nodes > 1 else {}, max_restarts=0, monitor_interval=0.1,
        **{name: value for name, value in wanted.items() if name in known})
    began = time.time()
    quit_on_second_interrupt(_kill_ranks)
    threading.Thread(target=_unblock, args=(ranks,), name="unblock", daemon=True).start()
    try:
        safe = ["-P"] if sys.flags.safe_path else []  # the ranks take their code from where this process does
        elastic_launch(agent, sys.executable)(*safe, "-u", "-m", "alexnet_ddp", *arguments)
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        reports = [] if run_dir is None else list((run_dir / "errors").glob("rank_*.json"))
        if first.exitcode < 0 and not any(report.stat().st_mtime >= began for report in reports):
            name = signal.Signals(-first.exitcode).name  # no rank was left to tell
            way_out = "" if run_dir is None else " The same command goes on from the newest checkpoint."
            print(f"alexnet-ddp: rank {rank} was ended by {name}.{way_out}", file=sys.stderr, flush=True)
            return 128 - first.exitcode  # as srun and shells tell it: worth another start, unlike a bug's 1
        return EXIT_USER if first.exitcode == EXIT_USER else EXIT_FAILED
    except SignalException as stopped:  # passed on to the ranks, which have left by now
        if run_dir is None:
            return 128 + int(stopped.sigval)
    if run_dir is None:
        return EXIT_FINISHED
    # A run may have been stopped: state.json says whether in good order.
    status = read_state(run_dir).get("status")
    return {"finished": EXIT_FINISHED, "preempted": EXIT_STOPPED}.get(str(status), EXIT_FAILED)


def _unblock(ranks: int) -> None:
    """Lets stop signals in, blocked since the job's shell, once torchrun's handlers stand and there are ranks to tell.

    In this thread alone: the ranks inherit the main thread's blocked signals, and unblock them by themselves.
    """
    numbers = [getattr(signal, f"SIG{name}") for name in SIGNALS]
    while signal.getsignal(signal.SIGUSR2) in (signal.SIG_DFL, None) or len(_children()) < ranks:
        time.sleep(0.1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    threading.Event().wait()  # a thread that has left can't be signalled


def _kill_ranks() -> None:
    """Ends the ranks, the only children of this process, hard."""
    for child in _children():
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            os.kill(child, signal.SIGKILL)


def _children() -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # any process may end while we look
            parent = place.read_text(errors="replace").rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append(int(place.parent.name))
    return found


def main(words: list[str]) -> int:
    """The agent of one node of a Slurm job; returns the exit code."""
    from launch.place import place_of
    from launch.rendezvous import meet

    parser = argparse.ArgumentParser(prog="python -m launch.agent")
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("--nproc-per-node", type=int, required=True, metavar="N", help="ranks on this node")
    options = parser.parse_args(words)
    try:
        snapshot = opened(options.snapshot)
        arguments = ["train", str(snapshot.path / "recipe.yaml"), *(["--accept-changes"] * snapshot.accept_changes)]
        place = place_of(os.environ)
        if place is None:
            raise UserError("launch.agent is started by srun, one task a node; on a single machine use "
                            "alexnet-ddp train CONFIG --nproc-per-node N.")
        if place.size == 1:
            return launch(arguments, ranks=options.nproc_per_node, run_dir=snapshot.run_dir)
        if set(place.counts) != {1}:
            raise UserError(f"There is one agent a node, and this job step has {place.counts} tasks a node: give srun "
                            "--ntasks-per-node=1.")
        meeting = meet(place.name, rank=place.rank, size=place.size, head=place.hosts[0], hosts=place.host_of_rank)
    except UserError as failure:
        print(f"alexnet-ddp: error: {failure}", file=sys.stderr, flush=True)
        return failure.code
    if meeting.interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)
    if meeting.listener is not None:
        meeting.listener.close()  # torchrun's store takes the port over
    return launch(arguments, ranks=options.nproc_per_node, run_dir=snapshot.run_dir,
                  place=Nodes(place.rank, place.size, f"{meeting.host}:{meeting.port}", place.name))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
