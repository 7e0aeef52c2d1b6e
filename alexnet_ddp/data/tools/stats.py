"""What the images of a source are like: sizes, bytes, class balance, kinds, and the colours' mean, deviation and PCA.

Colours are summed up as integers, so that the result is exact and doesn't depend on threads or order. Every pixel of
an upright, decoded image counts once: of a raw pack, whose images are all alike, each image then weighs the same, as in
Krizhevsky et al. 2012, section 4.1.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet_ddp.amounts import counted
from alexnet_ddp.data.decoding.decode import DamagedImage, open_upright
from alexnet_ddp.data.decoding.stages import CHANNELS, parse_stage
from alexnet_ddp.data.index import Index, open_index
from alexnet_ddp.data.packs.facts import look, told
from alexnet_ddp.data.packs.parallel import cores_here, in_order
from alexnet_ddp.errors import Unreadable, UserError
from alexnet_ddp.progress import Progress

CHUNK = 8  # images a task
BAND = 1 << 16  # pixels whose products are summed at once: 1.5 MB as float64
LISTED = 20  # damaged images that are named

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Sums:
    """Exact sums over pixels of their values 0..255 and of the products of their channels, as Python integers."""

    def __init__(self) -> None:
        self.pixels = 0
        self.values = [0] * CHANNELS
        self.products = [[0] * CHANNELS for _ in range(CHANNELS)]

    def add(self, values: I64, products: I64, pixels: int) -> None:
        self.pixels += pixels
        for row in range(CHANNELS):
            self.values[row] += int(values[row])
            for column in range(CHANNELS):
                self.products[row][column] += int(products[row, column])

    def mean(self) -> F64:
        """Per channel, of values 0..1: float64 [3]."""
        return np.array([value / self.pixels for value in self.values]) / 255.0

    def covariance(self) -> F64:
        """Of the channels of a pixel, values 0..1, over all pixels (divided by their number): float64 [3, 3]."""
        n = self.pixels
        return np.array([[(n * self.products[i][j] - self.values[i] * self.values[j]) / n**2 for j in range(CHANNELS)]
                         for i in range(CHANNELS)]) / 255.0**2


@dataclass(frozen=True)
class ColourSums:
    """Of one image: the sums of its channels int64 [3] and of their products int64 [3, 3]; bands add up exactly."""

    values: I64
    products: I64
    pixels: int


def sums_of(pixels: NDArray[np.uint8]) -> ColourSums:
    """`pixels`: uint8 [n, 3]. float64 holds integers up to 2**53, a band's sums are below 2**33."""
    values, products = np.zeros(CHANNELS, np.int64), np.zeros((CHANNELS, CHANNELS), np.int64)
    for first in range(0, len(pixels), BAND):
        band = pixels[first:first + BAND].T.astype(np.float64)
        values += band.sum(axis=1).astype(np.int64)
        products += (band @ band.T).astype(np.int64)
    return ColourSums(values, products, len(pixels))


@dataclass(frozen=True)
class Spread:
    """Least, middle and most of a quantity."""

    least: float
    median: float
    most: float


def spread(values: NDArray[Any]) -> Spread:
    return Spread(float(values.min()), float(np.median(values)), float(values.max()))


