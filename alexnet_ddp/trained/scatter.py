"""A comparison as a picture: accuracy against latency and against MACs; a net's area goes with its parameters."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alexnet_ddp.errors import UserError

FORMATS = (".png", ".svg")
AREA = 1200.0  # of the net with the most parameters, in points squared


@dataclass(frozen=True)
class Point:
    """top1: a share; latency: seconds of one image. A net is left out of a panel for which it has no value."""

    name: str
    top1: float | None
    latency: float
    macs: int | None
    parameters: int | None


def check(out: str) -> None:
    """Raises UserError for a picture that can't be drawn, before anything is measured."""
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--plot takes a name that ends in {' or '.join(FORMATS)}, got '{out}'.")
    if not path.parent.is_dir():
        raise UserError(f"--plot {out}: there is no folder {path.parent}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'alexnet-ddp[plots]'.") from None


def draw(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Writes the picture; nets without a top-1 are named on stderr. Raises UserError where it can't be written."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [point for point in points if point.top1 is not None]
    if silent := [point.name for point in points if point.top1 is None]:
        print(f"no top-1 is known of {', '.join(silent)}: left out of the picture", file=sys.stderr)
    largest = max((point.parameters or 0 for point in shown), default=0)
    with matplotlib.rc_context({"svg.hashsalt": "alexnet-ddp", "svg.fonttype": "none"}):  # text stays text
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axis, (label, values) in zip(panels, (("latency of one image, ms", [1e3 * each.latency for each in shown]),
                                                  ("MACs of one image, millions", [(each.macs or math.nan) / 1e6
                                                                                   for each in shown])), strict=True):
            for colour, (point, value) in enumerate(zip(shown, values, strict=True)):
                assert point.top1 is not None
                axis.scatter([value], [100 * point.top1], s=area(point.parameters, largest=largest), alpha=0.5,
                             color=f"C{colour % 10}")
                if not math.isnan(value):
                    axis.annotate(point.name.removeprefix("torchvision:"), (value, 100 * point.top1), fontsize=8,
                                  ha="center", va="center")
            axis.set(xlabel=label, xlim=(0, None))
            axis.margins(0.2)
            axis.grid(alpha=0.3)
        panels[0].set_ylabel("top-1, %")
        figure.suptitle(f"{title}; area: parameters", fontsize=7)
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise UserError(f"--plot {path} can't be written: {error.strerror or error}.") from None


def area(parameters: int | None, *, largest: int) -> float:
    """Points squared, in proportion to the parameters, but never too small to be seen. Pure."""
    return max(20.0, AREA * (parameters or 0) / max(1, largest))
