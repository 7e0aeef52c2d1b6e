"""The nets: sizes, counts, parity with torchvision, empty batches, determinism, and the tables about them."""

from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

import alexnet_ddp
from alexnet_ddp.errors import UserError
from alexnet_ddp.models import create_model, zoo
from alexnet_ddp.models.block import AdaptiveAverage, ConvBlock, scaled
from alexnet_ddp.models.dropout import KeyedDropout, set_dropout_rows
from alexnet_ddp.models.lrn import LocalResponseNorm

NARROW = {"num_classes": 10, "width": 0.1, "image_size": 64}
OURS = ["alexnet_paper", "alexnet_torchvision", "alexnet_single", "alexnet_bn"]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def meta_model(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)  # type: ignore[arg-type]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def loss_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A step's loss as the trainer has it: with dropout keyed by row, a sum over samples."""
    set_dropout_rows(model, torch.arange(len(images)))
    labels = torch.zeros(len(images), dtype=torch.int64)
    return functional.cross_entropy(model(images), labels, reduction="sum")


def output_sizes(name: str, **options: object) -> dict[str, tuple[int, ...] | None]:
    model = meta_model(name, **options)
    size = options.get("image_size", 224)
    assert isinstance(size, int)
    return {layer.name: layer.output for layer in zoo.describe(model, image_size=size)}


# ---- alexnet_single


@pytest.mark.parametrize("image_size", [224, 227])
def test_single_has_the_papers_sizes(image_size: int) -> None:
    """At 224 (padding 2) and 227 (padding 0): 55, 27, 13, 13, 13, 6 pixels, 4096, 4096, 1000; 62,378,344."""
    sizes = output_sizes("alexnet_single", image_size=image_size)
    assert [sizes[f"features.block{i}.conv"] for i in range(1, 6)] == [
        (96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13),
    ]  # fmt: skip
    assert [sizes[f"features.block{i}.pool"] for i in (1, 2, 5)] == [(96, 27, 27), (256, 13, 13), (256, 6, 6)]
    assert [sizes[f"classifier.{i}"] for i in (1, 4, 6)] == [(4096,), (4096,), (1000,)]
    model = meta_model("alexnet_single", image_size=image_size)
    assert parameters(model) == 62_378_344
    first = model.get_submodule("features.block1.conv")
    assert isinstance(first, nn.Conv2d) and first.padding == ((2, 2) if image_size == 224 else (0, 0))


def test_single_layers_in_order() -> None:
    """Blocks are conv, ReLU, LRN, pool; the classifier is dropout, fc, ReLU, dropout, fc, ReLU, fc."""
    model = meta_model("alexnet_single")
    blocks = [module for module in model.modules() if isinstance(module, ConvBlock)]
    kinds = [[type(layer).__name__ for layer in block] for block in blocks]
    plain, with_lrn = ["Conv2d", "ReLU"], ["Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d"]
    assert kinds == [with_lrn, with_lrn, plain, plain, [*plain, "MaxPool2d"]]
    expected = ["KeyedDropout", "Linear", "ReLU", "KeyedDropout", "Linear", "ReLU", "Linear"]
    assert [type(layer).__name__ for layer in model.get_submodule("classifier").children()] == expected
    assert [m.layer for m in model.modules() if isinstance(m, KeyedDropout)] == [0, 1]


@pytest.mark.parametrize("lrn_after", [(), (1, 2), [1, 2, 5], (3,)])
def test_lrn_after_chooses_the_blocks(lrn_after: tuple[int, ...]) -> None:
    """lrn_after puts AlexNet's LRN into these blocks, before the pool, and into no other."""
    model = meta_model("alexnet_single", lrn_after=lrn_after)
    found = {name: m for name, m in model.named_modules() if isinstance(m, LocalResponseNorm)}
    assert list(found) == [f"features.block{i}.lrn" for i in lrn_after]
    assert all((m.size, m.alpha, m.beta, m.k) == (5, 1e-4, 0.75, 2.0) for m in found.values())


