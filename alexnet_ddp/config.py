"""A recipe: YAML and `key=value` overrides, composed, typed, checked and compared.

    config = load("configs/demo.yaml", ["seed=1", "optim.lr=0.02"])
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError, field_validator

from alexnet_ddp import sections as s
from alexnet_ddp.determinism import check_name
from alexnet_ddp.errors import UserError


class Config(s.Section):
    """The effective recipe of a run (field by field in `alexnet_ddp.sections`)."""

    name: str = s.field("", "free", "the run's name: its directory is RUNS/NAME")
    runs: str = s.field("runs", "free", "folder that holds the run directories")
    seed: int = s.field(0, "order", "of weights, order, augmentation and dropout", ge=0, lt=2**63)
    model: s.ModelSection = s.field(s.ModelSection, "order", "the net")
    init_from: str | None = s.field(
        None, "order", "trained weights that a new run begins with: a run directory (RUN, RUN@last, RUN@step_N), a "
        ".safetensors or .pth file, or torchvision:NAME; a resume doesn't read them again", min_length=1)
    freeze: list[str] = s.field(
        list, "order", "parts of the net that don't learn, by the beginning of their names: features, classifier.1")
    sparsity: Literal["free", "keep"] = s.field(
        "free", "order", "keep: weights of convolutions and linear layers that are zero (init_from a pruned net) stay "
        "zero")
    data: s.DataSection = s.field(s.DataSection, "order", "what it is trained on")
    augment: s.AugmentSection = s.field(s.AugmentSection, "order", "what is done to an image")
    global_batch: int = s.field(256, "order", "samples per step over all ranks", ge=1)
    micro_batch: int = s.field(128, "bits", "samples per forward on one rank", ge=1)
    epochs: int = s.field(90, "order", "passes over the training data", ge=1)
    optim: s.OptimSection = s.field(s.OptimSection, "order", "how weights move")
    ema: s.EmaSection = s.field(s.EmaSection, "order", "a running mean of the weights")
    schedule: s.ScheduleSection = s.field(s.ScheduleSection, "order", "lr(step)")
    amp: Literal["none", "bf16", "fp16"] = s.field("none", "bits", "automatic mixed precision of the forward")
    clip_norm: float | None = s.field(None, "order", "largest gradient norm; null: no clipping", gt=0.0)
    label_smoothing: float = s.field(
        0.0, "order", "share of each label that is spread evenly over all classes; training only", ge=0.0, lt=1.0)
    memory: s.MemorySection = s.field(s.MemorySection, "bits", "what is kept between forward and backward")
    checkpoint: s.CheckpointSection = s.field(s.CheckpointSection, "free", "when state is saved")
    evaluate: s.EvaluateSection = s.field(s.EvaluateSection, "free", "when and how accuracy is measured")
    log: s.LogSection = s.field(s.LogSection, "free", "what is written down")
    limits: s.LimitSection = s.field(s.LimitSection, "free", "when a run gives up")
    device: Literal["auto", "cpu", "cuda"] = s.field("auto", "bits", "auto: cuda where it is")
    deterministic: bool = s.field(False, "bits", "bit-equal resume on CUDA too; slower")
    torch_threads: int = s.field(0, "bits", "CPU threads of torch in a rank; 0: its share of the cores", ge=0)
    deadline: str | None = s.field(None, "free", "leave before this much time has passed: 90m, 4h, 1-12:00:00")
    fault: s.FaultSection = s.field(s.FaultSection, "free", "a fault on purpose, for drills")

    @field_validator("freeze", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """`freeze=features,classifier.1` on a command line, and a single name, are lists too."""
        if isinstance(value, str):
            return [name.strip() for name in value.split(",") if name.strip()]
        return [] if value is None else value

    @property
    def run_dir(self) -> Path:
        return Path(self.runs) / self.name


# --- reading ----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's scalars: `1e-4` is a number, `off`, `no` and `on` are words; a key given twice is refused."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int",
                           "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
                              list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"),
                              list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise UserError(f"{_place(key_node)}: a key must be a word, got {key!r}.")
        if key in found:
            raise UserError(f"{_place(key_node)}: key '{key}' is given twice; keep one.")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


def _place(node: yaml.Node) -> str:
    return f"{node.start_mark.name}, line {node.start_mark.line + 1}"


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(path: str | Path, *, what: str = "recipe") -> dict[str, Any]:
    """The mapping a YAML file holds. Raises UserError for a missing, unreadable or malformed file, called `what`."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"No {what} at {path}.{_recipes_nearby(path) if what == 'recipe' else ''}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The {what} {path} can't be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"The {what} {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"The {what} {path} must be a mapping of keys to values, got {type(content).__name__}.")
    return content


