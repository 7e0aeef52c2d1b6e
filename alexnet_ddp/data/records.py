"""Records: the samples' bytes in the stage that the run declares, wherever they are kept.

The loader reads from `Records`; an index that holds the stage (or is converted to it at each read) and the caches in
front of it all look like that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from alexnet_ddp.data.decoding.stages import Stage, parse_stage, to_stage
from alexnet_ddp.data.index import Index
from alexnet_ddp.errors import UserError

if TYPE_CHECKING:
    import torch

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]


class Records(Protocol):
    """Samples of one stage; safe from any number of threads."""

    stage: Stage

    def read(self, sample: int) -> bytes:
        """The record of a sample. Raises OSError, DamagedImage."""
        ...

    def read_into(self, sample: int, out: U8, start: int = 0) -> None:
        """Raw stages: bytes `start` and after of the record into `out` (C-contiguous, as many as it holds)."""
        ...

    def in_memory(self, samples: I64, starts: I64, size: int) -> Sequence[torch.Tensor | None]:
        """Raw stages: of each record its `size` bytes from `start` on where they lie in memory, verified: uint8 [size],
        to be read only. None where `read_into` is the way; nothing at all where it is for all of them."""
        ...

    def where(self, sample: int) -> str:
        """For messages: where a sample lies."""
        ...


class StoredRecords:
    """Straight from an index, converted at each read where the index holds originals and the run wants another stage.

    UserError where the index (a pack) holds another stage than the run declares.
    """

    def __init__(self, index: Index, stage: str) -> None:
        self.stage, self._index = parse_stage(stage), index
        self._converts = index.stage != stage
        if self._converts and index.stage != "original":
            raise UserError(f"{index.source}: holds {index.stage}, the run wants data.stored={stage}. Use data.stored="
                            f"{index.stage} in a new run (name=...): a run begun with {stage} can't switch to it. Or "
                            f"give this run the originals, or a pack of them made with --stage {stage}.")

    def read(self, sample: int) -> bytes:
        data = self._index.read(sample)
        return to_stage(data, self.stage) if self._converts else data

    def read_into(self, sample: int, out: U8, start: int = 0) -> None:
        if self._converts:
            flat = out.reshape(-1)
            flat[...] = np.frombuffer(self.read(sample), np.uint8)[start:start + flat.size]
        else:
            self._index.read_into(sample, out, start)

    def in_memory(self, samples: I64, starts: I64, size: int) -> Sequence[torch.Tensor | None]:
        return ()

    def where(self, sample: int) -> str:
        return self._index.where(sample)
