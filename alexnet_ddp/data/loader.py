"""Decode threads that fill preallocated uint8 batch slots ahead of the step.

One feeder thread walks the order, draws what is random and hands chunks of images to the decode threads; they write
straight into the slots of a bounded pool: JPEG stages decoded, cropped and resized, raw stages as they are stored.
There are no worker processes, no collation and no floats on the host. Batches come out in order. A slot returns to the
pool once the event of its copy to the device has happened. Every error surfaces in the loop that takes the batches.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet_ddp.data.decoding.decode import DamagedImage, Decoder
from alexnet_ddp.data.decoding.views import ChooseView, Views
from alexnet_ddp.data.mixing import Mixing
from alexnet_ddp.data.randomness import Draws
from alexnet_ddp.data.raw import TOP, Y, only_cut
from alexnet_ddp.data.records import Records
from alexnet_ddp.errors import Unreadable, UserError

CHUNK, LONG_CHUNK = 16, 32  # images a task: makes the pool's dispatch cost (25 us) vanish beside the decoding
FEW = 8  # threads up to which the long chunks of a batch, and of those ahead, are enough for all: 2 % more images
RAW_CHUNK = 128  # the same beside the copying, which takes 1/20 of the time and holds no lock

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """One micro-batch to be made: which samples, and how each is shown. `micro` counts from 0 to `micros` - 1.

    The last `guests` samples are of other micro-batches or ranks, and only there for the others to be mixed with.
    """

    step: int
    micro: int
    micros: int
    samples: I64  # sample ids, [n]
    choose: Callable[[int], ChooseView]  # row -> (width, height) -> view
    draws: Draws | None = None
    mask: NDArray[np.bool_] | None = None  # evaluation: rows that count (the rest is padding)
    choose_all: Callable[[int, int], Views] | None = None  # `choose` of all rows at once, for images of one size
    guests: int = 0
    mixing: Mixing | None = None

    @property
    def own(self) -> slice:
        """The rows that are trained on."""
        return slice(0, len(self.samples) - self.guests)

    def views(self, width: int, height: int) -> Views:
        """All views, where all images have this size: int32 [n, 8]."""
        if self.choose_all is not None:
            return self.choose_all(width, height)
        rows = [self.choose(row)(width, height) for row in range(len(self.samples))]
        return np.array(rows, np.int32).reshape(-1, 8)


class Resident(Protocol):
    """What the device keeps of the records (device_cache); asked in the order of the batches."""

    def absent(self, samples: I64) -> NDArray[np.bool_]:
        """Which of a batch's samples must be sent: bool [n]."""
        ...


class Event(Protocol):
    """The end of a copy out of a slot (torch.cuda.Event has this shape)."""

    def synchronize(self) -> None: ...


@dataclass
class Slot:
    """Memory for one micro-batch: uint8 [rows, height, width, channels], pinned where a GPU reads it."""

    images: torch.Tensor
    views: NDArray[np.int32]  # [rows, 8], as View
    flat: torch.Tensor  # the same images: uint8 [rows, height * width * channels]


