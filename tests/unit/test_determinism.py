"""Nets that can't repeat their bits on a GPU: known by their layers, by name, and refused before a step is taken."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_ddp.config import build
from alexnet_ddp.determinism import check_layers, check_name, raising_layers
from alexnet_ddp.errors import UserError
from alexnet_ddp.models import create_model, zoo
from alexnet_ddp.models.recipe import create_for

# Operations that raise on a GPU by the documentation of torch.use_deterministic_algorithms; parts of their names.
RAISING = ("adaptive_avg_pool2d_backward", "adaptive_avg_pool3d_backward", "avg_pool3d_backward", "max_unpool",
           "adaptive_max_pool2d_backward", "fractional_max_pool", "linear1d_backward", "bilinear2d_backward",
           "bicubic2d_backward", "trilinear3d_backward", "reflection_pad", "nll_loss2d", "ctc_loss", "embedding_bag",
           "put_.", "histc", "bincount", "kthvalue", "median", "grid_sampler", "resize_")  # fmt: skip


class Operations(TorchDispatchMode):
    """Names of what torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def raising_operations(net: nn.Module, *, size: int) -> set[str]:
    """What of a training pass of two images on the meta device would raise on a GPU."""
    with Operations() as operations:
        out = net(torch.empty(2, 3, size, size, device="meta"))
        out.sum().backward()
    return {name for name in operations.names if any(part in name for part in RAISING)}


def meta_model(name: str, *, size: int) -> nn.Module:
    # RegNets compute their widths with tensors
    with torch.device("cpu" if "regnet" in name else "meta"):
        return create_model(name, num_classes=10, image_size=size).to("meta")


@pytest.mark.parametrize("name", [*zoo.OURS, "torchvision:alexnet", "torchvision:vgg11", "torchvision:resnet18",
                                  "torchvision:squeezenet1_1"])
def test_layers_name_and_operations_agree(name: str) -> None:
    """A net is refused by its layers and by its name just where its training pass has an operation that raises."""
    net = meta_model(name, size=224)
    found = raising_operations(net, size=224)
    assert bool(raising_layers(net)) is bool(found) is refused_by_name(name), found


def refused_by_name(name: str) -> bool:
    try:
        check_name(name, deterministic=True, on_gpu=True)
    except UserError:
        return True
    return False


@pytest.mark.parametrize(("layer", "kind"), [
    (nn.AdaptiveAvgPool2d(1), ""), (nn.AdaptiveAvgPool2d((1, 1)), ""), (nn.AdaptiveAvgPool2d((1, 7)), "to 1x7"),
    (nn.AdaptiveAvgPool2d(6), "AdaptiveAvgPool2d to 6x6"), (nn.AdaptiveAvgPool2d((None, 1)), "to Nonex1"),
    (nn.Upsample(scale_factor=2), ""), (nn.Upsample(scale_factor=2, mode="bilinear"), "Upsample by bilinear"),
    (nn.EmbeddingBag(3, 4), ""), (nn.EmbeddingBag(3, 4, mode="max"), "EmbeddingBag"), (nn.AvgPool2d(2), ""),
    (nn.ReflectionPad2d(1), "ReflectionPad2d"), (nn.LocalResponseNorm(5), "LocalResponseNorm"), (nn.MaxPool2d(2), ""),
])
def test_layers(layer: nn.Module, kind: str) -> None:
    """Each layer is told by its kind and what makes it raise; what doesn't raise is let through."""
    found = raising_layers(nn.Sequential(nn.Conv2d(3, 3, 1), layer))
    assert found.keys() == ({"1"} if kind else set()) and kind in found.get("1", "")


def test_refusal_names_layer_and_ways_out() -> None:
    """The message names the net, the layer and what to do; without a GPU, or not deterministic, nothing is refused."""
    with pytest.raises(UserError, match=r"vgg16's 'avgpool', AdaptiveAvgPool2d to 7x7(.|\n)*deterministic=false"):
        check_name("torchvision:vgg16", deterministic=True, on_gpu=True)
    with pytest.raises(UserError, match="Use alexnet_torchvision"):
        check_name("torchvision:alexnet", deterministic=True, on_gpu=True)
    net = nn.Sequential(nn.ReflectionPad2d(1), nn.AdaptiveAvgPool2d(2))
    with pytest.raises(UserError, match=r"'0', ReflectionPad2d \(and 1 more\)"):
        check_layers(net, name="mine", deterministic=True, on_gpu=True)
    for deterministic, on_gpu in ((False, True), (True, False)):
        check_name("torchvision:vgg16", deterministic=deterministic, on_gpu=on_gpu)
        check_layers(net, name="mine", deterministic=deterministic, on_gpu=on_gpu)


def test_a_recipes_net_is_refused_on_a_gpu() -> None:
    """Where device is auto, the rank that finds a GPU refuses, before a step; on a CPU the same recipe trains."""
    tree = {"data": {"train": "/x"}, "model": {"name": "torchvision:alexnet"}, "deterministic": True}
    with torch.device("meta"):
        with pytest.raises(UserError, match="AdaptiveAvgPool2d to 6x6"):
            create_for(build(tree), on_gpu=True)
        assert isinstance(create_for(build(tree), on_gpu=False), nn.Module)
