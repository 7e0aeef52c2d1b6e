"""What rank 0 alone writes for all: metrics, checkpoints, state.json, and words for the user."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

from alexnet_ddp import config as recipes
from alexnet_ddp import faults, sinks
from alexnet_ddp.checkpoint import store
from alexnet_ddp.checkpoint.state import TrainState
from alexnet_ddp.checkpoint.writer import SaveFailed, Writer
from alexnet_ddp.config import Config
from alexnet_ddp.damage import Damage
from alexnet_ddp.data.training import Data, largest_part
from alexnet_ddp.distributed import World
from alexnet_ddp.errors import UserError
from alexnet_ddp.run import RunDirectory, Start
from alexnet_ddp.runfiles import METRICS
from alexnet_ddp.schedule import ENDS_WITH_THE_RUN
from alexnet_ddp.sinks import say
from alexnet_ddp.stop import STOP_FILE
from alexnet_ddp.watchdog import Failure

STRAGGLE = 0.2  # share of the time that a rank may wait for data before it is named
PATIENCE = 200  # steps in which any net may stand at chance


class Report:
    """The run directory of one attempt, from its first line to its last."""

    def __init__(self, config: Config, directory: RunDirectory, *, start: Start, place: dict[str, Any],
                 state: TrainState, lineage: dict[str, Any], world: World, total_steps: int) -> None:
        """Cuts metrics and traces back to what the checkpoint has seen. Raises UserError: no room, no right to write.

        `place` are the plain fields of the state the attempt begins with; `state` need only have its tensors.
        """
        self._config, self._directory, self._start, self._total = config, directory, start, total_steps
        run_dir = config.run_dir
        store.check_space(run_dir / "checkpoints", needed=store.size_on_disk(state), keep=config.checkpoint.keep)
        try:
            sinks.rewrite(run_dir / "config.yaml", recipes.dump(config).splitlines())
            self._metrics = sinks.MetricsFile(run_dir / METRICS, step=place["step"],
                                              evaluated_step=place["evaluated_step"] or 0)
            self._board = (sinks.TensorBoard(run_dir / "tensorboard", self._metrics.records)
                           if config.log.tensorboard else None)
            sinks.cut_traces(run_dir / "trace", step=place["step"])
            directory.write_state(
                "running", exact=start.exact, why_not_exact=start.why_not_exact, step=place["step"],
                epoch=place["epoch"], total_steps=total_steps, attempt=start.attempt, best=place["best"],
                decoder=lineage["decoder"], world_size=world.size, nodes=world.nodes, host=world.host,
                pid=os.getpid(), last_checkpoint=start.resumed_from, step_seconds=directory.known.get("step_seconds"),
                save_seconds=directory.known.get("save_seconds"))
        except OSError as error:
            raise UserError(f"The run directory {run_dir} can't be written: {error.strerror or error}. "
                            "Choose another with runs=...") from None
        self.writer = Writer(run_dir / "checkpoints", keep=config.checkpoint.keep, attempt=start.attempt,
                             lineage=lineage, guard=self._guard, log=say)
        self._console = sinks.Console(total_steps=total_steps)
        self._hosts, self._waited = world.hosts, ()  # type: tuple[str, ...], Sequence[float]
        self._saved = time.monotonic()  # when the last save began
        self._warned = False  # of a state.json that can't be written
        self._asked = False  # for a save, of all ranks
        self.step_seconds = 0.0  # the slowest step so far
        self.damage: Damage | None = None

    def greet(self, *, data: Data, world: World, parameters: int, device: str, step: int) -> None:
        """Who trains what on what, and from where it goes on."""
        config, start = self._config, self._start
        for note in start.notes:
            say(note)
        images = f"{data.order.samples:,} images"
        if data.train_ids is not None:
            images += f" of {len(data.train):,} (data.limit)"
        largest = largest_part(config, world=world.size)
        say(f"{config.run_dir}: {config.model.name}, {parameters:,} parameters, {images} in "
            f"{len(data.train.classes)} classes; {_count(world.size, 'rank')} on {_count(world.nodes, 'node')}, "
            f"{device}; global batch {config.global_batch} (at most {largest} a forward)")
        if start.resumed_from:
            exact = "exact: yes" if start.exact else f"exact: no, because {start.why_not_exact}"
            say(f"attempt {start.attempt} goes on at step {step} of {self._total} from {start.resumed_from} ({exact})")

    # --- metrics ------------------------------------------------------------------------------------------------

    def training(self, record: dict[str, Any], *, steps: int, timed: int, seconds: float, steps_per_epoch: int,
                 waited: Sequence[float]) -> None:
        """A logging window of `steps` steps, of which this attempt took `timed` in `seconds`.

        `waited`: seconds by rank, since the start.
        """
        self._write({"kind": "train", **record})
        self._console.train(record, seconds_per_step=seconds / timed)
        self._name_straggler(waited, seconds=seconds)
        chance = math.log(self._config.model.num_classes)
        patience = max(steps_per_epoch / 2, PATIENCE)
        if record["step"] - steps < patience <= record["step"] and abs(record["loss"] - chance) < 0.02:
            self._console.line(
                f"alexnet-ddp: warning: after {record['step']} steps the loss is still {record['loss']:.3f}, that of "
                f"guessing (ln {self._config.model.num_classes} = {chance:.3f}). A learning rate too high or too low "
                f"does that (optim.lr={self._config.optim.lr:g}), and so do wrong labels. Try --overfit 64 first.")

    def _name_straggler(self, waited: Sequence[float], *, seconds: float) -> None:
        """One rank that waits for its data far longer than the others holds all of them up."""
        shares = [(now - before) / seconds for now, before in zip(waited, self._waited or waited, strict=True)]
        self._waited = waited
        if len(shares) > 1 and max(shares) > max(STRAGGLE, 2.0 * statistics.median_low(shares)):
            slow = shares.index(max(shares))
            self._console.line(f"alexnet-ddp: rank {slow} on {self._hosts[slow]} waited for data {shares[slow]:.0%} of "
                               f"the time, the others about {statistics.median_low(shares):.0%}: its storage or its "
                               "cores hold all ranks up.")

    def evaluation(self, record: dict[str, Any]) -> None:
        self._write({"kind": "evaluate", **record})
        self._console.evaluate(record)

    def tell(self, line: str) -> None:
        """A line of the program's own, without tearing the one that moves."""
        self._console.line(f"alexnet-ddp: {line}")

    def _write(self, record: dict[str, Any]) -> None:
        record |= {"attempt": self._start.attempt, "time": sinks.now()}
        self._metrics.write(record)
        if self._board is not None:
            self._board.write(record)

    # --- saving -------------------------------------------------------------------------------------------------

    @property
    def save_seconds(self) -> float:
        """How long the last save took, 0 before the first."""
        return self.writer.last.seconds + self.writer.last.stall if self.writer.last else 0.0

    def ask_for_save(self) -> bool:
        """Whether the ranks should agree on a save because time is up; asked for once until it has been made."""
        minutes = self._config.checkpoint.minutes
        due = not self._asked and minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        self._asked = self._asked or due
        return due

    def save(self, state: TrainState, *, improved: bool) -> None:
        """Stages a copy and returns; but a run's very first save is waited for.

        A full disk or a quota then shows before the first step: raises UserError.
        """
        self._saved, self._asked = time.monotonic(), False
        self._metrics.flush(durable=True)
        self.writer.submit(state, best_model=self._config.model.name if improved else None)
        if self._config.fault.kind != "slow":
            faults.strike(self._config.fault, at="save", step=state.step, rank=0)
        if self._start.attempt == 1 and state.step == 0:
            self.writer.wait()
            if self.writer.failure:
                raise UserError(self.writer.failure)

    def _guard(self) -> None:
        """In the background, right before a publish: where a save is slow, so that much can happen meanwhile."""
        if self._config.fault.kind == "slow":
            faults.strike(self._config.fault, at="save", step=self.writer.saving, rank=0)
        self._directory.guard()

    # --- state.json, and the end --------------------------------------------------------------------------------

    def status(self, status: str, *, place: dict[str, Any], why: str = "", failure: Failure | None = None) -> None:
        last = self.writer.last
        took = {"step_seconds": self.step_seconds, "save_seconds": self.save_seconds}
        skips = self._config.data.on_error == "skip"
        facts = {"damaged": self.damage.counts} if skips and self.damage is not None else {}
        try:
            self._directory.write_state(
                status, why=why, failure=failure, step=place["step"], epoch=place["epoch"], best=place["best"],
                last_checkpoint=str(last.path) if last else self._start.resumed_from,
                **{name: round(seconds, 3) for name, seconds in took.items() if seconds}, **facts)
        except OSError as error:
            if not self._warned and status != "failed":  # then the line about the failure is the last
                say(f"state.json can't be written ({error.strerror}).")
            self._warned = True

    def leave(self, *, place: dict[str, Any], cause: str) -> None:
        """The last save is on the disk, then state.json and the user are told how it ended."""
        self.writer.close()
        if self.writer.failure is not None:  # this was the last try: what the save would have held is lost
            raise SaveFailed(self.writer.failure)
        if self._board is not None:
            self._board.close()
        if self.damage is not None and (damaged := self.damage.summary()):
            self.tell(damaged)
        if cause:
            self.status("preempted", place=place, why=cause)
            (self._config.run_dir / STOP_FILE).unlink(missing_ok=True)
            but = " without --fresh" if self._directory.fresh else ""
            say(f"stopped by {cause} after step {place['step']} of {self._total}; saved. "
                f"The same command{but} goes on from there.")
        else:
            self.status("finished", place=place)
            say_finished(self._config, place["step"], place["best"], planned=self._total)

    def fail(self, failure: Failure, *, place: dict[str, Any]) -> None:
        """The job is failing, and its last line is out: a save under way is finished, and state.json says why."""
        self.writer.log = lambda _: None
        with contextlib.suppress(Exception):
            self.writer.wait()
        self.status("failed", place=place, why=failure.line(), failure=failure)
        self._directory.close()


def say_finished(config: Config, step: int, best: dict[str, Any] | None, *, planned: int) -> None:
    """That a run is over, how good it is, and how to train longer where that is the same experiment."""
    of = "" if config.ema.decay is None else " of the weights' mean"
    accuracy = f", best held-out top-1{of} {best['top1']:.2%} after step {best['step']}" if best else ""
    full = f"{config.epochs} epochs, {step} steps" if step >= planned else f"limits.loss reached after {step} steps"
    longer = (f"To train longer, give the same command with more epochs (epochs={2 * config.epochs})."
              if config.schedule.name not in ENDS_WITH_THE_RUN else
              f"schedule.name={config.schedule.name} ends with its run: to train longer, start another (name=..., "
              "epochs=...).")
    say(f"{config.run_dir} is finished: {full}{accuracy}. {longer}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