def _recipes_nearby(path: Path) -> str:
    for folder in (path.parent, Path("configs")):
        names = sorted(str(found) for found in folder.glob("*.yaml")) if folder.is_dir() else []
        if names:
            near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.4)
            return f" Did you mean {near[0]}?" if near else f" There are: {', '.join(names[:8])}."
    return ""


def parse_override(text: str) -> tuple[list[str], Any]:
    """`optim.lr=1e-2` -> (["optim", "lr"], 0.01). Raises UserError when it isn't `key=value`."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise UserError(f"An override is written key=value, got '{text}'. "
                        "Example: optim.lr=0.02 data.train=/data/train")
    try:
        return key.split("."), yaml.load(value, Loader=_Loader) if value.strip() else None
    except yaml.YAMLError:
        return key.split("."), value


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of the tree with the overrides laid over it; an override of a whole section is refused."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for text in overrides:
        path, value = parse_override(text)
        annotation = Config.model_fields.get(path[0])
        section = annotation.annotation if annotation else None
        if len(path) == 1 and isinstance(section, type) and issubclass(section, BaseModel):
            fields = ", ".join(f"{path[0]}.{name}" for name in list(section.model_fields)[:4])
            raise UserError(f"'{path[0]}' is a section, not a value: set one of its fields, such as {fields}.")
        here = tree
        for part in path[:-1]:
            if not isinstance(here.get(part), dict):
                here[part] = {}
            here = here[part]
        here[path[-1]] = value
    return tree


# --- checking ---------------------------------------------------------------------------------------------------


def build(tree: dict[str, Any]) -> Config:
    """The typed recipe of a tree. Raises UserError that names every key at fault, with the nearest right name."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        wrong: dict[str, list[Any]] = {}  # a field that takes a word or a number has one problem for each
        for problem in error.errors():
            wrong.setdefault(".".join(_names(problem)), []).append(problem)
        lines = [_explain(path, problems) for path, problems in wrong.items()]
        raise UserError("The recipe has " + ("a mistake" if len(lines) == 1 else f"{len(lines)} mistakes")
                        + ":\n" + "\n".join(f"  {line}" for line in lines)) from None
    check(config)
    return config


# What people write who come from other trainers, and what it is called here.
KNOWN_ELSEWHERE = {  # written without _ and -
    "batchsize": "use global_batch, the total over all ranks (torchvision's and timm's is per GPU)",
    "batch": "use global_batch, the total over all ranks",
    "lr": "use optim.lr, for the global batch as it is (nothing is scaled by the number of GPUs)",
    "learningrate": "use optim.lr, for the global batch as it is (nothing is scaled by the number of GPUs)",
    "wd": "use optim.weight_decay",
    "workers": "use data.threads: images are decoded by threads, there are no worker processes",
    "numworkers": "use data.threads: images are decoded by threads, there are no worker processes",
    "mixupalpha": "use augment.mixup",
    "cutmixalpha": "use augment.cutmix",
    "randomerase": "use augment.erasing",
    "autoaugment": "use augment.policy: randaugment, or trivial for torchvision's ta_wide",
    "ramagnitude": "use augment.policy_magnitude",
    "resume": "starting a run whose directory has a checkpoint resumes it; --fresh starts over",
    "arch": "use model.name",
    "gradcheckpointing": "use memory.checkpoint=blocks",
    "gradientcheckpointing": "use memory.checkpoint=blocks",
    "pretrained": "use init_from=torchvision:NAME (torchvision's weights), or init_from=RUN or a file of weights",
    "weights": "use init_from=torchvision:NAME (torchvision's weights), or init_from=RUN or a file of weights",
    "finetune": "use init_from=..., the run or file whose weights the new run begins with, and freeze=features",
    "initialcheckpoint": "use init_from=..., the run or file whose weights the new run begins with",
    "loadfrom": "use init_from=..., the run or file whose weights the new run begins with",
    "trainable": "use freeze=..., the parts that don't learn",
    "requiresgrad": "use freeze=..., the parts that don't learn",
    "gradaccum": "use micro_batch: a rank accumulates when its share of global_batch is larger",
    "labelsmoothingepsilon": "use label_smoothing",
    "opt": "use optim.name",
    "optimizer": "use optim.name, or its section optim",
    "scheduler": "use schedule.name, or its section schedule",
    "lrscheduler": "use schedule.name, or its section schedule",
    "normweightdecay": "use optim.decay_on=weights: no decay of biases and normalisation layers",
    "biasweightdecay": "use optim.decay_on=weights: no decay of biases and normalisation layers",
    "modelema": "use ema.decay=0.9999",
    "modelemadecay": "use ema.decay",
    "modelemasteps": "use ema.steps",
    "maxlr": "use optim.lr: it is the peak of every schedule",
    "pctstart": "use schedule.rise",
    "decayepochs": "use schedule.step_epochs, or schedule.milestones with schedule.name=multistep",
    "lrsteps": "use schedule.milestones, in epochs, with schedule.name=multistep",
    "accumulationsteps": "use micro_batch: a rank accumulates when its share of global_batch is larger",
}


