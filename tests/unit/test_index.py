"""The index: the same samples are the same index, however they are stored; reads, cache and memory."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from alexnet_ddp.data.index import Index, check_pair, descriptors, open_index, summary
from alexnet_ddp.data.index import index as index_module
from alexnet_ddp.data.index.journal import Journal
from alexnet_ddp.data.index.scan import Scan
from alexnet_ddp.data.index.sources import Source, Stamp
from alexnet_ddp.data.index.table import Table
from alexnet_ddp.errors import UserError
from benchmarks import scale
from stores import make_folder, make_tar, settle

# The order must be that of code points: capitals before small letters, umlauts and beyond last.
CLASSES = ("Zebra", "ant", "bee", "äffin", "𝄞clef")
SAMPLES = {
    f"{name}/{stem}{suffix}": f"{name} {stem}".encode() * 3
    for name in CLASSES
    for stem, suffix in (("10", ".jpg"), ("9", ".JPEG"), ("B", ".png"), ("a.b", ".jpe"), ("more/1", ".Jpg"))
}
IN_ORDER = [f"{name}/{stem}" for name in CLASSES for stem in ("10", "9", "B", "a.b", "more/1")]


def shuffled(members: dict[str, bytes]) -> dict[str, bytes]:
    names = list(members)
    random.Random(3).shuffle(names)
    return {name: members[name] for name in names}


def keyed(samples: dict[str, bytes]) -> dict[str, bytes]:
    """As a WebDataset shard: the class in a .json beside each image."""
    members = {}
    for name, data in samples.items():
        label = {"class_name": name.partition("/")[0], "label": 7}
        members |= {name: data, f"{name.rpartition('.')[0]}.json": json.dumps(label).encode()}
    return members


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, str]:
    """The same samples in every kind of storage."""
    half = len(SAMPLES) // 2
    mixed = shuffled(SAMPLES)
    parts = [dict(list(mixed.items())[:half]), dict(list(mixed.items())[half:])]
    inside = {f"./data/train/{name}": data for name, data in mixed.items()}
    make_tar(tmp_path / "inside.tar", inside | {f"data/val/{name}": b"other" for name in mixed})
    for number, part in enumerate(parts):
        make_tar(tmp_path / f"parts/train-{number:06d}.tar", part)
        make_tar(tmp_path / f"keyed/train-{number}.tar", keyed(part))
    return {
        "folder": str(make_folder(tmp_path / "folder", mixed)),
        "tar": f"{make_tar(tmp_path / 'gnu.tar', mixed)}::",
        "pax tar": f"{make_tar(tmp_path / 'pax.tar', mixed, format=tarfile.PAX_FORMAT)}::",
        "path inside a tar": f"{tmp_path}/inside.tar::data/train",
        "folder of shards": f"{tmp_path}/parts::",
        "glob": f"{tmp_path}/parts/train-*.tar::",
        "brace range": f"{tmp_path}/parts/train-{{000000..000001}}.tar::",
        "WebDataset": f"{tmp_path}/keyed/train-{{0..1}}.tar",
    }


def test_every_storage_gives_the_same_index(copies: dict[str, str], cache: Path) -> None:
    """The same samples have the same identity, ids, names, labels and bytes in a folder, tars and shards."""
    indexes = {kind: open_index(locator, cache_dir=cache) for kind, locator in copies.items()}
    for kind, index in indexes.items():
        assert index.classes == list(CLASSES), kind
        assert [index.name(sample) for sample in range(len(index))] == IN_ORDER, kind
        assert index.labels.tolist() == [label for label in range(5) for _ in range(5)], kind
        by_stem = {name.rpartition(".")[0]: data for name, data in SAMPLES.items()}
        assert [index.read(sample) for sample in range(len(index))] == [by_stem[name] for name in IN_ORDER], kind
        index.close()
    assert len({index.identity for index in indexes.values()}) == 1
    places = {kind: index.storage for kind, index in indexes.items()}
    assert places.pop("glob") == places.pop("brace range") == places["folder of shards"]  # the same files
    assert len(set(places.values())) == len(places)


def test_identity_tells_names_and_labels_apart(tmp_path: Path, cache: Path) -> None:
    """Identity changes with a sample's name, its class or a class's name, and not with its bytes."""
    base = {"a/1.jpg": b"x", "a/2.jpg": b"y", "b/1.jpg": b"z"}
    variants = {
        "other bytes": base | {"a/1.jpg": b"other"},
        "other name": {"a/3.jpg": b"x", "a/2.jpg": b"y", "b/1.jpg": b"z"},
        "other class": {"a/1.jpg": b"x", "b/2.jpg": b"y", "b/1.jpg": b"z"},
        "other class name": {"a/1.jpg": b"x", "a/2.jpg": b"y", "c/1.jpg": b"z"},
    }
    first = open_index(str(make_tar(tmp_path / "base.tar", base)), cache_dir=cache)
    for number, (kind, members) in enumerate(variants.items()):
        other = open_index(str(make_tar(tmp_path / f"{number}.tar", members)), cache_dir=cache)
        assert (other.identity == first.identity) == (kind == "other bytes"), kind
        assert other.storage != first.storage, kind


def test_order_is_independent_of_the_locale(copies: dict[str, str]) -> None:
    """Processes under other locales and file system encodings get the same identity."""
    program = (
        "import sys; from alexnet_ddp.data.index import open_index\n"
        "print([open_index(each).identity for each in sys.argv[1:]])"
    )
    told = set()
    for settings in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}):
        environment = {**os.environ, **settings, "ALEXNET_DDP_CACHE": os.devnull}
        command = [sys.executable, "-c", program, copies["folder"], copies["tar"], copies["WebDataset"]]
        told.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(told) == 1


def test_where_names_file_or_member(copies: dict[str, str], cache: Path) -> None:
    """A message's place is a path that exists, or a tar with member and offset at which the bytes lie."""
    for kind, locator in copies.items():
        index = open_index(locator, cache_dir=cache)
        for sample in (0, 4, len(index) - 1):
            place = index.where(sample)
            if kind == "folder":
                assert Path(place).read_bytes() == index.read(sample)
                continue
            tar, member, offset = place.replace(" at offset ", ": ").split(": ")
            with tarfile.open(tar) as archive:
                members = {one.name.removeprefix("./"): one for one in archive.getmembers()}
            assert members[member].offset_data == int(offset)


