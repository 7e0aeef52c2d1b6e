"""load_model on a run."""

import json
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_ddp import cli, load_model
from alexnet_ddp.config import apply_overrides, build
from alexnet_ddp.data.decoding.decode import PillowDecoder
from alexnet_ddp.errors import UserError
from alexnet_ddp.trained import command as command_module
from alexnet_ddp.trained.model import changed
from alexnet_ddp.trained.preprocessing import Preprocessing
from alexnet_ddp.trained.tiles import open_source, tiles
from trained_nets import Trained


def test_a_run_is_opened_whole(trained: Trained) -> None:
    """Its classes, preprocessing and weights: as many right answers as the run's own evaluation has counted."""
    model = load_model(trained.run)
    best = json.loads((trained.run / "best.json").read_text())
    assert list(model.classes) == sorted(path.name for path in trained.val.iterdir())
    right = 0
    with open_source(str(trained.val), model) as source:
        for tile in tiles(model, source):
            answers = model.probabilities(tile.images).argmax(1)
            right += int(((answers == tile.labels) & tile.whole).sum())
        assert right == round(best["top1"] * len(source))
    assert right > 0.6 * len(source)


def test_a_bare_file_tells_how_many_classes(trained: Trained, tmp_path: Path) -> None:
    """A copy of a run's best weights, away from its recipe: the last layer of the net that it names has its classes."""
    copy = shutil.copy(trained.run / "best.safetensors", tmp_path / "mine.safetensors")
    whole = load_model(trained.run)
    bare = load_model(copy, ["model.width=0.25", "augment.size=64", "augment.crop=squash"])
    assert bare.num_classes == whole.num_classes == 4
    assert all(torch.equal(a, b) for a, b in zip(bare.net.parameters(), whole.net.parameters(), strict=True))


def test_overrides_of_torchvisions_preprocessing() -> None:
    """What is asked for differs from what torchvision tells of its weights in that alone."""
    theirs = Preprocessing(size=224, short=232, mean=(0.4, 0.4, 0.4))
    tree = {"model": {"name": "alexnet_torchvision"}, "data": {"train": "-"}}
    before, larger, other = (build(apply_overrides(tree, words)) for words in ([], ["augment.size=288"],
                                                                                ["augment.mean=[0.5,0.5,0.5]"]))
    assert changed(theirs, before=before, now=before) == theirs
    assert changed(theirs, before=before, now=larger) == replace(theirs, size=288, short=329)
    assert changed(theirs, before=before, now=other) == replace(theirs, mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("short", [68, 73])
def test_raw_packs_with_any_short_side(trained: Trained, tmp_path: Path, short: int) -> None:
    """A net whose photographs have a short side of their own sees a pack of bare 73 x 73 pixels resized to it."""
    assert cli.main(["data", "pack", str(trained.val), str(tmp_path / "pack"), "--stage", "raw73"]) == 0
    model = load_model(trained.run)
    model.preprocessing = replace(model.preprocessing, short=short)
    with open_source(str(tmp_path / "pack"), model) as source:
        index, tile = source.index, next(tiles(model, source))
        expected = np.empty((64, 64, 3), np.uint8)
        for row in range(3):
            whole = np.frombuffer(index.read(row), np.uint8).reshape(73, 73, 3)
            held = BytesIO()
            Image.fromarray(whole).save(held, "png")
            PillowDecoder(quality="antialias")(held.getvalue(), model.preprocessing.choose()[0], expected)
            shown = tile.images[row, 0].numpy().astype(int)
            assert np.abs(shown - expected).max() <= (0 if short == 73 else 2)


def test_ranks_with_different_weights_are_refused(trained: Trained) -> None:
    """Of a run that is training they might read two of its states: all ranks end with one message."""
    with command_module.group("cpu") as world:
        command_module.check_same(world, "a", "never said")
    told = ["a", "b"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="said"):
        patch.setattr(command_module.dist, "all_gather_object", lambda into, value, group: into.__setitem__(
            slice(None), told))
        command_module.check_same(SimpleNamespace(size=2, control=None), "a", "said")
