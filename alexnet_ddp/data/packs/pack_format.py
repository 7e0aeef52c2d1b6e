"""The files of a pack: shards, their members, the sidecars of an unfinished pack, and pack.json.

    pack.json        what the pack is; written last, so that its presence means a complete pack
    000000.tar ...   the samples in the order of their ids: CLASS/STEM.jpg, of rawN stages CLASS/STEM.npy
    .tmp-job.json    while it is made: what is being made, so that only the same command goes on
    .done-000000.json  while it is made: a finished shard's size, sum and facts
    .tmp-000001.tar  while it is made: the shard being written
    .tmp-lock        while it is made: held by the process that makes it

Nothing in them depends on when, where or by how many threads they were made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tarfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet_ddp.checkpoint import files
from alexnet_ddp.data.decoding.stages import CHANNELS, Stage
from alexnet_ddp.data.index.table import IN_A_FILE, Table, is_clutter, text
from alexnet_ddp.errors import UserError

SCHEMA = 1
PACK, JOB, LOCK = "pack.json", ".tmp-job.json", ".tmp-lock"
NPY_HEADER = 128  # bytes before the pixels of a .npy member
_PIECE = 16 << 20  # bytes read at once


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def done_name(number: int) -> str:
    return f".done-{number:06d}.json"


# --- members ----------------------------------------------------------------------------------------------------


def npy_header(pixels: int) -> bytes:
    """What np.save writes before uint8 [pixels, pixels, 3]: format 1.0, always NPY_HEADER bytes."""
    facts = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({pixels}, {pixels}, {CHANNELS}), }}"
    padded = facts.ljust(NPY_HEADER - 11).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


def member_name(table: Table, row: int, stage: Stage) -> bytes:
    """CLASS/STEM and the extension: the source's own for original."""
    suffix = {"original": table.suffixes[table.suffix_codes[row]], "raw": b".npy"}.get(stage.kind, b".jpg")
    return table.classes[table.labels[row]] + b"/" + table.stem(row) + suffix


def member(name: bytes, record: bytes, stage: Stage) -> bytes:
    """A record as it stands in a tar: header, bytes, padding to whole blocks. ustar, pax where ustar can't hold it."""
    body = npy_header(stage.pixels) + record if stage.kind == "raw" else record
    info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
    info.size, info.mode, info.mtime = len(body), 0o644, 0  # owner 0 without a name is TarInfo's own
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return b"".join((header, body, bytes(-len(body) % tarfile.BLOCKSIZE)))


def check_classes(table: Table) -> None:
    """UserError for class names that can't be directories of a tar (a label file's names may be anything)."""
    for name in table.classes:
        if not name or b"/" in name or b"\0" in name or name == b".." or is_clutter(name):
            raise UserError(f"Class names become directories in a pack, got '{text(name)}'. They mustn't be empty, "
                            f"hold '/' or begin with a dot. Rename the class.")


# --- files ------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes .tmp-NNNNNN.tar; `finish` makes it durable and gives it its name."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._name = folder, shard_name(number)
        self._path = folder / f".tmp-{self._name}"
        self._file = open(self._path, "wb", buffering=0)  # noqa: SIM115  # closed by finish or abandon
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, piece: bytes) -> None:
        """Raises OSError."""
        self._digest.update(piece)
        self.bytes += len(piece)
        view = memoryview(piece)
        while view:  # an unbuffered write may take less than it was given
            view = view[self._file.write(view):]

    def finish(self) -> str:
        """The shard under its name, on the disk; returns its sha256 as hex. Raises OSError."""
        self.write(bytes(2 * tarfile.BLOCKSIZE))  # the end mark, and whole records as every tar program pads to
        self.write(bytes(-self.bytes % tarfile.RECORDSIZE))
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._path, self._folder / self._name)
        sync_folder(self._folder)
        return self._digest.hexdigest()

    def abandon(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A small file, whole or not at all, on the disk when the call returns. Raises OSError."""
    draft = path.with_name(".tmp-" + path.name.removeprefix(".tmp-") + ".draft")
    with open(draft, "w", encoding="ascii") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file. UserError where it isn't ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path}: is damaged or not `alexnet-ddp data pack`'s ({error}). Remove the folder and pack "
                        f"again.") from None
    if content.get("schema") != SCHEMA:
        raise UserError(f"{path}: must have schema {SCHEMA}, got {content.get('schema')!r}: it was made by another "
                        f"version of alexnet-ddp, or by something else. Use that version, or pack again.")
    return content


def read_pack(folder: Path) -> dict[str, Any] | None:
    """A folder's pack.json, None where there is none. UserError where something is missing in it."""
    content = read_json(folder / PACK)
    if content is None:
        return None
    kinds = {"stage": str, "identity": str, "source_identity": str, "samples": int, "classes": int, "shards": list,
             "samples_per_shard": int, "source_bytes": int, "found": dict, "damaged": list}
    of_shard = {"name": str, "samples": int, "bytes": int, "sha256": str}
    missing = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if not missing and not all(isinstance(shard, dict) and isinstance(shard.get(name), kind)
                               for shard in content["shards"] for name, kind in of_shard.items()):
        missing = ["shards"]
    if missing:
        raise UserError(f"{folder / PACK}: isn't what `alexnet-ddp data pack` writes ({', '.join(missing)}). Copy it "
                        f"again from where the pack was made, or remove the folder and pack again.")
    return content


def sync_folder(folder: Path) -> None:
    """New names in a folder survive a power failure after this."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hex, read piece by piece. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_PIECE, os.fstat(file.fileno()).st_size + 1)))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def lock(folder: Path) -> AbstractContextManager[None]:
    """Held by one process at a time. UserError where it is taken."""
    return files.locked(folder / LOCK, otherwise=f"{folder}: another `alexnet-ddp data pack` is writing there. "
                        "Wait for it, or give another folder.")


# --- what a pack was made of ------------------------------------------------------------------------------------


def sizes_digest(sizes: NDArray[np.int64]) -> str:
    """Of the source files' sizes in bytes: tells a shard whose source has changed since."""
    return hashlib.sha256(np.ascontiguousarray(sizes, dtype="<i8").data).hexdigest()


def source_size(table: Table, row: int, root: str) -> int:
    """Bytes of a sample's file, -1 where it is gone; `root` is the folder of samples that are files of their own."""
    if table.offsets[row] != IN_A_FILE:
        return int(table.sizes[row])
    try:
        return os.stat(os.path.join(os.fsencode(root), table.path(row))).st_size
    except OSError:
        return -1


def without(table: Table, rows: list[int]) -> Table:
    """The table without some samples: what the copy of the others is indexed as."""
    keep = np.ones(len(table), dtype=bool)
    keep[rows] = False
    kept = np.flatnonzero(keep)
    stems = [table.stem(int(row)) for row in kept]
    columns = {name: getattr(table, name)[kept] for name in Table.COLUMNS if name not in ("name_ends", "names")}
    return dataclasses.replace(table, **columns, names=np.frombuffer(b"".join(stems), dtype=np.uint8),
                               name_ends=np.cumsum([len(stem) for stem in stems], dtype=np.int64))
