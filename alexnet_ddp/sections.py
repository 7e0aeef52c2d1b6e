"""The sections of a recipe: every field with its type, its bounds, its meaning and its effect on resume.

All of them stand in this one module, and it imports no torch, because `submit`, `--help` and `--print-config`
read a recipe on login nodes and must answer at once; the modules that use a section import it from here.

Effect of a changed field on a run that is resumed:
    free   accepted silently: it moves no bit of the result
    bits   accepted, and the attempt says `exact: no`: same samples and crops, other rounding
    order  refused with the difference and the ways out: it would make another experiment of the run
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Effect = Literal["free", "bits", "order"]


def field(default: Any, effect: Effect, doc: str, **bounds: Any) -> Any:
    """A recipe field: its default, its effect on resume and its one-line meaning, with pydantic's bounds."""
    extra: dict[str, Any] = {"resume": effect}
    if callable(default):
        return Field(default_factory=default, description=doc, json_schema_extra=extra, **bounds)
    return Field(default=default, description=doc, json_schema_extra=extra, **bounds)


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are fixed once read."""

    # A run may be named 5, and a deadline be 45 (minutes): YAML reads both as numbers.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`epochs: true` is a mistake; pydantic would take it for 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation in (int, float, int | None, float | None):
            raise PydanticCustomError("bool_as_number", "Input should be a number")
        return value


Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Strength = Annotated[float, Field(ge=0.0)]
Triple = tuple[float, float, float]


class ModelSection(Section):
    name: str = field("alexnet_single", "order", "alexnet_paper | alexnet_torchvision | "
                      "alexnet_single | alexnet_bn | torchvision:NAME")
    num_classes: int = field(1000, "order", "classes of the last layer; must be the data's", ge=2)
    in_channels: int = field(3, "order", "colour channels of the input: 3, or 1 for grey", ge=1, le=3)
    width: float = field(1.0, "order", "factor on every channel and hidden unit count", gt=0.0, le=8.0)
    dropout: float = field(0.5, "order", "share of hidden units dropped in the classifier", ge=0.0, lt=1.0)
    lrn_after: list[Annotated[int, Field(ge=1, le=5)]] = field(
        lambda: [1, 2], "order", "blocks of alexnet_single that end in local response normalisation"
    )


class DataSection(Section):
    train: str = field("", "free", "folder, file.tar, file.tar::sub/path or shards; identity is checked apart")
    val: str | None = field(None, "free", "held-out data in the same forms; null: no evaluation")
    limit: int | None = field(None, "order", "train on only so many samples, evenly over the classes", ge=1)
    stored: str = field(
        "original", "order", "deterministic stage before augmentation: original | shortN (short side N, JPEG quality "
        "90) | maxN (at most N a side, the same) | rawN (the central N x N pixels of short side N, uint8)",
        pattern=r"^(original|(short|max|raw)[1-9][0-9]{1,3})$")
    decoder: Literal["auto", "turbojpeg", "nvimgcodec", "simplejpeg", "torchcodec", "pillow"] = field(
        "auto", "bits", "auto: the quickest that is installed, kept for the whole run")
    cache: Literal["none", "disk", "ram", "gpu"] = field(
        "none", "free", "where a rank keeps its share of the stored records; needs assignment: owner")
    cache_dir: str | None = field(
        None, "free", "disk, ram: folder on the node; null: $SLURM_TMPDIR, $TMPDIR or /tmp for disk, /dev/shm for ram")
    cache_gb: float | None = field(
        None, "free", "disk, ram: most gigabytes (1e9 bytes) a node may use; null: all but a tenth of what is free; "
        "gpu: per rank", gt=0.0)
    on_error: Literal["fail", "skip"] = field(
        "fail", "order", "a damaged image, named: fail: ends the run; skip: doesn't count (in an evaluation as wrong)")
    max_damaged: float = field(
        0.01, "free", "skip: largest share of the images that may be damaged; more end the run", ge=0.0, le=1.0)
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = field(
        "auto", "free", "decode threads of a rank; auto: the cores it really has")
    prefetch: int = field(4, "free", "micro-batches decoded ahead of the step", ge=2, le=64)
    shards: int = field(64, "order", "virtual shards that every global batch draws from evenly", ge=1)
    assignment: Literal["contiguous", "owner"] = field(
        "contiguous", "bits", "which rank gets which part of a global batch")


class AugmentSection(Section):
    crop: Literal["random_resized", "random", "center", "squash"] = field(
        "random_resized", "order", "training crop; random: from a short side of size/0.875")
    size: int = field(224, "order", "pixels a side that the net sees", ge=16, le=1024)
    scale: tuple[float, float] = field((0.08, 1.0), "order", "random_resized: area of the crop, share")
    ratio: tuple[float, float] = field((0.75, 4 / 3), "order", "random_resized: width / height")
    resize: Literal["antialias", "fast"] = field(
        "antialias", "order", "antialias: bilinear as the reference recipes; fast: without antialiasing")
    flip: Probability = field(0.5, "order", "probability of a mirrored image")
    policy: Literal["none", "randaugment", "trivial"] = field(
        "none", "order", "operations drawn from torchvision's set: RandAugment (2019) or TrivialAugment Wide (2021)")
    policy_ops: int = field(2, "order", "randaugment: operations an image, one after the other", ge=1, le=8)
    policy_magnitude: int = field(9, "order", "randaugment: strength of all operations", ge=0, le=30)
    rotation: float = field(0.0, "order", "largest angle, degrees, drawn uniformly both ways", ge=0.0, le=180.0)
    color_jitter: tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0.0, le=0.5)]] = field(
        (0.0, 0.0, 0.0, 0.0), "order", "strengths of brightness, contrast, saturation, hue")
    pca_lighting: float = field(0.0, "order", "standard deviation of the 2012 paper's colour noise", ge=0.0)
    pca_eigenvalues: tuple[Strength, Strength, Strength] | None = field(
        None, "order", "of RGB's covariance, values 0..1, as `data stats` prints them; null: ImageNet's")
    pca_eigenvectors: tuple[Triple, Triple, Triple] | None = field(
        None, "order", "one a row, in the order of the eigenvalues; null: ImageNet's")
    mean: tuple[float, float, float] = field((0.485, 0.456, 0.406), "order", "per channel, of values 0..1")
    std: tuple[float, float, float] = field((0.229, 0.224, 0.225), "order", "per channel, of values 0..1")
    erasing: Probability = field(0.0, "order", "probability of a box set to the mean (random erasing, 2020)")
    mixup: float = field(0.0, "order", "alpha of the Beta distribution of mixup's shares (2018); 0: none", ge=0.0)
    cutmix: float = field(
        0.0, "order", "the same of CutMix (2019); with both above 0 each step is one or the other", ge=0.0)


Decay = Annotated[float, Field(ge=0.0, lt=1.0)]  # of a running mean


class OptimSection(Section):
    name: Literal["sgd", "adamw"] = field("sgd", "order", "sgd: with momentum; adamw: Adam, its decay decoupled; fused")
    lr: float = field(0.01, "order", "peak learning rate, for the global batch as it is", gt=0.0)
    momentum: float = field(0.9, "order", "sgd: share of the last update that is kept in the next", ge=0.0, lt=1.0)
    nesterov: bool = field(False, "order", "sgd: look-ahead momentum")
    betas: tuple[Decay, Decay] = field((0.9, 0.999), "order", "adamw: decay of the means of gradient and square")
    eps: float = field(1.0e-8, "order", "adamw: added to the root of the mean square", gt=0.0)
    weight_decay: float = field(5.0e-4, "order", "sgd: L2; adamw: weights shrink by lr * weight_decay a step", ge=0.0)
    decay_on: Literal["all", "weights"] = field(
        "all", "order", "what weight_decay is for; weights: not biases and normalisation layers' scales")


class ScheduleSection(Section):
    name: Literal["constant", "step", "multistep", "exponential", "cosine", "polynomial", "one_cycle"] = field(
        "step", "order", "shape of lr(step) after the warmup; --print-schedule shows it")
    warmup_epochs: float = field(0.0, "order", "linear rise to the schedule's first rate", ge=0.0)
    step_epochs: float = field(30.0, "order", "step: epochs between two reductions", gt=0.0)
    milestones: list[Annotated[float, Field(gt=0.0)]] = field(
        lambda: [30.0, 60.0, 80.0], "order", "multistep: epochs of the reductions, from the run's start", min_length=1)
    gamma: float = field(
        0.1, "order", "step, multistep: factor of a reduction; exponential: factor of an epoch", gt=0.0, le=1.0)
    eta_min: float = field(0.0, "order", "cosine, polynomial: the last learning rate", ge=0.0)
    power: float = field(1.0, "order", "polynomial: exponent; 1 is a straight line", gt=0.0)
    rise: float = field(0.3, "order", "one_cycle: share of the steps on which it rises to optim.lr", gt=0.0, lt=1.0)
    div_factor: float = field(25.0, "order", "one_cycle: optim.lr / the first learning rate", ge=1.0)
    final_div_factor: float = field(1e4, "order", "one_cycle: the first learning rate / the last", ge=1.0)


class EmaSection(Section):
    decay: float | None = field(
        None, "order", "share that a running mean of the weights keeps at an update, early on less: min(decay, (1 + n) "
        "/ (10 + n)) after n updates; the mean is evaluated too, and best.safetensors holds it; null: no mean",
        gt=0.0, lt=1.0)
    steps: int = field(1, "order", "steps between two updates of the mean", ge=1)


class MemorySection(Section):
    checkpoint: Literal["none", "blocks"] = field(
        "none", "bits", "activation checkpointing; blocks: what a block computes is not kept but computed again")


class CheckpointSection(Section):
    minutes: float | None = field(10.0, "free", "longest time between two checkpoints; null: none", gt=0.0)
    epochs: int | None = field(1, "free", "a checkpoint every so many epochs; null: none", ge=1)
    steps: int | None = field(None, "free", "a checkpoint every so many steps; null: none", ge=1)
    keep: int = field(2, "free", "newest checkpoints kept, besides best.safetensors", ge=2)


class EvaluateSection(Section):
    epochs: int = field(1, "free", "evaluate every so many epochs, and at the end", ge=1)
    crops: Literal[1] = field(1, "free", "views of an image that are averaged")
    crop: Literal["auto", "center", "squash"] = field(
        "auto", "free", "auto: squash where training squashes, else the centre of short side size / 0.875")
    batch: int = field(4, "free", "tiles of 32 samples per fetch; moves no count", ge=1)


class LogSection(Section):
    steps: int = field(50, "bits", "steps between two metric records: the length of the averaging window", ge=1)
    tensorboard: bool = field(True, "free", "write TensorBoard scalars beside metrics.jsonl")
    sync_debug: bool = field(False, "free", "CUDA: a step that waits for the device raises (torch's sync debug mode)")
    trace: bool = field(False, "free", "write sample ids and crop boxes of every step to trace/rank_N.jsonl")


class LimitSection(Section):
    """Times are in seconds. A rank that makes no progress for so long ends the job."""

    first_step: float = field(900.0, "free", "until the first step is done (compilers, autotuners)", gt=0.0)
    step: float = field(45.0, "free", "afterwards; never under ten times the slowest micro-batch so far", gt=0.0)
    loss: float | None = field(None, "free", "finished once a logging window's mean loss is under this", gt=0.0)
    nonfinite: int = field(20, "free", "skipped updates in a row after which the run stops", ge=1)


class FaultSection(Section):
    """A fault on purpose, for drills: `fault.kind=kill fault.rank=1 fault.step=37`."""

    kind: Literal["none", "kill", "hang", "error", "inf", "signal", "slow", "oom"] = field("none", "free", "what")
    at: Literal["start", "step", "evaluate", "save"] = field(
        "step", "free", "where: before an attempt's first step, after that step, within an evaluation, or when a save "
        "has begun (slow: in its background write, right before it is published)")
    step: int = field(0, "free", "steps done when it strikes", ge=0)
    times: int = field(1, "free", "for kind: inf or slow: in so many steps in a row", ge=1)
    rank: int = field(0, "free", "which rank; -1: all", ge=-1)
    signal: Literal["INT", "TERM", "HUP", "USR1", "USR2"] = field("USR1", "free", "for kind: signal")
    seconds: float = field(1.0, "free", "for kind: slow: how long it sleeps", gt=0.0)
