"""Measured speeds of storage and loader on a sample of a data set, as a trainer would use them."""

from __future__ import annotations

import errno
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet_ddp.config import Config
from alexnet_ddp.data.decoding.decode import Decoder
from alexnet_ddp.data.decoding.stages import Stage
from alexnet_ddp.data.feed import Feed
from alexnet_ddp.data.index import Index
from alexnet_ddp.data.index.table import IN_A_FILE
from alexnet_ddp.data.loader import CHUNK, Work
from alexnet_ddp.data.randomness import draw
from alexnet_ddp.data.records import Records
from alexnet_ddp.data.tools.verdict import Speed
from alexnet_ddp.data.training import training_view

I64 = NDArray[np.int64]

PIECE = 256  # records of one timed piece of reading
BATCH = 128  # most images of one batch of the loader; fewer where few threads would take long over it
PIECES = 5  # that a decoding time is cut into


def speed_of(rates: Sequence[float]) -> Speed:
    return Speed(statistics.median(rates), min(rates), max(rates), len(rates))


# --- storage --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What reading a sample of the records found. `cached`: share that forgetting didn't reach; None: unknown."""

    cold: Speed | None
    warm: Speed
    cached: float | None
    record_bytes: float  # mean


def reading(index: Index, samples: I64, *, threads: int, seconds: float) -> Reading:
    """Reads records in the given (random) order by `threads` threads, first cold, then again warm.

    Cold: the kernel is asked to forget the pieces' pages before each is read; no root is needed for that. Raises
    OSError, UserError.
    """
    cold: list[tuple[int, float]] = []  # records, seconds
    warm: list[float] = []  # records a second
    done: list[I64] = []
    read, cached, known, forgets = 0, 0, 0, True
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(samples), PIECE):
            piece = samples[first:first + PIECE]
            for sample in piece.tolist():
                forgets = _forget(index, sample) and forgets
            inside = [_in_memory(index, sample) for sample in piece.tolist()]
            known += sum(found is not None for found in inside)
            cached += sum(found is True for found in inside)
            spent, size = _timed(pool, index, piece, threads)
            cold.append((len(piece), spent))
            read += size
            done.append(piece)
            if sum(spent for _, spent in cold) > seconds:
                break
        began = time.perf_counter()
        while not warm or time.perf_counter() - began < seconds / 2:
            for piece in done[:8]:
                spent, _ = _timed(pool, index, piece, threads)
                warm.append(len(piece) / spent)
    share = cached / known if known else None
    is_cold = forgets and (share is None or share < 0.5)
    return Reading(speed_of([count / spent for count, spent in cold]) if is_cold else None, speed_of(warm), share,
                   read / sum(map(len, done)))


def _timed(pool: ThreadPoolExecutor, index: Index, piece: I64, threads: int) -> tuple[float, int]:
    """(seconds, bytes) of reading a piece by all threads of the pool."""
    def read(part: I64) -> int:
        return sum(len(index.read(sample)) for sample in part.tolist())

    began = time.perf_counter()
    size = sum(pool.map(read, np.array_split(piece, threads)))
    return time.perf_counter() - began, size


def _extent(index: Index, sample: int) -> tuple[str, int, int]:
    """(file, offset, bytes) of a record; 0 bytes: the whole file."""
    offset = int(index.table.offsets[sample])
    if offset == IN_A_FILE:
        return os.path.join(index.source.paths[0], os.fsdecode(index.table.path(sample))), 0, 0
    return index.source.paths[int(index.table.containers[sample])], offset, int(index.table.sizes[sample])


