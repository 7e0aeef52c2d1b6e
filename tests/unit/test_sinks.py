"""Metrics on disk: no step twice after a resume, no torn line, nothing lost on a full disk, plain lines for logs."""

import errno
import io
import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from alexnet_ddp import sinks
from alexnet_ddp.sinks import Console, MetricsFile, TensorBoard, Trace, cut_traces, kept_after_resume, read_records


def train(step: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "epoch": 0, "loss": 1.0 / step, **fields}


def evaluation(step: int) -> dict[str, Any]:
    return {"kind": "evaluate", "step": step, "epoch": 1, "top1": 0.5}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def fresh(path: Path) -> MetricsFile:
    return MetricsFile(path, step=0, evaluated_step=0)


# --- resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "evaluated", "kept"), [
    (0, 0, []), (1, 0, []), (2, 0, ["t2"]), (4, 0, ["t2", "t4"]), (4, 4, ["t2", "t4", "e4"]),
    (6, 4, ["t2", "t4", "e4", "t6"]), (8, 4, ["t2", "t4", "e4", "t6", "t8"]),
    (8, 8, ["t2", "t4", "e4", "t6", "t8", "e8"]),
])
def test_what_a_checkpoint_has_seen_is_kept(path: Path, step: int, evaluated: int, kept: list[str]) -> None:
    """A resumed file holds the records up to the checkpoint's step, and evaluations up to its last finished one."""
    first = fresh(path)
    for record in (train(2), train(4), evaluation(4), train(6), train(8), evaluation(8)):
        first.write(record)
    resumed = MetricsFile(path, step=step, evaluated_step=evaluated)
    names = [f"{record['kind'][0]}{record['step']}" for record in read_records(path)]
    assert names == kept
    assert resumed.records == read_records(path)
    resumed.write(train(10))
    assert read_records(path)[-1]["step"] == 10


def test_kept_after_resume() -> None:
    """A training record counts by the checkpoint's step, an evaluation by the last one that it has seen finished."""
    assert kept_after_resume(train(4), step=4, evaluated_step=0)
    assert not kept_after_resume(train(5), step=4, evaluated_step=9)
    assert not kept_after_resume(evaluation(4), step=4, evaluated_step=0)
    assert kept_after_resume(evaluation(4), step=4, evaluated_step=4)


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', b'{"kind": "train"', b"{", b"\xff\xfe", b'{"kind": "a"}',
                                  b"[1]"])
def test_torn_last_line(path: Path, torn: bytes) -> None:
    """A line that a kill tore, or that isn't a record, is left out, and what is written next is whole."""
    fresh(path).write(train(2))
    with path.open("ab") as file:
        file.write(torn)
    assert [record["step"] for record in read_records(path)] == [2]
    resumed = MetricsFile(path, step=2, evaluated_step=0)
    resumed.write(train(4))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


def test_records_read_back_to_the_bit(path: Path) -> None:
    """Floats come back equal; a loss that isn't finite is null, so that every reader of JSON reads the file."""
    sink = fresh(path)
    sink.write(train(1, a=0.1 + 0.2, b=1e-300, c=2**53 + 1, d="é\u2028"))
    sink.write(train(2, a=math.nan, b=math.inf, c=-math.inf))
    first, second = read_records(path)
    assert (first["a"], first["b"], first["c"], first["d"]) == (0.1 + 0.2, 1e-300, 2**53 + 1, "é\u2028")
    assert (second["a"], second["b"], second["c"]) == (None, None, None)
    assert len(path.read_bytes().splitlines()) == 2


# --- a full disk ------------------------------------------------------------------------------------------------


