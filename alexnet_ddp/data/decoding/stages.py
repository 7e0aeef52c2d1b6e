"""Stored stages: what is done to a photograph once, deterministically, before anything is drawn for it.

    original   the file's own bytes
    shortN     short side N pixels, antialiased, JPEG of quality 90 with 4:2:0 colours
    maxN       at most N pixels a side, never enlarged, the same JPEG
    rawN       the central N x N pixels of short side N: uint8 [N, N, 3], no header

All but `original` are upright (EXIF applied), RGB and free of metadata. The same photograph gives the same bytes with
the same versions of Pillow and simplejpeg (`VERSIONS`), wherever it is made: at each read, by `data pack`, in a cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL
import simplejpeg
from PIL import Image

from alexnet_ddp.data.decoding.decode import DamagedImage, check_size, open_upright
from alexnet_ddp.data.decoding.views import short_side

PATTERN = r"^(original|(short|max|raw)[1-9][0-9]{1,3})$"  # what data.stored and `data pack --stage` accept
QUALITY = 90  # of JPEG stages
CHANNELS = 3
VERSIONS = f"pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}"


@dataclass(frozen=True)
class Stage:
    """A stage by its parts; `str(stage)` is the recipe's word for it."""

    kind: Literal["original", "short", "max", "raw"]
    pixels: int = 0  # a side; 0 for original

    def __str__(self) -> str:
        return self.kind + (str(self.pixels) if self.pixels else "")

    @property
    def record_bytes(self) -> int | None:
        """Bytes of every record where all are alike (raw), else None."""
        return self.pixels * self.pixels * CHANNELS if self.kind == "raw" else None


def parse_stage(word: str) -> Stage:
    """`short256` -> Stage("short", 256). ValueError for anything that PATTERN doesn't match."""
    if not re.match(PATTERN, word):
        raise ValueError(f"a stage is original, shortN, maxN or rawN with N pixels (10 to 9999), got '{word}'")
    kind = word.rstrip("0123456789")
    return Stage(kind, int(word[len(kind):] or 0))  # type: ignore[arg-type]


def to_stage(data: bytes, stage: Stage) -> bytes:
    """An original's bytes -> what the stage holds of it. Raises DamagedImage."""
    if stage.kind == "original":
        return data
    image = open_upright(data, channels=CHANNELS)
    width, height = image.size
    if stage.kind == "max":
        shrink = min(1.0, stage.pixels / max(width, height))
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
    else:
        size = short_side(width, height, short=stage.pixels)
    if size != image.size:
        check_size(*size, what="resized to ")
        image = image.resize(size, Image.Resampling.BILINEAR)
    if stage.kind != "raw":
        try:
            return bytes(simplejpeg.encode_jpeg(np.asarray(image), quality=QUALITY, colorsubsampling="420"))
        except ValueError as error:  # more pixels a side than a JPEG can hold
            raise DamagedImage(f"resized to {image.width} x {image.height} pixels: {error}") from None
    left, top = (image.width - stage.pixels) // 2, (image.height - stage.pixels) // 2
    return image.crop((left, top, left + stage.pixels, top + stage.pixels)).tobytes()
