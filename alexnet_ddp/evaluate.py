"""Exact evaluation: every sample counted once, the same integers on any number of ranks and for any `batch`.

Samples are cut into fixed tiles of 32 consecutive ids; the last tile is padded and masked. A tile always goes
through the net alone, whole and in fp32, so its logits don't depend on who computes it or on what is fetched with
it. Sums over tiles are made in the order of the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.decoding import views
from alexnet_ddp.data.decoding.views import ChooseView, View
from alexnet_ddp.data.loader import Batch, Loader, Work
from alexnet_ddp.data.transfer import Transfer
from alexnet_ddp.distributed import World
from alexnet_ddp.sections import AugmentSection, EvaluateSection

TILE = 32  # samples


@dataclass(frozen=True)
class Evaluation:
    """Counts over the whole validation set; top-k are samples whose label is among the k highest logits."""

    samples: int
    correct1: int
    correct5: int
    loss: float  # mean cross-entropy of the images that aren't damaged, natural logarithm
    damaged: int = 0  # images of `samples`, all of them wrong

    @property
    def top1(self) -> float:
        return self.correct1 / self.samples

    @property
    def top5(self) -> float:
        return self.correct5 / self.samples


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Place of each label among its logits (0 = highest): int64 [n]. A tie goes to the lower class index.

    A row with a NaN ranks its label beyond any k, also with fewer than k classes: a broken net is never right.
    """
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    broken = torch.isnan(logits).any(1)
    return torch.where(broken, torch.iinfo(torch.int64).max, ahead.sum(1))


def tiles_of(samples: int) -> int:
    return -(-samples // TILE)


def works(samples: int, *, batch: int, rank: int, world: int, choose: Sequence[ChooseView]) -> Iterator[Work]:
    """This rank's fetches: `batch` tiles each, an equal number on every rank (the last ones may be empty).

    Each sample has a row for each view of `choose`, one after the other.
    """
    fetches = -(-tiles_of(samples) // batch)
    for turn in range(-(-fetches // world)):
        fetch = turn * world + rank
        yield work(range(fetch * batch, (fetch + 1) * batch), samples=samples, choose=choose)


def work(numbers: range, *, samples: int, choose: Sequence[ChooseView]) -> Work:
    """A fetch of the tiles of these numbers, in a row; those beyond the data are left out."""
    shown = len(choose)
    first, last = (min(number, tiles_of(samples)) for number in (numbers.start, numbers.stop))
    ids = np.arange(first * TILE, last * TILE, dtype=np.int64)
    inside = np.repeat(ids < samples, shown)
    return Work(step=first, micro=0, micros=1, samples=np.where(inside, np.repeat(ids, shown), 0),
                choose=lambda row: choose[row % shown], mask=inside)


def evaluates_squashed(section: EvaluateSection, augment: AugmentSection) -> bool:
    """Whether whole images are squashed to a square, rather than their centre cut out."""
    return section.crop == "squash" or (section.crop == "auto" and augment.crop == "squash")


def view_of(section: EvaluateSection, augment: AugmentSection) -> ChooseView:
    """The deterministic view of an image that is evaluated."""
    kind = views.squash if evaluates_squashed(section, augment) else views.center

    def choose(width: int, height: int) -> View:
        return kind(width, height, size=augment.size)

    return choose


def evaluate(net: nn.Module, loader: Loader, *, samples: int, batch: int, choose: ChooseView, augment: Augment,
             world: World, transfer: Transfer, carry_on: Callable[[], bool], tick: Callable[[str], None],
             weights: Sequence[Mapping[str, Tensor]] = ({},),
             meet: Callable[[Batch], None] = lambda batch: None) -> list[Evaluation] | None:
    """Evaluates the unwrapped net on all `samples` samples. Collective; None when stopped in between.

    There is one Evaluation for each of `weights`: tensors by name that stand in for the net's own ({}: none does). An
    image is decoded once for all of them. `carry_on` is asked once per fetch on every rank and answers the same on all
    of them; `tick` hears of every tile, and of the end of this rank's part; `meet` of each fetch with damaged images.
    """
    modes = [(module, module.training) for module in net.modules()]  # of a frozen batch norm: evaluation, for good
    net.eval()
    loss_of_tile = torch.zeros(len(weights), tiles_of(samples), dtype=torch.float64, device=world.device)
    counts = torch.zeros(len(weights), 4, dtype=torch.int64, device=world.device)  # samples, whole, top-1, top-5
    try:
        for buffer in net.buffers():  # batch-norm statistics are per rank: rank 0's are the run's
            dist.broadcast(buffer, src=0)
        with torch.no_grad():
            for fetched in loader.run(works(samples, batch=batch, rank=world.rank, world=world.size, choose=[choose])):
                if not carry_on():
                    return None
                if fetched.reasons:
                    meet(fetched)
                images, labels = transfer(fetched)
                mask = torch.from_numpy(fetched.work.mask).to(world.device, non_blocking=True)
                whole = mask & torch.from_numpy(~fetched.damaged).to(world.device, non_blocking=True)
                for at in range(0, len(images), TILE):
                    tick("evaluate")
                    tile = slice(at, at + TILE)
                    pixels = augment(images[tile], None)
                    for place, instead in enumerate(weights):
                        logits = torch.func.functional_call(net, dict(instead), (pixels,)).float()
                        losses = F.cross_entropy(logits, labels[tile], reduction="none").double()
                        loss = torch.where(whole[tile], losses, 0.0).sum()
                        loss_of_tile[place, fetched.work.step + at // TILE] = loss
                        ranks = label_ranks(logits, labels[tile])
                        counts[place] += torch.stack([
                            mask[tile].sum(), whole[tile].sum(), ((ranks < 1) & whole[tile]).sum(),
                            ((ranks < 5) & whole[tile]).sum()])
        tick("gather")
        dist.all_reduce(counts)
        dist.all_reduce(loss_of_tile)  # every tile has one owner; the others add zeros
    finally:
        for module, training in modes:
            module.training = training
    found = []
    for (counted, read, correct1, correct5), losses_of_tiles in zip(counts.tolist(), loss_of_tile.tolist(),
                                                                    strict=True):
        assert counted == samples, f"{counted} samples were counted, there are {samples}"
        summed = 0.0
        for tile_loss in losses_of_tiles:
            summed += tile_loss
        found.append(Evaluation(samples, correct1, correct5, summed / max(1, read), samples - read))
    return found


def record_of(net: Evaluation, mean: Evaluation | None = None) -> dict[str, Any]:
    """What metrics.jsonl is told of an evaluation; that of the running mean of the weights as `ema_...`."""
    numbers = {**asdict(net), "top1": net.top1, "top5": net.top5}
    if mean is None:
        return numbers
    of_images = ("samples", "damaged")  # the same for both
    return {**numbers, **{f"ema_{name}": value for name, value in record_of(mean).items() if name not in of_images}}
