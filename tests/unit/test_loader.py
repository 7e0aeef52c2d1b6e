"""The loader: batches in order and right, slots that nobody reads any more, errors named, no thread left behind."""

import contextlib
import itertools
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import harness
from alexnet_ddp.config import build
from alexnet_ddp.data.decoding import decode, views
from alexnet_ddp.data.decoding.decode import DamagedImage, create_decoder
from alexnet_ddp.data.decoding.stages import Stage
from alexnet_ddp.data.decoding.views import ChooseView, View
from alexnet_ddp.data.index import Index, open_index
from alexnet_ddp.data.loader import CHUNK, Batch, Loader, SlotPool, Work, decode_threads, micro_batches
from alexnet_ddp.data.order import Order
from alexnet_ddp.data.records import Records, StoredRecords
from alexnet_ddp.data.training import Data, has_single_samples, largest_part, training_works
from alexnet_ddp.errors import Unreadable, UserError

SIZE = 8
WAIT = 30.0  # seconds that a test waits for what must happen


class Samples:
    """An index whose sample i is one byte, i; `broken` ones can't be read or decoded."""

    def __init__(self, count: int, *, broken: dict[int, Exception] | None = None) -> None:
        self.labels, self.stage = np.arange(count, dtype=np.int32) % 5, Stage("original")
        self.broken = broken or {}

    def read(self, sample: int) -> bytes:
        if sample in self.broken:
            raise self.broken[sample]
        return sample.to_bytes(2, "big")

    def where(self, sample: int) -> str:
        return f"/images/{sample}.jpg"


class Painter:
    """A decoder that fills the view with the sample's number, after `gate` (if any) has opened."""

    name, version = "painter", "1"

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate, self.started, self.calls = gate, threading.Event(), 0

    def __call__(self, data: bytes, choose: ChooseView, out: NDArray[np.uint8]) -> View:
        self.calls += 1
        self.started.set()
        if self.gate is not None:
            assert self.gate.wait(WAIT)
        out[...] = int.from_bytes(data, "big") % 251
        return choose(100, 50)


def view_of(row: int) -> ChooseView:
    return lambda width, height: View(row, 0, width, height, SIZE, SIZE, 0, 0)


def works(*parts: list[int]) -> Iterator[Work]:
    return (Work(step=step, micro=0, micros=1, samples=np.array(part, dtype=np.int64), choose=view_of)
            for step, part in enumerate(parts))


def loader(samples: Samples, decoder: decode.Decoder | None = None, *, rows: int = 40, threads: int = 2,
           prefetch: int = 3) -> Loader:
    return Loader(cast(Records, samples), samples.labels, decoder or Painter(), rows=rows, shape=(SIZE, SIZE, 3),
                  threads=threads, prefetch=prefetch)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """No test leaves a thread of the loader's behind, not even for an instant."""
    yield
    assert not own_threads()


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "feeder"))]


# --- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("prefetch", [2, 7])
def test_batches_in_order(threads: int, prefetch: int) -> None:
    """Batches come in the order of the works, each with its own pixels, labels and views, for any threads."""
    parts = [list(range(first, first + 37)) for first in range(0, 370, 37)]
    with loader(Samples(400), threads=threads, prefetch=prefetch) as load:
        for step, batch in enumerate(load.run(works(*parts))):
            assert batch.work.step == step
            assert batch.images.shape == (37, SIZE, SIZE, 3)
            assert batch.images.dtype == torch.uint8
            expected = torch.tensor(parts[step]) % 251
            assert torch.equal(batch.images, expected.view(-1, 1, 1, 1).expand_as(batch.images).to(torch.uint8))
            assert batch.labels.tolist() == [sample % 5 for sample in parts[step]]
            assert batch.labels.dtype == np.int64
            assert batch.views[:, 0].tolist() == list(range(37))  # each row asked for its own view
            batch.release()
        assert step == len(parts) - 1


def test_sizes_of_batches() -> None:
    """Empty, single, chunk-sized and full batches come through, in any sequence."""
    sizes = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 40, 0, 0, 3]
    with loader(Samples(60)) as load:
        found = []
        for batch in load.run(works(*([*range(size)] for size in sizes))):
            assert batch.images[:, 0, 0, 0].tolist() == [*range(len(batch.images))]
            assert batch.labels.shape == (len(batch.images),)
            found.append(len(batch.images))
            batch.release()
        assert found == sizes


