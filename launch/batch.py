"""The lines of a job's batch shell around srun: the same for `alexnet-ddp submit` and for slurm/*.sbatch.

    before   keep this shell alive, block the stop signals for the ranks, open the attempt
    srun     $BLOCK "$TASK_PYTHON" -P -u -m launch.job "$SNAPSHOT"       (submitit writes its own line)
    after    decide whether the job comes back, and leave with srun's exit code
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

SIGNALS = "HUP,INT,TERM,USR1,USR2"

OPEN = [
    "# What is meant for the ranks must not end this shell: it decides about the requeue once they are gone.",
    "set +e",
    "trap : HUP TERM USR1 USR2",
    'export PYTHONPATH="$SNAPSHOT${PYTHONPATH:+:$PYTHONPATH}"',
    "# Stop signals stay pending until the ranks' handlers stand, so that one that comes during imports is not lost.",
    f'BLOCK="env --block-signal={SIGNALS}"',
    'if [ "$TASK_PYTHON" != "$PYTHON" ] || ! $BLOCK true 2>/dev/null; then BLOCK="$TASK_PYTHON -P -m launch.block"; fi',
    'eval "$("$PYTHON" -P -m launch.attempts begin "$SNAPSHOT")"',
]
CLOSE = [
    "status=$?",
    "# With proctrack/linuxproc, what is meant for this shell also reaches the children that decide for it.",
    "trap '' HUP TERM USR1 USR2",
    '"$PYTHON" -P -m launch.attempts end "$SNAPSHOT" --exit-code "$status"',
    'exit "$status"',
]


def before(snapshots: Sequence[Path], *, python: str, task_python: str | None = None) -> list[str]:
    """Bash lines before srun. `snapshots` by index in the job array, one without an array.

    `python` runs on the host, `task_python` in the tasks where that differs (in a container).
    """
    places = " ".join(shlex.quote(str(snapshot)) for snapshot in snapshots)
    return [
        f"PYTHON={shlex.quote(python)}",
        f"TASK_PYTHON={shlex.quote(task_python) if task_python else '$PYTHON'}",
        f"SNAPSHOTS=({places})",
        "SNAPSHOT=${SNAPSHOTS[${SLURM_ARRAY_TASK_ID:-0}]}",
        *OPEN,
    ]


def after() -> list[str]:
    """Bash lines right after srun: they read its exit status first."""
    return list(CLOSE)
