"""An exported graph as a net: it takes any number of images, and its layers can't be asked, trained or changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alexnet_ddp.errors import UserError


@dataclass(frozen=True)
class Signature:
    """Of a graph: images [batch, channels, height, width] -> logits [batch, classes]; None is what may be any."""

    batch: int | None
    channels: int | None
    sides: tuple[int | None, int | None]
    classes: int | None


class ExportedNet(nn.Module):
    """Runs an exported graph as a net that takes any number of images, also where the graph's batch is fixed.

    float32 [n, channels, size, size] -> logits float32 [n, classes]. It has no training mode.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], *, signature: Signature, classes: int) -> None:
        super().__init__()
        self.run, self.signature, self.classes = run, signature, classes  # a module among them becomes a part of this

    def train(self, mode: bool = True) -> ExportedNet:
        self.training = mode  # and no further: a program of torch.export refuses to be asked
        return self

    def forward(self, images: Tensor) -> Tensor:
        batch = self.signature.batch
        images = images.contiguous()
        if not len(images):
            return images.new_zeros(0, self.classes, dtype=torch.float32)
        if batch is None:
            return self.run(images)
        missing = -len(images) % batch
        whole = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
        return torch.cat([self.run(part) for part in whole.split(batch)])[:len(images)]


def refuse_graph(net: nn.Module, *, where: str, done: str) -> None:
    """Raises UserError for an exported net, whose layers can't be `done` (read, quantized, pruned)."""
    if isinstance(net, ExportedNet):
        raise UserError(f"{where}: an exported net is one graph, whose layers can't be {done}. Name the run or the "
                        "weights that it was exported from.")
