"""Features on disk: one safetensors file, and the parts it is put together from.

    from alexnet_ddp import read_features

    found = read_features("val.safetensors")
    found.features[:100], found.labels[:100], found.names[7], found.classes

The file holds, in the order of sample ids (by class and name):

    labels      int64 [n]     by the data's own classes, which the metadata list
    name_ends   int64 [n]     where each name ends in `names`
    features    float32 or float16 [n, d]; zeros for an image that can't be decoded
    whole       bool [n]      false for such an image
    names       uint8 [...]   all names (class/stem) in UTF-8, one behind the other

and in its metadata, as JSON, `task` (what was computed, of what, by which weights), `classes`, and `damaged` (sample ->
why, the first thousand). Any reader of safetensors reads it; ours maps the features into memory and loads none.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

from alexnet_ddp.checkpoint import files
from alexnet_ddp.data.index import Index
from alexnet_ddp.errors import UserError
from alexnet_ddp.trained import packed_weights

FORMAT = "alexnet-ddp features 1"
DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {"float32": ("F32", np.dtype(np.float32)),
                                                "float16": ("F16", np.dtype(np.float16))}
NAMED = 1000  # damaged images that the metadata list with their reasons
FRESH = ".tmp-"  # parts begin so before they have their names
HEADER_LIMIT = 100_000_000  # bytes, of the safetensors format

_KINDS = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "BOOL": np.bool_, "U8": np.uint8}


class Names(Sequence[str]):
    """Names of the samples, decoded when they are asked for: a million strings would take ten times their room."""

    def __init__(self, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self._data, self._ends = data, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]  # negative ones, and IndexError
        first = int(self._ends[number - 1]) if number else 0
        return self._data[first:int(self._ends[number])].tobytes().decode()


@dataclass(frozen=True)
class Features:
    """What a file of features holds. n samples of d features; `features` and the like are mapped, read-only.

    features   float32 or float16 [n, d]
    labels     int64 [n]: places in `classes`
    names      n of them, class/stem
    classes    as the data call them
    whole      bool [n]: false where the image is damaged, and its features are zeros
    damaged    sample -> why, the first thousand
    task       what was computed: layer, net, weights, preprocessing, data
    """

    features: NDArray[Any]
    labels: NDArray[np.int64]
    names: Names
    classes: tuple[str, ...]
    whole: NDArray[np.bool_]
    damaged: dict[int, str]
    task: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)


def read_features(path: str | Path) -> Features:
    """Opens what `alexnet-ddp features --out` wrote. Raises UserError for anything else."""
    path = Path(path)
    header, start = _header(path)
    told = header.pop("__metadata__", {})
    if told.get("format") != FORMAT:
        raise UserError(f"{path} holds no features of ours (its format is {told.get('format', 'not said')}). Name a "
                        "file that `alexnet-ddp features --out FILE` wrote.")
    try:
        arrays = {name: _mapped(path, start, entry) for name, entry in header.items()}
        return Features(arrays["features"], arrays["labels"], Names(arrays["names"], arrays["name_ends"]),
                        tuple(json.loads(told["classes"])), arrays["whole"],
                        {int(sample): why for sample, why in json.loads(told["damaged"]).items()},
                        json.loads(told["task"]))
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}). Remove it and compute the features anew.") from None


def task_of(path: Path) -> dict[str, Any]:
    """What the features in a file are. Raises UserError for a file of another kind."""
    return read_features(path).task


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= HEADER_LIMIT:
                raise ValueError
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from None
    except ValueError:
        raise UserError(f"{path} is no safetensors file. Name one that `alexnet-ddp features --out FILE` "
                        "wrote.") from None
    return header, 8 + length


def _mapped(path: Path, start: int, entry: dict[str, Any]) -> NDArray[Any]:
    kind, shape = np.dtype(_KINDS[entry["dtype"]]), tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if last - first != kind.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise ValueError("sizes don't fit")
    if first == last:  # nothing, which can't be mapped
        return np.zeros(shape, kind)
    return np.memmap(path, kind, mode="r", offset=start + first, shape=shape)


# --- parts ------------------------------------------------------------------------------------------------------


class Damaged(Exception):
    """A part that isn't what was written, or of other features."""


