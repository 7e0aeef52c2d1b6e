"""The lease: a stale one never blocks, a live one does, and of two that want it exactly one gets it."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from alexnet_ddp import lease as module
from alexnet_ddp.errors import UserError
from alexnet_ddp.lease import Holder, Lease, LeaseLost, judge, look

ROOT = Path(__file__).parents[2]
ME = Holder(job="7", restart=1, host="n1", boot="b1", pid=10, pid_namespace="p1", start_time="5", token="me")
HERE = replace(ME, job="6", pid=11, token="other")  # a process of another job that ME can see

SCRIPT = """
import sys, time
from pathlib import Path
from alexnet_ddp.errors import UserError
from alexnet_ddp.lease import Lease
assert "torch" not in sys.modules
directory, start, ttl = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0.0, start - time.time()))
try:
    lease = Lease.acquire(directory, job=None, restart=0, ttl=ttl)
except UserError as error:
    print("refused", error, flush=True)
else:
    print("taken", flush=True)
    sys.stdin.readline()
    lease.check()
    lease.release()
    print("released", flush=True)
"""


@contextmanager
def contender(directory: Path, *, start: float = 0.0, ttl: float = 60.0) -> Iterator[subprocess.Popen]:
    """Another process that wants the lease at a moment of the wall clock; holds it until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, directory, str(start), str(ttl)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def held(directory: Path, **options) -> Iterator[Lease]:
    options = {"job": None, "restart": 0, "log": lambda line: None, **options}
    lease = Lease.acquire(directory, **options)
    try:
        yield lease
    finally:
        lease.release()


def leave(directory: Path, holder: Holder) -> None:
    """A lease that somebody left, as it would lie there after a kill."""
    fresh = directory / "fresh"
    fresh.write_bytes(holder.encode())
    fresh.replace(directory / "lease.json")  # a new file, as a takeover makes it, not the old one rewritten


@pytest.mark.parametrize(
    ("found", "alive", "verdict"),
    [
        (None, False, "take"),
        (HERE, True, "refuse"),
        (HERE, False, "take"),
        (replace(HERE, job="7", restart=0), True, "refuse"),
        (replace(HERE, job=None), True, "refuse"),
        (replace(HERE, boot="b0"), True, "take"),
        (replace(HERE, boot=""), False, "watch"),
        (replace(HERE, pid_namespace="p2"), False, "watch"),
        (replace(HERE, pid_namespace="p2", job="7", restart=0), False, "take"),
        (replace(HERE, host="n2"), False, "watch"),
        (replace(HERE, host="n2", boot="b2"), False, "watch"),
        (replace(HERE, host="n2", job="7", restart=0), False, "take"),
        (replace(HERE, host="n2", job="7", restart=1), False, "watch"),
        (replace(HERE, host="n2", job="7", restart=2), False, "watch"),
        (replace(HERE, host="n2", job="6", restart=0), False, "watch"),
        (replace(HERE, host="n2", job=None, restart=0), False, "watch"),
        (Holder(), False, "watch"),
    ],
)
def test_judgement(found: Holder | None, alive: bool, verdict: str) -> None:
    """Who may take a lease at once, who is refused at once, and who has to watch for a beat."""
    assert judge(found, me=ME, process_alive=alive) == verdict


def test_two_without_a_job_are_not_the_same_job() -> None:
    """Outside a scheduler nobody is anybody's restart."""
    found = replace(HERE, host="n2", job=None, restart=0)
    assert judge(found, me=replace(ME, job=None, restart=5), process_alive=False) == "watch"


def test_a_live_process_is_refused_by_name(tmp_path: Path) -> None:
    """While its owner lives the directory is refused at once, saying who, where, how long and what to do."""
    with held(tmp_path, job="41", restart=2) as lease:
        with pytest.raises(UserError) as caught:
            Lease.acquire(tmp_path, job="42", restart=0)
        for word in (
            lease.holder.host,
            f"process {os.getpid()}",
            "job 41",
            "less than a minute",
            "STOP",
            "name=",
        ):
            assert word in str(caught.value)
        lease.check()
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path) as again:
        again.check()


