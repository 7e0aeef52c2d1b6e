"""The learning rate as a pure function of the step: nothing to save, nothing to get out of line on a resume."""

from __future__ import annotations

import math

from alexnet_ddp.sections import ScheduleSection


def learning_rate(step: int, *, base: float, schedule: ScheduleSection, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of step number `step` (from 0), in the units of `optim.lr`.

    Warmup of W steps rises linearly: base * (step + 1) / W, so that step 0 is above zero and step W - 1 is the base
    (Goyal et al. 2017, section 2.2). Then, with t counted from the run's start for `step` (milestones don't move
    with the warmup) and from the warmup's end for `cosine`:
        constant  base
        step      base * gamma ** floor(t / (step_epochs * steps per epoch))
        cosine    eta_min + (base - eta_min) * (1 + cos(pi * t / T)) / 2 with T the steps left after the warmup
                  (Loshchilov and Hutter 2017, equation 5, without restarts)
    """
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return base * ((step + 1) / warmup)  # in this order the last one is the base to the bit
    if schedule.name == "step":
        period = schedule.step_epochs * steps_per_epoch  # steps; 1.1 * 50 is 55.00000000000001
        return float(base * schedule.gamma ** math.floor(step / period + 1e-9))
    if schedule.name == "cosine":
        done = (step - warmup) / max(1, epochs * steps_per_epoch - warmup)
        return schedule.eta_min + (base - schedule.eta_min) * (1.0 + math.cos(math.pi * min(1.0, done))) / 2.0
    assert schedule.name == "constant"
    return base
