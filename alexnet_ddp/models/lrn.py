"""Local response normalisation across channels (Krizhevsky et al. 2012, section 3.3), as torch defines it.

torch's own goes through `avg_pool3d`, whose backward raises under `torch.use_deterministic_algorithms`, and
keeps several activations for it. Here the sum over the window is a sum of shifted slices and the backward is
written out: it is deterministic everywhere and keeps nothing but its input.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alexnet_ddp.models.pieces import pieces


def local_response_norm(
    x: Tensor, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> Tensor:
    """`x[c] / s[c]**beta` with `s[c] = k + alpha / size * (sum of x[j]**2 over size channels j around c)`.

    Equal to `torch.nn.functional.local_response_norm`: alpha is divided by the window's size, which the
    paper doesn't do (the paper's alpha = 1e-4 is 5e-4 here), and the window counts missing channels at the
    edges as zeros.

    x: [batch, channels, ...], any floating dtype, any batch size (0 too), any memory format. The result has
    its shape, dtype and memory format. Computed in float32 (float64 for float64), also under autocast.
    Differentiable once.
    """
    return _LocalResponseNorm.apply(x, size, alpha, beta, k)


class LocalResponseNorm(nn.Module):
    """`local_response_norm` as a layer; its defaults are AlexNet's."""

    def __init__(self, size: int = 5, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        return local_response_norm(x, size=self.size, alpha=self.alpha, beta=self.beta, k=self.k)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = size, alpha, beta, k
        out = torch.empty_like(x)
        for part, out_part in pieces(x, out):
            part = _wide(part)
            factor, _ = _factor(part, size, alpha, beta, k)
            out_part.copy_(factor.mul_(part))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        # With f = s**-beta: dx[j] = g[j] f[j] - 2 alpha beta / size * x[j] * sum of g[c] x[c] f[c] / s[c]
        # over the channels c whose window holds j, which is the mirror image of the forward's window.
        (x,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.constants
        before, after = size // 2, (size - 1) // 2
        grad_x = torch.empty_like(x)
        for part, grad_part, out_part in pieces(x, grad, grad_x):
            part = _wide(part)
            factor, inverse = _factor(part, size, alpha, beta, k)
            grad_factor = factor.mul_(_wide(grad_part))
            shared = _window_sum(inverse.mul_(grad_factor).mul_(part), before=after, after=before)
            out_part.copy_(grad_factor.addcmul_(part, shared, value=-2 * alpha * beta / size))
        return grad_x, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _factor(x: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[Tensor, Tensor]:
    """`s**-beta` and `1 / s`, in new tensors."""
    scale = _window_sum(x * x, before=size // 2, after=(size - 1) // 2).mul_(alpha / size).add_(k)
    if beta != 0.75:
        return scale.pow(-beta), scale.reciprocal_()
    root = scale.rsqrt_()  # s**-0.5; two of these cost a tenth of one pow
    inverse = root * root
    return root.rsqrt_().mul_(inverse), inverse  # s**0.25 * s**-1


def _window_sum(x: Tensor, *, before: int, after: int) -> Tensor:
    """`out[:, c] = x[:, c - before] + ... + x[:, c + after]`, a new tensor; what lies outside counts as 0."""
    channels = x.shape[1]
    out = x.clone()
    for shift in range(1, min(after, channels - 1) + 1):
        out[:, :-shift] += x[:, shift:]
    for shift in range(1, min(before, channels - 1) + 1):
        out[:, shift:] += x[:, :-shift]
    return out
