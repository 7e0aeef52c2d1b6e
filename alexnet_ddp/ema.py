"""A running mean of the weights beside them, which is evaluated with its own numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alexnet_ddp.errors import UserError
from alexnet_ddp.sections import EmaSection


def decay_at(step: int, section: EmaSection) -> float | None:
    """Share of the mean that step number `step` (from 0) keeps; None where it leaves the mean alone.

    Every `section.steps` steps there is an update, and the one after n others keeps min(decay, (1 + n) / (10 + n)), so
    that a mean as slow as 0.9999 forgets the random weights that it begins with (TensorFlow's
    tf.train.ExponentialMovingAverage with num_updates). A pure function: nothing to save.
    """
    if section.decay is None or (step + 1) % section.steps:
        return None
    updates = (step + 1) // section.steps - 1
    return min(section.decay, (1 + updates) / (10 + updates))


def check_steps(section: EmaSection, *, total_steps: int) -> None:
    """Raises UserError for a mean that would never move in a run of so many steps: its first weights, random ones,
    would be evaluated and published."""
    if section.decay is not None and section.steps > total_steps:
        raise UserError(f"ema.steps must be at most the steps of the run, got {section.steps} for {total_steps}: the "
                        f"mean would stay at the weights that the run begins with. Use ema.steps=1, or train longer.")


class Ema:
    """The exponential moving average of a net's parameters that learn: mean = decay * mean + (1 - decay) * weights.

    Averages of the iterates are Polyak and Juditsky's (1992); the exponential form is that of torchvision's reference
    and of Szegedy et al. 2016, section 8. The mean is of parameters alone: buffers, batch norm's statistics, are the
    net's own when the mean is evaluated or published, as torch's AveragedModel copies them by default.
    """

    def __init__(self, net: nn.Module) -> None:
        """The mean begins at the (unwrapped) net's weights, on their device and in their dtype and layout."""
        self._weights = {name: each for name, each in net.named_parameters() if each.requires_grad}
        self.tensors = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, decay: float, *, norm: Tensor) -> None:
        """Moves towards the weights of now, unless the gradient norm says that their update was skipped.

        That is decided on the device, by a share of zero: the host doesn't wait.
        """
        share = torch.isfinite(norm).to(norm.dtype) * (1.0 - decay)
        for name, mean in self.tensors.items():
            mean.lerp_(self._weights[name], share.to(mean.dtype))
