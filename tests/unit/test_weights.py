"""Trained weights: every spelling of where they lie, what is verified, what is refused and with which way out."""

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from alexnet_ddp import config as recipes
from alexnet_ddp.checkpoint import files, store
from alexnet_ddp.checkpoint.state import TrainState
from alexnet_ddp.errors import UserError
from alexnet_ddp.models import create_model, weights, zoo
from alexnet_ddp.models.fitting import last_layer, put_into
from alexnet_ddp.models.weights import Weights, read_weights

STEPS = {3: 3.0, 6: 6.0}  # step of a checkpoint -> what its weights are filled with; the best ones with 4.0


def tiny(**changes: Any) -> nn.Module:
    return create_model("alexnet_single", **{"num_classes": 3, "width": 0.05, "image_size": 64, **changes})


def filled(value: float) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in tiny().state_dict().items()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with checkpoints of the steps 3 and 6, its best weights those of step 4."""
    path = tmp_path / "runs" / "base"
    recipe = recipes.build({"name": "base", "data": {"train": "/x"}, "augment": {"size": 64},
                            "model": {"num_classes": 3, "width": 0.05}})
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text(recipes.dump(recipe))
    for step, value in STEPS.items():
        store.write(TrainState(step=step, model=filled(value)), directory=path / "checkpoints", attempt=1,
                    lineage={"recipe": recipe.model_dump(mode="json")}, guard=lambda: None)
    store.write_best(filled(4.0), run_dir=path, model="alexnet_single", step=4, top1=0.5, guard=lambda: None)
    return path


def value_of(found: Weights) -> float:
    value, = {tensor.unique().item() for tensor in found.tensors.values()}
    return value


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def refused(spec: object) -> str:
    with pytest.raises(UserError) as error:
        read_weights(str(spec))
    return str(error.value)


# --- runs and checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spelling", "step", "value"), [
    ("", 4, 4.0), ("/", 4, 4.0), ("@best", 4, 4.0), ("/best.safetensors", 4, 4.0), ("@last", 6, 6.0),
    ("@step_00000003", 3, 3.0), ("@step_3", 3, 3.0), ("@3", 3, 3.0), ("/checkpoints/step_00000003", 3, 3.0),
    ("/checkpoints/step_00000003/model.safetensors", 3, 3.0),
])
def test_spellings_of_a_run(run: Path, spelling: str, step: int, value: float) -> None:
    """A run is its best weights, @last its newest checkpoint, @step_N that of a step; facts say which, by checksum."""
    found = read_weights(f"{run}{spelling}")
    assert (found.facts["step"], value_of(found)) == (step, value)
    assert set(found.tensors) == set(filled(0))
    path = Path(found.facts["path"])
    assert found.facts["sha256"] == files.measure(path / "manifest.json" if path.is_dir() else path).sha256
    assert found.facts["source"] == f"{run}{spelling}" and found.facts["model"] == "alexnet_single"
    assert found.recipe is not None and found.recipe["model"]["width"] == 0.05
    assert f"step {step}" in found.where
    json.dumps(found.facts)


def test_a_running_mean_is_what_a_checkpoint_stands_for(run: Path) -> None:
    """Of a checkpoint that keeps a mean of the weights the mean is taken, as an evaluation would, and it is said."""
    mean = {name: tensor for name, tensor in filled(9.5).items() if name.startswith("classifier")}
    store.write(TrainState(step=9, model=filled(9.0), ema=mean), directory=run / "checkpoints", attempt=1, lineage={},
                guard=lambda: None)
    found = read_weights(f"{run}@last")
    assert {name: tensor.unique().item() for name, tensor in found.tensors.items()} == {
        name: 9.5 if name in mean else 9.0 for name in filled(0)}
    assert "running mean" in found.where and found.recipe is None


def test_a_name_with_an_at_sign_is_a_path_first(run: Path, tmp_path: Path) -> None:
    """A folder whose own name ends in @last is that folder."""
    other = shutil.copytree(run, tmp_path / "runs" / "base@last")
    assert value_of(read_weights(str(other))) == 4.0


def test_damaged_weights_are_never_taken(run: Path) -> None:
    """One flipped bit: best weights and a named checkpoint are refused; @last goes back to the newest that verifies."""
    flip_last_byte(run / "best.safetensors")
    said = refused(run)
    assert "best.safetensors is damaged" in said and f"{run}@last" in said
    flip_last_byte(run / "checkpoints" / "step_00000006" / "model.safetensors")
    assert "model.safetensors differs from its checksum" in refused(f"{run}@6")
    assert value_of(read_weights(f"{run}@last")) == 3.0
    flip_last_byte(run / "checkpoints" / "step_00000003" / "manifest.json")
    assert "manifest.json is damaged" in refused(f"{run}@3")
    assert "no checkpoint that verifies" in refused(f"{run}@last")


def test_a_kill_between_the_best_weights_and_their_record(run: Path) -> None:
    """best.safetensors newer than best.json, or without one, is told from damage, and has a way out."""
    record = (run / "best.json").read_bytes()
    store.write_best(filled(5.0), run_dir=run, model="alexnet_single", step=5, top1=0.6, guard=lambda: None)
    (run / "best.json").write_bytes(record)
    said = refused(run)
    assert "is of step 5 and best.json of step 4" in said and f"{run}@last" in said
    (run / "best.json").unlink()
    assert "is missing or damaged" in refused(run)
    assert value_of(read_weights(str(run / "best.safetensors"))) == 5.0  # as any file, unverified


def test_runs_that_have_not_got_what_is_asked_for(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was never evaluated, a step that isn't there, a folder that is no run, a typing error."""
    assert "There are: last, step_00000006, step_00000003." in refused(f"{run}@7")
    assert f"the newest as {run}@last" in refused(run / "checkpoints")
    (run / "best.safetensors").unlink()
    said = refused(run)
    assert "was not evaluated" in said and f"{run}@last" in said
    assert "no run directory" in refused(tmp_path)
    assert f"Did you mean {run}?" in refused(run.with_name("bse"))
    monkeypatch.chdir(tmp_path)
    assert "Did you mean runs/base?" in refused("base")
    assert "Did you mean the net alexnet_single?" in refused("alexnet_singel")
    assert "names a net, which has no weights" in refused("alexnet_single")


