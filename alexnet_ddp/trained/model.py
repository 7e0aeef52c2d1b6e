"""A trained net with all that is needed to use it, from whatever names it.

    from alexnet_ddp import load_model

    model = load_model("runs/alexnet_single")            # or any MODEL of alexnet_ddp.models.source
    model.classify(["photo.jpg"])
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import Tensor, nn

from alexnet_ddp import config as recipes
from alexnet_ddp.checkpoint.files import Written
from alexnet_ddp.config import Config
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.errors import UserError
from alexnet_ddp.models import zoo
from alexnet_ddp.models.fitting import last_layer, put_into
from alexnet_ddp.models.recipe import create_for
from alexnet_ddp.models.source import EXPORTED, Source, find
from alexnet_ddp.models.weights import Weights, read_weights
from alexnet_ddp.runfiles import CLASSES
from alexnet_ddp.trained import classes as names
from alexnet_ddp.trained import packed_weights
from alexnet_ddp.trained.packed_weights import Packed
from alexnet_ddp.trained.preprocessing import Preprocessing

if TYPE_CHECKING:
    from alexnet_ddp.trained.prediction import Answer

NOWHERE = "-"  # data.train of a recipe that nobody trains by
NAMELESS = "the names of its classes aren't known: they are numbers"


@dataclass
class Model:
    """A net in evaluation mode on `device`, fp32, and how photographs are brought to it.

    net            maps normalised float32 [n, channels, size, size] to logits float32 [n, classes]
    classes        as the data call them, in the order of the logits; () where nobody knows
    config         the recipe it was trained by, as far as known; data.* then says where its data lay
    where          for people: what was read
    facts          plain Python: source, path, sha256, step, top1, model (see models.weights.Weights)
    notes          worth telling people: what was assumed
    quantization   how its layers are quantized (alexnet_ddp.trained.quantization); None: all are floating-point
    """

    net: nn.Module
    name: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    config: Config
    where: str
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quantization: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.net.eval().requires_grad_(False)
        self._augment: Augment = self.preprocessing.augment(self.device)

    @property
    def num_classes(self) -> int:
        return self.config.model.num_classes

    @property
    def spoken(self) -> list[str]:
        """The classes' names for people; their numbers where nobody knows them."""
        return names.spoken(self.classes) or [str(number) for number in range(self.num_classes)]

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 [n, size, size, channels] on the device -> what the net sees: float32 [n, channels, size, size]."""
        return self._augment(images, None)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """uint8 [n, size, size, channels] on the device -> logits float32 [n, classes]."""
        return self.net(self.pixels(images)).float()

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Of views that preprocessing.choose gave: uint8 [n, v, size, size, channels] -> float32 [n, classes].

        One view: its softmax. More: the mean over the softmaxes of all of them and of their mirror images
        (Krizhevsky et al. 2012, section 4.1). Each view goes through the net by itself: n images at a time.
        """
        if images.shape[1] == 1:
            return self.logits(images[:, 0]).softmax(1)
        shown = [view for number in range(images.shape[1]) for view in (images[:, number], images[:, number].flip(2))]
        return torch.stack([self.logits(view).softmax(1) for view in shown]).mean(0)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, live, as they are written to files: quantized weights in their parts."""
        if self.quantization is None:
            return self.net.state_dict()
        from alexnet_ddp.trained import quantization

        return quantization.parts(self.net)

    def save(self, path: Path, *, tensors: Mapping[str, Tensor] | None = None) -> Written:
        """Writes all of it to a new .safetensors file, which load_model opens; `tensors`: instead of its own.

        Raises UserError when there is such a file already, or when it can't be written.
        """
        packed = Packed(model=self.name, recipe=self.config.model_dump(mode="json"), classes=self.classes,
                        preprocessing=self.preprocessing.plain(), facts=self.facts, quantization=self.quantization)
        return packed_weights.write(path, tensors=self.tensors() if tensors is None else tensors, packed=packed)

    def classify(self, places: Sequence[str | Path], *, top: int = 5, crops: int = 1) -> list[Answer]:
        """The `top` likeliest classes of all pictures at `places`: files, folders, tars; in that order.

        A picture that can't be read has an `error` instead. `crops` as for `probabilities`. Raises UserError for places
        without pictures. Answers one by one: alexnet_ddp.trained.prediction.classify.
        """
        from alexnet_ddp.trained.prediction import classify

        return list(classify(self, [str(place) for place in places], top=top, crops=crops))


def load_model(spec: str | Path, overrides: Iterable[str] = (), *, device: str | torch.device = "cpu") -> Model:
    """The model that `spec` names: a run, a checkpoint, a file of weights, a net (see alexnet_ddp.models.source).

    `overrides` (key=value, as for a recipe) say what the weights don't: model.* of a bare file, augment.mean ...
    Raises UserError when there is no such model, when it is damaged, or when the net can't be made.
    """
    spec, overrides, device = str(spec), list(overrides), torch.device(device)
    source = find(spec)
    if source.kind == "net":
        tree = recipes.apply_overrides({"model": {"name": source.name}}, overrides)
        config = config_in_use(tree)
        torch.manual_seed(config.seed)
        notes = [f"{source.name} has no trained weights: these are fresh ones, of seed {config.seed}"]
        return _model(config, None, where=f"{source.name}, fresh weights", notes=notes, device=device,
                      preprocessing=Preprocessing.of(config))
    if source.kind in EXPORTED.values():
        from alexnet_ddp.trained.exported import open_exported

        return open_exported(source, overrides, device)
    weights = read_weights(spec)
    tree = _tree(weights, overrides)
    config = config_in_use(recipes.apply_overrides(tree, overrides))
    preprocessing = Preprocessing.of(config)
    notes = []
    if source.kind == "torchvision":
        theirs, more = _torchvision_preprocessing(source.name, preprocessing)
        preprocessing = changed(theirs, before=config_in_use(tree), now=config)
        notes += more
    if weights.packed is not None:
        told = _packed_preprocessing(weights.packed, where=weights.where)
        preprocessing = changed(told, before=config_in_use(weights.packed.recipe), now=config)
    model = _model(config, weights, where=weights.where, notes=notes, device=device, preprocessing=preprocessing)
    model.classes = _classes(source, weights, config)
    if not model.classes:
        model.notes.append(NAMELESS)
    return model


def config_in_use(tree: dict[str, Any]) -> Config:
    """A recipe for a net that is only used: it need not say what to train on."""
    tree = {"init_from": None, **tree}
    data = {**tree.get("data", {})}
    return recipes.build({**tree, "data": {**data, "train": data.get("train") or NOWHERE}, "init_from": None,
                          "memory": {}, "freeze": [], "sparsity": "free"})


def _model(config: Config, weights: Weights | None, *, where: str, notes: list[str], device: torch.device,
           preprocessing: Preprocessing) -> Model:
    net = create_for(config, on_gpu=False)
    how = weights.packed.quantization if weights is not None and weights.packed is not None else None
    if weights is not None and how is not None:
        from alexnet_ddp.trained import quantization

        notes = notes + quantization.put_into(net.to(device), weights, how)
    elif weights is not None and (fresh := put_into(net, weights, recipe=config.model_dump(mode="json"))):
        raise UserError(f"{weights.where} holds a last layer for another number of classes than model.num_classes="
                        f"{config.model.num_classes} ({fresh[0]}). Leave model.num_classes out.")
    net = net.to(device).to(memory_format=torch.channels_last)
    return Model(net, config.model.name, preprocessing, (), config, where, dict(weights.facts) if weights else {},
                 notes, device, how)


def _packed_preprocessing(packed: Packed, *, where: str) -> Preprocessing:
    """That of the file."""
    try:
        return Preprocessing.from_plain(packed.preprocessing)
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{where} tells of no preprocessing that is known here. Write it anew.") from None


def changed(told: Preprocessing, *, before: Config, now: Config) -> Preprocessing:
    """`told`, but for what differs between the recipes before and after overrides. Pure."""
    old, new = Preprocessing.of(before), Preprocessing.of(now)
    return replace(told, **{each.name: getattr(new, each.name) for each in fields(new)
                            if getattr(new, each.name) != getattr(old, each.name)})


def _tree(weights: Weights, overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe the weights were trained by, or what can be told from the weights themselves."""
    if weights.recipe is not None:
        return weights.recipe
    told = [recipes.parse_override(text) for text in overrides]
    name = next((value for path, value in told if path == ["model", "name"]), weights.facts.get("model"))
    if not isinstance(name, str):
        raise UserError(f"{weights.where} doesn't say of which net its weights are. Name it: model.name=alexnet_single "
                        "(and model.width and the like, where they aren't the defaults).")
    if name not in zoo.names() and zoo.TORCHVISION + name in zoo.names():
        name = zoo.TORCHVISION + name  # as PyTorch's ImageNet example names its nets
    with torch.device("cpu" if "regnet" in name else "meta"):  # RegNets compute their widths with tensors
        bias = last_layer(zoo.create_model(name))[-1]  # files keep tensors in any order
    found = weights.tensors.get(bias, torch.empty(1000))
    tree: dict[str, Any] = {"model": {"name": name, "num_classes": found.shape[0] if found.ndim else 1000}}
    if name.startswith(zoo.TORCHVISION):
        told_by = _transforms(name.removeprefix(zoo.TORCHVISION))
        tree["augment"] = {"size": told_by.crop_size[0], "mean": list(told_by.mean), "std": list(told_by.std)}
    return tree