@dataclass(frozen=True)
class Stats:
    """Of the `looked_at` samples; classes are counted over all."""

    source: str
    stage: str
    samples: int
    looked_at: int
    classes: int
    per_class: Spread
    smallest: str  # the first class of those with the fewest images
    largest: str
    as_small: int  # classes that have as few, that one among them
    as_large: int
    width: Spread  # pixels, upright
    height: Spread
    megapixels: Spread
    bytes: Spread
    total_bytes: int
    found: dict[str, int]
    damaged: list[str]
    mean: list[float]  # per channel, values 0..1
    std: list[float]
    eigenvalues: list[float]  # of the covariance of a pixel's channels, largest first
    eigenvectors: list[list[float]]  # each a row of three, with a positive largest part

    @property
    def is_well(self) -> bool:
        return not self.damaged

    def facts(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    @property
    def recipe(self) -> list[str]:
        """Overrides to use the colours by."""
        rows = ",".join(_list(vector) for vector in self.eigenvectors)
        return [f"augment.mean={_list(self.mean)}", f"augment.std={_list(self.std)}",
                f"augment.pca_eigenvalues={_list(self.eigenvalues, digits=6)}", f"augment.pca_eigenvectors=[{rows}]"]

    @property
    def _balance(self) -> str:
        """Images per class, and who is at the ends, without favour among equals."""
        least, most = self.per_class.least, self.per_class.most
        if least == most:
            return f"{counted(int(least), 'image')} in each"

        def ends(name: str, equals: int, what: str) -> str:
            return f"{name} has the {what}" if equals == 1 else \
                f"{name} and {counted(equals - 1, 'other')} have the {what}"

        return (f"images in a class {least:,.0f} / {self.per_class.median:,.0f} / {most:,.0f} (least / median / most: "
                f"{ends(self.smallest, self.as_small, 'fewest')}, {ends(self.largest, self.as_large, 'most')})")

    def summary(self) -> str:
        """What `data stats` prints."""
        limited = self.looked_at + len(self.damaged) < self.samples
        those = "those looked at" if limited else "all"

        def line(values: Spread, form: str) -> str:
            return " / ".join(format(value, form) for value in (values.least, values.median, values.most))

        lines = [
            ("source", f"{self.source} ({self.stage})"),
            ("samples", f"{self.samples:,}; looked at {self.looked_at:,}, "
                        + ("taken evenly: what follows is of these" if limited else "all of them")),
            ("classes", f"{self.classes:,}; {self._balance}" + (f" (of all {self.samples:,})" if limited else "")),
            ("width", line(self.width, ",.0f") + " pixels (least / median / most)"),
            ("height", line(self.height, ",.0f")),
            ("Mpixels", line(self.megapixels, ".3f")),
            ("bytes", f"{line(self.bytes, ',.0f')}; {self.total_bytes:,} in {those}"),
            ("kinds", told(self.found)),
            ("mean", "  ".join(f"{value:.6f}" for value in self.mean)),
            ("std", "  ".join(f"{value:.6f}" for value in self.std)),
            *(("PCA" if not place else "", f"eigenvalue {value:.6f}, eigenvector "
               + "  ".join(f"{part:+.4f}" for part in vector))
              for place, (value, vector) in enumerate(zip(self.eigenvalues, self.eigenvectors, strict=True))),
            *(("damaged", one) for one in self.damaged[:LISTED]),
            *([("damaged", f"{len(self.damaged):,} in {those}, left out of the figures")] if self.damaged else []),
            ("use it", " ".join(self.recipe)),
        ]
        return "\n".join(f"{name:<10}{value}" for name, value in lines)


def _list(values: list[float], *, digits: int = 4) -> str:
    return "[" + ",".join(f"{value:.{digits}f}" for value in values) + "]"


@dataclass(frozen=True)
class _One:
    """What a thread finds of a sample."""

    width: int = 0
    height: int = 0
    bytes: int = 0
    kinds: tuple[str, ...] = ()
    sums: ColourSums | None = None
    damaged: str = ""


def stats(locator: str, *, limit: int | None = None, threads: int | None = None,
          cache_dir: Path | None = None) -> Stats:
    """Over all samples, or `limit` of them taken evenly. Raises UserError."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, got {limit}.")
    with open_index(locator, cache_dir=cache_dir) as index:
        return _stats(index, limit=limit, threads=threads or cores_here())


def _stats(index: Index, *, limit: int | None, threads: int) -> Stats:
    count = min(limit or len(index), len(index))
    ids = np.arange(count, dtype=np.int64) * len(index) // count  # as data.limit takes them
    cuts = [ids[first:first + CHUNK].tolist() for first in range(0, count, CHUNK)]
    sums, found, damaged = Sums(), Counter[str](), []
    sizes = np.zeros((count, 3), dtype=np.int64)  # width, height, bytes
    known = 0
    with Progress(count, what="looking at") as progress:
        for cut, ones in zip(cuts, in_order(lambda cut: [_look_at(index, row) for row in cut], cuts, threads=threads),
                             strict=True):
            for row, one in zip(cut, ones, strict=True):
                if one.sums is None:
                    damaged.append(f"{index.where(row)} (sample {row}): {one.damaged}")
                    continue
                sums.add(one.sums.values, one.sums.products, one.sums.pixels)
                found.update(one.kinds)
                sizes[known] = one.width, one.height, one.bytes
                known += 1
            progress.update(len(cut))
    if not known:
        raise UserError(f"{index.source}: not one of the {count:,} images could be decoded; the first: {damaged[0]}.")
    width, height, size = sizes[:known].T
    classes = np.bincount(index.labels, minlength=len(index.classes))
    eigenvalues, eigenvectors = principal(sums.covariance())
    return Stats(
        source=str(index.source), stage=index.stage, samples=len(index), looked_at=known, classes=len(index.classes),
        per_class=spread(classes), smallest=index.classes[int(classes.argmin())],
        largest=index.classes[int(classes.argmax())], as_small=int((classes == classes.min()).sum()),
        as_large=int((classes == classes.max()).sum()), width=spread(width), height=spread(height),
        megapixels=spread(width * height / 1e6), bytes=spread(size), total_bytes=int(size.sum()),
        found=dict(sorted(found.items())), damaged=damaged, mean=sums.mean().tolist(),
        std=np.sqrt(np.diag(sums.covariance())).tolist(), eigenvalues=eigenvalues.tolist(),
        eigenvectors=eigenvectors.tolist())


def _look_at(index: Index, row: int) -> _One:
    try:
        data = index.read(row)
    except OSError as error:
        raise Unreadable(f"Can't read {index.where(row)} (sample {row}): {error.strerror or error}.") from None
    side = parse_stage(index.stage)
    if side.kind == "raw":
        pixels = np.frombuffer(data, np.uint8).reshape(-1, CHANNELS)
        return _One(side.pixels, side.pixels, len(data), (), sums_of(pixels))
    try:
        facts = look(data)
        image = open_upright(data, channels=CHANNELS)
    except DamagedImage as error:
        return _One(damaged=str(error))
    return _One(facts.width, facts.height, len(data), facts.kinds,
                sums_of(np.asarray(image).reshape(-1, CHANNELS)))


def principal(covariance: F64) -> tuple[F64, F64]:
    """Eigenvalues, largest first, and their eigenvectors as rows, each signed so that its largest part is positive."""
    values, columns = np.linalg.eigh(covariance)
    rows = columns.T[::-1]
    largest = rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)]
    return np.maximum(values[::-1], 0.0), rows * np.sign(largest)[:, None]
