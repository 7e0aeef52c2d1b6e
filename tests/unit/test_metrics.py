"""The logging window: sums in the order of steps, one reading, counters of skipped updates, and its restoration."""

import math

import pytest
import torch
from torch import Tensor

from alexnet_ddp.distributed import World
from alexnet_ddp.loss import Targets
from alexnet_ddp.metrics import Window

CPU = torch.device("cpu")
FINE, INF, NAN = torch.tensor(2.0), torch.tensor(float("inf")), torch.tensor(float("nan"))


def step(window: Window, seed: int, *, norm: Tensor = FINE, cuts: tuple[int, ...] = (0, 3, 5)) -> tuple[Tensor, Tensor]:
    """A step of five samples in two micro-batches; returns its losses and which were right."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, generator=random)
    labels = torch.randint(0, 4, (5,), generator=random)
    losses = torch.rand(5, generator=random)
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        window.add(losses[first:last], logits[first:last], Targets(labels[first:last]))
    window.close_step(norm)
    return losses.double(), logits.argmax(1) == labels


def test_summary_of_a_window(world: World) -> None:
    """A summary holds the mean loss and share right over all samples of its steps, and the last step's norm."""
    window = Window(3, device=CPU)
    told = [step(window, seed, norm=torch.tensor(float(seed))) for seed in range(3)]
    assert window.full
    found = window.summary()
    assert found.samples == 15
    assert found.loss == pytest.approx(torch.cat([losses for losses, _ in told]).mean().item(), rel=1e-12)
    assert found.top1 == torch.cat([right for _, right in told]).double().mean().item()
    assert (found.grad_norm, found.skipped, found.skipped_in_a_row) == (2.0, 0, 0)


def test_windows_follow_each_other(world: World) -> None:
    """A window that was read begins empty: the next summary has only what came since."""
    window, fresh = Window(2, device=CPU), Window(2, device=CPU)
    for seed in (0, 1):
        step(window, seed)
    window.summary()
    assert window.filled == 0
    for seed in (2, 3):
        step(window, seed)
        step(fresh, seed)
    assert window.summary() == fresh.summary()


def test_partial_and_empty_windows(world: World) -> None:
    """A window is read before it is full (a run's end), with steps that had no sample, and with none at all."""
    window = Window(50, device=CPU)
    step(window, 0)
    window.add(torch.zeros(0), torch.zeros(0, 4), Targets(torch.zeros(0, dtype=torch.int64)))  # a rank without samples
    window.close_step(FINE)
    assert not window.full
    assert window.summary().samples == 5
    empty = window.summary()
    assert math.isnan(empty.loss) and math.isnan(empty.top1)  # 0 would be taken for a net that has learned all
    assert (empty.samples, empty.grad_norm) == (0, 2.0)


def test_counters_of_skipped_updates(world: World) -> None:
    """Infinite and NaN norms count as skipped updates; a finite one ends the row; readings don't reset the counts."""
    window = Window(2, device=CPU)
    rows = []
    for norm in (FINE, INF, NAN, FINE, INF, FINE):
        step(window, 0, norm=norm)
        rows.append(window.counts())
        if window.full:
            window.summary()
    assert rows == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 0)]
    step(window, 0, norm=INF)
    found = window.summary()
    assert (found.skipped, found.skipped_in_a_row, math.isinf(found.grad_norm)) == (4, 1, True)


def test_restored_in_mid_window(world: World) -> None:
    """At every step of a window: put back from what a checkpoint saved, it ends in the same summary to the bit."""
    straight = Window(6, device=CPU)
    for seed in range(6):
        step(straight, seed, norm=INF if seed == 2 else FINE)
    expected = straight.summary()
    for stop in range(6):
        before = Window(6, device=CPU)
        for seed in range(stop):
            step(before, seed, norm=INF if seed == 2 else FINE)
        saved, filled, (skipped, in_a_row) = before.summed(), before.filled, before.counts()
        after = Window(6, device=CPU)
        step(after, 99)  # what stood there doesn't matter
        after.restore(saved, filled=filled, skipped=skipped, in_a_row=in_a_row, owner=True)
        for seed in range(stop, 6):
            step(after, seed, norm=INF if seed == 2 else FINE)
        assert after.summary() == expected


def test_saving_leaves_the_window_alone(world: World) -> None:
    """Reading the sums for a checkpoint changes nothing, so that it doesn't matter when one is taken."""
    often, never = Window(4, device=CPU), Window(4, device=CPU)
    for seed in range(4):
        step(often, seed)
        often.summed().zero_()
        step(never, seed)
    assert often.summary() == never.summary()


def test_only_the_owner_takes_the_sums(world: World) -> None:
    """The other ranks begin with zeros, so that the sum over ranks has the restored rows once."""
    source = Window(4, device=CPU)
    for seed in range(2):
        step(source, seed)
    other = Window(4, device=CPU)
    other.restore(source.summed(), filled=2, skipped=1, in_a_row=0, owner=False)
    assert not other.summed().any()
    assert (other.filled, other.counts()) == (2, (1, 0))


def test_lowered_log_steps(world: World) -> None:
    """A window that was open for longer than windows are now is closed, whole, by the next step; then all is as new."""
    long = Window(50, device=CPU)
    for seed in range(30):
        step(long, seed)
    short = Window(10, device=CPU)
    short.restore(long.summed(), filled=30, skipped=0, in_a_row=0, owner=True)
    step(short, 30)
    assert short.full
    step(long, 30)
    assert short.summary() == long.summary()
    for seed in range(10):
        assert not short.full
        step(short, seed)
    assert short.full
    assert short.summary().samples == 50


def test_sums_are_float64(world: World) -> None:
    """A long window loses no small loss beside large ones: sums are float64."""
    window = Window(1, device=CPU)
    for _ in range(1000):
        window.add(torch.tensor([1e6, 1e-3]), torch.zeros(2, 2), Targets(torch.zeros(2, dtype=torch.int64)))
    window.close_step(FINE)
    assert window.summary().loss * 2000 == pytest.approx(1e9 + 1.0, rel=1e-12)
