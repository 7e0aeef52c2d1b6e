"""What a net computes on its way: the output of any of its modules, read while it works."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alexnet_ddp.errors import UserError
from alexnet_ddp.trained.graph import refuse_graph

SHOWN = 12  # names that a message lists


@dataclass(frozen=True)
class Layer:
    """What of a net is read: the output of `module` (its name in the net), or its input. `name`: as asked for."""

    name: str
    module: str
    side: Literal["input", "output"] = "output"

    @property
    def told(self) -> str:
        return self.name if self.name == self.module else f"{self.name} ({self.side} of {self.module})"


def find_layer(net: nn.Module, name: str) -> Layer:
    """The layer that `name` means: a module's own name, or what the literature calls it.

    Of the AlexNets (and torchvision's VGGs, whose classifiers are alike) `avgpool` is what the classifier is given,
    the flattened output of the convolutions; `fc6` and `fc7` are the hidden fully connected layers after their ReLU, as
    transfer learning uses them (Donahue et al. 2014, DeCAF, section 2; Razavian et al. 2014). The linear outputs before
    it are `classifier.1` and `classifier.4` (alexnet_paper: 0 and 3). Raises UserError that lists what is near, and for
    exported nets.
    """
    refuse_graph(net, where=f"--layer {name}", done="read")
    named = _aliases(net)
    if name in named:
        return named[name]
    modules = [module for module, _ in net.named_modules() if module]
    if name in modules:
        return Layer(name, name)
    leaves = [module for module, child in net.named_modules() if module and not list(child.children())]
    near = difflib.get_close_matches(name, [*named, *modules], n=3, cutoff=0.5)
    there = list(dict.fromkeys([*named, *near, *leaves]))
    more = "" if len(there) <= SHOWN else f" and {len(there) - SHOWN} more"
    raise UserError(f"--layer: this net has no '{name}'." + (f" Did you mean {' or '.join(near)}?" if near else "") +
                    f" There are: {', '.join(there[:SHOWN])}{more}; any module's name will do.")


def _aliases(net: nn.Module) -> dict[str, Layer]:
    """The literature's names for the layers of nets that end in fully connected ones called `classifier`."""
    classifier = getattr(net, "classifier", None)
    if not isinstance(classifier, nn.Sequential):
        return {}
    children = list(classifier.named_children())
    linear = [place for place, (_, child) in enumerate(children) if isinstance(child, nn.Linear)]
    if len(linear) != 3 or not all(isinstance(children[place + 1][1], nn.ReLU) for place in linear[:2]):
        return {}
    return {"avgpool": Layer("avgpool", "classifier", "input"),
            **{alias: Layer(alias, f"classifier.{children[place + 1][0]}")
               for alias, place in zip(("fc6", "fc7"), linear, strict=False)}}


class Tap:
    """Reads a layer while the net computes:

        with Tap(net, layer) as tap:
            features = tap(pixels)  # float32 [n, d], flattened in the order channel, row, column

    What is read is copied at once: the module that comes next may compute in place (a ReLU does). Raises UserError for
    a module that runs no times or several in a pass, or whose output isn't one tensor with a row per image.
    """

    def __init__(self, net: nn.Module, layer: Layer) -> None:
        self._net, self._layer, self._taken = net, layer, []  # type: tuple[nn.Module, Layer, list[Tensor]]
        module = net.get_submodule(layer.module)
        self._hook = (module.register_forward_pre_hook(lambda _, given: self._take(given[0]))
                      if layer.side == "input" else
                      module.register_forward_hook(lambda _, given, made: self._take(made)))

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._hook.remove()

    def _take(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.ndim < 2:
            what = f"a {type(value).__name__}" if not isinstance(value, Tensor) else f"a tensor of {value.ndim} axes"
            raise UserError(f"--layer {self._layer.name}: {self._layer.module} gives {what}, not one tensor with a row "
                            "for each image. Name a module within it, or behind it.")
        self._taken.append(value.detach().flatten(1).to(torch.float32).clone(memory_format=torch.contiguous_format))

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        self._taken.clear()
        self._net(pixels)
        if len(self._taken) != 1 or len(self._taken[0]) != len(pixels):
            found = (f"runs {len(self._taken)} times in a pass" if len(self._taken) != 1 else
                     f"gives {len(self._taken[0])} rows for {len(pixels)} images")
            raise UserError(f"--layer {self._layer.name}: {self._layer.module} {found}; features need a module that "
                            "runs once and gives a row for each image. Name the module around it, or another.")
        return self._taken.pop()
