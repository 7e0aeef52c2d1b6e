"""What a locator names: a folder, one tar, or several tar shards, each with an optional path inside.

Locators, by example:

    /data/imagenet/train                 a folder of class directories
    /data/cifar10.tar                    a tar; the directory that a member lies in is its class
    /data/cifar10.tar::train             what lies under train/ in a tar; the next directory is the class
    /data/cifar10.tar::                  the same from the tar's root
    /data/shards                         a folder that holds *.tar and no directories
    /data/shards/train-*.tar             a glob
    /data/shards/train-{000000..000146}.tar
    /data/ILSVRC2012_img_train.tar       a tar of tars: the stem of each inner tar is a class
    /data/ILSVRC2012_img_val.tar         ImageNet's validation images: labels from the devkit beside it
    /data/imagenet-short256              a folder that `alexnet-ddp data pack` made
"""

import difflib
import glob
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from alexnet_ddp.data.index.packed import MANIFEST, Packed, is_unfinished, read_packed
from alexnet_ddp.data.index.table import is_clutter, text
from alexnet_ddp.errors import UserError

SEPARATOR = "::"
SETTLED_NS = 2_000_000_000  # what changed less than this ago may change again within one tick of its clock
OFFICIAL = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_img_test_v10102019.tar")
HOW_TO_DECOMPRESS = {  # by ending: what makes something readable out of it
    ".tar.gz": "gunzip",
    ".tgz": "gunzip",
    ".tar.bz2": "bunzip2",
    ".tbz2": "bunzip2",
    ".tbz": "bunzip2",
    ".tar.xz": "unxz",
    ".txz": "unxz",
    ".tar.zst": "unzstd",
    ".tzst": "unzstd",
    ".tar.lz4": "unlz4",
    ".zip": "unzip",
    ".7z": "7z x",
}
MAGIC = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\x00": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4",
    b"PK\x03\x04": "unzip",
    b"7z\xbc\xaf\x27\x1c": "7z x",
}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Stamp(NamedTuple):
    """What tells a changed tar or directory without reading it."""

    path: str
    size: int  # bytes; 0 for directories
    mtime_ns: int


def stamp_of(path: str) -> Stamp:
    status = os.stat(path)
    return Stamp(path, 0 if os.path.isdir(path) else status.st_size, status.st_mtime_ns)


def still_holds(stamps: Sequence[Stamp]) -> bool:
    """Whether nothing has changed. Raises no error: what is gone has changed."""
    try:
        return all(stamp_of(stamp.path) == stamp for stamp in stamps)
    except OSError:
        return False


def is_settled(stamps: Sequence[Stamp]) -> bool:
    """Whether all of it is old enough for its stamps to tell any later change."""
    return abs(time.time_ns() - max((stamp.mtime_ns for stamp in stamps), default=0)) >= SETTLED_NS


@dataclass(frozen=True)
class Source:
    """Where samples are to be looked for. Paths are absolute."""

    kind: Literal["folder", "tar"]
    paths: tuple[str, ...]  # the folder, or the tars in order
    outside: str  # the locator without its path inside
    inside: str | None = None  # the directory in the tars that holds the classes; None: the layout tells
    pack: Packed | None = None  # what pack.json says, of a pack

    def __str__(self) -> str:
        return self.outside if self.inside is None or self.pack else f"{self.outside}{SEPARATOR}{self.inside}"

    def below(self, path: bytes) -> str:
        """The locator of a directory, given its path below the folder's or the archive's root."""
        if self.kind == "folder":
            return os.path.join(self.outside, text(path))
        return f"{self.outside}{SEPARATOR}{text(path)}"


def find_source(locator: str) -> Source:
    """What `locator` stands for on this machine. UserError says what is missing, or why it can't be read."""
    outside, separator, inside = locator.rpartition(SEPARATOR)
    if not separator or os.path.exists(locator):
        outside, separator, inside = locator, "", ""
    outside = os.path.expanduser(outside)
    part = "/".join(name for name in inside.split("/") if name not in ("", ".")) if separator else None

    if os.path.isfile(os.path.join(outside, MANIFEST)):
        if part is not None:
            raise UserError(f"{locator}: is a pack, which has no path inside: give {outside}.")
        folder = os.path.abspath(outside)
        pack = read_packed(folder)
        return Source("tar", tuple(os.path.join(folder, name) for name in pack.shards), outside, "", pack)

    if os.path.isdir(outside):
        shards, compressed = _tars_in(outside)
        if shards:
            return Source("tar", tuple(map(os.path.abspath, shards)), outside, part)
        if compressed:
            raise _compressed(compressed[0])
        folder = os.path.join(outside, part) if part else outside
        if not os.path.isdir(folder):
            raise _missing(folder)
        return Source("folder", (os.path.abspath(folder),), folder)

    paths = _expand(outside)
    for path in paths:
        _require_tar(path)
    return Source("tar", tuple(map(os.path.abspath, paths)), outside, part)


