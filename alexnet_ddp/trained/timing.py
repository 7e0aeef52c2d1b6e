"""How long a net takes, and how much memory: what `compare`, `quantize` and `prune` measure with.

A shared machine is faster in one second than in the next. So what is compared is run in turns, in rounds, and the
median of a round's calls is one measurement: other work that lasts a round shows in the spread, not in the result.

    before, after = latencies([net, smaller], [image, image], seconds=5.0)
    print(f"{before.milliseconds} -> {after.milliseconds} ms")
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from alexnet_ddp.cores import usable_cores

ROUNDS = 5
WARM_CALLS = 3  # the first ones choose kernels and fetch memory
PROC = Path("/proc/self")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over n rounds, each the median of its `calls / n` calls; the quickest and the
    slowest round."""

    median: float
    low: float
    high: float
    n: int
    calls: int

    @classmethod
    def of(cls, rounds: Sequence[Sequence[float]]) -> Timing:
        """rounds: seconds of every call of each round; none of them is empty. Pure."""
        medians = [statistics.median(calls) for calls in rounds]
        return cls(statistics.median(medians), min(medians), max(medians), len(medians), sum(map(len, rounds)))

    @property
    def milliseconds(self) -> str:
        """`12.3 (11.9 to 14.0)`: median, quickest and slowest round."""
        low, high = (short(1e3 * value) for value in (self.low, self.high))
        return f"{short(1e3 * self.median)} ({low} to {high})"

    def rate(self, items: int) -> str:
        """Items a second, where a call takes `items`: `1,234 (1,100 to 1,300)`."""
        low, high = (short(items / value) for value in (self.high, self.low))
        return f"{short(items / self.median)} ({low} to {high})"


def short(value: float) -> str:
    """Three digits, without an exponent: 0.0123, 1.23, 12.3, 123, 1,234."""
    if value >= 100 or value <= 0:
        return f"{value:,.0f}"
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:.1f}"


def latency(net: Callable[[Tensor], Any], inputs: Tensor, *, seconds: float = 2.0, rounds: int = ROUNDS) -> Timing:
    """How long net(inputs) takes, inputs on the net's device, in about `seconds`. The net is taken as it is: eval() is
    the caller's."""
    return latencies([net], [inputs], seconds=seconds, rounds=rounds)[0]


@torch.no_grad()
def latencies(nets: Sequence[Callable[[Tensor], Any]], inputs: Sequence[Tensor], *, seconds: float = 2.0,
              rounds: int = ROUNDS) -> list[Timing]:
    """`latency` of each net on its own inputs, in turns; `seconds` for each."""
    works = [(lambda net=net, batch=batch: net(batch), batch.device) for net, batch in zip(nets, inputs, strict=True)]
    taken: list[list[list[float]]] = [[] for _ in works]
    for work, device in works:
        timed(work, device=device, seconds=0.0, calls=WARM_CALLS)
    for _ in range(rounds):
        for place, (work, device) in enumerate(works):
            taken[place].append(timed(work, device=device, seconds=seconds / rounds))
    return [Timing.of(each) for each in taken]


def timed(work: Callable[[], Any], *, device: torch.device, seconds: float, calls: int = 1) -> list[float]:
    """Seconds of each call of `work`, called until `seconds` are over, but at least `calls` times.

    A call ends when the device has done it. Python's garbage collector waits meanwhile.
    """
    taken: list[float] = []
    collects = gc.isenabled()
    gc.disable()
    try:
        wait_for(device)
        end = time.perf_counter() + seconds
        while len(taken) < calls or time.perf_counter() < end:
            began = time.perf_counter()
            work()
            wait_for(device)
            taken.append(time.perf_counter() - began)
    finally:
        if collects:
            gc.enable()
    return taken


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- memory -----------------------------------------------------------------------------------------------------


def held(device: torch.device) -> int:
    """Bytes held now: by this process in the machine's memory (resident set), or by its tensors in a GPU's."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start_peak(device: torch.device) -> None:
    """From here on `peak` tells the most that is held; where the kernel forbids that (a hardened container), the most
    since the process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (PROC / "clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return


def peak(device: torch.device) -> int:
    """The most bytes that were held at once, by the kernel's account (VmHWM) or by torch's allocator for the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in (PROC / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# --- what figures hold for --------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure must be told with: device, cores, threads, load, versions and date."""
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    return {**gpu, "cpu": cpu, "cores": usable_cores(), "threads": torch.get_num_threads(),
            "omp": os.environ.get("OMP_WAIT_POLICY", "unset"), "load": round(os.getloadavg()[0], 1),
            "python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__), "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def machine_line(told: dict[str, Any]) -> str:
    """`machine` in one line, for people."""
    gpu = f"{told['gpu']} (CUDA {told['cuda']}), " if "gpu" in told else ""
    return (f"{gpu}{told['cpu']}, {told['cores']} cores, {told['threads']} threads (OMP_WAIT_POLICY {told['omp']}), "
            f"load {told['load']} before, Python {told['python']}, torch {told['torch']}, torchvision "
            f"{told['torchvision']}, {told['date']}")
