"""What is gathered while training: on the device, read by the host only on logging steps.

The window has one row a step. Rows hold sums over this rank's samples, and the *whole* window is summed over the
ranks at once, whether for the log or for a checkpoint in mid-window, so that a sum's bits never depend on when a
checkpoint was taken. After a resume rank 0 holds the summed rows and the others zeros, which sum to the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_ddp.loss import Targets

LOSS, CORRECT, SAMPLES = range(3)


@dataclass(frozen=True)
class Summary:
    """A logging window over all ranks, on the host."""

    loss: float  # mean over the window's samples; nan where none counts
    top1: float  # share of the window's samples whose highest logit was right; nan where none counts
    samples: int
    grad_norm: float  # of the window's last step, unscaled, before clipping
    skipped: int  # updates skipped since the run began
    skipped_in_a_row: int


class Window:
    """Open accumulators: float64 [steps, 3] of (loss sum, correct, samples), and the counters of skipped updates."""

    def __init__(self, steps: int, *, device: torch.device) -> None:
        self._steps = steps
        self._rows = torch.zeros(steps, 3, dtype=torch.float64, device=device)
        self._norm = torch.zeros((), device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # skipped, skipped in a row
        self.filled = 0  # rows closed

    @property
    def full(self) -> bool:
        return self.filled >= self._steps

    def add(self, losses: Tensor, logits: Tensor, targets: Targets) -> None:
        """One micro-batch: losses [n], logits [n, classes]. Of a blended image its own label is the right one."""
        labels, weights = targets.labels, targets.weights
        row = self._rows[self.filled]
        row[LOSS] += losses.double().sum()
        correct = logits.argmax(1) == labels if len(labels) else labels != labels
        row[CORRECT] += (correct if weights is None else correct & (weights > 0)).sum()
        row[SAMPLES] += len(labels) if weights is None else (weights > 0).sum()

    def close_step(self, norm: Tensor) -> None:
        """The step is done; its gradient norm is not finite exactly when its update was skipped."""
        bad = (~torch.isfinite(norm)).to(torch.int64)
        self._norm = norm
        self._counts = torch.stack([self._counts[0] + bad, (self._counts[1] + bad) * bad])
        self.filled += 1

    def summed(self) -> Tensor:
        """The window's rows summed over all ranks: float64 [steps, 3]. Collective."""
        rows = self._rows.clone()
        dist.all_reduce(rows)
        return rows

    def counts(self) -> tuple[int, int]:
        """(updates skipped, updates skipped in a row); waits for the device."""
        skipped, row = self._counts.tolist()
        return skipped, row

    def summary(self) -> Summary:
        """Reads the window on the host and empties it. Collective; the one host synchronisation of a logging step."""
        rows = self.summed()
        total = torch.zeros(3, dtype=torch.float64, device=rows.device)
        for row in rows[: self.filled].unbind(0):  # in the order of the steps, whatever a library's sum would do
            total = total + row
        loss, correct, samples, norm, skipped, in_a_row = torch.cat(
            [total, self._norm.double().view(1), self._counts.double()]).tolist()
        self._rows.zero_()
        self.filled = 0
        mean, share = (loss / samples, correct / samples) if samples else (math.nan, math.nan)  # all were damaged
        return Summary(mean, share, int(samples), norm, int(skipped), int(in_a_row))

    def restore(self, rows: Tensor | None, *, filled: int, skipped: int, in_a_row: int, owner: bool) -> None:
        """Puts back what a checkpoint held; only the owner (rank 0) takes the summed rows.

        An open window may be longer than this one (`log.steps` was lowered): the next step closes it.
        """
        self._rows = self._rows.new_zeros(max(self._steps, filled + 1), 3)
        if rows is not None and owner:
            self._rows[:filled] = rows[:filled].to(self._rows.device)
        self.filled = filled
        self._counts = torch.tensor([skipped, in_a_row], dtype=torch.int64).to(self._rows.device)
