"""A comparison as a picture: accuracy against latency and against MACs; a net's area goes with its parameters."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alexnet_ddp import plots

FLAG = "--plot"
AREA = 1200.0  # of the net with the most parameters, in points squared
EDGE = 0.2  # of a panel's width, beside the outermost points: a name must have room


@dataclass(frozen=True)
class Point:
    """top1: a share; latency: seconds of one image. A net is left out of a panel for which it has no value."""

    name: str
    top1: float | None
    latency: float
    macs: int | None
    parameters: int | None


def draw(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Writes the picture; nets without a top-1 are named on stderr. Raises UserError where it can't be written."""
    shown = [point for point in points if point.top1 is not None]
    if silent := [point.name for point in points if point.top1 is None]:
        print(f"no top-1 is known of {', '.join(silent)}: left out of the picture", file=sys.stderr)
    largest = max((point.parameters or 0 for point in shown), default=0)
    with plots.figure(path, flag=FLAG, size=(10, 4.5)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        latencies = [1e3 * point.latency for point in shown]
        macs = [math.nan if point.macs is None else point.macs / 1e6 for point in shown]
        for axis, label, values in zip(panels, ("latency of one image, ms", "MACs of one image, millions"),
                                       (latencies, macs), strict=True):
            for number, (point, value) in enumerate(zip(shown, values, strict=True)):
                assert point.top1 is not None
                size = area(point.parameters, largest=largest)
                axis.scatter([value], [100 * point.top1], s=size, alpha=0.5, color=f"C{number % 10}")
                if not math.isnan(value):
                    axis.annotate(short(point.name), (value, 100 * point.top1), fontsize=8, ha="center",
                                  xytext=(0, math.sqrt(size / math.pi) + 3), textcoords="offset points")
            most = max((value for value in values if not math.isnan(value)), default=1.0)
            axis.set(xlabel=label, xlim=(-EDGE / 2 * most, (1 + EDGE) * most))
            axis.margins(y=EDGE)
            axis.grid(alpha=0.3)
        panels[0].set_ylabel("top-1, %")
        figure.suptitle(f"{title}; area: parameters", fontsize=7)


def short(name: str) -> str:
    """`resnet18` of torchvision:resnet18, `mine@last` of runs/mine@last. Pure."""
    return Path(name.removeprefix("torchvision:")).name or name


def area(parameters: int | None, *, largest: int) -> float:
    """Points squared, in proportion to the parameters, but never too small to be seen. Pure."""
    return max(20.0, AREA * (parameters or 0) / max(1, largest))