def _names(problem: Any) -> list[str]:
    """The path of the field that a problem of pydantic's is about, without what it adds for unions and items."""
    names = [part for part in problem["loc"] if isinstance(part, str)]
    return [part for part in names if not part.startswith(("literal[", "constrained", "function-"))
            and part not in ("int", "float", "str", "none")]


def _explain(path: str, problems: list[Any]) -> str:
    """One line on a field that is wrong, or that there isn't."""
    got, names = problems[0]["input"], path.split(".")
    if problems[0]["type"] == "extra_forbidden":
        near = nearest_field(path)
        advice = KNOWN_ELSEWHERE.get(names[-1].lower().replace("_", "").replace("-", ""))
        # Within a section its own field is likelier to be meant: evaluate.batch_size is evaluate.batch.
        if advice and (near is None or "." not in path or near.rpartition(".")[0] != path.rpartition(".")[0]):
            return f"unknown key '{path}'; {advice}"
        known = f"; known: {', '.join(_siblings(names))}"
        return f"unknown key '{path}'" + (f"; did you mean '{near}'?" if near else known)
    if isinstance(got, dict) and len(str(got)) > 60:
        got = "a mapping"
    message = ", or ".join(_rule(problem) for problem in problems)
    hint = ""
    if problems[0]["type"] == "literal_error" and isinstance(got, str | bool):
        wanted = re.findall(r"'([^']+)'", problems[0]["msg"])
        matches = difflib.get_close_matches(str(got), wanted, n=1)
        hint = f"; did you mean '{matches[0]}'?" if matches else ""
        if str(got).lower() in ("off", "no", "false") and "none" in wanted:
            hint = "; did you mean 'none'?"
    return f"{path}: {message}, got {got!r}{hint}"


def _rule(problem: Any) -> str:
    """What pydantic says must hold, in a recipe's words."""
    kind = problem["type"]
    if kind == "model_type":
        return "must be a section, with its fields indented under it"
    if kind in ("missing", "too_long"):  # the only fields with a fixed number of values
        return "must be a list of as many values as its default has"
    text = problem["msg"].partition(", unable to parse")[0].partition(", got a number")[0]
    text = text.replace("Input should be ", "must be ").replace("a valid integer", "a whole number")
    return text.replace("a valid ", "a ")


def _siblings(names: list[str]) -> list[str]:
    """The fields there are where the last name was looked for."""
    model: Any = Config
    for part in names[:-1]:
        found = model.model_fields.get(part)
        model = found.annotation if found else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)


def nearest_field(path: str) -> str | None:
    """The recipe's field nearest in name to a wrong one: in the same section, else in any."""
    *section, wrong = path.split(".")
    near = difflib.get_close_matches(wrong, _siblings(path.split(".")), n=1)
    if near:
        return ".".join([*section, near[0]])
    last = {name.split(".")[-1]: name for name in reversed([name for name, _ in fields()])}
    near = difflib.get_close_matches(wrong, list(last), n=1, cutoff=0.8)
    return last[near[0]] if near else None


def fields() -> Iterator[tuple[str, Any]]:
    """Every leaf field of a recipe as (dotted path, pydantic's FieldInfo), in the recipe's order."""
    for name, info in Config.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for inner, inner_info in kind.model_fields.items():
                yield f"{name}.{inner}", inner_info
        else:
            yield name, info


