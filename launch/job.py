"""What runs inside the allocation, one process per GPU: it finds its place, meets the others, and trains.

    $BLOCK python -P -u -m launch.job SNAPSHOT      under srun; submitit calls `Task` to the same end

The stop signals are blocked when it starts. One that comes before the handlers stand is delivered then, and not lost.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_ddp.errors import UserError
from alexnet_ddp.invocation import train
from alexnet_ddp.runfiles import LOCAL_JOB, job_of, read_attempts
from alexnet_ddp.words import answer, leave
from launch.place import place_of
from launch.rendezvous import enter
from launch.slurm import JobFacts
from launch.snapshot import Snapshot, opened

LOCAL_REQUEUE = 144  # exit code by which submitit's local executor starts a job again


class Task:
    """What submitit pickles: by reference to this module, which the job takes from its snapshot."""

    def __init__(self, snapshots: Sequence[str]) -> None:
        """`snapshots`: paths by index in the job array, one without an array."""
        self.snapshots = list(snapshots)

    def __call__(self) -> int:
        """Runs the task; leaves by SystemExit unless the run has finished, so that the exit code is the task's."""
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit would log it as bypassed
        code = main([self.snapshots[int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)]])
        if "SLURM_JOB_ID" in os.environ:
            atexit.register(leave, code)  # where code is 0, submitit has something to write first
        if code:
            raise SystemExit(code)
        return code


def main(words: Sequence[str]) -> int:
    """This task's part of an attempt, from the snapshot at `words[0]`; returns the exit code."""
    try:
        snapshot = opened(Path(words[0]))
    except UserError as mistake:
        print(f"alexnet-ddp: error: {mistake}", file=sys.stderr, flush=True)
        return mistake.code
    return run_here(snapshot) if "SUBMITIT_LOCAL_GLOBALID" in os.environ else run(snapshot)


def run(snapshot: Snapshot) -> int:
    """Takes this task's place among the others and trains; returns the exit code."""
    try:
        enter()
    except UserError as failure:  # the other ranks can't be told; each says what it sees
        print(f"alexnet-ddp: error: {failure}", file=sys.stderr, flush=True)
        return failure.code
    return answer(train, [str(snapshot.path / "recipe.yaml"),
                          *(["--accept-changes"] if snapshot.accept_changes else [])])


def run_here(snapshot: Snapshot) -> int:
    """A task of submitit's local executor, which has no batch shell: rank 0 opens and closes the attempt."""
    from launch import attempts

    place = place_of(os.environ)
    assert place is not None
    if place.rank:
        return run(snapshot)
    earlier = read_attempts(snapshot.run_dir)
    restart = sum(told["event"] == "begin" and told["job"] == place.job for told in earlier)
    os.environ[LOCAL_JOB] = f"{place.job}.{restart}"
    job = job_of(os.environ)
    for line in attempts.begin(snapshot, job):
        if line.startswith("exit "):
            return int(line.removeprefix("exit "))
    code = run(snapshot)
    # Nobody preempts here: TERM is the user's, USR2 submitit's own time limit.
    facts = JobFacts(job=job.id, raw=job.id, name="", state="RUNNING", reason="", partition="", requeue=True,
                     restarts=restart, time_limit=None, start_time=None, end_time=None, preempt_time=None)
    decision = attempts.judge(snapshot, job, exit_code=code, facts=facts)
    return LOCAL_REQUEUE if decision.action == "requeue" else code


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
