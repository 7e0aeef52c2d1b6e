"""A run directory: who owns it, where the run stands, and what a new attempt goes on from. Rank 0's."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import alexnet_ddp
from alexnet_ddp import config as recipes
from alexnet_ddp.changes import differences, refusal
from alexnet_ddp.checkpoint import choose, files, store
from alexnet_ddp.checkpoint.state import TrainState
from alexnet_ddp.config import Config
from alexnet_ddp.data.order import Order
from alexnet_ddp.distributed import World, everywhere, on_rank_0
from alexnet_ddp.errors import RunFailed, UserError
from alexnet_ddp.lease import Lease
from alexnet_ddp.models.weights import Weights, read_weights
from alexnet_ddp.runfiles import CLASSES, STATE, check_not_set_aside, free_name, job_of, read_state
from alexnet_ddp.schedule import learning_rate
from alexnet_ddp.sinks import say
from alexnet_ddp.watchdog import Failure, kind_of

TOLD_BY_THE_RECIPE = ("micro_batch", "assignment", "amp", "deterministic")  # of the numeric fingerprint


@dataclass
class Start:
    """How an attempt begins; the same on all ranks."""

    attempt: int
    exact: bool = True
    why_not_exact: str = ""
    finished: bool = False
    resumed_from: str = ""  # the checkpoint's path, "" for a new run
    notes: list[str] = field(default_factory=list)
    init: dict[str, Any] | None = None  # facts of the weights that the run began with; None: fresh ones
    state: TrainState | None = None  # rank 0 only; stripped before it is told to the others


class RunDirectory:
    """Holds the lease of a run directory and writes its state.json."""

    def __init__(self, config: Config, *, fresh: bool, wait: bool = True) -> None:
        """Raises UserError when another process owns it, or when it can't be written.

        `wait`: for a sign of life of an owner that may be gone; otherwise such a directory counts as owned.
        """
        self.path, self.fresh = config.run_dir, fresh
        self.job = job_of(os.environ).facts
        self._lease = self._acquire(wait=wait)
        if fresh and any(self.path.glob("checkpoints/*")):
            self._lease.release()
            aside = free_name(self.path)
            os.rename(self.path, aside)
            say(f"--fresh: the old run was kept as {aside}")
            self._lease = self._acquire(wait=wait)
        self.known = read_state(self.path)
        if not isinstance(self.known.get("attempt"), int):
            self.known["attempt"] = 0

    def _acquire(self, *, wait: bool) -> Lease:
        return Lease.acquire(self.path, job=self.job["job"], restart=self.job["restart"], wait=wait, log=say)

    def guard(self) -> None:
        """Raises LeaseLost when another process owns the directory now."""
        self._lease.check()

    def write_state(self, status: str, *, why: str = "", failure: Failure | None = None, **facts: Any) -> None:
        """Replaces state.json: status is running, preempted, finished or failed; `why` says why in words.

        Raises LeaseLost when another process owns the directory now: its state is not ours to tell.
        """
        self.guard()
        self.known |= {"status": status, "why": why, "failure": failure.record() if failure else None, **self.job,
                       "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
        files.replace(self.path / STATE, content=(json.dumps(self.known, indent=1) + "\n").encode())

    def write_classes(self, classes: Sequence[str]) -> None:
        """What the logits of the run's net stand for, for those who use it without its data."""
        content = (json.dumps(list(classes)) + "\n").encode()
        path = self.path / CLASSES
        if not path.is_file() or files.read(path) != content:
            files.replace(path, content=content)

    def confirm_finished(self, start: Start) -> None:
        """A run that was over before this attempt: a kill may have come between its last save and state.json."""
        if start.state is not None and self.known.get("status") != "finished":
            self.write_state("finished", step=start.state.step, epoch=start.state.epoch, best=start.state.best,
                             last_checkpoint=start.resumed_from)

    def write_failed(self, failure: Failure) -> None:
        """The job is failing before its report has begun."""
        self.write_state("failed", why=failure.line(), failure=failure)
        self.close()

    def close(self) -> None:
        self._lease.release()

    def open(self, config: Config, *, order: Order, numeric: dict[str, Any], identities: dict[str, str],
             accept_changes: bool) -> Start:
        """Chooses what to go on from and checks that it may. Raises UserError."""
        choice = choose.choose(self.path / "checkpoints")
        start = Start(attempt=self.known["attempt"] + 1)
        if choice.warning:
            start.notes.append(choice.warning)
        if choice.path is None:
            return start
        start.state, lineage = store.load(choice.path)
        start.resumed_from = str(choice.path)
        start.attempt = max(start.attempt, int(lineage["attempt"]) + 1)
        start.init = lineage.get("init")
        why = check_recipe(lineage, config, order=order, done=start.state.step, accept=accept_changes)
        why += check_data(lineage, identities)
        if start.state.best is not None and (other := why_best_anew(lineage, config, identities)):
            start.notes.append(f"{other}: accuracies of before can't be compared with those to come, and the best "
                               "begins anew")
            start.state = replace(start.state, best=None)
        if not lineage["exact"]:
            why.insert(0, "an earlier attempt was not")
        why += [f"{name} {lineage['numeric'].get(name)} -> {now}" for name, now in numeric.items()
                if lineage["numeric"].get(name) != now and name not in TOLD_BY_THE_RECIPE]
        if numeric["device"] != "cpu" and not config.deterministic:
            why.append("deterministic=false on a GPU")
        start.exact, start.why_not_exact = not why, "; ".join(dict.fromkeys(why))
        total = config.epochs * order.steps_per_epoch
        # Only a run that has ended in good order is over: one that was killed in its last evaluation is not.
        start.finished = start.state.step >= total and start.state.phase == "train"
        return start


