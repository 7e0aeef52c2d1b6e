"""A function over many items on all cores, with results in the order of the items and bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from alexnet_ddp.cores import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # items begun or finished ahead of the one whose turn it is, for each thread


def cores_here() -> int:
    """Cores that this process may use: those it really has, or fewer where Slurm gave its task fewer."""
    usable, of_task = usable_cores(), os.environ.get("SLURM_CPUS_PER_TASK", "")
    return max(1, min(usable, int(of_task))) if of_task.isdigit() else usable


def in_order(function: Callable[[Item], Result], items: Iterable[Item], *, threads: int) -> Iterator[Result]:
    """Yields function(item) for each item in turn, `threads` at once; raises what a call raised when its turn comes.

    Items are taken as they are needed, so that results held in memory are bounded. Closing the generator waits for
    the calls under way and drops the rest.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="work")
    waiting: deque[Future[Result]] = deque()
    source = iter(items)
    try:
        for item in islice(source, AHEAD * threads):
            waiting.append(pool.submit(function, item))
        while waiting:
            result = waiting.popleft().result()
            for item in islice(source, 1):
                waiting.append(pool.submit(function, item))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
