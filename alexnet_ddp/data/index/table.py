"""The table behind an index: one row a sample, in NumPy columns, sorted by (class, name).

No Python object is kept per sample: 1.28 million of them, touched by every process, would be copied page by
page through their reference counts until the machine has no memory left.
"""

import functools
import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alexnet_ddp.errors import UserError

IMAGE_SUFFIXES = (b".jpg", b".jpeg", b".jpe", b".png")  # in lower case
CLUTTER = (b"__MACOSX", b"lost+found", b"@eaDir")  # directories that systems leave behind

IN_A_FILE = -1  # the offset of a sample that is a file of its own
LARGEST_IMAGE = 2**31 - 1  # bytes; sizes are int32
_PIECE = 1 << 16  # rows


def text(raw: bytes) -> str:
    """A raw path or name as printable text; bytes that aren't UTF-8 become backslash escapes."""
    return raw.decode("utf-8", "backslashreplace")


def suffix_of(name: bytes) -> bytes:
    """`.JPEG` of `a.b.JPEG`, as spelled; empty without a dot and for hidden files."""
    stem, dot, end = name.rpartition(b".")
    return dot + end if stem else b""


def is_image(name: bytes) -> bool:
    return suffix_of(name).lower() in IMAGE_SUFFIXES


def is_clutter(name: bytes) -> bool:
    """Hidden files (macOS's `._x` among them) and the directories of CLUTTER: passed over without a word."""
    return name.startswith(b".") or name in CLUTTER


def parent_of(path: bytes) -> bytes:
    return path.rpartition(b"/")[0]


def below(path: bytes, base: bytes) -> bytes | None:
    """`path` relative to the directory `base`, None where it isn't below it; all is below the empty base."""
    if not base:
        return path or None
    return path[len(base) + 1 :] if path.startswith(base + b"/") else None


@dataclass
class Listing:
    """The images that a scan found, in its order: columns, not objects. Paths are raw, below the root."""

    directories: dict[bytes, int] = field(default_factory=dict)  # those that hold images -> their number
    bare_directories: set[bytes] = field(default_factory=set)  # every directory met as such, with images or not
    suffixes: dict[bytes, int] = field(default_factory=dict)  # as spelled -> code
    others: Counter[str] = field(default_factory=Counter)  # suffixes of files that are no images
    outside: int = 0  # members of a tar with `..` in their path, which would lie outside of it
    stems: bytearray = field(default_factory=bytearray)
    ends: "array[int]" = field(default_factory=lambda: array("q"))
    directory: "array[int]" = field(default_factory=lambda: array("i"))
    suffix: "array[int]" = field(default_factory=lambda: array("i"))
    container: "array[int]" = field(default_factory=lambda: array("i"))
    offset: "array[int]" = field(default_factory=lambda: array("q"))
    size: "array[int]" = field(default_factory=lambda: array("i"))

    def __len__(self) -> int:
        return len(self.ends)

    def add(self, path: bytes, *, container: int = 0, offset: int = IN_A_FILE, size: int = 0) -> None:
        """One image; `offset` and `size` in bytes."""
        directory, _, name = path.rpartition(b"/")
        suffix = suffix_of(name)
        self.stems += name[: len(name) - len(suffix)]
        self.ends.append(len(self.stems))
        self.directory.append(self.directories.setdefault(directory, len(self.directories)))
        self.suffix.append(self.suffixes.setdefault(suffix, len(self.suffixes)))
        self.container.append(container)
        self.offset.append(offset)
        self.size.append(size)

    def add_other(self, name: bytes) -> None:
        self.others[text(suffix_of(name).lower()) or "no extension"] += 1

    def stem(self, row: int) -> bytes:
        return bytes(self.stems[self.ends[row - 1] if row else 0 : self.ends[row]])

    def extend(self, other: "Listing", *, container: int | None = None) -> None:
        """Adds all that another scan found; its images lie in `container`, or where it says."""
        kinds = np.array([self.suffixes.setdefault(name, len(self.suffixes)) for name in other.suffixes], np.int32)
        places = np.array([self.directories.setdefault(name, len(self.directories)) for name in other.directories],
                          np.int32)
        self.ends.frombytes((np.frombuffer(other.ends, np.int64) + len(self.stems)).tobytes())
        self.stems += other.stems
        self.directory.frombytes(places[np.frombuffer(other.directory, np.int32)].tobytes())
        self.suffix.frombytes(kinds[np.frombuffer(other.suffix, np.int32)].tobytes())
        self.container.extend(other.container if container is None else array("i", [container]) * len(other))
        self.offset.extend(other.offset)
        self.size.extend(other.size)
        self.bare_directories |= other.bare_directories
        self.others.update(other.others)
        self.outside += other.outside

    def images_in(self) -> dict[bytes, int]:
        """How many images lie directly in each directory."""
        counts = np.bincount(np.frombuffer(self.directory, np.int32), minlength=len(self.directories))
        return {directory: int(counts[number]) for directory, number in self.directories.items()}


