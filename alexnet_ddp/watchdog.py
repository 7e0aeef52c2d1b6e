"""Ends a job in bounded time when a rank dies or hangs, and says which rank, on which host, at which step, and why.

Every rank has one watch thread. It publishes the rank's progress to the job's store twice a second, and leaves hard
(no waiting in collectives that will never end) when this rank makes no progress for too long, or when its launcher is
gone. The first rank to fail says so for all; the others leave quietly, with its exit code.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist

from alexnet_ddp.distributed import World, under_torchrun
from alexnet_ddp.errors import EXIT_FAILED, EXIT_USER, RunFailed, UserError, first_line
from alexnet_ddp.stop import StopRequests

T = TypeVar("T")

BEAT = 0.5  # seconds between two beats of a rank
STALE = 3.5  # seconds without a new beat after which a rank counts as dead
ORPHAN_GRACE = 15.0  # seconds a rank may still save in once its launcher is gone
ANSWER = 5.0  # seconds the store may take to answer; it sits with rank 0 or its agent, which may be what has failed
LAST_LINE = 0.8  # seconds in which the others learn of it and print what they have begun: the failure comes last
WRITTEN = 15.0  # seconds rank 0 may take to finish a save and to write state.json; the others wait for it
LAST_WORDS = 25.0  # seconds a failing rank may take to say why: the disk may be what has failed

# What a rank does between two counts of the steps done, in order; in "gather" and "reduce" it waits for the others.
STAGES = ("start", "log", "evaluate", "gather", "save", "data", "compute", "reduce", "gradients")

# What torch's libraries call a GPU that fails; torch has a class of its own only for some of it.
DEVICE_ERROR = re.compile(r"\bcu(da|dnn|blas)\w* (error|failure)", re.IGNORECASE)

Mark = tuple[int, int, int]  # how far a rank is: (step, stage number, ticks there so far)

# What ended a job, for the one who decides about another start: `dead` a process or host that is gone, `hung` one that
# made no progress, `network` a collective that broke though nobody is known to be dead, `bug` any other exception.
Kind = Literal["user", "bug", "dead", "hung", "network", "device", "memory", "nonfinite", "disk"]


@dataclass
class Failure:
    """One rank's end, as it is printed and written to errors/rank_N.json."""

    rank: int
    host: str
    step: int
    cause: str
    kind: Kind
    detail: str = ""
    reported_by: int | None = None
    code: int = EXIT_FAILED  # exit code of all ranks
    silent: bool = False  # its process is there, but can't leave by itself: the ranks of its host end it
    told: bool = True  # whether the detail is printed too; for a full disk, say, it is only in the file

    def line(self) -> str:
        by = "" if self.reported_by in (None, self.rank) else f" (reported by rank {self.reported_by})"
        cause = " ".join(self.cause.split())
        return f"alexnet-ddp: rank {self.rank} on {self.host} failed at step {self.step}: {cause}{by}"

    def record(self) -> dict[str, Any]:
        """As it stands in state.json."""
        return {"rank": self.rank, "host": self.host, "step": self.step, "cause": " ".join(self.cause.split()),
                "kind": self.kind}


