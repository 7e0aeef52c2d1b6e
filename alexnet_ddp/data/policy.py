"""RandAugment and TrivialAugment Wide on whole uint8 batches, by torchvision's operations and tables.

Cubuk et al. 2019 (RandAugment) and Mueller and Hutter 2021 (TrivialAugment), as torchvision's classes of these names do
it with their defaults: 31 strengths, nearest neighbours, black where nothing is. Which operation, which strength and
which sign was drawn on the host (`randomness.Draws.policy`). The pixels are torchvision's to the bit on the CPU; what
its own functions would make the host wait for the GPU with (matrices of shears and rotations, the kernel of sharpness)
is made here without.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as theirs

from alexnet_ddp.data.randomness import BINS
from alexnet_ddp.sections import AugmentSection

# In the order of torchvision's tables: a draw is a place in it.
NAMES = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
         "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")
SIGNED = range(1, 10)
MOVING = range(1, 6)  # pixels are taken from elsewhere


def strengths(policy: str, *, size: int) -> NDArray[np.float64]:
    """Every operation's strength in each bin, without its sign: float64 [14, 31]. torchvision's tables, in its float32.

    Shares for shears and colours, pixels for translations, degrees for rotation, bits that stay for posterize, of the
    brightest value for solarize.
    """
    shear, move, turn, colour, bits = ((0.99, 32.0, 135.0, 0.99, 6) if policy == "trivial" else
                                       (0.3, 150.0 / 331.0 * size, 30.0, 0.9, 4))
    table = torch.zeros(len(NAMES), BINS)
    for number, most in enumerate((shear, shear, move, move, turn, colour, colour, colour, colour), 1):
        table[number] = torch.linspace(0.0, most, BINS)
    table[NAMES.index("Posterize")] = (8 - torch.arange(BINS) / ((BINS - 1) / bits)).round()
    table[NAMES.index("Solarize")] = torch.linspace(1.0, 0.0, BINS)
    return table.double().numpy()


class Policy:
    """Applies the drawn operations to batches of `size` x `size` images on a device; made once a run."""

    def __init__(self, section: AugmentSection, *, device: torch.device) -> None:
        self._device, self._size = device, section.size
        self._strengths = strengths(section.policy, size=section.size)
        self._bin = section.policy_magnitude if section.policy == "randaugment" else None
        self._grid = pixel_grid(section.size).to(device)

    def chosen(self, drawn: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Draws [..., 3] -> numbers of the operations and their signed strengths, [...] each."""
        number, strength, sign = np.moveaxis(drawn, -1, 0)
        if self._bin is not None:
            strength = np.full_like(strength, self._bin)
        found = self._strengths[number, strength]
        return number, np.where(np.isin(number, SIGNED), sign * found, found)

    def __call__(self, images: Tensor, drawn: NDArray[np.int64]) -> Tensor:
        """uint8 [n, s, s, c] and draws [n, ops, 3] -> uint8 [n, s, s, c]."""
        planes = images.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        numbers, signed = self.chosen(drawn)
        for turn in range(drawn.shape[1]):
            self._turn(planes, numbers[:, turn], signed[:, turn])
        return planes.permute(0, 2, 3, 1).contiguous()

    def _turn(self, planes: Tensor, numbers: NDArray[np.int64], signed: NDArray[np.float64]) -> None:
        """One operation on each image of [n, c, s, s], in place. Which images is known to the host: no sync."""
        moving = np.flatnonzero(np.isin(numbers, MOVING))
        if len(moving):
            rows = self._rows(moving)
            pairs = zip(numbers[moving].tolist(), signed[moving].tolist(), strict=True)
            thetas = torch.stack([_theta(NAMES[number], strength, self._size) for number, strength in pairs])
            planes.index_copy_(0, rows, self._move(planes.index_select(0, rows), thetas))
        groups: dict[tuple[int, float], list[int]] = {}
        for row, (number, strength) in enumerate(zip(numbers.tolist(), signed.tolist(), strict=True)):
            if number and number not in MOVING:
                groups.setdefault((number, strength), []).append(row)
        for (number, strength), members in groups.items():
            if NAMES[number] == "Contrast":  # a sum over the image, whose last bits may depend on the batch
                for row in members:
                    planes[row] = theirs.adjust_contrast(planes[row], contrast_factor=1.0 + strength)
                continue
            rows = self._rows(np.array(members))
            planes.index_copy_(0, rows, recolour(NAMES[number], planes.index_select(0, rows), strength))

    def _rows(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(rows).to(self._device, non_blocking=True)

    def _move(self, planes: Tensor, thetas: Tensor) -> Tensor:
        """Each image [c, s, s] of uint8 [n, c, s, s] through its own matrix [3, 2]: nearest neighbours, else black."""
        thetas = thetas.to(self._device, non_blocking=True)
        # One product an image: its bits then don't depend on how many images there are.
        grids = torch.cat([torch.bmm(self._grid, theta) for theta in thetas.split(1)])
        grids = grids.view(-1, self._size, self._size, 2)
        moved = F.grid_sample(planes.float(), grids, mode="nearest", padding_mode="zeros", align_corners=False)
        return moved.round_().to(torch.uint8)


def recolour(name: str, planes: Tensor, strength: float) -> Tensor:
    """An operation that moves no pixel, on uint8 [n, c, s, s], by torchvision's functions."""
    match name:
        case "Brightness":
            return theirs.adjust_brightness(planes, brightness_factor=1.0 + strength)
        case "Color":
            return theirs.adjust_saturation(planes, saturation_factor=1.0 + strength)
        case "Sharpness":
            return sharpen(planes, 1.0 + strength)
        case "Posterize":
            return theirs.posterize(planes, bits=int(strength))
        case "Solarize":
            return theirs.solarize(planes, threshold=255 * strength)
        case "AutoContrast":
            return theirs.autocontrast(planes)
        case "Equalize":
            return theirs.equalize(planes)
    raise AssertionError(name)


def sharpen(planes: Tensor, factor: float) -> Tensor:
    """torchvision's adjust_sharpness, with sums of whole numbers for its convolution.

    A blurred pixel is a thirteenth of a whole number, so never near half-way between two, and rounds the same.
    """
    shown = planes.float()
    inner = shown[..., 1:-1, 1:-1]
    rows = shown[..., :-2, :] + shown[..., 1:-1, :] + shown[..., 2:, :]
    blurred = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4.0 * inner).div_(13.0).round_()
    inner.add_(blurred.sub_(inner), alpha=1.0 - factor)
    return shown.clamp_(0, 255).to(torch.uint8)


