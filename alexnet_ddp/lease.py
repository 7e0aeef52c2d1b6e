"""Who owns a run directory: one file with a heartbeat, not flock (void on network file systems).

Two rules make it hold where there is nothing but rename and link:

- The name `lease.json` is only ever created by `os.link`, which fails when the name exists, and only ever
  freed by renaming it to a private name and looking at what was moved: a lease that another took meanwhile
  is put back.
- The heartbeat writes into the open file, not to the name. An owner that was taken over while it was
  suspended goes on beating in a file that nobody looks at; it can't take the name back.

An owner that lost the lease learns it from `check`, which the checkpoint writer calls before each publish.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from alexnet_ddp.errors import RunFailed, UserError

NAME = "lease.json"
BEATS_PER_TTL = 6

Verdict = Literal["take", "refuse", "watch"]


class LeaseLost(RunFailed):
    """Another process owns the run directory now; this one must not write to it any more."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease, as the file tells it; `start_time` of the process in clock ticks since the boot."""

    job: str | None = None
    restart: int = 0
    host: str = ""
    boot: str = ""
    pid: int = 0
    pid_namespace: str = ""
    start_time: str = ""
    token: str = ""
    ttl: float = 60.0  # seconds without a beat after which others may take over
    beat: int = 0

    def encode(self) -> bytes:
        """JSON of a length that does not depend on the beat, so that it can be rewritten in place."""
        text = json.dumps({**asdict(self), "beat": 0}, indent=1)
        return (text.replace('"beat": 0', f'"beat": {self.beat:12d}') + "\n").encode()

    @property
    def age(self) -> str:
        """How long it has been held, from its own beats: clocks of two machines are never compared."""
        minutes = self.beat * self.ttl / BEATS_PER_TTL / 60
        return f"for about {minutes:.0f} min" if minutes >= 1 else "for less than a minute"


def judge(found: Holder | None, *, me: Holder, process_alive: bool) -> Verdict:
    """Whether `me` may take the lease `found`: pure. `process_alive` counts for a process `me` can see."""
    if found is None:
        return "take"
    if _sees(found, me):
        return "refuse" if process_alive else "take"
    if found.host == me.host and found.boot and me.boot and found.boot != me.boot:
        return "take"  # the machine has been started anew since
    if found.job is not None and found.job == me.job and me.restart > found.restart:
        return "take"  # the scheduler restarts a job only when nothing of it is left
    return "watch"


def look(run_dir: Path) -> tuple[Holder, bool | None] | None:
    """Who holds a run directory, without touching it, and whether that process is alive; None when nobody does.

    That is unknown, None, of a process on another machine, or one that can't be seen from here. Raises OSError.
    """
    found = _read(Path(run_dir) / NAME)
    if found is None:
        return None
    return found, _alive(found) if _sees(found, _myself()) else None


