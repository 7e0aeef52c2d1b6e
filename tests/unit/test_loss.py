"""The loss of each sample: against cross-entropy with soft labels written out; blended, smoothed, weighted."""

import pytest
import torch

from alexnet_ddp.loss import Targets, sample_losses

N, CLASSES = 7, 5


def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(N, CLASSES, generator=random, dtype=torch.float64)
    labels, others = torch.randint(0, CLASSES, (2, N), generator=random)
    return logits, labels, others, torch.rand(N, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_blended_labels_are_the_soft_labels_formula(smoothing: float) -> None:
    """The loss of a blended image is the cross-entropy against its blended (and smoothed) label distribution."""
    logits, labels, others, shares = samples()
    one_hot = torch.eye(CLASSES, dtype=torch.float64)
    wanted = shares[:, None] * one_hot[labels] + (1 - shares)[:, None] * one_hot[others]
    wanted = (1 - smoothing) * wanted + smoothing / CLASSES
    expected = -(wanted * logits.log_softmax(1)).sum(1)
    found = sample_losses(logits, Targets(labels, others, shares), smoothing=smoothing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.tensor([torch.inf, 0, -torch.inf, 0, 0]), torch.full((5,), torch.nan)])
def test_a_sample_that_does_not_count_moves_no_weight(bad: torch.Tensor) -> None:
    """A weight of zero takes a sample's loss and gradient away, also where its loss is not finite."""
    logits, labels, _, _ = samples()
    logits[2] = bad
    logits.requires_grad_()
    weights = torch.ones(N)
    weights[2] = 0
    losses = sample_losses(logits, Targets(labels, weights=weights), smoothing=0.0)
    assert losses[2] == 0
    losses.sum().backward()
    assert logits.grad is not None and not logits.grad[2].any() and torch.isfinite(logits.grad).all()
    assert logits.grad[torch.arange(N) != 2].abs().sum(1).all()
    keep = torch.arange(N) != 2
    torch.testing.assert_close(losses[keep], sample_losses(logits[keep], Targets(labels[keep]), smoothing=0.0))
    assert torch.isfinite(losses).all()


def test_without_options_it_is_plain_cross_entropy_to_the_bit() -> None:
    """Plain targets give torch's cross-entropy in float32, whatever the dtype of the logits, to the bit."""
    logits, labels, _, _ = samples()
    half = logits.bfloat16()
    found = sample_losses(half, Targets(labels, weights=torch.ones(N)), smoothing=0.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.nn.functional.cross_entropy(half.float(), labels, reduction="none"))
