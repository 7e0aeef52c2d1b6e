"""What a job runs, frozen into the run directory: an edited checkout or recipe doesn't change a job that waits.

    RUN/snapshots/ID/
        alexnet_ddp/ launch/   the code, as it was imported by the command that froze it
        recipe.yaml            the effective recipe
        changes.patch          what differs from the commit, new sources of the two packages included
        snapshot.json          who, when, from where, and what the batch shell needs to know

`alexnet-ddp submit` makes one for every run it submits. The scripts of slurm/ make theirs in the job:

    SNAPSHOT=$("$PYTHON" -m launch.snapshot CONFIG [key=value ...])     prints the snapshot's path
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alexnet_ddp
import launch
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER, UserError

if TYPE_CHECKING:  # reading recipes takes longer to import than all the batch shell does with a snapshot
    from alexnet_ddp.config import Config

FOLDER = "snapshots"
RECIPE, PATCH, FACTS = "recipe.yaml", "changes.patch", "snapshot.json"
PATIENCE = 30.0  # seconds for one git command: a checkout on a network file system may be slow


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot as its snapshot.json tells it; `path` is its folder."""

    id: str  # sorts by time
    time: str
    run_dir: Path  # absolute
    cwd: Path  # absolute: where the command was given, and where the job runs
    command: str  # what the user typed
    python: str  # the host's interpreter
    git: dict[str, Any] | None  # commit, branch, changed: lines of git status
    lead: float  # seconds before its end at which a job begins to leave
    caps: dict[str, int]  # of launch.requeue; {}: its defaults
    accept_changes: bool
    job: str | None  # the job that made it; None: made at submission
    path: Path


def working_directory() -> Path:
    """The current folder by the name the user knows it by: behind it, machines may mount it differently."""
    told = os.environ.get("PWD", "")
    if os.path.isabs(told) and os.path.isdir(told) and os.path.samefile(told, os.getcwd()):
        return Path(told)
    return Path.cwd()


