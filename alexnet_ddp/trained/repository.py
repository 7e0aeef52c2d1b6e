"""A model repository as NVIDIA Triton Inference Server reads it: exported nets under version numbers.

    DIR/NAME/config.pbtxt      names the one version that is served
    DIR/NAME/labels.txt        what the classes are called, a line each, in the order of the logits
    DIR/NAME/N/model.onnx      version N = 1, 2, ...; any number of images at a time

Fields: protobuf/model_config.proto of github.com/triton-inference-server/common; layout: docs/user_guide/
model_repository.md of its server. A version appears whole, by a rename, and only then config.pbtxt, replaced in one
step too, says that it is served. To roll back is to name an older one there: no version is ever changed or removed.
One config.pbtxt describes all versions of a model, so a net that takes or gives something else needs another name.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alexnet_ddp.checkpoint import files
from alexnet_ddp.errors import UserError
from alexnet_ddp.trained.export import Exported, export
from alexnet_ddp.trained.exported import INPUT, OUTPUT, Precision
from alexnet_ddp.trained.model import Model
from alexnet_ddp.trained.packed_weights import LEFT

CONFIG, LABELS, NET = "config.pbtxt", "labels.txt", "model.onnx"
MAX_BATCH = 32  # images that the server puts together, until somebody writes another number into config.pbtxt
# Behind the version that is served, those that were before it, the newest first: by them --rollback goes back.
SERVED = re.compile(r"^version_policy \{ specific \{ versions: \[ (\d+) \] \} \}(?: # before: ([\d ]+))?$",
                    re.MULTILINE)
REMEMBERED = 20  # versions


@dataclass(frozen=True)
class Published:
    """`version` of the model `name` is what the server is to serve; before it `before` (None: nothing)."""

    name: str
    version: int
    before: int | None
    exported: Exported


def publish(model: Model, repository: Path, *, name: str, precision: Precision = "fp32", images: Sequence[str] = (),
            tolerance: float | None = None) -> Published:
    """Exports `model` as the next version of `name` and has config.pbtxt name it. Makes the folders it needs.

    Raises UserError as export does, and where the folder holds something else or versions of an unlike net; what was
    served before is then served still.
    """
    folder = _folder(repository, name)
    tensors, labels = _tensors(model), "".join(" ".join(label.split()) + "\n" for label in model.spoken)
    before = _refuse_unlike(folder, tensors, labels)
    staged, made = folder / f".tmp-{secrets.token_hex(4)}", not repository.exists()
    try:
        staged.mkdir(parents=True)
        for left in folder.glob(".tmp-*/"):  # of exports that were killed
            if time.time() - left.stat().st_mtime > LEFT:
                shutil.rmtree(left, ignore_errors=True)
        try:
            done = export(model, staged / NET, format="onnx", precision=precision, batch=None, images=images,
                          tolerance=tolerance)
        except UserError as mistake:  # for people it is the model's folder
            raise UserError(str(mistake).replace(str(staged), str(folder))) from None
        if before is None or not (folder / LABELS).is_file():  # a killed export may have left other names
            files.replace(folder / LABELS, content=labels.encode())
        version = max(versions(folder), default=0) + 1
        while not _named(staged, folder / str(version)):
            version += 1
        files.sync_directory(folder)
        if before is None:
            files.replace(folder / CONFIG, content=_config(name, tensors, version).encode())
        else:
            before = _served(folder) or before  # another export may have been served meanwhile
            _serve(folder, version, before=[before, *_history(folder)])
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{folder} can't be written: {why}. Make room, or name another place.") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # where it is empty
            if made:
                repository.rmdir()
    return Published(name, version, before, replace(done, path=folder / str(version) / NET))


def rollback(repository: Path, *, name: str) -> tuple[int, int]:
    """Has config.pbtxt name the version that was served before the one that it names; returns (from, to).

    Raises UserError where there is no such model or no older version.
    """
    folder = _folder(repository, name)
    served = _served(folder)
    if served is None:
        others = ", ".join(sorted(path.parent.name for path in repository.glob(f"*/{CONFIG}"))) or "none"
        raise UserError(f"{repository} has no model '{name}' of alexnet-ddp. There are: {others}.")
    there, told = versions(folder), _history(folder)
    before = [version for version in told if version in there and version != served]
    if not told:  # by another hand, or of an earlier version of this program
        before = sorted((version for version in there if version < served), reverse=True)[:1]
    if not before:
        raise UserError(f"{name} is served in version {served}, and there is none before it in {folder}.")
    _serve(folder, before[0], before=before[1:])
    return served, before[0]


def versions(folder: Path) -> list[int]:
    """Those that are whole, ascending."""
    names = (path.parent.name for path in folder.glob(f"*/{NET}"))
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9]\d*", name))


def _folder(repository: Path, name: str) -> Path:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"A model's name is a folder's and part of an address: letters, digits, _ . -; got '{name}'.")
    return repository / name


def _named(staged: Path, path: Path) -> bool:
    """Gives the staged version its number; False where another export has just taken that."""
    try:
        os.rename(staged, path)
    except OSError:
        if not path.exists():
            raise
        return False
    return True


# --- config.pbtxt -----------------------------------------------------------------------------------------------


def _tensors(model: Model) -> str:
    """The part of config.pbtxt that the net decides; its comments say what clients must do."""
    preprocessing = model.preprocessing
    size, told = preprocessing.size, "; ".join(preprocessing.told())
    return f"""# images: {told}
