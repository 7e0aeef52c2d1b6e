"""Batches from the host's slots to the device, and the slots back to their pool once the copy has happened."""

from __future__ import annotations

import torch
from torch import Tensor

from alexnet_ddp.data import raw
from alexnet_ddp.data.caches.device_cache import DeviceCache
from alexnet_ddp.data.loader import Batch


class Transfer:
    """Copies to the device and gives the slot back: on CUDA with the event of the asynchronous copy.

    Raw records (`is_raw`) are cropped and resized there to `size` and `channels`; `cache` keeps them there.
    """

    def __init__(self, device: torch.device, *, is_raw: bool, size: int, channels: int,
                 cache: DeviceCache | None = None) -> None:
        self._device, self._is_raw, self._size, self._channels, self._cache = device, is_raw, size, channels, cache

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(images uint8 [n, size, size, channels], labels int64 [n]) on the device."""
        samples, sent = batch.work.samples, batch.sent
        views = batch.views.copy() if self._is_raw else batch.views  # the slot is about to be another batch's
        labels = torch.from_numpy(batch.labels)
        if self._device.type == "cpu":
            images = batch.images.clone()
            batch.release()
        else:
            images = batch.images.to(self._device, non_blocking=True)
            labels = labels.to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            batch.release(copied)
        if self._cache is not None:
            images = self._cache.exchange(samples, sent, images)
        if self._is_raw:
            images = raw.show(images, views, size=self._size, channels=self._channels)
        return images, labels
