"""Bytes of a photograph -> the pixels the net gets, in a batch slot.

A decoder reads the image's size, asks which view of it is wanted and writes that view as uint8. All decoders show
the same views of the same upright image (EXIF orientation applied), so that crops don't depend on the decoder.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from alexnet_ddp.data.randomness import CROP_TRIES
from alexnet_ddp.errors import UserError

U8 = NDArray[np.uint8]

# EXIF blocks are often damaged in photographs from the web; that says nothing of the pixels. Sizes we judge ourselves.
warnings.filterwarnings("ignore", module=r"PIL\.(TiffImagePlugin|Image|JpegImagePlugin)")

MOST_PIXELS = 89_478_485  # Pillow's bound: 256 MB of RGB; beyond it a header is damaged or made to harm


class DamagedImage(Exception):
    """The bytes are no image that can be decoded whole; the loader adds where they lie."""


# --- views ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """The part of an upright image that is shown: a box, resized, and a square cut out of that. All in pixels."""

    left: int
    top: int
    width: int
    height: int
    resized_width: int
    resized_height: int
    x: int
    y: int

    def numbers(self) -> tuple[int, ...]:
        return astuple(self)


ChooseView = Callable[[int, int], View]  # (width, height) of the upright image -> what to show of it


def random_resized(width: int, height: int, *, size: int, draws: NDArray[np.float64],
                   scale: tuple[float, float], ratio: tuple[float, float]) -> View:
    """torchvision's RandomResizedCrop (Szegedy et al. 2015, section 6) from a fixed number of draws in [0, 1)."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for a, r, u, v in draws.reshape(CROP_TRIES, 4).tolist():
        area = width * height * (scale[0] + a * (scale[1] - scale[0]))
        aspect = math.exp(low + r * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return View(int(u * (width - w + 1)), int(v * (height - h + 1)), w, h, size, size, 0, 0)
    w, h = width, height  # the largest central crop within the allowed aspect ratios
    if width < ratio[0] * height:
        h = min(height, round(width / ratio[0]))
    elif width > ratio[1] * height:
        w = min(width, round(height * ratio[1]))
    return View((width - w) // 2, (height - h) // 2, w, h, size, size, 0, 0)


def short_side(width: int, height: int, *, short: int) -> tuple[int, int]:
    """Width and height once the shorter one is `short`, rounded down as torchvision's Resize does."""
    if width <= height:
        return short, max(short, int(short * height / width))
    return max(short, int(short * width / height)), short


def random_crop(width: int, height: int, *, size: int, draws: NDArray[np.float64]) -> View:
    """A square of `size` from anywhere in the image at short side size / 0.875 (256 for 224: the 2012 paper)."""
    w, h = short_side(width, height, short=max(size, round(size / 0.875)))
    u, v = draws[:2].tolist()
    return View(0, 0, width, height, w, h, int(u * (w - size + 1)), int(v * (h - size + 1)))


def center(width: int, height: int, *, size: int) -> View:
    """The central square of `size` at short side size / 0.875: Resize(256) and CenterCrop(224) for size 224."""
    w, h = short_side(width, height, short=max(size, round(size / 0.875)))
    return View(0, 0, width, height, w, h, round((w - size) / 2), round((h - size) / 2))


def squash(width: int, height: int, *, size: int) -> View:
    """The whole image, squashed to a square."""
    return View(0, 0, width, height, size, size, 0, 0)


# --- decoders ---------------------------------------------------------------------------------------------------


class Decoder(Protocol):
    """Writes the chosen view of an encoded image into `out` (uint8 [size, size, channels], 1 or 3 channels)."""

    name: str
    version: str

    def __call__(self, data: bytes, choose: ChooseView, out: U8) -> View:
        """Raises DamagedImage."""
        ...


class PillowDecoder:
    """Full decode of whatever Pillow reads: the reference, and the way out for what others can't do."""

    name = "pillow"
    version = PIL.__version__

    def __call__(self, data: bytes, choose: ChooseView, out: U8) -> View:
        image = open_upright(data, channels=out.shape[-1])
        view = choose(*image.size)
        _cut(image, view, (view.left, view.top, view.left + view.width, view.top + view.height), out)
        return view


class SimpleJpegDecoder:
    """libjpeg-turbo through simplejpeg: decodes a JPEG at the smallest 1/2, 1/4 or 1/8 that has pixels to spare.

    "To spare" is twice those of the view each way: a decode to hardly more leaves the antialiasing to libjpeg, whose
    pixels are sharper than the resize's (by 3/255 on average and up to 9/255 in photographs at 224, for no gain in
    speed: 3/4, 5/8 and their kin are slower than a full decode).
    """

    name = "simplejpeg"
    version = f"{simplejpeg.__version__}+pillow{PIL.__version__}"

    def __init__(self) -> None:
        self._other = PillowDecoder()

    def __call__(self, data: bytes, choose: ChooseView, out: U8) -> View:
        # Pillow takes what isn't a plain upright JPEG, and judges what libjpeg only warns of.
        if data[:2] != b"\xff\xd8" or not _upright(data):
            return self._other(data, choose, out)
        _check_end(data)
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(width, height)
            if colours in ("CMYK", "YCCK"):
                return self._other(data, choose, out)
            view = choose(width, height)
            pixels = simplejpeg.decode_jpeg(
                data, colorspace="GRAY" if out.shape[-1] == 1 else "RGB", min_factor=2,
                min_width=min(width, math.ceil(2 * width * view.resized_width / view.width)),
                min_height=min(height, math.ceil(2 * height * view.resized_height / view.height)))
        except ValueError:
            return self._other(data, choose, out)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        across, down = image.width / width, image.height / height
        _cut(image, view, (view.left * across, view.top * down,
                           (view.left + view.width) * across, (view.top + view.height) * down), out)
        return view


def _upright(data: bytes) -> bool:
    """Whether Pillow would show these JPEG bytes without turning them; False also where it can't say."""
    header = _header(data)
    if b"Exif\0\0" not in header and b"tiff:Orientation" not in header:  # where Pillow looks: EXIF, then XMP
        return True
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:  # reads the header only
            return bool(image.getexif().get(0x0112, 1) == 1)
    except Exception:
        return False


def _header(data: bytes) -> bytes:
    """JPEG bytes up to the first scan, all of them where there is something else between the segments."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return data[:at]
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2:at + 4], "big")
    return data


def _check_end(data: bytes) -> None:
    """A JPEG whose tail was never written, so that it is zeros, decodes to a grey lower half without a word."""
    header = _header(data)
    if data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9", len(header) if len(header) < len(data) else 2) < 0:
        raise DamagedImage("image file is truncated (there is no end marker)")


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise DamagedImage(f"{width} x {height} pixels are more than the {MOST_PIXELS:,} of a photograph")


def open_upright(data: bytes, *, channels: int) -> Image.Image:
    """The decoded, upright image with 1 (grey) or 3 (RGB) channels. Raises DamagedImage."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        _check_size(*image.size)
        _check_end(data)
        image.load()
        if image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if channels == 1 else "RGB")
    except DamagedImage:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for bad bytes
        what = "no bytes" if not data else str(error).replace(repr(io.BytesIO), "") or type(error).__name__
        raise DamagedImage("not a JPEG or PNG" if "cannot identify image" in what else what) from None


def _cut(image: Image.Image, view: View, box: tuple[float, float, float, float], out: U8) -> None:
    """Antialiased bilinear resize of `box` of the image, cut to the view's square, into the slot."""
    if box != (0, 0, *image.size) or image.size != (view.resized_width, view.resized_height):
        image = image.resize((view.resized_width, view.resized_height), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    size = out.shape[0]
    out[...] = pixels[view.y:view.y + size, view.x:view.x + size]


def create_decoder(name: str) -> Decoder:
    """The decoder of a recipe's `data.decoder`; auto is the quickest of those installed."""
    if name in ("auto", "simplejpeg"):
        return SimpleJpegDecoder()
    if name == "pillow":
        return PillowDecoder()
    raise UserError(f"data.decoder must be auto, simplejpeg or pillow, got '{name}'.")
