"""A scan that was killed goes on: after the last finished container, to the same bytes, leaving nothing behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alexnet_ddp.data.index import Index, archives, folders, index_cache, journal, open_index
from alexnet_ddp.data.index.journal import Journal
from alexnet_ddp.data.index.parts import Part
from alexnet_ddp.data.index.sources import Stamp, find_source
from alexnet_ddp.errors import UserError
from stores import make_folder, make_tar, nested, settle

CLASSES = ("n01", "n02", "n03", "n04", "n05")
SAMPLES = {f"{label}/{stem}": f"{label}{stem}".encode() for label in CLASSES 
           for stem in ("1.jpg", "sub/2.JPEG", "a.txt")}
# Kills itself by SIGKILL once so many containers are in the journal; -1: when the table is written but has no name yet,
# -2: right after it has its name.
KILLED = """
import os, signal, sys
from pathlib import Path
from alexnet_ddp.data.index import index_cache, journal
from alexnet_ddp.data.index import open_index
left = int(sys.argv[3])
journal.SECONDS_BETWEEN_WRITES = 0
def dying(owner, name):
    def after(*args, inner=getattr(owner, name)):
        global left
        result = inner(*args)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, after)
if left > 0:
    dying(journal.Journal, "add")
else:
    left = -left
    dying(os, "fsync" if left == 1 else "replace")
    left = 1
open_index(sys.argv[1], cache_dir=Path(sys.argv[2]))
"""


def keyed(label: str) -> dict[str, bytes]:
    return {f"{label}{n}.jpg": b"x" for n in range(3)} | {f"{label}{n}.cls": b"%d" % n for n in range(3)}


@pytest.fixture(params=["tar of tars", "shards", "labelled shards", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Five containers each."""
    if request.param == "tar of tars":
        return str(make_tar(tmp_path / "outer.tar", nested(SAMPLES) | {"readme.txt": b""}))
    if request.param == "folder":
        return str(make_folder(tmp_path / "folder", SAMPLES))
    for label in CLASSES:
        members = {name: data for name, data in SAMPLES.items() if name.startswith(label)}
        make_tar(tmp_path / f"shards/{label}.tar", members if request.param == "shards" else keyed(label))
    return f"{tmp_path}/shards" + ("::" if request.param == "shards" else "")


