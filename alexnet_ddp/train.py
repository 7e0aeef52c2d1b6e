"""The story of a training run, from top to bottom.

    join the group -> open the data -> take the run directory -> build the net -> go on from the checkpoint
    -> step, log, evaluate, save ... until done or asked to stop -> say why, and leave
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from alexnet_ddp import config as recipes
from alexnet_ddp import distributed, faults, replica, sinks
from alexnet_ddp.checkpoint import store
from alexnet_ddp.checkpoint.state import TrainState
from alexnet_ddp.checkpoint.writer import Writer
from alexnet_ddp.config import Config
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.decode import create_decoder
from alexnet_ddp.data.loader import Batch, Loader, decode_threads
from alexnet_ddp.data.order import check_owner
from alexnet_ddp.data.randomness import dropout_rows, key
from alexnet_ddp.data.training import Data, largest_part, open_data, training_works
from alexnet_ddp.distributed import World, everywhere, first_on_node, on_rank_0
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_STOPPED, EXIT_USER, UserError
from alexnet_ddp.evaluate import TILE, evaluate, view_of
from alexnet_ddp.metrics import Window
from alexnet_ddp.models import create_model
from alexnet_ddp.optim import create_optimizer, create_scaler
from alexnet_ddp.run import RunDirectory, Start, lineage_of
from alexnet_ddp.schedule import learning_rate
from alexnet_ddp.sinks import say
from alexnet_ddp.step import MicroBatch, Step, wrap
from alexnet_ddp.stop import CAUSES, STOP_FILE, StopRequests, deadline_from, lead_time
from alexnet_ddp.transfer import Transfer
from alexnet_ddp.watchdog import Failure, Watchdog, is_peer_loss

# ----------------------------------------------------------------------------------------------------------------
# Entry
# ----------------------------------------------------------------------------------------------------------------


def train(config: Config, *, requests: StopRequests, fresh: bool = False, accept_changes: bool = False) -> int:
    """Trains until done or asked to stop; returns the exit code. Raises UserError on all ranks alike."""
    started = time.time()
    world = distributed.join(device=config.device, timeout=config.limits.first_step + 60)
    try:
        prepare_torch(config, world)
        data = first_on_node(world, lambda: open_data(config))
        if config.data.assignment == "owner":
            everywhere(world, lambda: check_owner(shards=config.data.shards, world=world.size))
        box: list[RunDirectory] = []
        on_rank_0(world, lambda: box.append(RunDirectory(config, fresh=fresh)))
        directory = box[0] if box else None
        try:
            trainer = Trainer(config, world, data, directory, requests=requests, started=started,
                              accept_changes=accept_changes)
            return trainer.run()
        finally:
            data.close()
            if directory is not None:
                directory.close()
    finally:
        distributed.leave()


def prepare_torch(config: Config, world: World) -> None:
    """Threads, and the kernels that repeat their bits when asked to."""
    torch.set_num_threads(config.torch_threads or max(1, len(os.sched_getaffinity(0)) // world.local_size))
    if world.on_gpu:
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def sync_debug(on: bool) -> Iterator[None]:
    """Raises on any call within that makes the host wait for the GPU (torch.cuda.set_sync_debug_mode)."""
    if on:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if on:
            torch.cuda.set_sync_debug_mode("default")


class Trainer:
    """One attempt at a run, on one rank."""

    # ------------------------------------------------------------------------------------------------------------
    # Setting up: net, optimizer, state
    # ------------------------------------------------------------------------------------------------------------

    def __init__(self, config: Config, world: World, data: Data, directory: RunDirectory | None, *,
                 requests: StopRequests, started: float, accept_changes: bool) -> None:
        self.config, self.world, self.data, self.directory = config, world, data, directory
        self.requests, self.order = requests, data.order
        self.total_steps = config.epochs * self.order.steps_per_epoch
        limit = recipes.parse_duration(config.deadline) if config.deadline else None
        self.deadline = deadline_from(limit=limit, started=started)

        self.decoder = everywhere(world, lambda: create_decoder(config.data.decoder))
        self.numeric = distributed.numeric_fingerprint(
            world, decoder=f"{self.decoder.name} {self.decoder.version}", micro_batch=config.micro_batch,
            assignment=config.data.assignment, amp=config.amp, deterministic=config.deterministic)
        self.start = self._open_run(accept_changes)
        if self.start.finished:
            return

        self.watchdog = Watchdog(world, run_dir=config.run_dir, requests=requests, step_limit=config.limits.step,
                                 first_limit=config.limits.first_step, on_failure=self._write_failure)
        torch.manual_seed(config.seed)
        net = everywhere(world, lambda: create_model(
            config.model.name, num_classes=config.model.num_classes, in_channels=config.model.in_channels,
            width=config.model.width, dropout=config.model.dropout, image_size=config.augment.size,
            lrn_after=tuple(config.model.lrn_after)))
        net = net.to(world.device).to(memory_format=torch.channels_last)
        self.reseed = replica.has_torch_dropout(net)
        ddp = wrap(net, world.device)
        self.step = Step(ddp, create_optimizer(net, config.optim), create_scaler(config.amp, world.device),
                         amp=config.amp, clip_norm=config.clip_norm, tick=self._tick)
        self.window = Window(config.log.steps, device=world.device)
        self.augment = Augment(config.augment, channels=config.model.in_channels, device=world.device)
        self.transfer = Transfer(world.device)
        self.agreement = distributed.Agreement(world)

        replica.warm_up(self.step, channels=config.model.in_channels, size=config.augment.size, device=world.device)
        self.place = replica.put_back(self.start.state, world=world, step=self.step, window=self.window)
        self.start.state = None  # its memory
        self.saved_at = (self.place["step"], self.place["evaluated_step"]) if self.start.resumed_from else None
        self.last_save = time.monotonic()
        self.slowest_step = 0.0
        self.agreed = distributed.Agreed()
        self._open_sinks()

    def _open_run(self, accept_changes: bool) -> Start:
        """Rank 0 chooses and loads; all learn how the attempt begins."""
        loaded: list[TrainState | None] = []

        def work() -> Start:
            assert self.directory is not None
            start = self.directory.open(self.config, order=self.order, numeric=self.numeric,
                                        identities=self.data.identities, accept_changes=accept_changes)
            loaded.append(start.state)
            return replace(start, state=None)

        start = on_rank_0(self.world, work)
        return replace(start, state=loaded[0] if loaded else None)

    def _open_sinks(self) -> None:
        """Metrics, checkpoints and state.json are rank 0's; the trace is every rank's."""
        config, world, place = self.config, self.world, self.place
        traces = config.run_dir / "trace"

        def work() -> None:
            assert self.directory is not None
            state = self._capture_alone()
            store.check_space(config.run_dir / "checkpoints", needed=store.size_on_disk(state),
                              keep=config.checkpoint.keep)
            try:
                sinks.rewrite(config.run_dir / "config.yaml", recipes.dump(config).splitlines())
                self.metrics = sinks.MetricsFile(config.run_dir / "metrics.jsonl", step=place["step"],
                                                 evaluated_step=place["evaluated_step"] or 0)
                self.board = (sinks.TensorBoard(config.run_dir / "tensorboard", self.metrics.records)
                              if config.log.tensorboard else None)
                sinks.cut_traces(traces, step=place["step"])
                self.directory.write_state(
                    "running", exact=self.start.exact, why_not_exact=self.start.why_not_exact, step=place["step"],
                    epoch=place["epoch"], total_steps=self.total_steps, attempt=self.start.attempt,
                    world_size=world.size, host=world.host, pid=os.getpid())
            except OSError as error:
                raise UserError(f"The run directory {config.run_dir} can't be written: "
                                f"{error.strerror or error}. Choose another with runs=...") from None

        on_rank_0(world, work)
        self.trace = everywhere(world, lambda: sinks.Trace(traces, world.rank) if config.log.trace else None)
        if world.rank != 0:
            return
        assert self.directory is not None
        lineage = lineage_of(config, start=self.start, numeric=self.numeric, identities=self.data.identities,
                             decoder=self.decoder.name)
        self.writer = Writer(config.run_dir / "checkpoints", keep=config.checkpoint.keep, attempt=self.start.attempt,
                             lineage=lineage, guard=self.directory.guard, log=say)
        self.console = sinks.Console(total_steps=self.total_steps)
        self._greet()

    def _capture_alone(self) -> TrainState:
        net = self.step.net.module
        return TrainState(model=net.state_dict(), optimizer=replica.named_state(net, self.step.optimizer))

    def _greet(self) -> None:
        config, world, start = self.config, self.world, self.start
        for note in start.notes:
            say(note)
        weights = sum(parameter.numel() for parameter in self.step.net.parameters())
        say(f"{config.run_dir}: {config.model.name}, {weights:,} parameters, {len(self.data.train):,} images in "
            f"{len(self.data.train.classes)} classes; {world.size} ranks on {world.nodes} node(s), "
            f"{self.numeric['device']}; global batch {config.global_batch} (at most "
            f"{largest_part(config, world=world.size)} a forward)")
        if start.resumed_from:
            exact = "exact: yes" if start.exact else f"exact: no, because {start.why_not_exact}"
            say(f"attempt {start.attempt} goes on at step {self.place['step']} of {self.total_steps} from "
                f"{start.resumed_from} ({exact})")

    # ------------------------------------------------------------------------------------------------------------
    # The loop
    # ------------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """The attempt. Whatever ends it other than success or an agreed stop ends the whole job, named."""
        if self.start.finished:
            self._say_finished()
            return EXIT_FINISHED
        try:
            cause = self._loop()
            return self._finish(cause)
        except UserError as error:
            self._fail(str(error), code=EXIT_USER)
        except torch.OutOfMemoryError as error:
            self._fail(self._out_of_memory(error), code=EXIT_USER)
        except Exception as error:
            if is_peer_loss(error):
                self.watchdog.peer_lost(error)
            self._fail(f"{type(error).__name__}: {error}", error=error)

    def _loop(self) -> str:
        """Steps until done; returns why it stopped early, or ""."""
        place = self.place
        rows = largest_part(self.config, world=self.world.size)
        with self._loader(self.data.train, rows=rows) as loader:
            works = training_works(self.config, self.data, first_step=place["step"], rank=self.world.rank,
                                   world=self.world.size)
            batches = loader.run(works)
            self.window_began, self.waited_before = time.perf_counter(), 0.0
            while True:
                if self._evaluation_due() and not self._evaluate():
                    return CAUSES[self.agreed.stop]
                if self._save_due():
                    self._save()
                if place["step"] >= self.total_steps:
                    return ""
                self._agree(loader)
                if self.agreed.stop:
                    return CAUSES[self.agreed.stop]
                self._take_step(batches)
                if self.window.full or place["step"] == self.total_steps:
                    self._log(loader)
                faults.strike(self.config.fault, at="step", step=place["step"], rank=self.world.rank)

    def _take_step(self, batches: Iterator[Batch]) -> None:
        began = time.monotonic()
        step = self.place["step"]
        plan = self.order.plan(step)
        rate = learning_rate(step, base=self.config.optim.lr, schedule=self.config.schedule,
                             steps_per_epoch=self.order.steps_per_epoch, epochs=self.config.epochs)
        if self.reseed:  # for nets with torch's own dropout: the same masks when this rank takes the step again
            torch.manual_seed(int(key(self.config.seed, step, "torch", self.world.rank) >> 1))
        self._tick("data")
        with sync_debug(self.config.log.sync_debug and self.world.on_gpu):
            self.step(self._micro_batches(batches, step), lr=rate, planned=plan.count, window=self.window)
        self.rate = rate

        position = plan.first + plan.count
        over = position == self.order.samples
        self.place |= {"step": step + 1, "epoch": plan.epoch + over, "position": 0 if over else position}
        if self._evaluation_due():
            self.place["phase"] = "evaluate"
        self.watchdog.settle()
        self.slowest_step = max(self.slowest_step, time.monotonic() - began)

    def _micro_batches(self, batches: Iterator[Batch], step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a step, on the device and augmented."""
        last = False
        while not last:
            batch = next(batches)
            work = batch.work
            assert work.step == step and work.draws is not None
            last = work.micro == work.micros - 1
            if self.trace is not None:
                self.trace.write(step, samples=work.samples.tolist(), views=batch.views.tolist(),
                                 flips=work.draws.flip.tolist())
            images, labels = self.transfer(batch)
            rows = torch.from_numpy(dropout_rows(work.samples, seed=self.config.seed, step=step))
            pixels = self.augment(images, work.draws)
            pixels = faults.spoil(pixels, self.config.fault, step=step, rank=self.world.rank)
            yield MicroBatch(pixels, labels, rows.to(self.world.device, non_blocking=True), last)

    # ------------------------------------------------------------------------------------------------------------
    # Agreeing, logging
    # ------------------------------------------------------------------------------------------------------------

    def _agree(self, loader: Loader | None = None) -> None:
        """Says what this rank knows and learns what all said one boundary ago."""
        cause, save = self.requests.cause(), False
        if self.world.rank == 0:
            self.writer.poll()
            left = None if self.deadline is None else self.deadline - time.time()
            cause = self.requests.cause(run_dir=self.config.run_dir, seconds_left=left,
                                        lead=lead_time(step=self.slowest_step, save=self._save_seconds()))
            minutes = self.config.checkpoint.minutes
            save = minutes is not None and time.monotonic() - self.last_save >= 60 * minutes
        waited = loader.waited if loader is not None else 0.0
        self.agreed = self.agreement.exchange(stop=CAUSES.index(cause), save=save, wait=waited)

    def _save_seconds(self) -> float:
        return self.writer.last.seconds + self.writer.last.stall if self.writer.last else 0.0

    def _log(self, loader: Loader) -> None:
        """A metric record of the window: the only place in the loop where the host waits for the device."""
        self._tick("log")
        steps = self.window.filled
        summary = self.window.summary()
        elapsed = time.perf_counter() - self.window_began
        record = {
            "kind": "train", "step": self.place["step"],
            "epoch": (self.place["step"] - 1) // self.order.steps_per_epoch,
            "samples": summary.samples, "loss": summary.loss, "top1": summary.top1, "lr": self.rate,
            "grad_norm": summary.grad_norm, "skipped": summary.skipped,
            "images_per_second": summary.samples / elapsed,
            "data_wait": min(1.0, (loader.waited - self.waited_before) / elapsed),
            "memory_peak": self._memory_peak(), "attempt": self.start.attempt, "time": sinks.now()}
        self.window_began, self.waited_before = time.perf_counter(), loader.waited
        if self.world.rank == 0:
            self._record(record)
            self.console.train(record, seconds_per_step=elapsed / steps)
            self._warn(summary.loss, steps=steps)
        self._check_finite(summary.skipped_in_a_row)

    def _record(self, record: dict[str, Any]) -> None:
        self.metrics.write(record)
        if self.board is not None:
            self.board.write(record)

    def _memory_peak(self) -> int:
        """Bytes: the device's allocations on CUDA, this process's resident memory on the CPU."""
        if self.world.on_gpu:
            return torch.cuda.max_memory_allocated(self.world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _warn(self, loss: float, *, steps: int) -> None:
        """A net that sits at chance after half an epoch is told apart from one that only starts slowly."""
        chance = math.log(self.config.model.num_classes)
        patience = max(self.order.steps_per_epoch / 2, 200)  # the first hundred steps of any net tell nothing
        if self.place["step"] - steps < patience <= self.place["step"] and abs(loss - chance) < 0.02:
            say(f"warning: after {self.place['step']} steps the loss is still {loss:.3f}, that of guessing (ln "
                f"{self.config.model.num_classes} = {chance:.3f}). A learning rate too high or too low does that "
                f"(optim.lr={self.config.optim.lr:g}), and so do wrong labels. Try --overfit 64 first.")

    def _check_finite(self, in_a_row: int) -> None:
        if in_a_row >= self.config.limits.nonfinite:
            raise UserError(f"The gradients were not finite in {in_a_row} steps in a row; the weights have not moved "
                            f"since, and no checkpoint holds any of it. Lower optim.lr "
                            f"({self.config.optim.lr:g}), set clip_norm, or use amp=bf16 instead of fp16.")

    # ------------------------------------------------------------------------------------------------------------
    # Evaluating, saving
    # ------------------------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        """At the end of every so many epochs, and of the run, unless it is done."""
        step, epoch = self.place["step"], self.place["epoch"]
        at_end = step == self.total_steps or (self.place["position"] == 0 and epoch % self.config.evaluate.epochs == 0)
        return bool(self.data.val is not None and step > 0 and at_end and (self.place["evaluated_step"] or 0) < step)

    def _evaluate(self) -> bool:
        """Exact evaluation; False when the ranks agreed to stop in it (it is then done again after the resume)."""
        assert self.data.val is not None
        began, step = time.perf_counter(), self.place["step"]

        def carry_on() -> bool:
            self._tick("evaluate")
            faults.strike(self.config.fault, at="evaluate", step=step, rank=self.world.rank)
            self._agree()
            return not self.agreed.stop

        batch = self.config.evaluate.batch
        with self._loader(self.data.val, rows=batch * TILE) as loader:
            found = evaluate(self.step.net.module, loader, samples=len(self.data.val), batch=batch,
                             choose=view_of(self.config.evaluate, self.config.augment), augment=self.augment,
                             world=self.world, transfer=self.transfer, carry_on=carry_on)
        if found is None:
            return False
        best = self.place["best"]
        self.improved = best is None or found.top1 > best["top1"]
        self.place |= {"phase": "train", "evaluated_step": step,
                       "best": {"top1": found.top1, "step": step} if self.improved else best}
        if self.world.rank == 0:
            record = {"kind": "evaluate", "step": step, "epoch": self.place["epoch"], **asdict(found),
                      "top1": found.top1, "top5": found.top5, "seconds": time.perf_counter() - began,
                      "attempt": self.start.attempt, "time": sinks.now()}
            self._record(record)
            self.console.evaluate(record)
        self.window_began = time.perf_counter()
        return True

    def _save_due(self) -> bool:
        """Before the first step, every so many steps and epochs, after a better evaluation, and when time is up."""
        every, step = self.config.checkpoint, self.place["step"]
        if self.saved_at == (step, self.place["evaluated_step"]):
            return False
        at_epoch = (self.place["position"] == 0 and step > 0 and every.epochs is not None
                    and self.place["epoch"] % every.epochs == 0)
        at_step = every.steps is not None and step % every.steps == 0
        return (self.saved_at is None or at_epoch or at_step or self.agreed.save or self.improved
                or step == self.total_steps)

    improved = False  # since the last save

    def _save(self) -> None:
        """Stages a copy; the disk is written in the background."""
        self._tick("save")
        state = replica.capture(self.place, step=self.step, window=self.window, fp16=self.config.amp == "fp16")
        self._check_finite(state.skipped_in_a_row)
        self.saved_at, self.last_save = (state.step, state.evaluated_step), time.monotonic()
        if self.world.rank == 0:
            assert self.directory is not None
            self.metrics.flush(durable=True)
            self.writer.submit(state, best_model=self.config.model.name if self.improved else None)
            if self.start.attempt == 1 and state.step == 0:  # a full disk or a quota shows before the first step
                self.writer.wait()
                if self.writer.failure:
                    raise UserError(self.writer.failure)
            faults.strike(self.config.fault, at="save", step=state.step, rank=self.world.rank)
            self._write_state("running")
        self.improved = False

    def _loader(self, index: Any, *, rows: int) -> Loader:
        data = self.config.data
        return Loader(index, self.decoder, rows=rows, size=self.config.augment.size,
                      channels=self.config.model.in_channels, prefetch=data.prefetch, stored=data.stored,
                      threads=decode_threads(data.threads, ranks_on_node=self.world.local_size),
                      pin=self.world.on_gpu)

    # ------------------------------------------------------------------------------------------------------------
    # Leaving
    # ------------------------------------------------------------------------------------------------------------

    def _finish(self, cause: str) -> int:
        """All ranks leave together: the last save, why, and the exit code."""
        self.agreement.settle()
        if self.saved_at != (self.place["step"], self.place["evaluated_step"]):
            self._save()
        if self.world.rank == 0:
            self.writer.close()
            if self.board is not None:
                self.board.close()
            if cause:
                self._write_state("preempted", why=cause)
                (self.config.run_dir / STOP_FILE).unlink(missing_ok=True)
                say(f"stopped by {cause} after step {self.place['step']} of {self.total_steps}; saved. "
                    "The same command goes on from there.")
            else:
                self._write_state("finished")
                self._say_finished()
        if self.trace is not None:
            self.trace.close()
        dist.barrier(group=self.world.control)
        self.watchdog.close()
        return EXIT_STOPPED if cause else EXIT_FINISHED

    def _say_finished(self) -> None:
        if self.world.rank != 0:
            return
        assert self.directory is not None
        best = self.directory.known.get("best") or {}
        accuracy = f", best held-out top-1 {best['top1']:.2%} after step {best['step']}" if best else ""
        say(f"{self.config.run_dir} is finished: {self.config.epochs} epochs, {self.total_steps} steps{accuracy}. "
            f"To train longer, give the same command with more epochs (epochs={2 * self.config.epochs}).")

    def _write_state(self, status: str, *, why: str = "") -> None:
        assert self.directory is not None
        last = self.writer.last
        try:
            self.directory.write_state(
                status, why=why, step=self.place["step"], epoch=self.place["epoch"], best=self.place["best"],
                last_checkpoint=str(last.path) if last else self.start.resumed_from)
        except OSError as error:
            say(f"state.json can't be written ({error.strerror}).")

    def _out_of_memory(self, error: BaseException) -> str:
        smaller = largest_part(self.config, world=self.world.size) // 2
        fix = f"Set micro_batch={smaller}; the global batch stays {self.config.global_batch}." if smaller else \
            "Not even one sample fits: use a smaller net or augment.size."
        return (f"out of memory with micro_batch={self.config.micro_batch}, peak {self._memory_peak() / 2**20:.0f} MB. "
                + fix)

    def _fail(self, cause: str, *, code: int = 1, error: BaseException | None = None) -> NoReturn:
        """Ends the whole job from this rank, named."""
        import traceback

        detail = "" if error is None else "".join(traceback.format_exception(error))
        self.watchdog.fail(Failure(self.world.rank, self.world.host, self.place["step"], cause, detail), code=code)

    def _write_failure(self, failure: Failure) -> None:
        """Rank 0, on its way out with the job failing: a save under way is finished, and state.json says why."""
        if self.world.rank == 0 and self.directory is not None:
            self.writer.wait()
            self._write_state("failed", why=failure.line())
            self.directory.close()

    def _tick(self, stage: str) -> None:
        self.watchdog.tick(self.place["step"] if hasattr(self, "place") else 0, stage)
