"""What a run directory says of itself, for those who must answer without torch: `submit`, `status`, the batch shell.

    state.json        where the run stands (written by rank 0, and by the batch shell once the ranks are gone)
    classes.json      what the logits stand for: the names of the training data's classes, in order
    metrics.jsonl     every logging step and evaluation (alexnet_ddp.sinks)
    attempts.jsonl    every attempt in a job: when it began, and why it ended and came back or not
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet_ddp.errors import UserError

STATE = "state.json"
CLASSES = "classes.json"
ATTEMPTS = "attempts.jsonl"
METRICS = "metrics.jsonl"
LOCAL_JOB = "ALEXNET_LOCAL_JOB"  # environment: JOB.RESTART
CHECKPOINT = re.compile(r"step_(\d{8,})")


def read_state(run_dir: Path) -> dict[str, Any]:
    """state.json, {} where there is none that can be read."""
    try:
        known = json.loads((run_dir / STATE).read_text())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def replace_state(run_dir: Path, known: dict[str, Any]) -> None:
    """Replaces state.json as a whole: after a kill or a power-off there is the old one or the new one."""
    draft = run_dir / f".{STATE}.{secrets.token_hex(4)}"
    with draft.open("w") as file:
        file.write(json.dumps(known, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, run_dir / STATE)


@dataclass(frozen=True)
class Job:
    """A start of a job. `array` is `123_4` for a task of an array: the name to requeue it by. No job: id is ""."""

    id: str
    restart: int = 0
    array: str | None = None

    @property
    def name(self) -> str:
        return self.array or self.id

    @property
    def facts(self) -> dict[str, Any]:
        """As state.json and attempts.jsonl tell it."""
        return {"job": self.id or None, "array": self.array, "restart": self.restart}


def job_of(environment: Mapping[str, str]) -> Job:
    """The job that this process belongs to: Slurm's, or one of submitit's local executor (told by launch.job)."""
    if LOCAL_JOB in environment:
        name, _, restart = environment[LOCAL_JOB].rpartition(".")
        return Job(name, int(restart))
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return Job(environment.get("SLURM_JOB_ID", ""), int(environment.get("SLURM_RESTART_COUNT") or 0),
               f"{array}_{task}" if array and task else None)


@dataclass(frozen=True)
class Saved:
    """A published checkpoint, by its name: its contents are not verified here."""

    step: int
    path: Path
    time: float  # unix time of its manifest


def newest_checkpoint(run_dir: Path) -> Saved | None:
    """The newest published checkpoint, None before the first."""
    found = []
    for manifest in (run_dir / "checkpoints").glob("step_*/manifest.json"):
        name = CHECKPOINT.fullmatch(manifest.parent.name)
        if name:
            found.append((int(name[1]), manifest))
    if not found:
        return None
    step, manifest = max(found)
    try:
        return Saved(step, manifest.parent, manifest.stat().st_mtime)
    except FileNotFoundError:  # retention was quicker: then there is a newer one
        return newest_checkpoint(run_dir)


def read_identities(run_dir: Path) -> dict[str, str]:
    """Fingerprints of the data that a run was trained and evaluated on (`train`, `val`), by its newest checkpoint.

    {} where there is none, or none that says so.
    """
    saved = newest_checkpoint(run_dir)
    try:
        known = json.loads((saved.path / "manifest.json").read_text())["lineage"]["identities"] if saved else {}
        return {str(key): value for key, value in known.items() if isinstance(value, str) and value}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """All that attempts.jsonl tells, oldest first; a line cut off by a power-off is left out."""
    try:
        lines = (run_dir / ATTEMPTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    told = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            told.append(record)
    return told


def add_attempt(run_dir: Path, event: str, **facts: Any) -> None:
    """Appends a line to attempts.jsonl; `event` is begin or end."""
    record = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ATTEMPTS).open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a line cut off by a power-off
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def check_not_set_aside(init_from: str, run_dir: Path, *, name: str, cwd: Path | None = None) -> None:
    """Raises UserError when --fresh would rename the very directory that a new run is to begin from. `cwd`: where a
    relative path starts, the working directory by default."""
    for text in filter(None, (init_from, init_from.rpartition("@")[0])):
        if ((cwd or Path()) / os.path.expanduser(text)).resolve().is_relative_to(run_dir.resolve()):
            raise UserError(f"init_from={init_from} lies in {run_dir}, which --fresh sets aside under another name. "
                            f"Give the new run a name of its own (name={name}_2) and leave out --fresh.")


def free_name(run_dir: Path) -> Path:
    """A name beside the run directory under which --fresh keeps the old run."""
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    return aside
