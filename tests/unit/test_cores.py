"""Cores that a process has in a container."""

import math
import os
from pathlib import Path

import pytest

from alexnet_ddp import cores


def groups(root: Path, files: dict[str, str], own: str) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "own").write_text(own)
    return root / "own", root


@pytest.mark.parametrize(("files", "own", "expected"), [
    ({}, "", math.inf),
    ({"cpu.max": "250000 100000\n"}, "0::/\n", 2.5),
    ({"cpu.max": "max 100000\n"}, "0::/\n", math.inf),
    ({"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 4.0),
    ({"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "800000 100000\n"}, "0::/a/b\n", 1.0),
    ({"cpu/job/cpu.cfs_quota_us": "300000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
     "4:memory:/job\n3:cpu,cpuacct:/job\n", 3.0),
    ({"cpu/job/cpu.cfs_quota_us": "-1\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, "3:cpu,cpuacct:/job\n", math.inf),
    ({"cpu.max": "nonsense\n"}, "0::/\n", math.inf),
])
def test_quota(tmp_path: Path, files: dict[str, str], own: str, expected: float) -> None:
    """The tightest limit of a control group and those above it counts, in version 1 and 2; nonsense is no limit."""
    here, root = groups(tmp_path, files, own)
    assert cores.quota(own=here, root=root) == expected


def test_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit is rounded up to whole cores, never to none, and never beyond what the process may run on."""
    there = len(os.sched_getaffinity(0))
    for allowed, expected in ((math.inf, there), (0.5, 1), (0.0, 1), (1e9, there)):
        monkeypatch.setattr(cores, "quota", lambda allowed=allowed: allowed)
        assert cores.usable_cores() == expected
