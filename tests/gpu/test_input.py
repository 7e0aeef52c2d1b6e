"""Input on a real GPU: what feeds the step by pinned slots and from the GPU's memory runs, and its command does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_input

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


def test_input_benchmark(tmp_path: Path) -> None:
    """Synthetic data, host memory and the GPU-memory cache all feed the real step in bf16; the cache holds all."""
    assert gpu_input.run(["--quick", "--json", str(tmp_path / "g.json")]) == 0
    found = json.loads((tmp_path / "g.json").read_text())
    assert found["device"] == torch.cuda.get_device_name() and found["options"]["amp"] == "bf16"
    assert {row["source"] for row in found["rows"]} == set(gpu_input.SOURCES)
    assert all(row["rate"] > 0 for row in found["rows"])
    assert all(row["kept"] == 1.0 for row in found["rows"] if row["source"] == "gpu")
