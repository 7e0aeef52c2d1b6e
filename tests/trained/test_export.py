"""Exported nets have the checkpoint's logits and are nets again; no file bears its name before that is shown."""

import json
import os
import pickle
import signal
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alexnet_ddp import cli, load_model
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER, UserError
from alexnet_ddp.models.weights import read_weights
from alexnet_ddp.trained import export as exporting
from alexnet_ddp.trained.export import SUFFIXES, export
from alexnet_ddp.trained.model import Model
from alexnet_ddp.trained.quantization import quantize
from alexnet_ddp.trained.tiles import open_source, tiles
from trained_nets import Trained

NARROW = ["model.width=0.05", "model.num_classes=5", "augment.size=64"]


def narrow(name: str, *more: str) -> Model:
    return load_model(name, [*NARROW, *more])


def images(model: Model, count: int) -> torch.Tensor:
    rng = np.random.default_rng(count)
    size, channels = model.preprocessing.size, model.preprocessing.channels
    return model.pixels(torch.from_numpy(rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)))


@pytest.mark.parametrize("name", ["alexnet_single", "alexnet_paper", "alexnet_bn", "alexnet_torchvision"])
@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_every_alexnet_keeps_its_logits(name: str, form: exporting.Format, tmp_path: Path) -> None:
    """With any batch: on images that export has not seen, one at a time, two, seven and thirty-two."""
    model = narrow(name)
    done = export(model, tmp_path / f"net{SUFFIXES[form]}", format=form, batch=None)
    assert done.parity.holds and done.parity.agreed == done.parity.images == 10
    opened = load_model(done.path)
    for count in (1, 2, 7, 32):
        shown = images(model, count)
        assert torch.allclose(opened.net(shown), model.net(shown), rtol=0, atol=1e-4)
    assert opened.net(images(model, 1)[:0]).shape == (0, 5)
    assert opened.preprocessing == model.preprocessing and opened.config.model == model.config.model


