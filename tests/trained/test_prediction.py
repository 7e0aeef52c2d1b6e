"""predict: every picture in the order it was named, wherever it lies; what can't be read is told, the rest goes on."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from alexnet_ddp import cli, load_model
from alexnet_ddp.errors import EXIT_USER
from alexnet_ddp.trained.pictures import find_pictures
from alexnet_ddp.trained.prediction import views
from alexnet_ddp.trained.tiles import open_source, tiles
from stores import make_tar, tar_bytes
from trained_nets import Trained


@pytest.fixture(scope="module")
def pictures(trained: Trained) -> list[Path]:
    return sorted(trained.val.rglob("*.jpg"))[::17][:9]


@pytest.fixture(scope="module")
def mixed(trained: Trained, pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nested folders of pictures, one of them a text file, one torn."""
    root = tmp_path_factory.mktemp("mixed")
    for number, path in enumerate(pictures):
        place = root / ("top", "top/below", "top/below/again")[number % 3] / f"{number + 5}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    (root / "top" / "below" / "again").rename(root.parent / f"{root.name}-again")
    (root / "top" / "below" / "again").symlink_to(root.parent / f"{root.name}-again")
    (root / "top" / "20.jpg").write_text("no picture at all")
    (root / "top" / "21.jpg").write_bytes(pictures[0].read_bytes()[:900])
    (root / "top" / "notes.txt").write_text("left alone")
    (root / "top" / "._5.jpg").write_text("macOS leaves these")
    return root


def test_the_classes_of_the_net(trained: Trained, tmp_path: Path) -> None:
    """The top answers are the net's own probabilities of every picture, sorted, for one crop and for ten."""
    model = load_model(trained.run)
    for path in sorted(trained.val.rglob("*.jpg"))[::5]:
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    for crops in (1, 10):
        with open_source(str(tmp_path), model) as source:
            expected = torch.cat([model.probabilities(tile.images)[tile.counts]
                                  for tile in tiles(model, source, crops=crops)])
        found = model.classify([tmp_path], top=3, crops=crops)
        assert len(found) == len(expected) and all(answer.error is None for answer in found)
        shares, numbers = expected.sort(1, descending=True)
        assert [[guess.label for guess in answer.guesses] for answer in found] == [
            [model.classes[number] for number in row] for row in numbers[:, :3].tolist()]
        assert torch.equal(torch.tensor([[guess.probability for guess in answer.guesses] for answer in found]),
                           shares[:, :3])
    right = sum(answer.guesses[0].label == Path(answer.where).parent.name for answer in found)
    assert right > 0.6 * len(found)


def test_order_of_pictures(mixed: Path, pictures: list[Path], tmp_path: Path) -> None:
    """Arguments as given, folders by natural order at any depth, tars (and tars in them) in their own order."""
    tar = make_tar(tmp_path / "a.tar", {
        "z/9.jpg": pictures[1].read_bytes(), "readme.md": b"x", "a/1.jpeg": pictures[2].read_bytes(),
        "more.tar": tar_bytes({"q.png": pictures[3].read_bytes()}), "._z.jpg": b"clutter"})
    odd = tmp_path / "picture"
    shutil.copy(pictures[0], odd)
    found = find_pictures([str(odd), str(tar), str(mixed / "top"), str(odd), f"{tar}::a"], stored="original")
    where = [found.where(sample) for sample in range(len(found))]
    top = mixed / "top"
    assert where == [str(odd), f"{tar}::z/9.jpg", f"{tar}::a/1.jpeg", f"{tar}::more/q.png",
                     *(str(top / name) for name in ("5.jpg", "8.jpg", "11.jpg", "20.jpg", "21.jpg")),
                     *(str(top / "below" / name) for name in ("6.jpg", "9.jpg", "12.jpg")),
                     *(str(top / "below/again" / name) for name in ("7.jpg", "10.jpg", "13.jpg")),
                     str(odd), f"{tar}::a/1.jpeg"]
    assert [found.read(sample) for sample in range(4)] == [path.read_bytes() for path in pictures[:4]]


