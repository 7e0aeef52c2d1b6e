"""The demo's data: JPEGs of twelve kinds of figure and texture, drawn on the spot, without a network.

    alexnet-ddp data demo DST [--classes 10] [--per-class 250]

Colours say nothing about the class: figure and ground come from one distribution, and position, size,
noise and lighting vary, so that only shape tells the classes apart. A mirrored picture keeps its class; only
the two kinds of stripes would change theirs when turned. A few files are grey, progressive or stored turned
with an EXIF orientation, as among photographs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from alexnet_ddp.errors import UserError

VERSION = 1  # of the pictures: raise it with any change to them, so that older data is made anew
MANIFEST = "demo.json"
SPLITS = ("train", "val")
SIDES = (96, 200)  # smallest and largest side in pixels
ORIENTATION = 0x0112  # EXIF tag
TURN_CLOCKWISE = 6  # its value for "turn a quarter clockwise to show"

Field = np.ndarray  # float32 [height, width]
Figure = Callable[[Field, Field], Field]


# --- figures: signed distance, about, to the edge at (u, v), negative inside. Single figures have radius one,
#     --- textures period one.


def _wave(phase: Field) -> Field:
    """Bands of period one."""
    return np.sin(2 * np.pi * phase) / (2 * np.pi)


def _cell(u: Field) -> Field:
    """Distance to the nearest integer."""
    return np.abs(u - np.round(u))


def _checkerboard(u: Field, v: Field) -> Field:
    return np.sin(np.pi * u) * np.sin(np.pi * v) / np.pi


def _cross(u: Field, v: Field) -> Field:
    near, far = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return np.maximum(near - 0.28, far - 1)


def _dots(u: Field, v: Field) -> Field:
    return np.hypot(_cell(u), _cell(v)) - 0.28


def _grid(u: Field, v: Field) -> Field:
    return np.minimum(_cell(u), _cell(v)) - 0.12


def _ring(u: Field, v: Field) -> Field:
    return np.abs(np.hypot(u, v) - 0.78) - 0.22


def _spiral(u: Field, v: Field) -> Field:
    radius = np.hypot(u, v)
    turn = np.arctan2(v, u) / (2 * np.pi)
    return np.maximum(_wave(1.5 * radius + turn) / 1.5, radius - 1)


def _polygon(u: Field, v: Field, corners: int, inner: float) -> Field:
    """A regular polygon or star: `inner` is the radius between two corners, whose own radius is one."""
    half = np.pi / corners
    angle = np.abs((np.arctan2(v, u) + half) % (2 * half) - half)  # 0 at a corner, `half` between two
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    dx, dy = inner * np.cos(half) - 1, inner * np.sin(half)  # along the edge
    return ((x - 1) * dy - y * dx) / np.hypot(dx, dy)


def _square(u: Field, v: Field) -> Field:
    return _polygon(u, v, 4, np.cos(np.pi / 4))


def _star(u: Field, v: Field) -> Field:
    return _polygon(u, v, 5, 0.4)


def _triangle(u: Field, v: Field) -> Field:
    return _polygon(u, v, 3, np.cos(np.pi / 3))


def _stripes(u: Field, v: Field) -> Field:
    return _wave(v)


def _waves(u: Field, v: Field) -> Field:
    return _wave(v + 0.45 * np.sin(2 * np.pi * u / 1.8))


# name -> figure, size (radius or period) as a share of the shorter side, mean angle and its spread in degrees
KINDS: dict[str, tuple[Figure, tuple[float, float], tuple[float, float]]] = {
    "checkerboard": (_checkerboard, (0.18, 0.30), (0, 180)),
    "cross": (_cross, (0.35, 0.50), (0, 180)),
    "dots": (_dots, (0.25, 0.40), (0, 180)),
    "grid": (_grid, (0.25, 0.40), (0, 180)),
    "ring": (_ring, (0.35, 0.50), (0, 180)),
    "spiral": (_spiral, (0.40, 0.55), (0, 180)),
    "square": (_square, (0.35, 0.50), (0, 180)),
    "star": (_star, (0.40, 0.55), (0, 180)),
    "stripes_horizontal": (_stripes, (0.16, 0.36), (0, 12)),
    "stripes_vertical": (_stripes, (0.16, 0.36), (90, 12)),
    "triangle": (_triangle, (0.35, 0.50), (0, 180)),
    "waves": (_waves, (0.20, 0.36), (0, 180)),
}
CLASSES = tuple(KINDS)


def draw(kind: str, rng: np.random.Generator) -> np.ndarray:
    """One picture of `kind`: uint8 [height, width, 3], sides within `SIDES`."""
    figure, (smallest, largest), (angle, spread) = KINDS[kind]
    width, height = (int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, size=2))
    shorter = min(width, height)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x -= width / 2 + rng.uniform(-0.12, 0.12) * shorter
    y -= height / 2 + rng.uniform(-0.12, 0.12) * shorter

    scale = shorter * rng.uniform(smallest, largest)  # pixels in one unit of (u, v)
    turn = math.radians(angle + rng.uniform(-spread, spread))
    cosine, sine = math.cos(turn) / scale, math.sin(turn) / scale
    u, v = cosine * x + sine * y, cosine * y - sine * x
    if rng.random() < 0.5:
        u = -u
    inside = np.clip(0.5 - figure(u, v) * scale, 0, 1)[..., None]  # the edge is one pixel wide

    ground, ink = _colours(rng)
    lit = rng.uniform(-40, 40, size=(2, 3)).astype(np.float32)  # how much each colour changes across and down
    light = lit[0] * (x / width)[..., None] + lit[1] * (y / height)[..., None]
    grain = rng.uniform(3, 15) * rng.standard_normal((height, width, 1), dtype=np.float32)
    return np.clip(ground + (ink - ground) * inside + light + grain, 0, 255).round().astype(np.uint8)


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB colours of one distribution, different enough in lightness to be told apart in grey too."""
    while True:
        ground, ink = rng.uniform(0, 255, size=(2, 3)).astype(np.float32)
        if abs(np.dot(ground - ink, (0.299, 0.587, 0.114))) > 50:
            return ground, ink


