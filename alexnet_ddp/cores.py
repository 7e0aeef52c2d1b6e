"""Cores that this process really has: what it may run on, and what its control groups let it use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """At least 1. A container's limit counts (docker --cpus, Kubernetes), which no affinity shows: threads beyond
    it would only be throttled together."""
    return max(1, min(len(os.sched_getaffinity(0)), math.ceil(min(quota(), 2**20))))


def quota(*, own: Path = OWN_GROUPS, root: Path = GROUPS) -> float:
    """Cores' worth of time that the control groups of this process allow, infinite without a limit (cgroup v1, v2)."""
    allowed = math.inf
    for line in _text(own).splitlines():
        _, controllers, place = line.split(":", 2)
        if not controllers:
            base = root
        elif "cpu" in controllers.split(","):
            base = root / "cpu"
        else:
            continue
        for group in _upwards(base / place.strip("/"), base):
            words = (_text(group / "cpu.max").split() or
                     [_text(group / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")])
            try:
                time, period = int(words[0]), int(words[1])
            except (ValueError, IndexError):  # "max", or no such file
                continue
            if time > 0 < period:  # v1 says -1 for no limit
                allowed = min(allowed, time / period)
    return allowed


def _upwards(group: Path, base: Path) -> Iterator[Path]:
    while group.is_relative_to(base):
        yield group
        group = group.parent


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
