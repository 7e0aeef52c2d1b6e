"""Labels of WebDataset shards: `000001.jpg` belongs to `000001.cls` or `000001.json` in the same tar.

`.cls` is an integer as text. `.json` holds an integer under "label", "cls" or "class", or a class name under
"class_name" or "class"; a name wins over a number. Classes known by number alone are named by it and sorted
as numbers.
"""

import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alexnet_ddp.data.index.layout import refuse_splits
from alexnet_ddp.data.index.parts import Value
from alexnet_ddp.data.index.sources import Source
from alexnet_ddp.data.index.table import Listing, below, text
from alexnet_ddp.errors import UserError

LABEL_SUFFIXES = (b".cls", b".json")
LabelFile = tuple[int, int]  # offset, size in bytes
ABSENT: LabelFile = (0, 0)


@dataclass(frozen=True)
class Keyed:
    """What the label files of all shards say; see build_table for the columns."""

    classes: list[bytes]
    labels: npt.NDArray[np.int32]  # [rows of the listing]
    prefixes: list[bytes]  # [directories of the listing]
    base: bytes
    class_in_path: bool


def find_keyed(listing: Listing, values: "array[int]", known: Sequence[Value], source: Source) -> Keyed | None:
    """The labels from `read_labels` of all shards; None if no image has one: directories are the classes then."""
    if all(value is None for value in known):
        return None
    _refuse_mixture(listing, values, known, source)

    ordered = sorted(known, key=lambda value: value if isinstance(value, int) else (value or b""))  # one type only
    place = {value: number for number, value in enumerate(ordered)}
    names = [value if isinstance(value, bytes) else str(value).encode() for value in ordered]
    labels = np.array([place[value] for value in known], dtype=np.int32)[np.frombuffer(values, dtype=np.int32)]

    directories = list(listing.directories)
    base = _common(directories) if source.inside is None else source.inside.encode("utf-8", "surrogateescape")
    inner = [below(directory, base) or b"" for directory in directories]
    tops = [path.partition(b"/")[0] for path in inner]
    refuse_splits({top for top in tops if top}, source, base)
    # A key such as cat/0001 of class cat: the same sample name as in a folder.
    class_in_path = all(
        tops[directory] == names[label]
        for directory, label in set(zip(listing.directory, labels.tolist(), strict=True))
    )
    if class_in_path:
        inner = [path.partition(b"/")[2] for path in inner]
    return Keyed(names, labels, [path + b"/" if path else b"" for path in inner], base, class_in_path)


def read_labels(
    listing: Listing, labels: dict[bytes, LabelFile], descriptor: int, where: str
) -> tuple["array[int]", list[Value]]:
    """For every row of one shard's listing the number of its value, and the values by number."""
    if not labels:
        return array("i", bytes(4 * len(listing))), [None]
    numbers: dict[Value, int] = {}
    values = array("i")
    directories = list(listing.directories)
    for row in range(len(listing)):
        directory = directories[listing.directory[row]]
        key = (directory + b"/" if directory else b"") + listing.stem(row)
        found = {
            suffix: os.pread(descriptor, size, offset)
            for suffix in LABEL_SUFFIXES
            for offset, size in [labels.get(key + suffix, ABSENT)]
            if size
        }
        value = _value(found, f"{where}: {text(key)}")
        values.append(numbers.setdefault(value, len(numbers)))
    return values, list(numbers)


def _value(found: dict[bytes, bytes], where: str) -> Value:
    """The label that one sample's files give. UserError if they can't be understood."""
    told: dict = {}
    if b".json" in found:
        try:
            parsed = json.loads(found[b".json"])
        except ValueError as error:
            raise UserError(f"{where}.json: can't be read as JSON: {error}.") from None
        told = parsed if isinstance(parsed, dict) else {}
    for field in ("class_name", "class"):
        if isinstance(told.get(field), str) and told[field]:
            return told[field].encode("utf-8", "surrogateescape")

    number: int | None = None
    if b".cls" in found:
        try:
            number = int(found[b".cls"])
        except ValueError:
            raise UserError(f"{where}.cls: must hold the class as an integer, got {found[b'.cls'][:40]!r}.") from None
    else:
        candidates = (told.get(field) for field in ("label", "cls", "class"))
        number = next((value for value in candidates if type(value) is int), None)
    if number is not None and number < 0:
        raise UserError(f"{where}: has label {number}, but labels must be 0 or more (-1 often means unlabelled).")
    return number


def _refuse_mixture(listing: Listing, values: "array[int]", known: Sequence[Value], source: Source) -> None:
    kinds = {type(value) for value in known}
    if len(kinds) == 1:
        return

    def first(kind: type) -> str:
        row = next(row for row, number in enumerate(values) if type(known[number]) is kind)
        directory = list(listing.directories)[listing.directory[row]]
        key = text((directory + b"/" if directory else b"") + listing.stem(row))
        return f"{source.paths[listing.container[row]]}: {key}"

    if type(None) in kinds:
        raise UserError(
            f"{source}: every image of a shard needs a label beside it (.cls, or .json with a "
            f'"label" or "class_name"), but some have none:\n  {first(type(None))}'
        )
    raise UserError(
        f"{source}: classes must be named everywhere or numbered everywhere, but some are named and "
        f"some only numbered:\n  {first(bytes)}\n  {first(int)}"
    )


def _common(directories: Sequence[bytes]) -> bytes:
    """The deepest directory that holds all of them."""
    return os.path.commonpath(directories) if all(directories) else b""
