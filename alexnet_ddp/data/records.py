"""Records: the samples' bytes in the stage that the run declares, wherever they are kept.

The loader reads from `Records`; an index that holds the stage (or is converted to it at each read) and the caches in
front of it all look like that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from alexnet_ddp.data.decoding.stages import Stage, parse_stage, to_stage
from alexnet_ddp.data.index import Index
from alexnet_ddp.errors import UserError

if TYPE_CHECKING:
    import torch

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
T = TypeVar("T")

WAITS = (0.1, 0.3, 0.9, 2.7)  # seconds between the tries of a read: storage that is away for longer fails the run


class Records(Protocol):
    """Samples of one stage; safe from any number of threads."""

    stage: Stage

    def read(self, sample: int) -> bytes:
        """The record of a sample. Raises OSError, DamagedImage."""
        ...

    def read_into(self, sample: int, out: U8, start: int = 0) -> None:
        """Raw stages: bytes `start` and after of the record into `out` (C-contiguous, as many as it holds)."""
        ...

    def copy_into(self, samples: I64, starts: I64, out: torch.Tensor) -> bool:
        """Raw stages: of n records the bytes from `starts` [n] on into `out` (uint8 [n, bytes]), in one call that holds
        no lock, where all of them lie in memory, verified. False, and nothing done, where `read_into` is the way."""
        ...

    def where(self, sample: int) -> str:
        """For messages: where a sample lies."""
        ...


class StoredRecords:
    """Straight from an index, converted at each read where the index holds originals and the run wants another stage.

    A read that fails is tried again, its file opened anew, after WAITS (`pause` sleeps so many seconds); `say` is told
    of the first. UserError where the index (a pack) holds another stage than the run declares.
    """

    def __init__(self, index: Index, stage: str, *, say: Callable[[str], None] = lambda line: None,
                 pause: Callable[[float], None] = time.sleep) -> None:
        self.stage, self._index = parse_stage(stage), index
        self._say: Callable[[str], None] | None = say
        self._pause = pause
        self._converts = index.stage != stage
        if self._converts and index.stage != "original":
            raise UserError(f"{index.source}: holds {index.stage}, the run wants data.stored={stage}. Use data.stored="
                            f"{index.stage} in a new run (name=...): a run begun with {stage} can't switch to it. Or "
                            f"give this run the originals, or a pack of them made with --stage {stage}.")

    def read(self, sample: int) -> bytes:
        data = self._patiently(sample, lambda: self._index.read(sample))
        return to_stage(data, self.stage) if self._converts else data

    def read_into(self, sample: int, out: U8, start: int = 0) -> None:
        if self._converts:
            flat = out.reshape(-1)
            flat[...] = np.frombuffer(self.read(sample), np.uint8)[start:start + flat.size]
        else:
            self._patiently(sample, lambda: self._index.read_into(sample, out, start))

    def copy_into(self, samples: I64, starts: I64, out: torch.Tensor) -> bool:
        return False

    def where(self, sample: int) -> str:
        return self._index.where(sample)

    def _patiently(self, sample: int, read: Callable[[], T]) -> T:
        """What `read` gives at the first try that succeeds. Raises the last one's OSError."""
        for seconds in WAITS:
            try:
                return read()
            except OSError as error:
                say, self._say = self._say, None
                if say is not None:
                    say(f"{self.where(sample)} can't be read ({error.strerror or error}); this and any other read that "
                        f"fails is tried again for {sum(WAITS):.0f} s")
            self._pause(seconds)
            with contextlib.suppress(OSError):  # the read will meet it, too
                self._index.reopen(sample)
        return read()