@dataclass(frozen=True)
class Part:
    """Features [k, d] of samples in a row, which of them are whole [k], and why the others aren't (by sample)."""

    features: NDArray[Any]
    whole: NDArray[np.bool_]
    reasons: dict[int, str]


def part_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def write_part(folder: Path, number: int, part: Part, *, task: str) -> None:
    """Writes a part so that a kill leaves all of it or nothing. `task`: the name of what it belongs to.

    Raises OSError.
    """
    metadata = {"task": task, "sha256": _sha256(part), "reasons": json.dumps(part.reasons)}
    tensors = {"features": torch.from_numpy(part.features), "whole": torch.from_numpy(part.whole)}
    fresh = folder / f"{FRESH}{number:06d}-{secrets.token_hex(4)}"
    files.write_tensors(fresh, tensors=tensors, metadata=metadata)
    os.replace(fresh, part_path(folder, number))
    files.sync_directory(folder)


def read_part(folder: Path, number: int, *, task: str, shape: tuple[int, int], dtype: str) -> Part:
    """A part, compared with its checksum. Raises Damaged."""
    try:
        with safetensors.safe_open(part_path(folder, number), framework="numpy") as file:
            told = file.metadata() or {}
            part = Part(file.get_tensor("features"), file.get_tensor("whole"),
                        {int(sample): why for sample, why in json.loads(told["reasons"]).items()})
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise Damaged(str(error)) from None
    if (told.get("task"), part.features.shape, part.features.dtype) != (task, shape, DTYPES[dtype][1]):
        raise Damaged("it belongs to other features")
    if told.get("sha256") != _sha256(part):
        raise Damaged("it differs from its checksum")
    return part


def read_reasons(folder: Path, number: int) -> dict[int, str]:
    """Why images of a part are damaged; without its features, and {} where it can't be read (who reads it, will see).
    """
    try:
        with safetensors.safe_open(part_path(folder, number), framework="numpy") as file:
            return {int(sample): why for sample, why in json.loads((file.metadata() or {})["reasons"]).items()}
    except (OSError, safetensors.SafetensorError, KeyError, ValueError):
        return {}


def _sha256(part: Part) -> str:
    digest = hashlib.sha256(json.dumps(part.reasons).encode())
    for array in (part.features, part.whole):
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


# --- the whole --------------------------------------------------------------------------------------------------


def write_whole(path: Path, *, index: Index, task: dict[str, Any], dimension: int, dtype: str, damaged: dict[int, str],
                parts: Callable[[], Iterator[Part]]) -> files.Written:
    """Writes the file in one go from `parts`, in order, of which it holds one at a time. Atomic. Raises UserError."""
    names = [index.name(sample).encode() for sample in range(len(index))]
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    shapes = {"labels": ("I64", [len(index)]), "name_ends": ("I64", [len(index)]),
              "features": (DTYPES[dtype][0], [len(index), dimension]), "whole": ("BOOL", [len(index)]),
              "names": ("U8", [int(ends[-1])])}  # widest first: items lie at multiples of their size
    first_ones = {str(sample): why for sample, why in sorted(damaged.items())[:NAMED]}
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "task": json.dumps(task),
                                               "classes": json.dumps(index.classes), "damaged": json.dumps(first_ones)}}
    offset = 0
    for name, (kind, shape) in shapes.items():
        end = offset + np.dtype(_KINDS[kind]).itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        yield index.labels.astype(np.int64).tobytes()
        yield ends.tobytes()
        whole = []
        for part in parts():
            yield part.features.tobytes()
            whole.append(part.whole)
        yield b"".join(rows.tobytes() for rows in whole)
        yield b"".join(names)

    with packed_weights.replacing(path) as fresh:
        return files.write(fresh, pieces=pieces())
