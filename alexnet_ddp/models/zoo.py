"""Models by name, and what is inside one: layers, output sizes, parameters, multiply-accumulates."""

import difflib
import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alexnet_ddp.errors import UserError
from alexnet_ddp.models.alexnet import AlexNetBatchNorm, AlexNetPaper, AlexNetSingle, AlexNetTorchvision

_OURS = {net.name: net for net in (AlexNetPaper, AlexNetTorchvision, AlexNetSingle, AlexNetBatchNorm)}
OURS = tuple(_OURS)
TORCHVISION = "torchvision:"
OPTIONS = ("num_classes", "in_channels", "width", "dropout", "lrn_after")  # of create_model, as model.* in a recipe

# What model.lrn_after may be for the others than alexnet_single: its default, which is not asked for, or the truth.
_LRN_AFTER = {"alexnet_paper": ((1, 2),)}
_NO_LRN = ((1, 2), ())

# Nets with auxiliary heads return a tuple in training; without the heads all nets are trained and evaluated
# alike.
_TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def names() -> list[str]:
    """Every name that `create_model` takes."""
    theirs = torchvision.models.list_models(module=torchvision.models)
    return [*OURS, *(TORCHVISION + name for name in theirs)]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    image_size: int = 224,
    lrn_after: Collection[int] = (1, 2),
) -> nn.Module:
    """A net with fresh weights from torch's generator, on torch's default device, in training mode.

    name: one of `OURS` or `torchvision:NAME`. width multiplies every channel and
    hidden unit count (to a multiple of 8); dropout is a probability; image_size is in pixels; lrn_after
    lists the blocks of alexnet_single with local response normalisation. torchvision's own nets take
    num_classes and image_size alone. Maps [batch, in_channels, image_size, image_size] to logits [batch,
    num_classes].

    Raises UserError for an unknown name, a value out of range or an option that the net doesn't have.
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    for option, value in sizes.items():
        if value < 1:
            raise UserError(f"{option} is a positive number; got {value}")
    if not 0 < width < math.inf:
        raise UserError(f"width is a positive factor on every channel count; got {width}")
    foreign = [] if tuple(lrn_after) in _LRN_AFTER.get(name, _NO_LRN) else [f"lrn_after={list(lrn_after)}"]
    if name in OURS:
        own: dict[str, Any] = {"lrn_after": lrn_after} if name == "alexnet_single" else {}
        _refuse(name, [] if own else foreign)
        return _OURS[name](
            num_classes, in_channels=in_channels, width=width, dropout=dropout, image_size=image_size, **own
        )
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "`alexnet-ddp models` lists them all."
        raise UserError(f"no model is called {name!r}; {hint}")
    values = {"in_channels": (in_channels, 3), "width": (width, 1.0), "dropout": (dropout, 0.5)}
    changed = [f"{option}={value}" for option, (value, default) in values.items() if value != default]
    _refuse(name, changed + foreign)
    return _create_torchvision(name.removeprefix(TORCHVISION), num_classes=num_classes, image_size=image_size)


def _refuse(name: str, options: list[str]) -> None:
    if options:
        raise UserError(
            f"{name} has no such option: {', '.join(options)}.\n"
            "Leave it out, or use alexnet_single, which has all of them."
        )


def _create_torchvision(name: str, *, num_classes: int, image_size: int) -> nn.Module:
    options = dict(_TORCHVISION_OPTIONS.get(name, {}))
    if name.startswith("vit_"):
        options["image_size"] = image_size  # its position embedding has one row per patch
    try:
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
        _run_on_meta(model, image_size=image_size, in_channels=3)
    except NotImplementedError:
        raise  # what a device can't do says nothing about the size
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{TORCHVISION}{name} can't take images of {image_size} pixels: {reason}\n"
            "Use the size that it was made for, 224 for most of torchvision's nets."
        ) from error
    return model


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a net, for one sample.

    output: shape without the batch dimension, in torch's order (channels first); None for a layer that
    evaluation never calls by itself. parameters: its own, not its children's. macs: multiply-accumulates of
    matrix products, convolutions and attention, as torch's FLOP counter counts them (half its figure).
    """

    name: str
    kind: str
    output: tuple[int, ...] | None
    parameters: int
    macs: int


