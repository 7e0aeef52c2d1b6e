"""What a trained net answers for every photograph of some data: exact, on any number of ranks.

    with open_source("/data/val", model) as source:
        outcomes = evaluate_model(model, source, crops=10)
    outcomes.evaluation.top1, outcomes.labels, outcomes.predictions, outcomes.losses

The tiles are those of training's own evaluation (alexnet_ddp.evaluate) and so are its rules: a tie goes to the lower
class index, a damaged image counts as wrong, and losses are added up tile by tile. So one crop of a run's best weights
gives the very counts that the run has logged. All figures come from the answers of single photographs, of which every
rank has those of all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from alexnet_ddp.distributed import World, everywhere
from alexnet_ddp.errors import UserError
from alexnet_ddp.evaluate import TILE, Evaluation, label_ranks, tiles_of
from alexnet_ddp.trained.model import Model
from alexnet_ddp.trained.tiles import Source, Tile, tiles

NONE = -1  # the class that a damaged image, or a net whose logits are not numbers, is taken for
WRONG = int(torch.iinfo(torch.int64).max)  # place of the label in an answer that isn't one
TOPS = (1, 5)


@dataclass(frozen=True)
class Outcomes:
    """The answers, by sample id; the same on every rank. n samples, c classes.

    labels       int64 [n], by the net's classes
    predictions  int64 [n]: the class with the highest logit (of ten crops: probability), NONE where there is none
    confidences  float64 [n]: the probability the net gives to that class; 0 where there is none
    ranks        int64 [n]: place of the label among the classes (0 = the net is right), WRONG where there is none
    losses       float64 [n]: cross-entropy (natural logarithm); 0 for damaged images, which no mean takes in
    reasons      sample -> why its image can't be decoded
    """

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    confidences: NDArray[np.float64]
    ranks: NDArray[np.int64]
    losses: NDArray[np.float64]
    reasons: dict[int, str]
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def evaluation(self) -> Evaluation:
        """Counts and mean loss over all of it."""
        correct1, correct5 = (int((self.ranks < top).sum()) for top in TOPS)
        return Evaluation(len(self), correct1, correct5, self._loss(), len(self.reasons))

    def _loss(self) -> float:
        """The mean of the images that aren't damaged; added up as training adds it, to the same bits."""
        padded = np.zeros(tiles_of(len(self)) * TILE)
        padded[:len(self)] = self.losses
        summed = 0.0
        for tile in torch.from_numpy(padded).split(TILE):
            summed += float(tile.sum())
        return summed / max(1, len(self) - len(self.reasons))

    def confusion(self) -> NDArray[np.int64]:
        """int64 [c, c]: how many samples of a class (row) are taken for a class (column). Those without an answer
        stand nowhere."""
        answered = self.predictions != NONE
        counts = np.zeros((self.classes, self.classes), np.int64)
        np.add.at(counts, (self.labels[answered], self.predictions[answered]), 1)
        return counts

    def per_class(self) -> dict[str, NDArray[np.int64]]:
        """By class, int64 [c]: `samples`, `correct1`, `correct5`, and the class it is most often `mistaken` for (NONE
        where it never is)."""
        found = {"samples": np.bincount(self.labels, minlength=self.classes)}
        for top in TOPS:
            found[f"correct{top}"] = np.bincount(self.labels[self.ranks < top], minlength=self.classes)
        wrong = self.confusion()
        np.fill_diagonal(wrong, 0)
        found["mistaken"] = np.where(wrong.any(1), wrong.argmax(1), NONE)
        return found


def evaluate_model(model: Model, source: Source, *, world: World | None = None, crops: int = 1,
                   batch: int | None = None, threads: int | None = None,
                   tick: Callable[[int], None] | None = None) -> Outcomes:
    """The net's answers for all of `source`; collective where there is a `world`: each rank takes its share of tiles.

    `crops`: 1, or the ten of Krizhevsky et al. 2012 (section 4.1), softmax averaged. `batch`: tiles decoded at a time,
    the recipe's by default; moves no result. `tick` hears how many samples more this rank is done with. Raises
    UserError on all ranks alike: for other crops, data that can't be read, or classes that aren't there.
    """
    rank, ranks = (world.rank, world.size) if world is not None else (0, 1)
    padded = tiles_of(len(source)) * TILE
    device = model.device
    whole = torch.zeros(2, padded, dtype=torch.float64, device=device)  # losses, confidences
    places = torch.zeros(2, padded, dtype=torch.int64, device=device)  # predictions, ranks

    def work() -> dict[int, str]:
        reasons: dict[int, str] = {}
        for tile in tiles(model, source, rank=rank, world=ranks, crops=crops, threads=threads,
                          batch=batch or model.config.evaluate.batch):
            rows = slice(tile.first, tile.first + TILE)
            places[:, rows], whole[:, rows] = _judge(model, tile)
            reasons.update(tile.reasons)
            if tick is not None:
                tick(min(TILE, max(0, len(source) - tile.first)))
        return reasons

    def told_at_once() -> dict[int, str]:
        try:
            return work()
        except UserError as mistake:  # the others may be at it for long, and end this by their patience
            if ranks > 1:
                print(f"alexnet-ddp: rank {rank}: {mistake}", file=sys.stderr, flush=True)
            raise

    reasons = work() if world is None else everywhere(world, told_at_once)
    counted, judged = places.cpu(), whole.cpu()
    if world is not None:
        for results in (counted, judged):  # every tile has one owner; the others add zeros
            dist.all_reduce(results, group=world.control)
        told: list[Any] = [None] * world.size
        dist.all_gather_object(told, reasons, group=world.control)
        reasons = dict(sorted(item for part in told for item in part.items()))
    predictions, order = counted[:, :len(source)].numpy()
    losses, confidences = judged[:, :len(source)].numpy()
    return Outcomes(source.labels.astype(np.int64), predictions, confidences, order, losses, reasons, model.num_classes)


@torch.no_grad()
def _judge(model: Model, tile: Tile) -> tuple[Tensor, Tensor]:
    """(predictions and ranks int64 [2, TILE], losses and confidences float64 [2, TILE]) of a tile."""
    if tile.images.shape[1] == 1:  # by the logits, as in training: their softmax may round two of them to one
        scores = model.logits(tile.images[:, 0])
        losses = F.cross_entropy(scores, tile.labels, reduction="none").double()
        shares = scores.softmax(1)
    else:
        scores = shares = model.probabilities(tile.images)
        # A share that is less than fp32 can hold costs what the smallest costs, not infinity.
        losses = -shares.gather(1, tile.labels[:, None])[:, 0].clamp_min(torch.finfo(shares.dtype).tiny).double().log()
    answered = tile.whole & ~torch.isnan(scores).any(1)
    best = scores.argmax(1)
    return (torch.stack([torch.where(answered, best, NONE),
                         torch.where(answered, label_ranks(scores, tile.labels), WRONG)]),
            torch.stack([torch.where(tile.whole, losses, 0.0),
                         torch.where(answered, shares.gather(1, best[:, None])[:, 0].double(), 0.0)]))