def why_best_anew(lineage: dict[str, Any], config: Config, identities: dict[str, str]) -> str:
    """Why the best evaluation so far is no measure of those to come, "" where it is: pure."""
    if lineage["identities"]["val"] != identities["val"]:
        return "data.val holds other samples than before"
    before = (lineage["recipe"].get("ema") or {}).get("decay") is not None  # older recipes know no mean
    if before != (config.ema.decay is not None):
        deciding = "the weights themselves" if config.ema.decay is None else "the running mean of the weights"
        return f"It is now {deciding} whose accuracy decides"
    return ""


def read_start(config: Config, *, fresh: bool) -> Weights | None:
    """The weights that a new run begins with; None without init_from, and for a run that has begun. Rank 0's.

    Raises UserError when there are none, or none that verify, and when --fresh would set aside what they lie in: the
    recipe would name another file, or none, from then on.
    """
    begun = any(choose.order(path.name for path in config.run_dir.glob("checkpoints/step_*")))
    if config.init_from is None or (begun and not fresh):
        return None
    if fresh:
        check_not_set_aside(config.init_from, config.run_dir, name=config.name)
    return read_weights(config.init_from)


def write_refused(config: Config, directory: RunDirectory | None, mistake: UserError) -> None:
    """In a Slurm job the batch shell learns from state.json that an attempt was refused while it was set up.

    `directory` is None when the mistake was found before it was taken. One that another process owns is left alone, as
    is a finished run. Never raises: the mistake itself is what the user must be told.
    """
    if not job_of(os.environ).id:
        return
    with contextlib.suppress(OSError, UserError, RunFailed):
        directory = directory or RunDirectory(config, fresh=False, wait=False)
        if directory.known.get("status") != "finished":
            failure = Failure(0, socket.gethostname(), directory.known.get("step") or 0, str(mistake),
                              kind_of(mistake))
            directory.write_state("failed", why=str(mistake), failure=failure)
        directory.close()


