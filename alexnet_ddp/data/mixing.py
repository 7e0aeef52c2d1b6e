"""Mixup and CutMix over the global batch, whoever holds its samples.

The sample at place i of a step's batch is blended with the one at place i - 1 (the first with the last), as torchvision
rolls its batches by one; the share and CutMix's box are drawn once a step, from (seed, step). So they depend on neither
ranks nor micro-batches. Of a micro-batch whose partners lie elsewhere the missing ones come along as guests: they are
augmented as in their own place, and take part in nothing but the blend.

Zhang et al. 2018, mixup: Beyond Empirical Risk Minimization, equation 1; Yun et al. 2019, CutMix, equations 1 and 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_ddp.data.randomness import key, uniform
from alexnet_ddp.loss import Targets
from alexnet_ddp.sections import AugmentSection

I64 = NDArray[np.int64]

SHARES = 2**20  # a share is a multiple of 1 / SHARES: float32 holds it, and versions of scipy agree on it


@dataclass(frozen=True)
class Mixing:
    """How the images of a step are blended, and the partners of one micro-batch's."""

    share: float  # of an image's own label; the partner's has the rest
    box: tuple[int, int, int, int] | None  # CutMix: left, top, right, bottom, in which the partner is seen; mixup: None
    # [own]: row of each own image's partner, among own images and guests
    partners: I64 = field(default_factory=lambda: np.zeros(0, np.int64))

    def told(self, samples: I64) -> dict[str, Any]:
        """For a trace: the same in plain words, of a micro-batch with these samples and guests."""
        told: dict[str, Any] = {"partners": samples[self.partners].tolist(), "share": self.share}
        return told if self.box is None else told | {"box": list(self.box)}


def mixes(section: AugmentSection) -> bool:
    """Whether images of a step are blended at all."""
    return section.mixup > 0 or section.cutmix > 0


def draw_mixing(section: AugmentSection, *, seed: int, step: int) -> Mixing:
    """The share and box of a step, a pure function of seed and step; with both in use each has an even chance."""
    of_both = section.mixup > 0 and section.cutmix > 0
    cuts = section.cutmix > 0 and (not of_both or uniform(key(seed, step, "mixup or cutmix"), 1)[0] >= 0.5)
    if not cuts:
        return Mixing(beta(float(uniform(key(seed, step, "mixup"), 1)[0]), section.mixup), None)
    chance, across, down = uniform(key(seed, step, "cutmix"), 3).tolist()
    box = cutmix_box(beta(chance, section.cutmix), across, down, size=section.size)
    left, top, right, bottom = box
    return Mixing(1.0 - (right - left) * (bottom - top) / section.size**2, box)


def beta(chance: float, alpha: float) -> float:
    """The Beta(alpha, alpha) variate of a uniform one, by its distribution's inverse, as a multiple of 1 / SHARES."""
    from scipy.special import betaincinv  # only runs that mix need it

    return round(float(betaincinv(alpha, alpha, chance)) * SHARES) / SHARES


def cutmix_box(share: float, across: float, down: float, *, size: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a box of about (1 - share) of the image about a uniform point, cut at its edges, by
    torchvision's formula; `across` and `down` are uniform in 0..1."""
    half = int(0.5 * math.sqrt(1.0 - share) * size)
    x, y = int(across * size), int(down * size)
    return max(0, x - half), max(0, y - half), min(size, x + half), min(size, y + half)


def partners_of(positions: I64, *, first: int, count: int) -> I64:
    """Positions in the epoch of the partners of some in a step that begins at `first` and has `count` samples."""
    return first + (positions - first - 1) % count


def with_guests(mixing: Mixing, positions: I64, *, first: int, count: int) -> tuple[Mixing, I64]:
    """The mixing with a micro-batch's partners, and the positions of its guests in the epoch (each once, ascending).

    `positions` are those of its own samples, ascending.
    """
    partners = partners_of(positions, first=first, count=count)
    guests = np.setdiff1d(partners, positions)
    there = np.concatenate([positions, guests])
    order = np.argsort(there, kind="stable")
    return replace(mixing, partners=order[np.searchsorted(there, partners, sorter=order)]), guests


def most_guests(rows: int, *, assignment: str, global_batch: int) -> int:
    """The most guests that a micro-batch of at most `rows` own samples can have."""
    if assignment == "contiguous":  # only the first one's partner lies elsewhere
        return min(1, max(0, global_batch - rows))
    return min(rows, max(0, global_batch - rows))


def mix(pixels: Tensor, labels: Tensor, mixing: Mixing | None, *, damaged: NDArray[np.bool_] | None = None
        ) -> tuple[Tensor, Targets]:
    """Pixels float32 [n, c, s, s] and labels [n] of own images and guests -> those of the own ones, blended.

    An image whose partner is `damaged` (bool [n]) is blended with itself. The arithmetic is torchvision's; nothing
    waits for the device.
    """
    if mixing is None:
        return pixels, Targets(labels)
    own = len(mixing.partners)
    rows = mixing.partners if damaged is None else np.where(damaged[mixing.partners], np.arange(own), mixing.partners)
    partners = torch.from_numpy(rows).to(pixels.device, non_blocking=True)
    if mixing.box is None:
        mixed = pixels[:own].mul(mixing.share)
        mixed.add_(pixels.index_select(0, partners).mul_(1.0 - mixing.share))
    else:
        left, top, right, bottom = mixing.box
        mixed = pixels[:own].clone()
        mixed[..., top:bottom, left:right] = pixels[..., top:bottom, left:right].index_select(0, partners)
    shares = torch.full((own,), mixing.share, dtype=torch.float32, device=pixels.device)
    return mixed, Targets(labels[:own], others=labels.index_select(0, partners), shares=shares)
