"""Labels of ImageNet's validation images, from the development kit that comes with them.

The images of ILSVRC2012_img_val.tar lie flat, `ILSVRC2012_val_00000001.JPEG` and so on. Line n of the kit's
ILSVRC2012_validation_ground_truth.txt is the number of image n's class, and meta.mat tells its WordNet id, which is
what the tars and directories of the training images are called. Read as torchvision does (parse_devkit_archive).
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alexnet_ddp.errors import UserError

KIT = "ILSVRC2012_devkit_t12"
PACKED = (f"{KIT}.tar.gz", f"{KIT}.tar")
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_IMAGE = re.compile(rb"ILSVRC2012_val_([0-9]{8})")


@dataclass(frozen=True)
class Devkit:
    """What the kit says of the validation images."""

    files: tuple[str, ...]  # that were read
    classes: tuple[bytes, ...]  # [images] WordNet id of image number 1, 2, ...


def is_official(stem: bytes) -> bool:
    """Whether a file is called as ImageNet's validation images are."""
    return _IMAGE.fullmatch(stem) is not None


def number_of(stem: bytes) -> int | None:
    """5 of ILSVRC2012_val_00000005."""
    match = _IMAGE.fullmatch(stem)
    return int(match[1]) if match else None


def find_devkit(folders: Sequence[str]) -> Devkit | None:
    """The kit in the first of the folders that has it, as an archive or unpacked. UserError if it can't be used."""
    for folder in folders:
        for name in PACKED:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                meta, truth = _from_archive(path)
                return Devkit((path,), _classes(meta, truth, path))
        root = os.path.join(folder, KIT)
        if os.path.isdir(root):
            meta, truth = _contents(root, META), _contents(root, TRUTH)
            return Devkit((os.path.join(root, META), os.path.join(root, TRUTH)), _classes(meta, truth, root))
    return None


def absent(place: str, images: int, folders: Sequence[str]) -> UserError:
    return UserError(
        f"{place}: {images} validation images of ILSVRC2012 without class directories: their labels are in the "
        f"development kit, which isn't there.\n"
        f"Put {PACKED[0]} (from where the images are from), or the folder {KIT} out of it, into {folders[0]}."
    )


def _from_archive(path: str) -> tuple[bytes, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                for name in (META, TRUTH):
                    if member.isreg() and member.name.endswith(name):
                        file = tar.extractfile(member)
                        assert file is not None  # regular files have one
                        found[name] = file.read()
                if len(found) == 2:
                    break
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read as the development kit of ILSVRC2012: {error}.\n"
                        f"Fetch it again.") from None
    if missing := [name for name in (META, TRUTH) if name not in found]:
        raise _lacks(path, missing[0])
    return found[META], found[TRUTH]


def _contents(root: str, name: str) -> bytes:
    path = os.path.join(root, name)
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise _lacks(root, name) from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}.") from None


def _lacks(path: str, name: str) -> UserError:
    return UserError(f"{path}: lacks {name}, which the development kit of ILSVRC2012 holds.\n"
                     f"Put the whole {PACKED[0]} there.")


def _classes(meta: bytes, truth: bytes, place: str) -> tuple[bytes, ...]:
    """The class of each image in turn."""
    import scipy.io  # takes a while to import, and nothing else here needs it

    try:
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # The rows that have no children are the classes; the others are their ancestors in WordNet.
        rows = [tuple(row) for row in np.atleast_1d(synsets)]
        wordnet = {int(row[0]): str(row[1]).encode("ascii") for row in rows if row[4] == 0}
    except Exception as error:  # loadmat's readers raise all kinds on bytes that aren't theirs
        raise UserError(f"{place}: {META} can't be read ({type(error).__name__}: {error}).\n"
                        f"Fetch the kit again.") from None
    try:
        numbers = [int(line) for line in truth.split()]
    except ValueError as error:
        raise UserError(f"{place}: {TRUTH} must hold a class number a line ({error}).\nFetch the kit again.") from None
    unknown = sorted({number for number in numbers if number not in wordnet})
    if unknown or not numbers:
        what = f"class {unknown[0]}, which meta.mat doesn't list" if unknown else "no line"
        raise UserError(f"{place}: {TRUTH} holds {what}.\nFetch the kit again.")
    return tuple(wordnet[number] for number in numbers)
