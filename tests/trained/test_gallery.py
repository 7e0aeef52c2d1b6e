"""`alexnet-ddp visualize`: kernels, curves and worst mistakes show what the run and the net really hold."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from alexnet_ddp import cli, load_model
from alexnet_ddp.data.index import open_index
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER, UserError
from alexnet_ddp.models import create_model
from alexnet_ddp.sinks import read_records
from alexnet_ddp.trained import gallery, gallery_command
from alexnet_ddp.trained.evaluation import evaluate_model
from alexnet_ddp.trained.tiles import open_source, tiles
from trained_nets import Trained

pytest.importorskip("matplotlib", reason="the extra `plots` isn't installed: no picture was drawn")


def test_kernels_are_scaled_each_by_itself() -> None:
    """Each kernel runs from 0 to 1 over all its channels, whatever the others are; a constant one is grey."""
    weight = np.random.default_rng(0).normal(size=(4, 3, 5, 6)).astype(np.float32)
    weight[1] *= 100
    weight[2] = 3
    shown = gallery.scaled_kernels(weight)
    assert shown.shape == (4, 5, 6, 3)
    for number in (0, 1, 3):
        assert shown[number].min() == 0 and shown[number].max() == 1
        back = shown[number] * np.ptp(weight[number]) + weight[number].min()
        np.testing.assert_allclose(back, weight[number].transpose(1, 2, 0), rtol=1e-4, atol=1e-4)
    assert (shown[2] == 0.5).all()


@pytest.mark.parametrize(("kernels", "columns"), [(96, 16), (64, 16), (24, 6), (8, 4), (1, 2), (7, 5)])
def test_grid(kernels: int, columns: int) -> None:
    """The full nets' 96 kernels make six rows of 16, as in the paper's figure; others about that shape."""
    assert gallery.columns_for(kernels) == columns


def test_the_sheet_shows_the_kernels() -> None:
    """Kernel 17 of the paper's net stands second in the second row, pixel by pixel, after an edge of white."""
    model = load_model("alexnet_paper", ["model.num_classes=2", "augment.size=64"])
    axis, = gallery.kernels(model).axes
    sheet = axis.images[0].get_array()
    assert sheet.shape == (6 * 12 + 1, 16 * 12 + 1, 3)
    shown = gallery.scaled_kernels(model.net.features.block1.conv.weight.numpy())
    assert np.array_equal(sheet[13:24, 13:24], shown[17]) and (sheet[12] == 1).all() and (sheet[:, 12] == 1).all()
    assert "96 kernels of 11x11x3" in axis.get_title() and "upper half: first tower" in axis.get_title()


def test_nets_without_such_kernels() -> None:
    """A net without convolutions, or whose first one sees four channels, is refused in a sentence; a grey one isn't."""
    with pytest.raises(UserError, match="no convolution"):
        gallery.first_convolution(nn.Sequential(nn.Flatten(), nn.Linear(3, 4)))
    with pytest.raises(UserError, match=r"first convolution of this net \(0\) has 4 input channels"):
        gallery.first_convolution(nn.Sequential(nn.Conv2d(4, 3, 3)))
    assert gallery.first_convolution(create_model("alexnet_bn", in_channels=1, width=0.1))[0] == "features.block1.conv"


def test_curves_are_the_records(trained: Trained) -> None:
    """Every point of the curves is a record of metrics.jsonl; a run without any says so."""
    records = read_records(trained.run / "metrics.jsonl")
    loss, accuracy, rate = gallery.curves(records, title="x").axes
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "evaluate"]
    assert train and held_out
    for axis, place, of, field, factor in ((loss, 0, train, "loss", 1), (loss, 1, held_out, "loss", 1),
                                           (accuracy, 0, train, "top1", 100), (accuracy, 2, held_out, "top5", 100),
                                           (rate, 0, train, "lr", 1)):
        x, y = axis.lines[place].get_data()
        assert list(x) == [record["step"] for record in of]
        assert list(y) == [record[field] * factor for record in of]
    with pytest.raises(UserError, match="no records"):
        gallery.curves([], title="x")