input [
  {{
    name: "{INPUT}"
    data_type: TYPE_FP32
    format: FORMAT_NCHW
    dims: [ {preprocessing.channels}, {size}, {size} ]
  }}
]
output [
  {{
    name: "{OUTPUT}"
    data_type: TYPE_FP32
    dims: [ {model.num_classes} ]
    label_filename: "{LABELS}"
  }}
]
"""


def _config(name: str, tensors: str, version: int) -> str:
    return f"""# By alexnet-ddp export --repo, which from now on changes the line version_policy alone.
name: "{name}"
platform: "onnxruntime_onnx"
max_batch_size: {MAX_BATCH}
{tensors}dynamic_batching {{ }}
{_policy(version)}
"""


def _policy(version: int, before: Sequence[int] = ()) -> str:
    told = f" # before: {' '.join(map(str, before[:REMEMBERED]))}" if before else ""
    return f"version_policy {{ specific {{ versions: [ {version} ] }} }}{told}"


def _history(folder: Path) -> list[int]:
    """The versions that were served before, the newest first."""
    found = SERVED.search((folder / CONFIG).read_text())
    return [int(word) for word in (found[2] or "").split()] if found else []


def _refuse_unlike(folder: Path, tensors: str, labels: str) -> int | None:
    """The version that is served now; raises UserError where the model there isn't of the same kind."""
    served = _served(folder)
    if served is None:
        strange = [path.name for path in folder.glob("*") if path.name != LABELS and not path.name.startswith(".tmp-")
                   and not re.fullmatch(r"[1-9]\d*", path.name)]
        if strange:
            raise UserError(f"{folder} holds no model of alexnet-ddp but {', '.join(sorted(strange)[:3])}. Use another "
                            "--name.")
        return None
    if tensors not in (folder / CONFIG).read_text():
        raise UserError(f"{folder / CONFIG} describes a net that takes or gives something else (size, classes or "
                        "preprocessing), and it holds for all versions. Publish this one by another --name.")
    try:
        there = (folder / LABELS).read_text()
    except OSError:
        there = labels  # and is written anew
    if there != labels:
        raise UserError(f"{folder / LABELS} names other classes, and it holds for all versions. Publish this net by "
                        "another --name.")
    return served


def _served(folder: Path) -> int | None:
    """The version that config.pbtxt names; None where there is no such file."""
    try:
        text = (folder / CONFIG).read_text()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{folder / CONFIG} can't be read: {error.strerror or error}.") from None
    found = SERVED.search(text)
    if found is None:
        raise UserError(f"{folder / CONFIG} has no line '{_policy(1)}', by which versions are changed. Put it back, or "
                        "publish by another --name.")
    return int(found[1])


def _serve(folder: Path, version: int, *, before: Sequence[int]) -> None:
    """In one step: a server, or a kill, meets the old text or the new."""
    path = folder / CONFIG
    try:
        files.replace(path, content=SERVED.sub(_policy(version, before), path.read_text()).encode())
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}.") from None