class SlotPool:
    """A fixed number of slots; `take` waits for one that is free and whose last copy has happened."""

    def __init__(self, count: int, *, rows: int, shape: tuple[int, int, int], pin: bool) -> None:
        self.waited = 0.0  # seconds for copies out of slots
        self._free: deque[tuple[Slot, Event | None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        for _ in range(count):
            # NumPy asks the kernel for huge pages, which take a fifth off a copy into them; pinning must be torch's
            images = (torch.empty((rows, *shape), dtype=torch.uint8, pin_memory=True) if pin else
                      torch.from_numpy(np.empty((rows, *shape), np.uint8)))
            self._free.append((Slot(images, np.zeros((rows, 8), np.int32), images.view(rows, -1)), None))

    def take(self) -> Slot | None:
        """A slot that nobody reads any more; None once the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                return None
            slot, copied = self._free.popleft()
        if copied is not None:
            began = time.perf_counter()
            copied.synchronize()
            self.waited += time.perf_counter() - began
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
    """A finished micro-batch on the host. Give the slot back through `release`, with the event of its copy.

    `sent` [m] are the rows whose images are in the slot, in order: all n, but for those that the device keeps.
    `damaged` [n] are the rows whose image can't be decoded, where such are left out: black, for `reasons` by row.
    """

    work: Work
    slot: Slot
    labels: I64
    sent: I64
    _pool: SlotPool
    damaged: NDArray[np.bool_] = field(init=False)
    reasons: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.damaged = np.zeros(len(self.labels), np.bool_)

    @property
    def images(self) -> torch.Tensor:
        """uint8 [m, height, width, channels], on the host."""
        return self.slot.images[: len(self.sent)]

    @property
    def views(self) -> NDArray[np.int32]:
        """int32 [n, 8], as View."""
        return self.slot.views[: len(self.work.samples)]

    def release(self, copied: Event | None = None) -> None:
        self._pool.give_back(self.slot, copied)


@dataclass(frozen=True)
class Times:
    """Seconds so far. `waiting`: the step for data; `copying`: the feeder for copies out of slots; the others are sums
    over all decode threads, and reading includes bringing a record to its stage."""

    waiting: float = 0.0
    reading: float = 0.0
    decoding: float = 0.0
    copying: float = 0.0

    def __sub__(self, before: Times) -> Times:
        return Times(self.waiting - before.waiting, self.reading - before.reading, self.decoding - before.decoding,
                     self.copying - before.copying)


class Loader:
    """Makes the batches of a sequence of works, in order, `prefetch` of them ahead.

        with Loader(records, labels, decoder, ...) as loader:
            for batch in loader.run(works):
                ...
                batch.release(event)

    `labels` [samples of the data set]; `shape` is (height, width, channels) of an image in a slot: what the decoder is
    to make, or for raw stages the records' own width and channels, with all of their rows or, where every view only
    cuts, with as many as a view has. `on_error`: `fail` raises UserError for a damaged image (names the file, the
    offset and the sample) when that batch's turn comes, `skip` tells of it in the batch. Raises Unreadable.
    """

    def __init__(self, records: Records, labels: NDArray[np.int32], decoder: Decoder, *, rows: int,
                 shape: tuple[int, int, int], threads: int, prefetch: int, pin: bool = False,
                 resident: Resident | None = None, on_error: Literal["fail", "skip"] = "fail") -> None:
        self._on_error = on_error
        self._damaged: dict[int, str] = {}  # samples -> why
        self._records, self._labels, self._decoder, self._resident = records, labels, decoder, resident
        is_raw = records.stage.kind == "raw"
        self._fill, self._chunk = (self._copy, RAW_CHUNK) if is_raw else (
            self._decode, LONG_CHUNK if threads <= FEW else CHUNK)
        torch.get_num_threads()  # settles this thread's number, which it would else take from what `_alone` sets
        self._pool_of_threads = ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=_alone)
        self._slots = SlotPool(prefetch + 1, rows=rows, shape=shape, pin=pin)
        self._ready: queue.Queue[tuple[Batch, list[Future[None]]] | BaseException | None] = queue.Queue(prefetch)
        self._closing = threading.Event()
        self._feeder: threading.Thread | None = None
        self._waited = self._reading = self._decoding = 0.0  # seconds, as in Times
        self._counting = threading.Lock()

    @property
    def times(self) -> Times:
        return Times(self._waited, self._reading, self._decoding, self._slots.waited)

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
            self._mark_kept(batch)
            self._waited += time.perf_counter() - started
            yield batch

    def _feed(self, works: Iterator[Work]) -> None:
        try:
            for work in works:
                slot = self._slots.take()
                if slot is None:
                    return
                assert len(work.samples) <= slot.images.shape[0]
                sent = np.arange(len(work.samples))
                if self._resident is not None:
                    sent = sent[self._resident.absent(work.samples)]
                batch = Batch(work, slot, self._labels[work.samples].astype(np.int64), sent, self._slots)
                if self._records.stage.kind == "raw":
                    side = self._records.stage.pixels
                    batch.views[...] = work.views(side, side)
                chunks = [self._pool_of_threads.submit(self._fill, batch, first)
                          for first in range(0, len(sent), self._chunk)]
                self._put((batch, chunks))
            self._put(None)
        except BaseException as error:  # surfaces where the batches are taken
            self._put(error)

    def _put(self, item: tuple[Batch, list[Future[None]]] | BaseException | None) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.2)
                return

    def _decode(self, batch: Batch, first: int) -> None:
        """A chunk of a batch whose records are encoded images."""
        assert len(batch.sent) == len(batch.work.samples)
        pixels, mask = batch.slot.images.numpy(), batch.work.mask
        reading = decoding = 0.0
        rows = range(first, min(first + self._chunk, len(batch.work.samples)))
        for row in rows:
            if self._closing.is_set():
                return
            if mask is not None and not mask[row]:
                pixels[row] = 0
                continue
            sample = int(batch.work.samples[row])
            began = time.perf_counter()
            try:
                data = self._records.read(sample)
                read = time.perf_counter()
                view = self._decoder(data, batch.work.choose(row), pixels[row])
            except (DamagedImage, OSError) as error:
                self._leave_out(batch, row, error)
                pixels[row], batch.slot.views[row] = 0, 0
                continue
            reading, decoding = reading + read - began, decoding + time.perf_counter() - read
            batch.slot.views[row] = view
        self._count(reading=reading, decoding=decoding)

    def _copy(self, batch: Batch, first: int) -> None:
        """A chunk of a batch of raw records, of which the device makes the views.

        What lies in memory is copied in one call for the whole chunk, which holds the interpreter's lock for none of
        it: decode threads would else wait for each other after every record.
        """
        began, slot, mask = time.perf_counter(), batch.slot, batch.work.mask
        rows = batch.sent[first:first + RAW_CHUNK]
        height, width, channels = slot.images.shape[1:]
        starts = np.zeros(len(rows), np.int64)
        if height < width:  # only the rows that are shown
            shown = batch.views[rows]
            assert only_cut(shown)
            starts = (shown[:, TOP].astype(np.int64) + shown[:, Y]) * width * channels
        samples, out = batch.work.samples[rows], slot.flat[first:first + len(rows)]
        if not self._records.copy_into(samples, starts, out):
            for sample, start, row, into in zip(samples.tolist(), starts.tolist(), rows.tolist(), out, strict=True):
                if self._closing.is_set():
                    return
                if mask is not None and not mask[row]:
                    continue
                try:
                    self._records.read_into(sample, into.numpy(), start)
                except (DamagedImage, OSError) as error:
                    self._leave_out(batch, row, error)
                    into.zero_()
        if mask is not None:  # padding
            out[torch.from_numpy(~mask[rows])] = 0
        self._count(reading=time.perf_counter() - began)

    def _count(self, *, reading: float, decoding: float = 0.0) -> None:
        with self._counting:
            self._reading, self._decoding = self._reading + reading, self._decoding + decoding

    def _leave_out(self, batch: Batch, row: int, error: DamagedImage | OSError) -> None:
        """Notes a damaged image, or raises where that is not allowed."""
        sample = int(batch.work.samples[row])
        if self._on_error == "fail" or not isinstance(error, DamagedImage):
            raise self._named(error, sample) from None
        batch.damaged[row], batch.reasons[row] = True, str(error)
        self._damaged[sample] = str(error)

    def _mark_kept(self, batch: Batch) -> None:
        """A damaged record that was sent once is black on the device, which keeps it: nobody reads it again."""
        if not self._damaged or len(batch.sent) == len(batch.labels):
            return
        for row in np.setdiff1d(np.arange(len(batch.labels)), batch.sent).tolist():
            why = self._damaged.get(int(batch.work.samples[row]))
            if why is not None:
                batch.damaged[row], batch.reasons[row] = True, why

    def _named(self, error: DamagedImage | OSError, sample: int) -> Exception:
        """The same, saying which sample it was."""
        place = f"{self._records.where(sample)} (sample {sample})"
        if isinstance(error, DamagedImage):
            return UserError(f"Damaged image: {place}: {error}.\nReplace or remove that file and start again, or leave "
                             "damaged images out (data.on_error=skip).")
        return Unreadable(f"Can't read {place}: {error.strerror or error}.")

    def close(self) -> None:
        """Stops and joins all threads; what was decoded ahead is dropped."""
        self._closing.set()
        self._slots.close()
        if self._feeder is not None:
            self._feeder.join()
        self._pool_of_threads.shutdown(wait=True, cancel_futures=True)


def _alone() -> None:
    """torch's kernels run on the decode thread that calls them: each would else wake a team as large as the machine,
    whose members spin while they wait. The number is a thread's own, so the training thread's stays."""
    torch.set_num_threads(1)


def micro_batches(samples: I64, micro_batch: int) -> Sequence[slice]:
    """Cuts of a rank's part of a global batch: at least one, which is empty when the rank has no samples."""
    cuts = [slice(first, min(first + micro_batch, len(samples))) for first in range(0, len(samples), micro_batch)]
    return cuts or [slice(0, 0)]


def decode_threads(wanted: int | str, *, cores: int) -> int:
    """Decode threads of one rank: as asked for, else as many as it has cores."""
    return wanted if isinstance(wanted, int) else cores
