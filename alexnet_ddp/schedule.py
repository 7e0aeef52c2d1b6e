"""The learning rate as a pure function of the step: nothing to save, nothing to get out of line on a resume."""

from __future__ import annotations

import math

from alexnet_ddp.sections import ScheduleSection

# Shapes that are stretched over the whole run: with more epochs every rate would have been another one.
ENDS_WITH_THE_RUN = ("cosine", "polynomial", "one_cycle")


def learning_rate(step: int, *, base: float, schedule: ScheduleSection, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of step number `step` (from 0), in the units of `optim.lr`.

    Warmup of W steps rises linearly: first * (step + 1) / W, so that step 0 is above zero and step W - 1 has the
    schedule's first rate, which is the base but for `one_cycle` (Goyal et al. 2017, section 2.2). Then, with t counted
    from the run's start for `step` and `multistep` (milestones don't move with the warmup) and from the warmup's end
    for all others, E the steps of an epoch and T the steps left after the warmup:
        constant     base
        step         base * gamma ** floor(t / (step_epochs * E))
        multistep    base * gamma ** (number of milestones m with m * E <= t)
        exponential  base * gamma ** (t / E): at every step, gamma is the factor of an epoch
        cosine       eta_min + (base - eta_min) * (1 + cos(pi * t / T)) / 2
                     (Loshchilov and Hutter 2017, equation 5, without restarts)
        polynomial   eta_min + (base - eta_min) * (1 - t / T) ** power
                     (the "poly" policy: with power 0.9 in Chen et al. 2018, DeepLab, with 2 in You et al. 2017, LARS)
        one_cycle    from base / div_factor up to the base at t = rise * T - 1, down to base / (div_factor *
                     final_div_factor) at t = T - 1, both by half a cosine, as torch's OneCycleLR (Smith and Topin 2019,
                     Super-convergence, whose legs are straight). The momentum isn't cycled.
    """
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    first = base / schedule.div_factor if schedule.name == "one_cycle" else base
    if step < warmup:
        return first * ((step + 1) / warmup)  # in this order the last one is the first rate to the bit
    after, left = step - warmup, max(1, epochs * steps_per_epoch - warmup)
    match schedule.name:
        case "constant":
            return base
        case "step":
            turns = math.floor(step / (schedule.step_epochs * steps_per_epoch) + 1e-9)  # 1.1 * 50: 55.00000000000001
            return float(base * schedule.gamma**turns)
        case "multistep":
            passed = sum(step >= milestone * steps_per_epoch - 1e-6 for milestone in schedule.milestones)
            return float(base * schedule.gamma**passed)
        case "exponential":
            return float(base * schedule.gamma ** (after / steps_per_epoch))
        case "cosine":
            return _half_cosine(base, schedule.eta_min, min(1.0, after / left))
        case "polynomial":
            share = (1.0 - min(1.0, after / left)) ** schedule.power
            return float(schedule.eta_min + (base - schedule.eta_min) * share)
        case "one_cycle":
            peak, end = schedule.rise * left - 1.0, left - 1.0  # in steps, as torch counts; the peak may lie before 0
            if after < peak:
                return _half_cosine(first, base, after / peak)
            return _half_cosine(base, first / schedule.final_div_factor, min(1.0, (after - peak) / (end - peak)))


def _half_cosine(start: float, end: float, done: float) -> float:
    """From `start` at done = 0 to `end`, to the bit, at done = 1."""
    return end + (start - end) * (1.0 + math.cos(math.pi * done)) / 2.0
