"""Which checkpoint a run goes on from, and which ones it keeps. For the owner of the run: both rename."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from alexnet_ddp.checkpoint import files
from alexnet_ddp.checkpoint.store import PREVIOUS, Damaged, verify
from alexnet_ddp.errors import UserError

PATTERN = re.compile(rf"step_(\d+)({re.escape(PREVIOUS)})?")


@dataclass(frozen=True)
class Choice:
    """The newest checkpoint that verifies (None: there is none yet) and the damaged ones that are newer.

    `damaged` holds where each damaged one lies now, and what is wrong with it.
    """

    path: Path | None
    damaged: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def warning(self) -> str | None:
        """One text that names the bad ones and the one used, or None when all is well."""
        if not self.damaged:
            return None
        bad = "; ".join(f"{path} ({why})" for path, why in self.damaged)
        return f"damaged, moved aside: {bad}. Going on from {self.path}."


def step_of(name: str) -> int:
    """The step in the name of a checkpoint directory."""
    match = PATTERN.fullmatch(name)
    assert match, name
    return int(match[1])


def order(names: Iterable[str]) -> list[str]:
    """The names that are checkpoints, newest first by number; `step_N.previous` comes after `step_N`."""
    return sorted(
        (name for name in names if PATTERN.fullmatch(name)),
        key=lambda name: (-step_of(name), name.endswith(PREVIOUS), name),
    )


def newest(directory: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies and the damaged newer ones, with reasons. Changes nothing."""
    damaged: list[tuple[Path, str]] = []
    for name in order(_names(directory)):
        path = directory / name
        try:
            manifest = verify(path)
            if manifest.step != step_of(name):
                raise Damaged(path, f"its name says step {step_of(name)}, its manifest step {manifest.step}")
            return path, damaged
        except Damaged as error:
            damaged.append((path, error.why))
    return None, damaged


def choose(directory: Path) -> Choice:
    """The checkpoint to go on from. Damaged newer ones are moved aside as `damaged_*`, leftovers removed.

    Raises UserError when there were checkpoints and none verifies: a run never starts over silently.
    """
    path, damaged = newest(directory)
    earlier = [name for name in _names(directory) if name.startswith("damaged_")]
    if path is None and (damaged or earlier):
        raise UserError(_refusal(directory, damaged, earlier))
    if directory.is_dir():
        files.clean(directory)
    moved = [(_move_aside(bad), why) for bad, why in damaged]
    if path is not None and path.name.endswith(PREVIOUS):  # a kill came between the two renames of a publish
        path = path.rename(path.with_name(path.name.removesuffix(PREVIOUS)))
        files.sync_directory(directory)
    return Choice(path, moved)


def retain(directory: Path, *, keep: int, verified: Path | None = None) -> list[tuple[Path, str]]:
    """Delete all checkpoints older than the newest `keep` that verify; `verified` is known to, having just
    been written. With fewer than `keep` good ones nothing is deleted. Returns the damaged ones met, with
    reasons.
    """
    good, damaged = 0, []
    for name in order(_names(directory)):
        path = directory / name
        if good >= keep:
            files.discard(path)
        elif path == verified:
            good += 1
        elif not name.endswith(PREVIOUS):
            try:
                verify(path)
                good += 1
            except Damaged as error:
                damaged.append((path, error.why))
    return damaged


def _names(directory: Path) -> list[str]:
    return os.listdir(directory) if directory.is_dir() else []


def _move_aside(path: Path) -> Path:
    for number in range(1, 1_000_000):
        aside = path.with_name(f"damaged_{path.name}" + (f"_{number}" if number > 1 else ""))
        if not aside.exists():
            return path.rename(aside)
    raise AssertionError(f"a million damaged copies of {path}")


def _refusal(directory: Path, damaged: list[tuple[Path, str]], earlier: list[str]) -> str:
    found = [f"{path.name}: {why}" for path, why in damaged]
    found += [f"{name}: moved aside earlier" for name in earlier]
    listed = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    return (
        f"none of the checkpoints in {directory} verifies, and starting over silently would lose the run.\n"
        f"Found {listed}.\n"
        "Bring back a whole one, or start over with --fresh (it keeps the old directory under another name)."
    )
