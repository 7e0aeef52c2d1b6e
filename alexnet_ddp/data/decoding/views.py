"""Which part of an image is shown, and how large: pure functions of its size and of draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexnet_ddp.data.randomness import CROP_TRIES


class View(NamedTuple):  # one is made for every image that is shown: a dataclass takes 10 us more
    """The part of an upright image that is shown: a box, resized, and a square cut out of that. All in pixels."""

    left: int
    top: int
    width: int
    height: int
    resized_width: int
    resized_height: int
    x: int
    y: int

    @property
    def only_cut(self) -> bool:
        """Whether pixels are shown as they are, at their own size."""
        return (self.width, self.height) == (self.resized_width, self.resized_height)


ChooseView = Callable[[int, int], View]  # (width, height) of the upright image -> what to show of it
Views = NDArray[np.int32]  # [n, 8], rows as View


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


def random_resized_all(width: int, height: int, *, size: int, draws: NDArray[np.float64],
                       scale: tuple[float, float], ratio: tuple[float, float]) -> Views:
    """`random_resized` for n images of one size: draws [n, CROP_DRAWS] -> int32 [n, 8], the same numbers."""
    views = np.tile(np.array([0, 0, 0, 0, size, size, 0, 0], np.int32), (len(draws), 1))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    left = np.arange(len(draws))  # those whose tries have not fitted yet
    for number in range(CROP_TRIES):
        a, r, u, v = draws[left, 4 * number:4 * number + 4].T
        area = width * height * (scale[0] + a * (scale[1] - scale[0]))
        aspect = np.array([math.exp(low + draw * (high - low)) for draw in r.tolist()])  # NumPy's may round otherwise
        w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        views[left[fits], :4] = np.stack([u * (width - w + 1), v * (height - h + 1), w, h], -1)[fits].astype(np.int32)
        left = left[~fits]
        if not len(left):
            break
    for row in left.tolist():
        views[row] = random_resized(width, height, size=size, draws=draws[row], scale=scale, ratio=ratio)
    return views


def random_crop_all(width: int, height: int, *, size: int, draws: NDArray[np.float64]) -> Views:
    """`random_crop` for n images of one size: draws [n, at least 2] -> int32 [n, 8], the same numbers."""
    w, h = short_side(width, height, short=short_for(size))
    views = np.tile(np.array([0, 0, width, height, w, h, 0, 0], np.int32), (len(draws), 1))
    views[:, 6:] = (draws[:, :2] * [w - size + 1, h - size + 1]).astype(np.int32)
    return views


def short_side(width: int, height: int, *, short: int) -> tuple[int, int]:
    """Width and height once the shorter one is `short`, rounded down as torchvision's Resize does."""
    if width <= height:
        return short, max(short, int(short * height / width))
    return max(short, int(short * width / height)), short


def short_for(size: int) -> int:
    """The short side that crops of `size` are cut from: size / 0.875, as the 2012 paper has it (256 for 224)."""
    return max(size, round(size / 0.875))


def random_crop(width: int, height: int, *, size: int, draws: NDArray[np.float64]) -> View:
    """A square of `size` from anywhere in the image at short side size / 0.875 (256 for 224: the 2012 paper)."""
    w, h = short_side(width, height, short=short_for(size))
    u, v = draws[:2].tolist()
    return View(0, 0, width, height, w, h, int(u * (w - size + 1)), int(v * (h - size + 1)))


def center(width: int, height: int, *, size: int, short: int | None = None) -> View:
    """The central square of `size` at that short side, else at size / 0.875 (for 224 at 256, as the 2012 paper)."""
    w, h = short_side(width, height, short=short_for(size) if short is None else short)
    return View(0, 0, width, height, w, h, round((w - size) / 2), round((h - size) / 2))


def squash(width: int, height: int, *, size: int) -> View:
    """The whole image, squashed to a square."""
    return View(0, 0, width, height, size, size, 0, 0)
