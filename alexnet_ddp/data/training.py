"""The training data of a run: opened and checked, ordered, and laid out as the work of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet_ddp.amounts import counted
from alexnet_ddp.config import Config
from alexnet_ddp.data.decoding import views
from alexnet_ddp.data.decoding.views import ChooseView, View, Views
from alexnet_ddp.data.index import Index, check_pair, open_index
from alexnet_ddp.data.index.sources import listed
from alexnet_ddp.data.loader import Work, micro_batches
from alexnet_ddp.data.mixing import Mixing, draw_mixing, mixes, most_guests, with_guests
from alexnet_ddp.data.order import Order
from alexnet_ddp.data.randomness import CROP_DRAWS, Draws, draw
from alexnet_ddp.errors import UserError
from alexnet_ddp.sections import AugmentSection

I64 = NDArray[np.int64]

NAMED = 3  # images that a message names
AT_ONCE = 4096  # samples whose order and draws are computed together
DRAWS_OF = {"random_resized": CROP_DRAWS, "random": 2, "center": 0, "squash": 0}  # by augment.crop


@dataclass
class Data:
    """What a run trains on and is evaluated on. `train_ids` picks the samples of `data.limit`, evenly over classes."""

    train: Index
    val: Index | None
    order: Order
    train_ids: I64 | None = None

    @property
    def identities(self) -> dict[str, str]:
        return {"train": self.order.identity, "val": self.val.identity if self.val else ""}

    def close(self) -> None:
        self.train.close()
        if self.val is not None:
            self.val.close()


def open_data(config: Config) -> Data:
    """Opens the indexes and checks them against each other and against the net. Raises UserError."""
    train = _open("data.train", config.data.train)
    val = _open("data.val", config.data.val) if config.data.val else None
    if val is not None:
        check_pair(train, val)
    if len(train.classes) != config.model.num_classes:
        raise UserError(f"model.num_classes must be the number of classes in data.train, got "
                        f"{config.model.num_classes} for {len(train.classes)} in {config.data.train}. "
                        f"Use model.num_classes={len(train.classes)}.")
    for key, index in (("data.train", train), ("data.val", val)):
        if index is not None and config.data.on_error == "fail" and len(index.empty):
            named = listed([index.where(int(row)) for row in index.empty], most=NAMED)
            raise UserError(f"{key}: {counted(len(index.empty), 'image')} of no bytes: {named}.\nMake the archive "
                            "again without them, or leave damaged images out (data.on_error=skip).")
    samples, ids = len(train), None
    if config.data.limit is not None and config.data.limit < samples:
        samples = config.data.limit
        ids = np.arange(samples, dtype=np.int64) * len(train) // samples
    order = Order(samples, global_batch=config.global_batch, seed=config.seed, shards=config.data.shards,
                  identity=train.identity)
    return Data(train, val, order, ids)


def _open(key: str, place: str) -> Index:
    try:
        return open_index(place)
    except UserError as error:
        raise UserError(f"{key}={error}") from None


def training_view(section: AugmentSection, draws: Draws | None, row: int) -> ChooseView:
    """How one sample of a batch is shown in training: a pure function of its draws and its size."""
    def choose(width: int, height: int) -> View:
        if section.crop == "random_resized":
            assert draws is not None
            return views.random_resized(width, height, size=section.size, draws=draws.crop[row],
                                         scale=section.scale, ratio=section.ratio)
        if section.crop == "random":
            assert draws is not None
            return views.random_crop(width, height, size=section.size, draws=draws.crop[row])
        return (views.center if section.crop == "center" else views.squash)(width, height, size=section.size)

    return choose


def training_views(section: AugmentSection, draws: Draws, width: int, height: int) -> Views:
    """How all samples of a batch are shown whose images have one size: training_view of each, int32 [n, 8]."""
    if section.crop == "random_resized":
        return views.random_resized_all(width, height, size=section.size, draws=draws.crop, scale=section.scale,
                                        ratio=section.ratio)
    if section.crop == "random":
        return views.random_crop_all(width, height, size=section.size, draws=draws.crop)
    view = training_view(section, draws, 0)(width, height)
    return np.tile(np.array(view, np.int32), (len(draws.flip), 1))


def draws_of(section: AugmentSection, ids: I64, *, seed: int, epoch: int) -> Draws:
    """All that the recipe's augmentation draws for these samples in one epoch."""
    return draw(ids, seed=seed, epoch=epoch, flip=section.flip, rotation=section.rotation,
                color_jitter=section.color_jitter, pca_lighting=section.pca_lighting, crop=DRAWS_OF[section.crop],
                erasing=section.erasing, size=section.size,
                policy_ops={"none": 0, "trivial": 1, "randaugment": section.policy_ops}[section.policy])


