"""What a comparison tells of a MODEL without measuring: sizes, costs, accuracy and where it is from.

No trained weights are needed for that, nor to time a net: torchvision:NAME is made with fresh ones, nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from alexnet_ddp import config as recipes
from alexnet_ddp.checkpoint import store
from alexnet_ddp.config import Config
from alexnet_ddp.errors import UserError
from alexnet_ddp.models import zoo
from alexnet_ddp.models.recipe import create_for
from alexnet_ddp.models.source import BEST_RECORD, Source, find
from alexnet_ddp.models.weights import published
from alexnet_ddp.runfiles import METRICS
from alexnet_ddp.sinks import read_records
from alexnet_ddp.trained.graph import ExportedNet
from alexnet_ddp.trained.model import NOWHERE, load_model


@dataclass
class Entry:
    """One MODEL of a comparison; None where nobody knows.

    size, channels, classes   of what it takes (pixels) and gives
    parameters, macs          of one image, as models.zoo.describe counts them
    top1, source              accuracy as a share, and who says so
    file_bytes, file          size of its weights on the disk, and of which file; "computed": 4 bytes a value
    trainable                 whether it can be trained here: an exported or quantized net can't
    """

    spec: str
    net: str
    size: int
    channels: int
    classes: int
    parameters: int | None = None
    macs: int | None = None
    top1: float | None = None
    source: str = ""
    file_bytes: int | None = None
    file: str = ""
    trainable: bool = True
    notes: list[str] = field(default_factory=list)


def same(specs: Sequence[str]) -> tuple[list[str], list[str]]:
    """The models without those that are named twice, and a note for each of these. Raises UserError for names that
    mean nothing, before anything is read."""
    chosen: dict[Source, str] = {}
    notes = []
    for spec in specs:
        source = find(spec)
        key = Source(source.kind, source.path.resolve(), source.name)
        if key in chosen:
            notes.append(f"{spec} is named twice" + (f", also as {chosen[key]}" if chosen[key] != spec else "") +
                         ": measured once")
        chosen.setdefault(key, spec)
    return list(chosen.values()), notes


def look(spec: str, overrides: Sequence[str] = ()) -> Entry:
    """What is known of a model before its net is made; of files, all that hangs on the net is None. Reads no weights.

    Raises UserError for names that mean nothing and for options that the net doesn't have.
    """
    source = find(spec)
    if source.kind not in ("net", "torchvision"):
        return Entry(spec, "", 0, 0, 0)
    config = fresh_config(source, overrides)
    with torch.device("cpu" if "regnet" in config.model.name else "meta"):  # RegNets compute their widths with tensors
        net = create_for(config, on_gpu=False)
    entry = _entry(spec, config)
    _count(entry, net)
    entry.top1, entry.source = _published(config)
    entry.notes.append(f"{spec}: timed with fresh weights" + (
        f"; top-1 as published for {entry.source}" if entry.top1 is not None else ", which have no accuracy"))
    return entry


def open_net(spec: str, overrides: Sequence[str] = (), *, device: torch.device) -> tuple[Entry, nn.Module]:
    """The same with the net, in evaluation mode and channels_last on `device`. Raises UserError as load_model does."""
    source = find(spec)
    if source.kind in ("net", "torchvision"):
        entry = look(spec, overrides)
        net = create_for(fresh_config(source, overrides), on_gpu=device.type == "cuda")
        return entry, net.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    model = load_model(spec, overrides, device=device)
    entry = _entry(spec, model.config)
    entry.size, entry.channels = model.preprocessing.size, model.preprocessing.channels
    _count(entry, model.net)
    entry.top1, entry.source = _reached(source, model.facts)
    path = Path(str(model.facts.get("path", "")))
    if path.is_file():
        entry.file_bytes, entry.file = path.stat().st_size, path.name
    entry.notes += [f"{spec}: {note}" for note in model.notes]
    return entry, model.net


def fresh_config(source: Source, overrides: Sequence[str]) -> Config:
    """The recipe of a net by name: torchvision's are given images as their published weights want them."""
    tree: dict[str, Any] = {"model": {"name": source.name}, "data": {"train": NOWHERE}}
    if source.kind == "torchvision":
        told = torchvision.models.get_model_weights(source.name).DEFAULT.transforms()
        tree["model"] = {"name": zoo.TORCHVISION + source.name}
        tree["augment"] = {"size": told.crop_size[0], "mean": list(told.mean), "std": list(told.std)}
    return recipes.build(recipes.apply_overrides(tree, list(overrides)))


def _entry(spec: str, config: Config) -> Entry:
    return Entry(spec, config.model.name, config.augment.size, config.model.in_channels, config.model.num_classes)


def _count(entry: Entry, net: nn.Module) -> None:
    """Parameters, MACs and bytes; a net whose layers torch can't be asked (exported, quantized) keeps None."""
    parameters = list(net.parameters())
    if isinstance(net, ExportedNet) or not parameters or any(
            type(each) is not nn.Parameter or not each.is_floating_point() for each in parameters):
        entry.trainable = False
        entry.notes.append(f"{entry.spec}: its layers can't be asked for parameters and MACs, nor trained")
        return
    layers = zoo.describe(net, image_size=entry.size, in_channels=entry.channels)
    entry.parameters, entry.macs = sum(row.parameters for row in layers), sum(row.macs for row in layers)
    state = net.state_dict().values()
    entry.file_bytes, entry.file = sum(value.numel() * value.element_size() for value in state), "computed"


def _published(config: Config) -> tuple[float | None, str]:
    """torchvision's figure for its own default weights, where the net is theirs or takes theirs unchanged."""
    model = config.model
    name = {"alexnet_torchvision": "alexnet"}.get(model.name, model.name.removeprefix(zoo.TORCHVISION))
    if name == model.name:
        return None, ""
    entry = torchvision.models.get_model_weights(name).DEFAULT
    theirs = (model.num_classes, model.in_channels, model.width, config.augment.size)
    if theirs != (len(entry.meta["categories"]), 3, 1.0, entry.transforms().crop_size[0]):
        return None, ""
    return published(entry), f"torchvision's {type(entry).__name__}.{entry.name}"


def _reached(source: Source, facts: dict[str, Any]) -> tuple[float | None, str]:
    """The held-out accuracy of a run's weights: a checkpoint's own evaluation, else the run's best, said so."""
    if source.kind == "best":
        return facts.get("top1"), f"{source.path.name}/{BEST_RECORD}, step {facts.get('step')}"
    if source.kind != "checkpoint":  # quantize, prune and export write down what they know
        top1 = facts.get("top1")
        return (None, "") if top1 is None else (top1, f"{source.path.name} says so")
    run, step = source.path.parent.parent, facts.get("step")
    try:
        evaluated = [record for record in read_records(run / METRICS) if record["kind"] == "evaluate"]
    except (OSError, UserError):
        evaluated = []
    for record in reversed(evaluated):
        if record["step"] == step:
            return record.get("ema_top1", record["top1"]), f"{run.name}/{METRICS}, step {step}"
    best = store.read_best(run)
    if best is not None:
        return best["top1"], f"{run.name}/{BEST_RECORD}: the run's best, of step {best['step']}, not this one's"
    return None, ""
