"""Where metrics go: metrics.jsonl (the truth), TensorBoard (made from it), the console. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# Fields that say how fast, not what: they may differ between a run and its repetition, all others are bit-equal.
TIME_FIELDS = frozenset({"images_per_second", "data_wait", "binds", "cached", "memory_peak", "seconds", "time",
                         "attempt"})


def kept_after_resume(record: Record, *, step: int, evaluated_step: int) -> bool:
    """Whether a record belongs to what a checkpoint of `step`, last evaluated at `evaluated_step`, has seen."""
    return bool(record["step"] <= (evaluated_step if record["kind"] == "evaluate" else step))


def read_records(path: Path) -> list[Record]:
    """The whole lines of a metrics file; a line torn by a kill is left out, and one that isn't ours."""
    records: list[Record] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                if isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("kind"), str):
                    records.append(record)
            except ValueError:
                continue
    return records


def rewrite(path: Path, lines: list[str]) -> None:
    """Replaces a file's lines in one atomic move."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


class MetricsFile:
    """metrics.jsonl and damaged.jsonl: after a resume they hold exactly what the checkpoint has seen, nothing twice.

    A full disk keeps lines in memory until it takes them again; nothing is lost, and training goes on.
    """

    def __init__(self, path: Path, *, step: int, evaluated_step: int,
                 belongs: Callable[[Record], bool] = lambda record: True) -> None:
        """`belongs` tells which of these records are kept. Raises OSError."""
        self._path, self._waiting, self._warned = path, [], False  # type: tuple[Path, list[str], bool]
        self.records = [record for record in read_records(path)
                        if kept_after_resume(record, step=step, evaluated_step=evaluated_step) and belongs(record)]
        rewrite(path, [json.dumps(record) for record in self.records])

    def write(self, record: Record) -> None:
        # JSON has no nan and no infinity: the loss of a step with infinite gradients is null.
        strict = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in record.items()}
        self._waiting.append(json.dumps(strict, allow_nan=False))
        self.flush()

    def flush(self, *, durable: bool = False) -> None:
        """Writes what waits; `durable` also waits for the disk (before a checkpoint that has seen it)."""
        try:
            # Unbuffered: a buffer would write its rest at close(), after the lines that failed were cut off.
            with self._path.open("ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                rest = memoryview("".join(line + "\n" for line in self._waiting).encode())
                try:
                    while rest:
                        rest = rest[file.write(rest) or 0:]
                except OSError:
                    file.truncate(size)  # no torn line in the middle of the file
                    raise
                self._waiting = []
                if durable:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._warned:
                say(f"{self._path} can't be written ({error.strerror}); its lines wait in memory.")
            self._warned = True


class TensorBoard:
    """TensorBoard scalars, made anew from the kept records at every start, so that no point occurs twice."""

    def __init__(self, folder: Path, records: list[Record]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second, so only where it is wanted

        threading.excepthook = _told_elsewhere
        shutil.rmtree(folder, ignore_errors=True)
        self._writer: SummaryWriter | None = SummaryWriter(str(folder))
        for record in records:
            self.write(record)

    def write(self, record: Record) -> None:
        if self._writer is None:
            return
        try:
            for name, value in record.items():
                if isinstance(value, int | float) and name not in ("step", "time", "attempt"):
                    self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"],
                                            walltime=record.get("time"))
        except OSError as error:
            say(f"TensorBoard scalars can't be written ({error.strerror}); metrics.jsonl has them.")
            self._writer = None

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()


def _told_elsewhere(thrown: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises what it met once more in the next `write`, so its traceback needn't be shown."""
    if not (type(thrown.thread).__module__.startswith("tensorboard.") and isinstance(thrown.exc_value, OSError)):
        threading.__excepthook__(thrown)


def say(text: str) -> None:
    """A line of the program's own, once: rank 0 calls it."""
    show(f"alexnet-ddp: {text}")


def show(text: str, *, end: str = "\n") -> None:
    """Prints; a reader that has gone (a closed pipe, a lost terminal) must not end a run."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- for the rest of the process


class Console:
    """One moving line on a terminal, plain lines elsewhere (no carriage returns in log files)."""

    def __init__(self, *, total_steps: int) -> None:
        self._total, self._live = total_steps, sys.stdout.isatty()

    def train(self, record: Record, *, seconds_per_step: float) -> None:
        left = seconds_per_step * (self._total - record["step"])
        what = "" if record["binds"] == "step" else f" ({record['binds']})"
        line = (f"epoch {record['epoch'] + 1}  step {record['step']}/{self._total}  "
                f"{record['step'] / self._total:4.0%}  loss {record['loss']:.4f}  top-1 {record['top1']:.2%}  "
                f"lr {record['lr']:.4g}  {record['images_per_second']:.0f} img/s  "
                f"waiting for data {record['data_wait']:.0%}{what}  left {duration(left)}")
        if self._live:
            width = shutil.get_terminal_size().columns
            show("\r" + line[: width - 1].ljust(width - 1), end="")
        else:
            show(line)

    def evaluate(self, record: Record) -> None:
        damaged = f", {record['damaged']} damaged" if record.get("damaged") else ""
        mean = f"  of the weights' mean {record['ema_top1']:.2%}" if "ema_top1" in record else ""
        self.line(f"epoch {record['epoch']}  step {record['step']}  held-out top-1 {record['top1']:.2%} "
                  f"({record['correct1']} of {record['samples']}{damaged}){mean}  top-5 {record['top5']:.2%}  "
                  f"loss {record['loss']:.4f}  in {record['seconds']:.1f} s")

    def line(self, text: str) -> None:
        if self._live:
            show("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="")
        show(text)


def duration(seconds: float) -> str:
    """4000 -> '1h06m'."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"


class Trace:
    """trace/rank_N.jsonl: the sample ids, views (as `decode.View`) and flips of every step on one rank, and what else
    was drawn for them (boxes erased, operations of a policy, whom they were mixed with)."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank_{rank}.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, *, samples: list[int], views: list[list[int]], flips: list[bool], **more: Any) -> None:
        self._file.write(json.dumps({"step": step, "samples": samples, "views": views, "flips": flips, **more}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def cut_traces(folder: Path, *, step: int) -> None:
    """Drops the traces of steps that a resumed run is going to take again."""
    for path in folder.glob("rank_*.jsonl"):
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line)
            except ValueError:
                continue
        rewrite(path, kept)


def now() -> float:
    """Unix time, seconds."""
    return round(time.time(), 3)