def training_works(config: Config, data: Data, *, first_step: int, rank: int, world: int) -> Iterator[Work]:
    """A rank's micro-batches from `first_step` to the run's end; every step has at least one, perhaps empty."""
    order, section = data.order, config.augment
    last_step = config.epochs * order.steps_per_epoch
    for steps in blocks(first_step, last_step, steps_per_epoch=order.steps_per_epoch, of=config.global_batch):
        epoch = order.plan(steps[0]).epoch
        cuts = _with_all_guests(config, order, steps, *order.parts(steps, rank=rank, world=world,
                                                                   assignment=config.data.assignment))
        ids = order.samples_at(epoch, np.concatenate([cut.positions for cut in cuts]))
        if data.train_ids is not None:
            ids = data.train_ids[ids]
        draws, first = draws_of(section, ids, seed=config.seed, epoch=epoch), 0
        for cut in cuts:
            rows = slice(first, first + len(cut.positions))
            drawn, first = draws[rows], rows.stop
            yield Work(step=cut.step, micro=cut.micro, micros=cut.micros, samples=ids[rows], draws=drawn,
                       choose=partial(training_view, section, drawn),
                       choose_all=partial(training_views, section, drawn), guests=cut.guests, mixing=cut.mixing)


@dataclass(frozen=True)
class _Cut:
    """A micro-batch before its samples are known: positions in the epoch, of guests last."""

    step: int
    micro: int
    micros: int
    positions: I64
    guests: int = 0
    mixing: Mixing | None = None


def _with_all_guests(config: Config, order: Order, steps: range, positions: I64, bounds: I64) -> list[_Cut]:
    """The micro-batches of a rank's parts of `steps` (as Order.parts gives them), with the guests that they need."""
    found = []
    for step, first, last in zip(steps, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        mixing = draw_mixing(config.augment, seed=config.seed, step=step) if mixes(config.augment) else None
        plan, cuts = order.plan(step), micro_batches(positions[first:last], config.micro_batch)
        for number, cut in enumerate(cuts):
            own = positions[first:last][cut]
            if mixing is None:
                found.append(_Cut(step, number, len(cuts), own))
                continue
            mine, guests = with_guests(mixing, own, first=plan.first, count=plan.count)
            found.append(_Cut(step, number, len(cuts), np.concatenate([own, guests]), len(guests), mine))
    return found


def told(work: Work, shown: Views, *, section: AugmentSection) -> dict[str, Any]:
    """What a micro-batch is trained on, for a trace: of its own samples, what was drawn for each; and how they were
    mixed, whose partners' draws are found by their ids."""
    assert work.draws is not None
    own = work.draws[work.own]
    words: dict[str, Any] = {"samples": work.samples[work.own].tolist(), "views": shown[work.own].tolist(),
                             "flips": own.flip.tolist()}
    if section.erasing > 0:
        words["erased"] = own.erased.tolist()
    if section.policy != "none":
        words["policy"] = own.policy.tolist()
    if work.mixing is not None:
        words |= work.mixing.told(work.samples)
    return words


def blocks(first: int, last: int, *, steps_per_epoch: int, of: int) -> Iterator[range]:
    """Steps [first, last) in runs that end with their epoch and have some AT_ONCE samples, `of` a step: pure.

    Order and draws of so many at once cost 2 us a sample, of a batch of 128 12 us, all of it under the interpreter's
    lock, beside which raw records are copied at 15.
    """
    while first < last:
        end = min(last, first + max(1, AT_ONCE // of), (first // steps_per_epoch + 1) * steps_per_epoch)
        yield range(first, end)
        first = end


def has_single_samples(config: Config, order: Order, *, rank: int, world: int) -> bool:
    """Whether some forward of a run holds just one sample: pure. Of a contiguously assigned one the answer is for all
    ranks; with owner assignment the parts differ from step to step, and all steps of this rank are looked at."""
    if config.data.assignment == "owner":
        steps = order.steps_per_epoch
        return any(_has_single(np.diff(order.parts(range(epoch * steps, (epoch + 1) * steps), rank=rank, world=world,
                                                   assignment="owner")[1]), config.micro_batch)
                   for epoch in range(config.epochs))
    counts = {order.plan(step).count for step in (0, order.steps_per_epoch - 1)}
    parts = {part for count in counts for part in (count // world, -(-count // world))}
    return _has_single(np.array([*parts]), config.micro_batch)


def _has_single(parts: I64, micro_batch: int) -> bool:
    """Whether some of a rank's parts of a step, in samples, are cut so that one is left alone."""
    return bool(((parts > 0) & ((parts % micro_batch == 1) | (micro_batch == 1))).any())


def largest_part(config: Config, *, world: int) -> int:
    """The most samples one micro-batch of a rank can hold."""
    whole = config.global_batch if config.data.assignment == "owner" else -(-config.global_batch // world)
    return min(config.micro_batch, whole)


def most_rows(config: Config, *, world: int) -> int:
    """The most images one micro-batch of a rank can hold, guests included: what a slot must have room for."""
    own = largest_part(config, world=world)
    if not mixes(config.augment):
        return own
    return own + most_guests(own, assignment=config.data.assignment, global_batch=config.global_batch)
