"""Activation checkpointing: what a block computes is not kept for backward but computed again in it.

Chen et al. (2016), "Training Deep Nets with Sublinear Memory Cost": of a block its input is kept, nothing within.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from alexnet_ddp.errors import UserError

# Where nets have their blocks: ours and most of torchvision's; its ResNets; its vision transformers; its RegNets;
# its MNASNets; its ShuffleNets.
_PLACES = ("features", "layer1", "layer2", "layer3", "layer4", "encoder.layers", "trunk_output", "layers",
           "stage2", "stage3", "stage4")  # fmt: skip


class RecomputedBlocks(nn.Sequential):
    """A Sequential that keeps of each of its blocks nothing but the input between forward and backward.

    Blocks are the children that have layers of their own; of a Sequential of bare layers, what stands up to each pool.
    Values and gradients are those of the plain Sequential, to the bit where its kernels repeat their bits: torch's
    dropout draws the same masks again, `KeyedDropout` does by itself, and batch normalisation counts a batch into its
    running statistics once.
    """

    def forward(self, x: Tensor) -> Tensor:
        for layers, is_block in _segments(list(self)):
            if is_block and torch.is_grad_enabled():
                contexts = functools.partial(_contexts, layers)
                x = checkpoint(_run, layers, x, use_reentrant=False, context_fn=contexts)
            else:
                x = _run(layers, x)
        return x


def recompute_blocks(net: nn.Module, *, name: str) -> None:
    """Has `net` recompute its blocks, in place; names in its state dict stay. Raises UserError where it has none."""
    found = 0
    for place in _PLACES:
        parent_path, _, child = place.rpartition(".")
        parent = net.get_submodule(parent_path) if parent_path in dict(net.named_modules()) else None
        sequence = getattr(parent, child, None)
        if isinstance(sequence, nn.Sequential) and type(sequence).forward is nn.Sequential.forward:
            blocks = RecomputedBlocks()
            for path, layer in sequence.named_children():
                blocks.add_module(path, layer)
            setattr(parent, child, blocks)
            found += 1
    if not found:
        raise UserError(
            f"memory.checkpoint=blocks needs a net that is a sequence of blocks; {name} has none that is known here.\n"
            "Use memory.checkpoint=none and a smaller micro_batch, which saves memory too and moves no sample."
        )


def _segments(layers: Sequence[nn.Module]) -> list[tuple[Sequence[nn.Module], bool]]:
    """The layers in order, in runs: (layers, whether they are a block)."""
    composed = [next(layer.children(), None) is not None for layer in layers]
    if any(composed):
        return [((layer,), is_block) for layer, is_block in zip(layers, composed, strict=True)]
    ends = [number + 1 for number, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    cuts = [0, *ends] if ends and ends[-1] == len(layers) else [0, *ends, len(layers)]
    return [(layers[a:b], True) for a, b in zip(cuts, cuts[1:], strict=False)]


def _run(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _contexts(
    layers: Sequence[nn.Module],
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """What surrounds the first computation of layers, and what the second."""
    return contextlib.nullcontext(), _no_statistics(layers)


@contextlib.contextmanager
def _no_statistics(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Batch normalisations within count into copies of their running statistics, which are then forgotten."""
    norms = [m for layer in layers for m in layer.modules() if isinstance(m, _BatchNorm)]
    counted = [(norm, dict(norm.named_buffers(recurse=False))) for norm in norms]
    try:
        for norm, buffers in counted:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())
        yield
    finally:
        for norm, buffers in counted:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
