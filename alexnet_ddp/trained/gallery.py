"""Pictures of a trained net: its first kernels, how it was trained, and where it is most mistaken.

Drawn with matplotlib (extra `plots`). PNG or SVG by the name's ending; the same bytes each time.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from alexnet_ddp import plots
from alexnet_ddp.errors import UserError
from alexnet_ddp.evaluate import TILE
from alexnet_ddp.trained import classes as names
from alexnet_ddp.trained.model import Model
from alexnet_ddp.trained.tiles import Source, tiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from alexnet_ddp.trained.evaluation import Outcomes

Record = dict[str, Any]


def make_folder(path: Path) -> None:
    """For pictures. Raises UserError where it can't be made, or nothing can be written to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "it may not be written to")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}. Choose another --out.") from None


def save(figure: Figure, path: Path) -> Path:
    """Writes a picture. Raises UserError."""
    try:
        plots.write(figure, path, dpi=150)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}. Choose another --out.") from None
    return path


# --- kernels ----------------------------------------------------------------------------------------------------


def first_convolution(net: nn.Module) -> tuple[str, nn.Conv2d]:
    """The convolution that sees the image, with its name. Raises UserError where its kernels are no pictures."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels not in (1, 3):
                raise UserError(f"The first convolution of this net ({name}) has {module.in_channels} input channels; "
                                "kernels can be drawn of 1 (grey) or 3 (red, green, blue).")
            return name, module
    raise UserError("This net has no convolution whose kernels could be drawn.")


def scaled_kernels(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, channels, height, width] -> pictures [n, height, width, channels], each kernel by its own smallest and
    largest weight (over all its channels, so that colours stay) to 0..1; a constant one is grey, 0.5."""
    low, high = (np.asarray(of(weight, axis=(1, 2, 3), keepdims=True)) for of in (np.min, np.max))
    spread = high - low
    scaled = np.where(spread > 0, (weight - low) / np.where(spread > 0, spread, 1), np.float32(0.5))
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1), np.float32)


def columns_for(kernels: int) -> int:
    """Of a grid: some 8 by 3 (96 kernels: 16 by 6, as in the paper's figure 3), halves (towers) in rows of their own.
    """
    if kernels % 2 or kernels < 4:
        return math.ceil(math.sqrt(kernels * 8 / 3))
    half, wanted = kernels // 2, math.sqrt(kernels * 8 / 3)
    return min((count for count in range(1, half + 1) if half % count == 0), key=lambda count: abs(count - wanted))


def kernels(model: Model) -> Figure:
    """The kernels of the first layer, as in figure 3 of Krizhevsky et al. 2012. Raises UserError."""
    name, layer = first_convolution(model.net)
    pictures = scaled_kernels(layer.weight.detach().float().cpu().numpy())
    count, height, width, channels = pictures.shape
    columns = columns_for(count)
    rows = -(-count // columns)
    edge = 1  # pixels of white between kernels
    sheet = np.ones((rows * (height + edge) + edge, columns * (width + edge) + edge, channels), np.float32)
    for number, picture in enumerate(pictures):
        top, left = (place * (side + edge) + edge for place, side in
                     zip(divmod(number, columns), (height, width), strict=True))
        sheet[top:top + height, left:left + width] = picture
    figure = plots.blank(9, 9 * sheet.shape[0] / sheet.shape[1] + 0.5)
    axis = figure.subplots()
    axis.imshow(sheet if channels == 3 else sheet[..., 0], interpolation="nearest", cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()
    towers = "; upper half: first tower" if model.name == "alexnet_paper" else ""
    axis.set_title(f"{model.name}: {count} kernels of {height}x{width}x{channels} ({name}), each scaled to "
                   f"0..1{towers}", fontsize=9)
    return figure


# --- curves -----------------------------------------------------------------------------------------------------


def curves(records: Sequence[Record], *, title: str) -> Figure:
    """Loss, accuracy and learning rate over the steps, from the records of metrics.jsonl. Raises UserError."""
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "evaluate"]
    if not train and not held_out:
        raise UserError("metrics.jsonl has no records of training yet.")
    figure = plots.blank(8, 8)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.5])
    drawn = [(loss, train, "loss", "training", 1.0), (loss, held_out, "loss", "held out", 1.0),
             (loss, held_out, "ema_loss", "held out, mean of the weights", 1.0),
             (accuracy, train, "top1", "training, top-1", 100.0),
             (accuracy, held_out, "top1", "held out, top-1", 100.0),
             (accuracy, held_out, "top5", "held out, top-5", 100.0),
             (accuracy, held_out, "ema_top1", "held out, top-1 of the weights' mean", 100.0),
             (rate, train, "lr", "", 1.0)]
    for axis, of, field, label, factor in drawn:
        points = [(record["step"], record[field] * factor) for record in of if record.get(field) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label or None, linewidth=1.3,
                      marker="o" if of is held_out or len(points) == 1 else None, markersize=3.5)
    loss.set_ylabel("cross-entropy")
    accuracy.set(ylabel="right, %", ylim=(0, 100))
    rate.set(ylabel="learning rate", xlabel="optimizer steps")
    rate.set_ylim(bottom=0)
    for axis in (loss, accuracy, rate):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    loss.set_title(title, fontsize=9)
    return figure


# --- mistakes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """A held-out image that the net takes for another class with much confidence. Classes by their names for people."""

    sample: int
    name: str
    true: str
    predicted: str
    probability: float  # of the predicted class
    loss: float  # cross-entropy, natural logarithm


def worst_mistakes(model: Model, source: Source, outcomes: Outcomes, *, most: int = 20) -> list[Mistake]:
    """The images that the net is wrong about, highest loss first (equal ones by their ids); no damaged ones."""
    spoken = model.spoken if model.classes else names.spoken(source.index.classes)
    wrong = np.flatnonzero((outcomes.predictions != outcomes.labels) & (outcomes.predictions >= 0))
    order = wrong[np.argsort(-outcomes.losses[wrong], kind="stable")][:most]
    return [Mistake(sample, source.index.name(sample), spoken[outcomes.labels[sample]],
                    spoken[outcomes.predictions[sample]], float(outcomes.confidences[sample]),
                    float(outcomes.losses[sample])) for sample in order.tolist()]


def shown_to_the_net(model: Model, source: Source, samples: Iterable[int]) -> dict[int, NDArray[np.uint8]]:
    """What the net sees of these samples, before it is normalised: uint8 [size, size, channels]."""
    wanted = sorted(set(samples))
    numbers = sorted({sample // TILE for sample in wanted})
    found: dict[int, NDArray[np.uint8]] = {}
    for tile in tiles(model, source, batch=1, only=(range(number, number + 1) for number in numbers)):
        for sample in wanted:
            if sample in tile.samples:
                found[sample] = tile.images[sample - tile.first, 0].cpu().numpy()
    return found


def mistakes(model: Model, source: Source, worst: Sequence[Mistake], *, title: str, columns: int = 5) -> Figure:
    """The worst mistakes with their pictures as the net sees them, the worst first."""
    seen = shown_to_the_net(model, source, (one.sample for one in worst))
    rows = -(-len(worst) // columns)
    figure = plots.blank(2.2 * columns, 2.75 * rows + 0.4)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, one in zip(axes, worst, strict=False):
        picture = seen[one.sample]
        axis.imshow(picture if picture.shape[2] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"{_caption(one.true)}\ntaken for {_caption(one.predicted)}, {one.probability:.1%}\n"
                       f"loss {one.loss:.2f}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def _caption(name: str) -> str:
    return plots.caption(name, room=23)