def test_reads_from_eight_threads(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads that read all samples at once get each sample's bytes, descriptors kept or not."""
    monkeypatch.setattr(descriptors, "KEPT_OPEN", 2)
    expected = []
    for shard in range(4):
        members = {f"c/{shard}-{n:03d}.jpg": bytes([shard, n % 251]) * (100 + n) for n in range(150)}
        make_tar(tmp_path / f"shards/{shard}.tar", members)
        expected += members.values()
    index = open_index(f"{tmp_path}/shards", cache_dir=cache)

    def read_all(start: int) -> bool:
        order = [(start * 71 + step) % len(index) for step in range(len(index))]
        for sample in order:
            part = np.empty(len(expected[sample]) - 7, dtype=np.uint8)
            index.read_into(sample, part, 7)
            if index.read(sample) != expected[sample] or part.tobytes() != expected[sample][7:]:
                return False
        return True

    with index, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read_all, range(8)))


def test_read_into_fills_memory_and_nothing_else(copies: dict[str, str], cache: Path) -> None:
    """Any part of a record lands in a slot of a batch, its neighbours stay; more than there is is an OSError."""
    for kind in ("folder", "tar", "WebDataset"):
        with open_index(copies[kind], cache_dir=cache) as index:
            record = np.frombuffer(index.read(7), np.uint8)
            slots = np.zeros((3, 2, 5), dtype=np.uint8)
            for start in (0, 1, len(record) - 10):
                slots[...] = 0
                index.read_into(7, slots[1], start)
                assert np.array_equal(slots[1].reshape(-1), record[start : start + 10]), kind
                assert not slots[0].any() and not slots[2].any()
            with pytest.raises(OSError, match="only 9 of 10 bytes are there"):
                index.read_into(7, slots[1], len(record) - 9)


