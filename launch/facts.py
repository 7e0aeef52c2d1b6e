"""What a run's directory and Slurm's queue tell of a run: for `alexnet-ddp status`, which judges it.

Reads only. A file that is missing, broken or unreadable tells nothing; nothing here raises but for a name that is none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alexnet_ddp.errors import UserError
from alexnet_ddp.runfiles import METRICS, Saved, newest_checkpoint, read_attempts, read_state
from launch import slurm
from launch.slurm import Past, Queued

ASK_EVERY = 10.0  # seconds between two questions to Slurm: many users watch many runs
ANSWER = 5.0  # seconds that Slurm may take to answer
TAIL = 64 * 1024  # bytes of metrics.jsonl that are looked at
SILENT = 3  # of a lease's time to live without a beat: clocks of two machines may differ by a minute


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The lease: whether its owner lives, as far as can be seen from here, and the seconds since its last beat."""

    alive: bool | None  # None: the process is on another machine, or in another container
    age: float
    ttl: float = 60.0

    @property
    def silent(self) -> bool:
        return not self.alive if self.alive is not None else self.age > SILENT * self.ttl


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a run's state is judged from. `state`, `attempts`, `records` are as they lie on the disk: any JSON."""

    run_dir: Path
    now: float
    state: dict[str, Any] = field(default_factory=dict)
    attempts: Sequence[dict[str, Any]] = ()
    records: Sequence[dict[str, Any]] = ()  # the newest training records, oldest first
    saved: Saved | None = None
    saving: bool = False  # a checkpoint is being written
    beat: Beat | None = None  # None: no lease
    epochs: int | None = None
    jobs: Sequence[str] = ()  # the run's jobs (12, 12_3), newest first
    queued: Sequence[Queued] | None = None  # what Slurm knows of them; None: it can't be asked
    past: Sequence[Past] | None = None  # what accounting remembers of the others; None: it can't be asked


# --- gathering --------------------------------------------------------------------------------------------------


class Cluster:
    """Slurm's word on many jobs at once, asked for at most every ASK_EVERY seconds."""

    def __init__(self) -> None:
        self._asked, self._for = -ASK_EVERY, frozenset[str]()
        self._queued: list[Queued] | None = None
        self._past: dict[str, Past] | None = {}

    def look(self, jobs: Iterable[str]) -> tuple[list[Queued] | None, list[Past] | None]:
        """What the queue knows of the jobs, and what accounting remembers of those that the queue doesn't know."""
        wanted = frozenset(jobs)
        if wanted and (wanted != self._for or time.monotonic() - self._asked >= ASK_EVERY):
            self._queued = slurm.queue(wanted, timeout=ANSWER)
            known = {name for one in self._queued or () for name in (one.job, one.raw)}
            over = {name for name, one in (self._past or {}).items() if one.state not in slurm.LIVING}  # for good
            missing = wanted - known - over
            if self._past is not None and missing:
                found = slurm.history(missing, timeout=ANSWER)
                self._past = None if found is None else self._past | {
                    name: one for one in found for name in (one.job, one.raw)}
            self._asked, self._for = time.monotonic(), wanted
        return self._queued, None if self._past is None else list(self._past.values())


def gather(run_dirs: Sequence[Path], cluster: Cluster) -> list[Facts]:
    """The facts of each run; a file that is missing, broken or unreadable tells nothing."""
    facts = [_read(run_dir) for run_dir in run_dirs]
    queued, past = cluster.look(job for one in facts for job in one.jobs)
    return [dataclasses.replace(one, queued=queued, past=past) for one in facts]


def _read(run_dir: Path) -> Facts:
    state, attempts, saved = read_state(run_dir), _attempts(run_dir), None
    with contextlib.suppress(OSError, RecursionError):
        saved = newest_checkpoint(run_dir)
    return Facts(run_dir=run_dir, now=time.time(), state=state, attempts=attempts, records=_records(run_dir),
                 saved=saved, saving=_saving(run_dir), beat=_beat(run_dir), epochs=_epochs(run_dir),
                 jobs=_jobs(run_dir, state, attempts))


def _attempts(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return read_attempts(run_dir)
    except (OSError, ValueError):
        return []


def _records(run_dir: Path) -> list[dict[str, Any]]:
    """The newest training records, from the end of metrics.jsonl: the file may be long."""
    try:
        with (run_dir / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read(TAIL).decode(errors="replace").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("kind") == "train":
                records.append(record)
    return records[-20:]


def _saving(run_dir: Path) -> bool:
    with contextlib.suppress(OSError):
        return any((run_dir / "checkpoints").glob(".tmp-*-*"))
    return False


def _epochs(run_dir: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"^epochs:\s*(\d+)\s*$", (run_dir / "config.yaml").read_text(), flags=re.MULTILINE)
        return int(found[1]) if found else None
    return None


def _jobs(run_dir: Path, state: dict[str, Any], attempts: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The last two jobs of a run, newest first: submitted, begun or in state.json; else those of submitit's folder."""
    told = [str(one.get("array") or one.get("job") or "") for one in [state, *attempts]]
    if not any(told):
        with contextlib.suppress(OSError):
            scripts = sorted((run_dir / "slurm").glob("*_submission.sh"), key=lambda path: path.stat().st_mtime)
            told = [path.name.partition("_")[0] for path in scripts]
    jobs = dict.fromkeys(job for job in reversed(told) if re.fullmatch(r"\d+(_\d+)?", job))
    return tuple(jobs)[:2]


def _beat(run_dir: Path) -> Beat | None:
    """The run's lease as seen from this machine."""
    path = run_dir / "lease.json"
    try:
        age, found = max(0.0, time.time() - path.stat().st_mtime), json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    found = found if isinstance(found, dict) else {}
    here = (socket.gethostname(), _line("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid"))
    alive = None
    if here == (found.get("host"), found.get("boot"), found.get("pid_namespace")):
        # The name before it, in parentheses, may hold anything; then the state is the first, the start time the 20th.
        fields = _line(f"/proc/{found.get('pid')}/stat").rpartition(")")[2].split()
        alive = len(fields) > 19 and fields[0] not in "ZX" and fields[19] == found.get("start_time")
    ttl = found.get("ttl")
    return Beat(alive=alive, age=age, ttl=ttl if isinstance(ttl, float) and ttl > 0 else 60.0)


def _line(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace").strip()
    return ""


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: it was started, or submitted."""
    with contextlib.suppress(OSError):
        return path.is_dir() and any((path / name).exists() for name in
                                     ("state.json", "attempts.jsonl", "config.yaml", "snapshots", "lease.json"))
    return False


def find(names: Sequence[str], *, runs: Path) -> list[Path]:
    """The run directories meant: paths or names under `runs`; without names all there. Raises UserError."""
    try:
        here = sorted(path for path in runs.iterdir() if not path.name.startswith("."))
    except OSError:
        here = []
    if not names:  # one that --fresh put aside is asked for by name
        return [path for path in here if is_run(path) and not re.search(r"\.old-\d+$", path.name)]
    found = []
    for name in names:
        places = [place for place in (runs / name, Path(name)) if place.is_dir()]
        if not places:
            near = difflib.get_close_matches(name, [path.name for path in here], n=1)
            advice = f" Did you mean {near[0]}?" if near else " alexnet-ddp status lists all; --runs is their folder."
            raise UserError(f"There is no run '{name}' in {runs}, nor a directory of that name.{advice}")
        found.append(places[0])
    return found
