"""What an exception that ends a rank counts as, for whoever decides about another start."""

from __future__ import annotations

import errno

import pytest
import torch
import torch.distributed as dist

from alexnet_ddp.checkpoint.store import NotFinite
from alexnet_ddp.checkpoint.writer import SaveFailed
from alexnet_ddp.errors import DeviceFailed, Diverged, OutOfMemory, Unreadable, UserError
from alexnet_ddp.lease import LeaseLost
from alexnet_ddp.watchdog import Failure, kind_of

REFUSED = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."


@pytest.mark.parametrize(("error", "kind"), [
    (UserError("data.train=... nothing is there"), "user"),
    (OutOfMemory("out of memory with micro_batch=128"), "memory"),
    (Diverged("not finite in 20 steps in a row"), "nonfinite"),
    (NotFinite("conv1.weight holds inf or nan"), "nonfinite"),
    (DeviceFailed("cuda:0 can't be used"), "device"),
    (Unreadable("Can't read a.jpg: Stale file handle"), "disk"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory"),
    (RuntimeError(REFUSED), "memory"),
    (MemoryError(), "memory"),
    (SaveFailed("3 in a row"), "disk"),
    (LeaseLost("this process no longer owns it"), "disk"),
    (OSError(errno.ENOSPC, "No space left on device"), "disk"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory"), "disk"),
    (dist.DistBackendError("NCCL communicator was aborted"), "network"),
    (dist.DistNetworkError("The client socket has timed out"), "network"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"), "network"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "network"),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "device"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device"),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "device"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "bug"),
    (KeyError("cuda"), "bug"),
    (AssertionError(), "bug"),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_kinds(error: Exception, kind: str) -> None:
    """Each way for a rank to fail is told apart from the others, and what is not known is a bug."""
    assert kind_of(error) == kind


def test_record() -> None:
    """state.json gets rank, host, step, cause in one line and kind of a failure."""
    failure = Failure(3, "n2", 17, "first\nsecond", "hung", detail="a long stack", reported_by=0)
    assert failure.record() == {"rank": 3, "host": "n2", "step": 17, "cause": "first second", "kind": "hung"}