class Watchdog:
    """Watches one rank. The main loop calls `tick` whenever it gets on; the limits hold from the first tick on."""

    def __init__(self, world: World, *, run_dir: Path, requests: StopRequests, step_limit: float,
                 first_limit: float) -> None:
        self._world, self._requests = world, requests
        self._errors = run_dir / "errors"
        self._step_limit, self._first_limit, self._settled = step_limit, first_limit, False
        self._slowest = 0.0  # longest time between two ticks after the first step, seconds
        self.save_seconds = 0.0  # what a save takes on this rank; a slow disk is no hang
        self._mark: Mark = (0, 0, 0)
        self._since = math.inf  # when the mark was set
        self._parent = os.getppid() if under_torchrun() else 0
        self._store = _connect() if world.size > 1 else None
        self._done = threading.Event()
        self._failing = threading.Lock()
        self._main = threading.get_ident()
        self.on_failure: Callable[[Failure], None] = lambda _: None  # rank 0's last words, after the line is out
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def tick(self, step: int, stage: str) -> None:
        """The main loop is at `stage` of `step`."""
        now = time.monotonic()
        if self._settled:
            self._slowest = max(self._slowest, now - self._since)
        before, number = self._mark, STAGES.index(stage)
        self._mark = (step, number, before[2] + 1 if before[:2] == (step, number) else 0)
        self._since = now

    def settle(self) -> None:
        """The first step of this attempt is done: from now on the shorter limit holds."""
        self._settled = True

    @property
    def _limit(self) -> float:
        """Seconds without a tick that are too many, at the stage this rank is in."""
        if not self._settled:
            return self._first_limit
        slowest = max(self._slowest, self.save_seconds) if STAGES[self._mark[1]] == "save" else self._slowest
        return max(self._step_limit, 10.0 * slowest)

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    # --- the watch thread ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            self._watch_until_done()
        except Exception as error:
            self.fail(self._mine(f"the watchdog broke: {first_line(error)}", traceback.format_exc(), kind="bug"))

    def _watch_until_done(self) -> None:
        orphaned_at = 0.0
        next_beat = 0.0
        looked = time.monotonic()
        while not self._done.wait(0.2):
            now = time.monotonic()
            if now - looked > STALE:  # the whole process was frozen (a suspended job): that is no stall of its own
                self._since += now - looked
            looked = now
            if self._parent and os.getppid() != self._parent:
                orphaned_at = orphaned_at or now
                self._requests.signal = self._requests.signal or "TERM"
                if now - orphaned_at > ORPHAN_GRACE:
                    os._exit(EXIT_FAILED)
            if now >= next_beat:
                next_beat = now + BEAT
                self._beat()
                if self._told_by_another():  # a collective may wait for it for ever, rather than break
                    self.fail(self._mine("another rank failed", kind="network"))
            if now - self._since > self._limit:
                self.stalled(now - self._since)

    def _beat(self) -> None:
        beat = json.dumps([self._mark, time.monotonic(), self._limit])
        self._ask(lambda store: store.set(f"beat/{self._world.rank}", beat), otherwise=None)

    def _ask(self, question: Callable[[dist.Store], T], *, otherwise: T) -> T:
        """The store's answer, or `otherwise` when there is none: a store whose host is gone refuses or is silent."""
        store, answers = self._store, list[T]()
        if store is None:
            return otherwise

        def ask() -> None:
            with contextlib.suppress(RuntimeError, OSError):
                answers.append(question(store))

        asking = threading.Thread(target=ask, name="ask", daemon=True)
        asking.start()
        asking.join(ANSWER)
        if asking.is_alive():
            self._store = None  # it would block every later question, too
        return answers[0] if answers else otherwise

    # --- failing ------------------------------------------------------------------------------------------------

    def stalled(self, seconds: float) -> None:
        """No progress on this rank for `seconds`: names whoever is behind, and leaves.

        Comes back only while this rank waits for one that may take longer where it is (rank 0, in a save).
        """
        self._fail_for_the_lost_here()
        mark, marks = self._mark, self._marks()
        limits = [json.loads(beat)[2] for rank, beat in self._beats().items() if marks.get(rank, mark) <= mark]
        if seconds <= max(limits, default=0.0):
            return
        if all(other <= mark for other in marks.values()):  # else this rank is behind, and knows best why
            self._fail_for_a_silent_one()
            behind = min(marks, key=lambda rank: marks[rank], default=self._world.rank)
            if behind != self._world.rank and marks[behind] < mark:
                self.fail(self._of(behind, f"no progress for {seconds:.0f} s in stage "
                                   f"'{STAGES[marks[behind][1]]}', the others wait for it", kind="hung",
                                   step=marks[behind][0]))
        stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
        self.fail(self._mine(f"no progress for {seconds:.0f} s in stage '{STAGES[mark[1]]}'", stack, kind="hung"))

    def broke(self, error: BaseException) -> NoReturn:
        """An exception that this rank can't go on after. Ends the job, named."""
        detail, kind = "".join(traceback.format_exception(error)), kind_of(error)
        if isinstance(error, UserError):
            self.fail(self._mine(str(error), kind=kind, code=EXIT_USER))
        if isinstance(error, RunFailed):
            self.fail(self._mine(str(error), detail, kind=kind, told=False))
        if isinstance(error, OSError) and error.strerror:  # of the machine: full, gone, not allowed
            place = f" ({error.filename})" if error.filename else ""
            self.fail(self._mine(error.strerror + place, detail, kind=kind, told=False))
        if kind == "network":
            self._peer_lost(error)
        self.fail(self._mine(f"{type(error).__name__}: {error}", detail, kind=kind))

    def _peer_lost(self, error: BaseException) -> NoReturn:
        """A collective broke under this rank: finds out who left, and leaves."""
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and not self._claimed():
            self._fail_for_the_lost_here()
            time.sleep(0.1)
        self._fail_for_a_silent_one()
        self.fail(self._mine(f"lost the other ranks: {first_line(error)}", kind="network"))

    def _fail_for_the_lost_here(self) -> None:
        lost = self._lost_here()
        if lost:
            time.sleep(0.5)  # it may have said why before it left
            rank, stopped = lost[0]
            cause = "its process is stopped (SIGSTOP)" if stopped else "its process is gone (killed, or out of memory)"
            self.fail(self._of(rank, cause, kind="hung" if stopped else "dead", silent=stopped))

    def _fail_for_a_silent_one(self) -> None:
        """Waits up to STALE seconds for a sign of life from every rank. Must not be called when all is well."""
        first, end = self._beats(), time.monotonic() + STALE
        while first and time.monotonic() < end and not self._claimed():
            self._beat()  # the others look for it, and the watch thread may be the one that waits here
            time.sleep(0.2)
        for rank, beat in self._beats().items():
            if rank != self._world.rank and first.get(rank) == beat:
                self.fail(self._of(rank, "no sign of life from its process or its host", kind="dead", silent=True))

    def _mine(self, cause: str, detail: str = "", *, kind: Kind, code: int = EXIT_FAILED, told: bool = True) -> Failure:
        return Failure(self._world.rank, self._world.host, self._mark[0], cause, kind, detail, code=code, told=told)

    def _of(self, rank: int, cause: str, *, kind: Kind, step: int | None = None, silent: bool = False) -> Failure:
        """A failure of another rank; where all that is known of its step is its last beat, the job's counts."""
        step = self._mark[0] if step is None else step
        return Failure(rank, self._world.hosts[rank], step, cause, kind, silent=silent)

    def fail(self, failure: Failure) -> NoReturn:
        """Says why unless another rank has, writes errors/rank_N.json, and leaves hard."""
        with self._failing:  # the main and the watch thread may come here together
            failure.reported_by = self._world.rank
            first: list[Failure] = []
            words = threading.Thread(target=self._last_words, args=(failure, first), daemon=True)
            words.start()
            words.join(LAST_WORDS)
            if not first:
                print(failure.line(), file=sys.stderr, flush=True)
            os._exit(first[0].code if first else failure.code)

    def _last_words(self, failure: Failure, told: list[Failure]) -> None:
        first = self._claim(failure)
        if first == failure:
            with contextlib.suppress(OSError):  # a file system that refuses must not hide the failure itself
                (self._errors / f"rank_{failure.rank}.json").write_text(json.dumps(asdict(failure), indent=1) + "\n")
            time.sleep(LAST_LINE)
            if failure.detail and failure.told:
                print(failure.detail, file=sys.stderr)
            print(failure.line(), file=sys.stderr, flush=True)
        told.append(first)
        pid = self._world.pids[first.rank]
        if first.silent and pid and first.rank != self._world.rank:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if self._world.rank == 0:
            time.sleep(0 if first == failure else LAST_LINE)
            with contextlib.suppress(Exception):
                self.on_failure(first)
            self._ask(lambda store: store.set("written", ""), otherwise=None)
        else:
            self._wait_for_rank_0(first)
        if first != failure:
            time.sleep(LAST_LINE)  # a launcher takes the rank that leaves first for the cause

    def _wait_for_rank_0(self, failure: Failure) -> None:
        """Until rank 0 has written how it ended, if it still can: srun kills it when another rank leaves before."""
        if failure.rank == 0 and (failure.silent or failure.kind == "dead"):
            return
        deadline = time.monotonic() + WRITTEN
        while time.monotonic() < deadline and 0 not in [rank for rank, _ in self._lost_here()]:
            if self._ask(lambda store: store.check(["written"]), otherwise=True):  # or its store has gone with it
                return
            time.sleep(0.1)

    # --- who was first ------------------------------------------------------------------------------------------

    def _claim(self, failure: Failure) -> Failure:
        """The job's first failure: this one, unless another rank was quicker.

        The store decides, and where it can't be reached (it may have gone with the rank or the host that failed)
        a file in the run directory, which the one that won in the store makes as well.
        """
        mine = json.dumps(asdict(failure))
        first = self._ask(lambda store: store.compare_set("failed", "", mine).decode(), otherwise=mine)
        if first != mine:
            return Failure(**json.loads(first))
        with contextlib.suppress(OSError, ValueError):
            self._errors.mkdir(parents=True, exist_ok=True)
            for old in self._errors.glob(".first-*"):  # of earlier attempts
                if self._world.token not in old.name:
                    old.unlink(missing_ok=True)
            draft = self._claim_file.with_name(f"{self._claim_file.name}.{self._world.rank}")
            draft.write_text(mine)
            try:
                os.link(draft, self._claim_file)
            except FileExistsError:
                return Failure(**json.loads(self._claim_file.read_text()))
            finally:
                draft.unlink()
        return failure

    def _claimed(self) -> bool:
        return self._told_by_another() or self._claim_file.exists()

    def _told_by_another(self) -> bool:
        return self._ask(lambda store: store.check(["failed"]), otherwise=False)

    @property
    def _claim_file(self) -> Path:
        return self._errors / f".first-{self._world.token}"

    # --- what can be seen of the others -------------------------------------------------------------------------

    def _beats(self) -> dict[int, str]:
        """Last beat of every rank that has told one; empty when the store can't be reached."""
        def read(store: dist.Store) -> dict[int, str]:
            return {rank: store.get(f"beat/{rank}").decode() for rank in range(self._world.size)
                    if store.check([f"beat/{rank}"])}

        return self._ask(read, otherwise={})

    def _marks(self) -> dict[int, Mark]:
        """How far the other ranks say they are."""
        return {rank: tuple(json.loads(beat)[0]) for rank, beat in self._beats().items() if rank != self._world.rank}

    def _lost_here(self) -> list[tuple[int, bool]]:
        """Ranks of this host whose process is gone (False) or stopped (True)."""
        states = [(rank, _state(pid)) for rank, pid in enumerate(self._world.pids) if pid and rank != self._world.rank]
        return [(rank, state == "T") for rank, state in states if state in ("", "Z", "X", "T")]


def _state(pid: int) -> str:
    """A process's state as the kernel's letter (T: stopped by a signal, Z: dead), "" when there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _connect() -> dist.Store:
    """A connection of the watch thread's own to the job's store, so that it never waits for the main thread's."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)
    return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def kind_of(error: BaseException) -> Kind:
    """What an exception that ends a rank counts as."""
    if isinstance(error, UserError | RunFailed):
        return error.kind  # type: ignore[return-value]
    host_memory = "DefaultCPUAllocator: can't allocate memory" in str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or host_memory:
        return "memory"
    if isinstance(error, ConnectionError) or is_peer_loss(error):
        return "network"
    if isinstance(error, OSError):
        return "disk"
    if isinstance(error, torch.AcceleratorError) or DEVICE_ERROR.search(str(error)):
        return "device"
    return "bug"


def is_peer_loss(error: BaseException) -> bool:
    """Whether an exception says that a collective broke, rather than that this rank did something wrong."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Broken pipe", "NCCL",
             "Timed out waiting", "Socket Timeout", "Application timeout", "Connection refused")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
