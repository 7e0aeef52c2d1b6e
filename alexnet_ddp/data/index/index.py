"""Where every sample lies: one sorted table over a folder, a tar or many tars, and reads at random from it.

    index = open_index("/data/cifar10-jpeg.tar::train")
    index.read(7), index.labels[7], index.name(7)

A sample's id is its position in the sort by (class, name), so a folder, a tar and a packed copy of the same
samples give the same ids; `identity` says so. Opening is quick the second time: see index_cache.
"""

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from alexnet_ddp.amounts import counted
from alexnet_ddp.data.index import index_cache
from alexnet_ddp.data.index.archives import scan_tars
from alexnet_ddp.data.index.descriptors import Tars, preadv
from alexnet_ddp.data.index.folders import scan_folder
from alexnet_ddp.data.index.journal import Journal, settle
from alexnet_ddp.data.index.scan import Scan
from alexnet_ddp.data.index.sources import Source, Stamp, find_source, listed
from alexnet_ddp.data.index.table import IN_A_FILE, Table, text
from alexnet_ddp.errors import UserError


def open_index(locator: str, *, cache_dir: Path | None = None) -> "Index":
    """The samples that `locator` names (see sources), from the cache or by a scan that is then kept there.

    `cache_dir` defaults to index_cache.default_cache_dir(). UserError says what is wrong with the layout.
    """
    source = find_source(locator)
    path = index_cache.cache_path(source, cache_dir or index_cache.default_cache_dir())
    scan = index_cache.load(path, source)
    cache = f"read from {path}"
    if scan is not None:
        settle(path)
    else:
        scan, problem = _scan_and_keep(source, path)
        cache = f"not kept ({problem})" if problem else f"written to {path}"
    table, stamps, notes = scan
    return Index(table, source=source, stamps=stamps, notes=notes, cache=cache)


def _scan_and_keep(source: Source, path: Path) -> tuple[Scan, str | None]:
    """The scan, and why it couldn't be kept in the cache, if so."""
    journal = Journal(path)
    try:
        scan = scan_folder(source, journal) if source.kind == "folder" else scan_tars(source, journal)
    except BaseException:
        journal.leave()
        raise
    problem = index_cache.store(path, source, scan)
    journal.remove()
    return scan, problem


class Index:
    """N samples. Made by open_index; reads are safe from any number of threads and after a fork."""

    def __init__(
        self,
        table: Table,
        *,
        source: Source,
        stamps: Sequence[Stamp] = (),
        notes: Sequence[str] = (),
        cache: str = "not kept",
    ) -> None:
        self.table, self.source, self.stamps = table, source, tuple(stamps)
        self.stage = source.pack.stage if source.pack is not None else "original"  # what is stored
        self.notes = list(notes)  # worth telling, nothing to refuse
        self.cache = cache  # where the table is kept, or why not
        self.classes: list[str] = [text(name) for name in table.classes]
        self.labels: npt.NDArray[np.int32] = table.labels  # [N], read-only
        self.labels.flags.writeable = False
        self.identity = table.identity()
        facts = [source.kind, source.paths, source.inside, self.stamps]
        self.storage = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._root = os.fsencode(source.paths[0])
        self._tars = Tars(source.paths, self.stamps)

    def __len__(self) -> int:
        return len(self.table)

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def empty(self) -> npt.NDArray[np.int64]:
        """Samples whose files in a tar hold no bytes, as its headers tell; of a folder's files nothing is known."""
        return np.flatnonzero((self.table.sizes == 0) & (self.table.offsets != IN_A_FILE))

    def name(self, sample: int) -> str:
        """`class/stem`, without extension: the same wherever the sample is stored."""
        return f"{self.classes[self.labels[sample]]}/{text(self.table.stem(sample))}"

    def where(self, sample: int) -> str:
        """For messages: a file's path, or a tar's with the member and its offset in bytes."""
        return self.table.where(sample, self.source.paths)

    def place(self, sample: int) -> tuple[str, int | None]:
        """The file that holds a sample, and in a tar its offset in bytes."""
        offset = int(self.table.offsets[sample])
        if offset == IN_A_FILE:
            return self.where(sample), None
        return self.source.paths[self.table.containers[sample]], offset

    def reopen(self, sample: int) -> None:
        """Opens the sample's tar anew before it is read again; a file of its own is opened at each read anyway."""
        if int(self.table.offsets[sample]) != IN_A_FILE:
            self._tars.reopen(int(self.table.containers[sample]))

    def read(self, sample: int) -> bytes:
        """The sample's file as stored.

        OSError if it can't be read; UserError if its tar was replaced after the index was made.
        """
        offset = int(self.table.offsets[sample])
        if offset == IN_A_FILE:
            with open(os.path.join(self._root, self.table.path(sample)), "rb") as file:
                return file.read()
        return self._tars.read(int(self.table.containers[sample]), offset, int(self.table.sizes[sample]))

    def read_into(self, sample: int, out: npt.NDArray[np.uint8], start: int = 0) -> None:
        """Bytes `start` and after of a sample's record into `out` (C-contiguous), as many as it holds.

        Straight from the file, no copy in between. OSError if there are fewer; UserError as for `read`.
        """
        assert out.flags.c_contiguous  # else reshape would hand out a copy
        view = out.reshape(-1).data
        offset, stored = int(self.table.offsets[sample]), int(self.table.sizes[sample])
        if offset == IN_A_FILE:
            path = os.path.join(self._root, self.table.path(sample))
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                preadv(descriptor, view, start, os.fsdecode(path))
            finally:
                os.close(descriptor)
        elif start + len(view) > stored:
            raise OSError(errno.EIO, f"only {stored - start} of {len(view)} bytes are there", self.where(sample))
        else:
            self._tars.read_into(int(self.table.containers[sample]), offset + start, view)

    def close(self) -> None:
        """Closes the descriptors that are kept; no read may be under way."""
        self._tars.close()


