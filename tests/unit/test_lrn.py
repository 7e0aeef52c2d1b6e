"""Local response normalisation against torch's and against its own definition."""

import itertools

import pytest
import torch
from torch.nn import functional

from alexnet_ddp.models import pieces as pieces_module
from alexnet_ddp.models.lrn import LocalResponseNorm, local_response_norm

ALEXNET = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}
STRONG = {"size": 5, "alpha": 0.5, "beta": 0.75, "k": 2.0}  # AlexNet's own alpha hides errors behind k


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def test_equals_torch_in_float64() -> None:
    """Values and gradients equal F.local_response_norm to 1e-12 for every window size, edge and beta."""
    for channels, size, beta in itertools.product((1, 2, 3, 9), (1, 2, 3, 4, 5), (0.75, 0.5, 1.0)):
        x = torch.randn(3, channels, 4, 5, dtype=torch.float64, requires_grad=True)
        ours = local_response_norm(x, size=size, alpha=0.7, beta=beta, k=1.5)
        theirs = functional.local_response_norm(x, size, 0.7, beta, 1.5)
        grad = torch.randn_like(x)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        gradients = [torch.autograd.grad(out, x, grad)[0] for out in (ours, theirs)]
        torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def directly(x: torch.Tensor, *, size: int, alpha: float, beta: float, k: float, groups: int) -> torch.Tensor:
    """The paper's formula (section 3.3), channel by channel: b = a / (k + alpha * sum of a**2)**beta, alpha as it is.

    The paper's window runs from i - n/2 to i + n/2; of an even n, torch's has one channel less after i.
    """
    channels = x.shape[1] // groups
    out = torch.empty_like(x)
    for i in range(x.shape[1]):
        group = range(i // channels * channels, (i // channels + 1) * channels)
        window = [j for j in range(i - size // 2, i + (size - 1) // 2 + 1) if j in group]
        out[:, i] = x[:, i] / (k + alpha * sum(x[:, j] ** 2 for j in window)) ** beta
    return out


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_both_definitions_equal_their_formulas(groups: int) -> None:
    """In float64, values and gradients equal the formulas written out: the paper's sum, and torch's with alpha / n."""
    for size, beta in itertools.product((5, 4, 1), (0.75, 0.5)):
        x = torch.randn(2, 12, 3, 2, dtype=torch.float64, requires_grad=True)
        grad = torch.randn_like(x)
        expected = {
            "paper": directly(x, size=size, alpha=0.7, beta=beta, k=2.0, groups=groups),
            "torch": directly(x, size=size, alpha=0.7 / size, beta=beta, k=2.0, groups=groups),
        }
        for definition, right in expected.items():
            layer = LocalResponseNorm(size, alpha=0.7, beta=beta, k=2.0, definition=definition, groups=groups)
            ours = layer(x)
            torch.testing.assert_close(ours, right, atol=1e-13, rtol=1e-13)
            gradients = [torch.autograd.grad(out, x, grad, retain_graph=True)[0] for out in (ours, right)]
            torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_the_papers_alpha_is_five_times_torchs() -> None:
    """With a window of 5 the paper's alpha = 1e-4 gives the bits of torch's alpha = 5e-4, and not those of 1e-4."""
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64) * 50
    paper = local_response_norm(x, alpha=1e-4, definition="paper")
    torch.testing.assert_close(paper, local_response_norm(x, alpha=5e-4), atol=1e-14, rtol=1e-14)
    assert (paper - local_response_norm(x, alpha=1e-4)).abs().max() > 1


def test_definition_divides_alpha_by_the_window() -> None:
    """Of five ones the middle one is divided by (k + alpha)**beta, an edge by (k + 3/5 alpha)**beta."""
    out = LocalResponseNorm(5, alpha=10.0, beta=0.75, k=2.0)(torch.ones(1, 5, 1, 1, dtype=torch.float64))
    assert out[0, 2].item() == pytest.approx(12.0**-0.75, rel=1e-14)
    assert out[0, 0].item() == pytest.approx(8.0**-0.75, rel=1e-14)


@pytest.mark.parametrize("beta", [0.75, 0.6])
def test_gradcheck(beta: float) -> None:
    """The written-out backward is the derivative of the forward."""
    x = torch.randn(2, 7, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: local_response_norm(t, size=4, alpha=0.7, beta=beta), x)


def test_gradcheck_in_towers() -> None:
    """So it is by the paper's definition over two groups of channels."""
    x = torch.randn(2, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: local_response_norm(t, alpha=0.7, definition="paper", groups=2), x)


def test_float32_is_close_to_torch() -> None:
    """In float32, at AlexNet's constants and at strong ones, values and gradients are torch's to rounding."""
    for constants in (ALEXNET, STRONG):
        x = (torch.randn(2, 96, 9, 9) * 3).relu_().requires_grad_()
        out, expected = local_response_norm(x, **constants), functional.local_response_norm(x, **constants)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=2e-6)
        grad = torch.randn_like(x)
        gradients = [torch.autograd.grad(y, x, grad)[0] for y in (out, expected)]
        torch.testing.assert_close(*gradients, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """bf16 and fp16, under autocast too, give the float32 result rounded once, values and gradients."""
    x = (torch.randn(2, 8, 3, 3) * 100).to(dtype)  # squares overflow fp16
    grad = torch.randn(2, 8, 3, 3).to(dtype)
    wide, narrow = x.float().requires_grad_(), x.clone().requires_grad_()
    expected = local_response_norm(wide, **STRONG)
    with torch.autocast("cpu", dtype=dtype):
        out = local_response_norm(narrow, **STRONG)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    out.backward(grad)
    expected.backward(grad.float())
    assert wide.grad is not None
    assert narrow.grad is not None and torch.equal(narrow.grad, wide.grad.to(dtype))


def test_memory_formats_agree_and_are_kept() -> None:
    """A channels-last input gives a channels-last output and gradient with the same values."""
    x = torch.randn(2, 8, 5, 6)
    plain = x.clone().requires_grad_()
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    leaves = (plain, last)
    outputs = [local_response_norm(t, **STRONG) for t in leaves]
    assert outputs[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(*outputs)
    squares = [out.square().sum() for out in outputs]
    gradients = [torch.autograd.grad(y, t)[0] for y, t in zip(squares, leaves, strict=True)]
    assert gradients[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(*gradients)


def test_pieces_do_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch taken whole and one sample at a time give the same bits, values and gradients."""
    x, grad = torch.randn(5, 8, 4, 4), torch.randn(5, 8, 4, 4)
    results = []
    for piece in (1, 300, 10**9):
        monkeypatch.setattr(pieces_module, "PIECE", piece)
        leaf = x.clone().requires_grad_()
        out = local_response_norm(leaf, **STRONG)
        results.append((out.detach(), torch.autograd.grad(out, leaf, grad)[0]))
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(gradient, results[0][1])


def test_empty_batch() -> None:
    """No samples in, no samples out, forward and backward."""
    x = torch.empty(0, 8, 4, 4, requires_grad=True)
    out = local_response_norm(x)
    out.sum().backward()
    assert out.shape == x.shape and x.grad is not None and x.grad.shape == x.shape


def test_deterministic_algorithms_allow_it() -> None:
    """Forward and backward run under use_deterministic_algorithms, where torch's own raises on a GPU."""
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        local_response_norm(x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad is not None


def test_keeps_only_its_input_for_backward() -> None:
    """The one tensor saved for backward is the input itself: nothing more is held between the passes."""
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        local_response_norm(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_export_with_any_batch() -> None:
    """torch.export traces the layer with a symbolic batch and the program gives the same values."""
    layer = LocalResponseNorm(5).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(2, 8, 4, 4),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 8, 4, 4)
    torch.testing.assert_close(program.module()(x), layer(x))
