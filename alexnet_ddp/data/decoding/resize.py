"""Pixels of a view into a batch slot: cropped, resized and cut, by well-kept kernels, without a copy in between.

    antialias   bilinear with a support that grows with the reduction: torch's uint8 kernel, within 1/255 of Pillow's
                BILINEAR in every value (torchvision's v2 uses the same). What the reference recipes do.
    fast        bilinear between the four nearest pixels only: OpenCV's kernel. Reductions alias.

torchvision's order, everywhere: first the box is cropped, then it alone is resized, so nothing outside it is seen.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alexnet_ddp.data.decoding.views import View

if TYPE_CHECKING:
    import torch  # else imported at the first resize: packing and verifying do without its two seconds

U8 = NDArray[np.uint8]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of what was decoded
Quality = Literal["antialias", "fast"]

cv2.setNumThreads(0)  # the threads are the loader's


def version(quality: Quality) -> str:
    """Whose kernel it is, for fingerprints."""
    return f"opencv{cv2.__version__}" if quality == "fast" else f"torch{importlib.metadata.version('torch')}"


def place(pixels: U8, box: Box, view: View, out: U8, *, quality: Quality) -> None:
    """The view's square into `out` (uint8 [size, size, c]).

    `pixels` (uint8 [h, w, c]) holds at least the view's box, which lies at `box` in it; edges between pixels occur
    where an image was decoded at a fraction of its size.
    """
    left, top, right, bottom = (int(edge) for edge in box)
    size = out.shape[0]
    if (left, top, right, bottom) == box:
        shown = pixels[top:bottom, left:right]
        if (right - left, bottom - top) == (view.resized_width, view.resized_height):
            out[...] = shown[view.y:view.y + size, view.x:view.x + size]
        elif (view.resized_width, view.resized_height) == (size, size):
            _resize(shown, out, quality)
        else:
            whole = np.empty((view.resized_height, view.resized_width, out.shape[2]), np.uint8)
            _resize(shown, whole, quality)
            out[...] = whole[view.y:view.y + size, view.x:view.x + size]
        return
    if quality == "fast" and (view.resized_width, view.resized_height) == (size, size):
        _warp(pixels, box, out)
        return
    whole = _resize_between(pixels, box, view, quality)
    out[...] = whole.reshape(*whole.shape[:2], -1)[view.y:view.y + size, view.x:view.x + size]


def _resize(pixels: U8, out: U8, quality: Quality) -> None:
    """All of `pixels` into all of `out`."""
    if quality == "fast":
        cv2.resize(pixels, (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_LINEAR)
        return
    import torch

    # interpolate(antialias=True) calls the same kernel, but into memory of its own: three times the time.
    torch.ops.aten._upsample_bilinear2d_aa.out(_planes(pixels), list(out.shape[:2]), False, out=_planes(out))


def _planes(pixels: U8) -> torch.Tensor:
    """[h, w, c] in memory as the [1, c, h, w] that torch wants, channels last."""
    import torch

    # By NumPy: torch's own views give up the interpreter's lock, and wait for it behind the other decode threads.
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None])


def _resize_between(pixels: U8, box: Box, view: View, quality: Quality) -> U8:
    """A box whose edges lie between pixels, resized to the view's size."""
    size = view.resized_width, view.resized_height
    if quality == "fast":
        whole = np.empty((size[1], size[0], pixels.shape[2]), np.uint8)
        _warp(pixels, box, whole)
        return whole
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))


def _warp(pixels: U8, box: Box, out: U8) -> None:
    """A box whose edges lie between pixels into all of `out`, bilinear between the four nearest pixels."""
    height, width = out.shape[:2]
    across, down = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    # pixel i of the result shows the point box + (i + 1/2) * step - 1/2
    matrix = np.array([[across, 0, box[0] + across / 2 - 0.5], [0, down, box[1] + down / 2 - 0.5]])
    cv2.warpAffine(pixels, matrix, (width, height), dst=out, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                   borderMode=cv2.BORDER_REPLICATE)