def _tars_in(folder: str) -> tuple[list[str], list[str]]:
    """The tars (and the compressed ones) in a folder; none if it holds directories, which then count."""
    shards, compressed = [], []
    try:
        with os.scandir(folder) as entries:
            listing = sorted(entries, key=lambda entry: os.fsencode(entry.name))
            plain = [entry for entry in listing if not is_clutter(os.fsencode(entry.name))]
            official = [entry.path for entry in plain if entry.name in OFFICIAL]
            if len(official) > 1 or (official and len(plain) > 1):
                raise UserError(f"{folder}: holds ImageNet's own archives: give {' or '.join(official)} itself.")
            if any(entry.is_dir() for entry in plain):
                return [], []
            if is_unfinished([entry.name for entry in listing]):
                raise UserError(f"{folder}: an unfinished pack: run the same `alexnet-ddp data pack` again.")
            for entry in plain:
                if entry.name.lower().endswith(".tar"):
                    shards.append(entry.path)
                elif _tool_for(entry.name):
                    compressed.append(entry.path)
    except OSError as error:
        raise UserError(f"{folder}: can't be listed: {error.strerror}.") from None
    return shards, compressed


def _expand(outside: str) -> list[str]:
    """The files that a path, a glob or a brace range names: at least one, all of them there."""
    if os.path.exists(outside):
        return [outside]
    names = _braces(outside)
    paths: list[str] = []
    absent: list[str] = []
    for name in names:
        found = sorted(glob.glob(name), key=os.fsencode)
        paths += found
        absent += [] if found else [name]
    if absent and (len(names) == 1 or not paths):
        raise _missing(absent[0])
    if absent:
        raise UserError(
            f"{outside}: {len(absent)} of its {len(names)} shards are missing: {listed(absent)}.\n"
            f"Fetch them, or name only those that are there."
        )
    return paths


def _braces(pattern: str) -> list[str]:
    """`a-{08..10}` -> a-08, a-09, a-10."""
    match = _RANGE.search(pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise UserError(f"{pattern}: the range {match.group()} runs backwards: write {{{last}..{first}}}.")
    before, after = pattern[: match.start()], _braces(pattern[match.end() :])
    return [f"{before}{number:0{len(first)}d}{rest}" for number in range(int(first), int(last) + 1) for rest in after]


def _require_tar(path: str) -> None:
    if os.path.isdir(path):
        raise UserError(f"{path} is a directory, but shards must be tar files: end the pattern in .tar.")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}.") from None
    if _tool_for(path) or any(start.startswith(magic) for magic in MAGIC):
        raise _compressed(path)
    if not path.lower().endswith(".tar"):
        raise UserError(f"{path}: data must be a folder of class directories or a .tar file, this is neither.")


def _tool_for(path: str) -> str | None:
    return next((tool for ending, tool in HOW_TO_DECOMPRESS.items() if path.lower().endswith(ending)), None)


def _compressed(path: str) -> UserError:
    with open(path, "rb") as file:
        start = file.read(8)
    tool = next((tool for magic, tool in MAGIC.items() if start.startswith(magic)), _tool_for(path))
    if tool in ("unzip", "7z x"):
        way_out = f"Extract it (`{tool} {path}`) and give the folder."
    elif _tool_for(path):
        way_out = f"Decompress it first: `{tool} {'' if tool == 'unlz4' else '-k '}{path}`, then give the .tar."
    else:
        way_out = f"Decompress it first: `{tool} < {path} > plain.tar`, then give plain.tar."
    return UserError(f"{path} is compressed, so its images can't be read at random.\n{way_out}")


def _missing(path: str) -> UserError:
    """Says what is there instead: the nearest parent that exists, and the nearest name in it."""
    wanted, parent = os.path.abspath(path), os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(parent):
        wanted, parent = parent, os.path.dirname(parent)
    try:
        there = sorted(name for name in os.listdir(parent) if not name.startswith("."))
    except OSError as error:
        return UserError(f"{path}: nothing is there, and {parent} can't be listed: {error.strerror}.")
    close = difflib.get_close_matches(os.path.basename(wanted), there, n=1)
    guess = f"\nDid you mean {os.path.join(parent, close[0])}?" if close else ""
    return UserError(f"{path}: nothing is there.\n{parent} exists and holds: {listed(there) or 'nothing'}.{guess}")


def listed(names: Sequence[str], *, most: int = 5) -> str:
    """`a, b, c and 12 more`, for messages."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
