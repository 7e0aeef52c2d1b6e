"""int8 nets: what is quantized, how they are written and read, what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alexnet_ddp import load_model
from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.models.fitting import put_into
from alexnet_ddp.models.weights import read_weights
from alexnet_ddp.trained import quantization
from alexnet_ddp.trained.quantization import SCHEMES, layers_of, quantize
from trained_nets import Trained, command

schemes = pytest.mark.parametrize("scheme", SCHEMES)
SMALL = ["model.width=0.125", "model.num_classes=5", "augment.size=64"]


@schemes
def test_logits_are_near(scheme: str) -> None:
    """Of a small net within 2 % of their spread. Each weight is rounded to the nearest of its row's 256 steps, and
    where no activation is rounded the logits are those of these weights. The net itself is left as it was."""
    model = load_model("alexnet_single", SMALL)
    images = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = model.logits(images)
    smaller = quantize(model, scheme=scheme)
    after = smaller.logits(images)
    assert torch.equal(model.logits(images), before) and not torch.equal(after, before)
    assert (after - before).std() < 0.02 * before.std()
    with torch.no_grad():
        for name in layers_of(smaller.net).quantized:
            weight, small = model.net.get_submodule(name).weight, smaller.net.get_submodule(name).weight
            assert small.qdata.dtype == torch.int8 and small.scale.shape == (len(weight), 1)
            rounded = small.qdata * small.scale
            assert ((rounded - weight).abs() <= 0.501 * small.scale).all()
            weight.copy_(rounded)
    if scheme == "int8-weight-only":
        assert torch.allclose(model.logits(images), after, rtol=1e-4, atol=1e-5)


@schemes
def test_written_and_read(scheme: str, tmp_path: Path) -> None:
    """The file holds plain int8 and float tensors, a third or less of the bytes; what it opens has the same logits to
    the bit, and knows where it comes from. A run can't begin with it."""
    model = load_model("alexnet_single", SMALL)
    smaller, path = quantize(model, scheme=scheme), tmp_path / "small.safetensors"
    size = smaller.save(path).bytes
    assert load_file(path)["classifier.1.weight.qdata"].dtype == torch.int8
    assert size < 0.5 * model.save(tmp_path / "whole.safetensors").bytes
    read = load_model(path)
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(read.logits(images), smaller.logits(images))
    assert read.quantization == smaller.quantization and layers_of(read.net) == layers_of(smaller.net)
    read.save(tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(path).keys()
    with pytest.raises(UserError, match="quantized"):
        put_into(model.net, read_weights(str(path)))


@pytest.mark.parametrize(("name", "share"), [("alexnet_torchvision", 0.9594), ("alexnet_single", 0.9398)])
def test_nearly_all_of_an_alexnet(name: str, share: float) -> None:
    """At the paper's size 58,621,952 parameters are int8, and the five convolutions are told of."""
    layers = layers_of(quantize(load_model(name), scheme="int8-weight-only").net)
    assert layers.int8 == 58_621_952 and round(layers.share, 4) == share
    assert len(layers.quantized) == 3
    assert [kind for _, kind, _ in layers.floating if kind == "Conv2d"] == ["Conv2d"] * 5


def test_what_cannot_be_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """A net that is quantized already, one without linear layers, an unknown scheme, no torchao: each is told."""
    model = load_model("alexnet_single", SMALL)
    with pytest.raises(UserError, match="quantized already"):
        quantize(quantize(model, scheme=SCHEMES[0]), scheme=SCHEMES[0])
    with pytest.raises(UserError, match="no linear layer"):
        quantize(replace(model, net=torch.nn.Conv2d(3, 5, 64)), scheme=SCHEMES[0])
    with pytest.raises(UserError, match="int4.*There are: int8-dynamic"):
        quantize(model, scheme="int4")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"alexnet-ddp\[quantize\]"):
        quantization.quantize(model, scheme=SCHEMES[0])


def test_data_that_are_not_here(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are told before anything is measured, with what leaves accuracy out."""
    monkeypatch.setattr(quantization, "quantize", None)
    with pytest.raises(UserError, match=r"(?s)data\.val=.*nowhere.*data\.val=null"):
        quantization.main([str(trained.run), "data.val=/nowhere", "--scheme", SCHEMES[0], "--device", "cpu"])


def test_the_command(trained: Trained, tmp_path: Path) -> None:
    """Of a run: two rows with the run's own accuracy in the first, what stayed floating-point, a file that knows the
    run's classes and the accuracy that was told."""
    out = tmp_path / "small.safetensors"
    done = command("quantize", trained.run, "--scheme", "int8-dynamic", "--seconds", 0.1, "--out", out)
    assert done.returncode == EXIT_FINISHED, done.stderr
    rows = {cells[1].strip(): cells for cells in map(lambda line: line.split("|"), done.stdout.splitlines())
            if len(cells) > 6}
    before, after = load_model(trained.run), load_model(out)
    assert rows["as it is"][2].strip() == f"{100 * before.facts['top1']:.2f}"
    assert rows["int8-dynamic"][2].strip() == f"{100 * after.facts['top1']:.2f}"
    assert (after.classes, after.preprocessing) == (before.classes, before.preprocessing)
    assert "stayed floating-point" in done.stdout and "features.block5.conv: Conv2d" in done.stdout
    assert "deprecated" not in done.stderr