def test_many_shards_stay_open(tmp_path: Path) -> None:
    """600 shards under a soft limit of 128 descriptors are all kept open, the limit is raised no further than needed;
    under a hard limit what has no room is opened for each read, with the same bytes."""
    for shard in range(600):
        make_tar(tmp_path / f"shards/{shard:03d}.tar", {f"c{shard:03d}/1.jpg": b"%03d" % shard})
    program = (
        "import os, resource, sys; from alexnet_ddp.data.index import open_index\n"
        "limit = int(sys.argv[3]); resource.setrlimit(resource.RLIMIT_NOFILE, (128, limit))\n"
        "index = open_index(sys.argv[1]); fd = lambda: len(os.listdir('/proc/self/fd')); before = fd()\n"
        "assert all(index.read(n) == b'%03d' % n for n in range(600)) and index.read(3) == b'003'\n"
        "print(fd() - before, resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1300)"
    )

    def kept(hard: int) -> str:
        command = [sys.executable, "-c", program, str(tmp_path / "shards"), "", str(hard)]
        environment = {**os.environ, "ALEXNET_DDP_CACHE": str(tmp_path / "cache")}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert kept(4096) == "600 True\n"
    few = int(kept(600).split()[0])
    assert 0 < few < 100  # 600 less those left for other things, less what is open already


def test_a_forked_child_opens_its_own_descriptors(copies: dict[str, str], cache: Path) -> None:
    """A child forked after the first read, even with the lock held, reads right bytes on its own."""
    index = open_index(copies["tar"], cache_dir=cache)
    expected = index.read(3)
    index._tars._lock.acquire()  # as another thread would hold it while it opens a tar
    child = os.fork()
    if child == 0:
        fine = not index._tars._descriptors and index.read(3) == expected
        os._exit(0 if fine else 1)
    index._tars._lock.release()
    deadline = time.monotonic() + 10  # a child that hangs must not outlive the test
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    assert ended == (child, 0)
    assert index.read(3) == expected


def test_a_tar_replaced_under_the_index_is_refused(tmp_path: Path, cache: Path) -> None:
    """A tar that changed between index and first read is refused, not read at the wrong place."""
    tar = make_tar(tmp_path / "a.tar", {"c/1.jpg": b"one", "d/2.jpg": b"two"})
    index = open_index(str(tar), cache_dir=cache)
    make_tar(tar, {"c/0.jpg": b"zero" * 999, "c/1.jpg": b"one", "d/2.jpg": b"two"})
    with pytest.raises(UserError, match="a.tar: was changed after its index was made"):
        index.read(0)


def test_a_tar_cut_while_it_is_read_is_an_os_error(tmp_path: Path, cache: Path) -> None:
    """Bytes that have gone are an OSError that says how many are left, never a short image."""
    tar = make_tar(tmp_path / "a.tar", {"c/1.jpg": b"1" * 700, "d/2.jpg": b"2" * 700})
    index = open_index(str(tar), cache_dir=cache)
    assert len(index.read(0)) == 700
    os.truncate(tar, 600)
    with pytest.raises(OSError, match="only 88 of 700 bytes") as caught:
        index.read(0)
    assert caught.value.errno == errno.EIO and caught.value.filename == str(tar)


def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts scans from here on."""
    seen: list[str] = []
    for name in ("scan_folder", "scan_tars"):
        scan = getattr(index_module, name)

        def counted(source: Source, journal: Journal, scan=scan) -> Scan:
            seen.append(str(source))
            return scan(source, journal)

        monkeypatch.setattr(index_module, name, counted)
    return seen


@pytest.mark.parametrize("kind", ["folder", "tar", "brace range", "WebDataset"])
def test_the_second_opening_reads_the_cache(
    kind: str, copies: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index from the cache equals the scanned one in every respect, and nothing is scanned for it."""
    seen = scans(monkeypatch)
    first, second = (open_index(copies[kind], cache_dir=cache) for _ in range(2))
    assert len(seen) == 1 and second.cache.startswith("read from")
    assert (first.identity, first.storage, first.classes, first.notes) == (
        second.identity,
        second.storage,
        second.classes,
        second.notes,
    )
    for name in Table.COLUMNS:
        left, right = getattr(first.table, name), getattr(second.table, name)
        assert left.dtype == right.dtype and np.array_equal(left, right), name
    assert [first.where(n) for n in range(len(first))] == [second.where(n) for n in range(len(second))]
    assert not list(cache.rglob(".tmp-*"))


