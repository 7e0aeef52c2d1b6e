"""Local response normalisation across channels (Krizhevsky et al. 2012, section 3.3), as torch or the paper define it.

torch's own goes through `avg_pool3d`, whose backward raises under `torch.use_deterministic_algorithms`, and
keeps several activations for it. Here the sum over the window is a sum of shifted slices and the backward is
written out: it is deterministic everywhere and keeps nothing but its input.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from alexnet_ddp.models.pieces import pieces

Definition = Literal["torch", "paper"]


def local_response_norm(
    x: Tensor,
    *,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
    definition: Definition = "torch",
    groups: int = 1,
) -> Tensor:
    """`x[c] / s[c]**beta`, where a window of `size` channels j around c gives

        definition "paper":  s[c] = k + alpha * (sum of x[j]**2)            Krizhevsky et al. 2012, section 3.3
        definition "torch":  s[c] = k + alpha / size * (sum of x[j]**2)     torch.nn.functional.local_response_norm

    So the paper's alpha = 1e-4 is torch's 5e-4 at size 5. Channels that are missing at the edges count as
    zeros. `groups` divides the channels into as many equal parts that don't see each other.

    x: [batch, channels, ...], any floating dtype, any batch size (0 too), any memory format. The result has
    its shape, dtype and memory format. Computed in float32 (float64 for float64), also under autocast.
    Differentiable once.
    """
    assert x.shape[1] % groups == 0, f"{x.shape[1]} channels in {groups} groups"
    return _LocalResponseNorm.apply(x, size, alpha, beta, k, size if definition == "torch" else 1, groups)


class LocalResponseNorm(nn.Module):
    """`local_response_norm` as a layer; its defaults are AlexNet's."""

    def __init__(
        self,
        size: int = 5,
        *,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        definition: Definition = "torch",
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.definition, self.groups = definition, groups

    def forward(self, x: Tensor) -> Tensor:
        return local_response_norm(
            x,
            size=self.size,
            alpha=self.alpha,
            beta=self.beta,
            k=self.k,
            definition=self.definition,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        return (
            f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, "
            f"definition={self.definition}, groups={self.groups}"
        )


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float, divisor: int, groups: int
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = size, alpha, beta, k, divisor, groups
        out = torch.empty_like(x)
        for part, out_part in pieces(x, out):
            part = _wide(part)
            factor, _ = _factor(part, size, alpha / divisor, beta, k, groups)
            out_part.copy_(factor.mul_(part))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        # With f = s**-beta: dx[j] = g[j] f[j] - 2 alpha beta / divisor * x[j] * sum of g[c] x[c] f[c] / s[c]
        # over the channels c whose window holds j, which is the mirror image of the forward's window.
        (x,) = ctx.saved_tensors
        size, alpha, beta, k, divisor, groups = ctx.constants
        before, after = size // 2, (size - 1) // 2
        grad_x = torch.empty_like(x)
        for part, grad_part, out_part in pieces(x, grad, grad_x):
            part = _wide(part)
            factor, inverse = _factor(part, size, alpha / divisor, beta, k, groups)
            grad_factor = factor.mul_(_wide(grad_part))
            products = inverse.mul_(grad_factor).mul_(part)
            shared = _window_sum(products, before=after, after=before, groups=groups)
            out_part.copy_(grad_factor.addcmul_(part, shared, value=-2 * alpha * beta / divisor))
        return grad_x, None, None, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _factor(
    x: Tensor, size: int, weight: float, beta: float, k: float, groups: int
) -> tuple[Tensor, Tensor]:
    """`s**-beta` and `1 / s`, in new tensors; `weight` is what a square counts for."""
    scale = _window_sum(x * x, before=size // 2, after=(size - 1) // 2, groups=groups).mul_(weight).add_(k)
    if beta != 0.75:
        return scale.pow(-beta), scale.reciprocal_()
    root = scale.rsqrt_()  # s**-0.5; two of these cost a tenth of one pow
    inverse = root * root
    return root.rsqrt_().mul_(inverse), inverse  # s**0.25 * s**-1


def _window_sum(x: Tensor, *, before: int, after: int, groups: int) -> Tensor:
    """`out[:, c] = x[:, c - before] + ... + x[:, c + after]`, a new tensor; what lies outside c's group counts as 0."""
    channels = x.shape[1] // groups
    if torch.compiler.is_exporting():  # the same sums; writes to slices would make a graph of scatters
        return torch.cat([_padded_sum(part, before, after) for part in x.split(channels, 1)], 1)
    out = x.clone()
    for first in range(0, x.shape[1], channels):
        x_part, out_part = (tensor.narrow(1, first, channels) for tensor in (x, out))
        for shift in range(1, min(after, channels - 1) + 1):
            out_part[:, :-shift] += x_part[:, shift:]
        for shift in range(1, min(before, channels - 1) + 1):
            out_part[:, shift:] += x_part[:, :-shift]
    return out


def _padded_sum(x: Tensor, before: int, after: int) -> Tensor:
    """`_window_sum` of one group, without writing to slices; zeros are added where that leaves something out."""
    padded = functional.pad(x, (0, 0) * (x.dim() - 2) + (before, after))
    out = x
    for shift in (*range(1, after + 1), *range(-1, -before - 1, -1)):
        out = out + padded.narrow(1, before + shift, x.shape[1])
    return out
