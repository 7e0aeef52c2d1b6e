"""Rules of a recipe that span its fields, each as the user is told of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from alexnet_ddp.determinism import check_name
from alexnet_ddp.errors import UserError

if TYPE_CHECKING:
    from alexnet_ddp.config import Config
    from alexnet_ddp.sections import AugmentSection


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


def check_colours(augment: AugmentSection) -> None:
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
