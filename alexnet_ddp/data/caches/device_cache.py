"""`data.cache: gpu`: a rank's share of raw uint8 records, kept in its device's memory.

Under owner assignment a rank always trains on the same samples. Each is sent once, when its batch comes up for the
first time, and stays; from the second epoch on the host sends nothing but sample numbers and views. Where memory
doesn't hold all, the rest is sent in every epoch.

Which records are there is decided by the feeder, in the order of the batches, and the device writes and reads them in
that same order. So a record that a batch counts on has been written by an earlier one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_ddp.errors import UserError

I64 = NDArray[np.int64]
SPARED = 0.2  # share of the device's memory left for activations, when no limit is given


class DeviceCache:
    """Records uint8 [side, side, 3] of the samples `mine` (ids, int64 [m], each once), on `device`. Others' samples,
    which a batch may have as guests to be mixed with, are sent every time.

    `most_rows` is the largest batch; `limit` the most bytes to use, None for what is free but a fifth of the device.
    UserError where not even a batch fits.
    """

    def __init__(self, mine: I64, *, side: int, most_rows: int, device: torch.device, limit: int | None) -> None:
        self._ids = np.sort(mine)
        record = side * side * 3
        capacity = min(len(mine), (free_bytes(device) if limit is None else limit) // record - most_rows)
        if capacity < min(1, len(mine)):  # of fewer samples than ranks, a rank may have none
            raise UserError(
                f"data.cache=gpu keeps raw{side} records of {record:,} bytes on {device}, and there isn't room for one "
                f"batch of {most_rows} and a record. Use a smaller rawN, a smaller micro_batch, a larger "
                f"data.cache_gb, or data.cache=ram.")
        self._there = np.zeros(len(mine), bool)  # what the feeder has had sent so far
        self._capacity = capacity = max(0, capacity)
        # the rows behind the capacity are for records of one batch that aren't kept
        self._records = torch.empty((capacity + most_rows, side, side, 3), dtype=torch.uint8, device=device)

    @property
    def share(self) -> float:
        """Share of the rank's records that are on the device, or on their way."""
        return float(self._there.mean()) if len(self._there) else 1.0

    @property
    def capacity(self) -> int:
        """Records there is room for."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        return self._records.numel()

    def absent(self, samples: I64) -> NDArray[np.bool_]:
        """Which of the next batch's samples must be sent: bool [n]. The feeder's; they count as there from now on."""
        places = self._places(samples)
        mine = places < len(self._there)
        absent = np.ones(len(samples), bool)
        absent[mine] = ~self._there[places[mine]]
        self._there[places[places < self._capacity]] = True
        return absent

    def exchange(self, samples: I64, sent: I64, records: Tensor) -> Tensor:
        """Takes in the records that were sent (uint8 [m, side, side, 3], for rows `sent` of the batch) and gives out
        those of the whole batch: uint8 [n, side, side, 3]. Never waits for the device."""
        places = self._places(samples)
        passing = places >= self._capacity
        places[passing] = self._capacity + np.arange(int(passing.sum()))
        where = torch.from_numpy(places).to(self._records.device, non_blocking=True)
        if len(sent):
            rows = torch.from_numpy(sent).to(self._records.device, non_blocking=True)
            self._records.index_copy_(0, where[rows], records)
        return self._records.index_select(0, where)

    def _places(self, samples: I64) -> I64:
        """Places of samples among this rank's; behind all of them for another rank's."""
        places = np.searchsorted(self._ids, samples)
        if not len(self._ids):
            return places.astype(np.int64)
        mine = self._ids[np.minimum(places, len(self._ids) - 1)] == samples
        return np.where(mine, places, len(self._ids)).astype(np.int64)


def free_bytes(device: torch.device) -> int:
    """What a cache may take of a device's memory: what is free, but a fifth of the whole."""
    if device.type != "cuda":
        import os

        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(pages - SPARED * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    free, total = torch.cuda.mem_get_info(device)
    return int(free - SPARED * total)
