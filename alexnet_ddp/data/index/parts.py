"""What one tar, one inner tar or one class directory adds to an index: scanned by itself, kept, put together."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alexnet_ddp.data.index.sources import Stamp
from alexnet_ddp.data.index.table import Listing

Value = int | bytes | None  # a class by number, a class by name, no label

_COLUMNS = {"ends": "q", "directory": "i", "suffix": "i", "container": "i", "offset": "q", "size": "i"}


@dataclass
class Part:
    """The images of one container, in its order, and what else was met there."""

    listing: Listing = field(default_factory=Listing)
    stamps: list[Stamp] = field(default_factory=list)  # of what was read for it
    values: array[int] = field(default_factory=lambda: array("i"))  # [rows] the label file's value: place in known
    known: list[Value] = field(default_factory=list)
    label_files: Counter[str] = field(default_factory=Counter)  # by extension
    elsewhere: set[bytes] = field(default_factory=set)  # directories of images not below source.inside
    inner: set[bytes] = field(default_factory=set)  # inner tars, without their extension

    def encode(self) -> bytes:
        """For the journal: a line of JSON, then the columns."""
        listing = self.listing
        columns = [bytes(listing.stems), self.values.tobytes()]
        columns += [getattr(listing, name).tobytes() for name in _COLUMNS]
        head = {
            "lengths": list(map(len, columns)),
            "directories": _plain(listing.directories),
            "bare": _plain(sorted(listing.bare_directories)),
            "suffixes": _plain(listing.suffixes),
            "others": listing.others,
            "outside": listing.outside,
            "stamps": self.stamps,
            "known": [_plain([value]) if isinstance(value, bytes) else value for value in self.known],
            "label_files": self.label_files,
            "elsewhere": _plain(sorted(self.elsewhere)),
            "inner": _plain(sorted(self.inner)),
        }
        return b"\n".join([json.dumps(head).encode(), b"".join(columns)])

    @classmethod
    def decode(cls, data: bytes) -> Part:
        """Raises ValueError, KeyError or TypeError for what `encode` didn't write."""
        line, _, body = data.partition(b"\n")
        head: dict[str, Any] = json.loads(line)
        if head.get("empty"):
            raise ValueError("written by a version that counted files of no bytes as no samples")
        pieces, start = [], 0
        for length in head["lengths"]:
            pieces.append(body[start : start + length])
            start += length
        columns = {}
        for (name, kind), piece in zip(_COLUMNS.items(), pieces[2:], strict=True):
            columns[name] = array(kind)
            columns[name].frombytes(piece)
        values = array("i")
        values.frombytes(pieces[1])
        listing = Listing(
            directories={name: number for number, name in enumerate(_raw(head["directories"]))},
            bare_directories=set(_raw(head["bare"])),
            suffixes={name: number for number, name in enumerate(_raw(head["suffixes"]))},
            others=Counter(head["others"]),
            outside=int(head["outside"]),
            stems=bytearray(pieces[0]),
            **columns,
        )
        return cls(
            listing=listing,
            stamps=[Stamp(*stamp) for stamp in head["stamps"]],
            values=values,
            known=[_raw(value)[0] if isinstance(value, list) else value for value in head["known"]],
            label_files=Counter(head["label_files"]),
            elsewhere=set(_raw(head["elsewhere"])),
            inner=set(_raw(head["inner"])),
        )


def together(parts: Sequence[Part]) -> Part:
    """All parts as one, in order; stamps are left to the scan."""
    whole = Part()
    numbers: dict[Value, int] = {}
    for part in parts:
        whole.listing.extend(part.listing)
        places = [numbers.setdefault(value, len(numbers)) for value in part.known]
        whole.values.extend(places[value] for value in part.values)
        whole.label_files.update(part.label_files)
        whole.elsewhere |= part.elsewhere
        whole.inner |= part.inner
    whole.known = list(numbers)
    return whole


def _plain(names: Any) -> list[str]:
    return [name.decode("utf-8", "surrogateescape") for name in names]


def _raw(names: Sequence[str]) -> list[bytes]:
    return [name.encode("utf-8", "surrogateescape") for name in names]
