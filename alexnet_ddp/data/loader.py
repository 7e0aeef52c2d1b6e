"""Decode threads that fill preallocated uint8 batch slots ahead of the step.

One feeder thread walks the order, draws what is random and hands chunks of images to the decode threads; they write
straight into the slots of a bounded pool. There are no worker processes, no collation and no floats on the host.
Batches come out in order. A slot returns to the pool once the event of its copy to the device has happened. Every
error surfaces in the loop that takes the batches.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet_ddp.data.decode import ChooseView, DamagedImage, Decoder
from alexnet_ddp.data.index import Index
from alexnet_ddp.data.randomness import Draws
from alexnet_ddp.data.records import StoredRecords
from alexnet_ddp.errors import Unreadable, UserError

CHUNK = 16  # images a task: makes the pool's dispatch cost (25 us) vanish beside the decoding

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """One micro-batch to be made: which samples, and how each is shown. `micro` counts from 0 to `micros` - 1."""

    step: int
    micro: int
    micros: int
    samples: I64  # sample ids, [n]
    choose: Callable[[int], ChooseView]  # row -> (width, height) -> view
    draws: Draws | None = None
    mask: NDArray[np.bool_] | None = None  # evaluation: rows that count (the rest is padding)


class Event(Protocol):
    """The end of a copy out of a slot (torch.cuda.Event has this shape)."""

    def synchronize(self) -> None: ...


@dataclass
class Slot:
    """Memory for one micro-batch: uint8 [rows, size, size, channels], pinned where a GPU reads it."""

    images: torch.Tensor
    views: NDArray[np.int32]  # [rows, 8], as View.numbers()


class SlotPool:
    """A fixed number of slots; `take` waits for one that is free and whose last copy has happened."""

    def __init__(self, count: int, *, rows: int, size: int, channels: int, pin: bool) -> None:
        self._free: deque[tuple[Slot, Event | None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        for _ in range(count):
            images = torch.empty((rows, size, size, channels), dtype=torch.uint8, pin_memory=pin)
            self._free.append((Slot(images, np.zeros((rows, 8), np.int32)), None))

    def take(self) -> Slot | None:
        """A slot that nobody reads any more; None once the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                return None
            slot, copied = self._free.popleft()
        if copied is not None:
            copied.synchronize()
        return slot

    def give_back(self, slot: Slot, copied: Event | None) -> None:
        """Returns a slot; `copied` is the event after its copy, None when the copy is done."""
        with self._changed:
            self._free.append((slot, copied))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass
class Batch:
    """A finished micro-batch on the host. Give the slot back through `release`, with the event of its copy."""

    work: Work
    slot: Slot
    labels: I64
    _pool: SlotPool

    @property
    def images(self) -> torch.Tensor:
        """uint8 [n, size, size, channels], on the host."""
        return self.slot.images[: len(self.work.samples)]

    @property
    def views(self) -> NDArray[np.int32]:
        return self.slot.views[: len(self.work.samples)]

    def release(self, copied: Event | None = None) -> None:
        self._pool.give_back(self.slot, copied)


class Loader:
    """Makes the batches of a sequence of works, in order, `prefetch` of them ahead.

        with Loader(index, decoder, ...) as loader:
            for batch in loader.run(works):
                ...
                batch.release(event)

    Raises UserError for a damaged image (names the file, the offset and the sample), when that batch's turn comes.
    """

    def __init__(self, index: Index, decoder: Decoder, *, rows: int, size: int, channels: int, threads: int,
                 prefetch: int, stored: str = "original", pin: bool = False) -> None:
        self._index, self._decoder, self._records = index, decoder, StoredRecords(index, stored)
        self._pool_of_threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._slots = SlotPool(prefetch + 1, rows=rows, size=size, channels=channels, pin=pin)
        self._ready: queue.Queue[tuple[Batch, list[Future[None]]] | BaseException | None] = queue.Queue(prefetch)
        self._closing = threading.Event()
        self._feeder: threading.Thread | None = None
        self.waited = 0.0  # seconds that `run` has waited for data so far

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, works: Iterator[Work]) -> Iterator[Batch]:
        """Yields the batch of each work in turn; may be called once."""
        assert self._feeder is None, "a loader runs once"
        self._feeder = threading.Thread(target=self._feed, args=(works,), name="feeder", daemon=True)
        self._feeder.start()
        while True:
            started = time.perf_counter()
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            batch, chunks = item
            for chunk in chunks:
                chunk.result()
            self.waited += time.perf_counter() - started
            yield batch

    def _feed(self, works: Iterator[Work]) -> None:
        try:
            for work in works:
                slot = self._slots.take()
                if slot is None:
                    return
                assert len(work.samples) <= slot.images.shape[0]
                batch = Batch(work, slot, self._index.labels[work.samples].astype(np.int64), self._slots)
                chunks = [self._pool_of_threads.submit(self._fill, batch, first)
                          for first in range(0, len(work.samples), CHUNK)]
                self._put((batch, chunks))
            self._put(None)
        except BaseException as error:  # surfaces where the batches are taken
            self._put(error)

    def _put(self, item: tuple[Batch, list[Future[None]]] | BaseException | None) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.2)
                return

    def _fill(self, batch: Batch, first: int) -> None:
        pixels = batch.slot.images.numpy()
        for row in range(first, min(first + CHUNK, len(batch.work.samples))):
            if self._closing.is_set():
                return
            if batch.work.mask is not None and not batch.work.mask[row]:
                pixels[row] = 0
                continue
            sample = int(batch.work.samples[row])
            try:
                data = self._records.read(sample)
                view = self._decoder(data, batch.work.choose(row), pixels[row])
            except DamagedImage as error:
                raise UserError(f"Damaged image: {self._index.where(sample)} (sample {sample}): {error}.\n"
                                f"Replace or remove that file and start again.") from None
            except OSError as error:
                raise Unreadable(f"Can't read {self._index.where(sample)} (sample {sample}): "
                                 f"{error.strerror or error}.") from None
            batch.slot.views[row] = view.numbers()

    def close(self) -> None:
        """Stops and joins all threads; what was decoded ahead is dropped."""
        self._closing.set()
        self._slots.close()
        if self._feeder is not None:
            self._feeder.join()
        self._pool_of_threads.shutdown(wait=True, cancel_futures=True)


def micro_batches(samples: I64, micro_batch: int) -> Sequence[slice]:
    """Cuts of a rank's part of a global batch: at least one, which is empty when the rank has no samples."""
    cuts = [slice(first, min(first + micro_batch, len(samples))) for first in range(0, len(samples), micro_batch)]
    return cuts or [slice(0, 0)]


def decode_threads(wanted: int | str, *, cores: int) -> int:
    """Decode threads of one rank: as asked for, else as many as it has cores."""
    return wanted if isinstance(wanted, int) else cores