def describe(model: nn.Module, *, image_size: int, in_channels: int = 3) -> list[LayerInfo]:
    """The layers of `model` in order of definition, in evaluation mode, for one image (pixels).

    Runs on the meta device: it reads no weights, computes nothing and leaves the model as it was. The rows'
    parameters and MACs add up to the model's.
    """
    recorder = _Recorder(model)
    try:
        with recorder.counter:
            _run_on_meta(model, image_size=image_size, in_channels=in_channels)
    finally:
        recorder.close()
    return recorder.rows()


def show(name: str, *, image_size: int = 224, in_channels: int = 3, **options: Any) -> str:
    """The table that `alexnet-ddp models show NAME` prints; `options` are `create_model`'s."""
    with torch.device("cpu" if "regnet" in name else "meta"):  # RegNets compute their widths with tensors
        model = create_model(name, image_size=image_size, in_channels=in_channels, **options)
    layers = describe(model, image_size=image_size, in_channels=in_channels)
    rows = [("layer", "kind", "output", "parameters", "MACs")]
    for layer in layers:
        rows.append((layer.name, layer.kind, _size(layer.output), f"{layer.parameters:,}", f"{layer.macs:,}"))
    parameters, macs = sum(layer.parameters for layer in layers), sum(layer.macs for layer in layers)
    rows.append(("total", "", "", f"{parameters:,}", f"{macs:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    title = f"{name}, input {image_size}x{image_size}x{in_channels}; outputs as height x width x channels"
    return "\n".join([title, "", lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _size(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "-"
    return "x".join(map(str, (*shape[1:], shape[0]) if len(shape) == 3 else shape))


def _run_on_meta(model: nn.Module, *, image_size: int, in_channels: int) -> None:
    """One evaluation forward of one image without memory or arithmetic; the model is left as it was."""
    tensors = {name: t.to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        image = torch.empty(1, in_channels, image_size, image_size, device="meta")
        torch.func.functional_call(model, tensors, (image,))
    finally:
        for module, training in modes:
            module.training = training


class _Recorder:
    """Forward hooks that note output shapes, and share the FLOP counter's total out among the layers.

    A layer is a module without children or with parameters of its own; what is computed inside it but
    outside its inner layers is its own. What no layer claims falls to the whole model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.counter = FlopCounterMode(display=False)
        self.outputs: dict[nn.Module, tuple[int, ...]] = {}
        self.flops: defaultdict[nn.Module, int] = defaultdict(int)
        self.credited = 0
        self.open: list[nn.Module] = []  # the layers being run, outermost first
        self.handles = []
        for module in model.modules():
            if module is model or self.is_layer(module):
                self.handles += [
                    module.register_forward_pre_hook(self.enter),
                    module.register_forward_hook(self.leave),
                ]

    @staticmethod
    def is_layer(module: nn.Module) -> bool:
        return not any(module.children()) or any(True for _ in module.parameters(recurse=False))

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self.credit()
        self.open.append(module)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.credit()
        self.open.pop()
        first = output if isinstance(output, Tensor) else output[0]
        self.outputs[module] = tuple(first.shape[1:])

    def credit(self) -> None:
        """What was counted since the last call belongs to the innermost layer being run."""
        total = self.counter.get_total_flops()
        if self.open:
            self.flops[self.open[-1]] += total - self.credited
        self.credited = total

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def rows(self) -> list[LayerInfo]:
        seen: set[nn.Parameter] = set()
        rows = []
        for name, module in self.model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p not in seen]
            seen.update(own)
            parameters, macs = sum(p.numel() for p in own), self.flops[module] // 2
            if self.is_layer(module) or macs:
                output = self.outputs.get(module)
                rows.append(LayerInfo(name or "(whole)", type(module).__name__, output, parameters, macs))
        return rows
