"""Trained weights, wherever they lie: one grammar for every place where a model is asked for.

    RUN                      a run directory: its best weights (also RUN@best)
    RUN@last, RUN@step_N     the newest of its checkpoints that verifies, or that of step N
    RUN/checkpoints/step_N   a checkpoint
    FILE.safetensors         weights by name, bare or as export, quantize and prune write them
    FILE.pth, .pt, .pth.tar  a state dict as torch.save wrote it, bare or as other trainers wrap it
    FILE.onnx, FILE.pt2      an exported net (alexnet_ddp.trained.export): it runs, and its weights stay inside
    torchvision:NAME         torchvision's own weights of the net
    NAME                     a net by name (alexnet_single, ...): no weights, fresh ones

Our own checkpoints and best weights are compared with their checksums, torchvision's files with the one in their
name. Nothing is unpickled but tensors and plain values (`torch.load(weights_only=True)`).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import json
import os
import pickle
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from alexnet_ddp import config as recipes
from alexnet_ddp.checkpoint import choose, files, store
from alexnet_ddp.errors import UserError, first_line
from alexnet_ddp.models import zoo
from alexnet_ddp.sinks import say
from alexnet_ddp.trained import packed_weights
from alexnet_ddp.trained.packed_weights import Packed

BEST, BEST_RECORD, RECIPE = "best.safetensors", "best.json", "config.yaml"
PICKLED = (".pth", ".pt", ".tar", ".ckpt", ".bin")
# Where other trainers put the weights among the rest of a checkpoint (PyTorch's ImageNet example, Lightning and timm;
# torchvision; tutorials), and what wrappers put before every name (DDP, torch.compile, Lightning).
KEYS = ("state_dict", "model", "model_state_dict", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")
PATIENCE = 30.0  # seconds without a byte after which a download is given up
LISTED = 3  # names that a message lists

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


# --- finding ----------------------------------------------------------------------------------------------------


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
    raise UserError(f"There is no '{spec}'.{_nearby(path)} {FORMS}.")


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
                f" {path.name}: {why}." for path, why in damaged[:LISTED]))
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
        recipe = recipes.read_yaml(run / RECIPE)
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


# --- into a net -------------------------------------------------------------------------------------------------


def put_into(net: nn.Module, weights: Weights, *, recipe: dict[str, Any] | None = None) -> list[str]:
    """Copies the weights into a net of the same names and shapes; returns the tensors that keep their fresh values.

    Those are the last layer's, where it has another number of classes. `recipe`: the net's own (a plain tree), for
    the message. Raises UserError, and leaves the net as it was, when anything else doesn't fit.
    """
    if weights.packed is not None and weights.packed.quantization is not None:
        raise UserError(f"{weights.where} holds a quantized net, whose weights are no floating-point numbers that "
                        "could be trained on. Use the net that it was made from.")
    live = net.state_dict()
    there = weights.tensors
    missing, foreign = sorted(live.keys() - there.keys()), sorted(there.keys() - live.keys())
    other = [name for name in live if name in there and live[name].shape != there[name].shape]
    head = last_layer(net)
    fresh = other if all(name in head and live[name].shape[1:] == there[name].shape[1:] for name in other) else []
    if missing or foreign or other != fresh:
        lines = [_listed("not there", missing), _listed("not in this net", foreign),
                 _listed("of another shape", [f"{name} ({list(there[name].shape)} there, {list(live[name].shape)} here)"
                                              for name in other])]
        raise UserError(f"The weights of {weights.where} don't fit this net:\n" + "".join(
            f"  {line}\n" for line in lines if line) + _way_out(weights.recipe, recipe))
    fresh = head if fresh else []  # a layer is fresh as a whole
    for name, tensor in live.items():
        if name not in fresh:
            _check_numbers(name, there[name], tensor, where=weights.where)
    with torch.no_grad():
        for name, tensor in live.items():
            if name not in fresh:
                tensor.copy_(there[name])
    return fresh


def _check_numbers(name: str, theirs: Tensor, ours: Tensor, *, where: str) -> None:
    """Raises UserError when a copy into a tensor of the net would lose more than precision."""
    if ours.is_floating_point() and not theirs.is_floating_point():  # complex, quantized: their parts would be lost
        raise UserError(f"The weights of {where} don't fit this net: {name} holds {theirs.dtype}, and the net's is "
                        f"{ours.dtype}. Save them as real floating-point numbers.")
    wider = ours.is_floating_point() and torch.finfo(theirs.dtype).max > torch.finfo(ours.dtype).max
    if wider and theirs.numel() and not torch.isfinite((largest := theirs.abs().max()).to(ours.dtype)):
        raise UserError(f"The weights of {where} don't fit this net: {name} holds numbers up to {largest.item():.3g}, "
                        f"beyond what {ours.dtype} can hold. Take weights of an earlier step.")


def last_layer(net: nn.Module) -> list[str]:
    """Names of the tensors of the layer that gives the logits: the one that is defined last, in all our nets."""
    parameters = [name for name, _ in net.named_parameters()]
    layer = parameters[-1].rpartition(".")[0]
    return [name for name in parameters if name.rpartition(".")[0] == layer]


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{what}: {', '.join(names[:LISTED])}{more}" if names else ""


def _way_out(theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    """The fields by which the two nets differ, where both recipes are known."""
    if theirs is None or ours is None:
        return "Use the net (model.*, and for alexnet_single augment.size) that they were trained with."
    wanted, have = recipes.flatten(theirs), recipes.flatten(ours)
    changes = [f"{path}={_word(wanted[path])} (here {_word(have.get(path))})" for path in wanted
               if (path.startswith("model.") or path == "augment.size") and path != "model.num_classes"
               and path != "model.dropout" and wanted[path] != have.get(path)]
    return "They were trained with " + (", ".join(changes) or "the same net") + "."


def _word(value: Any) -> str:
    return "null" if value is None else str(value)
