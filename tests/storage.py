"""The same pictures stored in every way, and the caches they can be kept in: for tests of resuming."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from alexnet_ddp import cli
from alexnet_ddp.data.caches.cache import sweep_caches


def make_storages(train: Path, into: Path, *, stage: str) -> dict[str, str]:
    """`train` (a folder of classes) as folder, tar, tar of class tars, and pack of `stage`: locators by kind."""
    into.mkdir()
    with tarfile.open(into / "all.tar", "w") as tar:
        tar.add(train, "pictures/train")
    with tarfile.open(into / "nested.tar", "w") as outer:
        for directory in sorted(train.iterdir()):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for picture in sorted(directory.iterdir()):
                    tar.add(picture, picture.name)
            member = tarfile.TarInfo(f"{directory.name}.tar")
            member.size = inner.tell()
            inner.seek(0)
            outer.addfile(member, inner)
    assert cli.main(["data", "pack", str(train), str(into / "pack"), "--stage", stage, "--samples-per-shard", "9"]) == 0
    return {"folder": str(train), "tar": f"{into}/all.tar::pictures/train", "nested tar": f"{into}/nested.tar",
            "pack": f"{into}/pack"}


def cache_folders(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """A folder for each kind of cache, that of ram in tmpfs; both must be left empty. For a fixture to yield from."""
    memory = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.ismount("/dev/shm") else None))
    disk = tmp_path / "staged"
    disk.mkdir()
    try:
        yield {"ram": memory, "disk": disk, "gpu": tmp_path, "none": tmp_path}
        for kind, base in (("ram", memory), ("disk", disk)):  # a run that changed its cache leaves the old one to this
            sweep_caches(kind, base=base)  # type: ignore[arg-type]
        left = [str(path) for base in (memory, disk) for path in base.rglob("*") if path.is_file()]
        assert not left, f"a finished run's cache is still there: {left[:5]}"
    finally:
        shutil.rmtree(memory, ignore_errors=True)
