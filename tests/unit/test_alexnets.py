"""The paper's net and the one with batch norm: counts, outputs, first weights, and what the two towers see."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from alexnet_ddp.models import create_model, zoo
from alexnet_ddp.models.dropout import KeyedDropout
from alexnet_ddp.models.lrn import LocalResponseNorm

NARROW = {"num_classes": 10, "width": 0.1, "image_size": 64}
PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
GEOMETRY = [(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]  # stride and padding of the five convolutions


def meta_model(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)  # type: ignore[arg-type]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def children(model: nn.Module, path: str) -> list[str]:
    return [type(layer).__name__ for layer in model.get_submodule(path).children()]


@pytest.fixture(scope="module")
def papers_net() -> Iterator[nn.Module]:
    """The paper's net in full size, with its first weights."""
    torch.manual_seed(0)
    yield create_model("alexnet_paper").eval()


# --- the paper's net --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [224, 227])
def test_paper_has_the_papers_sizes(image_size: int) -> None:
    """60,965,224 parameters; kernels that see 48, 192 and 192 channels in blocks 2, 4 and 5; outputs as in figure 2."""
    model = meta_model("alexnet_paper", image_size=image_size)
    assert parameters(model) == 60_965_224
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [tuple(conv.weight.shape) for conv in convolutions] == [
        (96, 3, 11, 11), (256, 48, 5, 5), (384, 256, 3, 3), (384, 192, 3, 3), (256, 192, 3, 3),
    ]  # fmt: skip
    outputs = {layer.name: layer.output for layer in zoo.describe(model, image_size=image_size)}
    assert [outputs[f"features.block{i}.conv"] for i in range(1, 6)] == [
        (96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13),
    ]  # fmt: skip
    assert [outputs[f"features.block{i}.pool"] for i in (1, 2, 5)] == [(96, 27, 27), (256, 13, 13), (256, 6, 6)]


def test_paper_layers_in_order() -> None:
    """ReLU, then LRN, then pool in blocks 1 and 2; dropout on the outputs of the two hidden layers."""
    model = meta_model("alexnet_paper")
    normalised = ["Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d"]
    assert [children(model, f"features.block{i}") for i in range(1, 6)] == [
        normalised, normalised, ["Conv2d", "ReLU"], ["Conv2d", "ReLU"], ["Conv2d", "ReLU", "MaxPool2d"],
    ]  # fmt: skip
    hidden = ["Linear", "ReLU", "KeyedDropout"]
    assert children(model, "classifier") == [*hidden, *hidden, "Linear"]
    assert [(m.layer, m.p) for m in model.modules() if isinstance(m, KeyedDropout)] == [(0, 0.5), (1, 0.5)]
    lrns = [m for m in model.modules() if isinstance(m, LocalResponseNorm)]
    assert {(m.size, m.alpha, m.beta, m.k, m.definition, m.groups) for m in lrns} == {(5, 1e-4, 0.75, 2.0, "paper", 2)}


def tower(x: Tensor, weights: dict[str, Tensor], *, block: int, half: slice) -> Tensor:
    """What a block does on one of the paper's two GPUs, in torch's own operations: torch's 5e-4 is the paper's 1e-4."""
    kernels, bias = (weights[f"features.block{block}.conv.{kind}"][half] for kind in ("weight", "bias"))
    x = functional.conv2d(x, kernels, bias, *GEOMETRY[block - 1]).relu()
    x = functional.local_response_norm(x, 5, 5e-4, 0.75, 2.0) if block <= 2 else x
    return functional.max_pool2d(x, 3, 2) if block in (1, 2, 5) else x


def test_two_towers_are_two_half_nets() -> None:
    """In float64: the halves computed apart, each from its own half alone but for block 3, give the net's logits."""
    torch.manual_seed(0)
    model = create_model("alexnet_paper", **NARROW).double().eval()
    weights = dict(model.named_parameters())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64) * 60
    kernels = {block: len(weights[f"features.block{block}.conv.bias"]) for block in range(1, 6)}
    halves = [images, images]
    for block in range(1, 6):
        shown = [torch.cat(halves, 1)] * 2 if block == 3 else halves  # block 3 sees both
        cut = kernels[block] // 2
        halves = [tower(x, weights, block=block, half=half)
                  for x, half in zip(shown, (slice(cut), slice(cut, None)), strict=True)]
    x = torch.cat(halves, 1).flatten(1)
    for layer in (0, 3, 6):
        x = functional.linear(x, weights[f"classifier.{layer}.weight"], weights[f"classifier.{layer}.bias"])
        x = x if layer == 6 else x.relu()
    torch.testing.assert_close(model(images), x, atol=1e-12, rtol=1e-12)


def test_towers_see_each_other_in_block_3_alone() -> None:
    """A kernel of one tower in block 2 moves no bit of the other's output before block 3, and all of block 3's."""
    torch.manual_seed(0)
    model = create_model("alexnet_paper", **NARROW).eval()
    blocks = list(model.get_submodule("features").children())
    images = torch.randn(2, 3, 64, 64)

    def outputs() -> list[Tensor]:
        found, x = [], images
        for block in blocks[:3]:
            x = block(x)
            found.append(x.clone())
        return found

    with torch.no_grad():
        before = outputs()
        model.get_submodule("features.block2.conv").weight[-1] += 1.0  # the last kernel of the second tower
        after = outputs()
    own = before[1].shape[1] // 2
    assert torch.equal(before[1][:, :own], after[1][:, :own])
    assert not torch.equal(before[1][:, own:], after[1][:, own:])
    changed = (before[2] != after[2]).flatten(2).any(2).any(0)
    assert changed[: own].any() and changed[own:].any()


