"""Ends a job in bounded time when a rank dies or hangs, and says which rank, on which host, at which step, and why.

Every rank has one watch thread. It publishes the rank's progress to the job's store once a second, and leaves hard
(no waiting in collectives that will never end) when this rank makes no progress for too long, or when its launcher is
gone. The first rank to fail says so for all; the others leave quietly.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from alexnet_ddp.distributed import World, under_torchrun
from alexnet_ddp.errors import EXIT_FAILED
from alexnet_ddp.stop import StopRequests

BEAT = 1.0  # seconds between two beats of a rank
STALE = 3.5  # seconds without a new beat after which a rank counts as dead
ORPHAN_GRACE = 15.0  # seconds a rank may still save in once its launcher is gone

STAGES = ("start", "data", "compute", "gradients", "log", "save", "evaluate")  # in the order of a step


@dataclass
class Failure:
    """One rank's end, as it is printed and written to errors/rank_N.json."""

    rank: int
    host: str
    step: int
    cause: str
    detail: str = ""
    reported_by: int | None = None

    def line(self) -> str:
        by = "" if self.reported_by in (None, self.rank) else f" (reported by rank {self.reported_by})"
        return f"alexnet-ddp: rank {self.rank} on {self.host} failed at step {self.step}: {self.cause}{by}"