def check(config: Config) -> None:
    """Rules that span fields. Raises UserError that states the rule, what was found and what to change."""
    if not config.data.train:
        raise UserError("data.train must say where the training images lie: a folder, a tar, or file.tar::sub/path. "
                        "Example: data.train=/data/imagenet/train")
    for name, (low, high) in (("scale", config.augment.scale), ("ratio", config.augment.ratio)):
        if not 0 < low <= high or (name == "scale" and high > 1):
            raise UserError(f"augment.{name} must be [low, high] with 0 < low <= high"
                            f"{' <= 1' if name == 'scale' else ''}, got [{low}, {high}].")
    if min(config.augment.std) <= 0:
        raise UserError(f"augment.std must be above 0 in every channel, got {list(config.augment.std)}.")
    check_colours(config.augment)
    if config.global_batch == 1 and (config.augment.mixup or config.augment.cutmix):
        raise UserError("augment.mixup and augment.cutmix blend the images of a step with each other, got "
                        "global_batch=1. Use a larger global_batch, or set both to 0.")
    if config.schedule.warmup_epochs >= config.epochs:
        raise UserError(f"schedule.warmup_epochs must be under epochs, got {config.schedule.warmup_epochs:g} of "
                        f"{config.epochs}: the whole run would be warmup.")
    check_schedule(config)
    if config.optim.nesterov and (config.optim.name != "sgd" or config.optim.momentum == 0):
        raise UserError("optim.nesterov needs optim.name=sgd and a momentum above 0, got "
                        f"optim.name={config.optim.name} and optim.momentum={config.optim.momentum:g}.")
    check_name(config.model.name, deterministic=config.deterministic, on_gpu=config.device == "cuda")
    if config.model.in_channels == 2:
        raise UserError("model.in_channels must be 3 (colour) or 1 (grey), got 2.")
    if config.data.stored.startswith("raw") and config.augment.crop == "squash":
        raise UserError(f"data.stored={config.data.stored} holds only the central square, so augment.crop=squash can't "
                        "see the whole image. Use data.stored=original or short256.")
    if config.data.cache != "none" and config.data.assignment != "owner":
        raise UserError(f"data.cache={config.data.cache} needs data.assignment=owner, so that a rank always trains on "
                        "the same samples and keeps only those. Add data.assignment=owner.")
    if config.data.cache == "gpu" and not config.data.stored.startswith("raw"):
        raise UserError(f"data.cache=gpu keeps raw records, got data.stored={config.data.stored}. Use "
                        "data.stored=raw256 (or another rawN), or data.cache=ram.")
    if not re.fullmatch(r"[\w][\w.+=-]*", config.name or "x"):
        raise UserError(f"name must be letters, digits, '_', '-', '.', '+' or '=', got '{config.name}': "
                        "it names a folder.")
    if config.sparsity == "keep" and config.init_from is None:
        raise UserError("sparsity=keep keeps the zeros of the weights that a run begins with, but fresh weights have "
                        "none. Name a pruned net: init_from=FILE.safetensors.")
    if config.deadline is not None:
        parse_duration(config.deadline)


def check_schedule(config: Config) -> None:
    """Rules of the learning rate's shape. Raises UserError."""
    schedule, lr = config.schedule, config.optim.lr
    if schedule.name in ("cosine", "polynomial") and schedule.eta_min > lr:
        raise UserError(f"schedule.eta_min must not exceed optim.lr, got {schedule.eta_min:g} and {lr:g}.")
    if schedule.name == "multistep":
        listed = f"[{', '.join(f'{milestone:g}' for milestone in schedule.milestones)}]"
        if sorted(set(schedule.milestones)) != schedule.milestones:
            raise UserError(f"schedule.milestones must ascend, each epoch named once, got {listed}.")
        if schedule.milestones[-1] >= config.epochs:
            raise UserError(f"schedule.milestones must lie below epochs, got {listed} in a run of {config.epochs}: the "
                            "last would never come. Take out those beyond, or train longer.")
    left = schedule.gamma**config.epochs
    if schedule.name == "exponential" and left < 1e-9:
        raise UserError(f"schedule.gamma is the factor of an epoch with schedule.name=exponential: {schedule.gamma:g} "
                        f"over {config.epochs} epochs leaves {left:.0e} of optim.lr, too little to move a weight. "
                        f"schedule.gamma={0.001 ** (1 / config.epochs):.3g} would leave a thousandth.")