def test_looking_touches_nothing(tmp_path: Path) -> None:
    """Whoever looks learns the holder, and whether its process lives where that can be seen; the file stays as it is.
    """
    assert look(tmp_path) is None
    with contender(tmp_path) as process:
        assert process.stdout.readline() == "taken\n"
        before = (tmp_path / "lease.json").read_bytes()
        holder, alive = look(tmp_path)
        assert (holder.pid, alive) == (process.pid, True)
        process.kill()
        process.wait()
        assert look(tmp_path) == (holder, False)
        assert (tmp_path / "lease.json").read_bytes() == before
    (tmp_path / "lease.json").unlink()
    leave(tmp_path, replace(ME, host="elsewhere"))
    assert look(tmp_path) == (replace(ME, host="elsewhere"), None)


def test_release_twice_is_harmless(tmp_path: Path) -> None:
    """A second release does nothing, not even to the next owner."""
    lease = Lease.acquire(tmp_path, job=None, restart=0)
    lease.release()
    with held(tmp_path) as other:
        lease.release()
        other.check()


def test_a_killed_owner_never_blocks(tmp_path: Path) -> None:
    """After SIGKILL of another process its lease is taken at once, even before anybody has reaped it."""
    with contender(tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=f"process {process.pid} "):
            Lease.acquire(tmp_path, job=None, restart=0)
        process.kill()
        while module._stat(process.pid)[0] not in ("Z", ""):
            time.sleep(0.01)
        with held(tmp_path, wait=False) as lease:
            lease.check()


@pytest.mark.parametrize(
    "change",
    [
        {"start_time": "1"},  # the number belongs to a later process now
        {"boot": "another"},
        {"host": "elsewhere", "boot": "another", "job": "7", "restart": 0},
    ],
    ids=["number-reused", "other-boot", "earlier-start-of-the-job"],
)
def test_a_stale_lease_is_taken_at_once(tmp_path: Path, change: dict) -> None:
    """Leases of processes that can't be alive any more are taken without waiting."""
    leave(tmp_path, replace(module._myself(), **change))
    with held(tmp_path, job="7", restart=1, wait=False) as lease:
        lease.check()
        assert [entry.name for entry in tmp_path.iterdir()] == ["lease.json"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b'{"pid": 1, "colour": 2}'])
def test_silence_for_a_ttl_is_waited_out(tmp_path: Path, content: bytes | None) -> None:
    """An owner nobody can ask about, or a file that is no lease: taken after a silent ttl, one line first."""
    leave(tmp_path, replace(module._myself(), host="elsewhere", job="9", ttl=0.3))
    if content is not None:
        (tmp_path / "lease.json").write_bytes(content)
    lines: list[str] = []
    with pytest.raises(UserError, match=str(tmp_path)):
        Lease.acquire(tmp_path, job="7", restart=1, wait=False)
    with held(tmp_path, job="7", restart=1, ttl=0.3, log=lines.append) as lease:
        lease.check()
    assert len(lines) == 1 and str(tmp_path) in lines[0]


def test_a_beat_is_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner that can't be asked, but beats, is refused before its ttl is over."""
    with held(tmp_path, job="9", ttl=1.2) as lease:
        monkeypatch.setattr(module, "_sees", lambda found, me: False)
        lines: list[str] = []
        with pytest.raises(UserError, match="is in use"):
            Lease.acquire(tmp_path, job="7", restart=1, log=lines.append)
        assert len(lines) == 1
        lease.check()


def test_a_taken_lease_is_noticed_and_left_alone(tmp_path: Path) -> None:
    """The same job's later start takes over; the earlier owner learns it and never writes the file again."""
    first = Lease.acquire(tmp_path, job="7", restart=0, ttl=0.06)
    earlier = replace(first.holder, host="elsewhere", boot="another")
    leave(tmp_path, earlier)
    with held(tmp_path, job="7", restart=1) as second:
        for _ in range(2):
            with pytest.raises(LeaseLost, match=f"belongs to process {os.getpid()} .*job 7"):
                first.check()
        first._thread.join(60)
        assert not first._thread.is_alive()
        first.release()
        second.check()
        assert json.loads((tmp_path / "lease.json").read_text())["token"] == second.holder.token


