"""evaluate: the run's own counts, the same on any number of ranks, damaged images, labels of the devkit, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import harness
from alexnet_ddp import cli, load_model, tables
from alexnet_ddp.errors import EXIT_INTERRUPTED, EXIT_USER
from alexnet_ddp.evaluate import TILE
from alexnet_ddp.trained import evaluation
from alexnet_ddp.trained.evaluation import NONE, WRONG, Outcomes, evaluate_model
from alexnet_ddp.trained.tiles import open_source
from launch import agent
from stores import devkit, make_devkit, make_tar
from trained_nets import Trained

TIMES = ("seconds", "images_per_second", "ranks")


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """What `evaluate WORDS --json` prints."""
    assert cli.main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_runs_own_record(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """One crop of a run's best weights: counts and loss are those that the run has logged."""
    step = json.loads((trained.run / "best.json").read_text())["step"]
    record, = (each for each in harness.metrics(trained.run) if each["kind"] == "evaluate" and each["step"] == step)
    found = told(capsys, trained.run)
    names = ("samples", "correct1", "correct5", "damaged", "top1", "top5")
    assert {name: found[name] for name in names} == {name: record[name] for name in names}
    assert found["loss"] == pytest.approx(record["loss"], rel=1e-6)
    assert 0 < found["correct1"] < found["samples"]
    assert cli.main(["validate", str(trained.run)]) == 0
    assert f"{found['correct1']:,} right" in capsys.readouterr().out