def test_a_changed_source_is_scanned_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewritten tar, a new shard, and a file added anywhere in a folder are seen at the next opening."""
    shards, folder = tmp_path / "shards", tmp_path / "folder"
    make_tar(shards / "0.tar", {"c/1.jpg": b"x"})
    make_folder(folder, {"c/sub/1.jpg": b"x", "d/1.jpg": b"x"})
    seen = scans(monkeypatch)

    def sizes() -> tuple[int, int]:
        return len(open_index(str(shards), cache_dir=cache)), len(open_index(str(folder), cache_dir=cache))

    assert sizes() == sizes() == (1, 2) and len(seen) == 2
    os.utime(make_tar(shards / "0.tar", {"c/1.jpg": b"x", "c/2.jpg": b"x"}), ns=(10**18, 10**18))
    (folder / "c/sub/2.jpg").write_bytes(b"x")
    os.utime(folder / "c/sub", ns=(10**18, 10**18))
    assert sizes() == sizes() == (2, 3) and len(seen) == 4
    make_tar(shards / "1.tar", {"c/3.jpg": b"x"})
    (folder / "e").mkdir()
    (folder / "e/1.jpg").write_bytes(b"x")
    settle(folder)
    assert sizes() == sizes() == (3, 4) and len(seen) == 6


def test_what_has_just_changed_is_not_cached(tmp_path: Path, cache: Path) -> None:
    """A source younger than two seconds may change within one tick of a coarse clock: not cached yet."""
    tar = make_tar(tmp_path / "a.tar", {"c/1.jpg": b"x"})
    os.utime(tar)
    assert "changed within the last two seconds" in open_index(str(tar), cache_dir=cache).cache
    assert not cache.exists()


def damage_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = data.index(b"labels.npy") + 200  # within the first column
    data[place] ^= 1
    path.write_bytes(data)


def damage_column(path: Path, **changes: object) -> None:
    """A well-formed file with wrong contents, as another program or version may leave it."""
    with np.load(path) as stored:
        columns = dict(stored)
    for name, change in changes.items():
        columns[name] = change(columns[name])  # type: ignore[operator]
    np.savez(path, **columns)


@pytest.mark.parametrize(
    "damage",
    [
        damage_bytes,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"something else altogether"),
        lambda path: path.write_bytes(path.read_bytes()[:-300]),
        lambda path: path.write_bytes(path.read_bytes()[300:]),
        lambda path: np.savez(path, other=np.zeros(3)),
        lambda path: np.savez(path, meta=np.array([{"a": "pickle"}], dtype=object)),
        lambda path: damage_column(path, labels=lambda labels: labels + 1),
        lambda path: damage_column(path, labels=lambda labels: labels.astype(np.int64)),
        lambda path: damage_column(path, offsets=lambda offsets: offsets[:-1]),
        lambda path: damage_column(path, names=lambda names: names[::-1]),
        lambda path: damage_column(path, containers=lambda containers: containers - 1),
        lambda path: damage_column(path, meta=lambda _: np.frombuffer(b"[1, 2]", np.uint8)),
        lambda path: damage_column(path, meta=lambda _: np.frombuffer(b"\xff{", np.uint8)),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_cache_is_made_anew(damage, tmp_path: Path, cache: Path) -> None:
    """A cache file that is cut, changed in one bit, foreign or of another shape never reaches a user."""
    tar = make_tar(tmp_path / "a.tar", {"c/1.jpg": b"one", "d/2.jpg": b"two"})
    first = open_index(str(tar), cache_dir=cache)
    damage(next(cache.rglob("*.npz")))
    second = open_index(str(tar), cache_dir=cache)
    assert not second.cache.startswith("read from")
    assert second.identity == first.identity and [second.read(n) for n in range(2)] == [b"one", b"two"]


def test_an_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    """Where the cache can't be written the index is held in memory, and says so."""
    tar = make_tar(tmp_path / "a.tar", {"c/1.jpg": b"one"})
    (tmp_path / "file").write_bytes(b"")
    index = open_index(str(tar), cache_dir=tmp_path / "file")
    assert index.read(0) == b"one" and index.cache.startswith("not kept (")