def test_unreadable_pictures_and_formats(trained: Trained, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of eleven are told of, in every format and on stderr, and the rest is answered; all formats say the same."""
    bad = {str(mixed / "top" / "20.jpg"): "not a JPEG or PNG"}
    printed = {}
    for kind in ("jsonl", "csv", "table"):
        assert cli.main(["predict", str(trained.run), str(mixed), "--format", kind, "--top", "2"]) == 0
        out, err = capsys.readouterr()
        printed[kind] = out
        assert "11 pictures in" in err and "a second; 2 of them can't be read" in err
        assert all(f"{path}: {why}" in err for path, why in bad.items())
    told = [json.loads(line) for line in printed["jsonl"].splitlines()]
    assert len(told) == 11 and [Path(each["path"]).name for each in told if "error" in each] == ["20.jpg", "21.jpg"]
    shares = [[guess["probability"] for guess in each["top"]] for each in told if "top" in each]
    assert all(1 >= first >= second > 0 for first, second in shares)
    rows = list(csv.DictReader(io.StringIO(printed["csv"])))
    assert [(row["path"], row["class"], float(row["probability"])) for row in rows if not row["error"]] == [
        (each["path"], guess["class"], guess["probability"]) for each in told for guess in each.get("top", [])]
    assert [row["path"] for row in rows if row["error"]] == [each["path"] for each in told if "error" in each]
    lines = printed["table"].splitlines()
    assert len(lines) == 9 * 3 + 2 and lines[0] == told[0]["path"]
    assert lines[1].split()[1] == told[0]["top"][0]["name"]


def test_none_can_be_read(trained: Trained, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and what was wrong with each; a file without permission is one of them."""
    assert cli.main(["predict", str(trained.run), str(mixed / "top" / "20.jpg"), str(mixed / "top/notes.txt")]) == 2
    assert capsys.readouterr().err.count("not a JPEG or PNG") == 2
    gone = find_pictures([str(shutil.copy(mixed / "top" / "5.jpg", tmp_path / "5.jpg"))], stored="original")
    os.unlink(tmp_path / "5.jpg")
    model = load_model(trained.run)
    assert not views(model, gone)[0].any()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_picture_of_the_answers(trained: Trained, mixed: Path, tmp_path: Path, suffix: str,
                                capsys: pytest.CaptureFixture[str]) -> None:
    """--show draws the pictures with their bars, the unreadable ones with the reason."""
    path = tmp_path / f"answers{suffix}"
    assert cli.main(["predict", str(trained.run), str(mixed), "--show", str(path)]) == 0
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    if suffix == ".svg":
        model = load_model(trained.run)
        assert all(data.count(f">{name}<".encode()) == 9 for name in model.classes)
        assert data.count(b">not a JPEG or PNG<") == 1 and data.count(b"<image") == 11


@pytest.mark.parametrize("stored", ["short80", "raw80"])
def test_stages(trained: Trained, stored: str) -> None:
    """A net that was trained on a stored stage gets pictures through that stage, as evaluate gives them to it."""
    model = load_model(trained.run, [f"data.stored={stored}"])
    with open_source(str(trained.val), model) as source:
        tile = next(tiles(model, source))
    found = model.classify([sorted(trained.val.rglob("*.jpg"))[0]], top=4)[0]
    assert [guess.probability for guess in found.guesses] == pytest.approx(
        model.probabilities(tile.images)[0].sort(descending=True).values.tolist(), abs=1e-6)


@pytest.mark.parametrize(("words", "said"), [
    ([], "predict takes pictures"),
    (["/no/where.jpg"], "/no/where.jpg: nothing is there"),
    (["EMPTY"], "holds no pictures"),
    (["EMPTY/a.tar.gz"], "compressed"),
    (["EMPTY/torn.tar"], "cut short"),
    (["EMPTY/../circle"], "is a link to a directory that contains it"),
    (["GOOD", "--crops", "5"], "crops must be 1 (the centre) or 10"),
    (["GOOD", "--top", "0"], "--top takes a number of classes above 0"),
    (["GOOD", "--format", "xml"], "--format"),
    (["GOOD", "--show", "no/where/x.png"], "can't be written: No such file"),
    (["GOOD", "--show", "x.pdf"], "--show takes a name that ends in .png or .svg"),
    (["GOOD", "model.widht=1"], "widht"),
    (["~nobody-here/x.jpg"], "~nobody-here/x.jpg: nothing is there"),
    (["GOOD", "--show", "~nobody-here/x.png"], "can't be written: No such file"),
    (["GOOD", "crops=10"], "crops=10: the number of crops is a flag here"),
])
def test_bad_words(trained: Trained, pictures: list[Path], tmp_path: Path, words: list[str], said: str,
                   capsys: pytest.CaptureFixture[str]) -> None:
    """A user's mistake is one message that says what to change, before anything is answered."""
    empty = tmp_path / "empty"
    empty.mkdir()
    if words and "a.tar.gz" in words[0]:
        (empty / "a.tar.gz").write_bytes(b"\x1f\x8b")
    if words and "torn" in words[0]:
        whole = tar_bytes({"a.jpg": pictures[0].read_bytes()})
        (empty / "torn.tar").write_bytes(whole[:1500])
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / "again").symlink_to(tmp_path)
    words = [word.replace("EMPTY", str(empty)).replace("GOOD", str(pictures[0])) for word in words]
    assert cli.main(["predict", str(trained.run), *words]) == EXIT_USER
    out, err = capsys.readouterr()
    assert said in err and not out