class Watchdog:
    """Watches one rank. The main loop calls `tick` whenever it gets on."""

    def __init__(self, world: World, *, run_dir: Path, requests: StopRequests, step_limit: float,
                 first_limit: float, on_failure: Callable[[Failure], None]) -> None:
        self._world, self._run_dir, self._requests, self._on_failure = world, run_dir, requests, on_failure
        self._step_limit, self._first_limit, self._settled = step_limit, first_limit, False
        self._slowest = 0.0  # longest time between two ticks after the first step, seconds
        self._mark = (0, 0, time.monotonic())  # (step, stage number, when)
        self._parent = os.getppid() if under_torchrun() else 0
        self._store = _connect() if world.size > 1 else None
        self._done = threading.Event()
        self._failing = threading.Lock()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def tick(self, step: int, stage: str) -> None:
        """The main loop is at `stage` of `step`."""
        now = time.monotonic()
        if self._settled:
            self._slowest = max(self._slowest, now - self._mark[2])
        self._mark = (step, STAGES.index(stage), now)

    def settle(self) -> None:
        """The first step of this attempt is done: from now on the shorter limit holds."""
        self._settled = True

    @property
    def _limit(self) -> float:
        return max(self._step_limit, 10.0 * self._slowest) if self._settled else self._first_limit

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    # --- the watch thread ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        orphaned_at = 0.0
        next_beat = 0.0
        while not self._done.wait(0.2):
            now = time.monotonic()
            if self._parent and os.getppid() != self._parent:
                orphaned_at = orphaned_at or now
                self._requests.signal = self._requests.signal or "TERM"
                if now - orphaned_at > ORPHAN_GRACE:
                    os._exit(EXIT_FAILED)
            if now >= next_beat:
                next_beat = now + BEAT
                self._beat(now)
            if now - self._mark[2] > self._limit:
                self.stalled(now - self._mark[2])

    def _beat(self, now: float) -> None:
        if self._store is not None:
            step, stage, since = self._mark
            with contextlib.suppress(RuntimeError, OSError):  # a lost store shows in the collectives
                self._store.set(f"beat/{self._world.rank}", json.dumps([step, stage, now - since, now]))

    # --- failing ------------------------------------------------------------------------------------------------

    def stalled(self, seconds: float) -> None:
        """No progress on this rank for `seconds`: names whoever is behind, and leaves."""
        behind, dead = self._survey()
        step, stage, _ = self._mark
        stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
        if dead:
            self.fail(self._of(dead[0], "its process is gone"))
        if self._world.rank in behind or not behind:
            self.fail(Failure(self._world.rank, self._world.host, step,
                              f"no progress for {seconds:.0f} s in stage '{STAGES[stage]}'", stack))
        self.fail(self._of(behind[0], f"no progress for {seconds:.0f} s, all others wait for it"))

    def peer_lost(self, error: BaseException) -> NoReturn:
        """A collective broke under this rank: finds out who left, and leaves."""
        deadline = time.monotonic() + STALE + 2.0
        while self._store is not None and time.monotonic() < deadline:
            if self._first_failure() is not None:
                break
            gone = self._gone_here()
            if gone:
                time.sleep(0.5)  # it may have said why before it left
                self.fail(self._of(gone[0], "its process is gone (killed, or out of memory)"))
            time.sleep(0.1)
        _, dead = self._survey()
        if dead:
            self.fail(self._of(dead[0], "its process or its host is gone"))
        self.fail(Failure(self._world.rank, self._world.host, self._mark[0],
                          f"lost the other ranks: {_first_line(error)}"))

    def fail(self, failure: Failure, *, code: int = EXIT_FAILED) -> NoReturn:
        """Says why unless another rank has, writes errors/rank_N.json, and leaves hard."""
        with self._failing:  # the main and the watch thread may come here together
            failure.reported_by = self._world.rank
            first = self._claim(failure)
            if first == failure:
                write_failure(failure, self._run_dir)
                if failure.detail:
                    print(failure.detail, file=sys.stderr)
                print(failure.line(), file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                self._on_failure(first)
            os._exit(code)

    def _claim(self, failure: Failure) -> Failure:
        """The job's first failure: this one, unless another rank was quicker."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError, OSError):
                mine = json.dumps(asdict(failure))
                return Failure(**json.loads(self._store.compare_set("failed", "", mine)))
        return failure

    def _first_failure(self) -> Failure | None:
        with contextlib.suppress(RuntimeError, OSError):
            if self._store is not None and self._store.check(["failed"]):
                return Failure(**json.loads(self._store.get("failed")))
        return None

    def _of(self, rank: int, cause: str) -> Failure:
        beat = self._read_beats().get(rank)
        return Failure(rank, self._world.hosts[rank], int(beat[0]) if beat else self._mark[0], cause)

    def _read_beats(self) -> dict[int, list[float]]:
        beats: dict[int, list[float]] = {}
        if self._store is not None:
            with contextlib.suppress(RuntimeError, OSError):
                for rank in range(self._world.size):
                    if self._store.check([f"beat/{rank}"]):
                        beats[rank] = json.loads(self._store.get(f"beat/{rank}"))
        return beats

    def _survey(self) -> tuple[list[int], list[int]]:
        """(ranks that are furthest behind, unless all are level; ranks whose beat has stopped)."""
        dead = self._gone_here()
        first = self._read_beats()
        if not first:
            return [], dead
        if not dead:
            time.sleep(STALE)
            second = self._read_beats()
            dead = [rank for rank in first if rank != self._world.rank and first[rank][3] == second[rank][3]]
            first = second or first
        places = {rank: (beat[0], beat[1]) for rank, beat in first.items()}
        low, high = min(places.values()), max(places.values())
        return ([rank for rank, place in places.items() if place == low] if low != high else []), dead

    def _gone_here(self) -> list[int]:
        """Ranks of this host whose process no longer runs."""
        return [rank for rank, (host, pid) in enumerate(zip(self._world.hosts, self._world.pids, strict=True))
                if host == self._world.host and rank != self._world.rank and not _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _connect() -> dist.Store:
    """A connection of the watch thread's own to the job's store, so that it never waits for the main thread's."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)
    return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def write_failure(failure: Failure, run_dir: Path) -> None:
    """errors/rank_N.json of a failure; a file system that refuses must not hide the failure itself."""
    with contextlib.suppress(OSError):
        folder = run_dir / "errors"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{failure.rank}.json").write_text(json.dumps(asdict(failure), indent=1) + "\n")


def is_peer_loss(error: BaseException) -> bool:
    """Whether an exception says that a collective broke, rather than that this rank did something wrong."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Broken pipe", "NCCL",
             "Timed out waiting", "Socket Timeout", "Application timeout", "Connection refused")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
