"""Nets with int8 weights, by torchao: made from floating-point ones, written in plain tensors, made again from them.

    smaller = quantize(load_model("runs/alexnet_single"), scheme="int8-dynamic")
    smaller.save(Path("small.safetensors"))          # load_model("small.safetensors") opens it

What torchao quantizes are linear layers. Convolutions stay floating-point, as they silently do under the dynamic
quantization of PyTorch's older tutorials; `Layers` says which. In an AlexNet the linear layers hold nearly all weights
and the convolutions nearly all of the work.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.models.weights import Weights
from alexnet_ddp.trained.graph import refuse_graph
from alexnet_ddp.trained.model import Model, load_model

# int8-dynamic      weights int8, one scale a row (output); each forward rounds every sample's activations to int8, with
#                   a scale of its own, and multiplies in int32
# int8-weight-only  the same weights, multiplied as floating-point numbers: small on the disk, exact in the activations
SCHEMES = ("int8-dynamic", "int8-weight-only")


@dataclass(frozen=True)
class Layers:
    """What is int8 in a net and what isn't. Counts are of numbers; biases of quantized layers stay floating-point."""

    quantized: tuple[str, ...]
    floating: tuple[tuple[str, str, int], ...]  # name, kind, parameters of each other layer that has any
    int8: int  # parameters that are int8
    parameters: int  # all

    @property
    def share(self) -> float:
        return self.int8 / self.parameters


def quantize(model: Model, *, scheme: str) -> Model:
    """A copy of the model whose linear layers are quantized; the model itself stays as it is.

    Raises UserError for an unknown scheme, a net that is quantized already, an exported one, one without linear layers,
    and where torchao isn't installed.
    """
    torchao = load_torchao()
    if scheme not in SCHEMES:
        raise UserError(f"There is no scheme '{scheme}'. There are: {', '.join(SCHEMES)}.")
    if model.quantization is not None:
        raise UserError(f"{model.where} is quantized already ({model.quantization['scheme']}). Quantize the net that "
                        "it was made from.")
    refuse_graph(model.net, where=model.where, done="quantized")
    layers = _linear(model.net)
    if not layers:
        raise UserError(f"{model.name} has no linear layer, and torchao's int8 schemes quantize nothing else.")
    how = {"scheme": scheme, "layers": layers, "reduce_range": _reduces_range(model.device),
           "torchao": metadata.version("torchao")}
    net = copy.deepcopy(model.net)
    _quantize(torchao, net, how)
    facts = {"step": model.facts.get("step"), "top1": None, "model": model.name, "made_from": model.facts}
    return replace(model, net=net, quantization=how, facts=facts, notes=[], where=f"{model.where}, {scheme}")


def layers_of(net: nn.Module) -> Layers:
    """What is quantized in a net."""
    quantized, floating, int8 = [], [], 0
    for name, module in net.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Linear) and _is_quantized(module.weight):
            quantized.append(name)
            int8 += module.weight.numel()
        elif own:
            floating.append((name, type(module).__name__, sum(each.numel() for each in own.values())))
    return Layers(tuple(quantized), tuple(floating), int8, sum(each.numel() for each in net.parameters()))


def parts(net: nn.Module) -> dict[str, Tensor]:
    """A net's tensors by name, live; a quantized weight as int8 NAME.qdata, float32 NAME.scale and what else it has."""
    found = {}
    for name, tensor in net.state_dict().items():
        if not _is_quantized(tensor):
            found[name] = tensor
            continue
        for part in (*tensor.tensor_data_names, *tensor.optional_tensor_data_names):
            if (value := getattr(tensor, part)) is not None:
                found[f"{name}.{part}"] = value
    return found


def put_into(net: nn.Module, weights: Weights, how: dict[str, Any]) -> list[str]:
    """Quantizes a floating-point net as `how` tells, and copies what was read into it; returns notes for people.

    Raises UserError where the tensors aren't those of such a net, and where torchao isn't installed.
    """
    torchao = load_torchao()
    if how.get("scheme") not in SCHEMES:
        raise UserError(f"{weights.where} is quantized in a way that is not known here: {how.get('scheme')}. There "
                        f"are: {', '.join(SCHEMES)}.")
    _quantize(torchao, net, how)
    live = parts(net)
    wrong = [name for name in sorted(live.keys() | weights.tensors.keys())
             if name not in live or name not in weights.tensors or live[name].shape != weights.tensors[name].shape]
    if wrong:
        raise UserError(f"{weights.where} doesn't fit the net that it tells of: {', '.join(wrong[:3])}"
                        f"{' ...' if len(wrong) > 3 else ''}. Leave out model.*: the file knows its net.")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(weights.tensors[name])
    device = next(iter(live.values())).device
    if how["scheme"] == "int8-dynamic" and _reduces_range(device) and not how["reduce_range"]:
        return ["this processor adds int8 products in 16 bits, which may overflow, and the net was quantized for one "
                "that doesn't: quantize it on this machine"]
    return []


