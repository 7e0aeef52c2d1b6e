"""The JPEG libraries behind the decoders, each brought to the same two questions (JpegLibrary)."""

from __future__ import annotations

import importlib.metadata
import threading
from typing import Any, Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from alexnet_ddp.data.decoding import turbojpeg
from alexnet_ddp.data.decoding.resize import Box
from alexnet_ddp.data.decoding.views import View

U8 = NDArray[np.uint8]

MOST_KEPT = 2**26  # bytes a thread keeps for decoded pixels: 22 megapixels; rarer, larger photographs get their own


class NotForThis(Exception):
    """A JPEG library declines, or warns: Pillow then decodes the image, or says what is wrong with it."""


class JpegLibrary(Protocol):
    """What a JPEG library is asked for; calls may come from any number of threads."""

    name: str
    version: str

    def size(self, data: bytes) -> tuple[int, int]:
        """Width and height of a grey or YCbCr JPEG. Raises NotForThis."""
        ...

    def pixels(self, data: bytes, view: View, *, size: tuple[int, int], parts: int, channels: int) -> tuple[U8, Box]:
        """uint8 [h, w, channels], which may be overwritten by the thread's next call, and where in it the view's box
        lies. `size` is what the method of that name said. A library that can decodes at the smallest fraction that
        leaves `parts` times the pixels that are shown, each way. Raises NotForThis."""
        ...


def open_library(name: str, *, fast: bool) -> JpegLibrary:
    """`fast`: the inverse DCT and the chroma upsampling of lower accuracy, where a library decodes whole images."""
    if name == "turbojpeg":
        return TurboJpeg()
    if name == "nvimgcodec":
        return NvImageCodec()
    return SimpleJpeg(fast=fast) if name == "simplejpeg" else TorchCodec()


def turbojpeg_is_there() -> bool:
    return turbojpeg.find_library() is not None