# --- files ------------------------------------------------------------------------------------------------------


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda tensors: tensors,
    "ddp": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "compiled ddp": lambda tensors: {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "imagenet example": lambda tensors: {"epoch": 3, "arch": "alexnet", "best_acc1": torch.tensor(56.5),
                                         "state_dict": {f"module.{name}": each for name, each in tensors.items()}},
    "torchvision reference": lambda tensors: {"model": tensors, "optimizer": {"state": {}}, "epoch": 89,
                                              "args": argparse.Namespace(lr=0.01, workers=16)},
    "lightning": lambda tensors: {"state_dict": {f"model.{name}": each for name, each in tensors.items()}, "epoch": 1},
    "parameters": lambda tensors: {name: nn.Parameter(tensor) for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_files_of_other_trainers(tmp_path: Path, wrapper: str) -> None:
    """A state dict is found under the usual keys and prefixes, without running code from the file."""
    path = tmp_path / "their.pth.tar"
    torch.save(WRAPPERS[wrapper](filled(2.0)), path)
    found = read_weights(str(path))
    assert value_of(found) == 2.0 and set(found.tensors) == set(filled(0))
    assert found.facts["sha256"] == files.measure(path).sha256 and found.facts["path"] == str(path)
    assert put_into(tiny(), found) == []


def test_a_safetensors_file(tmp_path: Path) -> None:
    """A bare .safetensors file of any program, with DDP's prefix too."""
    path = tmp_path / "w.safetensors"
    files.write_tensors(path, tensors={f"module.{name}": each for name, each in filled(2.0).items()}, metadata={})
    assert value_of(read_weights(str(path))) == 2.0


class Bomb:
    """Unpickling one runs code."""

    def __reduce__(self) -> Any:
        return eval, ("1 / 0",)


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.pth", Bomb(), "save the weights alone: torch.save(model.state_dict(), FILE)"),
    ("a.pth", nn.Linear(2, 2), "save the weights alone"),
    ("a.pt", {"epoch": 3, "lr": 0.1}, "It holds: epoch, lr."),
    ("a.pt", {}, "It holds: nothing."),
    ("a.pt", torch.zeros(3), "holds a Tensor, no state dict"),
    ("a.pt", {"w": torch.tensor([1.0, float("nan")])}, "w (weights) holds inf or nan"),
    ("a.jpg", {}, "doesn't end in .safetensors, .pth, .pt, .onnx or .pt2"),
])
def test_files_without_weights(tmp_path: Path, name: str, content: object, said: str) -> None:
    """Code in a file is never run; what holds no weights, or broken ones, is refused with what was found."""
    torch.save(content, tmp_path / name)
    assert said in refused(tmp_path / name)


