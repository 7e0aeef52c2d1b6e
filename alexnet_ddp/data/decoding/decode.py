"""Bytes of a photograph -> the pixels the net gets, in a batch slot.

A decoder reads the image's size, asks which view of it is wanted and writes that view as uint8. All decoders show
the same views of the same upright image (EXIF orientation applied), so that crops don't depend on the decoder.

    turbojpeg    only the rows and columns that the view needs, at 1/2, 1/4 or 1/8 where it has pixels to spare
    nvimgcodec   only the rows and columns that the view needs
    simplejpeg   whole images, at 1/2, 1/4 or 1/8 where the view has pixels to spare
    torchcodec   whole images
    pillow       whole images; the reference, and the way out for what the others can't do (PNG, CMYK, turned by EXIF)

A region decoder doesn't look at what lies below its view, so damage there goes unseen: `data verify --decode` looks.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from typing import Protocol

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps

from alexnet_ddp.data.decoding import jpeg, resize
from alexnet_ddp.data.decoding.jpeg import JpegLibrary, NotForThis
from alexnet_ddp.data.decoding.resize import Quality
from alexnet_ddp.data.decoding.views import ChooseView, View
from alexnet_ddp.errors import UserError

U8 = NDArray[np.uint8]

# EXIF blocks are often damaged in photographs from the web; that says nothing of the pixels. Sizes we judge ourselves.
warnings.filterwarnings("ignore", module=r"PIL\.(TiffImagePlugin|Image|JpegImagePlugin)")

MOST_PIXELS = 89_478_485  # Pillow's bound: 256 MB of RGB; beyond it a header is damaged or made to harm
PARTS = {"antialias": 2, "fast": 1}  # pixels to spare each way, in times the view's, when decoding at a fraction
NAMES = ("turbojpeg", "nvimgcodec", "simplejpeg", "torchcodec", "pillow")  # of data.decoder, beside auto


class DamagedImage(Exception):
    """The bytes are no image that can be decoded whole; the loader adds where they lie."""


class Decoder(Protocol):
    """Writes the chosen view of an encoded image into `out` (uint8 [size, size, channels], 1 or 3 channels)."""

    name: str
    version: str

    def __call__(self, data: bytes, choose: ChooseView, out: U8) -> View:
        """Raises DamagedImage."""
        ...


class PillowDecoder:
    """Full decode of whatever Pillow reads, and for antialias its own resize: what the reference recipes compute."""

    name = "pillow"

    def __init__(self, *, quality: Quality) -> None:
        self.version = PIL.__version__ + ("" if quality == "antialias" else f"+{resize.version(quality)}")
        self._quality = quality

    def __call__(self, data: bytes, choose: ChooseView, out: U8) -> View:
        image = open_upright(data, channels=out.shape[-1])
        view = _bounded(choose(*image.size))
        box = (view.left, view.top, view.left + view.width, view.top + view.height)
        if self._quality == "antialias" and not view.only_cut:
            image = image.crop(box).resize((view.resized_width, view.resized_height), Image.Resampling.BILINEAR)
            image = image.crop((view.x, view.y, view.x + out.shape[1], view.y + out.shape[0]))
            out[...] = np.asarray(image).reshape(out.shape)
        else:
            pixels = np.array(image)
            resize.place(pixels.reshape(*pixels.shape[:2], -1), box, view, out, quality=self._quality)
        return view


class JpegDecoder:
    """A JPEG library for plain upright JPEGs, and Pillow for the rest."""

    def __init__(self, library: JpegLibrary, *, quality: Quality) -> None:
        self._library, self._quality, self._other = library, quality, PillowDecoder(quality=quality)
        self.name = library.name
        self.version = f"{library.version}+{resize.version(quality)}+pillow{PIL.__version__}"

    def __call__(self, data: bytes, choose: ChooseView, out: U8) -> View:
        # Pillow takes what isn't a plain upright JPEG, and judges what libjpeg only warns of.
        if data[:2] != b"\xff\xd8" or not _upright(data):
            return self._other(data, choose, out)
        _check_end(data)
        try:
            width, height = size = self._library.size(data)
            check_size(width, height)
            view = _bounded(choose(width, height))
            pixels, box = self._library.pixels(data, view, size=size, parts=PARTS[self._quality],
                                               channels=out.shape[-1])
        except NotForThis:
            return self._other(data, choose, out)
        resize.place(pixels, box, view, out, quality=self._quality)
        return view


def create_decoder(name: str, *, quality: Quality = "antialias") -> Decoder:
    """The decoder of a recipe's `data.decoder` and `augment.resize`; auto is the quickest of those installed.

    nvimgcodec is never chosen by itself: its package comes on NVIDIA's own terms. UserError where it isn't installed.
    """
    if name not in ("auto", *NAMES):
        raise UserError(f"data.decoder must be auto, {', '.join(NAMES[:-1])} or {NAMES[-1]}, got '{name}'.")
    if name == "pillow":
        return PillowDecoder(quality=quality)
    if name == "auto":
        name = "turbojpeg" if jpeg.turbojpeg_is_there() else "simplejpeg"
    if name in ("nvimgcodec", "torchcodec") and importlib.util.find_spec(
            "nvidia.nvimgcodec" if name == "nvimgcodec" else name) is None:
        package = "alexnet-ddp[nvimgcodec]" if name == "nvimgcodec" else "torchcodec"
        raise UserError(f"data.decoder={name} isn't installed here. Install it (pip install '{package}'), or use "
                        "data.decoder=auto in a new run.")
    return JpegDecoder(jpeg.open_library(name, fast=quality == "fast"), quality=quality)


# --- what the bytes say of themselves ------------------------------------------------------------------------------


def _upright(data: bytes) -> bool:
    """Whether Pillow would show these JPEG bytes without turning them; False also where it can't say."""
    end = _end_of_header(data)
    if data.find(b"Exif\0\0", 0, end) < 0 and data.find(b"tiff:Orientation", 0, end) < 0:
        return True  # EXIF, then XMP, is where Pillow looks
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:  # reads the header only
            return bool(image.getexif().get(0x0112, 1) == 1)
    except Exception:
        return False


