"""Every classifier of torchvision, and the four AlexNets in their recipes: what the quick tests show of a few."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.drill
UNIT = Path(__file__).resolve().parents[1] / "unit"


def unit(name: str):  # type: ignore[no-untyped-def]
    """A file of the quick tests, whose pieces are used here."""
    spec = importlib.util.spec_from_file_location(name, UNIT / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


determinism, recompute, overfit = unit("test_determinism"), unit("test_recompute"), unit("test_overfit")
CLASSIFIERS = [name for name in determinism.zoo.names() if name.startswith("torchvision:")]
# Of every family that has a sequence of blocks: dropout, stochastic depth, batch norm, blocks in every kind of place.
FAMILIES = ["resnet18", "vgg11_bn", "squeezenet1_1", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
            "efficientnet_b0", "convnext_tiny", "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf", "vit_b_32",
            "swin_t", "alexnet"]  # fmt: skip


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_what_raises_on_a_gpu_is_refused(name: str) -> None:
    """Every classifier of torchvision is refused just where its training pass has an operation that raises."""
    size = 299 if "inception" in name else 256 if "swin_v2" in name else 224
    net = determinism.meta_model(name, size=size)
    found = determinism.raising_operations(net, size=size)
    assert bool(determinism.raising_layers(net)) is bool(found) is determinism.refused_by_name(name), found


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_moves_no_bit(family: str) -> None:
    """memory.checkpoint=blocks: loss, gradients and running statistics are those of the net that keeps everything."""
    plain = recompute.small(f"torchvision:{family}")
    twin = recompute.recomputing(plain)
    recompute.check_equal(recompute.passed(twin, recompute.images()), recompute.passed(plain, recompute.images()))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", overfit.OURS)
def test_learns_64_photographs_by_heart(name: str, tmp_path: Path) -> None:
    """64 photographs at 128 pixels, a quarter of the width, by the recipe's own numbers: under 0.1 within 300 steps."""
    overfit.photographs.archive("imagenet-sample.tar")
    steps, loss, seconds = overfit.learn(name, tmp_path, samples=64, size=128)
    print(f"{name}: loss {loss:.3f} after {steps} steps, {seconds:.0f} s")
    assert loss < 0.1
