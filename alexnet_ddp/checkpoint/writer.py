"""Saving in the background: the training loop pays for one copy in memory, a thread does the rest."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alexnet_ddp.amounts import human_bytes
from alexnet_ddp.checkpoint import choose, store
from alexnet_ddp.checkpoint.state import TrainState
from alexnet_ddp.errors import RunFailed

FAILURES_ALLOWED = 3  # saves in a row that may fail for want of a disk before the run gives up


class SaveFailed(RunFailed):
    """Several saves in a row failed for want of a disk; the older checkpoints are intact."""


@dataclass(frozen=True)
class Saved:
    """A finished save."""

    path: Path
    step: int
    seconds: float  # from the start of the writing to the publish, in the background
    stall: float  # seconds the caller waited, for an earlier save and for the copy in memory
    bytes: int
    finished_at: float  # time.monotonic()


@dataclass(frozen=True)
class Best:
    """Staged weights of the best evaluation so far, for as long as `best.safetensors` doesn't hold them."""

    model: str
    state: TrainState  # of which the published weights and `best` count


class Writer:
    """Writes checkpoints of one run, one at a time, each in a thread of its own that is joined.

    A disk that fails (full, quota, gone) costs a line and is tried again at the next save; the third
    failure in a row raises SaveFailed. Anything else, a lost lease or weights that are not finite, is
    raised at once. What the thread meets is raised in the training loop by the next `poll`, `submit`,
    `wait` or `close`.

    Best weights whose save failed are kept in memory and written with the next save, unless that one brings
    better ones; until then `best.safetensors` is the older best with its own number, and no checkpoint tells
    of an evaluation whose best weights are not on the disk. A run that ends before goes on from an older
    checkpoint, and so makes that evaluation again.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        attempt: int,
        lineage: dict[str, Any],
        guard: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        """`directory` is the run's `checkpoints/`; `log` is called from the thread, with one line."""
        self.directory, self.keep, self.attempt = directory, keep, attempt
        self.lineage, self.guard, self.log = lineage, guard, log
        self.last: Saved | None = None
        self.saving = 0  # step of the save in flight, or of the last one
        self.failures_in_a_row = 0
        self.failure: str | None = None  # the line about the last failure; None after a success
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._spare: TrainState | None = None
        self._best: Best | None = None  # to be written

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, state: TrainState, *, best_model: str | None = None) -> None:
        """Copy the state and return; the writing goes on in the background. Waits for a save in flight.

        With `best_model`, the model's name, the weights are the best so far (`state.best` says how good)
        and are written to `best.safetensors` as well, before the checkpoint that remembers them.
        """
        start = time.monotonic()
        self.wait()
        state.check()  # here, where the traceback shows who put it there
        self._spare = staged = state.to_cpu(into=self._spare)
        if best_model is not None:
            assert staged.best is not None, "best weights without a best metric"
            self._best = Best(best_model, staged)
        self.saving = state.step
        stall = time.monotonic() - start
        # Not a daemon: should the loop die of something else, the interpreter waits for the save to end.
        self._thread = threading.Thread(
            target=self._save, args=(staged, stall), name=f"checkpoint-{state.step}"
        )
        self._thread.start()

    def poll(self) -> None:
        """Raise what a finished save has left to raise; never waits."""
        if not self.busy and self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait for the save in flight, if there is one, and raise what it left to raise."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def close(self) -> None:
        """Wait for the save in flight, let go of the memory, and raise what is left to raise."""
        try:
            self.wait()
        finally:
            self._spare = None

    def _save(self, state: TrainState, stall: float) -> None:
        try:
            start = time.monotonic()
            try:
                path = self._write(state)
            except (OSError, store.Damaged) as error:
                self._failed(state, error)
                return
            end = time.monotonic()
            self.last = Saved(path, state.step, end - start, stall, store.read_manifest(path).size, end)
            self.failures_in_a_row, self.failure = 0, None
            self._retain(path)
        except BaseException as error:
            self._error = error

    def _write(self, state: TrainState) -> Path:
        if self._best is not None:
            best = self._best
            store.write_best(
                best.state.published(),
                run_dir=self.directory.parent,
                model=best.model,
                guard=self.guard,
                **(best.state.best or {}),
            )
            self._best = None
        return store.write(
            state, directory=self.directory, attempt=self.attempt, lineage=self.lineage, guard=self.guard
        )

    def _failed(self, state: TrainState, error: OSError | store.Damaged) -> None:
        with contextlib.suppress(OSError):
            self.guard()  # a new owner's clean-up looks like a failing disk: say what it is
        if self._best is not None and self._best.state is state:
            self._spare = replace(state, model={}, ema={})  # the next copy must not go over these weights
        self.failures_in_a_row += 1
        why = str(error.strerror) if isinstance(error, OSError) else f"read back wrong: {error.why}"
        self.failure = (
            f"the checkpoint of step {state.step} was not saved in {self.directory}: {why} "
            f"({human_bytes(store.size_on_disk(state))} needed, {_free(self.directory)} free); "
            f"older ones are intact; failure {self.failures_in_a_row} in a row of {FAILURES_ALLOWED} allowed"
        )
        if self.failures_in_a_row >= FAILURES_ALLOWED:
            raise SaveFailed(self.failure) from error
        self.log(self.failure)

    def _retain(self, path: Path) -> None:
        try:
            damaged = choose.retain(self.directory, keep=self.keep, verified=path)
        except OSError as error:  # the new checkpoint stands; an old one too many is no reason to stop
            self.log(f"an old checkpoint could not be removed: {error}")
        else:
            for bad, why in damaged:
                self.log(f"an older checkpoint is damaged, one more is kept instead: {bad} ({why})")


def _free(directory: Path) -> str:
    try:
        return human_bytes(shutil.disk_usage(directory).free)
    except OSError as error:
        return os.strerror(error.errno or 0)
