"""`submit --follow`: the log of rank 0 as it grows, over requeues, until the run is over. Ctrl-C ends only that."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alexnet_ddp.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER
from alexnet_ddp.runfiles import read_state
from launch import slurm
from launch.slurm import Queued

LOOK = 0.5  # seconds between two looks at the logs
ASK = 10.0  # seconds between two questions to Slurm while all is well
ASK_SOON = 2.0  # ... once the run says that it is over
SETTLE = 30.0  # seconds for which a job may look dead while Slurm is about to bring it back
OVER = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE"}
PERHAPS = {"NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "REQUEUED", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"}


@dataclass
class Followed:
    """A run that is followed. `job` is its Slurm job (12, 12_3), or the number of a local run's process."""

    run_dir: Path
    log: Path
    job: str
    label: str = ""  # put before each line, where several are followed
    over: bool = False
    _read: int = 0  # bytes of the log that were shown
    _cut: bytes = field(default=b"", repr=False)  # a line that has not ended yet
    _waits: str = ""  # why it waits, as it was last told
    _doubtful: float | None = None  # monotonic time since when it has looked dead

    def show(self, *, last: bool = False) -> None:
        """Writes what is new in the log; with `last` also a line that hasn't ended."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except OSError:
            return
        self._read += len(new)
        if not self.label:
            _write(new)
            return
        *lines, self._cut = (self._cut + new).split(b"\n")
        if last and self._cut:
            lines.append(self._cut)
        _write(b"".join(f"{self.label}| ".encode() + line + b"\n" for line in lines))

    def said_over(self) -> bool:
        """Whether state.json says that this job will not come back."""
        state = read_state(self.run_dir)
        decision = state.get("requeue") or {}
        decided = decision.get("decision") == "stop" and self.job in (decision.get("job"), decision.get("array"))
        return state.get("status") == "finished" or decided

    def judge(self, known: Queued | None, *, now: float) -> None:
        """Whether it is over by Slurm's word on its job; None: Slurm doesn't know it any more."""
        if known is None or known.state in OVER:
            self.over = True
        elif known.state in PERHAPS:
            self._doubtful = now if self._doubtful is None else self._doubtful
            self.over = now - self._doubtful > SETTLE
        else:
            self._doubtful = None
            waits = f"{known.state.lower()} ({known.reason})" if known.reason else known.state.lower()
            if known.state == "PENDING" and waits != self._waits:
                _say(f"job {self.job} is {waits}")
            self._waits = waits

    def exit_code(self) -> int:
        """How the run ended, by the codes of `alexnet-ddp train`."""
        state = read_state(self.run_dir)
        if (state.get("failure") or {}).get("kind") == "user":
            return EXIT_USER
        cause = (state.get("requeue") or {}).get("cause")
        codes = {"finished": EXIT_FINISHED, "preempted": EXIT_STOPPED}
        return EXIT_USER if cause == "user error" else codes.get(str(state.get("status")), EXIT_FAILED)


def follow(runs: Sequence[Followed], *, local: bool = False) -> int:
    """Shows the logs until all runs are over; returns the worst of their exit codes, 130 after Ctrl-C."""
    asked = time.monotonic() - ASK + LOOK  # sbatch has just answered: the queue may not know the job yet
    try:
        while not all(run.over for run in runs):
            open_runs = [run for run in runs if not run.over]
            for run in open_runs:
                run.show()
            now = time.monotonic()
            if now - asked >= (ASK_SOON if local or any(run.said_over() for run in open_runs) else ASK):
                asked = now
                _ask(open_runs, local=local, now=now)
            for run in open_runs:
                if run.over:
                    run.show(last=True)
            time.sleep(LOOK)
    except KeyboardInterrupt:
        jobs = " ".join(run.job for run in runs if not run.over)
        _say(f"no longer following; {'process' if local else 'job'} {jobs} goes on. To stop it: "
             + (f"touch {runs[0].run_dir / 'STOP'}" if local else f"scancel {jobs}"))
        return EXIT_INTERRUPTED
    return max((run.exit_code() for run in runs), default=EXIT_FINISHED)


def _ask(runs: Sequence[Followed], *, local: bool, now: float) -> None:
    if local:
        for run in runs:
            run.over = not _lives(int(run.job))
        return
    queued = slurm.queue([run.job for run in runs])
    for run in runs:
        if queued is None:  # Slurm can't be asked: the run's own word is all there is
            run.over = run.said_over()
        else:
            run.judge(next((job for job in queued if run.job in (job.job, job.raw)), None), now=now)


def _lives(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def _write(text: bytes) -> None:
    if text:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), text)


def _say(text: str) -> None:
    print(f"alexnet-ddp: {text}", file=sys.stderr, flush=True)