def test_worst_mistakes(trained: Trained) -> None:
    """They are the wrong answers of highest loss, worst first, with the classes, the probability and the picture that
    the net was shown."""
    model = load_model(trained.run)
    with open_source(str(trained.val), model) as source:
        worst = gallery.worst_mistakes(model, source, evaluate_model(model, source), most=5)
        logits = torch.cat([model.logits(tile.images[:, 0]) for tile in tiles(model, source)])[:len(source)]
        images = torch.cat([tile.images[:, 0] for tile in tiles(model, source)])
        labels = torch.from_numpy(source.labels).long()
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        losses[logits.argmax(1) == labels] = -1
        assert [one.sample for one in worst] == losses.argsort(descending=True)[:5].tolist()
        for one in worst:
            shares = logits[one.sample].softmax(0)
            assert one.true == model.classes[labels[one.sample]] == one.name.split("/")[0]
            assert one.predicted == model.classes[int(shares.argmax())] != one.true
            assert one.probability == pytest.approx(float(shares.max()), abs=1e-6)
        axes = gallery.mistakes(model, source, worst, title="x").axes
        for axis, one in zip(axes, worst, strict=True):
            assert np.array_equal(axis.images[0].get_array(), images[one.sample].numpy())
            assert f"taken for {one.predicted}" in axis.get_title()


def test_the_command_on_a_run(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three pictures, the same bytes each time, and a table of the mistakes whose names are in the data."""
    written = []
    for name in ("a", "b"):
        assert cli.main(["visualize", str(trained.run), "--out", str(tmp_path / name), "--format", "svg",
                         "--mistakes", "6", "--device", "cpu"]) == EXIT_FINISHED
        written.append({path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())})
    assert written[0] == written[1] and set(written[0]) == {"kernels.svg", "curves.svg", "mistakes.svg"}
    assert b"held out, top-1" in written[0]["curves.svg"]
    listed = re.findall(r"^\| (\w+/\w+) ", capsys.readouterr().out, re.MULTILINE)
    with open_index(str(trained.val)) as index:
        assert len(listed) == 12 and set(listed) <= {index.name(sample) for sample in range(len(index))}


@pytest.mark.parametrize("count", [-1, 501])
def test_how_many_mistakes(trained: Trained, tmp_path: Path, count: int) -> None:
    """More than a picture has room for are refused before anything is drawn."""
    with pytest.raises(UserError, match=f"between 0 and 500, got {count}"):
        gallery_command.main([str(trained.run), "--out", str(tmp_path / "out"), "--mistakes", str(count)])
    with pytest.raises(UserError, match=f"between 0 and 500, got {count}"):
        gallery_command.visualize(load_model(trained.run), None, out=tmp_path / "out", most=count)
    assert not (tmp_path / "out").exists()


def test_the_command_on_others(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    """A file of weights has kernels alone, and it is said; where data are missing, so is what was drawn; so are
    matplotlib and the folder that pictures are to go to."""
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((trained.run / "best.safetensors").read_bytes())
    told = ["model.name=alexnet_single", "model.width=0.25", "model.num_classes=4", "augment.size=64"]

    def said(*words: str, code: int) -> str:
        assert cli.main(["visualize", *words, "--device", "cpu"]) == code
        return "".join(capsys.readouterr())

    output = said(str(weights), *told, "--out", str(tmp_path / "out"), code=EXIT_FINISHED)
    assert "is no run: no training curves" in output and "no mistakes shown" in output
    drawn, = (tmp_path / "out").iterdir()
    assert drawn.name == "kernels.png" and drawn.read_bytes().startswith(b"\x89PNG")
    assert "say with --out DIR" in said(str(weights), *told, code=EXIT_USER)
    output = said(str(trained.run), f"data.val={tmp_path}/none", "--out", str(tmp_path / "run"), code=EXIT_USER)
    assert "curves.png" in output and "--mistakes 0" in output
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"kernels.png", "curves.png"}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'alexnet-ddp[plots]'" in said(str(trained.run), code=EXIT_USER)
    assert not (trained.run / "pictures").exists()
