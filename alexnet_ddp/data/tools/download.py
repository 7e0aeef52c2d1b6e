"""Fetches CIFAR-10 by torchvision's own downloader and writes it out as folders of PNG files (lossless)."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from alexnet_ddp.data.index.index_cache import default_cache_dir
from alexnet_ddp.errors import UserError

ARCHIVE = "cifar-10-python.tar.gz"


class Picture(Protocol):
    """As much of a PIL image as is used here."""

    def save(self, path: Path) -> None: ...


def download_cifar10(destination: Path, *, archive_dir: Path | None = None) -> Path:
    """Writes `destination`/{train,test}/CLASS/NNNNN.png, 50,000 and 10,000 images of 32x32, and returns it.

    The archive (170 MB) is kept in `archive_dir`, by default below the cache directory; one that lies there
    already is used. UserError without a network, or if `destination` holds something else.
    """
    if _is_done(destination):
        return destination
    _require_free(destination)
    archive_dir = archive_dir or default_cache_dir() / "downloads"
    write_splits({name: _fetch(archive_dir, train=name == "train") for name in ("train", "test")}, destination)
    return destination


def write_splits(splits: dict[str, Any], destination: Path) -> None:
    """Writes data sets as folders, all or nothing.

    `splits`: directory name -> iterable of (PIL image, label) with the class names in `.classes`. A picture's
    number is its position in the data set. UserError if the disk is full or can't be written.
    """
    _require_free(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    except OSError as error:
        raise UserError(f"{destination}: can't be written: {error.strerror}.") from None
    try:
        unfinished.chmod(0o777 & ~_umask())
        for name, data in splits.items():
            _write_split(data, data.classes, unfinished / name)
        os.replace(unfinished, destination)
    except OSError as error:
        raise UserError(f"{destination}: can't be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_split(data: Iterable[tuple[Picture, int]], classes: Sequence[str], directory: Path) -> None:
    for name in classes:
        (directory / name).mkdir(parents=True)
    for number, (picture, label) in enumerate(data):
        picture.save(directory / classes[label] / f"{number:05d}.png")


def _fetch(archive_dir: Path, *, train: bool) -> Any:
    """torchvision's data set; it checks the archive's MD5."""
    from torchvision.datasets import CIFAR10  # imports torch: only when it is needed

    try:
        archive_dir.mkdir(parents=True, exist_ok=True)
        return CIFAR10(archive_dir, train=train, download=True)
    except (OSError, RuntimeError, EOFError) as error:  # urllib's errors are OSErrors
        raise UserError(
            f"CIFAR-10 can't be downloaded: {error}.\n"
            f"Without a network, fetch {CIFAR10.url} elsewhere and put it at {archive_dir / ARCHIVE}."
        ) from None


def _is_done(destination: Path) -> bool:
    return all((destination / name / "airplane").is_dir() for name in ("train", "test"))


def _require_free(destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination}: is there already and holds something else. Give another directory.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
