"""The device's share of augmentation, on whole uint8 batches, in this order:

    flip -> policy (RandAugment, TrivialAugment) -> rotation -> colour jitter -> lighting -> normalise -> erasing

(and after it mixup or CutMix, in `mixing`). Parameters were drawn on the host (`randomness.Draws`); nothing here draws.
Formulas are torchvision's (RandomHorizontalFlip, RandomRotation with nearest neighbours and black corners, ColorJitter,
RandomErasing), from the rotation on in float32 without rounding to uint8 in between; lighting is Krizhevsky et al.
2012, section 4.1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ddp.data.randomness import Draws
from alexnet_ddp.sections import AugmentSection

if TYPE_CHECKING:
    from alexnet_ddp.data.policy import Policy

GREY = (0.2989, 0.587, 0.114)  # torchvision's weights (ITU-R BT.601)
# Eigenvectors (columns) and eigenvalues of ImageNet's RGB covariance, values 0..1, as published with fb.resnet.torch
# and used by every peer since; `data stats` gives those of other data, for augment.pca_eigenvalues and _eigenvectors.
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_EIGENVALUES = (0.2175, 0.0188, 0.0045)


class Augment:
    """Turns uint8 batches on a device into what the net sees; made once a run."""

    def __init__(self, section: AugmentSection, *, channels: int, device: torch.device) -> None:
        self._section, self._device = section, device
        mean, std = np.asarray(section.mean), np.asarray(section.std)
        values = PCA_EIGENVALUES if section.pca_eigenvalues is None else section.pca_eigenvalues
        vectors = PCA_VECTORS if section.pca_eigenvectors is None else np.transpose(section.pca_eigenvectors)
        colours = np.asarray(vectors) * np.asarray(values)  # [channel, component]
        if channels == 1:  # grey nets see the luminance
            mean, std, colours = (np.asarray([GREY]) @ values for values in (mean, std, colours))
        self._scale = self._tensor(1.0 / std).view(1, -1, 1, 1)
        self._bias = self._tensor(-mean / std).view(1, -1, 1, 1)
        self._colours = self._tensor(colours)
        self._policy: Policy | None = None
        if section.policy != "none":
            from alexnet_ddp.data.policy import Policy  # torchvision takes a while to import

            self._policy = Policy(section, device=device)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self._device, non_blocking=True)

    def __call__(self, images: Tensor, draws: Draws | None) -> Tensor:
        """uint8 [n, s, s, c] on the device -> normalised float32 [n, c, s, s], channels last in memory.

        `draws` is None for evaluation: normalised only.
        """
        section = self._section
        drawn = draws if draws is not None and len(images) else None
        if drawn is not None:
            if section.flip > 0:
                mirrored = torch.from_numpy(drawn.flip).to(self._device, non_blocking=True)
                images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(2), images)
            if self._policy is not None:
                images = self._policy(images, drawn.policy)
        pixels = images.permute(0, 3, 1, 2).to(torch.float32).div_(255.0)
        if drawn is not None:
            if section.rotation > 0:
                pixels = rotate(pixels, self._tensor(drawn.angle))
            if any(section.color_jitter):
                pixels = self._jitter(pixels, drawn)
            if section.pca_lighting > 0:
                # per image: the sum over i of p_i * a_i * lambda_i, added to its RGB values 0..1
                added = self._tensor(drawn.lighting) @ self._colours.T
                pixels = pixels + added[:, :, None, None]
        pixels = torch.addcmul(self._bias, pixels, self._scale)
        if drawn is not None and section.erasing > 0:
            pixels.masked_fill_(self._erased(drawn), 0.0)
        return pixels

    def _erased(self, draws: Draws) -> Tensor:
        """Which pixels lie in their image's box: bool [n, 1, s, s]."""
        boxes = torch.from_numpy(draws.erased).to(self._device, non_blocking=True)[..., None]
        steps = torch.arange(self._section.size, device=self._device)
        down, across = ((steps >= boxes[:, side]) & (steps < boxes[:, side] + boxes[:, side + 2]) for side in (0, 1))
        return (down[:, :, None] & across[:, None, :]).unsqueeze(1)

    def _jitter(self, pixels: Tensor, draws: Draws) -> Tensor:
        operations = (brightness, contrast, saturation, hue)
        factors = self._tensor(draws.jitter)
        pixels = pixels.clone()
        for turn in range(4):
            for number, operation in enumerate(operations):
                if self._section.color_jitter[number] == 0:
                    continue
                rows = np.flatnonzero(draws.jitter_order[:, turn] == number)  # known to the host: no sync
                if len(rows):
                    chosen = torch.from_numpy(rows).to(self._device, non_blocking=True)
                    changed = operation(pixels[chosen], factors[chosen, number].view(-1, 1, 1, 1))
                    pixels.index_copy_(0, chosen, changed)
        return pixels


def rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """Each image of [n, c, s, s] turned counter-clockwise about its centre by its own angle [n]."""
    angle = degrees * (math.pi / 180.0)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return (pixels * factor).clamp_(0.0, 1.0)


def _grey(pixels: Tensor) -> Tensor:
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue).unsqueeze(1)


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(pixels).mean(dim=(1, 2, 3), keepdim=True)
    return (factor * pixels + (1.0 - factor) * mean).clamp_(0.0, 1.0)


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    if pixels.shape[1] == 1:
        return pixels
    return (factor * pixels + (1.0 - factor) * _grey(pixels)).clamp_(0.0, 1.0)


def hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Turns the colour circle by `shift` (in turns, -0.5 .. 0.5), through HSV (Smith 1978)."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.unbind(1)
    value, low = pixels.amax(1), pixels.amin(1)
    spread = value - low
    grey = spread == 0
    divisor = torch.where(grey, 1.0, spread)
    rc, gc, bc = (value - red) / divisor, (value - green) / divisor, (value - blue) / divisor
    turn = torch.where(value == red, bc - gc, torch.where(value == green, 2.0 + rc - bc, 4.0 + gc - rc))
    turn = torch.remainder(turn / 6.0 + 1.0 + shift.view(-1, 1, 1), 1.0)
    chroma = torch.where(grey, 0.0, spread / torch.where(grey, 1.0, value))  # HSV's saturation
    channels = []
    for start in (5.0, 3.0, 1.0):  # red, green, blue: value * (1 - saturation * max(0, min(k, 4 - k, 1)))
        k = torch.remainder(start + 6.0 * turn, 6.0)
        channels.append(value * (1.0 - chroma * torch.minimum(k, 4.0 - k).clamp_(0.0, 1.0)))
    return torch.stack(channels, 1).clamp_(0.0, 1.0)

