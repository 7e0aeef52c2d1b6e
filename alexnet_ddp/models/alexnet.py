"""AlexNet: one reusable block, and the nets built from it.

Both nets are [batch, in_channels, size, size] -> logits [batch, num_classes], work on a batch of no samples
(its gradients are zeros) and under `torch.use_deterministic_algorithms`. Their dropout is `KeyedDropout`.
"""

import itertools
from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from alexnet_ddp.errors import UserError
from alexnet_ddp.models.dropout import KeyedDropout
from alexnet_ddp.models.lrn import LocalResponseNorm

BLOCKS = (1, 2, 3, 4, 5)
BLOCK_NAMES = tuple(f"block{number}" for number in BLOCKS)
POOL_AFTER = (1, 2, 5)


class ConvBlock(nn.Sequential):
    """Convolution, ReLU and, where asked for, local response normalisation and an overlapping 3/2 max
    pool."""

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int,
        lrn: bool = False,
        pool: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        self.relu = nn.ReLU(inplace=True)
        if lrn:
            self.lrn = LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)
        if pool:
            self.pool = nn.MaxPool2d(kernel_size=3, stride=2)


class AlexNetSingle(nn.Module):
    """The single-column AlexNet of the tutorials: the paper's layer sizes without its split over two GPUs.

    62,378,344 parameters at the defaults. The first padding is 2, and 0 for an image of 227 pixels: both
    give 55x55. Initialised after He et al. (2015). `lrn_after` names the blocks (1 to 5) that end in local
    response normalisation. Raises UserError for an image too small for the pools, and in `forward` for one
    whose features don't fit the first fully connected layer.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        width: float = 1.0,
        dropout: float = 0.5,
        image_size: int = 224,
        lrn_after: Collection[int] = (1, 2),
    ) -> None:
        super().__init__()
        if not set(lrn_after) <= set(BLOCKS):
            raise UserError(f"lrn_after names blocks of the net, 1 to 5; got {list(lrn_after)}")
        self.image_size = image_size
        self.first_padding = 0 if image_size == 227 else 2
        self.feature_size = require_features(image_size, first_padding=self.first_padding)
        channels = scaled((96, 256, 384, 384, 256), width)
        blocks = conv_blocks(in_channels, channels, first_padding=self.first_padding, lrn_after=lrn_after)
        self.features = nn.Sequential(OrderedDict(zip(BLOCK_NAMES, blocks, strict=True)))
        inputs = channels[-1] * self.feature_size**2
        self.classifier = classifier(inputs, scaled((4096, 4096), width), num_classes, dropout)
        initialise_for_relu(self)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        found = {feature_size(side, first_padding=self.first_padding) for side in (height, width)}
        if found != {self.feature_size}:
            raise UserError(
                f"this alexnet_single takes images of {self.image_size} pixels; got {height}x{width}.\n"
                "Resize the images, or create the model with their image_size."
            )
        return self.classifier(torch.flatten(self.features(x), 1))


class AlexNetTorchvision(nn.Module):
    """torchvision's AlexNet ("One weird trick", Krizhevsky 2014, one column): its state dict loads unchanged.

    61,100,840 parameters at the defaults, initialised as torchvision's are. Takes images of any size of at
    least 63 pixels: the features are averaged to 6x6 where they aren't (at 224 they are). Raises UserError
    for smaller ones.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        width: float = 1.0,
        dropout: float = 0.5,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        require_features(image_size, first_padding=2)
        channels = scaled((64, 192, 384, 256, 256), width)
        blocks = conv_blocks(in_channels, channels, first_padding=2)
        self.features = nn.Sequential(*itertools.chain.from_iterable(blocks))  # flat, as torchvision has it
        self.avgpool = AdaptiveAverage(6)
        self.classifier = classifier(channels[-1] * 6 * 6, scaled((4096, 4096), width), num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        require_features(min(x.shape[-2:]), first_padding=2)
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


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


def conv_blocks(
    in_channels: int, channels: Sequence[int], *, first_padding: int, lrn_after: Collection[int] = ()
) -> list[ConvBlock]:
    """The five blocks: kernels 11, 5, 3, 3, 3; stride 4 in the first; max pools after 1, 2 and 5."""
    kernels, strides, paddings = (11, 5, 3, 3, 3), (4, 1, 1, 1, 1), (first_padding, 2, 1, 1, 1)
    inputs = (in_channels, *channels[:-1])
    return [
        ConvBlock(
            inputs[i],
            out_channels=channels[i],
            kernel_size=kernels[i],
            stride=strides[i],
            padding=paddings[i],
            lrn=number in lrn_after,
            pool=number in POOL_AFTER,
        )
        for i, number in enumerate(BLOCKS)
    ]


def classifier(inputs: int, hidden: Sequence[int], num_classes: int, dropout: float) -> nn.Sequential:
    """Dropout before, and ReLU after, each of the two hidden layers; the logits last."""
    first, second = hidden
    return nn.Sequential(
        KeyedDropout(dropout, layer=0),
        nn.Linear(inputs, first),
        nn.ReLU(inplace=True),
        KeyedDropout(dropout, layer=1),
        nn.Linear(first, second),
        nn.ReLU(inplace=True),
        nn.Linear(second, num_classes),
    )


def initialise_for_relu(model: nn.Module) -> None:
    """He et al. (2015): weights of variance 2 / inputs and zero biases in every layer that a ReLU follows.

    It keeps the signal's size through the net. torch's default makes the variance some six times smaller in
    every layer, and the loss then stays at ln(classes) for hundreds of steps. The last layer keeps torch's
    default: small first logits.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.ReLU)]
    for layer, following in itertools.pairwise(layers):
        if isinstance(layer, nn.Conv2d | nn.Linear) and isinstance(following, nn.ReLU):
            assert layer.bias is not None
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)


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
