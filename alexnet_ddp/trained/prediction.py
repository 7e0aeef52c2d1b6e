"""What a trained net takes photographs for, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet_ddp.errors import UserError
from alexnet_ddp.trained.model import Model
from alexnet_ddp.trained.pictures import Pictures, find_pictures
from alexnet_ddp.trained.tiles import tiles_of_records

BATCH = 1  # tiles decoded at a time: the first answers come soon


@dataclass(frozen=True)
class Guess:
    """A class as the data call it, its name for people, and the probability that the net gives to it."""

    label: str
    name: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """What the picture at `where` is taken for, likeliest first; where it can't be told, `error` says why."""

    where: str
    guesses: tuple[Guess, ...]
    error: str | None = None


def classify(model: Model, places: Sequence[str] | Pictures, *, top: int = 5, crops: int = 1) -> Iterator[Answer]:
    """The `top` likeliest classes of every picture at `places` (see alexnet_ddp.trained.pictures), in their order.

    Fewer where the net has fewer classes. Of ten crops (Krizhevsky et al. 2012, section 4.1) the softmaxes are
    averaged. Raises UserError, before the first answer, for places without pictures and numbers that don't fit.
    """
    if top < 1:
        raise UserError(f"--top takes a number of classes above 0, got {top}.")
    model.preprocessing.choose(crops=crops)
    pictures = places if isinstance(places, Pictures) else find_pictures(places, stored=model.config.data.stored)
    return _answers(model, pictures, top=min(top, model.num_classes), crops=crops)


def _answers(model: Model, pictures: Pictures, *, top: int, crops: int) -> Iterator[Answer]:
    spoken = model.spoken
    labels = model.classes or tuple(spoken)
    for tile in tiles_of_records(model, pictures, np.zeros(len(pictures), np.int32), crops=crops, batch=BATCH):
        shares, numbers = model.probabilities(tile.images).cpu().sort(dim=1, descending=True, stable=True)
        shares, numbers = shares[:, :top], numbers[:, :top]  # of equals the lower class, as in an evaluation
        finite = torch.isfinite(shares).all(1)
        for row in range(min(len(shares), len(pictures) - tile.first)):
            sample = tile.first + row
            error = tile.reasons.get(sample) or (None if finite[row] else "the net's answer is not a number")
            guesses = () if error else tuple(
                Guess(labels[number], spoken[number], share)
                for number, share in zip(numbers[row].tolist(), shares[row].tolist(), strict=True))
            yield Answer(pictures.where(sample), guesses, error)


def views(model: Model, pictures: Pictures) -> list[NDArray[np.uint8]]:
    """What the net sees of the pictures: uint8 [size, size, channels] each, black for what can't be read."""
    seen: list[NDArray[np.uint8]] = []
    for tile in tiles_of_records(model, pictures, np.zeros(len(pictures), np.int32), batch=BATCH):
        seen += list(tile.images[:, 0].cpu().numpy())
    return seen[:len(pictures)]
