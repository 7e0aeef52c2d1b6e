"""The four AlexNets, each built from one reusable block.

All are [batch, in_channels, size, size] -> logits [batch, num_classes], work on a batch of no samples (its
gradients are zeros) and under `torch.use_deterministic_algorithms`. Their dropout is `KeyedDropout`.
"""

import itertools
from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from alexnet_ddp.errors import UserError
from alexnet_ddp.models.block import (
    BLOCK_NAMES,
    BLOCKS,
    AdaptiveAverage,
    ConvBlock,
    classifier,
    conv_blocks,
    feature_size,
    require_features,
    scaled,
)
from alexnet_ddp.models.initialisation import initialise_as_the_paper, initialise_for_relu

CHANNELS = (96, 256, 384, 384, 256)  # of the paper's five convolutions
HIDDEN = (4096, 4096)


class _AlexNet(nn.Module):
    """Five named blocks with the paper's channels, flattened, and three fully connected layers.

    The first padding is 2, and 0 for an image of 227 pixels: both give 55x55. Raises UserError for an image too
    small for the pools, and in `forward` for one whose features don't fit the first fully connected layer.
    """

    name: str
    features: nn.Sequential
    classifier: nn.Sequential

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.first_padding = 0 if image_size == 227 else 2
        self.feature_size = require_features(image_size, first_padding=self.first_padding)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        found = {feature_size(side, first_padding=self.first_padding) for side in (height, width)}
        if found != {self.feature_size}:
            raise UserError(
                f"this {self.name} takes images of {self.image_size} pixels; got {height}x{width}.\n"
                "Resize the images, or create the model with their image_size."
            )
        return self.classifier(torch.flatten(self.features(x), 1))


class AlexNetSingle(_AlexNet):
    """The single-column AlexNet of the tutorials: the paper's layer sizes without its split over two GPUs.

    62,378,344 parameters at the defaults. Initialised after He et al. (2015). `lrn_after` names the blocks (1 to 5)
    that end in local response normalisation, torch's. Raises UserError as `_AlexNet`.
    """

    name = "alexnet_single"

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
        if not set(lrn_after) <= set(BLOCKS):
            raise UserError(f"lrn_after names blocks of the net, 1 to 5; got {list(lrn_after)}")
        super().__init__(image_size)
        channels = scaled(CHANNELS, width)
        blocks = conv_blocks(in_channels, channels, first_padding=self.first_padding, lrn_after=lrn_after)
        self.features = _named(blocks)
        inputs = channels[-1] * self.feature_size**2
        self.classifier = classifier(inputs, scaled(HIDDEN, width), num_classes, dropout)
        initialise_for_relu(self)


class AlexNetPaper(_AlexNet):
    """The net of Krizhevsky et al. (2012): two towers that see each other in block 3 and in the classifier alone.

    60,965,224 parameters at the defaults. After the ReLU of blocks 1 and 2 local response normalisation by the paper's
    formula, over the channels of its own tower; dropout on the outputs of the hidden layers; first weights by
    `initialise_as_the_paper`. Raises UserError as `_AlexNet`.
    """

    name = "alexnet_paper"

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        width: float = 1.0,
        dropout: float = 0.5,
        image_size: int = 224,
    ) -> None:
        super().__init__(image_size)
        channels = scaled(CHANNELS, width)
        self.features = _named(
            conv_blocks(
                in_channels, channels, first_padding=self.first_padding, lrn_after=(1, 2), lrn="paper", towers=2
            )
        )
        inputs, hidden = channels[-1] * self.feature_size**2, scaled(HIDDEN, width)
        self.classifier = classifier(inputs, hidden, num_classes, dropout, dropped="outputs")
        initialise_as_the_paper(self)


class AlexNetBatchNorm(_AlexNet):
    """The single column with batch normalisation in front of each convolution's ReLU, and no other normalisation.

    62,379,720 parameters at the defaults: the convolutions have no biases, the batch normalisations (Ioffe and Szegedy
    2015) a scale and a shift per channel. The fully connected layers have none, as in torchvision's vgg*_bn.
    Initialised after He et al. (2015). Raises UserError as `_AlexNet`.
    """

    name = "alexnet_bn"

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        width: float = 1.0,
        dropout: float = 0.5,
        image_size: int = 224,
    ) -> None:
        super().__init__(image_size)
        channels = scaled(CHANNELS, width)
        self.features = _named(
            conv_blocks(in_channels, channels, first_padding=self.first_padding, batch_norm=True)
        )
        inputs = channels[-1] * self.feature_size**2
        self.classifier = classifier(inputs, scaled(HIDDEN, width), num_classes, dropout)
        initialise_for_relu(self)


class AlexNetTorchvision(nn.Module):
    """torchvision's AlexNet ("One weird trick", Krizhevsky 2014, one column): its state dict loads unchanged.

    61,100,840 parameters at the defaults, initialised as torchvision's are. Takes images of any size of at
    least 63 pixels: the features are averaged to 6x6 where they aren't (at 224 they are). Raises UserError
    for smaller ones.
    """

    name = "alexnet_torchvision"

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
        self.classifier = classifier(channels[-1] * 6 * 6, scaled(HIDDEN, width), num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        require_features(min(x.shape[-2:]), first_padding=2)
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def _named(blocks: Sequence[ConvBlock]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(zip(BLOCK_NAMES, blocks, strict=True)))
