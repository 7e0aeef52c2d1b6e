"""Scanned tables kept between runs, one file a source, used only while nothing on disk has changed since.

A file holds the table's columns and the stamps of every tar or directory that was scanned. It is used if all
stamps still hold and everything in it makes sense; a stale, damaged or foreign file is made anew.

Columns are read, not mapped: ImageNet's are 47 MB a rank, and a map of a file that another node replaces on a
network file system ends in SIGBUS.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_ddp.data.index.journal import unfinished_name
from alexnet_ddp.data.index.scan import Scan
from alexnet_ddp.data.index.sources import Source, Stamp, is_settled, still_holds
from alexnet_ddp.data.index.table import Table

SCHEMA = 2

_KINDS: dict[str, tuple[type, ...]] = {
    "labels": (np.int32,),
    "offsets": (np.int64,),
    "sizes": (np.int32,),
    "containers": (np.uint8, np.uint16, np.uint32),
    "suffix_codes": (np.uint8,),
    "name_ends": (np.uint32, np.int64),
    "names": (np.uint8,),
}


def default_cache_dir() -> Path:
    """$ALEXNET_DDP_CACHE, else alexnet-ddp in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("ALEXNET_DDP_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "alexnet-ddp"
    try:
        return Path.home() / ".cache" / "alexnet-ddp"
    except RuntimeError:  # a container's user without a name or a home
        return Path(tempfile.gettempdir()) / f"alexnet-ddp-{os.getuid()}"


def cache_path(source: Source, cache_dir: Path) -> Path:
    """Where the table of a source is kept."""
    key = json.dumps([SCHEMA, *_source_facts(source)])
    return cache_dir / "index" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def load(path: Path, source: Source) -> Scan | None:
    """The kept scan, or None where there is none that can be trusted."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:  # zip: CRC of each column
            meta = json.loads(stored["meta"].tobytes())
            if meta["schema"] != SCHEMA or meta["source"] != _source_facts(source):
                return None
            stamps = [Stamp(*stamp) for stamp in meta["stamps"]]
            # A new file or directory shows in the time of the directory that holds it.
            if not still_holds(stamps):
                return None
            columns = {name: stored[name] for name in Table.COLUMNS}
        table = Table(
            classes=_raw(meta["classes"]),
            suffixes=_raw(meta["suffixes"]),
            base=_raw([meta["base"]])[0],
            class_in_path=bool(meta["class_in_path"]),
            class_suffix=_raw([meta["class_suffix"]])[0],
            **columns,
        )
        if not _is_sound(table, stamps) or table.identity() != meta["identity"]:
            return None
        return table, stamps, [str(note) for note in meta["notes"]]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        MemoryError,
    ):
        return None  # absent, cut short, overwritten by something else


def store(path: Path, source: Source, scan: Scan) -> str | None:
    """Writes a scan, atomically. Returns why it could not be kept, None if it was: no reason to fail."""
    table, stamps, notes = scan
    if not is_settled(stamps):
        return "changed within the last two seconds"
    meta = {
        "schema": SCHEMA,
        "source": _source_facts(source),
        "stamps": stamps,
        "notes": notes,
        "classes": _plain(table.classes),
        "suffixes": _plain(table.suffixes),
        "base": _plain((table.base,))[0],
        "class_in_path": table.class_in_path,
        "class_suffix": _plain((table.class_suffix,))[0],
        "identity": table.identity(),
    }
    columns: dict[str, Any] = {name: getattr(table, name) for name in Table.COLUMNS}
    columns["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    unfinished = unfinished_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "xb") as file:
            np.savez(file, **columns)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        return f"{path.parent}: {error.strerror or error}"
    return None


def _source_facts(source: Source) -> list:
    return [source.kind, list(source.paths), source.inside, source.pack.path if source.pack else None]


def _is_sound(table: Table, stamps: list[Stamp]) -> bool:
    """Whether every number in the table is one that reading can rely on."""
    rows = len(table.labels)
    columns = {name: getattr(table, name) for name in _KINDS}
    shapes = all(columns[name].dtype in kinds and columns[name].ndim == 1 for name, kinds in _KINDS.items())
    lengths = all(len(column) == rows for name, column in columns.items() if name != "names")
    if not (rows and shapes and lengths):
        return False
    return bool(
        table.labels[0] >= 0
        and table.labels[-1] < len(table.classes)
        and (table.labels[1:] >= table.labels[:-1]).all()
        and table.name_ends[0] >= 0
        and table.name_ends[-1] == len(table.names)
        and (table.name_ends[1:] >= table.name_ends[:-1]).all()
        and table.suffix_codes.max() < len(table.suffixes)
        and table.containers.min() >= 0
        and table.containers.max() < len(stamps)
        and table.offsets.min() >= -1
        and table.sizes.min() >= 0
    )


def _plain(names: tuple[bytes, ...]) -> list[str]:
    return [name.decode("utf-8", "surrogateescape") for name in names]


def _raw(names: list[str]) -> tuple[bytes, ...]:
    return tuple(name.encode("utf-8", "surrogateescape") for name in names)
