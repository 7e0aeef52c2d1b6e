"""Faults on purpose, for drills: what the recipe's `fault` section asks for, and nothing otherwise."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import Tensor

from alexnet_ddp.sections import FaultSection


def _chosen(fault: FaultSection, *, step: int, rank: int, steps: int) -> bool:
    """Whether it strikes this rank, and at this step: it does so in `steps` of them from fault.step on."""
    return 0 <= step - fault.step < steps and fault.rank in (rank, -1)


def strike(fault: FaultSection, *, at: str, step: int, rank: int) -> None:
    """Does what was asked for, if it was asked for here: `step` counts the steps done."""
    steps = fault.times if fault.kind == "slow" else 1
    if fault.kind in ("none", "inf") or at != fault.at or not _chosen(fault, step=step, rank=rank, steps=steps):
        return
    if fault.kind == "slow":
        time.sleep(fault.seconds)
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "signal":
        os.kill(os.getpid(), getattr(signal, f"SIG{fault.signal}"))
    while fault.kind == "hang":
        time.sleep(3600)
    if fault.kind == "error":
        raise RuntimeError("this error was asked for (fault.kind=error)")
    if fault.kind == "oom":
        raise torch.OutOfMemoryError("this was asked for (fault.kind=oom)")


def spoil(pixels: Tensor, fault: FaultSection, *, step: int, rank: int) -> Tensor:
    """For `fault.kind=inf`: infinite pixels from step number `fault.step` (from 0) on, so that the gradients are."""
    if fault.kind == "inf" and _chosen(fault, step=step, rank=rank, steps=fault.times):
        return torch.full_like(pixels, float("inf"))
    return pixels
