"""What `data pack` made, as the index reads it: pack.json checked against the shards beside it."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alexnet_ddp.errors import UserError

MANIFEST = "pack.json"
SCHEMA = 1
NPY_HEADER = 128  # bytes before a raw record's pixels
_STAGE = re.compile(r"original|(?:short|max|raw)([1-9][0-9]{1,3})")
_LEFT = (".tmp", ".done-")  # how the names of a pack's unfinished work begin


@dataclass(frozen=True)
class Packed:
    """A pack, as its pack.json tells it. The shards lie beside it."""

    path: str  # of pack.json
    stage: str
    identity: str  # of the packed samples, hex
    samples: int
    shards: tuple[str, ...]  # names, in order

    @property
    def side(self) -> int | None:
        """Pixels a side of raw records, else None."""
        return int(self.stage.removeprefix("raw")) if self.stage.startswith("raw") else None


def read_packed(folder: str) -> Packed:
    """UserError where pack.json can't be understood, or a shard is missing, of another size, or not named in it."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, "rb") as file:
            told = json.load(file)
        if told["schema"] != SCHEMA:
            raise UserError(f"{path}: must have schema {SCHEMA}, got {told['schema']!r}: it was made by another "
                            f"version of alexnet-ddp, or by something else. Use that version, or pack again.")
        sizes = {str(shard["name"]): int(shard["bytes"]) for shard in told["shards"]}
        pack = Packed(path, str(told["stage"]), str(told["identity"]), int(told["samples"]), tuple(sizes))
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}.") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: isn't what `alexnet-ddp data pack` writes ({type(error).__name__}: {error}). "
                        f"Pack again.") from None
    if not _STAGE.fullmatch(pack.stage) or not pack.shards or any("/" in name for name in pack.shards):
        raise UserError(f"{path}: isn't what `alexnet-ddp data pack` writes (stage {pack.stage!r}, "
                        f"{len(pack.shards)} shards). Pack again.")
    for name, size in sizes.items():
        try:
            found = os.path.getsize(os.path.join(folder, name))
        except OSError:
            raise UserError(f"{folder}: {name} is missing, which pack.json names. Copy the whole pack, or pack "
                            f"again.") from None
        if found != size:
            raise UserError(f"{folder}: {name} must have {size:,} bytes by pack.json, got {found:,}. Copy the whole "
                            f"pack again, or pack again.")
    tars = [name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith(".")]
    others = sorted(set(tars) - set(sizes))
    if others:
        raise UserError(f"{folder}: {others[0]} isn't one of the pack's shards by pack.json. Move it elsewhere.")
    return pack


def is_unfinished(names: Sequence[str]) -> bool:
    """Whether a folder of these names, without a pack.json, was left by a pack that was interrupted."""
    return any(name.startswith(_LEFT) for name in names)


class RawHeaders:
    """Checks the headers of a pack's .npy members, which all are alike."""

    def __init__(self, side: int) -> None:
        self._shape = (side, side, 3)
        self._good: set[bytes] = set()

    @property
    def record(self) -> int:
        """Bytes of pixels behind the header."""
        return self._shape[0] * self._shape[1] * self._shape[2]

    def problem(self, header: bytes, size: int) -> str | None:
        """What is wrong with a member of `size` bytes that begins with `header`; None if it is as promised."""
        if header not in self._good:
            found = _parse(header)
            if found != (self._shape, False, np.dtype("|u1")):
                return f"must be uint8 {list(self._shape)} behind a NumPy header of {NPY_HEADER} bytes"
            self._good.add(header)
        wanted = NPY_HEADER + self.record
        return None if size == wanted else f"must have {wanted} bytes, got {size}"


def _parse(header: bytes) -> tuple | None:
    """Shape, whether Fortran's order, type; None if it isn't NumPy's format 1.0 with a header of this length."""
    file = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        found = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        return None
    return found if file.tell() == len(header) == NPY_HEADER else None
