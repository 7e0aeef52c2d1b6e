"""What a rank is fed with: its records, where they are kept, and the loaders and transfers that bring them to a device.

    feed = Feed(config, records, index.labels, decoder, crop="random", device=device, threads=4)
    with feed.loader(rows=128) as loader:
        for batch in loader.run(works):
            images, labels = feed.transfer(batch)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet_ddp.config import Config
from alexnet_ddp.data.caches.cache import NOT_OURS, CachedRecords, home_of, open_cache, sweep_caches
from alexnet_ddp.data.caches.device_cache import DeviceCache
from alexnet_ddp.data.decoding import views
from alexnet_ddp.data.decoding.decode import Decoder
from alexnet_ddp.data.decoding.stages import CHANNELS, Stage, parse_stage
from alexnet_ddp.data.loader import Loader, Times
from alexnet_ddp.data.records import Records, StoredRecords
from alexnet_ddp.data.training import Data
from alexnet_ddp.data.transfer import Transfer
from alexnet_ddp.errors import UserError

WAITING = 0.05  # share of the time without data from which on the input, not the step, is what binds


class Feed:
    """Loaders and the transfer for one kind of view (`crop` as in the recipe's augment section) of some records."""

    def __init__(self, config: Config, records: Records, labels: NDArray[np.int32], decoder: Decoder, *, crop: str,
                 device: torch.device, threads: int, kept: DeviceCache | None = None) -> None:
        self._config, self._records, self._labels, self._decoder = config, records, labels, decoder
        self._device, self._threads, self._kept = device, threads, kept
        self._shape = slot_shape(records.stage, crop=crop, size=config.augment.size, whole=kept is not None,
                                 channels=config.model.in_channels)
        self.transfer = Transfer(device, is_raw=records.stage.kind == "raw", size=config.augment.size,
                                 channels=config.model.in_channels, cache=kept)

    def loader(self, *, rows: int) -> Loader:
        """A loader for batches of at most `rows` images; runs once."""
        return Loader(self._records, self._labels, self._decoder, rows=rows, shape=self._shape, threads=self._threads,
                      prefetch=self._config.data.prefetch, pin=self._device.type == "cuda", resident=self._kept,
                      on_error=self._config.data.on_error)

    @property
    def cached(self) -> float | None:
        """Share of this rank's records that its cache holds; None without a cache."""
        if self._kept is not None:
            return self._kept.share
        if not isinstance(self._records, CachedRecords):
            return None
        progress = self._records.progress()
        return progress.held / max(1, progress.samples)

    def check(self) -> None:
        """Raises what went wrong in the background of a cache."""
        if isinstance(self._records, CachedRecords):
            self._records.check()

    def close(self, *, finished: bool) -> None:
        """Lets go of the node's cache, and takes it away where the run has finished."""
        if isinstance(self._records, CachedRecords):
            (self._records.remove if finished else self._records.close)()


def slot_shape(stage: Stage, *, crop: str, size: int, channels: int, whole: bool) -> tuple[int, int, int]:
    """(height, width, channels) of an image in a slot: pure.

    Decoded images are cropped to `size` already. Raw records keep their width, and where crops only cut them only the
    rows that are shown are sent, unless the device is to keep `whole` records.
    """
    if stage.kind != "raw":
        return size, size, channels
    only_cut = crop in ("random", "center") and views.short_for(size) == stage.pixels
    return (size if only_cut and not whole else stage.pixels), stage.pixels, CHANNELS


def training_records(config: Config, data: Data, *, rank: int, world: int, neighbours: Collection[int],
                     say: Callable[[str], None]) -> Records:
    """The training data's records in the declared stage, with the node's cache in front where one is asked for.

    `neighbours`: the ranks on this node. Raises UserError.
    """
    records = StoredRecords(data.train, config.data.stored, say=say)
    kind = config.data.cache
    if kind != "disk" and kind != "ram":
        return records
    return open_cache(records, kind=kind, index=data.train, order=data.order, rank=rank, world=world,
                      neighbours=neighbours, run_dir=config.run_dir, ids=data.train_ids,
                      base=cache_dir(config), limit_bytes=cache_limit(config), say=say)


def device_cache(config: Config, data: Data, *, rank: int, world: int, most_rows: int,
                 device: torch.device) -> DeviceCache | None:
    """The memory on `device` for this rank's share of the raw records; None unless asked for. Raises UserError."""
    if config.data.cache != "gpu":
        return None
    home = home_of(data.order, samples=len(data.train), rank=rank, world=world, ids=data.train_ids)
    try:
        return DeviceCache(np.flatnonzero(home != NOT_OURS), side=parse_stage(config.data.stored).pixels,
                           most_rows=most_rows, device=device, limit=cache_limit(config))
    except torch.OutOfMemoryError:
        raise UserError(f"data.cache=gpu: {device} hasn't the memory for data.cache_gb={config.data.cache_gb:g}. Use a "
                        "smaller one, or leave it out: then what is free but a fifth of the device is used.") from None


def cache_limit(config: Config) -> int | None:
    return None if config.data.cache_gb is None else int(config.data.cache_gb * 1e9)


def sweep(config: Config) -> None:
    """Takes away what finished runs of this user left in the node's caches: this run's own, too, of a kind that it had
    before."""
    kinds: tuple[Literal["disk", "ram"], ...] = ("disk", "ram")
    for kind in kinds:
        sweep_caches(kind, base=cache_dir(config) if kind == config.data.cache else None)


def cache_dir(config: Config) -> Path | None:
    return Path(config.data.cache_dir).expanduser() if config.data.cache_dir else None


def what_binds(times: Times, *, seconds: float) -> str:
    """What held training up in a window of `seconds`: `step`, `storage`, `decode` or `copy`. Pure."""
    if times.waiting < WAITING * seconds:
        return "step"
    return max((times.reading, "storage"), (times.decoding, "decode"), (times.copying, "copy"))[1]