def test_masked_rows_are_black_and_never_read() -> None:
    """Padding of an evaluation batch is zero even in a used slot, and its samples aren't read."""
    samples = Samples(10, broken={0: DamagedImage("padding was read")})
    mask = np.array([True, True, False, False])
    full = Work(0, 0, 1, np.array([5, 6, 7, 8]), view_of)
    padded = Work(1, 0, 1, np.array([3, 4, 0, 0]), view_of, mask=mask)
    with loader(samples, rows=4, prefetch=2) as load:
        last = None
        for batch in load.run(iter([full] * 4 + [padded])):
            last = batch.images[:, 0, 0, 0].tolist()
            batch.release()
        assert last == [3, 4, 0, 0]


def test_micro_batches() -> None:
    """A rank's part is cut into pieces of at most micro_batch, in order, and there is at least one, maybe empty."""
    for count in range(20):
        for size in (1, 3, 7, 50):
            cuts = micro_batches(np.arange(count), size)
            assert [sample for cut in cuts for sample in range(count)[cut]] == [*range(count)]
            assert len(cuts) == max(1, -(-count // size))
            assert all(0 <= cut.stop - cut.start <= size for cut in cuts)


def test_decode_threads() -> None:
    """Threads are those asked for, else as many as the rank has cores."""
    assert decode_threads(7, cores=3) == 7
    assert decode_threads("auto", cores=3) == 3


# --- slots ------------------------------------------------------------------------------------------------------


class LateCopy:
    """A copy to a device that ends when `finish` is called; it looks whether the slot was overwritten before."""

    def __init__(self, batch: Batch) -> None:
        self._pixels, self._before = batch.slot.images, batch.slot.images.clone()
        self._finished = threading.Event()
        self.awaited = threading.Event()
        self.overwritten = False

    def finish(self) -> None:
        self.overwritten |= not torch.equal(self._pixels, self._before)
        self._finished.set()

    def synchronize(self) -> None:
        self.awaited.set()
        assert self._finished.wait(WAIT)
        self.overwritten |= not torch.equal(self._pixels, self._before)


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_no_slot_is_reused_before_its_copy(lag: int) -> None:
    """With a device whose copies end `lag` batches later no slot is written to before its copy's event."""
    parts = [[number] * 20 for number in range(40)]
    copies: list[LateCopy] = []
    with loader(Samples(50), prefetch=3) as load:
        for batch in load.run(works(*parts)):
            assert (batch.images == batch.work.step).all()
            copies.append(LateCopy(batch))
            batch.release(copies[-1])
            if len(copies) > lag:
                copies[-1 - lag].finish()
        for copy in copies[-lag:]:
            copy.finish()
    assert len(copies) == 40
    assert sum(copy.awaited.is_set() for copy in copies) >= 40 - 4  # the last ones' slots were not needed again
    assert not any(copy.overwritten for copy in copies)


def test_the_pool_waits_rather_than_overwrite() -> None:
    """When every copy is late the loader stands still: it decodes no more than the slots there are."""
    copies: list[LateCopy] = []
    painter = Painter()
    with loader(Samples(50), painter, prefetch=3, rows=4) as load:
        batches = load.run(works(*([number] for number in range(40))))
        for _ in range(4):  # prefetch + 1 slots
            batch = next(batches)
            copies.append(LateCopy(batch))
            batch.release(copies[-1])
        assert copies[0].awaited.wait(WAIT)  # the feeder wants the first slot back
        assert painter.calls == 4
        for copy in copies:
            copy.finish()
        next(batches).release()
    assert not any(copy.overwritten for copy in copies)


def test_bounded_prefetch() -> None:
    """However slow the consumer, no more than prefetch + 1 batches are in memory."""
    painter, asked = Painter(), []

    def watched() -> Iterator[Work]:
        for work in works(*([number] for number in range(1000))):
            asked.append(work.step)
            yield work

    with loader(Samples(1000), painter, prefetch=5, rows=1, threads=1) as load:
        batches = load.run(watched())
        held = [next(batches) for _ in range(6)]  # all slots, and none comes back
        assert len({id(batch.slot) for batch in held}) == 6
        assert painter.calls == 6
        assert len(asked) <= 7
        for batch in held:
            batch.release()
        assert next(batches).work.step == 6


def test_closed_pool_gives_nothing() -> None:
    """A closed pool wakes who waits and gives no slot, also when one comes back afterwards."""
    pool = SlotPool(1, rows=1, shape=(SIZE, SIZE, 3), pin=False)
    slot = pool.take()
    assert slot is not None
    got: list[object] = []
    waiting = threading.Thread(target=lambda: got.append(pool.take()))
    waiting.start()
    pool.close()
    waiting.join(WAIT)
    pool.give_back(slot, None)
    assert got == [None]
    assert pool.take() is None


# --- errors, ends -----------------------------------------------------------------------------------------------


def test_damaged_image_surfaces_in_its_turn() -> None:
    """A damaged image raises UserError with file, sample and cause when its batch's turn comes, not earlier."""
    samples = Samples(50, broken={33: DamagedImage("image file is truncated")})
    with loader(samples, prefetch=10) as load:
        batches = load.run(works(*([3 * step, 3 * step + 1, 3 * step + 2] for step in range(15))))
        for step in range(11):  # the batch of sample 33 has been decoded long ago
            batch = next(batches)
            assert batch.work.step == step
            batch.release()
        with pytest.raises(UserError, match=r"/images/33\.jpg \(sample 33\): image file is truncated"):
            next(batches)


def test_unreadable_file_surfaces() -> None:
    """A file that can't be read is a UserError with its name and the system's reason."""
    samples = Samples(5, broken={2: OSError(5, "Input/output error")})
    with loader(samples) as load, pytest.raises(Unreadable, match=r"/images/2\.jpg \(sample 2\): Input/output error"):
        next(load.run(works([0, 1, 2])))


def test_damaged_file_in_a_folder(tmp_path: Path) -> None:
    """With real files: the message holds the path of the damaged one, and the others decode."""
    harness.make_images(tmp_path / "train", samples=6)
    bad = tmp_path / "train" / "class1" / "00004.jpg"
    bad.write_bytes(bad.read_bytes()[:500])
    with open_index(str(tmp_path / "train"), cache_dir=tmp_path / "cache") as index:
        sample, = (number for number in range(6) if index.name(number).endswith("00004"))

        def choose(_: int) -> ChooseView:
            return lambda width, height: views.squash(width, height, size=SIZE)

        for decoder in (create_decoder("auto"), create_decoder("pillow")):
            with Loader(StoredRecords(index, "original"), index.labels, decoder, rows=6, shape=(SIZE, SIZE, 3),
                        threads=2, prefetch=2) as load:
                parts = [[number for number in range(6) if number != sample], [sample]]
                batches = load.run(Work(step, 0, 1, np.array(part), choose) for step, part in enumerate(parts))
                next(batches).release()
                with pytest.raises(UserError) as error:
                    next(batches)
        assert str(bad) in str(error.value)
        assert f"sample {sample}" in str(error.value)


def test_an_error_in_the_works_surfaces() -> None:
    """What goes wrong while the order is walked is raised where batches are taken, after the good ones."""
    def failing() -> Iterator[Work]:
        yield from works([1], [2])
        raise RuntimeError("the order broke")

    with loader(Samples(5)) as load:
        batches = load.run(failing())
        for _ in range(2):
            next(batches).release()
        with pytest.raises(RuntimeError, match="the order broke"):
            next(batches)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_while_threads_are_busy(taken: int) -> None:
    """close() in the middle of decoding, after any number of batches, joins every thread; decoded work is dropped."""
    gate = threading.Event()
    painter = Painter(gate)
    load = loader(Samples(5000), painter, threads=3, prefetch=4)
    batches = load.run(works(*([*range(40)] for _ in range(100))))
    if taken:
        gate.set()
        for _ in range(taken):
            next(batches).release()
        gate.clear()
    else:
        threading.Thread(target=lambda: next(batches, None), daemon=True).start()
    painter.started.wait(WAIT)
    closing = threading.Thread(target=load.close)
    closing.start()
    gate.set()  # the image under way is finished, no other is begun
    closing.join(WAIT)
    assert not closing.is_alive()
    assert not own_threads()
    with contextlib.suppress(queue.Full):  # lets the thread go that stands in for a loop that was left
        load._ready.put_nowait(None)
    assert painter.calls < 100 * 40


def test_close_without_a_run() -> None:
    """A loader that never ran, or whose batches nobody took, or that is closed twice, leaves nothing behind."""
    load = loader(Samples(5))
    load.close()
    load.close()
    with loader(Samples(50)) as load:
        next(load.run(works(*([number] for number in range(40))))).release()
    load.close()


def test_waiting_is_counted() -> None:
    """The time that a loop waits for data is counted, and time spent elsewhere isn't."""
    gate = threading.Event()
    with loader(Samples(50), Painter(gate), prefetch=2) as load:
        threading.Timer(0.05, gate.set).start()
        for batch in load.run(works([1], [2])):
            batch.release()
        assert load.times.waiting > 0.02


# --- a run's works ----------------------------------------------------------------------------------------------


def test_training_works_make_up_each_batch() -> None:
    """Over any number of ranks, and from any first step, the works of a step hold its global batch with equal draws."""
    config = build({"data": {"train": "/x"}, "global_batch": 10, "micro_batch": 3, "epochs": 2, "seed": 4,
                    "augment": {"size": 64}})
    order = Order(23, global_batch=10, seed=4, shards=4, identity="ab" * 32)
    data = Data(cast(Index, Samples(23)), None, order)
    views: dict[tuple[int, int], View] = {}
    for world, first in itertools.product((1, 2, 3, 4, 12), (0, 2, 5)):
        steps: dict[int, list[int]] = {}
        for rank in range(world):
            for work in training_works(config, data, first_step=first, rank=rank, world=world):
                steps.setdefault(work.step, []).extend(work.samples.tolist())
                assert len(work.samples) <= min(3, largest_part(config, world=world))
                assert 0 <= work.micro < work.micros
                for row, sample in enumerate(work.samples.tolist()):
                    view = work.choose(row)(500, 375)
                    assert views.setdefault((work.step, sample), view) == view
        assert steps == {step: order.batch(step).tolist() for step in range(first, 6)}
    assert len(set(views.values())) > 30


def test_forwards_of_a_single_sample_are_foreseen() -> None:
    """For any number of ranks and any micro-batch: foreseen exactly where the works of a run have one."""
    seen = set()
    for assignment, samples, micro_batch, world in itertools.product(
            ("contiguous", "owner"), (20, 23, 27), (1, 2, 3, 4, 10), (1, 2, 3, 4, 12)):
        if assignment == "owner" and 4 % world:
            continue  # refused
        config = build({"data": {"train": "/x", "assignment": assignment}, "global_batch": 10,
                        "micro_batch": micro_batch, "epochs": 2})
        order = Order(samples, global_batch=10, seed=4, shards=4, identity="ab" * 32)
        data = Data(cast(Index, Samples(samples)), None, order)
        single = any(len(work.samples) == 1 for rank in range(world)
                     for work in training_works(config, data, first_step=0, rank=rank, world=world))
        assert any(has_single_samples(config, order, rank=rank, world=world) for rank in range(world)) == single, (
            assignment, samples, micro_batch, world)
        seen.add((assignment, single))
    assert len(seen) == 4


def test_decode_threads_use_one_core_each() -> None:
    """Kernels of torch that a decode thread calls wake no team of threads, and the training thread keeps its own."""
    script = ("import torch\ntorch.set_num_threads(2)\nfrom alexnet_ddp.data import loader\n"
              "from alexnet_ddp.data.decoding.stages import parse_stage\nimport numpy as np\n"
              "class Records:\n stage = parse_stage('original')\n"
              "made = loader.Loader(Records(), np.zeros(1, np.int32), None, rows=1, shape=(8, 8, 3), threads=1,\n"
              "                     prefetch=2)\n"
              "inside = made._pool_of_threads.submit(torch.get_num_threads).result()\nmade.close()\n"
              "print(inside, torch.get_num_threads())")
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["1", "2"], found.stderr
