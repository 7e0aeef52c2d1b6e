"""The learning rate: exact values of every shape with and without warmup, at every edge, and purity."""

import itertools
import math

import pytest

from alexnet_ddp.schedule import learning_rate
from alexnet_ddp.sections import ScheduleSection

BASE = 0.1


def rates(schedule: ScheduleSection, *, steps: int, spe: int = 10, epochs: int = 4, base: float = BASE) -> list[float]:
    return [learning_rate(step, base=base, schedule=schedule, steps_per_epoch=spe, epochs=epochs)
            for step in range(steps)]


@pytest.mark.parametrize(("name", "warmup", "expected"), [
    # lr at steps 0, 4, 9, 10, 19, 20, 39 of 4 epochs of 10 steps; step: every epoch times 0.5; cosine to 0.01
    ("constant", 0.0, [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
    ("constant", 1.0, [0.01, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1]),
    ("constant", 0.5, [0.02, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
    ("step", 0.0, [0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.0125]),
    ("step", 0.5, [0.02, 0.1, 0.1, 0.05, 0.05, 0.025, 0.0125]),  # milestones don't move with the warmup
    ("step", 1.5, [0.1 / 15, 0.5 / 15, 1.0 / 15, 1.1 / 15, 0.05, 0.025, 0.0125]),
    ("cosine", 0.0, [0.1, *(0.01 + 0.045 * (1 + math.cos(math.pi * t / 40)) for t in (4, 9, 10, 19)), 0.055,
                     0.01 + 0.045 * (1 + math.cos(math.pi * 39 / 40))]),
    ("cosine", 1.0, [0.01, 0.05, 0.1, 0.1, *(0.01 + 0.045 * (1 + math.cos(math.pi * t / 30)) for t in (9, 10, 29))]),
])
def test_table(name: str, warmup: float, expected: list[float]) -> None:
    """Every schedule with and without warmup has the values worked out by hand, to 1e-15."""
    schedule = ScheduleSection(name=name, warmup_epochs=warmup, step_epochs=1.0, gamma=0.5, eta_min=0.01)
    found = rates(schedule, steps=40)
    assert [found[step] for step in (0, 4, 9, 10, 19, 20, 39)] == pytest.approx(expected, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("name", ["constant", "step", "cosine"])
def test_warmup(name: str) -> None:
    """Warmup starts above zero, rises by equal amounts, and its last step is the base to the bit, for any length."""
    for length, base in itertools.product((1, 2, 3, 7, 49, 500, 1251), (0.1, 0.01, 0.3, 0.07)):
        schedule = ScheduleSection(name=name, warmup_epochs=1.0, step_epochs=5.0)
        found = rates(schedule, steps=length + 1, spe=length, epochs=10, base=base)
        assert found[0] == pytest.approx(base / length, rel=1e-15)
        assert found[0] > 0
        assert found[length - 1] == base
        assert found[length] == base  # the first step after it
        rises = [b - a for a, b in itertools.pairwise(found[:length])]
        assert rises == pytest.approx([base / length] * (length - 1))


def test_fractional_warmup_is_whole_steps() -> None:
    """A warmup of half an epoch of five steps is two whole steps (rounded), never a jump above the base."""
    found = rates(ScheduleSection(name="constant", warmup_epochs=0.5), steps=6, spe=5)
    assert found == [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]


def test_milestones() -> None:
    """The rate falls exactly at multiples of step_epochs, also where the fraction isn't exact in binary."""
    for epochs, spe in ((30.0, 5004), (1.1, 50), (1.1, 90), (0.3, 10), (2.5, 4), (7.7, 10)):
        schedule = ScheduleSection(name="step", step_epochs=epochs, gamma=0.1)
        period = round(epochs * spe)
        for turn in (1, 2, 3):
            before, at = (learning_rate(step, base=1.0, schedule=schedule, steps_per_epoch=spe, epochs=1000)
                          for step in (turn * period - 1, turn * period))
            assert before == 0.1 ** (turn - 1)
            assert at == 0.1**turn
    # A period that is no whole number of steps: the first step at or after it.
    found = rates(ScheduleSection(name="step", step_epochs=0.25, gamma=0.5), steps=10)
    assert found == [0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.025, 0.0125, 0.0125]


def test_cosine_ends_at_eta_min() -> None:
    """Cosine falls all the way, would be at eta_min to the bit one step after the run's last, and stays there."""
    for warmup, eta_min in ((0.0, 0.0), (1.0, 0.01), (3.9, 0.02)):
        schedule = ScheduleSection(name="cosine", warmup_epochs=warmup, eta_min=eta_min)
        found = rates(schedule, steps=50)
        after = found[round(warmup * 10) : 41]
        assert after[0] == BASE
        assert all(a > b for a, b in itertools.pairwise(after))
        assert found[40:] == [eta_min] * 10


@pytest.mark.parametrize("name", ["constant", "step", "cosine"])
def test_pure(name: str) -> None:
    """A rate depends on the step alone: asked for in any order, or from the middle on, it is the same to the bit."""
    schedule = ScheduleSection(name=name, warmup_epochs=0.7, step_epochs=0.9, eta_min=0.001)
    straight = rates(schedule, steps=40)
    backwards = [learning_rate(step, base=BASE, schedule=schedule, steps_per_epoch=10, epochs=4)
                 for step in reversed(range(40))]
    assert backwards[::-1] == straight


def test_longer_run_keeps_constant_and_step() -> None:
    """More epochs leave every rate of constant and step as it was (so a run can be trained longer), not of cosine."""
    for name, same in (("constant", True), ("step", True), ("cosine", False)):
        schedule = ScheduleSection(name=name, warmup_epochs=1.0, step_epochs=1.0)
        assert (rates(schedule, steps=40, epochs=4) == rates(schedule, steps=40, epochs=8)) is same