def _forget(index: Index, sample: int) -> bool:
    """Asks the kernel to drop a record's pages; False where it doesn't know how."""
    path, offset, size = _extent(index, sample)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        start = offset - offset % mmap.PAGESIZE  # only whole pages are dropped
        whole = -(-(offset + size) // mmap.PAGESIZE) * mmap.PAGESIZE - start if size else 0
        os.posix_fadvise(file, start, whole, os.POSIX_FADV_DONTNEED)
        return True
    except OSError:
        return False
    finally:
        os.close(file)


def _in_memory(index: Index, sample: int) -> bool | None:
    """Whether a record's middle is in the page cache; None where the file system doesn't say."""
    path, offset, size = _extent(index, sample)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = size or os.fstat(file).st_size
        os.preadv(file, [bytearray(1)], offset + size // 2, os.RWF_NOWAIT)
        return True
    except OSError as error:
        return False if error.errno == errno.EAGAIN else None
    finally:
        os.close(file)


# --- the loader -----------------------------------------------------------------------------------------------------


def loading(records: Records, decoder: Decoder, samples: I64, labels: NDArray[np.int32], config: Config, *,
            threads: int, seconds: float) -> Speed:
    """Images a second of the whole loader over `samples` again and again, as the recipe's augmentation shows them.

    Raises UserError for a damaged image.
    """
    rows = min(BATCH, 2 * CHUNK * threads)
    feed = Feed(config, records, labels, decoder, crop=config.augment.crop, device=torch.device("cpu"), threads=threads)
    with feed.loader(rows=rows) as loader:
        batches = loader.run(_works(samples, config, rows=rows))

        def take(until: float) -> tuple[int, float]:
            images, began = 0, time.perf_counter()
            while (spent := time.perf_counter() - began) < until:
                batch = next(batches)
                images += len(batch.work.samples)
                batch.release()
            return images, spent

        take(min(1.0, seconds / 4))  # until all queues are full
        return speed_of([images / spent for images, spent in (take(seconds / PIECES) for _ in range(PIECES))])


def _works(samples: I64, config: Config, *, rows: int) -> Iterator[Work]:
    chance = np.random.default_rng(0)
    for step in range(2**31):
        mine = chance.choice(samples, rows)
        draws = draw(mine, seed=0, epoch=step, flip=0.0, rotation=0.0, color_jitter=(0.0, 0.0, 0.0, 0.0),
                     pca_lighting=0.0)

        yield Work(step=step, micro=0, micros=1, samples=mine, draws=draws,
                   choose=partial(training_view, config.augment, draws))


class Kept:
    """Records in memory, made by a function of the sample: what a set would be in another stage."""

    def __init__(self, stage: Stage, samples: I64, make: Callable[[int], bytes]) -> None:
        self.stage = stage
        self._data = {sample: make(sample) for sample in samples.tolist()}

    @property
    def record_bytes(self) -> float:
        """Mean."""
        return statistics.fmean(map(len, self._data.values()))

    def read(self, sample: int) -> bytes:
        return self._data[sample]

    def read_into(self, sample: int, out: NDArray[np.uint8], start: int = 0) -> None:
        flat = out.reshape(-1)
        flat[...] = np.frombuffer(self._data[sample], np.uint8)[start:start + flat.size]

    def copy_into(self, samples: I64, starts: I64, out: torch.Tensor) -> bool:
        return False

    def where(self, sample: int) -> str:
        return f"sample {sample}, converted"


# --- the demand -----------------------------------------------------------------------------------------------------


def gpu_rate(config: Config, *, seconds: float) -> float:
    """Images a second that one GPU's training step takes, on synthetic data already there, in the recipe's
    precision and with its micro_batch."""
    from alexnet_ddp.data.augment import Augment
    from alexnet_ddp.models import create_model
    from alexnet_ddp.models.dropout import set_dropout_rows
    from alexnet_ddp.step import AMP

    device = torch.device("cuda", 0)
    net = create_model(config.model.name, num_classes=config.model.num_classes, in_channels=config.model.in_channels,
                       width=config.model.width, dropout=config.model.dropout, image_size=config.augment.size,
                       lrn_after=tuple(config.model.lrn_after)).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, fused=True)
    size, rows = config.augment.size, config.micro_batch
    images = torch.randint(0, 255, (rows, size, size, config.model.in_channels), dtype=torch.uint8, device=device)
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    augment = Augment(config.augment, channels=config.model.in_channels, device=device)
    set_dropout_rows(net, torch.arange(rows, device=device))
    dtype = AMP[config.amp]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(net(augment(images, None)), labels)
        loss.backward()
        optimizer.step()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        steps += 10
    return steps * rows / (time.perf_counter() - began)
