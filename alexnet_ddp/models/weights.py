"""Trained weights from wherever they lie (alexnet_ddp.models.source), read and verified.

Our own checkpoints and best weights are compared with their checksums, torchvision's files with the one in their
name. Nothing is unpickled but tensors and plain values (`torch.load(weights_only=True)`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import pickle
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from alexnet_ddp import dialect
from alexnet_ddp.checkpoint import files, store
from alexnet_ddp.errors import UserError, first_line
from alexnet_ddp.models import zoo
from alexnet_ddp.models.source import BEST, BEST_RECORD, EXPORTED, FORMS, Source, find
from alexnet_ddp.sinks import say
from alexnet_ddp.trained import packed_weights
from alexnet_ddp.trained.packed_weights import Packed

RECIPE = "config.yaml"
# Where other trainers put the weights among the rest of a checkpoint (PyTorch's ImageNet example, Lightning and timm;
# torchvision; tutorials), and what wrappers put before every name (DDP, torch.compile, Lightning).
KEYS = ("state_dict", "model", "model_state_dict", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")
PATIENCE = 30.0  # seconds without a byte after which a download is given up


@dataclass(frozen=True)
class Weights:
    """What was read. `tensors`: on the CPU, by parameter and buffer name as the net has them.

    where   for people: what was read, with its step and accuracy where they are known
    facts   plain Python, for a lineage: source, path (absolute), sha256, step, top1, model; the sha256 is that of the
            file that was read, of a checkpoint that of its manifest, which holds those of all its files
    recipe  the recipe (a plain tree) they were trained by; None where nobody says
    packed  what a file of export, quantize or prune says of them; None of all others
    """

    tensors: dict[str, Tensor]
    where: str
    facts: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    packed: Packed | None = None


def read_weights(spec: str) -> Weights:
    """Reads and verifies the weights that `spec` names (see the module's head); no GPU and no net needed.

    Raises UserError when there are none, when they are damaged, hold inf or nan or anything but tensors, or when
    torchvision's can't be had.
    """
    source = find(spec)
    if source.kind == "net":
        raise UserError(f"'{spec}' names a net, which has no weights yet. {FORMS}.")
    if source.kind in EXPORTED.values():
        raise UserError(f"{source.path} is an exported net, which runs but doesn't give its weights away. Name the "
                        "run, the checkpoint or the file of weights that it was made of.")
    read = {"best": _read_best, "checkpoint": _read_checkpoint, "safetensors": _read_safetensors,
            "pickle": _read_pickle, "torchvision": _read_torchvision}[source.kind]
    weights = read(source)
    for name, tensor in weights.tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype not in files.DTYPES:
            kind = "without values (meta)" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise UserError(f"{weights.where} holds tensors that no net here can take: {name} ({kind}). Save them as "
                            "dense float32, float16 or bfloat16.")
    try:
        store.refuse_non_finite({"weights": weights.tensors})
    except store.NotFinite as error:
        raise UserError(f"{weights.where} can't be begun with: {str(error).partition(':')[0]}.") from None
    return replace(weights, facts={**weights.facts, "source": spec})


# --- reading ----------------------------------------------------------------------------------------------------


def _read_best(source: Source) -> Weights:
    run = source.path
    data = _bytes(run / BEST)
    try:
        record = json.loads(_bytes(run / BEST_RECORD))
        expected = files.Written(**record["file"])
        step, top1, model = int(record["step"]), float(record["top1"]), str(record["model"])
    except (UserError, ValueError, KeyError, TypeError):
        raise UserError(f"{run / BEST_RECORD}, which holds the checksum of {BEST}, is missing or damaged. Let the run "
                        f"go on, or use its newest checkpoint: {run}@last.") from None
    told = _metadata(data)
    if files.Written(len(data), files.sha256(data)) != expected:
        if told.get("step") not in (None, str(step)):  # two files, and a kill came between them
            raise UserError(f"{run / BEST} is of step {told['step']} and {BEST_RECORD} of step {step}: a "
                            f"kill came between the two. Let the run go on, or use {run}@last.")
        raise UserError(f"{run / BEST} is damaged: it differs from its checksum in {BEST_RECORD}. Use the newest "
                        f"checkpoint, {run}@last, or bring back the file.")
    facts = {"path": str((run / BEST).resolve()), "sha256": expected.sha256, "step": step, "top1": top1,
             "model": model}
    try:
        recipe = dialect.read_yaml(run / RECIPE)
    except UserError:
        recipe = None
    where = f"{run} (best weights, step {step}, {top1:.2%} held-out top-1)"
    return Weights(safetensors.torch.load(data), where, facts, recipe)


def _read_checkpoint(source: Source) -> Weights:
    try:
        tensors, manifest = store.load_weights(source.path)
    except store.Damaged as error:
        raise UserError(f"The checkpoint {error.path} is damaged: {error.why}. Use another one of its run.") from None
    recipe = manifest.lineage.get("recipe")
    facts = {"path": str(source.path.resolve()), "sha256": files.sha256(manifest.encode()), "step": manifest.step,
             "top1": None, "model": (recipe or {}).get("model", {}).get("name")}
    mean = ", running mean of the weights" if store.MEAN in manifest.files else ""
    return Weights(tensors, f"{source.path} (step {manifest.step}{mean})", facts, recipe)


def _read_safetensors(source: Source) -> Weights:
    data = _bytes(source.path)
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise UserError(f"{source.path} is no whole safetensors file: {error}.") from None
    told = _metadata(data)
    packed = packed_weights.read(told, tensors, where=str(source.path))
    weights = _from_file(source.path, data, _bare(tensors), model=told.get("model"))
    if packed is None:
        return weights
    return replace(weights, facts={**packed.facts, **weights.facts, "step": packed.facts.get("step"),
                                   "top1": packed.facts.get("top1")}, recipe=packed.recipe, packed=packed)


def _read_pickle(source: Source) -> Weights:
    data = _bytes(source.path)
    try:
        # torchvision's own trainer saves its command line as an argparse.Namespace, which holds no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported global:?|class) ([\w.]+\.[\w.]+)", str(error))
        what = f"an object of {found[1]}" if found else "more than tensors and plain values"
        raise UserError(f"{source.path} holds {what}, which only running code from the file could bring back. Where it "
                        "was made, save the weights alone: torch.save(model.state_dict(), FILE).") from None
    except Exception as error:  # broken bytes break torch's reader anywhere: AssertionError, struct.error, IndexError
        raise UserError(f"{source.path} is no whole file of torch.save: {first_line(error)}.") from None
    tensors, model = _state_dict(content, source.path)
    return _from_file(source.path, data, _bare(tensors), model=model)


def _from_file(path: Path, data: bytes, tensors: dict[str, Tensor], *, model: str | None) -> Weights:
    if not tensors:
        raise UserError(f"{path} holds no tensors. Name a file, a run or a checkpoint that holds weights.")
    facts = {"path": str(path.resolve()), "sha256": files.sha256(data), "step": None, "top1": None, "model": model}
    return Weights(tensors, str(path), facts)


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The weights among what a file holds, and the name of their net where it says so."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, no state dict (tensors by name).")
    arch = content.get("arch")
    model = arch if isinstance(arch, str) else None
    for candidate in (content, *(content[key] for key in KEYS if key in content)):
        if isinstance(candidate, Mapping) and candidate and all(
                isinstance(name, str) and isinstance(value, Tensor) for name, value in candidate.items()):
            return {name: value.detach() for name, value in candidate.items()}, model
    found = ", ".join(map(str, list(content)[:8])) or "nothing"
    raise UserError(f"{path} holds no state dict (tensors by name), neither bare nor under {', '.join(KEYS)}. "
                    f"It holds: {found}.")


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the net's own names, without what wrappers put before every one."""
    while tensors and (prefix := next(
            (prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors)), None)):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _metadata(data: bytes) -> dict[str, str]:
    """What a safetensors file says of itself; {} where that can't be read."""
    try:
        length = int.from_bytes(data[:8], "little")
        told = json.loads(data[8:8 + length]).get("__metadata__", {})
        return {name: value for name, value in told.items() if isinstance(value, str)}
    except (ValueError, AttributeError):
        return {}