@pytest.fixture(scope="module")
def some(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventy of the held-out pictures: two tiles and a part of one."""
    place = tmp_path_factory.mktemp("some")
    for path in sorted(trained.val.rglob("*.jpg"))[::2][:70]:
        to = place / path.relative_to(trained.val)
        to.parent.mkdir(exist_ok=True)
        shutil.copy(path, to)
    return place


@pytest.fixture
def damaged(some: Path, tmp_path: Path) -> Path:
    """The same with one file that is no image and one that was cut."""
    place = shutil.copytree(some, tmp_path / "val")
    first, second = sorted(place.rglob("*.jpg"))[3], sorted(place.rglob("*.jpg"))[68]
    first.write_text("no image")
    second.write_bytes(second.read_bytes()[:-400])
    return place


@pytest.mark.parametrize(("crops", "worlds"), [("1", (1, 2, 3)), ("10", (1, 2))])
def test_any_number_of_ranks(trained: Trained, damaged: Path, crops: str, worlds: tuple[int, ...]) -> None:
    """One, two and three ranks print the same JSON, per class and damaged images included."""
    words = ["evaluate", str(trained.run), f"data.val={damaged}", "--json", "--per-class", "--crops", crops]
    found = []
    for world in worlds:
        lines = harness.run(words, world=world).check().output.splitlines()
        told, = (json.loads(line) for line in lines if line.startswith("{"))
        assert told["ranks"] == world
        found.append({name: value for name, value in told.items() if name not in TIMES})
    assert all(one == found[0] for one in found)
    assert found[0]["damaged"] == 2 and len(found[0]["damaged_images"]) == 2


def test_damaged_images_are_wrong_and_named(trained: Trained, some: Path, damaged: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """They count in `samples` and nowhere else; all other answers are those that they were."""
    model = load_model(trained.run)
    with open_source(str(some), model) as source:
        before = evaluate_model(model, source)
    with open_source(str(damaged), model) as source:
        after = evaluate_model(model, source, batch=1, threads=1)
    bad = sorted(after.reasons)
    assert bad == [3, 68]
    others = np.setdiff1d(np.arange(len(before)), bad)
    for name in ("labels", "predictions", "ranks", "losses", "confidences"):
        assert np.array_equal(getattr(before, name)[others], getattr(after, name)[others])
    assert after.predictions[bad].tolist() == [NONE] * 2 and after.ranks[bad].tolist() == [WRONG] * 2
    right = int((before.ranks[bad] == 0).sum())
    assert after.evaluation.correct1 == before.evaluation.correct1 - right and after.evaluation.samples == len(before)
    assert after.evaluation.loss == pytest.approx(before.losses[others].mean())
    assert cli.main(["evaluate", str(trained.run), f"data.val={damaged}"]) == 0
    out = capsys.readouterr().out
    assert f"{sorted(damaged.rglob('*.jpg'))[3]}: not a JPEG or PNG" in out and "2 images, counted as wrong" in out


def test_answers_are_those_of_the_net(trained: Trained, some: Path) -> None:
    """Predictions, places, losses and confidences against softmax and sorting, sample by sample in float64."""
    model = load_model(trained.run)
    with open_source(str(some), model) as source:
        found = evaluate_model(model, source)
        logits = np.concatenate([model.logits(tile.images[:, 0])[tile.counts].double().numpy()
                                 for tile in evaluation.tiles(model, source)])
        labels = source.labels
    rows = np.arange(len(labels))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.array_equal(found.predictions, shares.argmax(1))
    assert np.array_equal(found.ranks, (shares > shares[rows, labels][:, None]).sum(1))
    np.testing.assert_allclose(found.losses, -np.log(shares[rows, labels]), atol=1e-5)
    np.testing.assert_allclose(found.confidences, shares.max(1), atol=1e-6)


def test_names_that_would_break_a_table() -> None:
    """A line break or a bar in a class's name stays within its cell."""
    row = tables.markdown([["class", "n"], ["two\nlines|bar", "1"]]).splitlines()[2]
    assert row == "| two lines\\|bar |   1 |"


def test_tables_are_counted_right() -> None:
    """Confusion and per-class numbers of a case worked out by hand; who gave no answer stands in neither."""
    outcomes = Outcomes(labels=np.array([0, 0, 0, 1, 2]), predictions=np.array([0, 2, 2, 1, NONE]),
                        confidences=np.zeros(5), ranks=np.array([0, 1, 7, 0, WRONG]), losses=np.arange(5.0),
                        reasons={4: "torn"}, classes=4)
    assert outcomes.confusion().tolist() == [[1, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert {name: column.tolist() for name, column in outcomes.per_class().items()} == {
        "samples": [3, 1, 1, 0], "correct1": [1, 1, 0, 0], "correct5": [2, 1, 0, 0], "mistaken": [2, NONE, NONE, NONE]}
    found = outcomes.evaluation
    assert (found.correct1, found.correct5, found.damaged, found.loss) == (2, 3, 1, 10.0 / 4)


def test_a_net_that_gives_no_numbers(trained: Trained, some: Path) -> None:
    """Not-a-number logits are never right, and taken for no class, even of four."""
    model = load_model(trained.run)
    model.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4)).eval()
    with open_source(str(some), model) as source, torch.no_grad():
        model.net(torch.zeros(1, 3, model.preprocessing.size, model.preprocessing.size))
        model.net[1].weight.fill_(float("nan"))
        found = evaluate_model(model, source)
    assert (found.predictions == NONE).all() and found.evaluation.correct5 == 0


def test_labels_of_the_devkit(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ImageNet's flat validation tar with the devkit beside it: answers as in folders; names beside the ids."""
    ids = ["n01440764", "n01443537", "n01484850", "n01491361"]
    run = shutil.copytree(trained.run, tmp_path / "run")
    (run / "classes.json").write_text(json.dumps(ids))
    in_kit = [ids[2], ids[0], ids[3], ids[1]]  # whose order isn't that of the ids
    kinds = sorted(path.name for path in trained.val.iterdir())
    pictures = sorted(trained.val.rglob("*.jpg"))[::3]
    truth = [in_kit.index(ids[kinds.index(path.parent.name)]) + 1 for path in pictures]
    make_devkit(tmp_path, devkit(in_kit, truth))
    tar = make_tar(tmp_path / "ILSVRC2012_img_val.tar", {
        f"ILSVRC2012_val_{number:08d}.JPEG": path.read_bytes() for number, path in enumerate(pictures, start=1)})
    for path in pictures:
        to = tmp_path / "folders" / ids[kinds.index(path.parent.name)] / f"{path.parent.name}{path.name}"
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    official = told(capsys, run, f"data.val={tar}", "--per-class")
    folders = told(capsys, run, f"data.val={tmp_path / 'folders'}", "--per-class")
    assert official["per_class"] == folders["per_class"] and official["samples"] == len(pictures)
    assert official["correct1"] == folders["correct1"] > len(pictures) / 2
    assert [row["name"] for row in official["per_class"]][:2] == ["tench", "goldfish"]
    assert cli.main(["evaluate", str(run), f"data.val={tar}", "--per-class"]) == 0
    assert "n01484850 great white shark" in capsys.readouterr().out


def test_a_net_without_names(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a run's classes.json is lost, the data's own classes are taken in their order, which is said."""
    run = shutil.copytree(trained.run, tmp_path / "run")
    (run / "classes.json").unlink()
    known = told(capsys, trained.run, "--per-class")["per_class"]
    assert cli.main(["evaluate", str(run), "--json", "--per-class"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["per_class"] == known
    assert "are taken in their order" in err and "they are numbers" not in err


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_confusion_picture(trained: Trained, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--confusion writes a picture of its kind; an .svg holds the counts and names that are drawn."""
    path = tmp_path / f"confusion{suffix}"
    assert cli.main(["evaluate", str(trained.run), "--confusion", str(path)]) == 0
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml") and str(path) in capsys.readouterr().err
    if suffix == ".svg":
        model = load_model(trained.run)
        with open_source(str(trained.val), model) as source:
            counts = evaluate_model(model, source).confusion()
        assert all(f">{count}<".encode() in data for count in counts[counts > 0].tolist())
        assert all(f">{name}<".encode() in data for name in model.classes)


@pytest.mark.parametrize(("words", "said"), [
    (["data.val=/no/where"], "data.val=/no/where: nothing is there"),
    (["data.val=null"], "doesn't say what it is to be evaluated on"),
    (["data.vall=x"], "data.vall"),
    (["crops=10"], "crops=10: the number of crops is a flag here: --crops 10"),
    (["evaluate.crops=10"], "--crops 10"),
    (["--crops", "5"], "crops must be 1 (the centre) or 10"),
    (["--crops", "ten"], "--crops"),
    (["--confusion", "x.gif"], "--confusion takes a name that ends in .png or .svg"),
    (["--confusion", "no/where/x.png"], "can't be written: No such file"),
    (["--nproc-per-node", "0"], "--nproc-per-node takes a number of ranks above 0"),
    (["--batch-size", "8"], "--batch-size is not known here"),
])
def test_bad_words(trained: Trained, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A user's mistake is one message that says what to change, and exit code 2."""
    assert cli.main(["evaluate", str(trained.run), *words]) == EXIT_USER
    assert said in capsys.readouterr().err


def test_bad_data_and_runs(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes the net doesn't know, a folder without images, a run that has no best weights."""
    (tmp_path / "others" / "cow").mkdir(parents=True)
    shutil.copy(next(trained.val.rglob("*.jpg")), tmp_path / "others" / "cow")
    (tmp_path / "empty" / "cow").mkdir(parents=True)
    run = shutil.copytree(trained.run, tmp_path / "run")
    (run / "best.safetensors").unlink()
    for words, said in (([trained.run, f"data.val={tmp_path / 'others'}"], "classes that the net doesn't know: cow"),
                        ([trained.run, f"data.val={tmp_path / 'empty'}"], f"data.val={tmp_path / 'empty'}"),
                        ([run], f"{run}@last")):
        assert cli.main(["evaluate", *map(str, words)]) == EXIT_USER
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--nproc-per-node", "2"], ["--nproc_per_node=2"], ["--nproc-per", "2"]])
def test_ranks_of_this_machine(flag: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """--nproc-per-node starts that many ranks with all the other words, in their order."""
    started: list[Any] = []
    monkeypatch.setattr(agent, "launch", lambda words, ranks: started.append((words, ranks)) or 7)
    assert cli.main(["evaluate", "RUN", *flag, "data.val=x", "--crops", "10"]) == 7
    assert started == [(["evaluate", "RUN", "data.val=x", "--crops", "10"], 2)]


def test_ctrl_c(trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ends the command with 130, no traceback, and no thread left to hang on."""
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "_judge", interrupt)
    assert cli.main(["evaluate", str(trained.run)]) == EXIT_INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err


def test_batch_moves_nothing(trained: Trained, some: Path) -> None:
    """However many tiles are decoded at a time, and whoever decodes them, the answers have the same bits."""
    model = load_model(trained.run)
    with open_source(str(some), model) as source:
        found = [evaluate_model(model, source, batch=batch, threads=threads) for batch, threads in ((1, 1), (9, 2))]
        assert len(source) % TILE
    assert all(np.array_equal(getattr(found[0], name), getattr(found[1], name))
               for name in ("predictions", "ranks", "losses", "confidences"))
