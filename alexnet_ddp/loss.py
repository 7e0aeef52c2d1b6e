"""What a net is told of its samples, and the loss of each: cross-entropy, with mixed labels, smoothed, weighted."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Targets:
    """What the samples of a micro-batch are, on the device. Images may be blends of two, and samples may not count."""

    labels: Tensor  # int64 [n]
    others: Tensor | None = None  # int64 [n], labels of the images that were blended in
    shares: Tensor | None = None  # float32 [n] in 0..1, what `labels` count for; `others` for the rest
    weights: Tensor | None = None  # float32 [n], 0 for a sample that doesn't count (a damaged image), else 1


def sample_losses(logits: Tensor, targets: Targets, *, smoothing: float) -> Tensor:
    """The weighted loss of each sample, natural logarithm: float32 [n] (float64 for float64 logits [n, classes]).

    Cross-entropy against (1 - smoothing) * label + smoothing / classes (Szegedy et al. 2015b, section 7); of a blended
    image the sum over its two labels by their shares (Zhang et al. 2018, equation 1), which is the same as the
    cross-entropy against the blended labels.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if targets.weights is not None:
        # A net may say inf or nan of what isn't an image. Masked here, and not the losses alone: the backward of a
        # cross-entropy of nan makes nan of a gradient of zero (0 * nan).
        logits = torch.where((targets.weights > 0)[:, None], logits, 0.0)
    losses = F.cross_entropy(logits, targets.labels, reduction="none", label_smoothing=smoothing)
    if targets.others is not None and targets.shares is not None:
        others = F.cross_entropy(logits, targets.others, reduction="none", label_smoothing=smoothing)
        losses = targets.shares * losses + (1.0 - targets.shares) * others
    if targets.weights is not None:
        losses = torch.where(targets.weights > 0, losses, 0.0)
    return losses
