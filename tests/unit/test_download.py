"""CIFAR-10 as folders: the conversion on a made-up data set, and the ways in which fetching can fail."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.tools import download
from alexnet_ddp.errors import UserError


class Pictures:
    """As torchvision's CIFAR10: PIL images with labels, class names in `classes`."""

    classes = ["cat", "airplane"]

    def __init__(self, count: int, *, fails: Exception | None = None) -> None:
        noise = np.random.default_rng(count)
        self.pixels = noise.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.fails = fails

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for number, pixels in enumerate(self.pixels):
            if self.fails and number == 3:
                raise self.fails
            yield Image.fromarray(pixels), number % 2


def test_pictures_become_folders_without_loss(tmp_path: Path) -> None:
    """Each picture lies under its class with its number as name, and has the same pixels."""
    train, test = Pictures(6), Pictures(4)
    download.write_splits({"train": train, "test": test}, tmp_path / "cifar10")
    for name, data in (("train", train), ("test", test)):
        index = open_index(str(tmp_path / "cifar10" / name), cache_dir=tmp_path / "cache")
        assert index.classes == ["airplane", "cat"] and len(index) == len(data.pixels)
        for number, pixels in enumerate(data.pixels):
            path = tmp_path / "cifar10" / name / data.classes[number % 2] / f"{number:05d}.png"
            assert np.array_equal(np.asarray(Image.open(path)), pixels)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["cifar10"]


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """A full disk half way is one clear message, and no part of the data set is left."""
    full = Pictures(6, fails=OSError(28, "No space left on device"))
    with pytest.raises(UserError, match="cifar10: can't be written: No space left on device"):
        download.write_splits({"train": full}, tmp_path / "cifar10")
    assert not list(tmp_path.iterdir())


def test_other_data_is_never_overwritten(tmp_path: Path) -> None:
    """A destination that holds something else is refused before anything is fetched."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already and holds something else"):
        download.download_cifar10(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second download finds the folders and fetches nothing."""
    fetched: list[bool] = []
    monkeypatch.setattr(download, "_fetch", lambda _, train: (fetched.append(train), Pictures(2))[1])
    for _ in range(2):
        assert download.download_cifar10(tmp_path / "c", archive_dir=tmp_path / "a") == tmp_path / "c"
    assert fetched == [True, False]


def test_without_a_network_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the message says what to fetch and where to put it; nothing is written."""

    class Offline:
        url = "https://example.org/cifar-10-python.tar.gz"

        def __init__(self, *_: object, **__: object) -> None:
            raise OSError("<urlopen error [Errno -2] Name or service not known>")

    torchvision = ModuleType("torchvision.datasets")
    torchvision.CIFAR10 = Offline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", torchvision)
    with pytest.raises(UserError) as caught:
        download.download_cifar10(tmp_path / "cifar10", archive_dir=tmp_path / "archives")
    assert "Name or service not known" in str(caught.value)
    assert f"put it at {tmp_path}/archives/cifar-10-python.tar.gz" in str(caught.value)
    assert not (tmp_path / "cifar10").exists()