def _end_of_header(data: bytes) -> int:
    """Where the first scan of a JPEG begins; the end where there is something else between the segments."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return at
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2:at + 4], "big")
    return len(data)


def _check_end(data: bytes) -> None:
    """A JPEG whose tail was never written, so that it is zeros, decodes to a grey lower half without a word."""
    if data[-2:] == b"\xff\xd9" or data[:2] != b"\xff\xd8":
        return
    end = _end_of_header(data)
    if data.rfind(b"\xff\xd9", end if end < len(data) else 2) < 0:
        raise DamagedImage("image file is truncated (there is no end marker)")


def _bounded(view: View) -> View:
    """A view that is resized to no more than a photograph's pixels: a line of 1 x 60,000 would grow to 12 GB."""
    check_size(view.resized_width, view.resized_height, what="resized to ")
    return view


def check_size(width: int, height: int, *, what: str = "") -> None:
    """Raises DamagedImage."""
    if width < 1 or height < 1:
        raise DamagedImage(f"{width} x {height} pixels")
    if width * height > MOST_PIXELS:
        raise DamagedImage(f"{what}{width} x {height} pixels are more than the {MOST_PIXELS:,} of a photograph")


def open_upright(data: bytes, *, channels: int) -> Image.Image:
    """The decoded, upright image with 1 (grey) or 3 (RGB) channels. Raises DamagedImage."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        check_size(*image.size)
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
    except (DamagedImage, MemoryError):
        raise
    except Exception as error:  # Pillow raises a dozen kinds for bad bytes
        what = "no bytes" if not data else str(error).replace(repr(io.BytesIO), "") or type(error).__name__
        raise DamagedImage("not a JPEG or PNG" if "cannot identify image" in what else what) from None