def test_a_fixed_batch_takes_any_number(tmp_path: Path) -> None:
    """A graph of three images at a time gets seven in three turns; the padding of the last is seen by nobody."""
    model = narrow("alexnet_torchvision")
    opened = load_model(export(model, tmp_path / "net.pt2", format="torch-export", batch=3).path)
    shown = images(model, 7)
    assert opened.net.signature.batch == 3
    assert torch.allclose(opened.net(shown), model.net(shown), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scheme", "form"), [("int8-weight-only", "onnx"), ("int8-dynamic", "torch-export")])
def test_int8_nets_as_graphs(scheme: str, form: exporting.Format, tmp_path: Path) -> None:
    """A quantized net keeps its logits in a graph that knows int8: they are its own, not those of the net before."""
    before = narrow("alexnet_bn", "model.width=0.125")
    model = quantize(before, scheme=scheme)
    opened = load_model(export(model, tmp_path / f"net{SUFFIXES[form]}", format=form, batch=None).path)
    shown = images(model, 7)
    apart = (opened.net(shown) - model.net(shown)).abs().max()
    assert apart < 1e-4 and apart < 0.1 * (opened.net(shown) - before.net(shown)).abs().max()


def test_half(tmp_path: Path) -> None:
    """Half the size, float32 in and out, near the checkpoint; the metadata say so."""
    model = narrow("alexnet_torchvision")
    whole, half = (export(model, tmp_path / f"{precision}.pt2", format="torch-export", precision=precision)
                   for precision in ("fp32", "fp16"))
    assert half.bytes < 0.65 * whole.bytes
    assert 0 < half.parity.difference < 1e-2
    found = load_model(half.path).net(images(model, 2))
    assert found.dtype == torch.float32
    assert {value.dtype for value in torch.export.load(half.path).state_dict.values()} == {torch.float16}


def test_half_is_refused_where_it_would_overflow(tmp_path: Path) -> None:
    """By the name of the layer whose output, or of the weights that, leave fp16's range."""
    model = narrow("alexnet_torchvision")
    with torch.no_grad():
        model.net.features[0].weight *= 1e6
    with pytest.raises(UserError, match=r"--half: what features\.\d+ gives reaches"):
        export(model, tmp_path / "net.onnx", format="onnx", precision="fp16")
    with torch.no_grad():
        model.net.classifier[1].weight[0, 0] = 1e9
    with pytest.raises(UserError, match=r"--half: the weights classifier\.1\.weight reaches"):
        export(model, tmp_path / "net.onnx", format="onnx", precision="fp16")
    assert not list(tmp_path.iterdir())


def test_a_run_as_an_onnx_file(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command; parity is shown on the run's data.val; classes, preprocessing and right answers are the run's."""
    onnx = pytest.importorskip("onnx")
    out = tmp_path / "small.onnx"
    words = ["export", str(trained.run), "--format", "onnx", "--out", str(out)]
    assert cli.main(words) == EXIT_FINISHED
    assert f"10 photographs of data.val ({trained.val})" in capsys.readouterr().out
    told = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    run, net = load_model(trained.run), load_model(out)
    assert tuple(json.loads(told["classes"])) == run.classes == net.classes
    assert json.loads(told["class_names"]) == run.spoken
    assert json.loads(told["preprocessing"]) == json.loads(json.dumps(run.preprocessing.plain()))
    assert json.loads(told["facts"])["step"] == run.facts["step"] == net.facts["step"]
    assert b"site-packages" not in out.read_bytes()  # whose machine it was is nobody's business

    with open_source(str(trained.val), net) as source:
        tile = next(iter(tiles(net, source, batch=1)))
    assert torch.allclose(net.probabilities(tile.images), run.probabilities(tile.images), atol=1e-4)

    before = out.read_bytes()
    assert cli.main(words) == EXIT_USER
    assert "--force" in capsys.readouterr().err and out.read_bytes() == before


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_safetensors(precision: exporting.Precision, tmp_path: Path) -> None:
    """Bit-equal weights in fp32, rounded ones in fp16; training can begin with them."""
    model = narrow("alexnet_bn")
    out = export(model, tmp_path / "net.safetensors", format="safetensors", precision=precision).path
    for name, tensor in read_weights(str(out)).tensors.items():
        wanted = model.net.state_dict()[name]
        assert torch.equal(tensor, wanted.half() if precision == "fp16" and wanted.is_floating_point() else wanted)


def test_a_file_that_fails_parity_is_not_kept(tmp_path: Path) -> None:
    """The message says by how much; what was there under the name is there still."""
    model, out = narrow("alexnet_bn"), tmp_path / "net.safetensors"
    out.write_bytes(b"before")
    with pytest.raises(UserError, match=r"largest difference of a logit 0.0e\+00 .*Nothing was kept"):
        export(model, out, format="safetensors", tolerance=0.0, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == [out.name] and out.read_bytes() == b"before"


def test_a_kill_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL after the file is written and before it is believed; an hour later the next export clears it away."""
    model, out = narrow("alexnet_bn"), tmp_path / "net.safetensors"
    nothing: Any = (None, "", [])
    with monkeypatch.context() as patch:
        patch.setattr(exporting.parity, "show", lambda *_: nothing)
        patch.setattr(exporting, "_parity", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        if (child := os.fork()) == 0:
            export(model, out, format="safetensors")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left, = tmp_path.iterdir()
    assert left.match(".tmp-????????-net.safetensors") and left.stat().st_size
    os.utime(left, (1, 1))
    export(model, out, format="safetensors")
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is a user's mistake with the system's words, and leaves nothing."""
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.files, "write", full)
    with pytest.raises(UserError, match="No space left on device"):
        export(narrow("alexnet_bn"), tmp_path / "net.pt2", format="torch-export")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the way out, before a net is made where that is possible."""
    def refused(*words: object) -> str:
        assert cli.main(["export", *map(str, words)]) == EXIT_USER
        return capsys.readouterr().err

    assert "invalid choice: 'tflite'" in refused("alexnet_bn", "--format", "tflite")
    assert "Leave out --dynamic-batch" in refused("alexnet_bn", *NARROW, "--format", "safetensors", "--dynamic-batch",
                                                  "--out", tmp_path / "net.safetensors")
    assert f"Name it {tmp_path / 'net.onnx'}" in refused("alexnet_bn", *NARROW, "--out", tmp_path / "net.bin")
    assert "There is no folder" in refused("alexnet_bn", *NARROW, "--out", tmp_path / "nowhere" / "net.onnx")
    assert "leave out --out" in refused("alexnet_bn", "--repo", tmp_path, "--out", "x.onnx")
    assert "use it with --repo" in refused("alexnet_bn", "--name", "x")
    out = export(narrow("alexnet_bn"), tmp_path / "net.pt2", format="torch-export").path
    assert "Name the run" in refused(out, "--format", "torch-export", "--out", tmp_path / "x.pt2")
    with pytest.raises(UserError, match="doesn't give its weights away"):
        read_weights(str(out))
    quantized = narrow("alexnet_bn")
    quantized.quantization = {"scheme": "int8-dynamic"}
    with pytest.raises(UserError, match="is quantized"):
        export(quantized, tmp_path / "net.onnx", format="onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'alexnet-ddp[export]'" in refused("alexnet_bn", *NARROW, "--out", tmp_path / "net.onnx")


def test_files_of_others_and_torn_ones(tmp_path: Path) -> None:
    """A foreign net needs words and then runs; what isn't whole or no net of images is refused."""
    class Foreign(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    path = tmp_path / "foreign.pt2"
    torch.export.save(torch.export.export(Foreign(), (torch.zeros(1, 3, 32, 32),)), path)
    with pytest.raises(UserError, match="augment.size=32"):
        load_model(path)
    opened = load_model(path, ["augment.size=32"])
    assert opened.num_classes == 3 and any("doesn't say how images" in note for note in opened.notes)
    shown = torch.rand(5, 3, 32, 32)
    assert torch.allclose(opened.net(shown), shown.mean((2, 3)))
    with pytest.raises(UserError, match="augment.size=32, which is fixed; got 64"):
        load_model(path, ["augment.size=64"])

    torch.export.save(torch.export.export(torch.nn.Linear(4, 2), (torch.zeros(1, 4),)), path)
    with pytest.raises(UserError, match="no net that classifies images"):
        load_model(path)
    for name in ("torn.pt2", "torn.onnx"):
        (tmp_path / name).write_bytes(path.read_bytes()[:100])
        with pytest.raises(UserError, match=f"{name} is no whole"):
            load_model(tmp_path / name)


class Code:
    """Unpickled it makes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Sum(torch.nn.Module):
    """With a weight and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.constant = torch.full((3,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) * self.weight + self.constant


@pytest.mark.parametrize("way", ["weight", "constant", "model.pt", "constants.pt", "sample_inputs", "custom", "opaque",
                                 "torch 2.7", "twice", "aotinductor", "nested"])
def test_no_code_of_a_program_is_run(way: str, tmp_path: Path) -> None:
    """Each place where torch.export.load unpickles, with a pickle that would make a file: refused, and none is made."""
    plain, path, made = tmp_path / "plain.pt2", tmp_path / "net.pt2", tmp_path / "made"
    torch.export.save(torch.export.export(Sum(), (torch.zeros(1, 3, 32, 32),)), plain)
    held = BytesIO()
    torch.save(Code(made), held)
    with zipfile.ZipFile(plain) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    top = next(iter(files)).split("/")[0]
    kind = "weights" if way == "weight" else "constants"
    config = f"{top}/data/{kind}/model_{kind}_config.json"
    if way in ("weight", "constant", "custom", "opaque"):
        told = json.loads(files[config])
        entry = next(iter(told["config"].values()))
        entry["path_name"] = {"weight": "weight_0", "constant": "tensor_0"}.get(way, f"{way}_obj_0/x")
        entry["use_pickle"] = True
        files[config] = json.dumps(told).encode()
        files[f"{top}/data/{kind}/{entry['path_name']}"] = pickle.dumps(Code(made)) if way == "opaque" else (
            held.getvalue())
    elif way == "torch 2.7":
        files = {"version": b"8.8", "serialized_exported_program.json": b"{}", **{
            f"serialized_{name}.pt": held.getvalue() for name in ("state_dict", "constants", "example_inputs")}}
    elif way == "nested":  # of two programs one lies deeper, and its weights don't
        told = json.loads(files[config := f"{top}/data/weights/model_weights_config.json"])
        entry = next(iter(told["config"].values()))
        entry["path_name"], entry["use_pickle"] = "weight_9", True
        files[config.replace("weights/model", "weights/a/model")] = json.dumps(told).encode()
        files[f"{top}/data/weights/weight_9"], clean = held.getvalue(), BytesIO()
        torch.save(torch.ones(3), clean)
        files[f"{top}/data/weights/a/weight_9"] = clean.getvalue()
    else:
        name = {"model.pt": "weights/model.pt", "constants.pt": "constants/model.pt", "twice": "WEIGHTS/Weight_0",
                "aotinductor": "aotinductor/model/x.so"}.get(way, "sample_inputs/model.pt")
        files[f"{top}/data/{name}"] = held.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="twice" if way == "twice" else "only running code"):
        load_model(path, ["augment.size=32"])
    assert not made.exists()
    assert load_model(plain, ["augment.size=32"]).num_classes == 3
    if way in ("weight", "model.pt"):  # that the file would have run it
        with pytest.raises(Exception):  # noqa: B017
            torch.export.load(path)
        assert made.exists()


def test_pictures_for_a_run_that_keeps_bare_pixels(trained: Trained, tmp_path: Path) -> None:
    """data.stored=raw64: parity is shown on the photographs of --images, and on those of data.val."""
    model = narrow("alexnet_bn", "data.stored=raw64", f"data.val={trained.val}")
    for images in ([], [str(trained.val)]):
        _, said, notes = exporting.parity.show(model, images)
        assert said.startswith("10 ph" if not images else "10 pictures of") and not notes
