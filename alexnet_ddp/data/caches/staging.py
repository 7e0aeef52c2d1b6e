"""Fills a cache in the background: a thread that reads the source in the order in which it is stored.

One pass over all records that this rank wants, not shard by shard: the samples of a virtual shard lie scattered over
the whole source, so a pass per shard would read across it once for each, and never in sequence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from alexnet_ddp.data.decoding.decode import DamagedImage
from alexnet_ddp.data.index import Index
from alexnet_ddp.errors import UserError

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]


def storage_order(index: Index, samples: I64) -> I32:
    """The samples in the order in which their bytes lie in the source (tar by tar; a folder's by class and name)."""
    table = index.table
    return samples[np.lexsort((samples, table.offsets[samples], table.containers[samples]))].astype(np.int32)


class Stager:
    """A thread that calls `fill(sample)` for each sample until it says False, or is closed.

    A sample that the source can't give is left out: the loader meets it when its turn comes, and names it. Anything
    else that goes wrong is given to `failed`.
    """

    def __init__(self, samples: I32, fill: Callable[[int], bool], failed: Callable[[BaseException], None]) -> None:
        self._samples, self._fill, self._failed = samples, fill, failed
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="staging", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            for sample in self._samples:
                if self._closing.is_set():
                    return
                try:
                    if not self._fill(int(sample)):
                        return
                except (OSError, DamagedImage, UserError):
                    continue
        except BaseException as error:  # surfaces in the main loop
            self._failed(error)

    def close(self) -> None:
        """Returns when the thread has ended."""
        self._closing.set()
        self._thread.join()
