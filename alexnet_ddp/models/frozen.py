"""Parts of a net that don't learn."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from alexnet_ddp.errors import UserError

LISTED = 12  # names that a message lists


@dataclass(frozen=True)
class Frozen:
    """What is frozen."""

    names: tuple[str, ...] = ()  # as they were asked for
    parameters: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()  # batch norms whose statistics stand still
    size: int = 0  # numbers in the parameters
    of: int = 0  # numbers in all of the net's

    def notes(self, *, fresh: bool) -> list[str]:
        """Lines for people; `fresh`: the net has random weights."""
        if not self.parameters:
            return []
        norms = f", {len(self.norms)} batch norm{'s' * (len(self.norms) > 1)}" if self.norms else ""
        told = [f"frozen: {', '.join(self.names)} ({self.size:,} of {self.of:,} parameters{norms})"]
        if fresh:
            told.append("warning: freeze without init_from: what is frozen keeps the random weights it began with")
        return told


def freeze(net: nn.Module, names: Sequence[str]) -> Frozen:
    """Freezes all of the net (unwrapped, before DDP) that a name or the beginning of one names, as `features.block1`.

    A frozen parameter gets no gradient (`requires_grad` is False), so that neither the optimizer nor its weight decay
    nor the gradient's norm knows of it. A batch norm that is named, itself or by a part it lies in, is put in
    evaluation mode for good: it normalises by the statistics it came with, and they don't move. Dropout goes on in
    frozen parts: it has nothing to learn, and what comes after it was trained with it.

    Raises UserError when a name is of nothing that learns, or when nothing is left to learn.
    """
    for name in names:
        if not any(within(parameter, name) for parameter, _ in net.named_parameters()):
            raise UserError(_unknown(net, name))
    parameters = {name: parameter for name, parameter in net.named_parameters()
                  if any(within(name, part) for part in names)}
    if names and len(parameters) == len(list(net.parameters())):
        raise UserError(f"freeze={', '.join(names)} leaves nothing to learn. Leave out one of the net's parts: "
                        f"{', '.join(_parts(net)[:LISTED])}.")
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    norms = [(name, module) for name, module in net.named_modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(within(name, part) for part in names)]
    for _, module in norms:
        module.eval()
    return Frozen(tuple(names), tuple(parameters), tuple(name for name, _ in norms),
                  sum(parameter.numel() for parameter in parameters.values()),
                  sum(parameter.numel() for parameter in net.parameters()))


def within(name: str, part: str) -> bool:
    """Whether a tensor or module, by name, is a part of the net or lies in it."""
    return name == part or name.startswith(f"{part}.")


def _unknown(net: nn.Module, name: str) -> str:
    modules = [module for module, _ in net.named_modules() if module]
    if name in modules:
        kind = type(net.get_submodule(name)).__name__
        return f"freeze: '{name}' ({kind}) has nothing that learns. Name one of: {', '.join(_learning(net)[:LISTED])}."
    known = [*modules, *(parameter for parameter, _ in net.named_parameters())]
    inner = [each for each in known if name and each.endswith(f".{name}")]  # said without what it lies in
    near = inner or difflib.get_close_matches(name, known, n=1)
    return (f"freeze: the net has no part '{name}'. " + (f"Did you mean '{near[0]}'?" if near else
            f"Its parts are {', '.join(_parts(net)[:LISTED])}."))


def _parts(net: nn.Module) -> list[str]:
    """The net's parts of the highest level that learn."""
    return [name for name, module in net.named_children() if any(True for _ in module.parameters())]


def _learning(net: nn.Module) -> list[str]:
    """All modules with parameters of their own."""
    return [name for name, module in net.named_modules() if any(True for _ in module.parameters(recurse=False))]
