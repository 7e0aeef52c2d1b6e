"""Photographs without labels, wherever they lie: single files, folders of any depth, tars, tars in tars.

    pictures = find_pictures(["photo.jpg", "holiday/", "cats.tar::tabby"], stored="original")

They keep the order of the arguments; within a folder they are sorted by path, digits by their number (2 before 10), and
within a tar they keep the archive's order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from alexnet_ddp.data.decoding.decode import DamagedImage
from alexnet_ddp.data.decoding.stages import parse_stage, to_stage
from alexnet_ddp.data.index.descriptors import pread
from alexnet_ddp.data.index.headers import members
from alexnet_ddp.data.index.packed import MANIFEST, read_packed
from alexnet_ddp.data.index.sources import HOW_TO_DECOMPRESS, SEPARATOR, find_source
from alexnet_ddp.data.index.table import below, is_clutter, is_image, text
from alexnet_ddp.data.records import I64, U8
from alexnet_ddp.errors import UserError

WHOLE_FILE = -1  # the size of a picture that is a file of its own


@dataclass(frozen=True)
class Picture:
    """`where`: for people, and in what is printed; `size` bytes from `offset` of `file`."""

    where: str
    file: str
    offset: int = 0
    size: int = WHOLE_FILE


class Pictures:
    """Records (see alexnet_ddp.data.records) of pictures. What can't be read counts as damaged, so that the others
    are shown all the same."""

    def __init__(self, pictures: Sequence[Picture], *, stored: str) -> None:
        self.stage = parse_stage(stored)
        self._pictures = list(pictures)

    def __len__(self) -> int:
        return len(self._pictures)

    def first(self, count: int) -> Pictures:
        """So many of them, from the first."""
        return Pictures(self._pictures[:count], stored=str(self.stage))

    def where(self, sample: int) -> str:
        return self._pictures[sample].where

    def read(self, sample: int) -> bytes:
        """Brought to the stage. Raises DamagedImage."""
        picture = self._pictures[sample]
        try:
            with open(picture.file, "rb") as file:
                if picture.size == WHOLE_FILE:
                    data = file.read()
                else:
                    data = pread(file.fileno(), picture.size, picture.offset, picture.file)
        except OSError as error:
            raise DamagedImage(f"can't be read: {error.strerror or error}") from None
        return to_stage(data, self.stage)

    def read_into(self, sample: int, out: U8, start: int = 0) -> None:
        flat = out.reshape(-1)
        flat[...] = np.frombuffer(self.read(sample), np.uint8)[start:start + flat.size]

    def copy_into(self, samples: I64, starts: I64, out: torch.Tensor) -> bool:
        return False


def find_pictures(places: Sequence[str], *, stored: str) -> Pictures:
    """All pictures at `places`, in that order, to be brought to the stage `stored`. None of them is opened.

    A file that is named is taken for a picture whatever it is called; in folders and tars names decide. Raises
    UserError for a place that isn't there or holds no picture.
    """
    found: list[Picture] = []
    for place in places:
        here = list(_at(place))
        if not here:
            raise UserError(f"{place} holds no pictures (names that end in .jpg, .jpeg, .jpe or .png). Name a picture, "
                            "a folder or a tar that holds some.")
        found += here
    return Pictures(found, stored=stored)


def _at(place: str) -> Iterator[Picture]:
    path = Path(os.path.expanduser(place))
    if path.is_file() and not path.name.lower().endswith((".tar", *HOW_TO_DECOMPRESS)):
        yield Picture(text(os.fsencode(place)), str(path))
    elif path.is_dir():
        if (path / MANIFEST).is_file() and read_packed(str(path)).side is not None:
            raise UserError(f"{place} is a pack of bare pixels (raw), which hold no pictures to open. Name the "
                            "originals, or evaluate on it: alexnet-ddp evaluate MODEL data.val=...")
        names = sorted(_files(path), key=_natural)
        shown = [name for name in names if is_image(os.fsencode(name))]
        for name in shown:
            yield Picture(text(os.fsencode(os.path.join(place, name))), str(path / name))
        if not shown:  # shards, or a pack of smaller JPEGs
            for name in names:
                if name.lower().endswith(".tar"):
                    yield from _in_tar(str(path / name), os.path.join(place, name), inside=b"")
    else:  # which says what is there instead, and refuses what is compressed or no tar
        source = find_source(place)
        inside = (source.inside or "").encode("utf-8", "surrogateescape")
        for tar in source.paths:
            yield from _in_tar(tar, tar if len(source.paths) > 1 else source.outside, inside=inside)


def _files(root: Path) -> Iterator[str]:
    """Paths below the root of all files that aren't clutter. Raises UserError."""
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: can't be listed: {error.strerror}.")

    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not is_clutter(os.fsencode(name))]
        here = os.path.realpath(folder)
        for name in folders:
            if Path(here).is_relative_to(os.path.realpath(os.path.join(folder, name))):
                raise UserError(f"{folder}/{name}: is a link to a directory that contains it. Remove the link.")
        for name in names:
            if not is_clutter(os.fsencode(name)):
                yield os.path.relpath(os.path.join(folder, name), root)


def _natural(path: str) -> list[tuple[str, int, str]]:
    """A key by which 2 comes before 10."""
    return [(words, int(digits or -1), digits) for words, digits in re.findall(r"([^0-9]*)([0-9]*)", path)]


def _in_tar(path: str, shown: str, *, inside: bytes) -> Iterator[Picture]:
    """The pictures of a tar and of the tars in it, in its order. Raises UserError for a damaged one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}.") from None
    try:
        size = os.fstat(descriptor).st_size
        for name, offset, length in _members(descriptor, 0, size, path):
            if below(name, inside) is None:
                continue
            if is_image(name):
                yield Picture(f"{shown}{SEPARATOR}{text(name)}", path, offset, length)
            elif name.lower().endswith(b".tar"):
                for inner, start, count in _members(descriptor, offset, length, f"{path}: {text(name)}"):
                    if is_image(inner):
                        yield Picture(f"{shown}{SEPARATOR}{text(name[:-4])}/{text(inner)}", path, start, count)
    finally:
        os.close(descriptor)


def _members(descriptor: int, start: int, size: int, where: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset and size in bytes of the files of a tar, but for clutter."""
    for member, offset, _ in members(descriptor, start, size, where):
        parts = [part for part in member.name.encode("utf-8", "surrogateescape").split(b"/") if part not in (b"", b".")]
        if member.isreg() and not member.issparse() and parts and not any(map(is_clutter, parts)):
            yield b"/".join(parts), offset, member.size
