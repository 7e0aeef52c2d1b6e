"""One optimizer step: accumulate, sum over ranks, find infinities, clip, move the weights and their mean."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_ddp.ema import Ema
from alexnet_ddp.loss import Targets, sample_losses
from alexnet_ddp.metrics import Window
from alexnet_ddp.models.dropout import set_dropout_rows

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class MicroBatch:
    """What one forward takes, on the device; n may be 0."""

    pixels: Tensor  # float32 [n, channels, size, size], normalised
    targets: Targets
    dropout_rows: Tensor  # int64 [n], the samples' dropout keys
    last: bool  # the step's last on this rank: its backward sums the gradients over the ranks


# DDP reads this function's annotations, so this module keeps them as objects (no `from __future__`).
def sum_gradients(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook: plain sum over ranks. Losses are already divided by the whole global batch."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def wrap(net: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The net under DDP: gradients are plain sums over ranks, and batch-norm statistics stay each rank's own."""
    # torch renames the switch; the new one is there from the version on that warns of the old.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings: dict[str, Any] = {"gradient_as_bucket_view": True, switch: False}
    if device.type == "cuda":
        settings["device_ids"] = [device.index]
    ddp = DistributedDataParallel(net, **settings)
    ddp.register_comm_hook(None, sum_gradients)
    return ddp


@contextlib.contextmanager
def sync_debug(on: bool) -> Iterator[None]:
    """Where `on`, any call within that makes the host wait for the GPU raises (torch.cuda.set_sync_debug_mode)."""
    if on:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if on:
            torch.cuda.set_sync_debug_mode("default")


class Step:
    """Takes optimizer steps. Counters stay on the device; nothing here waits for it."""

    def __init__(self, net: DistributedDataParallel, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                 *, amp: str, clip_norm: float | None, tick: Callable[[str], None], smoothing: float = 0.0,
                 ema: Ema | None = None) -> None:
        self.net, self.optimizer, self.scaler, self.ema = net, optimizer, scaler, ema
        self._dtype, self._clip, self._tick, self._smoothing = AMP[amp], clip_norm, tick, smoothing
        self._parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self._device = self._parameters[0].device
        self._norm = torch.zeros((), device=self._device)
        optimizer.register_step_pre_hook(self._skip_unless_finite)

    @property
    def mean(self) -> dict[str, Tensor]:
        """The live running mean of the weights by parameter name; empty where none is kept."""
        return {} if self.ema is None else self.ema.tensors

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)

    def __call__(self, micro_batches: Iterable[MicroBatch], *, lr: float, planned: int, window: Window,
                 ema_decay: float | None = None) -> None:
        """One step over a rank's part of a global batch of `planned` samples; the mean keeps `ema_decay` of itself."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)

        for batch in micro_batches:
            self._tick("compute")
            with contextlib.nullcontext() if batch.last else self.net.no_sync():
                set_dropout_rows(self.net.module, batch.dropout_rows)
                with self.autocast():
                    logits = self.net(batch.pixels)
                losses = sample_losses(logits, batch.targets, smoothing=self._smoothing)
                if batch.last:
                    self._tick("reduce")
                self.scaler.scale(losses.sum() / planned).backward()  # the last one sums over ranks
            window.add(losses.detach(), logits.detach(), batch.targets)
        self._tick("gradients")

        self.scaler.unscale_(self.optimizer)  # in every precision: this is what finds inf and nan, on the device
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)  # of the true gradients, before clipping; same on all ranks
        if self._clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        self._norm = norm
        self.scaler.step(self.optimizer)  # the fused optimizer skips itself where an infinity was found
        self.scaler.update(None if self._dtype is torch.float16 else 1.0)
        if self.ema is not None and ema_decay is not None:
            self.ema.update(ema_decay, norm=norm)
        window.close_step(norm)

    def _skip_unless_finite(self, optimizer: Any, *_: object) -> None:
        """The norm decides, which the window counts by: that of finite but huge gradients may overflow.

        The scaler has told the optimizer what it found in the gradients by now.
        """
        optimizer.found_inf = torch.maximum(optimizer.found_inf, (~torch.isfinite(self._norm)).float())