def test_single_equals_plain_torch() -> None:
    """Logits equal those of the net written out in torch's own operations with its weights, in float64."""
    torch.manual_seed(0)
    model = create_model("alexnet_single", **NARROW).double().eval()
    weights = dict(model.named_parameters())
    x = images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for block, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)], start=1):
        weight, bias = (weights[f"features.block{block}.conv.{kind}"] for kind in ("weight", "bias"))
        x = functional.conv2d(x, weight, bias, stride, padding).relu()
        x = functional.local_response_norm(x, 5, 1e-4, 0.75, 2.0) if block <= 2 else x
        x = functional.max_pool2d(x, 3, 2) if block in (1, 2, 5) else x
    x = x.flatten(1)
    for layer in (1, 4, 6):
        x = functional.linear(x, weights[f"classifier.{layer}.weight"], weights[f"classifier.{layer}.bias"])
        x = x if layer == 6 else x.relu()
    torch.testing.assert_close(model(images), x, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("image_size", [63, 64, 96, 128, 299])
def test_classifier_follows_the_image_size(image_size: int) -> None:
    """The first fully connected layer takes what the features give at each size."""
    model = create_model("alexnet_single", **{**NARROW, "image_size": image_size})
    assert model(torch.zeros(1, 3, image_size, image_size)).shape == (1, 10)


def test_another_image_size_than_the_models_is_refused() -> None:
    """An image whose features don't fit is refused with both sizes; one that fits anyway is taken."""
    model = create_model("alexnet_single", **NARROW)
    with pytest.raises(UserError, match=r"images of 64 pixels; got 96x64"):
        model(torch.zeros(1, 3, 96, 64))
    assert model(torch.zeros(1, 3, 66, 66)).shape == (1, 10)


def test_single_learns_at_once() -> None:
    """Thirty steps of SGD on eight images without dropout bring the loss from ln(classes) to below 0.1."""
    torch.manual_seed(0)
    model = create_model("alexnet_single", num_classes=4, width=0.25, image_size=64, dropout=0.0)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(30):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_single_keeps_the_signals_size() -> None:
    """He's initialisation: from layer to layer the outputs neither fade nor explode (pools raise them)."""
    torch.manual_seed(0)
    model = create_model("alexnet_single", width=0.25, image_size=64).eval()
    outputs: list[torch.Tensor] = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda _, inputs, output: outputs.append(output.detach().clone()))
    model(torch.randn(32, 3, 64, 64))
    spreads = [output.std().item() for output in outputs]
    assert len(spreads) == 8 and all(0.5 < spread < 6 for spread in spreads[:-1]), spreads
    assert spreads[-1] < 1.5


# ---- alexnet_torchvision


def test_torchvision_state_dict_and_logits() -> None:
    """torchvision's state dict loads unchanged, 61,100,840 parameters; logits at 224 are bit-equal."""
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet().eval()
    ours = meta_model("alexnet_torchvision").eval()
    assert parameters(ours) == 61_100_840
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))


def test_torchvision_logits_at_other_sizes() -> None:
    """Where the 6x6 average isn't the identity the logits equal torchvision's to rounding."""
    torch.manual_seed(0)
    ours = create_model("alexnet_torchvision", num_classes=10, width=0.1).double().eval()
    for height, width in ((64, 64), (128, 300)):
        x = torch.randn(1, 3, height, width, dtype=torch.float64)
        features = functional.adaptive_avg_pool2d(ours.get_submodule("features")(x), 6)
        expected = ours.get_submodule("classifier")(features.flatten(1))
        torch.testing.assert_close(ours(x), expected, atol=1e-13, rtol=1e-13)


