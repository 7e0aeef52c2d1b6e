"""Run directories as `submit` finds and leaves them: who works in them, whether the recipe fits, --fresh, leftovers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alexnet_ddp.changes import differences, refusal
from alexnet_ddp.config import Config
from alexnet_ddp.errors import UserError
from alexnet_ddp.lease import Lease
from alexnet_ddp.runfiles import free_name, newest_checkpoint
from alexnet_ddp.schedule import ENDS_WITH_THE_RUN
from alexnet_ddp.stop import STOP_FILE
from launch import facts as gathering
from launch.facts import Facts
from launch.follow import OVER

Moved = tuple[Path, Path]  # from where, to where


# --- looking ----------------------------------------------------------------------------------------------------


def look(run_dirs: Sequence[Path], configs: Sequence[Config], *, fresh: bool, accept_changes: bool,
         dependency: str) -> tuple[list[Facts], list[int]]:
    """What is known of the runs, and which of them (by index) are still to be trained: finished ones are said to be so.

    Raises UserError when one is in somebody's hands, or was started with another recipe.
    """
    facts = gathering.gather(run_dirs, gathering.Cluster())
    keep = []
    for number, (one, config) in enumerate(zip(facts, configs, strict=True)):
        check_free(one, dependency=dependency)
        if fresh:
            keep.append(number)
            continue
        check_recipe(one.run_dir, config, accept=accept_changes)
        if finished(one, config):
            longer = (f"schedule.name={config.schedule.name} ends with its run"
                      if config.schedule.name in ENDS_WITH_THE_RUN else
                      f"More epochs (epochs={2 * config.epochs}) train it longer")
            print(f"alexnet-ddp: {one.run_dir} is finished: {config.epochs} epochs. {longer}, name=... makes another "
                  "run, --fresh starts over.", file=sys.stderr, flush=True)
            continue
        if (one.run_dir / STOP_FILE).exists():
            raise UserError(f"{one.run_dir / STOP_FILE} asks this run to stop, and the job would do so at once. Remove "
                            f"it first: rm {one.run_dir / STOP_FILE}")
        keep.append(number)
    return facts, keep


def finished(facts: Facts, config: Config) -> bool:
    """Whether there is nothing left to train."""
    return facts.state.get("status") == "finished" and config.epochs <= (facts.epochs or 0)


def check_free(facts: Facts, *, dependency: str) -> None:
    """Raises UserError when somebody works in a run directory, or will: two would destroy each other's checkpoints.

    A job that waits for the other one (`dependency`) may be submitted.
    """
    alive = [job for job in facts.queued or () if job.state not in OVER and {job.job, job.raw} & set(facts.jobs)]
    waits_for = set(re.findall(r"\d+(?:_\d+)?", dependency))
    waited_for = dependency == "singleton" or all({job.job, job.raw} & waits_for for job in alive)
    if alive and not waited_for:
        job = alive[0]
        raise UserError(
            f"Job {job.job} ({job.state.lower()}) works in {facts.run_dir}, and two jobs in one run directory would "
            "destroy each other's checkpoints. It goes on by itself until the run is over. To have another instead: "
            f"scancel {job.job}; to have one after it: --dependency afterany:{job.job}; for another run: name=...")
    if alive or facts.beat is None or facts.beat.silent:
        return
    if facts.queued is not None and facts.state.get("job"):
        return  # the lease of a job that Slurm no longer knows: the new job waits it out
    raise UserError(
        f"A process on {facts.state.get('host') or 'another machine'} works in {facts.run_dir}, or did so "
        f"{facts.beat.age:.0f} s ago. Wait for it, stop it (touch {facts.run_dir / STOP_FILE}), or give this run "
        "another name=...")


def check_recipe(run_dir: Path, config: Config, *, accept: bool) -> None:
    """Raises UserError when the recipe differs from the newest checkpoint's so that the job would refuse to go on."""
    saved = newest_checkpoint(run_dir)
    try:
        before = json.loads((saved.path / "manifest.json").read_text())["lineage"]["recipe"] if saved else None
    except (OSError, ValueError, KeyError, TypeError):
        return  # the job looks closer, and knows older ones
    if before is None:
        return
    # More epochs are another experiment only where they change the learning rates there have been.
    longer_is_same = config.schedule.name not in ENDS_WITH_THE_RUN or saved is None or saved.step == 0
    changes = [change for change in differences(before, config)
               if change.effect == "order" and not (change.path == "epochs" and longer_is_same)]
    if why := refusal(changes, config, accept=accept):
        raise UserError(why)


def number(state: dict[str, Any], key: str) -> float:
    """A time in seconds that state.json tells; 0 where it doesn't."""
    value = state.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def goes_on(run_dir: Path) -> str:
    """Where a run goes on, in words."""
    saved = newest_checkpoint(run_dir)
    return f"goes on from step {saved.step}" if saved else "begins anew"


# --- changing ---------------------------------------------------------------------------------------------------


def set_aside(run_dirs: Sequence[Path], *, say: Callable[[str], None]) -> list[Moved]:
    """--fresh: renames the run directories that hold a run. It is done now: a job that comes back must not start over.

    Raises UserError when somebody works in one.
    """
    moved: list[Moved] = []
    for run_dir in run_dirs:
        if not any((run_dir / name).exists() for name in ("checkpoints", "state.json", "attempts.jsonl")):
            continue
        try:
            Lease.acquire(run_dir, job=None, restart=0, log=say).release()
        except UserError:
            put_back(moved, say=say)
            raise
        aside = free_name(run_dir)
        os.rename(run_dir, aside)
        say(f"--fresh: the old run was kept as {aside}")
        moved.append((run_dir, aside))
    return moved


def put_back(moved: Sequence[Moved], *, say: Callable[[str], None]) -> None:
    """Undoes `set_aside`, where nothing has taken the place."""
    for run_dir, aside in moved:
        if not run_dir.exists():
            os.rename(aside, run_dir)
            say(f"{run_dir} is back in its place")


def discard(snapshots: Sequence[Path], folder: Path) -> None:
    """Removes what a submission that failed has made: its snapshots, and the folders that are empty then."""
    for path in snapshots:
        shutil.rmtree(path, ignore_errors=True)
    for place in [folder, folder.parent, *(parent for path in snapshots for parent in list(path.parents)[:2])]:
        with contextlib.suppress(OSError):  # it isn't empty
            place.rmdir()


def link(log: Path, folder: Path) -> Path:
    """A link to a log, in another folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / log.name
    place.unlink(missing_ok=True)
    place.symlink_to(os.path.relpath(log, folder))
    return place
