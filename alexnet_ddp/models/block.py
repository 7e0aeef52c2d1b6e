"""What the AlexNets are built of: the convolutional block, the fully connected layers, and the sizes between them."""

import itertools
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from alexnet_ddp.errors import UserError
from alexnet_ddp.models.dropout import KeyedDropout
from alexnet_ddp.models.lrn import Definition, LocalResponseNorm

BLOCKS = (1, 2, 3, 4, 5)
BLOCK_NAMES = tuple(f"block{number}" for number in BLOCKS)
POOL_AFTER = (1, 2, 5)


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation where asked for, ReLU and, where asked for, local response normalisation
    and an overlapping 3/2 max pool.

    Before a batch normalisation the convolution has no bias: it would be subtracted with the mean. `groups`: of the
    convolution. `lrn_groups`: see `local_response_norm`.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int,
        groups: int = 1,
        batch_norm: bool = False,
        lrn: Definition | None = None,
        lrn_groups: int = 1,
        pool: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            groups=groups,
            bias=not batch_norm,
        )
        if batch_norm:
            self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        if lrn is not None:
            self.lrn = LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0, definition=lrn, groups=lrn_groups)
        if pool:
            self.pool = nn.MaxPool2d(kernel_size=3, stride=2)


def conv_blocks(
    in_channels: int,
    channels: Sequence[int],
    *,
    first_padding: int,
    batch_norm: bool = False,
    lrn_after: Collection[int] = (),
    lrn: Definition = "torch",
    towers: int = 1,
) -> list[ConvBlock]:
    """The five blocks: kernels 11, 5, 3, 3, 3; stride 4 in the first; max pools after 1, 2 and 5.

    towers: into how many equal parts the channels are divided that see each other in block 3 alone (and block 1 sees
    the whole image): blocks 2, 4 and 5 and every local response normalisation stay within a tower.
    """
    kernels, strides, paddings = (11, 5, 3, 3, 3), (4, 1, 1, 1, 1), (first_padding, 2, 1, 1, 1)
    inputs = (in_channels, *channels[:-1])
    return [
        ConvBlock(
            inputs[i],
            out_channels=channels[i],
            kernel_size=kernels[i],
            stride=strides[i],
            padding=paddings[i],
            groups=towers if number in (2, 4, 5) else 1,
            batch_norm=batch_norm,
            lrn=lrn if number in lrn_after else None,
            lrn_groups=towers,
            pool=number in POOL_AFTER,
        )
        for i, number in enumerate(BLOCKS)
    ]


def classifier(
    inputs: int,
    hidden: Sequence[int],
    num_classes: int,
    dropout: float,
    *,
    dropped: Literal["inputs", "outputs"] = "inputs",
) -> nn.Sequential:
    """Two hidden layers with ReLU and the logits; dropout on the hidden layers' inputs or on their outputs."""
    first, second = hidden
    layers: list[nn.Module] = []
    for layer, (before, after) in enumerate([(inputs, first), (first, second)]):
        mask, linear = KeyedDropout(dropout, layer=layer), [nn.Linear(before, after), nn.ReLU(inplace=True)]
        layers += [mask, *linear] if dropped == "inputs" else [*linear, mask]
    return nn.Sequential(*layers, nn.Linear(second, num_classes))


class AdaptiveAverage(nn.Module):
    """`nn.AdaptiveAvgPool2d(size)` with a deterministic backward: means of slices, rows first, then columns.

    [batch, channels, height, width] -> [batch, channels, size, size]; nothing at all where that is the shape
    already. Computed in float32 (float64 for float64), also under autocast; returns the input's dtype.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.size, self.size):
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.average(self.average(wide, dim=-2), dim=-1).to(x.dtype)

    def average(self, x: Tensor, *, dim: int) -> Tensor:
        """Window i runs from floor(i * inputs / size) up to ceil((i + 1) * inputs / size), as torch's."""
        inputs = x.shape[dim]
        starts = [i * inputs // self.size for i in range(self.size)]
        stops = [-(-(i + 1) * inputs // self.size) for i in range(self.size)]
        means = [x.narrow(dim, a, b - a).mean(dim) for a, b in zip(starts, stops, strict=True)]
        return torch.stack(means, dim)

    def extra_repr(self) -> str:
        return f"{self.size}"


def scaled(counts: Sequence[int], width: float) -> list[int]:
    """Each count times width, to the nearest multiple of 8 and at least 8."""
    return [max(8, int(count * width / 8 + 0.5) * 8) for count in counts]


def feature_size(image_size: int, *, first_padding: int) -> int:
    """Side of the last block's output for an image of this side, in pixels; below 1 the image is too
    small."""
    size = (image_size + 2 * first_padding - 11) // 4 + 1
    for _ in POOL_AFTER:
        size = (size - 3) // 2 + 1
    return size


def require_features(image_size: int, *, first_padding: int) -> int:
    """`feature_size`, refusing images that leave nothing after the last pool."""
    size = feature_size(image_size, first_padding=first_padding)
    if size < 1:
        smallest = next(s for s in itertools.count(1) if feature_size(s, first_padding=first_padding) > 0)
        raise UserError(
            f"AlexNet needs images of at least {smallest} pixels, or its pools leave nothing; "
            f"got {image_size}.\nUse image_size={smallest} or more, in a recipe augment.size (224 is the usual)."
        )
    return size
