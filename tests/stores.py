"""Folders, tars and ImageNet's archives for tests, old enough to be cached."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import scipy.io

AN_HOUR_AGO = 3600
KIT = "ILSVRC2012_devkit_t12"


def settle(*paths: Path) -> None:
    """Makes everything an hour old: what has just changed is not cached."""
    for path in paths:
        inside = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
        for one in (*inside, path):
            then = one.stat().st_mtime_ns - AN_HOUR_AGO * 10**9
            os.utime(one, ns=(then, then))


def make_folder(root: Path, samples: dict[str, bytes]) -> Path:
    for name, data in samples.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    settle(root)
    return root


def tar_bytes(members: dict[str, bytes], *, format: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def make_tar(path: Path, members: dict[str, bytes], *, format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, format=format))
    settle(path)
    return path


def nested(samples: dict[str, bytes], *, below: str = "") -> dict[str, bytes]:
    """CLASS/image -> CLASS.tar holding image, as ImageNet's own training archive."""
    classes: dict[str, dict[str, bytes]] = {}
    for name, data in samples.items():
        label, _, image = name.partition("/")
        classes.setdefault(label, {})[image] = data
    return {f"{below}{label}.tar": tar_bytes(images) for label, images in classes.items()}


def devkit(wnids: list[str], truth: list[int]) -> dict[str, bytes]:
    """Files of a development kit: leaves numbered from 1 in the order of `wnids`, and one ancestor after them."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
              "num_train_images")
    rows = [(number, wnid, f"word {wnid}", "a thing", 0, np.zeros(0), 0, 1300)
            for number, wnid in enumerate(wnids, start=1)]
    rows.append((len(rows) + 1, "n00001740", "entity", "all", len(rows), np.arange(1, len(rows) + 1), 1, 0))
    synsets = np.empty((len(rows), 1), dtype=[(field, object) for field in fields])
    for place, row in enumerate(rows):
        synsets[place, 0] = row
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    return {
        f"{KIT}/readme.txt": b"about",
        f"{KIT}/data/meta.mat": meta.getvalue(),
        f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt": b"".join(b"%d\n" % number for number in truth),
    }


def make_devkit(folder: Path, files: dict[str, bytes], *, suffix: str = ".tar.gz") -> Path:
    """As published: a compressed archive; with suffix "" the folder that it unpacks to."""
    if not suffix:
        return make_folder(folder, files) / KIT
    path = folder / (KIT + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    settle(path)
    return path