def _save(path: Path, pixels: np.ndarray, number: int, rng: np.random.Generator) -> None:
    """Writes one JPEG; in every class number 0 is grey, 1 progressive and 2 stored turned."""
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    if number == 0:
        image = image.convert("L")
    if number == 2:
        image = image.transpose(Image.Transpose.ROTATE_90)  # counter-clockwise: the tag turns it back
        exif[ORIENTATION] = TURN_CLOCKWISE
    image.save(path, quality=int(rng.integers(85, 96)), progressive=number == 1, exif=exif)


def make_demo(dst: Path, *, seed: int = 0, classes: int = len(CLASSES), train_per_class: int = 250,
              val_per_class: int = 50) -> Path:
    """Makes `dst`/train and `dst`/val with a folder for each of the first `classes` of `CLASSES`; returns `dst`.

    A picture depends on (seed, split, class, number) alone. Data made before with the same arguments is kept;
    what is incomplete or was made with others is made anew. `dst` appears whole or not at all.

    Raises UserError where `dst` holds anything but demo data, and for numbers out of range.
    """
    if not 2 <= classes <= len(CLASSES):
        raise UserError(f"there are {len(CLASSES)} kinds of figure, and a net needs two to tell apart; got {classes}\n"
                        f"use --classes 2 to {len(CLASSES)}")
    if min(train_per_class, val_per_class) < 1:
        raise UserError(f"a class has a picture at least; got {min(train_per_class, val_per_class)}\nuse 1 or more")
    kinds = CLASSES[:classes]
    counts = dict(zip(SPLITS, (train_per_class, val_per_class), strict=True))
    manifest = json.dumps({"demo": VERSION, "seed": seed, "classes": kinds, "per_class": counts}, indent=1)
    if _complete(dst, manifest, counts, kinds):
        return dst
    others = set(os.listdir(dst)) - {MANIFEST, *SPLITS} if dst.is_dir() else set()
    if others or (dst.exists() and not (dst / MANIFEST).is_file() and (not dst.is_dir() or any(dst.iterdir()))):
        raise UserError(
            f"the demo's data goes into a new folder or replaces its own\n{dst} holds something else\n"
            f"name another folder, or move this one away"
        )
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{dst.name}-", dir=dst.parent))
    except OSError as error:
        raise UserError(f"{dst} can't be made: {error.strerror or error}. Name a folder that can.") from None
    try:
        for split_number, (split, count) in enumerate(counts.items()):
            for label, kind in enumerate(kinds):
                folder = made / "new" / split / kind
                folder.mkdir(parents=True)
                for number in range(count):
                    rng = np.random.default_rng((seed, split_number, label, number))
                    _save(folder / f"{number:04}.jpg", draw(kind, rng), number, rng)
        (made / "new" / MANIFEST).write_text(manifest)
        if dst.exists():
            os.rename(dst, made / "old")
        os.rename(made / "new", dst)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return dst


def _complete(dst: Path, manifest: str, counts: dict[str, int], kinds: Sequence[str]) -> bool:
    """Is `dst` demo data made with the same arguments, with every file in place?"""
    try:
        return (dst / MANIFEST).read_text() == manifest and all(
            len(os.listdir(dst / split / kind)) == count
            for split, count in counts.items()
            for kind in kinds
        )
    except OSError:
        return False
