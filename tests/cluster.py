"""The test cluster of tests/slurm/cluster.sh, seen from Python: its nodes, the jobs on it, and what is left of them.

    cluster = Cluster(); cluster.up()
    job = Job("12")                        # watched from now on: every state it is seen in, with the time
    job.wait_for("RUNNING", restarts=1)
    cluster.power_off("n2"); cluster.start("n2")
    job.processes()                        # of this job, on any node
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parent / "slurm" / "cluster.sh"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
GLANCE = 0.2  # seconds between two looks at a job


class Cluster:
    """Four nodes, n1 to n4, of two faked GPUs each; partitions low (preemptible, grace 20 s) and high."""

    nodes = ("n1", "n2", "n3", "n4")

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._with_user_signal, self._users = False, 0

    def up(self) -> None:
        """From nothing, once no other session has one; installs packages only where ALEXNET_TEST_SLURM=1 allows it."""
        self._lock = (Path(tempfile.gettempdir()) / "alexnet-slurm.lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._script("down")
        self._script("up")
        os.environ["SLURM_CONF"] = self._script("config").strip()

    def down(self) -> None:
        self._script("down")
        os.environ.pop("SLURM_CONF", None)
        self._lock.close()

    def start(self, node: str) -> None:
        """Starts the daemon of a node that was powered off."""
        self._script("start", node)

    def power_off(self, node: str) -> None:
        """Kills everything that runs on a node, Slurm's daemons included, at once and without a word."""
        for pid in processes_on(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    @contextlib.contextmanager
    def configured(self, *, user_signal: bool | None = None) -> Iterator[None]:
        """Within, preempted jobs get their own --signal first (True) or nothing but TERM (False); None: as it is now.

        It isn't changed meanwhile: Slurm, configured anew, takes a lost node for a living one for another minute.
        """
        with self._changed:
            wanted = self._with_user_signal if user_signal is None else user_signal
            self._changed.wait_for(lambda: self._users == 0 or self._with_user_signal == wanted)
            if self._with_user_signal != wanted:
                self._script("user-signal", "on" if wanted else "off")
                self._with_user_signal = wanted
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def node_state(self, node: str) -> str:
        return slurm("sinfo", "-h", "-n", node, "-p", "low", "-o", "%T").strip().rstrip("*")

    def wait_for_node(self, node: str, *states: str, timeout: float = 60.0) -> None:
        _wait(lambda: self.node_state(node) in states, timeout, lambda: f"{node} is {self.node_state(node)}")

    def _script(self, *words: str) -> str:
        done = subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"cluster.sh {' '.join(words)}:\n{done.stdout}{done.stderr}"
        return done.stdout


def slurm(*words: str) -> str:
    """What one of Slurm's commands prints; "" when it fails."""
    return subprocess.run(words, capture_output=True, text=True, timeout=30).stdout


def submit_script(*words: str) -> str:
    """`sbatch WORDS`; the job's id."""
    done = subprocess.run(["sbatch", "--parsable", *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- jobs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A job as it was seen."""

    time: float  # unix seconds
    state: str
    restarts: int
    reason: str


class Job:
    """A job, `12`, or `12_3` for a task of an array, and the moments of its life so far."""

    def __init__(self, job: str) -> None:
        self.id = job
        self.moments: list[Moment] = []
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name=f"job {job}", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._over.is_set():
            self._look()
            self._over.wait(GLANCE)

    def _look(self) -> None:
        facts = _facts(self.id)
        if facts:
            seen = Moment(time.time(), facts["JobState"], int(facts["Restarts"]), facts["Reason"])
            if not self.moments or (seen.state, seen.restarts) != (self.moments[-1].state, self.moments[-1].restarts):
                self.moments.append(seen)

    @property
    def raw(self) -> str:
        """SLURM_JOB_ID: of an array's task it is known once that has started."""
        return _facts(self.id).get("JobId", self.id)

    @property
    def state(self) -> str:
        return _facts(self.id).get("JobState", "")

    @property
    def restarts(self) -> int:
        return int(_facts(self.id).get("Restarts", 0))

    def first(self, *states: str, restarts: int = 0) -> float | None:
        """When the job was first seen in one of these states of its start number `restarts`."""
        return next((seen.time for seen in list(self.moments)
                     if seen.state in states and seen.restarts == restarts), None)

    def wait_for(self, *states: str, restarts: int = 0, timeout: float = 60.0) -> float:
        """When the job was first seen so; waits for it."""
        _wait(lambda: self.first(*states, restarts=restarts) is not None, timeout,
              lambda: f"job {self.id} was not {' or '.join(states)} in its start {restarts}: {self.moments}")
        return self.first(*states, restarts=restarts) or 0.0

    def wait_until_over(self, *, timeout: float = 120.0) -> str:
        """Waits for the job's end, when Slurm won't start it again by itself; its last state."""
        _wait(lambda: bool(self.moments) and self.moments[-1].state in ENDED and self.state in ENDED, timeout,
              lambda: f"job {self.id} isn't over: {self.moments}")
        self._over.set()
        self._watcher.join()
        return self.moments[-1].state

    def signal(self, name: str) -> float:
        """`scancel --signal`, to the ranks; when it was sent."""
        sent = time.time()
        slurm("scancel", f"--signal={name}", self.id)  # of an array's task 22.05 says that it failed when it hasn't
        return sent

    def cancel(self) -> None:
        slurm("scancel", self.id)

    def limit(self, minutes: int) -> None:
        """Gives the job another time limit, as an administrator may."""
        slurm("scontrol", "update", f"JobId={self.id}", f"TimeLimit={minutes}")

    def processes(self) -> list[int]:
        """What runs of this job on any node, Slurm's own step daemons included."""
        raw = self.raw
        wanted, daemon = f"SLURM_JOB_ID={raw}".encode(), f"slurmstepd: [{raw}.".encode()
        return [pid for pid in _all_pids()
                if wanted in _environment(pid).split(b"\0") or _command(pid).startswith(daemon)]

    def ranks(self) -> dict[int, int]:
        """Process number by rank, of those that are there by now."""
        found = {}
        for pid in self.processes():
            told = dict(word.split(b"=", 1) for word in _environment(pid).split(b"\0") if b"=" in word)
            words = _command(pid).split(b"\0")
            if b"SLURM_STEP_ID" in told and b"python" in words[0] and b"launch.agent" not in words:
                rank = told.get(b"RANK", told[b"SLURM_PROCID"])
                found.setdefault(int(rank), pid)
        return found

    def wait_for_ranks(self, count: int, *, timeout: float = 60.0) -> dict[int, int]:
        """Waits until so many ranks are processes: importing, most likely."""
        _wait(lambda: len(self.ranks()) == count, timeout, lambda: f"ranks of job {self.id}: {self.ranks()}")
        return self.ranks()

    def wait_until_gone(self, *, timeout: float = 30.0) -> None:
        """Asserts that in the end nothing of this job is left on any node."""
        _wait(lambda: not self.processes(), timeout,
              lambda: f"left of job {self.id}: {[(pid, _command(pid)) for pid in self.processes()]}")


def _facts(job: str) -> dict[str, str]:
    """The plain words of `scontrol show job`; {} where there is no such job (or Slurm doesn't answer just now)."""
    lines = slurm("scontrol", "show", "job", "-o", job).splitlines()
    for line in lines:  # the array's id also names its task that waits
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "_" not in job or f"{words.get('ArrayJobId')}_{words.get('ArrayTaskId')}" == job or len(lines) == 1:
            return words
    return {}


# --- processes ----------------------------------------------------------------------------------------------------


def processes_on(node: str) -> list[int]:
    """All processes of a virtual node: they share its host name's namespace or, without one, its name."""
    daemon = next(pid for pid in _all_pids() if _command(pid).split(b"\0")[:3] == [b"slurmd", b"-N", node.encode()])
    space = _namespace(daemon)
    if space != _namespace(os.getpid()):
        return [pid for pid in _all_pids() if _namespace(pid) == space]
    wanted = f"SLURMD_NODENAME={node}".encode()
    tasks = [pid for pid in _all_pids() if wanted in _environment(pid).split(b"\0")]
    steps = {_parent(pid) for pid in tasks}
    return [daemon, *(pid for pid in steps if _command(pid).startswith(b"slurmstepd")), *tasks]


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return ""


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment(pid: int) -> bytes:
    return _read(f"/proc/{pid}/environ")


def _command(pid: int) -> bytes:
    return _read(f"/proc/{pid}/cmdline")


def _parent(pid: int) -> int:
    found = re.search(rb"\) \S (\d+)", _read(f"/proc/{pid}/stat"))
    return int(found[1]) if found else 0


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _wait(there: Callable[[], bool], timeout: float, otherwise: Callable[[], str]) -> None:
    """Waits until `there()`; fails with `otherwise()` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not there():
        assert time.monotonic() < deadline, f"within {timeout:.0f} s: {otherwise()}"
        time.sleep(GLANCE / 2)