@contextmanager
def disk_with_room_for(more: int, path: Path) -> Iterator[None]:
    """No file may grow beyond `more` bytes over this one's size: the kernel then writes in part, and then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 1, 30, 100])
def test_full_disk_keeps_lines_in_memory(path: Path, room: int, capsys: pytest.CaptureFixture[str]) -> None:
    """When the disk takes a part of a line or none, the file keeps whole lines only; later all come, once, in order."""
    sink = fresh(path)
    for step in range(1, 500):
        sink.write(train(step, pad="x" * 100))
    with disk_with_room_for(room, path):
        for step in range(500, 510):
            sink.write(train(step, pad="x" * 100))
        sink.flush(durable=True)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(1, 500)]
    assert path.read_bytes().endswith(b"\n")
    sink.write(train(510))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(1, 511)]
    assert capsys.readouterr().out.count("can't be written") == 1  # said once, not at every record


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_any_refusal_of_the_disk(path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, a quota, a failing or a gone file system at opening: training goes on, the lines wait."""
    sink = fresh(path)
    real = io.open

    def refuse(*arguments: Any, **options: Any) -> Any:
        if arguments[0] == path:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(io, "open", refuse)
        for step in range(1, 4):
            sink.write(train(step))
    assert read_records(path) == []
    sink.flush()
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]


def test_a_failed_fsync_writes_nothing_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that were written but not confirmed by the disk are not written again."""
    sink = fresh(path)

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        sink.write(train(1))
        sink.flush(durable=True)
    sink.flush(durable=True)
    assert [record["step"] for record in read_records(path)] == [1]


def test_rewrite_is_atomic(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fills while a file is rewritten at a resume, the old one stays as it was."""
    fresh(path).write(train(2))
    before = path.read_bytes()

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        MetricsFile(path, step=0, evaluated_step=0)
    assert path.read_bytes() == before


# --- TensorBoard, traces, console -------------------------------------------------------------------------------


def test_tensorboard_has_no_point_twice(tmp_path: Path) -> None:
    """After a resume TensorBoard holds the kept records' scalars and the new ones, each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "tensorboard"
    board = TensorBoard(folder, [])
    for step in (2, 4, 6):
        board.write(train(step, time=100.0 + step))
    board.write({**train(8), "loss": None})
    board.close()
    board = TensorBoard(folder, [train(2), train(4)])  # resumed after step 4
    board.write(train(6, time=300.0))
    board.write(evaluation(6))
    board.close()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([0.5, 0.25, 1 / 6])
    assert events.Scalars("train/loss")[-1].wall_time == 300.0
    assert [event.step for event in events.Scalars("evaluate/top1")] == [6]
    assert "train/step" not in events.Tags()["scalars"]


def test_traces_are_cut_at_the_resumed_step(tmp_path: Path) -> None:
    """Traces of steps that are taken again are dropped on every rank's file, torn lines with them."""
    for rank in range(2):
        trace = Trace(tmp_path, rank)
        for step in range(5):
            trace.write(step, samples=[step, rank], views=[[0] * 8], flips=[True])
        trace.close()
    with (tmp_path / "rank_1.jsonl").open("a") as file:
        file.write('{"step": 1, "sam')
    cut_traces(tmp_path, step=3)
    for rank in range(2):
        lines = [json.loads(line) for line in (tmp_path / f"rank_{rank}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1, 2]
        assert lines[2]["samples"] == [2, rank]
    cut_traces(tmp_path / "none", step=3)  # nothing there, nothing to do


def test_console_prints_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Off a terminal, progress and evaluations are whole lines without carriage returns."""
    console = Console(total_steps=100)
    console.train({**train(50), "top1": 0.25, "lr": 0.01, "images_per_second": 99.6, "data_wait": 0.5,
                   "binds": "decode"}, seconds_per_step=2.0)
    console.evaluate({**evaluation(50), "correct1": 5, "samples": 10, "top5": 1.0, "loss": 0.5, "seconds": 1.0})
    out = capsys.readouterr().out
    assert "\r" not in out and "\x1b" not in out
    assert len(out.splitlines()) == 2
    assert "step 50/100" in out
    assert "50%" in out
    assert "left 1m40s" in out
    assert "5 of 10" in out


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (3599, "59m59s"),
                                               (3600, "1h00m"), (4000, "1h06m"), (360_000, "100h00m")])
def test_duration(seconds: float, text: str) -> None:
    """Times left are told in two units at most."""
    assert sinks.duration(seconds) == text
