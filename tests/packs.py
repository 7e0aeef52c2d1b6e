"""What tests of packs stand on: photographs of every kind, and what lies in a folder."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(width: int, height: int) -> Image.Image:
    """Smooth colours with an edge."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, np.where(x > y, 200, 40)], -1)
                           .astype(np.uint8))


def jpeg(width: int, height: int) -> bytes:
    """The same as a JPEG file."""
    file = io.BytesIO()
    pixels(width, height).save(file, "JPEG")
    return file.getvalue()


def turned(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


def save(path: Path, image: Image.Image, kind: str = "JPEG", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    image.save(file, kind, **options)
    path.write_bytes(file.getvalue())
    return path


def every_kind(folder: Path) -> Path:
    """Ten images in two classes: plain, grey, CMYK, turned, PNG, transparent, of 16 bits, palette, PNG called .jpg."""
    plain = pixels(40, 30)
    save(folder / "a" / "0plain.jpg", plain)
    save(folder / "a" / "1grey.JPEG", plain.convert("L"))
    save(folder / "a" / "2cmyk.jpg", plain.convert("CMYK"))
    save(folder / "a" / "3turned.jpg", plain, exif=turned(6))
    save(folder / "a" / "sub" / "4below.jpeg", plain)
    save(folder / "b" / "png.png", plain, "PNG")
    save(folder / "b" / "transparent.png", plain.convert("RGBA"), "PNG")
    save(folder / "b" / "deep.png", Image.fromarray(np.full((20, 20), 40_000, np.uint16)), "PNG")
    save(folder / "b" / "palette.png", plain.convert("P"), "PNG")
    save(folder / "b" / "\u00e9t\u00e9 misnamed.jpg", plain, "PNG")
    return folder


def content(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file, hidden ones too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
