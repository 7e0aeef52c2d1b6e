"""libjpeg-turbo 3's own interface (TurboJPEG), by ctypes: decodes a region of a JPEG, at a fraction, without the GIL.

No Python package offers both. The shared library is looked for, in this order: where $ALEXNET_DDP_TURBOJPEG points,
in the package `turbojpeg` (the extra `region`), in this environment (conda's libjpeg-turbo), on the system. Older
libraries, without tj3SetCroppingRegion, are passed over.

The quick chroma upsampling (TJPARAM_FASTUPSAMPLE) is never asked for: after rows that were skipped within a block it
shows what lay in memory (seen with 2.1.92, in one of some hundred regions).

Functions and constants: turbojpeg.h of libjpeg-turbo 3.0, https://libjpeg-turbo.org/Documentation/Documentation
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import glob
import hashlib
import importlib.util
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]

DECOMPRESS = 1  # TJINIT_DECOMPRESS
SUBSAMPLING, WIDTH, HEIGHT, COLOURS = 4, 5, 6, 8  # TJPARAM_*
RGB, GREY = 0, 6  # TJPF_*
CMYK, YCCK = 3, 4  # TJCS_*
MCU_WIDTH = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}  # TJSAMP_* -> pixels
MARGIN = 2  # pixels beside a region whose colours take part in the upsampling of those in it


class Declined(Exception):
    """The library can't decode an image, or warns of it."""


class _Region(ctypes.Structure):
    _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_int), ("w", ctypes.c_int), ("h", ctypes.c_int)]


class _Factor(ctypes.Structure):
    _fields_ = [("num", ctypes.c_int), ("denom", ctypes.c_int)]


WHOLE = _Region(0, 0, 0, 0)  # TJUNCROPPED


@functools.cache
def find_library() -> str | None:
    """Path (or the loader's name) of a library with the TurboJPEG 3 interface, None where there is none."""
    for path in _candidates():
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(path).tj3SetCroppingRegion  # noqa: B018
            return path
    return None


def _candidates() -> Iterator[str]:
    if named := os.environ.get("ALEXNET_DDP_TURBOJPEG"):
        yield named
    with contextlib.suppress(ImportError, ValueError):
        package = importlib.util.find_spec("turbojpeg")
        if package is not None and package.origin:
            yield from sorted(glob.glob(os.path.join(os.path.dirname(package.origin), "turbojpeg.libs",
                                                     "libturbojpeg*")))
    yield from sorted(glob.glob(os.path.join(sys.prefix, "lib", "libturbojpeg.*")))
    if found := ctypes.util.find_library("turbojpeg"):
        yield found


