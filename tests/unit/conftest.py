"""What several unit tests stand on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from alexnet_ddp import distributed
from alexnet_ddp.distributed import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A group of one on gloo, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield distributed.join(device="cpu", timeout=60)
    distributed.leave()
    torch.set_num_threads(threads)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes are kept where the test ends with them."""
    monkeypatch.setenv("ALEXNET_DDP_CACHE", str(tmp_path / "cache"))
