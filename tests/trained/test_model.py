"""load_model on a run."""

import json
import shutil
from pathlib import Path

import torch

from alexnet_ddp import load_model
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