def pixel_grid(size: int) -> Tensor:
    """Places of pixels from the image's centre, and a one: float32 [1, s * s, 3]."""
    steps = torch.linspace((1.0 - size) * 0.5, (size - 1.0) * 0.5, steps=size)
    down, across = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([across, down, torch.ones_like(across)], -1).view(1, size * size, 3)


@functools.lru_cache(maxsize=512)
def _theta(name: str, strength: float, size: int) -> Tensor:
    """Where an operation's pixels come from, for pixel_grid and grid_sample's coordinates -1..1: float32 [3, 2]."""
    corner = (-0.5 * size, -0.5 * size)  # from the centre
    match name:
        case "ShearX":
            matrix = inverse_affine(shear=(math.degrees(math.atan(strength)), 0.0), centre=corner)
        case "ShearY":
            matrix = inverse_affine(shear=(0.0, math.degrees(math.atan(strength))), centre=corner)
        case "TranslateX":
            matrix = inverse_affine(translate=(int(strength), 0))
        case "TranslateY":
            matrix = inverse_affine(translate=(0, int(strength)))
        case "Rotate":
            matrix = inverse_affine(angle=-(strength % 360))
        case _:
            raise AssertionError(name)
    return torch.tensor(matrix, dtype=torch.float32).view(2, 3).T / (0.5 * size)


def inverse_affine(*, angle: float = 0.0, shear: tuple[float, float] = (0.0, 0.0),
                   translate: tuple[float, float] = (0.0, 0.0), centre: tuple[float, float] = (0.0, 0.0)
                   ) -> list[float]:
    """The two rows of C R^-1 C^-1 T^-1: T translates, C brings 0 to the centre, R turns and shears (degrees).

    Computed in the order of torchvision's _get_inverse_affine_matrix, so that the rounding is the same.
    """
    turn, across, down = math.radians(angle), math.radians(shear[0]), math.radians(shear[1])
    a = math.cos(turn - down) / math.cos(down)
    b = -(a * math.tan(across) + math.sin(turn))
    c = math.sin(turn - down) / math.cos(down)
    d = math.cos(turn) - c * math.tan(across)
    x, y = centre[0] + translate[0], centre[1] + translate[1]
    return [d, -b, centre[0] - d * x + b * y, -c, a, centre[1] + c * x - a * y]
