"""The story of a training run, from top to bottom.

    join the group -> open the data -> take the run directory -> build the net -> go on from the checkpoint
    -> step, log, evaluate, save ... until done or asked to stop -> say why, and leave
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from alexnet_ddp import distributed, faults, replica, rules, sinks
from alexnet_ddp.checkpoint.state import TrainState
from alexnet_ddp.config import Config
from alexnet_ddp.damage import Damage, made
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.caches.device_cache import DeviceCache
from alexnet_ddp.data.decoding import stages
from alexnet_ddp.data.decoding.decode import create_decoder
from alexnet_ddp.data.feed import Feed, device_cache, sweep, training_records, what_binds
from alexnet_ddp.data.loader import Batch, Loader, Times, decode_threads
from alexnet_ddp.data.order import check_owner
from alexnet_ddp.data.randomness import dropout_rows, key
from alexnet_ddp.data.records import Records, StoredRecords
from alexnet_ddp.data.training import Data, has_single_samples, most_rows, open_data, told, training_works
from alexnet_ddp.distributed import World, everywhere, first_on_node, on_rank_0
from alexnet_ddp.ema import Ema, check_steps, decay_at
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_STOPPED, Diverged, OutOfMemory, UserError
from alexnet_ddp.evaluate import TILE, evaluate, evaluates_squashed, record_of, view_of
from alexnet_ddp.hardware import cores, memory_peak, out_of_memory, prepare_torch
from alexnet_ddp.metrics import Window
from alexnet_ddp.models import sparsity
from alexnet_ddp.models.frozen import freeze
from alexnet_ddp.models.recipe import create_for
from alexnet_ddp.models.weights import Weights
from alexnet_ddp.optim import create_optimizer, create_scaler, named_state
from alexnet_ddp.report import Report, say_finished
from alexnet_ddp.run import RunDirectory, Start, check_shared, lineage_of, read_start, write_refused
from alexnet_ddp.schedule import learning_rate
from alexnet_ddp.step import MicroBatch, Step, sync_debug, wrap
from alexnet_ddp.stop import CAUSES, StopRequests, deadline_from, lead_time
from alexnet_ddp.watchdog import Watchdog

# ----------------------------------------------------------------------------------------------------------------
# Entry
# ----------------------------------------------------------------------------------------------------------------


def train(config: Config, *, requests: StopRequests, fresh: bool = False, accept_changes: bool = False) -> int:
    """Trains until done or asked to stop; returns the exit code. Raises UserError on all ranks alike.

    Whatever else goes wrong on a rank ends the whole job at once, with one line that names the rank.
    """
    started = time.time()
    try:
        world = distributed.join(device=config.device, timeout=config.limits.first_step + 60)
    except UserError as mistake:
        if distributed.environment_rank() == 0:
            write_refused(config, None, mistake)
        raise
    watchdog = Watchdog(world, run_dir=config.run_dir, requests=requests, step_limit=config.limits.step,
                        first_limit=config.limits.first_step)
    data: Data | None = None
    directory: RunDirectory | None = None
    try:
        prepare_torch(config, world)
        read: list[Weights | None] = []
        on_rank_0(world, lambda: read.append(read_start(config, fresh=fresh)))  # before what takes long
        data = first_on_node(world, lambda: open_data(config))
        if config.data.assignment == "owner":
            everywhere(world, lambda: check_owner(shards=config.data.shards, world=world.size))
        taken: list[RunDirectory] = []

        def take() -> None:
            taken.append(RunDirectory(config, fresh=fresh))
            watchdog.on_failure = taken[0].write_failed

        on_rank_0(world, take)
        directory = taken[0] if taken else None
        check_shared(world, config.run_dir)

        trainer = Trainer(config, world, data, directory, watchdog=watchdog, requests=requests, started=started)
        going_on = trainer.prepare(accept_changes=accept_changes, weights=read.pop() if read else None)
        code = trainer.run() if going_on else EXIT_FINISHED  # it was finished already
        let_go(world, data, directory)
    except UserError as mistake:  # while setting up: all ranks raise the same
        if world.rank == 0:
            write_refused(config, directory, mistake)
        with contextlib.suppress(RuntimeError):  # a rank that is lost now must not hide the mistake
            let_go(world, data, directory)
        raise
    except Exception as error:
        watchdog.broke(error)
    finally:
        watchdog.close()
        distributed.leave()
    return code


def let_go(world: World, data: Data | None, directory: RunDirectory | None) -> None:
    """Gives the run directory back, and returns once all ranks have come here.

    A launcher may kill the other ranks when the first one leaves with another code than 0 (srun --kill-on-bad-exit):
    by then nothing may be left to do.
    """
    if data is not None:
        data.close()
    if directory is not None:
        directory.close()
    dist.barrier(group=world.control)


class Trainer:
    """One attempt at a run, on one rank. `place` holds the plain fields of its TrainState: step, epoch, ..."""

    # ------------------------------------------------------------------------------------------------------------
    # Setting up: net, optimizer, state
    # ------------------------------------------------------------------------------------------------------------

    def __init__(self, config: Config, world: World, data: Data, directory: RunDirectory | None, *,
                 watchdog: Watchdog, requests: StopRequests, started: float) -> None:
        self.config, self.world, self.data, self.directory = config, world, data, directory
        self.watchdog, self.requests, self.order = watchdog, requests, data.order
        self.total_steps = config.epochs * self.order.steps_per_epoch
        check_steps(config.ema, total_steps=self.total_steps)
        limit = rules.parse_duration(config.deadline) if config.deadline else None
        self.deadline = deadline_from(limit=limit, started=started)
        pinned = on_rank_0(world, lambda: str(directory.known.get("decoder", "")) if directory else "")
        wanted = pinned if pinned and config.data.decoder == "auto" else config.data.decoder
        self.decoder = everywhere(world, lambda: create_decoder(wanted, quality=config.augment.resize))
        self.numeric = distributed.numeric_fingerprint(
            world, decoder=self._pixels(), micro_batch=config.micro_batch,
            assignment=config.data.assignment, amp=config.amp, deterministic=config.deterministic)

    def _pixels(self) -> str:
        """Whose versions the pixels hang on: the decoder's, of what makes a stage that may be made at each read, and of
        whose operations a policy is."""
        made = f"{self.decoder.name} {self.decoder.version}"
        if self.config.augment.policy != "none":
            made += f", torchvision {metadata.version('torchvision')}"
        return made if self.config.data.stored == "original" else f"{made}, {stages.VERSIONS}"

    def prepare(self, *, accept_changes: bool, weights: Weights | None) -> bool:
        """Builds the net and puts the state in it; False when the run is finished already. Raises UserError.

        `weights` are what a new run begins with, on rank 0, where the recipe says init_from.
        """
        config, world = self.config, self.world
        self.start = self._open_run(accept_changes)
        if self.start.finished:
            if self.world.local_rank == 0:
                sweep(self.config)  # what a kill between the end and the cache's removal may have left
            return False

        torch.manual_seed(config.seed)
        net = everywhere(world, lambda: create_for(config, on_gpu=world.on_gpu))
        net = net.to(world.device).to(memory_format=torch.channels_last)
        if config.init_from is not None and not self.start.resumed_from:
            self.start.init, note = replica.begin_with(weights, world=world, net=net,
                                                       recipe=config.model_dump(mode="json"))
            self.start.notes.append(note)
        frozen = everywhere(world, lambda: freeze(net, config.freeze))
        self.start.notes += frozen.notes(fresh=self.start.init is None)
        if config.sparsity == "keep":
            sparsity.keep_zeros(net)
            if not self.start.resumed_from:
                self.start.notes.append(everywhere(world, lambda: sparsity.told(net)))
        self.reseed = replica.has_torch_dropout(net)
        self.step = Step(wrap(net, world.device), create_optimizer(net, config.optim),
                         create_scaler(config.amp, world.device), amp=config.amp, clip_norm=config.clip_norm,
                         tick=self._tick, smoothing=config.label_smoothing,
                         ema=None if config.ema.decay is None else Ema(net))  # net: the same on all ranks by now
        self.window = Window(config.log.steps, device=world.device)
        self.augment = Augment(config.augment, channels=config.model.in_channels, device=world.device)
        self.agreement = distributed.Agreement(world)
        self.agreed = distributed.Agreed()

        lone = replica.warm_up(self.step, channels=config.model.in_channels, size=config.augment.size,
                               device=world.device)
        everywhere(world, lambda: self._check_single_samples(lone))
        self.place = replica.put_back(self.start.state, world=world, step=self.step, window=self.window)
        self.start.state = None  # its memory
        self.saved_at = (self.place["step"], self.place["evaluated_step"]) if self.start.resumed_from else None
        self.improved = False  # the best weights are newer than the last save that was begun
        self.slowest_step = 0.0  # seconds
        self._open_feeds()
        self._open_report()
        return True

    def _check_single_samples(self, lone: list[str]) -> None:
        """`lone`: batch norms that see one value of each sample. Raises UserError where they would see a single one."""
        config, world = self.config, self.world
        if lone and has_single_samples(config, self.order, rank=world.rank, world=world.size):
            raise UserError(
                f"{config.model.name} normalises over the samples of a forward, and at augment.size="
                f"{config.augment.size} '{lone[0]}' sees one value of each: a forward of a single sample can't be "
                f"normalised, and global_batch={config.global_batch} with micro_batch={config.micro_batch} and "
                f"data.assignment={config.data.assignment} on {world.size} ranks makes some. Use a larger "
                "augment.size, or another micro_batch or global_batch.")

    def _open_run(self, accept_changes: bool) -> Start:
        """Rank 0 chooses and loads; all learn how the attempt begins."""
        loaded: list[TrainState | None] = []

        def work() -> Start:
            assert self.directory is not None
            start = self.directory.open(self.config, order=self.order, numeric=self.numeric,
                                        identities=self.data.identities, accept_changes=accept_changes)
            loaded.append(start.state)
            if start.finished:
                self.directory.confirm_finished(start)
                assert start.state is not None
                say_finished(self.config, start.state.step, start.state.best, planned=self.total_steps)
            return replace(start, state=None)

        start = on_rank_0(self.world, work)
        return replace(start, state=loaded[0] if loaded else None)

    def _open_feeds(self) -> None:
        """What is trained on, through the cache that is asked for, and what is evaluated on."""
        config, world, data = self.config, self.world, self.data
        neighbours = [rank for rank, host in enumerate(world.hosts) if host == world.host]
        say = sinks.say if world.local_rank == 0 else lambda line: None
        records = everywhere(world, lambda: training_records(
            config, data, rank=world.rank, world=world.size, neighbours=neighbours, say=say))
        kept = everywhere(world, lambda: device_cache(
            config, data, rank=world.rank, world=world.size, device=world.device,
            most_rows=most_rows(config, world=world.size)))
        self.feed = self._feed(records, data.train.labels, crop=config.augment.crop, kept=kept)
        if val := data.val:
            crop = "squash" if evaluates_squashed(config.evaluate, config.augment) else "center"
            held_out = everywhere(world, lambda: StoredRecords(val, config.data.stored))
            self.held_out = self._feed(held_out, val.labels, crop=crop)

    def _feed(self, records: Records, labels: NDArray[np.int32], *, crop: str, kept: DeviceCache | None = None) -> Feed:
        return Feed(self.config, records, labels, self.decoder, crop=crop, device=self.world.device, kept=kept,
                    threads=decode_threads(self.config.data.threads, cores=cores(self.world)))

    def _open_report(self) -> None:
        """Rank 0 writes for all; the trace is every rank's own."""
        config, world = self.config, self.world
        net = self.step.net.module
        made: list[Report] = []

        def work() -> None:
            assert self.directory is not None
            self.directory.write_classes(self.data.train.classes)
            lineage = lineage_of(config, start=self.start, numeric=self.numeric, identities=self.data.identities,
                                 decoder=self.decoder.name)
            tensors = TrainState(model=net.state_dict(), optimizer=named_state(net, self.step.optimizer),
                                 ema=self.step.mean)
            made.append(Report(config, self.directory, start=self.start, place=self.place, state=tensors,
                               lineage=lineage, world=world, total_steps=self.total_steps))
            made[0].greet(data=self.data, world=world, device=self.numeric["device"], step=self.place["step"],
                          parameters=sum(parameter.numel() for parameter in net.parameters()))

        on_rank_0(world, work)
        self.report = made[0] if made else None
        if self.report is not None:
            report = self.report
            self.watchdog.on_failure = lambda failure: report.fail(failure, place=self.place)
        self.damage = everywhere(world, lambda: Damage(
            config.data, data=self.data, world=world, run_dir=config.run_dir, place=self.place,
            attempt=self.start.attempt, say=self.report.tell if self.report is not None else sinks.say))
        if self.report is not None:
            self.report.damage = self.damage
        folder = config.run_dir / "trace"
        self.trace = everywhere(world, lambda: sinks.Trace(folder, world.rank) if config.log.trace else None)

    # ------------------------------------------------------------------------------------------------------------
    # The loop
    # ------------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """The attempt; returns the exit code. A user's mistake that shows now, on this rank, ends the job."""
        try:
            return self._finish(self._loop())
        except torch.OutOfMemoryError:
            self.watchdog.broke(OutOfMemory(out_of_memory(self.config, self.world)))
        except UserError as error:  # of this rank alone, so that the others must be told
            self.watchdog.broke(error)

    def _loop(self) -> str:
        """Steps until done; returns why it stopped early, or ""."""
        rows = most_rows(self.config, world=self.world.size)
        with self.feed.loader(rows=rows) as loader:
            batches = loader.run(training_works(self.config, self.data, first_step=self.place["step"],
                                                rank=self.world.rank, world=self.world.size))
            faults.strike(self.config.fault, at="start", step=self.place["step"], rank=self.world.rank)
            self.timed_from = self.place["step"]  # the window may have begun in an earlier attempt
            self.window_began, self.times_before = time.perf_counter(), Times()
            while True:
                if self._evaluation_due() and not self._evaluate():
                    return CAUSES[self.agreed.stop]
                if self._save_due():
                    self._save()
                if self.place["step"] >= self.total_steps:
                    return ""
                self.feed.check()
                if self._agree(waited=loader.times.waiting).stop:
                    return CAUSES[self.agreed.stop]
                self._take_step(batches)
                if self.window.full or self.place["step"] == self.total_steps:
                    self._log(loader)
                faults.strike(self.config.fault, at="step", step=self.place["step"], rank=self.world.rank)

    def _take_step(self, batches: Iterator[Batch]) -> None:
        began, step = time.monotonic(), self.place["step"]
        plan = self.order.plan(step)
        self.rate = learning_rate(step, base=self.config.optim.lr, schedule=self.config.schedule,
                                  steps_per_epoch=self.order.steps_per_epoch, epochs=self.config.epochs)
        if self.reseed:  # for nets with torch's own dropout: the same masks when this rank takes the step again
            torch.manual_seed(int(key(self.config.seed, step, "torch", self.world.rank) >> 1))
        self._tick("data")
        with sync_debug(self.config.log.sync_debug and self.world.on_gpu):
            self.step(self._micro_batches(batches, step), lr=self.rate, planned=plan.count, window=self.window,
                      ema_decay=decay_at(step, self.config.ema))

        position = plan.first + plan.count
        over = position == self.order.samples
        self.place |= {"step": step + 1, "epoch": plan.epoch + over, "position": 0 if over else position}
        self.place["phase"] = "evaluate" if self._evaluation_due() else "train"
        self._tick("start")
        self.watchdog.settle()
        self.slowest_step = max(self.slowest_step, time.monotonic() - began)
        if self.report is not None:
            self.report.step_seconds = self.slowest_step

    def _micro_batches(self, batches: Iterator[Batch], step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a step, on the device and augmented."""
        last = False
        while not last:
            batch = next(batches)
            work = batch.work
            assert work.step == step and work.draws is not None
            last = work.micro == work.micros - 1
            if self.trace is not None:
                self.trace.write(step, **told(work, batch.views, section=self.config.augment))
            images, labels = self.feed.transfer(batch)
            rows = torch.from_numpy(dropout_rows(work.samples[work.own], seed=self.config.seed, step=step))
            pixels, targets = made(batch, self.augment(images, work.draws), labels)
            self.damage.meet(batch, kind="train", step=step + 1)
            pixels = faults.spoil(pixels, self.config.fault, step=step, rank=self.world.rank)
            yield MicroBatch(pixels, targets, rows.to(self.world.device, non_blocking=True), last)

    # ------------------------------------------------------------------------------------------------------------
    # Agreeing, logging
    # ------------------------------------------------------------------------------------------------------------

    def _agree(self, *, waited: float = 0.0) -> distributed.Agreed:
        """Says what this rank knows and learns what all said one boundary ago."""
        if self.report is None:
            cause, save = self.requests.cause(), False
        else:
            self.report.writer.poll()
            left = None if self.deadline is None else self.deadline - time.time()
            cause = self.requests.cause(run_dir=self.config.run_dir, seconds_left=left,
                                        lead=lead_time(step=self.slowest_step, save=self.report.save_seconds))
            save = self.report.ask_for_save()
        self.agreed = self.agreement.exchange(stop=CAUSES.index(cause), save=save, wait=waited)
        return self.agreed

    def _log(self, loader: Loader) -> None:
        """A metric record of the window: the only place in the loop where the host waits for the device."""
        self._tick("log")
        steps, step = self.window.filled, self.place["step"]
        summary = self.window.summary()
        self.place["damaged"] = self.damage.share()
        elapsed = time.perf_counter() - self.window_began
        timed, times = range(self.timed_from, step), loader.times - self.times_before
        images = sum(self.order.plan(each).count for each in timed)
        record = {
            "step": step, "epoch": (step - 1) // self.order.steps_per_epoch, "samples": summary.samples,
            "loss": summary.loss, "top1": summary.top1, "lr": self.rate, "grad_norm": summary.grad_norm,
            "skipped": summary.skipped, "images_per_second": images / elapsed,
            "data_wait": min(1.0, times.waiting / elapsed), "binds": what_binds(times, seconds=elapsed),
            "memory_peak": memory_peak(self.world)}
        if self.config.data.on_error == "skip":
            record["damaged"] = self.place["damaged"]
        if self.feed.cached is not None:
            record["cached"] = self.feed.cached
        if self.report is not None:
            self.report.training(record, steps=steps, timed=len(timed), seconds=elapsed,
                                 steps_per_epoch=self.order.steps_per_epoch, waited=self.agreed.waits)
        self.timed_from, self.window_began, self.times_before = step, time.perf_counter(), loader.times
        self._check_finite(summary.skipped_in_a_row)
        if self.config.limits.loss is not None and summary.loss < self.config.limits.loss:
            self.total_steps = step  # the same on all ranks, as the loss is

    def _check_finite(self, in_a_row: int) -> None:
        if in_a_row >= self.config.limits.nonfinite:
            raise Diverged(f"The gradients were not finite in {in_a_row} steps in a row; the weights have not moved "
                           f"since, and no checkpoint holds any of it. Lower optim.lr "
                           f"({self.config.optim.lr:g}), set clip_norm, or use amp=bf16 instead of fp16.")

    # ------------------------------------------------------------------------------------------------------------
    # Evaluating, saving
    # ------------------------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        """At the end of every so many epochs, and of the run, unless it is done."""
        place, step = self.place, self.place["step"]
        at_epoch = place["position"] == 0 and place["epoch"] % self.config.evaluate.epochs == 0
        at_end = at_epoch or step == self.total_steps
        return bool(self.data.val is not None and step > 0 and at_end and (place["evaluated_step"] or 0) < step)

    def _evaluate(self) -> bool:
        """Exact evaluation; False when the ranks agreed to stop in it (it is then done again after the resume)."""
        assert self.data.val is not None
        began, step, batch = time.perf_counter(), self.place["step"], self.config.evaluate.batch

        def carry_on() -> bool:
            self._tick("evaluate")
            faults.strike(self.config.fault, at="evaluate", step=step, rank=self.world.rank)
            return not self._agree().stop

        with self.held_out.loader(rows=batch * TILE) as loader:
            found = evaluate(self.step.net.module, loader, samples=len(self.data.val), batch=batch,
                             choose=view_of(self.config.evaluate, self.config.augment), augment=self.augment,
                             world=self.world, transfer=self.held_out.transfer, carry_on=carry_on, tick=self._tick,
                             weights=[{}, self.step.mean] if self.step.mean else [{}],
                             meet=lambda batch: self.damage.meet(batch, kind="evaluate", step=step))
        if found is None:
            return False
        if too_many := self.damage.share_evaluation():
            self._give_up_evaluation(too_many)
        best = self.place["best"]
        top1 = found[-1].top1  # where there is a mean of the weights, its own decides
        self.improved = best is None or top1 > best["top1"]
        self.place |= {"phase": "train", "evaluated_step": step,
                       "best": {"top1": top1, "step": step} if self.improved else best}
        if self.report is not None:
            self.report.evaluation({"step": step, "epoch": self.place["epoch"], **record_of(*found),
                                    "seconds": time.perf_counter() - began})
        self.window_began += time.perf_counter() - began  # the window's rate is that of training
        return True

    def _give_up_evaluation(self, why: str) -> None:
        """Ends the job on all ranks, but for the evaluation nothing is lost: it is made again by the next attempt."""
        if self.saved_at != (self.place["step"], self.place["evaluated_step"]):
            self._save()

        def leave() -> None:
            assert self.report is not None
            self.report.writer.wait()
            raise UserError(why)

        on_rank_0(self.world, leave)

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

    def _save(self) -> None:
        """Stages a copy of the state; the disk is written in the background."""
        self._tick("save")
        self.place["damaged"] = self.damage.share()
        state = replica.capture(self.place, step=self.step, window=self.window, fp16=self.config.amp == "fp16")
        self._check_finite(state.skipped_in_a_row)
        if self.report is not None:
            self.watchdog.save_seconds = self.report.save_seconds
            self.report.save(state, improved=self.improved)
            self.report.status("running", place=self.place)
        self.saved_at, self.improved = (state.step, state.evaluated_step), False

    # ------------------------------------------------------------------------------------------------------------
    # Leaving
    # ------------------------------------------------------------------------------------------------------------

    def _finish(self, cause: str) -> int:
        """All ranks are done together: the last save, why, and the exit code."""
        self.agreement.settle()
        if self.saved_at != (self.place["step"], self.place["evaluated_step"]):
            self._save()
        self._tick("save")
        if self.report is not None:
            self.report.leave(place=self.place, cause=cause)
        if self.trace is not None:
            self.trace.close()
        self.feed.close(finished=not cause)
        if not cause and self.world.local_rank == 0:
            sweep(self.config)
        return EXIT_STOPPED if cause else EXIT_FINISHED

    def _tick(self, stage: str) -> None:
        self.watchdog.tick(self.place["step"], stage)