def new_id() -> str:
    """A name for a snapshot that sorts by time (UTC)."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")


def run_directory(config: Config, cwd: Path) -> Path:
    """The absolute run directory of a recipe that is used in `cwd`. Raises UserError where no job can work in it."""
    run_dir = Path(os.path.abspath(cwd / config.run_dir))
    wrong = [sign for sign in (":", "%") if sign in str(run_dir)]
    if wrong:  # PYTHONPATH, by which a job finds its frozen code, and Slurm's names of log files give them a meaning
        raise UserError(f"The path of a job's run directory has no '{wrong[0]}' in it, got {run_dir}. Choose another "
                        "with runs=... (the folder of all runs).")
    return run_dir


# --- freezing ---------------------------------------------------------------------------------------------------


def freeze(config: Config, *, cwd: Path, command: str, lead: float, caps: Mapping[str, int],
           accept_changes: bool = False, job: str | None = None, python: str = sys.executable) -> Path:
    """Makes a snapshot and returns its folder. There is a whole one or none, whenever this is interrupted.

    Raises UserError when the run directory can't be written.
    """
    from alexnet_ddp import config as recipes

    run_dir = run_directory(config, cwd)
    folder = run_dir / FOLDER
    draft = folder / f".tmp-{secrets.token_hex(4)}"
    try:
        draft.mkdir(parents=True)
        try:
            for package in (alexnet_ddp, launch):
                home = _home(package)
                shutil.copytree(home, draft / home.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            (draft / RECIPE).write_text(recipes.dump(config), encoding="utf-8")
            git, patch = git_state(_home(alexnet_ddp))
            (draft / PATCH).write_bytes(patch)
            path = folder / new_id()
            facts = Snapshot(id=path.name, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), run_dir=run_dir, cwd=cwd,
                             command=command, python=python, git=git, lead=lead, caps=dict(caps),
                             accept_changes=accept_changes, job=job, path=path)
            (draft / FACTS).write_text(_encode(facts), encoding="utf-8")
            os.rename(draft, path)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"The run directory {run_dir} can't be written: {error.strerror or error}. "
                        "Choose another with runs=... (the folder of all runs).") from None
    return path


def _home(package: Any) -> Path:
    return Path(package.__file__).resolve().parent


def _encode(facts: Snapshot) -> str:
    told = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(facts).items()
            if name != "path"}
    return json.dumps(told, indent=1) + "\n"


def git_state(home: Path) -> tuple[dict[str, Any] | None, bytes]:
    """Commit, branch and changes of the checkout that the package at `home` belongs to, and the changes as a patch.

    (None, b"") where it belongs to none, or git can't tell.
    """
    def git(*words: str, index: Path | None = None) -> bytes:
        environment = {name: value for name, value in os.environ.items()  # a git hook's variables name its own checkout
                       if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
        environment |= {"GIT_OPTIONAL_LOCKS": "0", **({"GIT_INDEX_FILE": str(index)} if index else {})}
        return subprocess.run(["git", "-C", str(home), *words], env=environment, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=PATIENCE, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a package installed in somebody's checkout isn't its own
        root = Path(os.fsdecode(git("rev-parse", "--show-toplevel")).strip())
        packages = [str(home), str(home.parent / "launch")]
        known: dict[str, Any] = {
            "commit": git("rev-parse", "HEAD").decode().strip(),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD").decode().strip(),
            "changed": os.fsdecode(git("status", "--porcelain", "--", str(root))).splitlines()}
        new = [name for name in git("ls-files", "-z", "--others", "--exclude-standard", "--", *packages).split(b"\0")
               if name]
        with tempfile.TemporaryDirectory() as folder:
            # In an index of its own, new files can be told from absent ones without touching the user's.
            index = Path(folder) / "index"
            shutil.copyfile(home / os.fsdecode(git("rev-parse", "--git-path", "index")).strip(), index)
            if new:
                git("add", "--intent-to-add", "--", *map(os.fsdecode, new), index=index)
            patch = git("diff", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/",
                        "HEAD", "--", str(root), index=index)
        return known, patch
    except (OSError, subprocess.SubprocessError):
        return None, b""


# --- reading ----------------------------------------------------------------------------------------------------


def load(snapshot: Path) -> Snapshot:
    """Reads a snapshot. Raises UserError when there is none at this path."""
    path = Path(os.path.abspath(snapshot))
    try:
        told = json.loads((path / FACTS).read_text(encoding="utf-8"))
        return Snapshot(**{**told, "run_dir": Path(told["run_dir"]), "cwd": Path(told["cwd"]), "path": path})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"A snapshot is a folder such as RUN/{FOLDER}/20260102-030405-678901 with a {FACTS} in it, and "
                        f"{path} is none: {error}. `alexnet-ddp submit` makes them.") from None


def opened(path: Path) -> Snapshot:
    """The snapshot at `path`; from now on in the job's folder. Raises UserError where this host doesn't see them."""
    try:
        snapshot = load(path)
        os.chdir(snapshot.cwd)
    except (UserError, OSError) as mistake:
        raise UserError(f"{socket.gethostname()} doesn't see what the job runs: {mistake} Put runs=... on a file "
                        "system that all nodes share.") from None
    return snapshot


def made_by(job: str, *, runs: Path) -> Path | None:
    """The newest snapshot that this job has made at an earlier start, in any run of `runs`; None when there is none."""
    for facts in sorted(runs.glob(f"*/{FOLDER}/[0-9]*/{FACTS}"), key=lambda facts: facts.parent.name, reverse=True):
        try:
            if json.loads(facts.read_text(encoding="utf-8")).get("job") == job:
                return facts.parent
        except (OSError, ValueError, AttributeError):
            continue
    return None


def _runs_of(overrides: Sequence[str]) -> str:
    """The folder of run directories, as far as the command line tells."""
    told = [value for key, _, value in (override.partition("=") for override in overrides) if key.strip() == "runs"]
    from alexnet_ddp.config import Config

    return told[-1] if told else str(Config.model_fields["runs"].default)


def main(words: Sequence[str]) -> int:
    """For the batch shell of slurm/*.sbatch: prints the snapshot's path, made anew at the job's first start."""
    from alexnet_ddp import config as recipes
    from launch.durations import seconds

    parser = argparse.ArgumentParser(prog="python -m launch.snapshot", description=main.__doc__)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--lead-time", metavar="T", default="120s", help="as in --signal=USR2@...; default 120s")
    parser.add_argument("--accept-changes", action="store_true", help="go on although the recipe has changed")
    options = parser.parse_intermixed_args(words)
    job = os.environ.get("SLURM_JOB_ID")
    try:
        cwd, path = working_directory(), None
        # Without a restart, a snapshot under this job's number is another's: Slurm counts anew at some time.
        if job is not None and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0:
            # First without the recipe, which may have been edited meanwhile, and be broken.
            path = made_by(job, runs=cwd / _runs_of(options.overrides)) or made_by(
                job, runs=run_directory(recipes.load(options.config, options.overrides), cwd).parent)
        print(path or freeze(recipes.load(options.config, options.overrides), cwd=cwd, job=job, caps={},
                             command=" ".join(["sbatch:", options.config, *options.overrides]),
                             lead=seconds(options.lead_time), accept_changes=options.accept_changes))
    except UserError as mistake:
        print(f"alexnet-ddp: error: {mistake}", file=sys.stderr, flush=True)
        return EXIT_USER
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