def check_pair(train: Index, val: Index) -> None:
    """UserError unless both have the same classes in the same order, so that labels mean the same."""
    if train.table.classes == val.table.classes:
        return
    lines = [
        f"Training and validation data must have the same classes: {train.source} has {len(train.classes)}, "
        f"{val.source} has {len(val.classes)}."
    ]
    for here, there, place in ((train, val, "training"), (val, train, "validation")):
        known = set(there.classes)
        if only := [name for name in here.classes if name not in known]:
            lines.append(f"Only in {place} ({len(only)}): {listed(only)}.")
    if len(lines) == 1:
        lines.append(
            "The names are the same, their order isn't: shards number their classes, folders sort by name. "
            "Store both alike, or put class names in the shards' .json."
        )
    else:
        lines.append("Rename, add or remove class directories until both lists are equal.")
    raise UserError("\n".join(lines))


def summary(index: Index) -> str:
    """What `data index` prints: a few lines on the samples, where they lie and how they are known."""
    counts = np.bincount(index.labels, minlength=len(index.classes))
    small, large = int(counts.argmin()), int(counts.argmax())
    empty = [index.where(int(row)) for row in index.empty]
    stored, shards = index.table.sizes.sum(dtype=np.int64), len(index.source.paths)
    lines = [
        (
            "source",
            f"{index.source} ({index.source.kind if index.source.pack is None else f'pack of stage {index.stage}'}"
            + (f", {counted(shards, 'shard')})" if shards > 1 or index.source.pack is not None else ")"),
        ),
        ("samples", f"{len(index):,}"),
        ("classes", f"{len(index.classes):,} ({listed(index.classes)})"),
        *(
            [("smallest", f"{index.classes[small]}: {counts[small]:,}"),
             ("largest", f"{index.classes[large]}: {counts[large]:,}")]
            if counts[small] < counts[large]
            else [("balance", f"{counted(int(counts[small]), 'sample')} in each class")]
        ),
        (
            "bytes",
            f"{stored:,} ({stored / len(index):,.0f} an image)" if stored else "not counted: a file each",
        ),
        ("identity", index.identity),
        ("storage", index.storage),
        ("memory", f"{index.table.nbytes:,} bytes"),
        ("cache", index.cache),
        *([("note", f"{counted(len(empty), 'image')} of no bytes: {listed(empty, most=3)}")] if empty else []),
        *(("note", note) for note in index.notes),
    ]
    return "\n".join(f"{name:<10}{value}" for name, value in lines)
