"""One net under measurement, in a process of its own: so its memory is its own, and its end where it doesn't fit."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_ddp.amounts import human_bytes
from alexnet_ddp.data.caches.space import memory_left
from alexnet_ddp.errors import OutOfMemory, UserError, first_line
from alexnet_ddp.models.dropout import set_dropout_rows
from alexnet_ddp.optim import create_optimizer
from alexnet_ddp.sections import OptimSection
from alexnet_ddp.trained.entry import Entry, look, open_net
from alexnet_ddp.trained.timing import held, peak, start_peak, timed

MOST = 1024  # images, the largest batch that is tried
WORTH = 1.02  # a batch is better that gives 2 per cent more images a second
PATIENCE = 2  # doublings without a better batch, after which the search ends
SHARE = 0.5  # of the memory that is left: what a larger batch may be expected to take
KINDS = ("latency", "throughput", "training")


@dataclass(frozen=True)
class Tried:
    """A batch size of the search: images a second in its quickest call, and the bytes that the net took."""

    batch: int
    rate: float
    memory: int


@dataclass
class Prepared:
    """What was found before the rounds. Bytes are the growth over what the process (its torch, without the net) held.

    memory_one    a net and one image's inference
    search        the batch sizes in the order of the search; ended: why it did
    best          batch size of the most images a second
    memory_best   the net and an inference of the best batch
    memory_train  net, gradients, momentum and activations of a step; None where it wasn't trained
    """

    memory_one: int
    search: list[Tried]
    ended: str
    best: int
    memory_best: int
    memory_train: int | None
    notes: list[str]


class Trial:
    """Measures one net in this process. Images are noise; the nets see as much arithmetic as in any photograph."""

    def __init__(self, spec: str, overrides: Sequence[str], *, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self._begin()
        known = look(spec, overrides)
        needed, left = known.file_bytes or 0, self._left()
        if needed > left:
            raise OutOfMemory(f"{spec} takes {human_bytes(needed)} for its weights alone, {human_bytes(left)} are left")
        self.entry, self.net = open_net(spec, overrides, device=self.device)
        self.optimizer: torch.optim.Optimizer | None = None
        self.batches: dict[str, int] = {}

    def _begin(self) -> None:
        """Brings torch's libraries in with a small net, so that they aren't counted as another one's memory."""
        small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 8)).to(self.device)
        small(torch.zeros(2, 3, 32, 32, device=self.device)).sum().backward()
        del small
        self._give_back()
        self.before = held(self.device)

    def prepare(self, *, train_batch: int, seconds: float) -> Prepared:
        """Memory, and the best batch among powers of two; a call of it may take `seconds`. Also the warm-up.

        Raises OutOfMemory where not even one image goes through.
        """
        self._give_back()
        start_peak(self.device)
        try:
            self._time("latency", 1, seconds=min(seconds, 0.3), calls=3)
        except Exception as error:
            if not no_memory(error):
                raise
            raise OutOfMemory(f"{self.entry.spec} and one image don't fit the memory") from None
        one = self._grown()
        training, notes = self._prepare_training(train_batch, one=one) if self.entry.trainable else (None, [])
        tried, ended = self._search(seconds)
        best = best_of(tried)
        self.batches = {"latency": 1, "throughput": best.batch, "training": train_batch}
        return Prepared(one, tried, ended, best.batch, best.memory, training, notes)

    def measure(self, kind: str, *, seconds: float) -> list[float]:
        """Seconds of each call in about `seconds`, by one of KINDS. After `prepare`."""
        return self._time(kind, self.batches[kind], seconds=seconds)

    def _time(self, kind: str, batch: int, *, seconds: float, calls: int = 1) -> list[float]:
        images = torch.randn(batch, self.entry.channels, self.entry.size, self.entry.size, device=self.device,
                             generator=torch.Generator(self.device).manual_seed(batch))
        images = images.to(memory_format=torch.channels_last)
        if kind == "training":
            labels = torch.arange(batch, device=self.device) % self.entry.classes
            return self._train(images, labels, seconds=seconds, calls=calls)
        with torch.no_grad():
            return timed(lambda: self.net(images), device=self.device, seconds=seconds, calls=calls)

    def _train(self, images: Tensor, labels: Tensor, *, seconds: float, calls: int) -> list[float]:
        """Steps of SGD with momentum, fp32, at rate 0: the arithmetic of any rate, and the weights stay as they are."""
        self.net.train().requires_grad_(True)
        if self.optimizer is None:
            self.optimizer = create_optimizer(self.net, OptimSection().model_copy(update={"lr": 0.0}))
        optimizer = self.optimizer
        set_dropout_rows(self.net, torch.arange(len(images), device=self.device))

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self.net(images), labels).backward()
            optimizer.step()

        try:
            return timed(step, device=self.device, seconds=seconds, calls=calls)
        finally:
            set_dropout_rows(self.net, None)
            self.net.eval()

    def _prepare_training(self, batch: int, *, one: int) -> tuple[int | None, list[str]]:
        """Bytes of a training step, or a note why there is none."""
        weights = sum(parameter.nbytes for parameter in self.net.parameters())
        expected = 2 * weights + 2 * batch * max(0, one - weights)  # activations are kept for the backward
        if expected > self._left():
            return None, [f"{self.entry.spec}: not trained, a step of {batch} would take about "
                          f"{human_bytes(expected)} more, {human_bytes(self._left())} are left"]
        start_peak(self.device)
        try:
            self._time("training", batch, seconds=0.0, calls=2)
        except (ValueError, RuntimeError, MemoryError) as error:  # batch norm of one value a channel, among others
            why = "its memory isn't there" if no_memory(error) else first_line(error)
            return None, [f"{self.entry.spec}: not trained at a batch of {batch}, {why}"]
        finally:
            grown = self._grown()
            self.optimizer = None
            self.net.zero_grad(set_to_none=True)
            self.net.requires_grad_(False)
        return grown, []

    def _search(self, seconds: float) -> tuple[list[Tried], str]:
        """Doubles the batch while that gives more images a second, and the bounds allow it."""
        tried: list[Tried] = []
        batch = 1
        while True:
            self._give_back()
            left, before = self._left(), held(self.device)
            start_peak(self.device)
            try:
                taken = self._time("throughput", batch, seconds=min(seconds, 0.5), calls=4)
            except (ValueError, RuntimeError, MemoryError) as error:  # an exported net may take one image and no more
                if not tried:
                    raise
                why = "its memory isn't there" if no_memory(error) else first_line(error)
                return tried, f"a batch of {batch} can't be taken: {why}"
            quickest = min(taken[1:])
            tried.append(Tried(batch, batch / quickest, self._grown()))
            if batch >= best_of(tried).batch * 2**PATIENCE:
                return tried, f"more than {best_of(tried).batch} gives no more images a second"
            if batch >= MOST:
                return tried, f"no more than {MOST} is tried"
            if 2 * quickest > seconds:
                return tried, f"a batch of {2 * batch} would take longer than {seconds:g} s"
            if 2 * (peak(self.device) - before) > SHARE * left:
                return tried, f"a batch of {2 * batch} would take more than half of the memory that is left"
            batch *= 2

    def _grown(self) -> int:
        return max(0, peak(self.device) - self.before)

    def _left(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else memory_left()

    def _give_back(self) -> None:
        """Returns freed memory to the system, which C's allocator else keeps and which would count as taken."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
            libc.malloc_trim(0)


def best_of(tried: Sequence[Tried]) -> Tried:
    """The batch of the most images a second; a larger one must be worth it. Pure."""
    best = tried[0]
    for each in tried[1:]:
        if each.rate > best.rate * WORTH:
            best = each
    return best


def no_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


# --- in a process of its own ------------------------------------------------------------------------------------


class Died(Exception):
    """The process ended without an answer: by the kernel, for want of memory, more often than not."""


class Process:
    """A Trial in a process of its own; close it. Raises UserError as Trial does, and Died."""

    def __init__(self, spec: str, overrides: Sequence[str], *, device: str, threads: int) -> None:
        context = multiprocessing.get_context("forkserver")  # torch is imported once; no CUDA is inherited
        context.set_forkserver_preload([__name__])
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, spec, list(overrides), device, threads), daemon=True)
        self.process.start()
        far.close()
        try:
            self.entry: Entry = self._answer()
        except BaseException:
            self.close()
            raise

    def prepare(self, *, train_batch: int, seconds: float) -> Prepared:
        return self._ask("prepare", train_batch=train_batch, seconds=seconds)

    def measure(self, kind: str, *, seconds: float) -> list[float]:
        return self._ask("measure", kind, seconds=seconds)

    def close(self) -> None:
        self.process.kill()  # it has nothing to save
        self.process.join()
        self.pipe.close()

    def _ask(self, name: str, *values: Any, **options: Any) -> Any:
        try:
            self.pipe.send((name, values, options))
        except BrokenPipeError:
            raise self._died() from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise self._died() from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _died(self) -> Died:
        self.process.join(timeout=10.0)
        code = self.process.exitcode
        killed = code is not None and code == -signal.SIGKILL
        return Died("it was killed, which is what the kernel does when memory runs out" if killed else
                    f"its process ended with exit code {code}")


def _serve(pipe: Connection, spec: str, overrides: list[str], device: str, threads: int) -> None:
    """Answers with the entry, then orders until there are no more; what fails is the answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which then ends this process
    made: list[Trial] = []

    def open_trial() -> Entry:
        made.append(Trial(spec, overrides, device=device, threads=threads))
        return made[0].entry

    if not _reply(pipe, open_trial):
        return
    while True:
        try:
            name, values, options = pipe.recv()
        except (EOFError, OSError):
            return
        _reply(pipe, lambda: getattr(made[0], name)(*values, **options))  # noqa: B023


def _reply(pipe: Connection, work: Callable[[], Any]) -> bool:
    """Sends what `work` gives, or why it gives nothing: a UserError as it is, anything else with its traceback."""
    try:
        pipe.send(work())
    except UserError as error:
        pipe.send(error)
        return False
    except Exception:
        pipe.send(RuntimeError(f"measuring failed:\n{traceback.format_exc()}"))
        return False
    return True