def _quantize(torchao: Any, net: nn.Module, how: dict[str, Any]) -> None:
    """In place. Layers of the names in `how` alone."""
    names: Sequence[str] = how["layers"]
    if how["scheme"] == "int8-dynamic":
        # inductor's settings are the whole process's: they are left alone
        config = torchao.Int8DynamicActivationInt8WeightConfig(reduce_range=how["reduce_range"],
                                                               set_inductor_config=False)
    else:
        config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    torchao.quantize_(net, config, filter_fn=lambda module, name: name in names)


def _linear(net: nn.Module) -> list[str]:
    """The layers that torchao can quantize: not those whose weights others use by themselves, as attention does."""
    others = nn.modules.linear.NonDynamicallyQuantizableLinear
    return [name for name, module in net.named_modules()
            if isinstance(module, nn.Linear) and not isinstance(module, others)]


def _is_quantized(tensor: Tensor) -> bool:
    return hasattr(tensor, "tensor_data_names")


def _reduces_range(device: torch.device) -> bool:
    from torchao.utils import should_reduce_range

    return bool(should_reduce_range(device))


def load_torchao() -> Any:
    """torchao's quantization, imported when it is needed. Raises UserError where it isn't installed."""
    log = logging.getLogger("torch.utils._pytree")  # by which torch 2.14 tells of a habit of torchao 0.18 at import
    log.addFilter(_nothing)
    try:
        from torchao import quantization
    except ImportError:
        raise UserError("Quantized nets need torchao, which isn't installed: pip install 'alexnet-ddp[quantize]'"
                        ) from None
    finally:
        log.removeFilter(_nothing)
    return quantization


def _nothing(record: logging.LogRecord) -> bool:
    return False


# --- the command ------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    """`alexnet-ddp quantize`. Raises UserError."""
    from alexnet_ddp.trained import command, packed_weights, shrinkage

    parser = command.parser("quantize", "A net with int8 linear layers: its accuracy on data.val, size and latency "
                            "beside those of the net as it is.")
    parser.add_argument("--scheme", required=True, choices=SCHEMES, help="int8-dynamic: weights and, at each forward, "
                        "activations; int8-weight-only: weights alone")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write it: a .safetensors file, a MODEL of its own")
    shrinkage.add_seconds(parser)
    options = parser.parse_intermixed_args(words)
    device = shrinkage.one_process("quantize", options.device)
    if options.out is not None:
        packed_weights.check_path(options.out)
    model = load_model(options.model, options.overrides, device=device)
    shrinkage.check_held_out(model)
    smaller = quantize(model, scheme=options.scheme)
    print(f"{model.where}: {options.scheme}", flush=True)
    command.tell_notes(model.notes)
    models = [("as it is", model), (options.scheme, smaller)]
    measured = shrinkage.measure(models, seconds=options.seconds)
    if (after := measured[1].evaluation) is not None:
        smaller.facts["top1"] = after.top1
    print("\n".join(["", shrinkage.table(measured), "", *shrinkage.conditions(measured, models), "",
                     *told(layers_of(smaller.net))]))
    shrinkage.keep(smaller, options.out)
    return EXIT_FINISHED


def told(layers: Layers) -> list[str]:
    """What is int8 and what isn't: lines for people. Pure."""
    lines = [f"int8: {layers.int8:,} of {layers.parameters:,} parameters ({layers.share:.1%}), the weights of "
             f"{', '.join(layers.quantized)}; their biases stay floating-point"]
    if layers.floating:
        lines += ["stayed floating-point, because torchao's int8 schemes take linear layers alone (the dynamic "
                  "quantization of older tutorials skips convolutions too, and doesn't say so):",
                  *(f"  {name}: {kind}, {count:,} parameters" for name, kind, count in layers.floating)]
    return lines
