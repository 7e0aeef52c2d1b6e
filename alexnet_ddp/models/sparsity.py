"""Weights that are zero: which layers can have them, how many there are, and how they stay zero in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from alexnet_ddp.errors import UserError

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@dataclass(frozen=True)
class Sparsity:
    """Zeros among the weights of a layer; biases and normalisations are no part of it."""

    name: str
    zeros: int
    weights: int

    @property
    def share(self) -> float:
        return self.zeros / self.weights


def layers(net: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The convolutional and linear layers by name."""
    yield from ((name, module) for name, module in net.named_modules() if isinstance(module, Layer))


def sparsity(net: nn.Module) -> list[Sparsity]:
    """Of each layer, in the net's order. Waits for the device."""
    return [Sparsity(name, int((module.weight == 0).sum()), module.weight.numel()) for name, module in layers(net)]


def overall(found: list[Sparsity]) -> Sparsity:
    """Of all layers together."""
    return Sparsity("all", sum(each.zeros for each in found), sum(each.weights for each in found))


def keep_zeros(net: nn.Module) -> None:
    """From now on a weight that is zero gets no gradient (for the net's training, before DDP wraps it).

    Its momentum, AdamW's moments and weight decay are zero then too, so that it stays zero to the bit. The rule looks
    at the weights as they are and at nothing else: there is no mask to save, and a run that is resumed, on any number
    of ranks, goes by the same one. Frozen layers have no gradient at all.
    """
    for _, module in layers(net):
        weight = module.weight
        if weight.requires_grad:
            weight.register_hook(lambda gradient, weight=weight: torch.where(weight == 0, 0.0, gradient))


def told(net: nn.Module) -> str:
    """For people, of a run that begins. Raises UserError where a layer would never learn."""
    found = sparsity(net)
    frozen = {name for name, module in layers(net) if not any(each.requires_grad for each in module.parameters())}
    if dead := [each.name for each in found if each.zeros == each.weights and each.name not in frozen]:
        raise UserError(f"sparsity=keep would leave {', '.join(dead)} at zero for ever: no weight in it is another "
                        "number. Prune less, or use sparsity=free.")
    whole = overall(found)
    return f"sparsity: {whole.zeros:,} of {whole.weights:,} weights are zero ({whole.share:.1%}) and stay it"
