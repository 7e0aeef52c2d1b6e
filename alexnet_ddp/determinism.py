"""Nets that can't repeat their bits on a GPU. Imports torch only where a net is at hand.

Some of torch's CUDA kernels add in whatever order their threads come, and torch has no other kernel for the operation:
under `torch.use_deterministic_algorithms(True)`, which `deterministic: true` sets, they raise, at the first backward.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from alexnet_ddp.errors import UserError

if TYPE_CHECKING:
    from torch import nn

# torchvision's classifiers that have such a layer, told by name, so that a job is refused before it waits in a queue.
_BY_NAME = {r"torchvision:alexnet": {"avgpool": "AdaptiveAvgPool2d to 6x6"},
            r"torchvision:vgg\d+(_bn)?": {"avgpool": "AdaptiveAvgPool2d to 7x7"}}


def check_name(name: str, *, deterministic: bool, on_gpu: bool) -> None:
    """Refuses a net by its name. Raises UserError."""
    for pattern, layers in _BY_NAME.items():
        if deterministic and on_gpu and re.fullmatch(pattern, name):
            raise refusal(name, layers)


def check_layers(net: nn.Module, *, name: str, deterministic: bool, on_gpu: bool) -> None:
    """Refuses a net, whatever its name, by what it is made of. Raises UserError."""
    if deterministic and on_gpu and (layers := raising_layers(net)):
        raise refusal(name, layers)


def refusal(name: str, layers: dict[str, str]) -> UserError:
    """What a user is told, who must choose between the net and the guarantee."""
    place, kind = next(iter(layers.items()))
    also = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
    other = ("Use alexnet_torchvision, the same net with an average whose backward does, or" if "alexnet" in name else
             "Use another net, or")
    return UserError(
        f"deterministic=true needs layers whose backward repeats its bits, and torch has none on a GPU for {name}'s "
        f"'{place}', {kind}{also}: it would raise at the first step.\n{other} deterministic=false: the same samples, "
        "crops and learning rates after a resume, not the same bits.")


def raising_layers(net: nn.Module) -> dict[str, str]:
    """The layers of a net whose CUDA backward raises under deterministic algorithms: path -> what it is.

    By the list in the documentation of `torch.use_deterministic_algorithms` (torch 2.14), as far as it is of layers.
    An adaptive average to a single value per channel doesn't count: torch computes it as a mean.
    """
    return {path: kind for path, layer in net.named_modules() if (kind := _raising(layer))}


def _raising(layer: nn.Module) -> str:
    from torch import nn

    kind = type(layer).__name__
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        size = _pair(layer.output_size)
        return "" if size == (1, 1) else f"{kind} to {size[0]}x{size[1]}"
    if isinstance(layer, nn.Upsample):
        return f"{kind} by {layer.mode}" if layer.mode in ("linear", "bilinear", "bicubic", "trilinear") else ""
    if isinstance(layer, nn.EmbeddingBag):
        return f"{kind} of the largest" if layer.mode == "max" else ""
    always = (nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
              nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d, nn.ReflectionPad1d, nn.ReflectionPad2d,
              nn.ReflectionPad3d, nn.CTCLoss, nn.LocalResponseNorm)  # torch's LRN averages by avg_pool3d
    return kind if isinstance(layer, always) else ""


def _pair(size: Any) -> tuple[Any, Any]:
    return (size, size) if isinstance(size, int) or size is None else tuple(size)