def _transforms(name: str) -> Any:
    return torchvision.models.get_model_weights(name).DEFAULT.transforms()


def _torchvision_preprocessing(name: str, like: Preprocessing) -> tuple[Preprocessing, list[str]]:
    """As torchvision tells of its own weights; a note where its resize isn't ours."""
    told = _transforms(name)
    notes = []
    if told.interpolation.value != "bilinear":
        notes.append(f"torchvision resizes {told.interpolation.value} for {name}, we bilinearly: accuracies differ a "
                     "little from those it publishes")
    return Preprocessing(size=told.crop_size[0], short=told.resize_size[0], channels=3, resize=like.resize,
                         mean=tuple(told.mean), std=tuple(told.std)), notes


def _classes(source: Source, weights: Weights, config: Config) -> tuple[str, ...]:
    """What the logits stand for, as the data call it; () where nobody knows."""
    if source.kind == "torchvision":
        return tuple(names.imagenet())
    if weights.packed is not None:
        return weights.packed.classes
    run = {"best": source.path, "checkpoint": source.path.parent.parent}.get(source.kind)
    if run is None:
        return ()
    try:
        told = json.loads((run / CLASSES).read_text())
    except (OSError, ValueError):
        return ()
    fits = isinstance(told, list) and len(told) == config.model.num_classes
    return tuple(map(str, told)) if fits else ()

