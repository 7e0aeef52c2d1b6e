"""Damaged images under `data.on_error: skip`: left out of a step, counted, written down, and bounded.

A damaged image keeps its place in its global batch and weighs nothing there: the loss is still divided by the planned
size of the batch, so that the update is the same on any number of ranks and for any micro-batch. To the net it is the
mean image (zeros after normalisation), which only batch norm's statistics see; with mixup or CutMix nothing is blended
with it. In an evaluation it counts as wrong.

Ranks tell rank 0 what they met when it logs and before it saves, never in a step. RUN/damaged.jsonl names each image
once, with the step in which it was met first; like metrics.jsonl it is cut back to what a checkpoint has seen, so that
nothing of it is per rank and the count is that of a run which never stopped. Lines of data that the run no longer uses
(another data.val) are taken out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from alexnet_ddp import sinks
from alexnet_ddp.data.index import Index
from alexnet_ddp.data.loader import Batch
from alexnet_ddp.data.mixing import mix
from alexnet_ddp.data.training import Data
from alexnet_ddp.distributed import World
from alexnet_ddp.errors import UserError
from alexnet_ddp.loss import Targets
from alexnet_ddp.sections import DataSection

Kind = Literal["train", "evaluate"]  # of data, as metric records have it
FIELDS: dict[Kind, str] = {"train": "data.train", "evaluate": "data.val"}
FILE = "damaged.jsonl"
NAMED = 3  # images that a message names; the file has them all


def made(batch: Batch, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Targets]:
    """A batch's own images as they are trained on, from the augmented ones [n, c, s, s]: blended, less the damaged."""
    if not batch.reasons:
        return mix(pixels, labels, batch.work.mixing)
    pixels, targets = mix(pixels, labels, batch.work.mixing, damaged=batch.damaged)
    return left_out(pixels, targets, damaged=batch.damaged[batch.work.own])


def left_out(pixels: Tensor, targets: Targets, *, damaged: NDArray[np.bool_]) -> tuple[Tensor, Targets]:
    """A micro-batch [n, c, h, w] in which the damaged rows [n] are the mean image and have no weight."""
    counts = torch.from_numpy(~damaged).to(pixels.device, non_blocking=True)
    return (torch.where(counts.view(-1, 1, 1, 1), pixels, 0.0),
            replace(targets, weights=counts.to(torch.float32)))


@dataclass(frozen=True)
class Met:
    """A damaged image that a rank met, in the step (or the evaluation after it) that is number `step` from 1."""

    kind: Kind
    sample: int
    step: int
    reason: str


class DamagedFile:
    """RUN/damaged.jsonl: each damaged image once. Rank 0 only."""

    def __init__(self, path: Path, *, step: int, evaluated_step: int, indexes: Mapping[Kind, Index]) -> None:
        """Keeps what a checkpoint of `step`, last evaluated at `evaluated_step`, has seen of the data in `indexes`.

        Raises OSError.
        """
        self._indexes = indexes
        self._file = sinks.MetricsFile(path, step=step, evaluated_step=evaluated_step, belongs=self._belongs)
        self._known = {(record["kind"], record["sample"]): record for record in self._file.records}

    def _belongs(self, record: dict[str, Any]) -> bool:
        """Whether a line is whole, and of an image that the run still uses. One of a kind of data that isn't there now
        waits for it to come back."""
        words = all(isinstance(record.get(name), str) for name in ("name", "file", "reason"))
        if record["kind"] not in FIELDS or type(record.get("sample")) is not int or not words:
            return False
        index = self._indexes.get(record["kind"])
        if index is None:
            return True
        if "identity" in record:
            return bool(record["identity"] == index.identity)
        # older versions wrote no identity
        return 0 <= record["sample"] < len(index) and record["name"] == index.name(record["sample"])

    def count(self, kind: Kind) -> int:
        return sum(known == kind for known, _ in self._known)

    def add(self, met: Iterable[Met], *, attempt: int) -> list[dict[str, Any]]:
        """Writes those that are new, durably, and returns their records."""
        new = []
        for one in sorted(met, key=lambda one: (one.step, one.kind, one.sample)):
            if (one.kind, one.sample) in self._known:
                continue
            index = self._indexes[one.kind]
            file, offset = index.place(one.sample)
            record = {"kind": one.kind, "step": one.step, "sample": one.sample, "name": index.name(one.sample),
                      "file": file, "offset": offset, "reason": one.reason, "identity": index.identity,
                      "attempt": attempt, "time": sinks.now()}
            self._known[one.kind, one.sample] = record
            self._file.write(record)
            new.append(record)
        if new:
            self._file.flush(durable=True)
        return new

    def named(self, kind: Kind) -> str:
        """The first few and how many more, for messages."""
        records = [record for (known, _), record in self._known.items() if known == kind]
        more = f"\n  and {len(records) - NAMED:,} more" if len(records) > NAMED else ""
        return "\n".join(f"  {place_of(record)}: {record['reason']}" for record in records[:NAMED]) + more