def test_adaptive_average_equals_torch() -> None:
    """Values and gradients equal torch's adaptive pool for sizes below, at, above and across 6."""
    for height, width in ((1, 1), (2, 5), (6, 6), (6, 7), (13, 20)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        outputs = AdaptiveAverage(6)(x), functional.adaptive_avg_pool2d(x, 6)
        torch.testing.assert_close(*outputs, atol=1e-14, rtol=1e-14)
        gradients = [torch.autograd.grad(out, x, grad)[0] for out in outputs]
        torch.testing.assert_close(*gradients, atol=1e-14, rtol=1e-14)


def test_adaptive_average_is_skipped_where_it_is_the_identity() -> None:
    """A 6x6 input comes back as it is."""
    x = torch.randn(2, 3, 6, 6)
    assert AdaptiveAverage(6)(x) is x


# ---- both


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("precision", ["none", "bf16"])
@pytest.mark.usefixtures("deterministic")
def test_empty_batch_has_zero_gradients(name: str, precision: str) -> None:
    """No samples: forward and backward run, fp32 and bf16, and every gradient is there and zero."""
    model = create_model(name, **NARROW)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = loss_of(model, torch.empty(0, 3, 64, 64))
    loss.backward()
    assert loss.item() == 0
    for parameter in model.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("precision", ["none", "bf16"])
@pytest.mark.usefixtures("deterministic")
def test_training_pass_repeats_bit_for_bit(name: str, precision: str) -> None:
    """With keyed dropout and deterministic algorithms, the same pass twice gives the same gradients' bits."""
    torch.manual_seed(0)
    model = create_model(name, **NARROW)
    images = torch.randn(4, 3, 64, 64)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(model, images)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", [name for name in OURS if name != "alexnet_bn"])  # whose samples see each other
def test_micro_batches_add_up(name: str) -> None:
    """Gradients summed over micro-batches equal the whole batch's, dropout included, in float64."""
    torch.manual_seed(0)
    model = create_model(name, **NARROW).double()
    images, rows = torch.randn(5, 3, 64, 64, dtype=torch.float64), torch.arange(5) + 2**31
    totals = []
    for sizes in ([5], [2, 0, 3]):
        model.zero_grad()
        for part, keys in zip(images.split(sizes), rows.split(sizes), strict=True):
            set_dropout_rows(model, keys)
            model(part).square().sum().backward()
        totals.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(totals[0], totals[1], atol=1e-12, rtol=1e-9)


def test_compiled_graph_equals_eager() -> None:
    """Traced as torch.compile does it, training with keyed dropout gives the gradients of plain torch."""
    torch.manual_seed(0)
    model = create_model("alexnet_single", **NARROW).double()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss_of(run, images).backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", OURS)
def test_export_with_any_batch(name: str) -> None:
    """torch.export takes the net with a symbolic batch and gives the same logits."""
    model = create_model(name, **NARROW).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", OURS)
def test_options(name: str) -> None:
    """in_channels, num_classes, width and dropout do what they say."""
    model = create_model(name, num_classes=7, in_channels=1, width=0.25, dropout=0.3, image_size=64)
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 7)
    assert {m.p for m in model.modules() if isinstance(m, KeyedDropout)} == {0.3}
    hidden = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    assert hidden == [1024, 1024, 7]


def test_width_rounds_to_multiples_of_8() -> None:
    """Counts go to the nearest multiple of 8, never below 8, and stay as they are at width 1."""
    assert scaled((96, 256, 384, 4096), 1.0) == [96, 256, 384, 4096]
    assert scaled((96, 256, 384, 4096), 0.3) == [32, 80, 112, 1232]
    assert scaled((96, 256), 0.001) == [8, 8]


# ---- names and refusals


def test_the_package_offers_create_model() -> None:
    """alexnet_ddp.create_model(name, num_classes=...) is the one of the models package."""
    assert alexnet_ddp.create_model is create_model


def test_names_lists_everything() -> None:
    """Our four nets come first, then torchvision's classifiers and nothing that isn't one."""
    names = zoo.names()
    assert names[:4] == OURS
    assert "torchvision:resnet50" in names and "torchvision:fcn_resnet50" not in names