def test_the_cache_lies_where_it_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default cache directory follows ALEXNET_DDP_CACHE, then XDG_CACHE_HOME, then the home directory."""
    default = index_module.index_cache.default_cache_dir
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ALEXNET_DDP_CACHE", str(tmp_path / "own"))
    assert default() == tmp_path / "own"
    monkeypatch.delenv("ALEXNET_DDP_CACHE")
    assert default() == tmp_path / "xdg/alexnet-ddp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default() == tmp_path / "home/.cache/alexnet-ddp"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert default().name == f"alexnet-ddp-{os.getuid()}"


def test_memory_of_a_tenth_of_imagenet() -> None:
    """A tenth of 1.28 million samples is held in less than 6.4 MB, without an object for each; any name is found."""
    table = scale.imagenet_like(128_117)
    source = Source("tar", ("/data/train.tar",), "/data/train.tar")
    index = Index(table, source=source, stamps=[Stamp("/data/train.tar", 1, 1)])
    assert len(index) == 128_117 and index.table.nbytes < 6.4e6
    assert index.name(0) == "n01440764/n01440764_0" and index.name(128_116).startswith("n09351845/n09351845_")
    assert index.where(1) == "/data/train.tar: n01440764.tar/n01440764_1036.JPEG at offset 111536"
    held = [value for owner in (index, table) for value in vars(owner).values()]
    assert all(len(value) <= 1000 for value in held if isinstance(value, list | tuple | dict | set))


def test_check_pair_names_the_difference(tmp_path: Path, cache: Path) -> None:
    """Class lists that differ are refused with the first missing and extra classes; equal ones pass."""

    def index(name: str, members: dict[str, bytes]) -> Index:
        return open_index(str(make_tar(tmp_path / f"{name}.tar", members)), cache_dir=cache)

    train = index("train", {f"{name}/1.jpg": b"x" for name in ("cat", "dog", "eel")})
    check_pair(train, index("val", {f"{name}/2.jpg": b"x" for name in ("eel", "cat", "dog")}))
    with pytest.raises(UserError, match=r"(?s)has 3.*has 2.*Only in training \(2\): dog, eel\..*Only in valida.*fox"):
        check_pair(train, index("other", {f"{name}/2.jpg": b"x" for name in ("cat", "fox")}))

    numbers = [str(number) for number in range(11)]
    sorted_by_name = index("names", {f"{number}/1.jpg": b"x" for number in numbers})
    pairs = {f"{number}.jpg": b"x" for number in numbers} | {f"{number}.cls": number.encode() for number in numbers}
    with pytest.raises(UserError, match="their order isn't"):
        check_pair(sorted_by_name, index("numbers", pairs))


def test_summary_tells_what_is_there(tmp_path: Path, cache: Path) -> None:
    """The summary holds samples, classes, extremes, bytes, identity, cache and notes."""
    members = {"cat/1.jpg": b"12", "cat/2.jpg": b"34", "dog/1.jpg": b"5", "dog/readme.txt": b"?"}
    index = open_index(str(make_tar(tmp_path / "a.tar", members)), cache_dir=cache)
    lines = dict(line.split(maxsplit=1) for line in summary(index).splitlines())
    assert lines["samples"] == "3" and lines["classes"] == "2 (cat, dog)"
    assert lines["smallest"] == "dog: 1" and lines["largest"] == "cat: 2"
    assert lines["bytes"].startswith("5 ") and lines["identity"] == index.identity
    assert lines["note"] == "1 other files are ignored (1 .txt)"
    assert str(cache) in lines["cache"]


def test_the_index_imports_no_torch() -> None:
    """Opening an index needs NumPy and the standard library only."""
    program = "import sys, alexnet_ddp.data.index, alexnet_ddp.data.tools.download; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
