"""A recipe: YAML and `key=value` overrides, composed, typed and checked.

    config = load("configs/demo.yaml", ["seed=1", "optim.lr=0.02"])
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError, field_validator

from alexnet_ddp import dialect, rules
from alexnet_ddp import sections as s
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


def parse_override(text: str) -> tuple[list[str], Any]:
    """`optim.lr=1e-2` -> (["optim", "lr"], 0.01). Raises UserError when it isn't `key=value`."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise UserError(f"An override is written key=value, got '{text}'. "
                        "Example: optim.lr=0.02 data.train=/data/train")
    try:
        return key.split("."), yaml.load(value, Loader=dialect.Loader) if value.strip() else None
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
    rules.check(config)
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


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads, overrides and checks a recipe. The run's name is the file's where none is given."""
    tree = apply_overrides(dialect.read_yaml(path), overrides)
    if not tree.get("name"):
        tree["name"] = Path(path).stem
    return build(tree)


def stored(tree: dict[str, Any]) -> Config:
    """The recipe of a checkpoint, which may be older than this code: fields that are gone are passed over."""
    known: dict[str, Any] = {}
    for path, _ in fields():
        section, _, name = path.rpartition(".")
        here = tree.get(section, {}) if section else tree
        if name in here:
            (known.setdefault(section, {}) if section else known)[name] = here[name]
    return Config.model_validate(known)


def dump(config: Config) -> str:
    """The effective recipe as YAML that reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=dialect.Dumper, sort_keys=False, default_flow_style=None,
                     width=110)
