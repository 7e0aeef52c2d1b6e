"""Batches from the host's slots to the device, and the slots back to their pool once the copy has happened."""

from __future__ import annotations

import torch
from torch import Tensor

from alexnet_ddp.data.loader import Batch


class Transfer:
    """Copies to the device and gives the slot back: on CUDA with the event of the asynchronous copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(images uint8 [n, size, size, channels], labels int64 [n]) on the device."""
        labels = torch.from_numpy(batch.labels)
        if self._device.type == "cpu":
            images = batch.images.clone()
            batch.release()
            return images, labels
        images = batch.images.to(self._device, non_blocking=True)
        labels = labels.to(self._device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        batch.release(copied)
        return images, labels
