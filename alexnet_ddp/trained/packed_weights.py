"""Weights in one safetensors file with all that is needed to use them: what export, quantize and prune write.

The file's metadata (text by name), beside `format: pt` as libraries look for it:

    alexnet_ddp    1, the version of this layout
    model          the net's name
    recipe         JSON: the recipe it was trained by, whole
    classes        JSON: what the logits stand for, [] where nobody knows
    preprocessing  JSON: alexnet_ddp.trained.preprocessing.Preprocessing.plain()
    facts          JSON: step, top1 and whatever else is known of these weights
    quantization   JSON, of a quantized net alone: how its layers are made (alexnet_ddp.trained.quantization)
    sha256         of the tensors and of all of the above

It imports neither nets nor the rest of this package, because models.weights reads by it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_ddp.checkpoint import files
from alexnet_ddp.checkpoint.store import PYTORCH, SUFFIX
from alexnet_ddp.errors import UserError

VERSION = "1"
MARK, DIGEST = "alexnet_ddp", "sha256"
PARTS = {"recipe": dict, "classes": list, "preprocessing": dict, "facts": dict}  # JSON, by what it must hold
QUANTIZATION = "quantization"
LEFT = 3600.0  # seconds after which what a killed writer left behind is removed


@dataclass(frozen=True)
class Packed:
    """What such a file says of its tensors: plain Python (see the module's head)."""

    model: str
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None

    def metadata(self) -> dict[str, str]:
        """As text, without the digest."""
        told = {MARK: VERSION, "model": self.model, "recipe": json.dumps(self.recipe),
                "classes": json.dumps(list(self.classes)), "preprocessing": json.dumps(self.preprocessing),
                "facts": json.dumps(self.facts)}
        return told if self.quantization is None else {**told, QUANTIZATION: json.dumps(self.quantization)}


def check_path(path: Path) -> None:
    """Raises UserError unless a file can be written there that isn't there yet."""
    if path.suffix != SUFFIX:
        raise UserError(f"The net is written as a {SUFFIX} file, got {path}. Name it so: {path.stem}{SUFFIX}")
    if path.exists():
        raise UserError(f"{path} exists already, and nothing is overwritten. Name another file, or remove it.")
    if not path.parent.is_dir():
        raise UserError(f"There is no folder {path.parent} to write {path.name} to. Make it first.")
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raises UserError where nothing can be written beside `path`: early, before what takes long."""
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} can't be written: its folder may not be written to. Name another place.")


def write(path: Path, *, tensors: Mapping[str, Tensor], packed: Packed) -> files.Written:
    """Writes the file whole or not at all, and flushes it to the disk. `tensors`: by name, on any device.

    Raises UserError when there is such a file already, or when it can't be written.
    """
    check_path(path)
    with replacing(path) as fresh:
        return write_to(fresh, tensors=tensors, packed=packed)


def write_to(path: Path, *, tensors: Mapping[str, Tensor], packed: Packed) -> files.Written:
    """`write` without the care for the name. Raises OSError."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    told = packed.metadata()
    return files.write_tensors(path, tensors=plain, metadata={**PYTORCH, **told, DIGEST: digest(plain, told)})


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A fresh name beside `path` to write to and flush: it becomes `path` at the end, or is removed after an error.

    Raises UserError when the disk refuses.
    """
    _sweep(path)
    fresh = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        yield fresh
        os.replace(fresh, path)
        files.sync_directory(path.parent)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}. Make room, or name another place.") from (
            None)
    finally:
        with suppress(OSError):  # where it couldn't be made, it can't be removed
            fresh.unlink(missing_ok=True)


def left_over(path: Path) -> list[Path]:
    """What writers of this file that were killed have left, and what living ones are writing."""
    return list(path.parent.glob(f".tmp-*-{glob.escape(path.name)}"))


def _sweep(path: Path) -> None:
    """Removes what killed writers of this file have left: they may run elsewhere, so only what is LEFT seconds old."""
    for left in left_over(path):
        try:
            if time.time() - left.stat().st_mtime > LEFT:
                left.unlink()
        except OSError:
            continue


def read(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], *, where: str) -> Packed | None:
    """What a file of these tensors says of itself; None of one that isn't of this layout.

    Raises UserError when it is damaged, or of a later version.
    """
    if MARK not in metadata:
        return None
    if metadata[MARK] != VERSION:
        raise UserError(f"{where} was written by another version of alexnet-ddp (layout {metadata[MARK]}, this one "
                        f"reads {VERSION}). Use that version, or write the file anew.")
    told = {name: text for name, text in metadata.items() if name not in PYTORCH and name != DIGEST}
    try:
        if metadata[DIGEST] != digest(tensors, told):
            raise ValueError("its content differs from its checksum")
        return parse(told)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{where} is damaged: {error}. Write it anew.") from None


def parse(texts: Mapping[str, str]) -> Packed:
    """What `Packed.metadata` wrote. Raises KeyError, ValueError, TypeError for anything else."""
    parts = {name: json.loads(texts[name]) for name in PARTS}
    if wrong := [name for name, kind in PARTS.items() if not isinstance(parts[name], kind)]:
        raise ValueError(f"{wrong[0]} is not what it must be")
    return Packed(**{**parts, "classes": tuple(parts["classes"])}, model=texts["model"],
                  quantization=json.loads(texts[QUANTIZATION]) if QUANTIZATION in texts else None)


def digest(tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> str:
    """sha256 of the tensors, contiguous and on the CPU, by name with dtype and shape, and of what is told of them."""
    found = hashlib.sha256(json.dumps(dict(told), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, files.DTYPES[tensor.dtype], list(tensor.shape)]).encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