@dataclass(frozen=True, eq=False)
class Table:
    """All samples, sorted by (class, stem); N rows. Sorting is by bytes, which for UTF-8 is by code point."""

    classes: tuple[bytes, ...]
    suffixes: tuple[bytes, ...]  # file name extensions as spelled
    base: bytes  # the directory, below the folder's or the archive's root, that holds the class directories
    class_in_path: bool  # false where a shard's members are named by key alone: base/stem.jpg
    class_suffix: bytes  # b".tar" where every class is a tar in the archive: base/class.tar, stem.jpg
    labels: npt.NDArray[np.int32]  # [N] position in classes
    offsets: npt.NDArray[np.int64]  # [N] bytes from the container's start, IN_A_FILE for a file of its own
    sizes: npt.NDArray[np.int32]  # [N] bytes, 0 for a file of its own
    containers: npt.NDArray[np.integer]  # [N] which tar; 0 in a folder. The smallest unsigned type that will do
    suffix_codes: npt.NDArray[np.uint8]  # [N] position in suffixes
    name_ends: npt.NDArray[np.integer]  # [N] where each stem ends in names: uint32 if that will do, else int64
    names: npt.NDArray[np.uint8]  # all stems, one after the other

    COLUMNS = ("labels", "offsets", "sizes", "containers", "suffix_codes", "name_ends", "names")

    def __len__(self) -> int:
        return len(self.labels)

    def stem(self, row: int) -> bytes:
        """The name inside the class directory, without extension."""
        start = int(self.name_ends[row - 1]) if row else 0
        return self.names[start : int(self.name_ends[row])].tobytes()

    def path(self, row: int) -> bytes:
        """The sample's path below the folder's or the archive's root."""
        middle = (self.classes[self.labels[row]] + self.class_suffix,) if self.class_in_path else ()
        parts = (self.base, *middle, self.stem(row) + self.suffixes[self.suffix_codes[row]])
        return b"/".join(part for part in parts if part)

    def where(self, row: int, containers: Sequence[str]) -> str:
        """Human text; `containers` are the tars' paths or the folder's."""
        container, path = containers[self.containers[row]], text(self.path(row))
        if self.offsets[row] == IN_A_FILE:
            return f"{container}/{path}"
        return f"{container}: {path} at offset {self.offsets[row]}"

    def identity(self) -> str:
        """Hex sha256 over class names, sample names and labels, and nothing else."""
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:
        digest = hashlib.sha256(f"alexnet-ddp index identity 1, {len(self.classes)} classes\n".encode())
        for name in self.classes:
            digest.update(len(name).to_bytes(4, "little") + name)
        for column, kind in ((self.labels, "<i4"), (self.name_ends, "<i8"), (self.names, "u1")):
            for start in range(0, len(column), _PIECE):  # converted piece by piece, for the sake of memory
                digest.update(np.ascontiguousarray(column[start : start + _PIECE], dtype=kind).data)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Memory held by the columns, in bytes."""
        return sum(getattr(self, name).nbytes for name in self.COLUMNS)


def ends_type(length: int) -> npt.DTypeLike:
    """The type of name_ends for so many bytes of names."""
    return np.uint32 if length < 2**32 else np.int64


def build_table(
    listing: Listing,
    *,
    classes: Sequence[bytes],
    labels: npt.NDArray[np.int32],
    prefixes: Sequence[bytes],
    base: bytes,
    class_in_path: bool,
    class_suffix: bytes = b"",
    containers: Sequence[str],
) -> Table:
    """Sorts a listing into a table.

    `labels` [rows of the listing] are positions in `classes`, -1 leaves a row out; `prefixes` [directories]
    come before the stems found there: sub-directories of a class. UserError if two share class and name.
    """
    assert len(labels) == len(listing)
    blob, ends = bytes(listing.stems), listing.ends
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(len(classes) + 1))
    rows = np.empty(len(order) - bounds[0], dtype=np.int64)
    name_ends = np.empty(len(rows), dtype=np.int64)
    names = bytearray()
    twins: list[int] = []  # rows whose name equals the one before

    done = 0
    for number in range(len(classes)):  # one class's names at a time, for the sake of memory
        members = order[bounds[number] : bounds[number + 1]].tolist()
        stems = [prefixes[listing.directory[row]] + blob[ends[row - 1] if row else 0 : ends[row]] for row in members]
        previous = None
        for place in sorted(range(len(members)), key=stems.__getitem__):
            if stems[place] == previous:
                twins.append(done)
            previous = stems[place]
            names += previous
            rows[done], name_ends[done] = members[place], len(names)
            done += 1

    def column(values: "array[int]", kind: npt.DTypeLike) -> npt.NDArray:
        return np.frombuffer(values, dtype=np.dtype(values.typecode))[rows].astype(kind)

    table = Table(
        classes=tuple(classes),
        suffixes=tuple(listing.suffixes),
        base=base,
        class_in_path=class_in_path,
        class_suffix=class_suffix,
        labels=labels[rows].astype(np.int32),
        offsets=column(listing.offset, np.int64),
        sizes=column(listing.size, np.int32),
        containers=column(listing.container, np.min_scalar_type(max(0, len(containers) - 1))),
        suffix_codes=column(listing.suffix, np.uint8),
        name_ends=name_ends.astype(ends_type(len(names))),
        names=np.frombuffer(bytes(names), dtype=np.uint8),
    )
    if twins:
        first = twins[0]
        raise UserError(
            f"A name must be unique in its class, whatever the extension; {len(twins)} are not:\n"
            f"  {table.where(first - 1, containers)}\n  {table.where(first, containers)}\n"
            f"Rename or remove one of them."
        )
    return table
