"""Weights into a net of the same names and shapes, but for a last layer of other classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alexnet_ddp.changes import flatten
from alexnet_ddp.errors import UserError
from alexnet_ddp.models.weights import Weights

LISTED = 3  # names that a message lists


def put_into(net: nn.Module, weights: Weights, *, recipe: dict[str, Any] | None = None) -> list[str]:
    """Copies the weights into a net of the same names and shapes; returns the tensors that keep their fresh values.

    Those are the last layer's, where it has another number of classes. `recipe`: the net's own (a plain tree), for
    the message. Raises UserError, and leaves the net as it was, when anything else doesn't fit.
    """
    if weights.packed is not None and weights.packed.quantization is not None:
        raise UserError(f"{weights.where} holds a quantized net, whose weights are no floating-point numbers that "
                        "could be trained on. Use the net that it was made from.")
    live = net.state_dict()
    there = weights.tensors
    missing, foreign = sorted(live.keys() - there.keys()), sorted(there.keys() - live.keys())
    other = [name for name in live if name in there and live[name].shape != there[name].shape]
    head = last_layer(net)
    fresh = other if all(name in head and live[name].shape[1:] == there[name].shape[1:] for name in other) else []
    if missing or foreign or other != fresh:
        lines = [_listed("not there", missing), _listed("not in this net", foreign),
                 _listed("of another shape", [f"{name} ({list(there[name].shape)} there, {list(live[name].shape)} here)"
                                              for name in other])]
        raise UserError(f"The weights of {weights.where} don't fit this net:\n" + "".join(
            f"  {line}\n" for line in lines if line) + _way_out(weights.recipe, recipe))
    fresh = head if fresh else []  # a layer is fresh as a whole
    for name, tensor in live.items():
        if name not in fresh:
            _check_numbers(name, there[name], tensor, where=weights.where)
    with torch.no_grad():
        for name, tensor in live.items():
            if name not in fresh:
                tensor.copy_(there[name])
    return fresh


def _check_numbers(name: str, theirs: Tensor, ours: Tensor, *, where: str) -> None:
    """Raises UserError when a copy into a tensor of the net would lose more than precision."""
    if ours.is_floating_point() and not theirs.is_floating_point():  # complex, quantized: their parts would be lost
        raise UserError(f"The weights of {where} don't fit this net: {name} holds {theirs.dtype}, and the net's is "
                        f"{ours.dtype}. Save them as real floating-point numbers.")
    wider = ours.is_floating_point() and torch.finfo(theirs.dtype).max > torch.finfo(ours.dtype).max
    if wider and theirs.numel() and not torch.isfinite((largest := theirs.abs().max()).to(ours.dtype)):
        raise UserError(f"The weights of {where} don't fit this net: {name} holds numbers up to {largest.item():.3g}, "
                        f"beyond what {ours.dtype} can hold. Take weights of an earlier step.")


def last_layer(net: nn.Module) -> list[str]:
    """Names of the tensors of the layer that gives the logits: the one that is defined last, in all our nets."""
    parameters = [name for name, _ in net.named_parameters()]
    layer = parameters[-1].rpartition(".")[0]
    return [name for name in parameters if name.rpartition(".")[0] == layer]


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{what}: {', '.join(names[:LISTED])}{more}" if names else ""


def _way_out(theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    """The fields by which the two nets differ, where both recipes are known."""
    if theirs is None or ours is None:
        return "Use the net (model.*, and for alexnet_single augment.size) that they were trained with."
    wanted, have = flatten(theirs), flatten(ours)
    changes = [f"{path}={_word(wanted[path])} (here {_word(have.get(path))})" for path in wanted
               if (path.startswith("model.") or path == "augment.size") and path != "model.num_classes"
               and path != "model.dropout" and wanted[path] != have.get(path)]
    return "They were trained with " + (", ".join(changes) or "the same net") + "."


def _word(value: Any) -> str:
    return "null" if value is None else str(value)
