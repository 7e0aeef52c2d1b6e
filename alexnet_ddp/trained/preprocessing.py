"""What is done to a photograph before a trained net sees it: plain values that travel with the net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from alexnet_ddp.config import Config
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.decoding import views
from alexnet_ddp.data.decoding.decode import Decoder, create_decoder
from alexnet_ddp.data.decoding.resize import Quality
from alexnet_ddp.data.decoding.views import ChooseView, View
from alexnet_ddp.errors import UserError
from alexnet_ddp.evaluate import evaluates_squashed
from alexnet_ddp.sections import AugmentSection

Triple = tuple[float, float, float]
CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # (right, bottom): in the order of torchvision's FiveCrop


@dataclass(frozen=True)
class Preprocessing:
    """Upright photograph -> short side resized to `short`, its central square of `size` cut out (or, where `short` is
    None, the whole squashed to that square) -> values 0..1 -> (value - mean) / std. Sizes in pixels.
    """

    size: int
    short: int | None
    channels: int = 3
    resize: Quality = "antialias"
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)

    @classmethod
    def of(cls, config: Config) -> Preprocessing:
        """As the recipe's own evaluation has it."""
        augment = config.augment
        squashed = evaluates_squashed(config.evaluate, augment)
        return cls(size=augment.size, short=None if squashed else views.short_for(augment.size),
                   channels=config.model.in_channels, resize=augment.resize, mean=augment.mean, std=augment.std)

    @classmethod
    def from_plain(cls, told: dict[str, Any]) -> Preprocessing:
        """What `plain` gave. Raises TypeError, ValueError or KeyError for anything else."""
        mean, std = (tuple(map(float, told[name])) for name in ("mean", "std"))
        return cls(**{**told, "mean": mean, "std": std})

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def choose(self, *, crops: int = 1) -> list[ChooseView]:
        """The views that are averaged: one, or for the ten crops of the 2012 paper the five that are then mirrored.

        Krizhevsky et al. 2012, sections 2 and 4.1: of the central square of short side 256 the four corners and the
        centre, in the order of torchvision's FiveCrop; sizes other than 224 of 256 in proportion. Raises UserError
        for another number of crops, and for ten of a net that sees whole images squashed.
        """
        if crops == 1:
            return [self._view]
        if crops != 10:
            raise UserError(f"crops must be 1 (the centre) or 10 (corners and centre, mirrored too), got {crops}.")
        if self.short is None:
            raise UserError("Ten crops are cut from an image's central square, but this net sees whole images squashed "
                            "(evaluate.crop). Use crops=1, or evaluate.crop=center.")
        return [*(self._corner(right, bottom) for right, bottom in CORNERS), self._view]

    def _view(self, width: int, height: int) -> View:
        if self.short is None:
            return views.squash(width, height, size=self.size)
        return views.center(width, height, size=self.size, short=self.short)

    def _corner(self, right: int, bottom: int) -> ChooseView:
        def choose(width: int, height: int) -> View:
            assert self.short is not None
            square = views.center(width, height, size=self.short, short=self.short)
            rest = self.short - self.size
            return square._replace(x=square.x + right * rest, y=square.y + bottom * rest)

        return choose

    def augment(self, device: torch.device) -> Augment:
        """uint8 batches on a device -> what the net sees (call it with draws=None)."""
        section = AugmentSection(size=self.size, mean=self.mean, std=self.std)
        return Augment(section, channels=self.channels, device=device)

    def decoder(self, name: str = "auto") -> Decoder:
        """Raises UserError where that decoder isn't installed."""
        return create_decoder(name, quality=self.resize)

    def told(self) -> Sequence[str]:
        """For people: one line a step."""
        shown = (f"squashed to {self.size} x {self.size}" if self.short is None else
                 f"short side {self.short}, central {self.size} x {self.size}")
        return [f"{shown}, resize {self.resize}", f"mean {list(self.mean)}, std {list(self.std)}"]
