"""The device's share of raw records: crops and resizes whole uint8 batches to what their views show.

A host only copies raw records; cropping horizontally, resizing and colours are the device's, with the same code
whether records come from a file, from the host's memory or lie on the device. So no cache can change a pixel.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L" and JPEG's luminance
PIECE = 256  # images resized at once: bounds the memory for what lies between the two passes to some 180 MB

LEFT, TOP, WIDTH, HEIGHT, RESIZED_WIDTH, RESIZED_HEIGHT, X, Y = range(8)  # of a View


def only_cut(views: NDArray[np.int32]) -> bool:
    """Whether all of [n, 8] views show pixels as they are, at their own size."""
    return bool((views[:, WIDTH:RESIZED_WIDTH] == views[:, RESIZED_WIDTH:X]).all())


def show(records: Tensor, views: NDArray[np.int32], *, size: int, channels: int) -> Tensor:
    """uint8 [n, h, w, 3] and views [n, 8] -> uint8 [n, size, size, channels], on the records' device.

    Records with fewer rows than columns are strips that begin with their view's first row. Resizing is antialiased
    bilinear, as `resize: antialias` (Pillow's BILINEAR within 1/255).
    """
    if not len(records):
        return records.new_empty((0, size, size, channels))
    if only_cut(views):
        shown = _cut(records, views, size=size)
    else:
        pieces = [_resize(records[at:at + PIECE], views[at:at + PIECE], size=size)
                  for at in range(0, len(records), PIECE)]
        shown = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if channels == 1:
        red, green, blue = shown.float().unbind(-1)  # a tensor of weights would make the host wait
        grey = red * GREY[0] + green * GREY[1] + blue * GREY[2]
        shown = grey.round_().clamp_(0, 255).to(torch.uint8).unsqueeze(-1)
    return shown


def _cut(records: Tensor, views: NDArray[np.int32], *, size: int) -> Tensor:
    is_strip = records.shape[1] < records.shape[2]
    first = _numbers(views[:, TOP] + views[:, Y], records) * (0 if is_strip else 1)
    left = _numbers(views[:, LEFT] + views[:, X], records)
    steps = torch.arange(size, device=records.device)
    rows, columns = first[:, None] + steps, left[:, None] + steps
    images = torch.arange(len(records), device=records.device)
    return records[images[:, None, None], rows[:, :, None], columns[:, None, :]]


def _resize(records: Tensor, views: NDArray[np.int32], *, size: int) -> Tensor:
    """Two passes of weighted sums, rows first: batched matrix products, exact in fp32 but for its rounding."""
    n, height, width, colours = records.shape
    down = _weights(views[:, TOP], views[:, HEIGHT], views[:, RESIZED_HEIGHT], views[:, Y], of=height, size=size,
                    like=records)
    across = _weights(views[:, LEFT], views[:, WIDTH], views[:, RESIZED_WIDTH], views[:, X], of=width, size=size,
                      like=records)
    squeezed = torch.bmm(down, records.reshape(n, height, width * colours).float())  # [n, size, width * colours]
    sideways = squeezed.view(n, size, width, colours).transpose(1, 2).reshape(n, width, size * colours)
    shown = torch.bmm(across, sideways).view(n, size, size, colours).transpose(1, 2)  # columns were first
    return shown.round_().clamp_(0, 255).to(torch.uint8).contiguous()


def _weights(start: NDArray[np.int32], length: NDArray[np.int32], resized: NDArray[np.int32],
             cut: NDArray[np.int32], *, of: int, size: int, like: Tensor) -> Tensor:
    """float32 [n, size, of]: how much of each of `of` pixels is in each of the `size` that are shown.

    A triangle about the point that is shown, as wide as the reduction and at least one pixel each way, over the box
    [start, start + length) alone, normalised (Pillow's BILINEAR).
    """
    begin, box, grown, offset = (_numbers(values, like).double()[:, None, None]
                                 for values in (start, length, resized, cut))
    step = box / grown
    support = step.clamp(min=1.0)
    shown = torch.arange(size, device=like.device, dtype=torch.float64)[:, None]
    pixel = torch.arange(of, device=like.device, dtype=torch.float64)
    centre = (shown + offset + 0.5) * step + begin
    weights = (1.0 - (pixel + 0.5 - centre).abs() / support).clamp_(min=0.0)
    weights *= (pixel >= begin) & (pixel < begin + box)
    return (weights / weights.sum(-1, keepdim=True)).float()


def _numbers(values: NDArray[np.int32], like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(like.device, non_blocking=True)