def test_the_heartbeat_notices_and_keeps_the_error(tmp_path: Path) -> None:
    """A lease file that vanished is lost too; the heartbeat finds out by itself and ends."""
    lease = Lease.acquire(tmp_path, job=None, restart=0, ttl=0.06)
    (tmp_path / "lease.json").unlink()
    lease._thread.join(60)
    assert not lease._thread.is_alive() and isinstance(lease._lost, LeaseLost)
    leave(tmp_path, lease.holder)
    with pytest.raises(LeaseLost, match="nobody"):
        lease.check()
    lease.release()


def test_the_file_can_be_read_at_any_moment(tmp_path: Path) -> None:
    """The heartbeat rewrites the file in place, in one length: whoever reads it meets a whole lease."""
    with held(tmp_path, ttl=0.006) as lease:
        size = (tmp_path / "lease.json").stat().st_size
        beats = []
        while len(set(beats)) < 20:
            found = module._read(tmp_path / "lease.json")
            assert found is not None and found.token == lease.holder.token
            beats.append(found.beat)
        assert beats == sorted(beats)
        assert (tmp_path / "lease.json").stat().st_size == size


def test_a_file_system_away_for_a_moment_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat that can't write goes on trying, and the lease is not lost for it."""
    failed = []

    def fail(*args: object) -> int:
        failed.append(args)
        raise OSError(errno.EIO, "Input/output error")

    with held(tmp_path, ttl=0.03) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            while len(failed) < 3:
                time.sleep(0.005)
        beat = lease.holder.beat
        while (found := module._read(tmp_path / "lease.json")) is None or found.beat <= beat:
            time.sleep(0.005)
        lease.check()


def test_a_lease_of_another_is_put_back(tmp_path: Path) -> None:
    """A slow contender that moves a lease it has not judged puts it back; its owner goes on beating in it."""
    with held(tmp_path, ttl=0.03) as lease:
        assert module._take(tmp_path / "lease.json", HERE, ME) is None
        lease.check()
        beat = lease.holder.beat
        while (found := module._read(tmp_path / "lease.json")) is None or found.beat <= beat:
            time.sleep(0.005)
        assert [entry.name for entry in tmp_path.iterdir()] == ["lease.json"]


@pytest.mark.parametrize("stale", [False, True])
def test_of_two_at_once_exactly_one_wins(tmp_path: Path, stale: bool) -> None:
    """Processes that start on the same instant: one takes the directory, the others are told of it."""
    if stale:
        leave(tmp_path, replace(module._myself(), boot="another"))
    start = time.time() + 1.0
    with (
        contender(tmp_path, start=start) as one,
        contender(tmp_path, start=start) as two,
        contender(tmp_path, start=start) as three,
    ):
        processes = {process: process.stdout.readline() for process in (one, two, three) if process.stdout}
        winners = [process for process, line in processes.items() if line == "taken\n"]
        assert len(winners) == 1, processes
        assert all(
            line.startswith("refused") for process, line in processes.items() if process not in winners
        )
        output, _ = winners[0].communicate("\n")
        assert output == "released\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stale", [False, True])
def test_many_races_in_one_process(tmp_path: Path, stale: bool) -> None:
    """The same race, many times over, with threads: never two owners, never none."""
    path = tmp_path / "lease.json"
    barrier = threading.Barrier(4)
    taken: list[str] = []

    def contend(holder: Holder, found: Holder | None) -> None:
        barrier.wait()
        for _ in range(3):  # as `acquire` does it: look, judge the one known to be dead, try to take
            file = module._take(path, found, holder)
            if file is not None:
                os.close(file)
                taken.append(holder.token)
            if file is not None or module._read(path) not in (None, found):
                break

    for number in range(100):
        dead = replace(HERE, token=f"dead-{number}")
        if stale:
            leave(tmp_path, dead)
        taken.clear()
        found = dead if stale else None
        threads = [
            threading.Thread(target=contend, args=(replace(ME, token=f"{number}-{me}"), found))
            for me in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
        owner = module._read(path)
        assert owner is not None and owner.token == taken[0]
        path.unlink()


def test_a_directory_that_cannot_be_written_is_the_users_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read-only or full, or no directory at all: one UserError with the system's reason, no traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be used"):
        Lease.acquire(tmp_path / "file" / "run", job=None, restart=0)

    def fail(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "lease.json")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(UserError, match="Read-only file system"):
        Lease.acquire(tmp_path, job=None, restart=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