class Lease:
    """The right to write to a run directory, held by a heartbeat until `release`."""

    def __init__(self, path: Path, *, holder: Holder, file: int) -> None:
        """Use `acquire`. Starts the heartbeat of a lease that lies at `path`, open for writing as `file`."""
        self.path, self.holder = path, holder
        self._lost: LeaseLost | None = None
        self._released = threading.Event()
        self._file = file
        # A daemon, so that it never keeps a dying process, and its lease, alive.
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        run_dir: Path,
        *,
        job: str | None,
        restart: int,
        ttl: float = 60.0,
        wait: bool = True,
        log: Callable[[str], None] = print,
    ) -> "Lease":
        """Take the run directory, or raise UserError that says who has it.

        A lease whose owner is certainly gone (its process, its boot, its job's earlier start) is taken at
        once, one whose owner is certainly alive is refused at once. Any other is watched until its owner's
        `ttl` in seconds has passed without a beat (of a file that is no lease: ours), after one line
        through `log`; with `wait=False` it is refused instead.
        """
        path = Path(run_dir) / NAME
        me = replace(_myself(), job=job, restart=restart, ttl=ttl)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                found = _read(path)
                alive = found is not None and _sees(found, me) and _alive(found)
                verdict = judge(found, me=me, process_alive=alive)
                if found is not None and verdict == "watch":
                    ttl = found.ttl if found.token else ttl
                    verdict = _watch(path, found, ttl=ttl, log=log) if wait else "refuse"
                if found is not None and verdict == "refuse":
                    raise UserError(_refusal(path.parent, found))
                file = _take(path, found, me)
                if file is not None:
                    return cls(path, holder=me, file=file)
        except OSError as error:
            raise UserError(
                f"the run directory {path.parent} can't be used: {error.strerror} ({error.filename or path}).\n"
                "Choose a place that can be written and has hard links: runs=... is the folder of all runs."
            ) from None

    def check(self) -> None:
        """Raise LeaseLost unless the file still holds our token. Reads one small file."""
        if self._lost is None:
            found = _read(self.path)
            if found is None or not found.token:  # a slow contender may be putting it back right now
                time.sleep(0.2)
                found = _read(self.path)
            if found is None or found.token != self.holder.token:
                now = "nobody: its lease is gone" if found is None else _describe(found)
                self._lost = LeaseLost(f"this process no longer owns {self.path.parent}; it belongs to {now}")
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Stop the heartbeat and give the directory back; harmless when it was lost, or released before."""
        if not self._released.is_set():
            self._released.set()
            self._thread.join()
            os.close(self._file)
            with contextlib.suppress(OSError):  # it goes stale, and our process number says so
                _withdraw(self.path, self.holder.token)

    def _beat(self) -> None:
        while self._lost is None and not self._released.wait(self.holder.ttl / BEATS_PER_TTL):
            self.holder = replace(self.holder, beat=self.holder.beat + 1)
            # A file system that is away for a moment is no reason to stop: the next beat may get through.
            with contextlib.suppress(OSError, LeaseLost):
                os.pwrite(self._file, self.holder.encode(), 0)
                os.fsync(self._file)
            with contextlib.suppress(OSError, LeaseLost):
                self.check()


def _take(path: Path, found: Holder | None, me: Holder) -> int | None:
    """Put our lease in the place of the one judged and return it, open; None when somebody was quicker."""
    if found is not None and not _withdraw(path, found.token):
        return None
    fresh = path.with_name(f".{NAME}.{me.token}")
    file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(file, me.encode())
        os.fsync(file)
        os.link(fresh, path)
        return file
    except FileExistsError:
        now = _read(path)
        if now is not None and now.token == me.token:
            return file  # NFS made the link, lost the answer and asked again
    except BaseException:
        os.close(file)
        raise
    finally:
        fresh.unlink(missing_ok=True)
    os.close(file)
    return None


def _withdraw(path: Path, token: str) -> bool:
    """Remove the lease with this token; False (and all as it was) when it is not there any more.

    Should a third process find the name free while another's lease is being put back, it becomes the owner
    and the second is told by `check`: the worst that a race can do.
    """
    moved = path.with_name(f".{NAME}.{secrets.token_hex(8)}")
    try:
        os.rename(path, moved)
    except FileNotFoundError:
        return False
    found = _read(moved)
    ours = found is not None and found.token == token
    if not ours:
        with contextlib.suppress(FileExistsError):
            os.link(moved, path)
    moved.unlink(missing_ok=True)
    return ours


def _watch(path: Path, found: Holder, *, ttl: float, log: Callable[[str], None]) -> Verdict:
    """Look for a beat until `ttl` seconds have passed on our clock: "refuse" if one came, else "take"."""
    log(f"{path.parent} was held by {_describe(found)}; waiting up to {ttl:.0f} s for a sign of life")
    end = time.monotonic() + ttl
    while time.monotonic() < end:
        time.sleep(min(1.0, ttl / BEATS_PER_TTL / 2))
        now = _read(path)
        if now is None:
            break
        if (now.token, now.beat) != (found.token, found.beat):
            return "refuse"
    return "take"


def _read(path: Path) -> Holder | None:
    """The holder in a lease file; None when there is no file, a nameless holder when it is no lease."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return Holder()


def _sees(found: Holder, me: Holder) -> bool:
    """Whether `me` can look the found process up by its number."""
    return (found.host, found.boot, found.pid_namespace) == (me.host, me.boot, me.pid_namespace)


def _alive(found: Holder) -> bool:
    """Whether a process with this number and start time runs here (a zombie does not)."""
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, so it is there
    state, start_time = _stat(found.pid)
    return state not in ("Z", "X") and start_time in ("", found.start_time)


def _stat(pid: int | str) -> tuple[str, str]:
    """State and start time (clock ticks since the boot) of a process; empty where /proc does not tell."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name before it may hold anything
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _myself() -> Holder:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return Holder(
        host=socket.gethostname(),
        boot=_text("/proc/sys/kernel/random/boot_id"),
        pid=os.getpid(),
        pid_namespace=namespace,
        start_time=_stat("self")[1],
        token=secrets.token_hex(16),
    )


def _describe(found: Holder) -> str:
    if not found.token:
        return f"an unknown process ({NAME} can't be read as a lease)"
    job = f", job {found.job} (start {found.restart})" if found.job is not None else ""
    return f"process {found.pid} on {found.host}{job}"


def _refusal(run_dir: Path, found: Holder) -> str:
    return (
        f"{run_dir} is in use {found.age} by {_describe(found)}, and two runs in one directory would destroy "
        "each other's checkpoints.\n"
        f"Wait for it, stop it (touch {run_dir / 'STOP'}), or give this run another name=..."
    )