class TurboJpegLibrary:
    """One decompressor a thread; safe from any number of threads."""

    def __init__(self) -> None:
        path = find_library()
        if path is None:
            raise _absent()
        self._of_thread = threading.local()
        # Only decoding itself lets other threads have the interpreter. The other calls take some microseconds or less,
        # and each that gave it up would wait for it behind the other decode threads.
        self._tj = tj = ctypes.PyDLL(path)
        self._decompress = ctypes.CDLL(path).tj3Decompress8
        handle, data, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
        tj.tj3Init.restype, tj.tj3Init.argtypes = handle, [ctypes.c_int]
        tj.tj3Destroy.restype, tj.tj3Destroy.argtypes = None, [handle]
        tj.tj3Get.argtypes = [handle, ctypes.c_int]
        tj.tj3DecompressHeader.argtypes = [handle, data, size]
        tj.tj3SetCroppingRegion.argtypes = [handle, _Region]
        tj.tj3SetScalingFactor.argtypes = [handle, _Factor]
        tj.tj3GetErrorStr.restype, tj.tj3GetErrorStr.argtypes = data, [handle]
        self._decompress.argtypes = [handle, data, size, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self.version = _fingerprint(path)

    def read_header(self, data: bytes) -> tuple[int, int]:
        """Width and height of a grey or YCbCr JPEG. Raises Declined."""
        owner = self._decompressor()
        tj, handle = self._tj, owner.number
        owner.of = None
        self._check(tj.tj3DecompressHeader(handle, data, len(data)), handle)
        if tj.tj3Get(handle, COLOURS) in (CMYK, YCCK):
            raise Declined("CMYK")
        owner.of, owner.width, owner.height = data, tj.tj3Get(handle, WIDTH), tj.tj3Get(handle, HEIGHT)
        return owner.width, owner.height

    def decode(self, data: bytes, *, box: tuple[float, float, float, float], fraction: int, channels: int,
               memory: Callable[[int, int, int], tuple[U8, int]]) -> tuple[U8, int, int]:
        """The part of a JPEG, decoded at 1 / fraction, that holds `box` (left, top, right, bottom in its pixels).

        `memory` gives an array [h, w, channels] to decode into, and its address. Returns the array, and the column and
        row of the decoded image that it begins with. The values are those of a decode of the whole image. Raises
        Declined.
        """
        owner = self._decompressor()
        if owner.of is not data:  # else this thread has just read its header
            self.read_header(data)
        tj, handle = self._tj, owner.number
        owner.of = None
        mcu_width = MCU_WIDTH.get(tj.tj3Get(handle, SUBSAMPLING), 0)
        if not mcu_width:
            raise Declined("unusual chroma subsampling")
        width, height = -(-owner.width // fraction), -(-owner.height // fraction)
        step = max(1, mcu_width // fraction)  # a region begins where a block of the JPEG does
        left = max(0, math.floor(box[0]) - MARGIN) // step * step
        top = max(0, math.floor(box[1]) - MARGIN)
        right = min(width, math.ceil(box[2]) + MARGIN)
        bottom = min(height, math.ceil(box[3]) + MARGIN)
        pixels, address = memory(bottom - top, right - left, channels)
        self._check(tj.tj3SetCroppingRegion(handle, WHOLE), handle)  # the last image's must not bind
        self._check(tj.tj3SetScalingFactor(handle, _Factor(1, fraction)), handle)
        if (left, top, right, bottom) != (0, 0, width, height):
            self._check(tj.tj3SetCroppingRegion(handle, _Region(left, top, right - left, bottom - top)), handle)
        self._check(self._decompress(handle, data, len(data), address, (right - left) * channels,
                                     RGB if channels == 3 else GREY), handle)
        return pixels, left, top

    def _decompressor(self) -> _Decompressor:
        owner: _Decompressor | None = getattr(self._of_thread, "owner", None)
        if owner is None:
            owner = self._of_thread.owner = _Decompressor(self._tj)
        return owner

    def _check(self, code: int, handle: int) -> None:
        if code:
            why = self._tj.tj3GetErrorStr(handle).decode(errors="replace")
            # some damaged headers leave a decompressor that declines every image after them
            del self._of_thread.owner
            raise Declined(why)


class _Decompressor:
    """One of the library's, destroyed with its thread, and the image whose header it has read last."""

    of: bytes | None = None
    width = height = 0

    def __init__(self, tj: ctypes.CDLL) -> None:
        self._tj = tj
        self.number: int = tj.tj3Init(DECOMPRESS)
        if not self.number:
            raise MemoryError("libturbojpeg can't make a decompressor")

    def __del__(self) -> None:
        self._tj.tj3Destroy(self.number)


def _fingerprint(path: str) -> str:
    """The interface tells no version, so the file's own bytes do: 12 hex digits of its sha256."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:12]
    except OSError:  # a bare name, which the system's loader finds
        return path


def _absent() -> Exception:
    from alexnet_ddp.errors import UserError

    return UserError("data.decoder=turbojpeg needs libjpeg-turbo 3 or newer, which isn't here. Install it (pip "
                     "install 'alexnet-ddp[region]', or conda's libjpeg-turbo), name the file in "
                     "$ALEXNET_DDP_TURBOJPEG, or use data.decoder=auto in a new run.")