class Damage:
    """What is damaged in the data of a run; on every rank, in one attempt."""

    def __init__(self, section: DataSection, *, data: Data, world: World, run_dir: Path, place: dict[str, Any],
                 attempt: int, say: Callable[[str], None]) -> None:
        """`place`: the plain fields of the state that the attempt begins with; `say` is told on rank 0.

        Raises UserError when the run directory can't be written.
        """
        self._section, self._world, self._attempt, self._say = section, world, attempt, say
        self._indexes: dict[Kind, Index] = {"train": data.train}
        self._samples: dict[Kind, int] = {"train": data.order.samples}
        if data.val is not None:
            self._indexes["evaluate"], self._samples["evaluate"] = data.val, len(data.val)
        self._met: list[Met] = []
        self._path, self._file = run_dir / FILE, None  # type: tuple[Path, DamagedFile | None]
        self._counted = place["damaged"]  # by the checkpoint, though the file may have lost them
        self.counts: dict[Kind, int] = {"train": place["damaged"], "evaluate": 0}  # so far; right on rank 0
        if section.on_error == "skip" and world.rank == 0:
            self._open(place)

    def _open(self, place: dict[str, Any]) -> None:
        try:
            self._file = DamagedFile(self._path, step=place["step"], evaluated_step=place["evaluated_step"] or 0,
                                     indexes=self._indexes)
        except OSError as error:
            raise UserError(f"{self._path} can't be written: {error.strerror or error}. Choose another run directory "
                            "with runs=...") from None
        lost = place["damaged"] - self._file.count("train")
        if lost > 0:
            self._say(f"{self._path} has lost {lost:,} of the {place['damaged']:,} damaged images that the checkpoint "
                      "counts; which of them are met again can't be told, so new ones may go uncounted")
        self._count()

    def _count(self) -> None:
        assert self._file is not None
        self.counts = {"train": max(self._counted, self._file.count("train")),
                       "evaluate": self._file.count("evaluate")}

    def meet(self, batch: Batch, *, kind: Kind, step: int) -> None:
        """Notes the damaged images of a batch that is used now, in step number `step` (from 1)."""
        own = batch.work.own.stop  # a guest is met where it is trained on
        self._met += [Met(kind, int(batch.work.samples[row]), step, why) for row, why in batch.reasons.items()
                      if row < own]

    def share(self) -> int:
        """Tells rank 0 what was met, and returns how many training images are damaged so far (there). Collective.

        Raises UserError on rank 0 when they are too many.
        """
        self._gather()
        if why := self._too_many("train"):
            raise UserError(why)
        return self.counts["train"]

    def share_evaluation(self) -> str:
        """Tells rank 0 what an evaluation has met, and returns why the run can't go on after it, "" where it can: the
        same on all ranks. Collective."""
        self._gather()
        said = [self._too_many("evaluate")]
        if self._section.on_error == "skip":
            dist.broadcast_object_list(said, src=0, group=self._world.control)
        return said[0]

    def _gather(self) -> None:
        if self._section.on_error == "fail":
            return
        mine, self._met = self._met, []
        told: list[Any] | None = [None] * self._world.size if self._world.rank == 0 else None
        dist.gather_object(mine, told, dst=0, group=self._world.control)
        if told is not None and self._file is not None:
            new = self._file.add([one for part in told for one in part], attempt=self._attempt)
            self._count()
            self._tell(new)

    def _tell(self, new: list[dict[str, Any]]) -> None:
        for record in new[:NAMED]:
            self._say(f"damaged image left out: {place_of(record)} (sample {record['sample']}): {record['reason']}")
        if len(new) > NAMED:
            self._say(f"... and {len(new) - NAMED:,} more; all of them: {self._path}")

    def _too_many(self, kind: Kind) -> str:
        """Why the run can't go on, in a sentence that fits the last line of a failure; the first images are told before
        it, a line each. "" where it can, and on other ranks than 0."""
        if self._file is None or kind not in self._samples:
            return ""
        count, samples = self.counts[kind], self._samples[kind]
        if count / samples <= self._section.max_damaged:
            return ""
        self._say(f"too many damaged images in {FIELDS[kind]}:\n{self._file.named(kind)}\n  all of them: {self._path}")
        return (f"{FIELDS[kind]}: {count:,} of {samples:,} images are damaged, more than data.max_damaged="
                f"{self._section.max_damaged:g} allows; {self._path} names them. Replace them under the same names, or "
                "raise data.max_damaged; the same command then goes on.")

    def summary(self) -> str:
        """How many were left out and where they are listed, for the end of a run; "" for none."""
        parts = [f"{count:,} in {FIELDS[kind]}" for kind, count in self.counts.items() if count]
        return f"damaged images left out: {' and '.join(parts)}; files and reasons: {self._path}" if parts else ""


def place_of(record: dict[str, Any]) -> str:
    """Where a damaged image lies, from its line of the file."""
    if record["offset"] is None:
        return str(record["file"])
    return f"{record['file']}: {record['name']} at offset {record['offset']}"
