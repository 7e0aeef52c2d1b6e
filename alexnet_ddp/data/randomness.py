"""Every random number of a run, as a pure function of what it is for.

A counter-based integer hash of (seed, epoch, sample id, purpose) gives each draw; nothing is ever consumed from a
stream, so a draw depends on no rank, thread, micro-batch or restart. All arithmetic is uint64 in NumPy, so the
numbers stay the same over versions of NumPy and torch, which the streams of their generators need not.

The mixing function is the 64-bit finaliser of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom
Number Generators, OOPSLA 2014, figure 16).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = NDArray[np.uint64]
F64 = NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: U64) -> U64:
    """splitmix64's finaliser: a bijection of the 64-bit integers whose every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key(*parts: ArrayLike | str) -> U64:
    """A 64-bit key of integers (arrays broadcast against each other) and words (purposes)."""
    folded = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            number = zlib.crc32(part.encode()) if isinstance(part, str) else part
            folded = mix((folded ^ np.asarray(number).astype(np.uint64)) + _GOLDEN)
    return folded


def uniform(keys: U64, count: int) -> F64:
    """`count` draws in [0, 1) for each key: float64 [..., count], multiples of 2**-53."""
    with np.errstate(over="ignore"):
        streams = keys[..., None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
    return (mix(streams) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(keys: U64, count: int) -> F64:
    """`count` standard normal draws for each key: float64 [..., count] (Box and Muller 1958, equation 1)."""
    draws = uniform(keys, 2 * count)
    radius = np.sqrt(-2.0 * np.log1p(-draws[..., :count]))
    return radius * np.cos(2.0 * np.pi * draws[..., count:])


# --- what is drawn for a batch ----------------------------------------------------------------------------------

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
CROP_DRAWS = 4 * CROP_TRIES
ERASING_TRIES = 10  # as torchvision's RandomErasing, whose ranges these are
ERASED_SHARE, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)  # of the area; height / width
OPERATIONS, BINS = 14, 31  # of torchvision's RandAugment and TrivialAugmentWide: operations, strengths of each


@dataclass(frozen=True)
class Draws:
    """All random numbers of n samples in one epoch, drawn on the host; each is a function of its sample alone."""

    crop: F64  # [n, at most CROP_DRAWS] in [0, 1): turned into a box once width and height are known
    flip: NDArray[np.bool_]  # [n]
    angle: NDArray[np.float32]  # [n] degrees, counter-clockwise
    jitter: NDArray[np.float32]  # [n, 4]: factors of brightness, contrast, saturation; shift of hue in turns
    jitter_order: NDArray[np.int64]  # [n, 4]: a permutation of the four operations per sample
    lighting: NDArray[np.float32]  # [n, 3]: standard normal times pca_lighting
    erased: NDArray[np.int64]  # [n, 4]: top, left, height, width of the box; all 0 where there is none
    policy: NDArray[np.int64]  # [n, policy_ops, 3]: number of the operation, bin of its strength, sign (1 or -1)

    def __getitem__(self, part: slice) -> Draws:
        return Draws(*(getattr(self, name)[part] for name in self.__dataclass_fields__))


def draw(samples: NDArray[np.int64], *, seed: int, epoch: int, flip: float, rotation: float,
         color_jitter: tuple[float, float, float, float], pca_lighting: float, crop: int = CROP_DRAWS,
         erasing: float = 0.0, size: int = 224, policy_ops: int = 0) -> Draws:
    """Draws of the samples (ids, int64 [n]) in one epoch; strengths as in the recipe's `augment` section.

    `crop`: how many draws the crop takes, the first so many of CROP_DRAWS. `size`: pixels a side, of which `erasing`
    takes a box. `policy_ops`: operations an image. What has no strength isn't drawn, and moves no other draw.
    """
    def purpose(name: str) -> U64:
        return key(seed, epoch, name, samples)

    n = len(samples)
    strengths = np.asarray(color_jitter, dtype=np.float64)
    # brightness, contrast, saturation: factor in [max(0, 1 - s), 1 + s], as torchvision's ColorJitter; hue within +- s
    low, high = np.append(np.maximum(0.0, 1.0 - strengths[:3]), -strengths[3]), strengths + [1.0, 1.0, 1.0, 0.0]
    factors, turns = np.tile(low, (n, 1)), np.tile(np.arange(4), (n, 1))
    if strengths.any():
        jitter = uniform(purpose("jitter"), 8)
        factors = low + jitter[:, :4] * (high - low)
        turns = np.argsort(jitter[:, 4:], axis=1, kind="stable")
    turned = uniform(purpose("rotation"), 1)[:, 0] if rotation else np.full(n, 0.5)
    return Draws(
        crop=uniform(purpose("crop"), crop),
        flip=uniform(purpose("flip"), 1)[:, 0] < flip,
        angle=((2.0 * turned - 1.0) * rotation).astype(np.float32),
        jitter=factors.astype(np.float32),
        jitter_order=turns,
        lighting=(normal(purpose("lighting"), 3) * pca_lighting).astype(np.float32) if pca_lighting else
        np.zeros((n, 3), np.float32),
        erased=erased_boxes(uniform(purpose("erasing"), 1 + 4 * ERASING_TRIES), erasing, size=size) if erasing else
        np.zeros((n, 4), np.int64),
        policy=_operations(uniform(purpose("policy"), 3 * policy_ops).reshape(n, policy_ops, 3)),
    )


def erased_boxes(draws: F64, probability: float, *, size: int) -> NDArray[np.int64]:
    """Draws [n, 1 + 4 * ERASING_TRIES] -> boxes int64 [n, 4] (top, left, height, width), 0 for images left whole.

    Algorithm 1 of Zhong et al. 2020 as torchvision's RandomErasing has it: the first try whose box is smaller than the
    image is taken, and where none is nothing is erased.
    """
    share, ratio, down, across = np.moveaxis(draws[:, 1:].reshape(len(draws), ERASING_TRIES, 4), 2, 0)
    area = size * size * (ERASED_SHARE[0] + share * (ERASED_SHARE[1] - ERASED_SHARE[0]))
    low, high = np.log(ERASED_RATIO)
    shape = np.exp(low + ratio * (high - low))
    height, width = np.rint(np.sqrt(area * shape)), np.rint(np.sqrt(area / shape))
    top, left = np.floor(down * (size - height + 1)), np.floor(across * (size - width + 1))
    fits = (height < size) & (width < size)
    boxes = np.stack([top, left, height, width], axis=2)[np.arange(len(draws)), fits.argmax(axis=1)]
    erased = (draws[:, 0] < probability) & fits.any(axis=1)
    return np.where(erased[:, None], boxes, 0).astype(np.int64)


def _operations(draws: F64) -> NDArray[np.int64]:
    """Draws [n, ops, 3] -> int64 [n, ops, 3], as Draws.policy: each operation, bin and sign equally likely."""
    return np.stack([np.floor(draws[..., 0] * OPERATIONS), np.floor(draws[..., 1] * BINS),
                     np.where(draws[..., 2] < 0.5, -1, 1)], axis=-1).astype(np.int64)


def dropout_rows(samples: NDArray[np.int64], *, seed: int, step: int) -> NDArray[np.int64]:
    """One 32-bit key a sample for the dropout masks of one step: int64 [n], 0 <= key < 2**32."""
    return (key(seed, step, "dropout", samples) >> np.uint64(32)).astype(np.int64)
