"""The learning rate: exact values of every shape with and without warmup, at every edge, and purity."""

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch.optim import lr_scheduler

from alexnet_ddp.schedule import ENDS_WITH_THE_RUN, learning_rate
from alexnet_ddp.sections import ScheduleSection

BASE = 0.1
NAMES = get_args(ScheduleSection.model_fields["name"].annotation)
SHAPE: dict[str, dict[str, Any]] = {  # of runs of 4 epochs of 10 steps
    "step": {"step_epochs": 1.0, "gamma": 0.5}, "multistep": {"milestones": [0.7, 1.5, 3.0], "gamma": 0.5},
    "exponential": {"gamma": 0.6}, "cosine": {"eta_min": 0.01}, "polynomial": {"power": 2.5, "eta_min": 0.01},
    "one_cycle": {"rise": 0.4, "div_factor": 20.0, "final_div_factor": 50.0}}


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


@pytest.mark.parametrize("name", NAMES)
def test_warmup(name: str) -> None:
    """Warmup starts above zero, rises by equal amounts, and ends at the schedule's first rate to the bit."""
    for length, base in itertools.product((1, 2, 3, 7, 49, 500, 1251), (0.1, 0.01, 0.3, 0.07)):
        schedule = ScheduleSection(name=name, warmup_epochs=1.0, step_epochs=5.0)
        first = base / 25.0 if name == "one_cycle" else base
        found = rates(schedule, steps=length + 1, spe=length, epochs=10, base=base)
        assert found[0] == pytest.approx(first / length, rel=1e-15)
        assert found[0] > 0
        assert found[length - 1] == first
        assert found[length] == (pytest.approx(first, rel=1e-14) if name == "one_cycle" else first)  # right after it
        rises = [b - a for a, b in itertools.pairwise(found[:length])]
        assert rises == pytest.approx([first / length] * (length - 1))


Scheduler = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
TORCH: dict[str, Scheduler] = {  # the same shapes, stepped at every step
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
    "step": lambda o: lr_scheduler.StepLR(o, step_size=10, gamma=0.5),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, milestones=[7, 15, 30], gamma=0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.6 ** (1 / 10)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.01),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=40, power=2.5),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=BASE, total_steps=40, pct_start=0.4, div_factor=20.0,
                                                   final_div_factor=50.0, cycle_momentum=False),
}


def torch_rates(make: Scheduler, *, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_whole_run_is_that_of_torchs_scheduler(name: str) -> None:
    """At every step of a run each schedule has the rate of torch's own scheduler, stepped once a step, to 1e-12."""
    shape = {**SHAPE.get(name, {}), **({"eta_min": 0.0} if name == "polynomial" else {})}  # torch's ends at 0
    found = rates(ScheduleSection(name=name, **shape), steps=40)
    assert found == pytest.approx(torch_rates(TORCH[name], steps=40), rel=1e-12, abs=1e-17)
    assert name == "constant" or len(set(found)) > 3


@pytest.mark.parametrize("name", ["cosine", "polynomial", "one_cycle", "exponential"])
def test_after_a_warmup_the_shape_takes_the_rest(name: str) -> None:
    """A warmup of 10 of 40 steps is torch's LinearLR, and what follows is the shape of a run of 30 steps."""
    shape = SHAPE[name]
    found = rates(ScheduleSection(name=name, warmup_epochs=1.0, **shape), steps=40)
    assert found[10:] == rates(ScheduleSection(name=name, **shape), steps=30, epochs=3)
    ramp = torch_rates(lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=9), steps=10)
    assert found[:10] == pytest.approx([rate * found[10] / BASE for rate in ramp], rel=1e-12)


def test_one_cycle_of_any_length() -> None:
    """The smallest runs and peaks on, before and after whole steps: as torch, where torch doesn't divide by zero."""
    for steps, rise in itertools.product(range(1, 13), (0.01, 0.25, 0.3, 0.5, 0.9)):
        schedule = ScheduleSection(name="one_cycle", rise=rise)
        found = rates(schedule, steps=steps, spe=1, epochs=steps)
        assert all(0 < rate <= BASE for rate in found)
        if rise * steps != 1.0:
            assert found == pytest.approx(torch_rates(lambda o, steps=steps, rise=rise: lr_scheduler.OneCycleLR(
                o, max_lr=BASE, total_steps=steps, pct_start=rise, cycle_momentum=False), steps=steps)
                if steps > 1 else found, rel=1e-9)


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


@pytest.mark.parametrize("name", NAMES)
def test_pure(name: str) -> None:
    """A rate depends on the step alone: asked for in any order, or from the middle on, it is the same to the bit."""
    schedule = ScheduleSection(name=name, warmup_epochs=0.7, **SHAPE.get(name, {}))
    straight = rates(schedule, steps=40)
    backwards = [learning_rate(step, base=BASE, schedule=schedule, steps_per_epoch=10, epochs=4)
                 for step in reversed(range(40))]
    assert backwards[::-1] == straight


@pytest.mark.parametrize(("epochs", "spe"), [(30.0, 5004), (1.1, 50), (1.1, 90), (0.3, 10), (2.5, 4), (7.7, 10)])
def test_multistep_falls_at_its_milestones(epochs: float, spe: int) -> None:
    """Milestones that aren't exact in binary are met at their step; after k of them the rate is gamma ** k."""
    schedule = ScheduleSection(name="multistep", milestones=[epochs, 3 * epochs], gamma=0.1, warmup_epochs=0.2)
    for turn, milestone in enumerate((round(epochs * spe), round(3 * epochs * spe))):
        before, at = (learning_rate(step, base=1.0, schedule=schedule, steps_per_epoch=spe, epochs=1000)
                      for step in (milestone - 1, milestone))
        assert (before, at) == (0.1**turn, 0.1 ** (turn + 1))


@pytest.mark.parametrize("name", NAMES)
def test_longer_run_keeps_its_rates_or_is_known_not_to(name: str) -> None:
    """More epochs leave every rate as it was (so a run can be trained longer), but for shapes that end with the run."""
    schedule = ScheduleSection(name=name, warmup_epochs=1.0, **SHAPE.get(name, {}))
    same = rates(schedule, steps=40, epochs=4) == rates(schedule, steps=40, epochs=8)
    assert same is (name not in ENDS_WITH_THE_RUN)
