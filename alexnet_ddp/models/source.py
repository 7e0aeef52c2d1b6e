"""Where trained weights lie: one grammar for every place where a model is asked for.

    RUN                      a run directory: its best weights (also RUN@best)
    RUN@last, RUN@step_N     the newest of its checkpoints that verifies, or that of step N
    RUN/checkpoints/step_N   a checkpoint
    FILE.safetensors         weights by name, bare or as export, quantize and prune write them
    FILE.pth, .pt, .pth.tar  a state dict as torch.save wrote it, bare or as other trainers wrap it
    FILE.onnx, FILE.pt2      an exported net (alexnet_ddp.trained.export): it runs, and its weights stay inside
    torchvision:NAME         torchvision's own weights of the net
    NAME                     a net by name (alexnet_single, ...): no weights, fresh ones
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alexnet_ddp.checkpoint import choose, store
from alexnet_ddp.errors import UserError
from alexnet_ddp.models import zoo

BEST, BEST_RECORD = "best.safetensors", "best.json"
PICKLED = (".pth", ".pt", ".tar", ".ckpt", ".bin")

EXPORTED: dict[str, Literal["onnx", "program"]] = {".onnx": "onnx", ".pt2": "program"}

Kind = Literal["best", "checkpoint", "safetensors", "pickle", "onnx", "program", "torchvision", "net"]

FORMS = ("A model is a run directory (RUN, RUN@last, RUN@step_N), a checkpoint, a .safetensors, .pth, .pt, .onnx or "
         ".pt2 file, or torchvision:NAME")


@dataclass(frozen=True)
class Source:
    """Where weights are to be read: a path, or the name of a net."""

    kind: Kind
    path: Path = Path()
    name: str = ""  # of the net, for torchvision and net


def find(spec: str) -> Source:
    """What a word means, as far as names and folders tell. Raises UserError that says what there is."""
    if spec.startswith(zoo.TORCHVISION):
        name = spec.removeprefix(zoo.TORCHVISION)
        _check_torchvision_name(name)
        return Source("torchvision", name=name)
    path = _path(spec)
    before, at, which = spec.rpartition("@")
    try:
        if path.is_dir():
            return _in_folder(path, which="")
        if path.is_file():
            return _file(path)
        if at and _path(before).is_dir():
            return _in_folder(_path(before), which=which)
    except OSError as error:  # a name that is too long, a file system that is away
        raise UserError(f"'{spec}' can't be looked for: {error.strerror or error}. {FORMS}.") from None
    if spec in zoo.OURS:
        return Source("net", name=spec)
    near = difflib.get_close_matches(spec, zoo.OURS, n=1, cutoff=0.75)
    hint = f" Did you mean the net {near[0]}?" if near else _nearby(path)
    raise UserError(f"There is no '{spec}'.{hint} {FORMS}.")


def _path(text: str) -> Path:
    """With the home directory for ~; a user whom nobody knows is left to be not found."""
    return Path(os.path.expanduser(text))


def _in_folder(folder: Path, *, which: str) -> Source:
    if (folder / store.MANIFEST).is_file() and not which:
        return Source("checkpoint", folder)
    if folder.name == "checkpoints":
        raise UserError(f"{folder} holds a run's checkpoints: name one of them, or the newest as {folder.parent}@last.")
    saved = choose.order([path.name for path in folder.glob("checkpoints/step_*")])
    if which in ("", "best"):
        if (folder / BEST).is_file():
            return Source("best", folder)
        if not saved:
            raise UserError(f"{folder} is no run directory: it holds neither {BEST} nor checkpoints. {FORMS}.")
        raise UserError(f"{folder} has no {BEST}: the run was not evaluated so far (data.val). Its newest checkpoint "
                        f"is {folder}@last.")
    if which == "last":
        newest, damaged = choose.newest(folder / "checkpoints")
        if newest is None:
            raise UserError(f"{folder} has no checkpoint that verifies." + "".join(
                f" {path.name}: {why}." for path, why in damaged[:3]))
        return Source("checkpoint", newest)
    number = re.fullmatch(r"(?:step_)?(\d+)", which)
    wanted = store.directory_name(int(number[1])) if number else which
    if wanted not in saved:
        there = ", ".join(["last", *(name for name in saved if not name.endswith(store.PREVIOUS))][:8])
        raise UserError(f"{folder} has no checkpoint '{which}'. There are: {there}.")
    return Source("checkpoint", folder / "checkpoints" / wanted)


def _file(path: Path) -> Source:
    if path.name == BEST and (path.parent / BEST_RECORD).is_file():
        return Source("best", path.parent)  # so that it is compared with its checksum
    if (path.parent / store.MANIFEST).is_file() and choose.order([path.parent.name]):
        return Source("checkpoint", path.parent)
    if path.suffix == store.SUFFIX:
        return Source("safetensors", path)
    if path.suffix in PICKLED:
        return Source("pickle", path)
    if path.suffix in EXPORTED:
        return Source(EXPORTED[path.suffix], path)
    raise UserError(f"{path} doesn't end in .safetensors, .pth, .pt, .onnx or .pt2. {FORMS}.")


def _nearby(path: Path) -> str:
    """A name beside the missing one, or a run of that name."""
    if len(path.parts) == 1 and (Path("runs") / path).is_dir():
        return f" Did you mean {Path('runs') / path}?"
    try:
        names = [found.name for found in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name.partition("@")[0], names, n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def _check_torchvision_name(name: str) -> None:
    known = zoo.names()
    if zoo.TORCHVISION + name not in known:
        near = difflib.get_close_matches(zoo.TORCHVISION + name, known, n=1, cutoff=0.5)
        raise UserError(f"torchvision has no classifier '{name}'" + (f"; did you mean {near[0]}?" if near else
                        "; `alexnet-ddp models` lists them all."))
