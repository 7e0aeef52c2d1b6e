"""Weights in one file with all that is needed to use them."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from alexnet_ddp import load_model
from alexnet_ddp.errors import UserError
from alexnet_ddp.models.fitting import put_into
from alexnet_ddp.models.weights import read_weights
from alexnet_ddp.trained import packed_weights
from alexnet_ddp.trained.model import Model
from trained_nets import Trained

SMALL = ["model.width=0.0625", "model.num_classes=3", "augment.size=64", "augment.resize=fast", "data.val=/nowhere"]


def small() -> Model:
    """A model with something in each of its parts."""
    model = load_model("alexnet_bn", SMALL)
    return replace(model, classes=("ant", "bee", "cat"), facts={"step": 7, "top1": 0.5, "source": "x"},
                   preprocessing=replace(model.preprocessing, short=70, mean=(0.1, 0.2, 0.3)))


def test_all_of_a_model_is_in_the_file(tmp_path: Path) -> None:
    """Logits to the bit, classes, preprocessing, recipe and accuracy come back from the file alone."""
    model, path = small(), tmp_path / "net.safetensors"
    written = model.save(path)
    read = load_model(path)
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(read.logits(images), model.logits(images))
    assert (read.classes, read.preprocessing, read.config, read.name) == (
        model.classes, model.preprocessing, model.config, "alexnet_bn")
    assert (read.facts["step"], read.facts["top1"], read.facts["source"]) == (7, 0.5, str(path))
    assert written.bytes == path.stat().st_size and written.sha256 == read.facts["sha256"]
    assert not read.notes and not list(tmp_path.glob(".tmp-*"))


def test_what_overrides_say_wins(tmp_path: Path) -> None:
    """Of the file's preprocessing only what is overridden changes."""
    path = tmp_path / "net.safetensors"
    small().save(path)
    read = load_model(path, ["augment.std=[1,1,1]", "data.val=/elsewhere"])
    assert read.preprocessing == replace(small().preprocessing, std=(1.0, 1.0, 1.0))
    assert read.config.data.val == "/elsewhere"


def test_a_run_goes_through_a_file(trained: Trained, tmp_path: Path) -> None:
    """Best weights of a run, written and read: the file has its accuracy, and a new run can begin with it."""
    model, path = load_model(trained.run), tmp_path / "net.safetensors"
    model.save(path)
    weights = read_weights(str(path))
    assert weights.facts["top1"] == model.facts["top1"] and weights.facts["path"] == str(path)
    assert weights.recipe == model.config.model_dump(mode="json")
    fresh = load_model("alexnet_single", [f"model.num_classes={model.num_classes}",
                                          f"augment.size={model.preprocessing.size}",
                                          f"model.width={model.config.model.width}"]).net
    assert put_into(fresh, weights) == []
    assert all(torch.equal(tensor, model.net.state_dict()[name]) for name, tensor in fresh.state_dict().items())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A file that is there, another suffix and a folder that isn't there are refused; nothing is left behind."""
    path = tmp_path / "net.safetensors"
    path.write_text("mine")
    for place, why in ((path, "exists already"), (tmp_path / "net.pt", "net.safetensors"),
                       (tmp_path / "no" / "net.safetensors", "no folder")):
        with pytest.raises(UserError, match=why):
            small().save(place)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left(tmp_path: Path) -> None:
    """Is removed once it is an hour old; what is younger may be somebody's who is writing."""
    old, young = (tmp_path / f".tmp-{token}-net.safetensors" for token in ("00000000", "11111111"))
    old.touch()
    young.touch()
    os.utime(old, (1, 1))
    small().save(tmp_path / "net.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {young.name, "net.safetensors"}


@pytest.mark.parametrize("part", ["tensors", "recipe", "version"])
def test_damage_and_other_versions_are_told(tmp_path: Path, part: str) -> None:
    """One changed weight, one changed word of the recipe, a layout of another version: refused, to use and to train."""
    path = tmp_path / "net.safetensors"
    small().save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        told = file.metadata()
    tensors = load_file(path)
    if part == "tensors":
        tensors["classifier.1.bias"][0] += 1e-6
    elif part == "recipe":
        told["recipe"] = json.dumps({**json.loads(told["recipe"]), "seed": 5})
    else:
        told["alexnet_ddp"] = "99"
    save_file(tensors, path, metadata=told)
    with pytest.raises(UserError, match="layout 99" if part == "version" else "differs from its checksum"):
        load_model(path)
    with pytest.raises(UserError):
        read_weights(str(path))


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is refused before anything is computed; and a disk that turned read-only hides no message behind another."""
    with monkeypatch.context() as patch, pytest.raises(UserError, match="may not be written to"):
        patch.setattr(os, "access", lambda *args: False)
        packed_weights.check_path(tmp_path / "net.safetensors")

    def read_only(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(UserError, match="can't be written: Read-only file system"), packed_weights.replacing(
            tmp_path / "net.safetensors"):
        read_only()