class Memory(threading.local):
    """Memory for decoded pixels, one a thread, used again: fresh pages for each image can cost as much as decoding."""

    def __init__(self) -> None:
        self._bytes, self._address = np.empty(0, np.uint8), 0

    def array(self, height: int, width: int, channels: int) -> tuple[U8, int]:
        """uint8 [height, width, channels], contiguous, and its address; what it held is lost at the next call in this
        thread."""
        size = height * width * channels
        if size > MOST_KEPT:
            rare = np.empty((height, width, channels), np.uint8)
            return rare, rare.ctypes.data
        if self._bytes.size < size:
            self._bytes = np.empty(size + size // 2, np.uint8)
            self._address = self._bytes.ctypes.data
        return self._bytes[:size].reshape(height, width, channels), self._address


def fraction(view: View, *, parts: int) -> int:
    """The largest of 8, 4, 2, 1 whose n-th part of the image still has `parts` times the pixels that are shown.

    "To spare" must be twice each way for antialiasing: a decode to hardly more leaves it to libjpeg, whose pixels are
    sharper than the resize's (by 3/255 on average and up to 9/255 in photographs at 224), for no gain in speed.
    """
    for n in (8, 4, 2):
        if view.width >= n * parts * view.resized_width and view.height >= n * parts * view.resized_height:
            return n
    return 1


def scaled_box(view: View, *, fraction: int = 1, left: int = 0, top: int = 0) -> Box:
    """The view's box in an image decoded at 1 / fraction, of which what comes before left and top is missing.

    A pixel of a scaled decode stands for fraction x fraction whole ones, also where the last of them don't exist.
    """
    return (view.left / fraction - left, view.top / fraction - top, (view.left + view.width) / fraction - left,
            (view.top + view.height) / fraction - top)


class TurboJpeg:
    """libjpeg-turbo 3 by its own interface: a region, at a fraction."""

    name = "turbojpeg"

    def __init__(self) -> None:
        self._library = turbojpeg.TurboJpegLibrary()
        self._memory = Memory()
        self.version = self._library.version

    def size(self, data: bytes) -> tuple[int, int]:
        try:
            return self._library.read_header(data)
        except turbojpeg.Declined as why:
            raise NotForThis(str(why)) from None

    def pixels(self, data: bytes, view: View, *, size: tuple[int, int], parts: int, channels: int) -> tuple[U8, Box]:
        n = fraction(view, parts=parts)
        try:
            pixels, left, top = self._library.decode(data, box=scaled_box(view, fraction=n), fraction=n,
                                                     channels=channels, memory=self._memory.array)
        except turbojpeg.Declined as why:
            raise NotForThis(str(why)) from None
        return pixels, scaled_box(view, fraction=n, left=left, top=top)


class NvImageCodec:
    """NVIDIA's nvImageCodec, its libjpeg-turbo back end on the CPU: a region, at full size. No GPU is touched."""

    name = "nvimgcodec"

    def __init__(self) -> None:
        from nvidia import nvimgcodec

        self._codec, self._of_thread = nvimgcodec, threading.local()
        self.version = nvimgcodec.__version__

    def _decoder(self) -> Any:
        if not hasattr(self._of_thread, "decoder"):
            codec = self._codec
            self._of_thread.decoder = codec.Decoder(
                device_id=-99999, max_num_cpu_threads=1,  # NVIMGCODEC_DEVICE_CPU_ONLY
                backends=[codec.Backend(codec.BackendKind.CPU_ONLY)])
            self._of_thread.params = {
                1: codec.DecodeParams(apply_exif_orientation=False, color_spec=codec.ColorSpec.GRAY),
                3: codec.DecodeParams(apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB)}
        return self._of_thread.decoder

    def size(self, data: bytes) -> tuple[int, int]:
        try:
            stream = self._codec.CodeStream(data)
            if stream.num_channels not in (1, 3):
                raise NotForThis(f"{stream.num_channels} channels")
            return stream.width, stream.height
        except RuntimeError as why:
            raise NotForThis(str(why)) from None

    def pixels(self, data: bytes, view: View, *, size: tuple[int, int], parts: int, channels: int) -> tuple[U8, Box]:
        region = self._codec.Region(view.top, view.left, view.top + view.height, view.left + view.width)
        image = None
        try:
            stream = self._codec.CodeStream(data).get_sub_code_stream(region=region)
            image = self._decoder().decode(stream, params=self._of_thread.params[channels])
        except RuntimeError as why:
            raise NotForThis(str(why)) from None
        if image is None:
            raise NotForThis("can't be decoded")
        pixels: U8 = np.asarray(image)
        return pixels, (0, 0, view.width, view.height)


class SimpleJpeg:
    """libjpeg-turbo through simplejpeg: whole images, at a fraction."""

    name = "simplejpeg"
    version = simplejpeg.__version__

    def __init__(self, *, fast: bool) -> None:
        self._fast, self._memory = fast, Memory()

    def size(self, data: bytes) -> tuple[int, int]:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as why:
            raise NotForThis(str(why)) from None
        if colours in ("CMYK", "YCCK"):
            raise NotForThis(colours)
        return width, height

    def pixels(self, data: bytes, view: View, *, size: tuple[int, int], parts: int, channels: int) -> tuple[U8, Box]:
        width, height = size
        n = fraction(view, parts=parts)
        # the largest reduction that keeps these sizes is then n itself
        wanted = {"min_width": max(1, width // n), "min_height": max(1, height // n), "min_factor": n} if n > 1 else {}
        try:
            pixels = simplejpeg.decode_jpeg(
                data, "GRAY" if channels == 1 else "RGB", fastdct=self._fast, fastupsample=self._fast,
                buffer=self._memory.array(height, width, channels)[0].reshape(-1), **wanted)
        except ValueError as why:
            raise NotForThis(str(why)) from None
        return pixels, scaled_box(view, fraction=n)


class TorchCodec:
    """torchcodec: whole images at full size."""

    name = "torchcodec"

    def __init__(self) -> None:
        from torchcodec.decoders import decode_jpeg

        self._decode, self._sizes = decode_jpeg, SimpleJpeg(fast=False)
        self.version = importlib.metadata.version("torchcodec")

    def size(self, data: bytes) -> tuple[int, int]:
        return self._sizes.size(data)

    def pixels(self, data: bytes, view: View, *, size: tuple[int, int], parts: int, channels: int) -> tuple[U8, Box]:
        try:
            image = self._decode(data, mode="GRAY" if channels == 1 else "RGB")
        except RuntimeError as why:
            raise NotForThis(str(why)) from None
        assert not isinstance(image, list)  # that only for lists
        return image.permute(1, 2, 0).numpy(), scaled_box(view)