def test_a_file_without_a_tensor(tmp_path: Path) -> None:
    """A whole safetensors file that holds nothing is refused; there is no prefix to look for in no name."""
    files.write_tensors(tmp_path / "empty.safetensors", tensors={}, metadata={})
    assert "holds no tensors" in refused(tmp_path / "empty.safetensors")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_torn_files(tmp_path: Path, name: str) -> None:
    """Half a file, an empty one, and one of anything else are one message each."""
    path = tmp_path / name
    torch.save(filled(1.0), path) if name == "a.pth" else files.write_tensors(path, tensors=filled(1.0), metadata={})
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"no weights at all"):
        path.write_bytes(content)
        assert f"{path} " in refused(path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize(("tensor", "said"), [
    (torch.ones(3).to(torch.float8_e4m3fn), "w (torch.float8_e4m3fn"), (torch.ones(3).to_sparse(), "torch.sparse_coo"),
    (torch.ones(3, device="meta"), "w (without values (meta))"),
])
def test_tensors_that_no_net_can_take(tmp_path: Path, tensor: Tensor, said: str) -> None:
    """float8, sparse and meta tensors are named and refused."""
    torch.save({"w": tensor}, tmp_path / "a.pth")
    assert said in refused(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # of what the broken bytes seem to be
def test_bytes_of_every_kind(tmp_path: Path) -> None:
    """Files of torch.save, both formats, with bytes turned at random places, and pickles of odd ends: one message, or
    whole weights; never an error of another kind."""
    random = np.random.default_rng(0)
    for zipped in (True, False):
        torch.save({"w": torch.ones(40), "n": 3}, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / "whole.pth").read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for place in random.integers(0, len(data), 3):
                data[place] = random.integers(0, 256)
            (tmp_path / "a.pth").write_bytes(bytes(data))
            with contextlib.suppress(UserError):
                read_weights(str(tmp_path / "a.pth"))
    for data in (b"\x80\x02.", b"\x80\x02K", b"\x80\x02h\x05.", b"\x80\x02X\x01", b"(lp0\n.", b"\x80\x02}(Jx"):
        (tmp_path / "a.pth").write_bytes(data)
        assert "a.pth " in refused(tmp_path / "a.pth")


@pytest.mark.parametrize("spec", ["~nosuchuser/x", "x" * 300, "x" * 300 + "@last", "/".join(["x" * 200] * 30) + ".pth"])
def test_names_that_no_file_can_have(spec: str) -> None:
    """Homes of nobody and names that are too long are not found, in words."""
    assert "There is no" in (said := refused(spec)) or "File name too long" in said


@pytest.mark.parametrize("lost", ["top1", "step", "model"])
def test_a_record_of_the_best_with_a_field_lost(run: Path, lost: str) -> None:
    """best.json without what a lineage must tell is a damaged one."""
    record = json.loads((run / "best.json").read_text())
    for content in ({name: value for name, value in record.items() if name != lost}, {**record, lost: None}):
        (run / "best.json").write_text(json.dumps(content))
        if lost != "model" or lost not in content:
            assert "is missing or damaged" in refused(run)


# --- torchvision ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, and no network."""
    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_torchvision_without_a_network(cache: Path) -> None:
    """The refusal says which file to fetch, from where, and where to put it."""
    said = refused("torchvision:alexnet")
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in said
    assert f"put it here as {cache / 'alexnet-owt-7be5be79.pth'}" in said and "no route to host" in said
    assert "did you mean torchvision:alexnet?" in refused("torchvision:alexnt")


def test_torchvision_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in torch's cache is taken when its checksum is that in its name, and only then."""
    theirs = torchvision.models.squeezenet1_1().state_dict()
    cache.mkdir(parents=True)
    path = weights.cached_file("squeezenet1_1")
    assert path.parent == cache
    torch.save(theirs, path)
    assert "is damaged or another file" in refused("torchvision:squeezenet1_1")
    monkeypatch.setattr(weights, "_hash_in_name", lambda _: files.measure(path).sha256[:8])
    found = read_weights("torchvision:squeezenet1_1")
    assert found.facts["path"] == str(path) and found.facts["top1"] == 0.58178
    net = create_model("torchvision:squeezenet1_1", num_classes=5)
    assert put_into(net, found) == ["classifier.1.weight", "classifier.1.bias"]
    assert torch.equal(net.state_dict()["features.0.weight"], theirs["features.0.weight"])


# --- into a net -------------------------------------------------------------------------------------------------


def test_all_of_it_fits() -> None:
    """Weights of the same net are copied to the bit, whatever their precision and the net's memory format."""
    net, source = tiny().to(memory_format=torch.channels_last), tiny().state_dict()
    assert put_into(net, Weights(source, "x")) == []
    assert all(torch.equal(tensor, source[name]) for name, tensor in net.state_dict().items())
    assert net.get_parameter("features.block2.conv.weight").is_contiguous(memory_format=torch.channels_last)
    assert put_into(net, Weights({name: tensor.half() for name, tensor in source.items()}, "x")) == []
    assert net.get_parameter("classifier.6.weight").dtype == torch.float32


def test_another_number_of_classes_starts_the_last_layer_fresh() -> None:
    """Weight and bias of the last layer keep their own values, all else is the source's."""
    net, source = tiny(num_classes=5), tiny().state_dict()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert put_into(net, Weights(source, "x")) == ["classifier.6.weight", "classifier.6.bias"]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, (before if name.startswith("classifier.6") else source)[name])


@pytest.mark.parametrize("name", [*zoo.OURS, *(zoo.TORCHVISION + name for name in (
    "resnet18", "mobilenet_v3_small", "swin_t", "googlenet", "regnet_y_400mf", "squeezenet1_0"))])
def test_the_last_layer(name: str) -> None:
    """In our nets and in others the layer that gives the logits, and no other, depends on the number of classes."""
    with torch.device("cpu" if "regnet" in name else "meta"):
        few, many = (create_model(name, num_classes=number) for number in (7, 9))
    shapes = {each: tensor.shape for each, tensor in few.state_dict().items()}
    other = [each for each, tensor in many.state_dict().items() if tensor.shape != shapes[each]]
    assert last_layer(many) == other


def test_torchvisions_alexnet_is_ours() -> None:
    """alexnet_torchvision takes the state dict of torchvision's alexnet unchanged."""
    with torch.device("meta"):
        theirs, ours = torchvision.models.alexnet().state_dict(), create_model("alexnet_torchvision")
    assert put_into(ours, Weights(theirs, "x")) == []


def test_what_does_not_fit_is_listed(run: Path) -> None:
    """Another width, another net: refused with the first names of each kind, and fields that differ; net unharmed."""
    found = read_weights(str(run))
    wide = recipes.build({"data": {"train": "/x"}, "augment": {"size": 96}, "model": {"width": 0.1}})
    net = tiny(width=0.1, image_size=96)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(UserError) as error:
        put_into(net, found, recipe=wide.model_dump(mode="json"))
    said = str(error.value)
    assert "features.block2.conv.weight ([16, 8, 5, 5] there, [24, 8, 5, 5] here)" in said and "and 10 more" in said
    assert "trained with model.width=0.05 (here 0.1), augment.size=64 (here 96)." in said
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

    with pytest.raises(UserError) as error:
        put_into(create_model("alexnet_torchvision", num_classes=3, width=0.05, image_size=64), found)
    assert "not there: features.0.bias" in str(error.value)
    assert "not in this net: features.block1.conv.bias" in str(error.value)

    headless = {name: tensor for name, tensor in found.tensors.items() if not name.startswith("classifier.6")}
    with pytest.raises(UserError, match="not there: classifier.6.bias, classifier.6.weight\n"):
        put_into(tiny(), Weights(headless, "x"))


@pytest.mark.parametrize(("theirs", "said"), [
    (torch.full((3,), 1e300, dtype=torch.float64), "numbers up to 1e+300, beyond what torch.float32 can hold"),
    (torch.ones(3, dtype=torch.complex64), "classifier.6.bias holds torch.complex64"),
    (torch.ones(3, dtype=torch.int8), "classifier.6.bias holds torch.int8"),
])
def test_numbers_that_a_copy_would_lose(theirs: Tensor, said: str) -> None:
    """float64 beyond float32, complex and whole numbers are refused rather than copied as inf, real parts or codes;
    float64 that fits is taken."""
    net, source = tiny(), {name: tensor.double() for name, tensor in tiny().state_dict().items()}
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(UserError) as error:
        put_into(net, Weights({**source, "classifier.6.bias": theirs}, "x"))
    assert said in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert put_into(net, Weights(source, "x")) == []
    assert torch.equal(net.state_dict()["classifier.6.weight"].double(), source["classifier.6.weight"])