def test_papers_first_weights(papers_net: nn.Module) -> None:
    """Every weight from N(0, 0.01); biases 1 in convolutions 2, 4, 5 and both hidden layers, 0 in the others."""
    layers = [m for m in papers_net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        weights = layer.weight.flatten()[:100_000]
        assert weights.mean().abs() < 5 * 0.01 / len(weights) ** 0.5
        assert weights.std().item() == pytest.approx(0.01, rel=5 / (2 * len(weights)) ** 0.5)
        assert 4 < weights.abs().max() / 0.01 < 7  # as normal tails go; a uniform's end at 1.7
    assert [set(layer.bias.tolist()) for layer in layers if layer.bias is not None] == [
        {0.0}, {1.0}, {0.0}, {1.0}, {1.0}, {1.0}, {1.0}, {0.0},
    ]  # fmt: skip


def test_papers_first_weights_at_other_sizes(papers_net: nn.Module) -> None:
    """A quarter's width has weights of 0.01 * sqrt(4), but in conv1: so its layers' outputs are as large as the full
    net's. At 64 pixels the first hidden layer has a 36th of the inputs, and a grey conv1 a third."""
    torch.manual_seed(1)
    quarter = create_model("alexnet_paper", width=0.25).eval()
    images = torch.randn(4, 3, 224, 224) * 60

    def sizes(model: nn.Module) -> list[float]:
        found: list[float] = []
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        handles = [layer.register_forward_hook(lambda _, inputs, out: found.append((out - 1).std().item()))
                   for layer in layers]
        model(images)
        for handle in handles:
            handle.remove()
        return found

    with torch.no_grad():
        assert sizes(quarter) == pytest.approx(sizes(papers_net), rel=0.3)
    small = create_model("alexnet_paper", width=0.25, image_size=64, in_channels=1)
    for model, path, std in [(quarter, "features.block1.conv", 0.01), (quarter, "features.block2.conv", 0.02),
                             (small, "features.block1.conv", 0.01 * 3**0.5), (small, "classifier.0", 0.01 * 144**0.5)]:
        weights = model.get_submodule(path).weight
        assert isinstance(weights, Tensor)
        assert weights.std().item() == pytest.approx(std, rel=5 / (2 * weights.numel()) ** 0.5), path


def test_the_picture_is_of_these_nets() -> None:
    """docs/pictures/alexnets.svg is what its program draws from the nets today."""
    spec = importlib.util.spec_from_file_location("alexnets", PICTURES / "alexnets.py")
    assert spec and spec.loader
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert (PICTURES / "alexnets.svg").read_text() == program.draw(), "run: python docs/pictures/alexnets.py"


# --- the one with batch norm ------------------------------------------------------------------------------------


def test_bn_layers_and_count() -> None:
    """Convolution without bias, batch norm, ReLU, pool; none in the classifier; 62,379,720 parameters."""
    model = meta_model("alexnet_bn")
    biases, scales_and_shifts = 96 + 256 + 384 + 384 + 256, 2 * (96 + 256 + 384 + 384 + 256)
    assert parameters(model) == 62_379_720 == 62_378_344 - biases + scales_and_shifts
    plain = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert [children(model, f"features.block{i}") for i in range(1, 6)] == [
        [*plain, "MaxPool2d"], [*plain, "MaxPool2d"], plain, plain, [*plain, "MaxPool2d"],
    ]  # fmt: skip
    hidden = ["KeyedDropout", "Linear", "ReLU"]
    assert children(model, "classifier") == [*hidden, *hidden, "Linear"]
    assert all(conv.bias is None for conv in model.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize("training", [True, False])
def test_bn_equals_plain_torch(training: bool) -> None:
    """Logits equal those of the net written out in torch's operations, by batch statistics and by running ones."""
    torch.manual_seed(0)
    model = create_model("alexnet_bn", **NARROW, dropout=0.0).double().train(training)
    weights = dict(model.named_parameters())
    x = images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for block, (stride, padding) in enumerate(GEOMETRY, start=1):
        path = f"features.block{block}"
        x = functional.conv2d(x, weights[f"{path}.conv.weight"], None, stride, padding)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        if not training:
            mean, var = torch.zeros_like(mean), torch.ones_like(var)
        x = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        x = functional.max_pool2d(x.relu(), 3, 2) if block in (1, 2, 5) else x.relu()
    x = x.flatten(1)
    for layer in (1, 4, 6):
        x = functional.linear(x, weights[f"classifier.{layer}.weight"], weights[f"classifier.{layer}.bias"])
        x = x if layer == 6 else x.relu()
    torch.testing.assert_close(model(images), x, atol=1e-12, rtol=1e-12)


def test_bn_first_weights() -> None:
    """He's variance 2 / inputs in convolutions and hidden layers; batch norm begins at scale 1, shift 0."""
    torch.manual_seed(0)
    model = create_model("alexnet_bn", width=0.25, image_size=64)
    for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][:-1]:
        expected = (2 / layer.weight[0].numel()) ** 0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=5 / (2 * layer.weight.numel()) ** 0.5)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.weight.eq(1).all() and norm.bias.eq(0).all()
