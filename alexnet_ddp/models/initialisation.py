"""First weights: after He et al. (2015), and after the AlexNet paper (Krizhevsky et al. 2012, section 5)."""

import itertools
import math

from torch import nn

PAPER_STD = 0.01
# Layer by layer, in the paper's net: inputs of a unit (two towers, 224 pixels, colour, full width), and first bias.
PAPER_FAN_IN = (3 * 11 * 11, 48 * 5 * 5, 256 * 3 * 3, 192 * 3 * 3, 192 * 3 * 3, 256 * 6 * 6, 4096, 4096)
PAPER_BIAS = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)


def initialise_for_relu(model: nn.Module) -> None:
    """He et al. (2015): weights of variance 2 / inputs and zero biases in every layer that a ReLU follows.

    It keeps the signal's size through the net. torch's default makes the variance some six times smaller in
    every layer, and the loss then stays at ln(classes) for hundreds of steps. The last layer keeps torch's
    default: small first logits. Batch normalisations keep theirs too: scale 1, shift 0.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.ReLU)]
    for layer, following in itertools.pairwise(layers):
        if isinstance(layer, nn.Conv2d | nn.Linear) and isinstance(following, nn.ReLU):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def initialise_as_the_paper(model: nn.Module) -> None:
    """Krizhevsky et al. (2012), section 5: every weight from N(0, 0.01); biases 1 in convolutions 2, 4 and 5 and in
    the hidden fully connected layers, where they give the ReLUs positive inputs at first, 0 in the others.

    In a net of another width, image size or number of colours than the paper's, a layer whose units have fewer (or
    more) inputs has a standard deviation of 0.01 * sqrt(the paper's inputs / its inputs), so that the signal keeps
    the size that it has in the paper's net.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, fan_in, bias in zip(layers, PAPER_FAN_IN, PAPER_BIAS, strict=True):
        assert layer.bias is not None
        nn.init.normal_(layer.weight, std=PAPER_STD * math.sqrt(fan_in / layer.weight[0].numel()))
        nn.init.constant_(layer.bias, bias)
