"""Photographs on their way through a trained net: fixed tiles of 32 consecutive samples, dealt to ranks.

As in training's own evaluation (alexnet_ddp.evaluate) a tile goes through the net alone and whole, padded where the
data end, so that what comes out doesn't hang on who computed it or on what was fetched with it.

    with open_source("/data/val", model) as source:
        for tile in tiles(model, source, world=world):
            probabilities = model.probabilities(tile.images)[tile.counts]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_ddp.cores import usable_cores
from alexnet_ddp.data.decoding import views
from alexnet_ddp.data.feed import slot_shape
from alexnet_ddp.data.index import Index, open_index
from alexnet_ddp.data.loader import Batch, Loader
from alexnet_ddp.data.records import Records, StoredRecords
from alexnet_ddp.data.transfer import Transfer
from alexnet_ddp.errors import UserError
from alexnet_ddp.evaluate import TILE, work, works
from alexnet_ddp.trained import classes
from alexnet_ddp.trained.model import Model

PREFETCH = 4  # fetches decoded ahead of the net


@dataclass
class Source:
    """Labelled photographs in any form that training takes. `labels` [samples]: by the net's classes."""

    index: Index
    labels: NDArray[np.int32]
    stored: str
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.index.close()


def open_source(place: str, model: Model, *, stored: str | None = None) -> Source:
    """The photographs at `place` (a folder, a tar, shards, a pack), their labels by the net's classes.

    `stored`: the stage they are brought to first; None: as the recipe trained on, but a pack as it is. Raises UserError
    where the classes aren't the net's.
    """
    index = open_index(place)
    try:
        wanted = stored or stage_of(index, model)
        if model.classes:
            return Source(index, classes.mapped(index.labels, of=index.classes, to=model.classes, source=place),
                          wanted)
        if len(index.classes) != model.num_classes:
            raise UserError(f"{place} has {len(index.classes)} classes, {model.where} tells {model.num_classes} apart "
                            "and doesn't say which. Name data with the classes that it was trained on.")
        return Source(index, index.labels, wanted, ["the net doesn't say what its classes are called: those of "
                                                    f"{place} are taken in their order"])
    except BaseException:
        index.close()
        raise


def stage_of(index: Index, model: Model) -> str:
    """The stage that photographs are brought to before the net sees them: as the recipe trained on, a pack as it is."""
    return model.config.data.stored if index.stage == "original" else index.stage


@dataclass
class Tile:
    """TILE samples in a row, on the net's device.

    images    uint8 [32, views, size, size, channels]; black where there is nothing to show
    labels    int64 [32]
    counts    bool [32]: inside the data; the rest is padding
    whole     bool [32]: counts, and could be decoded
    reasons   sample -> why it couldn't
    """

    first: int
    images: Tensor
    labels: Tensor
    counts: Tensor
    whole: Tensor
    reasons: dict[int, str]

    @property
    def samples(self) -> range:
        """Sample ids, padding's too."""
        return range(self.first, self.first + TILE)


def tiles(model: Model, source: Source, *, rank: int = 0, world: int = 1, crops: int = 1, batch: int = 4,
          threads: int | None = None, decoder: str | None = None, only: Iterable[range] | None = None
          ) -> Iterator[Tile]:
    """This rank's tiles, `batch` of them decoded at a time on `threads` (default: its cores), in order of samples.

    `only`: the tiles of these numbers instead (of tile, from 0), a range of at most `batch` at a time.
    Damaged images are told of in their tile, never raised. Raises Unreadable, and UserError where the decoder that the
    run was pinned to isn't here.
    """
    return tiles_of_records(model, StoredRecords(source.index, source.stored), source.labels, rank=rank, world=world,
                            crops=crops, batch=batch, threads=threads, decoder=decoder, only=only)


def tiles_of_records(model: Model, records: Records, labels: NDArray[np.int32], *, rank: int = 0, world: int = 1,
                     crops: int = 1, batch: int = 4, threads: int | None = None, decoder: str | None = None,
                     only: Iterable[range] | None = None) -> Iterator[Tile]:
    """`tiles` of any records; `labels` [records]."""
    choose, device = model.preprocessing.choose(crops=crops), model.device
    shown, size, channels = len(choose), model.preprocessing.size, model.preprocessing.channels
    is_raw = records.stage.kind == "raw"
    crop = "squash" if model.preprocessing.short is None else "center"
    # torchvision's nets have short sides of their own: then raw records are resized, so all of their rows are needed
    is_usual = model.preprocessing.short in (None, views.short_for(size))
    shape = slot_shape(records.stage, crop=crop, size=size, channels=channels, whole=not is_usual)
    transfer = Transfer(device, is_raw=is_raw, size=size, channels=channels)
    fetches = (works(len(labels), batch=batch, rank=rank, world=world, choose=choose) if only is None else
               (work(numbers, samples=len(labels), choose=choose) for numbers in only))
    with Loader(records, labels, model.preprocessing.decoder(decoder or model.config.data.decoder),
                rows=batch * TILE * shown, shape=shape, threads=threads or usable_cores(), prefetch=PREFETCH,
                pin=device.type == "cuda", on_error="skip") as loader:
        for fetched in loader.run(fetches):
            yield from _cut(fetched, transfer, shown=shown)


def _cut(fetched: Batch, transfer: Transfer, *, shown: int) -> Iterator[Tile]:
    """The tiles of one fetch."""
    counts, damaged = fetched.work.mask, fetched.damaged
    assert counts is not None
    samples, reasons, first = fetched.work.samples, fetched.reasons, fetched.work.step * TILE
    images, labels = transfer(fetched)
    device = images.device
    for at in range(0, len(images), TILE * shown):
        rows = slice(at, at + TILE * shown)
        inside = counts[rows][::shown]
        whole = inside & ~damaged[rows].reshape(TILE, shown).any(1)
        why = {int(samples[row]): reason for row, reason in reasons.items() if rows.start <= row < rows.stop}
        yield Tile(first + at // shown, images[rows].unflatten(0, (TILE, shown)), labels[rows][::shown],
                   torch.from_numpy(inside.copy()).to(device), torch.from_numpy(whole).to(device), why)