def check_colours(augment: s.AugmentSection) -> None:
    """The principal components of lighting: both or none, and vectors that are unit and at right angles."""
    values, vectors = augment.pca_eigenvalues, augment.pca_eigenvectors
    if (values is None) != (vectors is None):
        raise UserError("augment.pca_eigenvalues and augment.pca_eigenvectors belong together, got only one of them. "
                        "Set both as `alexnet-ddp data stats` prints them, or none for ImageNet's.")
    for row, vector in enumerate(vectors or ()):
        for other, against in enumerate((vectors or ())[:row + 1]):
            product = sum(a * b for a, b in zip(vector, against, strict=True))
            if abs(product - (row == other)) > 0.01:
                raise UserError(
                    f"augment.pca_eigenvectors must be three rows of length 1 at right angles to each other, got a "
                    f"product of {product:.3f} of rows {other + 1} and {row + 1}. Copy them from `alexnet-ddp data "
                    "stats`.")


def parse_duration(text: str) -> float:
    """Seconds of `90m`, `4h`, `1h30m`, `2d`, `45` (minutes, as Slurm has it), `HH:MM:SS` or `D-HH:MM:SS`."""
    text = str(text).strip()
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if re.fullmatch(r"(?:\d+(?:\.\d+)?[smhd])+", text):
        return sum(float(n) * units[u] for n, u in re.findall(r"(\d+(?:\.\d+)?)([smhd])", text))
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match:
        days, a, b, c = (int(part) if part else 0 for part in match.groups())
        if match[1]:  # days-hours[:minutes[:seconds]]
            return days * 86400.0 + a * 3600 + b * 60 + c
        if match[4]:
            return a * 3600.0 + b * 60 + c
        return a * 60.0 + b  # minutes[:seconds]
    raise UserError(f"A duration is written 90m, 4h, 1h30m, 45 (minutes), HH:MM:SS or D-HH:MM:SS, got '{text}'.")


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads, overrides and checks a recipe. The run's name is the file's where none is given."""
    tree = apply_overrides(read_yaml(path), overrides)
    if not tree.get("name"):
        tree["name"] = Path(path).stem
    return build(tree)


# --- writing and comparing --------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something else than a string (`off` and `1e4`)."""


_Dumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _Loader.yaml_implicit_resolvers.get(first, [])
    for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | _Loader.yaml_implicit_resolvers.keys()
}


def dump(config: Config) -> str:
    """The effective recipe as YAML that reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, default_flow_style=None,
                     width=110)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class Change(s.Section):
    """One field that differs between the recipe a run was started with and the one it is resumed with."""

    path: str
    effect: s.Effect
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.path}: {_show(self.before)} -> {_show(self.now)}"


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def stored(tree: dict[str, Any]) -> Config:
    """The recipe of a checkpoint, which may be older than this code: fields that are gone are passed over."""
    known: dict[str, Any] = {}
    for path, _ in fields():
        section, _, name = path.rpartition(".")
        here = tree.get(section, {}) if section else tree
        if name in here:
            (known.setdefault(section, {}) if section else known)[name] = here[name]
    return Config.model_validate(known)


def differences(before: dict[str, Any], now: Config) -> list[Change]:
    """What changed against a stored recipe (a plain tree), each with its effect on resume.

    A field the old recipe doesn't know counts with its default; one that no longer exists is passed over.
    """
    effects = {path: info.json_schema_extra["resume"] for path, info in fields()}
    defaults = flatten(Config().model_dump(mode="json"))
    old, new = defaults | flatten(before), flatten(now.model_dump(mode="json"))
    return [Change(path=path, effect=effects[path], before=old[path], now=new[path])
            for path in effects if not _same(old[path], new[path])]


def refusal(changes: list[Change], config: Config, *, accept: bool) -> str:
    """Why a run isn't gone on with after these changes of effect `order`, with the ways out; "" where it is. Pure.

    `accept`: --accept-changes, which lets in all but what decides which weights there are and what a step is.
    """
    fixed = [change for change in changes
             if change.path in ("global_batch", "init_from", "freeze") or change.path.startswith("model.")]
    if not changes or (accept and not fixed):
        return ""
    ways = (f"Give the new run a name of its own (name={config.name}_2), start over with --fresh (keeps the old "
            "directory under another name), or undo the change.")
    if not fixed:
        ways += " To go on all the same: --accept-changes."
    if any(change.path == "freeze" for change in changes):
        ways += (f" A new run can begin with the weights of this one: name={config.name}_2 "
                 f"init_from={config.run_dir}@last.")
    listed = "\n".join(f"  {change}" for change in changes)
    return (f"{config.run_dir} was started with another recipe, and this would change the experiment:\n{listed}\n"
            f"{ways}")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return bool(a == b)
