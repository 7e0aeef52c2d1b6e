"""ImageNet's flat images as published: validation images labelled by the devkit, training images by their tar."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alexnet_ddp.data.index.devkit import Devkit, absent, find_devkit, number_of
from alexnet_ddp.data.index.layout import HELD_OUT_WORDS
from alexnet_ddp.data.index.sources import Source, listed
from alexnet_ddp.data.index.table import Listing, text
from alexnet_ddp.errors import UserError

_WORDNET = re.compile(rb"n[0-9]{8}")


@dataclass(frozen=True)
class Official:
    """Labels of the rows of a listing."""

    classes: list[bytes]  # WordNet ids, sorted: those of the training images
    labels: npt.NDArray[np.int32]  # [rows]
    base: bytes  # the directory that the images lie in
    kit: Devkit


def find_class_tars(listing: Listing, source: Source) -> tuple[list[bytes], npt.NDArray[np.int32]] | None:
    """Classes and labels [rows] where each tar is one of ImageNet's inner ones, n01440764.tar, with flat images.

    So it is when the outer archive was unpacked and the inner ones were not.
    """
    stems = [os.fsencode(os.path.basename(path))[:-4] for path in source.paths]
    if source.kind != "tar" or set(listing.directories) != {b""} or not all(map(_WORDNET.fullmatch, stems)):
        return None
    containers = np.frombuffer(listing.container, dtype=np.int32)
    classes = sorted({stems[number] for number in np.unique(containers).tolist()})
    if empty := sorted(set(stems) - set(classes)):
        raise UserError(f"{source}: the tar of a class must hold images, but {len(empty)} hold none: "
                        f"{listed([text(stem) for stem in empty])}.\nFetch or make them again, or remove them.")
    place = {name: number for number, name in enumerate(classes)}
    return classes, np.array([place.get(stem, -1) for stem in stems], dtype=np.int32)[containers]


def find_official(listing: Listing, source: Source) -> Official | None:
    """None where the images aren't the flat ones of ILSVRC2012_val. UserError where their labels can't be told."""
    if len(listing.directories) != 1 or number_of(listing.stem(0)) is None:
        return None
    base = next(iter(listing.directories))
    inside = (source.inside or "").encode("utf-8", "surrogateescape")
    if base != inside and not (source.kind == "tar" and base.lower() in HELD_OUT_WORDS):
        return None  # one class directory

    beside = os.path.dirname(source.paths[0])
    folders = [beside, source.paths[0]] if source.kind == "folder" else [beside]
    kit = find_devkit(folders)
    if kit is None:
        raise absent(str(source), len(listing), folders)
    numbers = np.fromiter(_numbers(listing, source), dtype=np.int64, count=len(listing))
    _refuse_other_counts(numbers, kit, source)

    classes = sorted(set(kit.classes))
    place = {name: number for number, name in enumerate(classes)}
    labels = np.array([place[name] for name in kit.classes], dtype=np.int32)[numbers - 1]
    return Official(classes, labels, base, kit)


def _numbers(listing: Listing, source: Source) -> Iterator[int]:
    for row in range(len(listing)):
        number = number_of(listing.stem(row))
        if number is None:
            raise UserError(f"{source}: {text(listing.stem(row))} lies among the validation images of ILSVRC2012 "
                            f"without a class. Move it elsewhere.")
        yield number


def _refuse_other_counts(numbers: npt.NDArray[np.int64], kit: Devkit, source: Source) -> None:
    wanted, there = set(range(1, len(kit.classes) + 1)), set(numbers.tolist())
    told = f"{source}: the devkit labels {len(wanted):,} validation images"
    if missing := sorted(wanted - there):
        raise UserError(f"{told}, but {len(missing):,} of them are missing: {listed(_names(missing))}.\n"
                        f"Bring them back, or sort the images that are there into one directory a class.")
    if more := sorted(there - wanted):
        raise UserError(f"{told}, but {len(more):,} more are there: {listed(_names(more))}.\n"
                        f"Is {kit.files[0]} that of ILSVRC2012?")


def _names(numbers: Sequence[int]) -> list[str]:
    return [f"ILSVRC2012_val_{number:08d}" for number in numbers]
