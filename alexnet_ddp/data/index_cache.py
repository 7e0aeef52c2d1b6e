"""Scanned tables kept between runs, one file a source, used only while nothing on disk has changed since.

A file holds the table's columns and the stamps of every tar or directory that was scanned. It is used if all
stamps still hold and everything in it makes sense; a stale, damaged or foreign file is made anew.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_ddp.data.sources import Source, Stamp, stamp_of
from alexnet_ddp.data.table import Table

SCHEMA = 1
SETTLED_NS = 2_000_000_000  # what changed less than this ago may change again within one tick of its clock

_KINDS = {
    "labels": np.int32,
    "offsets": np.int64,
    "sizes": np.int32,
    "containers": np.int32,
    "suffix_codes": np.uint8,
    "name_ends": np.int64,
    "names": np.uint8,
}

Scan = tuple[Table, list[Stamp], list[str]]  # table, stamps, notes


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
    key = json.dumps([SCHEMA, source.kind, source.paths, source.inside])
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
            if any(stamp_of(stamp.path) != stamp for stamp in stamps):
                return None
            columns = {name: stored[name] for name in Table.COLUMNS}
        table = Table(
            classes=_raw(meta["classes"]),
            suffixes=_raw(meta["suffixes"]),
            base=_raw([meta["base"]])[0],
            class_in_path=bool(meta["class_in_path"]),
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
    newest = max(stamp.mtime_ns for stamp in stamps)
    if abs(time.time_ns() - newest) < SETTLED_NS:
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
        "identity": table.identity(),
    }
    columns: dict[str, Any] = {name: getattr(table, name) for name in Table.COLUMNS}
    columns["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    unfinished: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(prefix=".tmp-", suffix=".npz", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **columns)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if unfinished:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
        return f"{path.parent}: {error.strerror or error}"
    return None


def _source_facts(source: Source) -> list:
    return [source.kind, list(source.paths), source.inside]


def _is_sound(table: Table, stamps: list[Stamp]) -> bool:
    """Whether every number in the table is one that reading can rely on."""
    rows = len(table.labels)
    shapes = all(getattr(table, name).dtype == kind and getattr(table, name).ndim == 1 for name, kind in _KINDS.items())
    lengths = all(len(getattr(table, name)) == rows for name in Table.COLUMNS if name != "names")
    if not (rows and shapes and lengths):
        return False
    return bool(
        table.labels[0] >= 0
        and table.labels[-1] < len(table.classes)
        and (np.diff(table.labels) >= 0).all()
        and table.name_ends[0] >= 0
        and table.name_ends[-1] == len(table.names)
        and (np.diff(table.name_ends) >= 0).all()
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