def check_shared(world: World, run_dir: Path) -> None:
    """Proves that every node sees rank 0's run directory: a token written by rank 0 is read by all. Collective.

    Raises UserError that names the host that doesn't.
    """
    if world.nodes == 1:
        return
    proof = run_dir / f".shared-{world.token}"
    on_rank_0(world, lambda: files.replace(proof, content=b"written by rank 0"))

    def look() -> None:
        patience = time.monotonic() + 10.0  # network file systems show a new file late
        while not proof.exists():
            if time.monotonic() > patience:
                raise UserError(f"{run_dir.resolve()} on {world.host} is not the run directory that rank 0 on "
                                f"{world.hosts[0]} writes to. Put runs=... on a file system that all nodes share.")
            time.sleep(0.1)

    everywhere(world, look)
    on_rank_0(world, lambda: proof.unlink(missing_ok=True))


def check_recipe(lineage: dict[str, Any], config: Config, *, order: Order, done: int, accept: bool) -> list[str]:
    """Reasons why the resumed run won't be bit-equal, from changed fields. Raises UserError for a refused change."""
    changes = differences(lineage["recipe"], config)
    before = recipes.stored(lineage["recipe"]) if changes else config
    refused = [change for change in changes if change.effect == "order"
               and not (change.path == "epochs" and _same_rates(before, config, order=order, done=done))]
    if why := refusal(refused, config, accept=accept):
        raise UserError(why)
    return [str(change) for change in changes if change in refused or change.effect == "bits"]


def _same_rates(before: Config, now: Config, *, order: Order, done: int) -> bool:
    """Whether all learning rates used so far are those of the new recipe: then training longer changes nothing."""
    def rate(recipe: Config, step: int) -> float:
        return learning_rate(step, base=recipe.optim.lr, schedule=recipe.schedule,
                             steps_per_epoch=order.steps_per_epoch, epochs=recipe.epochs)

    return all(rate(before, step) == rate(now, step) for step in range(done))


def check_data(lineage: dict[str, Any], identities: dict[str, str]) -> list[str]:
    """Whether the data are those of the run. Raises UserError when the training data are others.

    Other validation data move no weight, but the metrics: the attempt is not exact.
    """
    before = lineage["identities"]
    if before["train"] != identities["train"]:
        raise UserError("data.train holds other samples than this run was started with (names or labels differ): "
                        f"fingerprint {identities['train'][:12]}, the run's is {before['train'][:12]}. "
                        "Bring back the data, or give the new run a name of its own (name=...).")
    return ["data.val holds other samples"] if before["val"] != identities["val"] else []


def lineage_of(config: Config, *, start: Start, numeric: dict[str, Any], identities: dict[str, str],
               decoder: str) -> dict[str, Any]:
    """What a checkpoint says of where it comes from: plain Python."""
    return {
        "recipe": config.model_dump(mode="json"), "numeric": numeric, "identities": identities, "decoder": decoder,
        "init": start.init, "attempt": start.attempt, "exact": start.exact, "why_not_exact": start.why_not_exact,
        "alexnet_ddp": alexnet_ddp.__version__, "torch": str(torch.__version__),
        "python": platform.python_version(), "host": platform.node(), "code": git_state(),
        **job_of(os.environ).facts,
    }


def git_state() -> dict[str, Any] | None:
    """Commit of this code and which files differ from it; None outside a checkout.

    A snapshot (launch.snapshot) tells where its copy of the code comes from: it may lie in a checkout itself, as run
    directories do, but that is another commit by now.
    """
    package = Path(alexnet_ddp.__file__).resolve().parent
    with contextlib.suppress(OSError, ValueError, AttributeError):
        frozen: dict[str, Any] | None = json.loads((package.parent / "snapshot.json").read_text()).get("git")
        return frozen
    home = str(package)

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", home, *words], capture_output=True, text=True, timeout=10,
                              check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", "--", home).splitlines()}
    except (OSError, subprocess.SubprocessError):
        return None