def killed(store: Path | str, cache: Path, when: int) -> None:
    command = [sys.executable, "-c", KILLED, str(store), str(cache), str(when)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The containers that are read from here on; an outer tar's own headers aren't counted."""
    seen: list[str] = []
    walk, below = archives.members, folders._scan_below

    def members(descriptor: int, start: int, size: int, where: str) -> Iterator:
        if start or not where.endswith("outer.tar"):
            seen.append(where)
        return walk(descriptor, start, size, where)

    def scan_below(root: bytes, child: bytes, above: frozenset) -> Part:
        seen.append(os.fsdecode(child))
        return below(root, child, above)

    monkeypatch.setattr(archives, "members", members)
    monkeypatch.setattr(folders, "_scan_below", scan_below)
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_WRITES", 0)
    return seen


def contents(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "index").iterdir()}


def test_a_killed_scan_goes_on(store: str, tmp_path: Path, scanned: list[str]) -> None:
    """SIGKILL after three of five containers: two are left to read, and the cache is that of a scan in one go."""
    killed(store, tmp_path / "cache", 3)
    assert [name.startswith(".part-") for name in contents(tmp_path / "cache")] == [True]
    index = open_index(str(store), cache_dir=tmp_path / "cache")
    assert len(scanned) == 2
    whole = open_index(str(store), cache_dir=tmp_path / "whole")
    assert len(scanned) == 7 and index.identity == whole.identity
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole") and len(contents(tmp_path / "whole")) == 1
    assert [index.where(n) for n in range(len(index))] == [whole.where(n) for n in range(len(whole))]


@pytest.mark.parametrize("when", [-1, -2])
def test_killed_while_the_table_is_kept(when: int, tmp_path: Path, scanned: list[str]) -> None:
    """SIGKILL within the table's writing, or between its name and the journal's removal: nothing stays behind."""
    tar = make_tar(tmp_path / "outer.tar", nested(SAMPLES))
    killed(tar, tmp_path / "cache", when)
    assert len(contents(tmp_path / "cache")) == 2
    open_index(str(tar), cache_dir=tmp_path / "cache")
    assert not scanned  # all was in the journal, or in the cache
    open_index(str(tar), cache_dir=tmp_path / "whole")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_journal_torn_anywhere_does_no_harm(tmp_path: Path, scanned: list[str]) -> None:
    """Cut at any byte or with one bit turned, a journal gives what is whole in it, and the table is the same."""
    tar = make_tar(tmp_path / "outer.tar", nested(SAMPLES))
    killed(tar, tmp_path / "cache", 4)
    open_index(str(tar), cache_dir=tmp_path / "whole")
    (name, data), = contents(tmp_path / "cache").items()
    torn = [data[:cut] for cut in range(0, len(data), 223)]
    torn += [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(0, len(data), 131)]
    counts = set()
    for piece in (*torn, data):
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache/index").mkdir(parents=True)
        (tmp_path / "cache/index" / name).write_bytes(piece)
        scanned.clear()
        open_index(str(tar), cache_dir=tmp_path / "cache")
        counts.add(len(scanned))
        assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert counts == {1, 2, 3, 4, 5} and len(scanned) == 1


def test_what_has_changed_since_is_read_again(tmp_path: Path, scanned: list[str]) -> None:
    """A tar replaced after the kill is read from its beginning; in a folder only the class that changed is."""
    tar, folder = make_tar(tmp_path / "outer.tar", nested(SAMPLES)), make_folder(tmp_path / "folder", SAMPLES)
    killed(tar, tmp_path / "cache", 3)
    killed(folder, tmp_path / "cache", 3)
    more = SAMPLES | {"n02/sub/3.jpg": b"new"}
    make_tar(tar, nested(more))
    os.utime(tar, (10**9, 10**9))
    (folder / "n02/sub/3.jpg").write_bytes(b"new")
    os.utime(folder / "n02/sub", (10**9, 10**9))
    identity = open_index(str(tar), cache_dir=tmp_path / "cache").identity
    assert len(scanned) == 5
    scanned.clear()
    assert open_index(str(folder), cache_dir=tmp_path / "cache").identity == identity
    assert scanned == ["n02", "n04", "n05"]


def test_what_has_just_changed_is_not_kept(tmp_path: Path, scanned: list[str]) -> None:
    """A tar younger than two seconds isn't believed by a later scan: nothing is written for it."""
    tar = make_tar(tmp_path / "outer.tar", nested(SAMPLES))
    os.utime(tar)
    open_index(str(tar), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npz")) and not list((tmp_path / "cache").rglob(".*"))


def test_a_scan_that_fails_keeps_what_is_done(tmp_path: Path, scanned: list[str]) -> None:
    """Damage in the fourth inner tar is told; once the file is mended (and so is another one) all is read again, and
    after an interrupt only what was left is."""
    members = nested(SAMPLES)
    tar = make_tar(tmp_path / "outer.tar", members | {"n04.tar": b"no tar" * 200})
    with pytest.raises(UserError, match="n04.tar: not a tar archive"):
        open_index(str(tar), cache_dir=tmp_path / "cache")
    scanned.clear()
    with pytest.raises(UserError, match="n04.tar: not a tar archive"):
        open_index(str(tar), cache_dir=tmp_path / "cache")
    assert len(scanned) == 1  # the damaged one
    make_tar(tar, members)
    index = open_index(str(tar), cache_dir=tmp_path / "cache")
    assert len(index) == 10 and len(contents(tmp_path / "cache")) == 1


def test_quick_scans_leave_no_journal(tmp_path: Path) -> None:
    """A scan of under two seconds writes the table and nothing else, also when it is refused."""
    open_index(str(make_tar(tmp_path / "a.tar", nested(SAMPLES))), cache_dir=tmp_path / "cache")
    with pytest.raises(UserError):
        open_index(str(make_tar(tmp_path / "b.tar", nested(SAMPLES) | {"z.tar": b"x"})), cache_dir=tmp_path / "cache")
    assert len(contents(tmp_path / "cache")) == 1


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path, scanned: list[str]) -> None:
    """Where a journal can't be written the scan goes on without one."""
    tar = make_tar(tmp_path / "outer.tar", nested(SAMPLES))
    (tmp_path / "file").write_bytes(b"")
    with open_index(str(tar), cache_dir=tmp_path / "file") as index:
        assert len(index) == 10 and index.cache.startswith("not kept (")


def test_the_living_are_left_alone(tmp_path: Path, scanned: list[str]) -> None:
    """The journal of a process that is alive isn't touched; on another machine silence of minutes counts as death."""
    tar = make_tar(tmp_path / "outer.tar", nested(SAMPLES))
    path = index_cache.cache_path(find_source(str(tar)), tmp_path / "cache")
    mine = Journal(path)
    mine.add("0 512", Part(stamps=[Stamp(str(tar), 1, 1)]))
    (there,) = contents(tmp_path / "cache")
    elsewhere = path.with_name(f".part-{path.stem}.12345678,4026531836,77,99.abc")
    elsewhere.write_bytes(b"")
    dead = path.with_name(".tmp-" + elsewhere.name.removeprefix(".part-") + ".npz")
    dead.write_bytes(b"")
    other = path.with_name(".part-" + "0" * 32 + ".left.abc")
    other.write_bytes(b"")

    def left() -> set[str]:
        open_index(str(tar), cache_dir=tmp_path / "cache").close()
        return {name for name in contents(tmp_path / "cache") if name.startswith(".")}

    assert left() == {there, elsewhere.name, dead.name, other.name}
    six_minutes_ago, eight_days_ago = time.time() - 360, time.time() - 8 * 86_400
    for file in (elsewhere, dead, other):
        os.utime(file, (six_minutes_ago, six_minutes_ago))
    assert left() == {there, other.name}
    os.utime(other, (eight_days_ago, eight_days_ago))
    assert left() == {there}
    mine.remove()
    assert left() == set()


def test_a_part_is_what_it_was(tmp_path: Path) -> None:
    """Everything of a part survives the journal: odd bytes in names, labels by number and name, notes."""
    part = Part(stamps=[Stamp("/x\udcff", 3, 4)], known=[None, 7, b"\xff name"],
                elsewhere={b"\xfe"}, inner={b"n01"})
    part.listing.add(b"\xff/d/1.jpg", container=3, offset=2**40, size=9)
    part.listing.add(b"2.JPEG", container=4, offset=5, size=6)
    part.listing.add_other(b"x.txt")
    part.listing.outside = 5
    part.listing.bare_directories.add(b"\xff/d")
    part.values.extend([2, 1])
    part.label_files[".cls"] += 2
    assert Part.decode(part.encode()) == part
    with pytest.raises(ValueError):
        Part.decode(b"{")


def test_progress_is_told_in_megabytes_and_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar's total is the tars' megabytes or the class directories, and both come to the end, also after a kill."""
    told: list[list] = []

    class Bar:
        def __init__(self, total: int, *, what: str, unit: str) -> None:
            told.append([total, unit, 0])

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int = 1) -> None:
            told[-1][2] += count

    monkeypatch.setattr(archives, "Progress", Bar)
    monkeypatch.setattr(folders, "Progress", Bar)
    big = {f"{label}/{n}.jpg": bytes(700_000) for label in CLASSES for n in range(2)}
    tar = make_tar(tmp_path / "outer.tar", nested(big))
    killed(tar, tmp_path / "cache", 3)
    for place in (tar, make_folder(tmp_path / "folder", SAMPLES)):
        index: Index = open_index(str(place), cache_dir=tmp_path / "cache")
        index.close()
    assert told == [[7, "MB", 7], [5, "directories", 5]]
    settle(tar)
