"""Index and order at a tenth of ImageNet's size: time, memory and handles; benchmarks/scale.py measures the whole."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from alexnet_ddp.data.order import permutation
from benchmarks import scale

TENTH = scale.IMAGENET // 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scale")
    scale.keep_imagenet(place, samples=TENTH)
    return place


def test_a_kept_index_opens_at_once_in_its_own_size(folder: Path) -> None:
    """In a fresh process: 38 bytes a sample, so that ImageNet takes under 64 MB, and a tenth of a second at most."""
    run = scale.fresh("open", folder)
    assert run["columns_mb"] * 10 < 50
    assert run["peak_mb"] < run["columns_mb"] + 8  # what a smaller index takes as well
    assert run["seconds"] < 1.0


def test_two_epochs_leave_nothing_behind(folder: Path) -> None:
    """Works, order and draws of hundreds of steps in two epochs: no growth to speak of, no handle left open."""
    scale.measure_epochs(folder, steps=10)  # what is imported or allocated once
    run = scale.measure_epochs(folder, steps=150)
    assert run["growth_mb"] < 10
    assert run["handles"] == 0


def test_any_place_of_an_epoch_costs_the_same(folder: Path) -> None:
    """Order and draws of a batch take milliseconds at 0, 50 and 99 per cent of an epoch alike."""
    run = scale.measure_batch(folder)
    assert run["at_99_ms"] < 3 * run["at_0_ms"] + 3
    assert max(run.values()) < 200  # on a machine that is busy with other things


def test_a_permutation_holds_one_array() -> None:
    """All of a permutation is its result and chunks: 14 million are 114 MB."""
    permutation(1000, 1)
    tracemalloc.start()
    try:
        found = permutation(1_000_000, 7)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000 + 3_000_000
    assert np.array_equal(np.sort(found), np.arange(1_000_000))