def test_torchvision_by_name() -> None:
    """torchvision:NAME builds torchvision's own net for num_classes, also those with auxiliary heads."""
    model = create_model("torchvision:squeezenet1_1", num_classes=5, image_size=64)
    assert isinstance(model, torchvision.models.SqueezeNet)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    images = torch.zeros(2, 3, 96, 96, device="meta")
    assert meta_model("torchvision:googlenet", num_classes=5).train()(images).shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "alexnet_singel"}, "did you mean 'alexnet_single'"),
        ({"name": "torchvision:resnet5O"}, "did you mean 'torchvision:resnet50'"),
        ({"name": "zzzzz"}, "alexnet-ddp models"),
        ({"name": "alexnet_single", "image_size": 62}, "at least 63 pixels"),
        ({"name": "alexnet_torchvision", "image_size": 32}, "at least 63 pixels"),
        ({"name": "torchvision:vgg11", "image_size": 16}, "can't take images of 16 pixels"),
        ({"name": "torchvision:vit_b_16", "image_size": 100}, "can't take images of 100 pixels"),
        ({"name": "torchvision:resnet18", "width": 0.5}, "width=0.5"),
        ({"name": "torchvision:resnet18", "dropout": 0.1, "in_channels": 1}, "in_channels=1, dropout=0.1"),
        ({"name": "torchvision:resnet18", "lrn_after": (1,)}, r"lrn_after=\[1\]"),
        ({"name": "alexnet_torchvision", "lrn_after": (1, 2, 5)}, "lrn_after"),
        ({"name": "alexnet_bn", "lrn_after": (1,)}, r"alexnet_bn has no such option: lrn_after=\[1\]"),
        ({"name": "alexnet_paper", "lrn_after": ()}, r"alexnet_paper has no such option: lrn_after=\[\]"),
        ({"name": "alexnet_paper", "image_size": 62}, "at least 63 pixels"),
        ({"name": "alexnet_single", "lrn_after": (0, 6)}, "1 to 5"),
        ({"name": "alexnet_single", "dropout": 1.0}, "0 <= dropout < 1"),
        ({"name": "alexnet_single", "width": 0.0}, "width"),
        ({"name": "alexnet_single", "num_classes": 0}, "num_classes"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    """Each mistake is a UserError that names the rule and what to write instead."""
    with pytest.raises(UserError, match=message):
        meta_model(**options)  # type: ignore[arg-type]


# ---- describe and show


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        # torchvision publishes 0.714, 1.814, 0.349 and 4.491 G
        ("alexnet_torchvision", 714_188_480),
        ("torchvision:resnet18", 1_814_073_344),
        ("torchvision:squeezenet1_1", 349_151_936),
        ("torchvision:swin_t", 4_490_566_656),
        ("alexnet_single", 1_135_256_096),
        # of three convolutions half of single's: a group sees half of the channels
        ("alexnet_paper", 1_135_256_096 - (447_897_600 + 224_280_576 + 149_520_384) // 2),
        ("alexnet_bn", 1_135_256_096),
    ],
)
def test_describe_adds_up(name: str, macs: int) -> None:
    """The layers' parameters add up to the net's, their MACs to the published count."""
    model = meta_model(name)
    layers = zoo.describe(model, image_size=224)
    assert sum(layer.parameters for layer in layers) == parameters(model)
    assert sum(layer.macs for layer in layers) == macs


def test_describe_leaves_the_model_alone() -> None:
    """A real model keeps its weights, its modes, its gradients and gets rid of the hooks."""
    model = create_model("alexnet_single", **NARROW)
    model.get_submodule("features").eval()
    modes = [m.training for m in model.modules()]
    weights = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}
    layers = zoo.describe(model, image_size=64)
    assert layers[0] == zoo.LayerInfo("features.block1.conv", "Conv2d", (8, 15, 15), 2912, 653400)
    assert [m.training for m in model.modules()] == modes
    assert all(t.data_ptr() == weights[name][0] for name, t in model.state_dict().items())
    assert all(torch.equal(t, weights[name][1]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_show_renders_the_table() -> None:
    """The table names layers with height x width x channels, parameters and MACs, and ends in the totals."""
    lines = zoo.show("alexnet_single").splitlines()
    assert "224x224x3" in lines[0]
    first = next(line for line in lines if line.startswith("features.block1.conv"))
    assert first.split() == ["features.block1.conv", "Conv2d", "55x55x96", "34,944", "105,415,200"]
    assert lines[-1].split() == ["total", "62,378,344", "1,135,256,096"]
    assert "1,367,402" in zoo.show("alexnet_single", image_size=64, width=0.25, num_classes=10)
