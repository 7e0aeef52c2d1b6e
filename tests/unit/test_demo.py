"""The demo's data."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from alexnet_ddp.cli import main
from alexnet_ddp.data.tools.demo import CLASSES, MANIFEST, ORIENTATION, SIDES, SPLITS, make_demo
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER, UserError

CHANCE = 1 / len(CLASSES)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo") / "data", train_per_class=60, val_per_class=50)


def files(demo: Path) -> list[Path]:
    return sorted(demo.rglob("*.jpg"))


def digests(demo: Path) -> dict[str, str]:
    return {str(f.relative_to(demo)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files(demo)}


def mean_colours(demo: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean RGB of each image, scaled to -1..1: float64 [n, 3]; labels: int64 [n]."""
    images = sorted((demo / split).glob("*/*.jpg"))
    means = [np.asarray(Image.open(image).convert("RGB"), np.float64).mean((0, 1)) for image in images]
    return np.array(means) / 127.5 - 1, np.array([CLASSES.index(image.parent.name) for image in images])


def nearest_centroid(x: np.ndarray, y: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    centroids = np.array([x[y == label].mean(0) for label in range(len(CLASSES))])
    return ((unseen[:, None] - centroids) ** 2).sum(-1).argmin(1)


def nearest_neighbours(x: np.ndarray, y: np.ndarray, unseen: np.ndarray, count: int = 15) -> np.ndarray:
    nearest = ((unseen[:, None] - x) ** 2).sum(-1).argsort(1)[:, :count]
    return np.array([np.bincount(y[row], minlength=len(CLASSES)).argmax() for row in nearest])


def quadratic_logistic(x: np.ndarray, y: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Multinomial logistic regression on the colours and their squares and products, by gradient descent."""

    def features(c: np.ndarray) -> np.ndarray:
        products = c[:, [0, 0, 0, 1, 1, 2]] * c[:, [0, 1, 2, 1, 2, 2]]
        return np.hstack([np.ones((len(c), 1)), c, products])

    f, target = features(x), np.eye(len(CLASSES))[y]
    weights = np.zeros((f.shape[1], len(CLASSES)))
    for _ in range(500):
        scores = np.exp(f @ weights)
        weights += 1.0 * f.T @ (target - scores / scores.sum(1, keepdims=True)) / len(f)
    return (features(unseen) @ weights).argmax(1)


@pytest.mark.parametrize("classifier", [nearest_centroid, nearest_neighbours, quadratic_logistic])
def test_mean_colour_does_not_tell_the_classes_apart(demo: Path, classifier) -> None:
    """On held-out images every classifier on mean colour stays under 1.5 times chance."""
    (x, y), (unseen, truth) = mean_colours(demo, "train"), mean_colours(demo, "val")
    assert (classifier(x, y, unseen) == truth).mean() < 1.5 * CHANCE


def test_images_vary_as_photographs_do(demo: Path) -> None:
    """Sizes vary, and each class has a grey, a progressive and a turned file; all are intact JPEGs."""
    sizes = set()
    for file in files(demo):
        with Image.open(file) as image:
            image.load()
            sizes.add(image.size)
            assert image.format == "JPEG"
            assert all(SIDES[0] <= side <= SIDES[1] for side in image.size)
            assert (image.mode == "L") == (file.stem == "0000")
            assert ("progressive" in image.info) == (file.stem == "0001")
            assert (ORIENTATION in image.getexif()) == (file.stem == "0002")
    assert len(sizes) > 1000
    assert min(w / h for w, h in sizes) < 0.6 < 1.6 < max(w / h for w, h in sizes)


def test_turned_file_shows_its_class_after_the_exif_turn(demo: Path) -> None:
    """The horizontal stripes that are stored turned change from row to row once the EXIF tag is obeyed."""
    with Image.open(demo / "train" / "stripes_horizontal" / "0002.jpg") as image:
        shown = np.asarray(ImageOps.exif_transpose(image).convert("L"), np.float64)
    down, across = np.abs(np.diff(shown, axis=0)).mean(), np.abs(np.diff(shown, axis=1)).mean()
    assert down > across


def test_train_and_val_share_no_image(demo: Path) -> None:
    """Held-out images are none of the training images, and no image occurs twice."""
    all_digests = digests(demo)
    assert {path.split("/")[0] for path in all_digests} == set(SPLITS)
    assert len(set(all_digests.values())) == len(all_digests) == len(CLASSES) * (60 + 50)


def test_same_seed_same_bytes_and_more_images_keep_the_first(tmp_path: Path) -> None:
    """An image depends on (seed, split, class, number) alone."""
    one = digests(make_demo(tmp_path / "one", train_per_class=3, val_per_class=1))
    two = digests(make_demo(tmp_path / "two", train_per_class=4, val_per_class=1))
    other = digests(make_demo(tmp_path / "other", seed=1, train_per_class=3, val_per_class=1))
    assert one.items() < two.items()
    assert not set(one.values()) & set(other.values())


def test_fewer_classes_keep_their_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`data demo DST --classes N` draws the first N kinds, the same pictures as among all; numbers out of range are
    refused."""
    few = str(tmp_path / "few")
    assert main(["data", "demo", few, "--classes", "2", "--per-class", "4"]) == EXIT_FINISHED
    assert "2 classes, 4 pictures of each to train on, 50 held out" in capsys.readouterr().out
    assert {path.split("/")[1] for path in digests(tmp_path / "few")} == set(CLASSES[:2])
    all_kinds = digests(make_demo(tmp_path / "all", train_per_class=4, val_per_class=1))
    assert {path: digest for path, digest in digests(tmp_path / "few").items() if path in all_kinds} == {
        path: digest for path, digest in all_kinds.items() if path.split("/")[1] in CLASSES[:2]}
    for words, said in ((["--classes", "13"], "use --classes 2 to 12"), (["--per-class", "0"], "use 1 or more"),
                        (["--classes", "ten"], "invalid int value")):
        assert main(["data", "demo", few, *words]) == EXIT_USER
        assert said in capsys.readouterr().err


def test_complete_data_is_kept_and_incomplete_data_made_anew(tmp_path: Path) -> None:
    """A second call touches nothing; after a lost file or with other counts all is made anew."""
    dst = make_demo(tmp_path / "data", train_per_class=2, val_per_class=1)
    before, inode = digests(dst), dst.stat().st_ino
    assert make_demo(dst, train_per_class=2, val_per_class=1).stat().st_ino == inode

    (dst / "val" / CLASSES[3] / "0000.jpg").unlink()
    assert digests(make_demo(dst, train_per_class=2, val_per_class=1)) == before
    assert len(files(make_demo(dst, train_per_class=1, val_per_class=1))) == 2 * len(CLASSES)
    assert os.listdir(tmp_path) == ["data"]


def test_interrupted_work_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When making is cut short no folder is there that could be taken for the data."""
    monkeypatch.setattr("alexnet_ddp.data.tools.demo.draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_demo(tmp_path / "data", train_per_class=1, val_per_class=1)
    assert os.listdir(tmp_path) == []


def test_other_peoples_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that holds anything but demo data is refused with one message, and stays as it was."""
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        make_demo(tmp_path)
    assert main(["data", "demo", str(tmp_path)]) == EXIT_USER
    assert "something else" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["photo.jpg"]

    shutil.rmtree(tmp_path)
    assert (make_demo(tmp_path, train_per_class=1, val_per_class=1) / MANIFEST).is_file()


def test_what_was_put_beside_the_demo_data_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Demo data is replaced by other demo data, but not where something else was put beside it; nor where no folder can
    be made."""
    place = str(tmp_path / "d")
    assert main(["data", "demo", place, "--classes", "2", "--per-class", "1"]) == EXIT_FINISHED
    (tmp_path / "d" / "mine.txt").write_text("mine")
    assert main(["data", "demo", place, "--classes", "3", "--per-class", "1"]) == EXIT_USER
    assert "something else" in capsys.readouterr().err
    assert (tmp_path / "d" / "mine.txt").read_text() == "mine"
    assert main(["data", "demo", f"{place}/mine.txt/x", "--classes", "2", "--per-class", "1"]) == EXIT_USER
    assert "can't be made" in capsys.readouterr().err
