"""The folder on a node that holds one run's cache: shared by its ranks there, found again by the next attempt.

    FOLDER/alexnet-ddp-UID/NAME-KEY/    mode 0700
        about.json     whose it is: run directory, data, stage
        lock           every living rank holds a shared flock on it; its time says when the folder was last in use
        NNNNN.shard    the records of a virtual shard (see cache_file), written by the rank that owns it

A folder is taken away by the last rank of a run that has finished. What was left behind is swept when a cache is next
opened on the node by the same user. No folder is touched while a process holds its lock; one that nobody holds goes

- when it is this run's with other contents (the data or the stage changed, or `--fresh` began another experiment);
- when the run's state.json says `finished`;
- when the run's directory has gone from a folder of runs that is there;
- when the run has failed or was stopped and the batch shell decided that it won't be requeued;
- when nobody has used it for a day: a run that waits in a queue for less finds its cache again.

So a living run's is never swept, nor, for a day, that of one which may come back.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from alexnet_ddp.errors import UserError
from alexnet_ddp.runfiles import read_state

ABOUT, LOCK = "about.json", "lock"
SHARD = re.compile(r"(\d{5,})\.shard")
UNUSED_FOR = 24 * 3600.0  # seconds after which nobody is expected back
UNFINISHED_FOR = 3600.0  # seconds after which a folder without about.json is no longer being made


class CacheFolder:
    """A run's folder, locked. `swept` says what was taken away on the way, a line each."""

    def __init__(self, path: Path, lock: int, swept: list[str]) -> None:
        self.path, self.swept = path, swept
        self._lock: int | None = lock

    @classmethod
    def open(cls, base: Path, *, run_dir: Path, facts: dict[str, Any]) -> CacheFolder:
        """Makes or finds the folder in `base` for a run with these `facts`, after sweeping those left behind.

        UserError where `base` can't be used, or somebody else's folder is in the way.
        """
        run_dir = run_dir.absolute()
        about = json.dumps({"schema": 1, "run_dir": str(run_dir), **facts}, sort_keys=True, indent=1) + "\n"
        digest = hashlib.sha256(about.encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]", "_", run_dir.name)[:60]
        try:
            base.mkdir(parents=True, exist_ok=True)
            house = house_in(base)
            house.mkdir(mode=0o700, exist_ok=True)
            _check_own(house)
            swept = sweep(house, run_dir=run_dir, keep=f"{name}-{digest}")
            path = house / f"{name}-{digest}"
            lock = _enter(house, path)
            if _text(path / ABOUT) != about:  # all ranks of the node write the same
                (path / ABOUT).write_text(about)
            os.utime(lock)
            return cls(path, lock, swept)
        except OSError as error:
            raise unusable(base, error) from None

    def shard(self, number: int) -> Path:
        return self.path / f"{number:05d}.shard"

    def evict(self, keep: Collection[int]) -> int:
        """Takes away the shards that no rank on this node owns any more; returns how many."""
        gone = 0
        for path in self.path.glob("*.shard"):
            match = SHARD.fullmatch(path.name)
            if match and int(match[1]) not in keep:
                path.unlink(missing_ok=True)
                gone += 1
        return gone

    def used(self) -> int:
        """Bytes that the folder's files really take."""
        taken = 0
        for path in self.path.iterdir():
            with contextlib.suppress(FileNotFoundError):
                taken += path.stat().st_blocks * 512
        return taken

    def close(self) -> None:
        """Leaves the folder to the next attempt."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.utime(self._lock)
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """The run has finished: the last rank on the node to say so takes the folder away."""
        self.close()
        with _alone(self.path) as alone:
            if alone:
                _take_away(self.path)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()  # if it was the last


def unusable(base: Path, error: OSError) -> UserError:
    """What to tell the user where a folder for caches fails them."""
    return UserError(f"A cache needs a folder on the node that can be written, and {base} can't be used: "
                     f"{error.strerror or error} ({error.filename or base}). Set data.cache_dir to another folder, or "
                     "data.cache=none.")


def house_in(base: Path) -> Path:
    """The folder of this user's caches."""
    return base / f"alexnet-ddp-{os.geteuid()}"


def sweep(house: Path, *, run_dir: Path | None = None, keep: str = "") -> list[str]:
    """Takes away what nobody wants in `house` but the folder named `keep` (the rule: this module's docstring).

    `run_dir` is the run that is being opened. Returns a line for each folder taken away.
    """
    swept = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(house.iterdir()):
            if path.name == keep or path.is_symlink() or not path.is_dir():
                continue
            with contextlib.suppress(OSError), _alone(path) as alone:
                why = _unwanted(path, run_dir) if alone else ""
                if why:
                    _take_away(path)
                    swept.append(f"{path} was taken away: {why}")
    return swept


def _unwanted(path: Path, run_dir: Path | None) -> str:
    """Why a folder that no process holds may go, "" where it must stay."""
    lock = path / LOCK
    idle = time.time() - (lock if lock.exists() else path).stat().st_mtime
    try:
        owner = Path(json.loads((path / ABOUT).read_text())["run_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        return "it was never finished" if idle > UNFINISHED_FOR else ""
    if owner == run_dir:
        return "the run wants other contents now"
    if not owner.exists() and owner.parent.exists():
        return f"{owner} has gone"
    state = read_state(owner)
    if state.get("status") == "finished":
        return f"{owner} is finished"
    requeue = state.get("requeue")
    if (state.get("status") in ("failed", "preempted") and isinstance(requeue, dict)
            and requeue.get("decision") == "stop"
            and all(requeue.get(name) == state.get(name) for name in ("job", "restart"))):
        return f"{owner} won't be requeued"
    return f"nobody has used it for {idle / 3600:.0f} hours" if idle > UNUSED_FOR else ""


def _enter(house: Path, path: Path) -> int:
    """Makes the folder where there is none and returns a descriptor that holds its lock with others."""
    while True:
        try:
            house.mkdir(mode=0o700, exist_ok=True)  # the last rank of another run may have taken it away
            _check_own(house)
            path.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # it was swept under our hands
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path / LOCK)):
                return lock
        os.close(lock)


def _check_own(house: Path) -> None:
    """The folder of folders must be a directory of ours: in /dev/shm and /tmp anybody can make one by its name."""
    found = os.lstat(house)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UserError(f"A cache must lie in a folder of one's own, and {house} belongs to user {found.st_uid}"
                        f"{'' if stat.S_ISDIR(found.st_mode) else ' and is no folder'}. Set data.cache_dir to another "
                        "folder, or ask for it to be removed.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        os.chmod(house, 0o700)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Holds a folder's lock alone, if no other process (or rank) holds it."""
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield path.exists()  # being made, or cut off while it was taken away: its age tells
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)


def _take_away(path: Path) -> None:
    """Its lock goes last: one who waits for it then finds the name gone, and makes the folder anew."""
    for name in sorted(os.listdir(path), key=lambda name: (name == LOCK, name == ABOUT)):
        (path / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody makes it anew already
        path.rmdir()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