def _bytes(path: Path) -> bytes:
    try:
        return files.read(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from None


# --- torchvision ------------------------------------------------------------------------------------------------


def _read_torchvision(source: Source) -> Weights:
    """torchvision's default weights of a net, by torchvision's own loader, from torch's cache or the network."""
    entry = torchvision.models.get_model_weights(source.name).DEFAULT
    path = cached_file(source.name)
    if not path.is_file():
        _download(entry, path)
    data = _bytes(path)
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(_hash_in_name(path)):
        raise UserError(f"{path} is damaged or another file: its sha256 begins with {found[:8]}, its name says "
                        f"{_hash_in_name(path)}. Remove it, and it is fetched anew, or bring it from {entry.url}.")
    # By torchvision's loader, because older files need their names mended; without the auxiliary head of inception_v3,
    # which our nets haven't got either (that of googlenet it drops itself).
    net = torchvision.models.get_model(source.name, weights=entry, progress=False)
    tensors = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("AuxLogits.")}
    facts = {"path": str(path.resolve()), "sha256": found, "step": None, "top1": published(entry),
             "model": zoo.TORCHVISION + source.name}
    return Weights(tensors, f"{zoo.TORCHVISION}{source.name} ({entry.name}, {path.name})", facts)


def cached_file(name: str) -> Path:
    """Where torch keeps the default weights of torchvision's net `name`: $TORCH_HOME/hub/checkpoints/..."""
    url = str(torchvision.models.get_model_weights(name).DEFAULT.url)
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _hash_in_name(path: Path) -> str:
    """The first digits of a file's sha256, as torch.hub names its files."""
    match = torch.hub.HASH_REGEX.search(path.name)
    return match[1] if match else ""


def published(entry: Any) -> float | None:
    """The top-1 on ImageNet that torchvision tells of its weights, as a share."""
    told = entry.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return None if told is None else told / 100


def _download(entry: Any, path: Path) -> None:
    say(f"fetching {entry.url}")
    try:
        with _patience():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(entry.url, str(path), hash_prefix=_hash_in_name(path) or None,
                                           progress=False)  # a bar would fill a log
    except (OSError, RuntimeError) as error:
        raise UserError("torchvision's weights are neither in torch's cache nor to be had from the network "
                        f"({first_line(error)}).\nWhere there is a network, fetch {entry.url}\nand put it here as "
                        f"{path}\n(TORCH_HOME says where the cache is).") from None


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """torch.hub downloads without a time limit: a firewall that drops packets would hold the job for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
