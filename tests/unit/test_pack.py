"""Packs: the same samples in a stored stage, in bytes that depend on nothing but the source; and what is refused."""

import errno
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import harness
import packs
from alexnet_ddp import cli
from alexnet_ddp.data.decoding.stages import VERSIONS, parse_stage, to_stage
from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.packs import pack as packing
from alexnet_ddp.data.packs import pack_format as form
from alexnet_ddp.data.packs import parallel
from alexnet_ddp.data.packs.pack import DamagedSource, pack
from alexnet_ddp.data.packs.parallel import AHEAD, in_order
from alexnet_ddp.data.records import StoredRecords
from alexnet_ddp.data.tools import commands
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_USER, Unreadable, UserError
from stores import make_tar

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """23 small JPEGs in three classes."""
    return harness.make_images(tmp_path / "source", samples=23)


def refused(message: str, *, source: Path, to: Path, **options: object) -> str:
    with pytest.raises(UserError, match=message) as error:
        pack(str(source), destination=to, **options)  # type: ignore[arg-type]
    return str(error.value)


# --- what a pack is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["original", "short32", "max20", "raw16"])
def test_a_pack_is_its_source(tmp_path: Path, stage: str) -> None:
    """Of every kind of image: the same ids, names, labels and identity, and the very bytes of the stage."""
    source = packs.every_kind(tmp_path / "source")
    made = pack(str(source), destination=tmp_path / "pack", stage=stage, samples_per_shard=4)
    assert (made.samples, made.classes, made.shards) == (10, 2, 3)
    enlarged = {"enlarged": 10} if stage == "short32" else {}  # all are 40 x 30 or less; raw16 is no larger
    assert made.found == {"grey": 2, "CMYK": 1, "palette": 1, "transparent": 1, "16-bit": 1, "turned by EXIF": 1,
                          "PNG": 5, **enlarged}
    with open_index(str(source)) as before, open_index(str(tmp_path / "pack")) as after:
        assert (after.stage, after.identity, after.classes) == (stage, before.identity, before.classes)
        assert np.array_equal(after.labels, before.labels)
        for sample in range(10):
            assert after.name(sample) == before.name(sample)
            assert after.read(sample) == to_stage(before.read(sample), parse_stage(stage))


def test_members(tmp_path: Path, source: Path) -> None:
    """Anyone can read a pack: plain members in the order of ids, raw ones by np.load, all with fixed fields."""
    pack(str(source), destination=tmp_path / "pack", stage="raw16", samples_per_shard=10)
    names = []
    for number in range(3):
        with tarfile.open(tmp_path / "pack" / f"{number:06d}.tar") as tar:
            for member in tar:
                names.append(member.name)
                facts = (member.mtime, member.uid, member.gid, member.mode, member.uname, member.gname)
                assert facts == (0, 0, 0, 0o644, "", "")
                pixels = np.load(io.BytesIO(tar.extractfile(member).read()))  # type: ignore[union-attr]
                assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    with open_index(str(source)) as index:
        assert names == [f"{index.name(sample)}.npy" for sample in range(23)]
        assert np.array_equal(pixels.ravel(), np.frombuffer(to_stage(index.read(22), parse_stage("raw16")), np.uint8))


@pytest.mark.parametrize("side", [10, 256, 9999])
def test_npy_header(side: int) -> None:
    """A raw record's header is what np.save writes, in 128 bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (side, side, 3)})
    assert form.npy_header(side) == file.getvalue()
    assert len(form.npy_header(side)) == form.NPY_HEADER


def test_pack_json(tmp_path: Path, source: Path) -> None:
    """pack.json says what the pack is, with the shards' true sums, and neither dates nor places."""
    pack(str(source), destination=tmp_path / "pack", stage="short32", samples_per_shard=10)
    told = json.loads((tmp_path / "pack" / "pack.json").read_text())
    with open_index(str(source)) as index:
        identity = index.identity
    shards = told.pop("shards")
    assert told.pop("source_bytes") == sum(path.stat().st_size for path in source.rglob("*.jpg"))
    small = sum(min(Image.open(path).size) < 32 for path in source.rglob("*.jpg"))
    assert 0 < small < 23
    assert told == {"schema": 1, "stage": "short32", "identity": identity, "source_identity": identity, "samples": 23,
                    "classes": 3, "made_with": VERSIONS, "samples_per_shard": 10, "found": {"enlarged": small},
                    "damaged": []}
    for shard, samples in zip(shards, (10, 10, 3), strict=True):
        data = (tmp_path / "pack" / shard["name"]).read_bytes()
        assert shard == {"name": shard["name"], "samples": samples, "bytes": len(data),
                         "sha256": hashlib.sha256(data).hexdigest()}


def test_same_bytes(tmp_path: Path, source: Path) -> None:
    """Any number of threads, a tar instead of a folder, another time and place: the same bytes."""
    pack(str(source), destination=tmp_path / "one", stage="short32", samples_per_shard=9, threads=1)
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        tar.add(source, arcname="photos")
    pack(str(tmp_path / "source.tar"), destination=tmp_path / "deep" / "two", stage="short32", samples_per_shard=9,
         threads=7)
    assert packs.content(tmp_path / "one") == packs.content(tmp_path / "deep" / "two")
    assert set(packs.content(tmp_path / "one")) == {"000000.tar", "000001.tar", "000002.tar", "pack.json"}


def test_tars_within_a_tar(tmp_path: Path, source: Path) -> None:
    """A tar of one tar a class, as ImageNet's own training images come, is packed in place."""
    with tarfile.open(tmp_path / "whole.tar", "w") as whole:
        for folder in sorted(source.iterdir()):
            with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as tar:
                for path in folder.iterdir():
                    tar.add(path, arcname=path.name)
            whole.add(tmp_path / f"{folder.name}.tar", arcname=f"{folder.name}.tar")
    pack(str(tmp_path / "whole.tar"), destination=tmp_path / "nested", stage="short32")
    pack(str(source), destination=tmp_path / "plain", stage="short32")
    assert packs.content(tmp_path / "nested") == packs.content(tmp_path / "plain")


def test_of_an_original_pack(tmp_path: Path, source: Path) -> None:
    """A pack of originals is a source like any other; one of another stage is refused with the way out."""
    pack(str(source), destination=tmp_path / "originals", stage="original")
    pack(str(source), destination=tmp_path / "straight", stage="raw16")
    made = pack(str(tmp_path / "originals"), destination=tmp_path / "over", stage="raw16")
    assert made.samples == 23
    assert packs.content(tmp_path / "straight") == packs.content(tmp_path / "over")
    said = refused("is a pack of raw16 already", source=tmp_path / "over", to=tmp_path / "again", stage="short32")
    assert "data.stored=raw16" in said
    assert not (tmp_path / "again").exists()


def test_another_stage_than_the_runs(tmp_path: Path, source: Path) -> None:
    """A run of one stage is refused a pack of another, with what that would take: a new run."""
    pack(str(source), destination=tmp_path / "pack", stage="raw16")
    with open_index(str(tmp_path / "pack")) as index, pytest.raises(UserError, match="holds raw16") as error:
        StoredRecords(index, "original")
    assert "data.stored=raw16 in a new run" in str(error.value) and "can't switch" in str(error.value)


def test_numbered_classes_keep_their_order(tmp_path: Path) -> None:
    """Classes known by number are sorted as numbers (9 before 10), in the pack as in its source."""
    make_tar(tmp_path / "shard.tar", {name: data for number in range(12) for name, data in (
        (f"{number:04d}.jpg", packs.jpeg(20, 20)), (f"{number:04d}.cls", str(number).encode()))})
    pack(str(tmp_path / "shard.tar"), destination=tmp_path / "pack", stage="short32", samples_per_shard=5)
    with open_index(str(tmp_path / "shard.tar")) as before, open_index(str(tmp_path / "pack")) as after:
        assert after.classes == before.classes == [str(number) for number in range(12)]
        assert after.identity == before.identity


def test_names_that_are_no_directories(tmp_path: Path) -> None:
    """A class name that can't be a directory of a tar is refused by name."""
    make_tar(tmp_path / "shard.tar", {
        "a.jpg": packs.jpeg(20, 20), "a.json": b'{"class_name": "cat"}',
        "b.jpg": packs.jpeg(20, 20), "b.json": b'{"class_name": "black/white"}'})
    assert "'black/white'" in refused("become directories", source=tmp_path / "shard.tar", to=tmp_path / "pack")


def test_long_names(tmp_path: Path) -> None:
    """Names beyond what a plain tar header holds, and such that aren't UTF-8, come back as they were."""
    for name in (b"x" * 180 + b".jpg", b"caf\xe9.jpg"):
        path = tmp_path / "source" / "class"
        path.mkdir(parents=True, exist_ok=True)
        with open(bytes(path) + b"/" + name, "wb") as out:
            out.write(packs.jpeg(20, 20))
    pack(str(tmp_path / "source"), destination=tmp_path / "pack", stage="original")
    with open_index(str(tmp_path / "source")) as before, open_index(str(tmp_path / "pack")) as after:
        assert after.identity == before.identity


def test_enlarged_images_are_told(tmp_path: Path) -> None:
    """How many images were smaller than the stage is told, also of a pack that went on; maxN enlarges none."""
    for number, side in enumerate((20, 40, 48, 64)):
        packs.save(tmp_path / "source" / "a" / f"{number}.jpg", packs.pixels(side, 64))
    for stage, enlarged in (("short48", 2), ("raw48", 2), ("max48", 0), ("short16", 0)):
        for _ in range(2):  # the second finds it finished
            made = pack(str(tmp_path / "source"), destination=tmp_path / stage, stage=stage, samples_per_shard=3)
            told = [line for line in made.summary().splitlines() if line.startswith("enlarged")]
            assert [line.split()[1:5] for line in told] == ([["2", "of", "4", "images:"]] if enlarged else [])


def test_what_the_source_lacks_is_told(tmp_path: Path) -> None:
    """Notes on the source, such as members of a tar that were passed over, are told of its pack as well."""
    make_tar(tmp_path / "source.tar", {"a/1.jpg": packs.jpeg(20, 20), "../a/2.jpg": packs.jpeg(20, 20)})
    made = pack(str(tmp_path / "source.tar"), destination=tmp_path / "pack", stage="short16")
    assert made.samples == 1
    assert "note      of the source: 1 tar member passed over: '..' in the path" in made.summary()


# --- going on ---------------------------------------------------------------------------------------------------


class Cut(Exception):
    """Where a test ends a pack."""


def cut_at(monkeypatch: pytest.MonkeyPatch, shard: int, problem: BaseException) -> None:
    """Writing the shard of that number fails from its second member on."""
    write = form.ShardWriter.write

    def failing(self: form.ShardWriter, piece: bytes) -> None:
        if self._name == form.shard_name(shard) and self.bytes:
            raise problem
        write(self, piece)

    monkeypatch.setattr(form.ShardWriter, "write", failing)


def test_goes_on(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted, the same call makes only what was not finished, to the same bytes, and leaves no stray file."""
    pack(str(source), destination=tmp_path / "whole", stage="short32", samples_per_shard=6)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_at(patch, 2, Cut())
        pack(str(source), destination=tmp_path / "cut", stage="short32", samples_per_shard=6)
    left = packs.content(tmp_path / "cut")
    assert {"000000.tar", ".done-000000.json", "000001.tar", ".done-000001.json"} <= set(left)
    assert "pack.json" not in left and "000002.tar" not in left
    with pytest.raises(UserError, match="unfinished pack"):
        open_index(str(tmp_path / "cut"))
    (tmp_path / "cut" / ".tmp-000003.tar").write_bytes(b"of a kill")
    made = pack(str(source), destination=tmp_path / "cut", stage="short32", samples_per_shard=6)
    assert made.made == 11
    assert "12 images of the source were done before" in made.summary()
    assert packs.content(tmp_path / "cut") == packs.content(tmp_path / "whole")


def test_a_finished_pack_is_not_made_again(tmp_path: Path, source: Path) -> None:
    """The same call on a finished pack says so and clears what a kill at the very end left; others are refused."""
    to = tmp_path / "pack"
    pack(str(source), destination=to, stage="short32")
    before = packs.content(to)
    (to / ".done-000000.json").write_text("{}")
    again = pack(str(source), destination=to, stage="short32")
    assert again.made == 0 and "23 images of the source were done before" in again.summary()
    assert packs.content(to) == before
    refused("holds a finished pack already, with another --stage", source=source, to=to, stage="raw16")
    assert packs.content(to) == before  # no lock's file either
    other = harness.make_images(tmp_path / "other", samples=24)
    refused("holds a finished pack already, with another source", source=other, to=to, stage="short32")
    (to / "000000.tar").write_bytes(b"")
    refused("000000.tar: must have", source=source, to=to, stage="short32")


def test_others_don_t_go_on(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unfinished pack goes on only with what it was begun with: stage, shards, samples, the source's files."""
    to = tmp_path / "pack"
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_at(patch, 2, Cut())
        pack(str(source), destination=to, stage="short32", samples_per_shard=6)
    left = packs.content(to)
    assert "short32, now raw16" in refused("another --stage", source=source, to=to, stage="raw16", samples_per_shard=6)
    assert "6, now 7" in refused("--samples-per-shard", source=source, to=to, stage="short32", samples_per_shard=7)
    other = harness.make_images(tmp_path / "other", samples=24)
    assert "all ids move" in refused("another source", source=other, to=to, stage="short32", samples_per_shard=6)
    first = sorted(source.rglob("*.jpg"))[0]
    data = first.read_bytes()
    first.write_bytes(data + b"more")
    refused("files have changed", source=source, to=to, stage="short32", samples_per_shard=6)
    assert packs.content(to) == left
    first.write_bytes(data)
    assert pack(str(source), destination=to, stage="short32", samples_per_shard=6).made == 11


def test_interrupted_by_hand(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C leaves with its own code, says that the same command goes on, and the threads are joined."""
    cut_at(monkeypatch, 1, KeyboardInterrupt())
    words = ["data", "pack", str(source), str(tmp_path / "pack"), "--stage", "short32", "--samples-per-shard", "6"]
    assert cli.main(words) == EXIT_INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("ALEXNET_DDP_CACHE", str(tmp_path / "cache"))
    assert cli.main(words) == EXIT_FINISHED
    out = capsys.readouterr().out
    assert f"data.train={tmp_path / 'pack'} data.stored=short32" in out
    assert "begun with another stage can't switch" in out
    assert "23 images of 3 classes" in out


# --- damaged images ---------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(source: Path) -> list[Path]:
    """Three files of the source that can't be decoded: cut short, of no bytes, and text."""
    chosen = [sorted(source.rglob("*.jpg"))[place] for place in (2, 9, 20)]
    chosen[0].write_bytes(chosen[0].read_bytes()[:300])
    chosen[1].write_bytes(b"")
    chosen[2].write_bytes(b"<html>404</html>")
    return chosen


@pytest.mark.parametrize("stage", ["original", "short32", "raw16"])
def test_damaged_images_are_all_named(tmp_path: Path, source: Path, damaged: list[Path], stage: str) -> None:
    """Without --skip-damaged all are named at the end; the other shards stay, and mended files are taken up."""
    to = tmp_path / "pack"
    with pytest.raises(DamagedSource, match="3 of 23 images are damaged") as error:
        pack(str(source), destination=to, stage=stage, samples_per_shard=4)
    for path, sample, why in zip(damaged, (2, 9, 20), ("", "no bytes", "not a JPEG or PNG"), strict=True):
        assert f"{path} (sample {sample}): {why}" in str(error.value)
    assert "--skip-damaged" in str(error.value)
    assert not (to / "pack.json").exists()
    sound = sorted(source.rglob("*.jpg"))[0]
    for path in damaged:
        path.write_bytes(sound.read_bytes())
    assert pack(str(source), destination=to, stage=stage, samples_per_shard=4).made == 11  # three shards of six
    pack(str(source), destination=tmp_path / "afresh", stage=stage, samples_per_shard=4)
    assert packs.content(to) == packs.content(tmp_path / "afresh")


def test_damaged_images_are_skipped(tmp_path: Path, source: Path, damaged: list[Path]) -> None:
    """--skip-damaged lists them in pack.json; going on so after a refusal gives the bytes of one go."""
    refused("are damaged", source=source, to=tmp_path / "pack", stage="short32", samples_per_shard=4)
    made = pack(str(source), destination=tmp_path / "pack", stage="short32", samples_per_shard=4, skip_damaged=True)
    assert (made.samples, made.made) == (20, 0)
    assert "3 damaged images" in made.summary()
    pack(str(source), destination=tmp_path / "afresh", stage="short32", samples_per_shard=4, skip_damaged=True)
    assert packs.content(tmp_path / "pack") == packs.content(tmp_path / "afresh")
    told = json.loads((tmp_path / "pack" / "pack.json").read_text())
    assert [(one["sample"], one["name"].partition("/")[0]) for one in told["damaged"]] == [
        (2, "class0"), (9, "class1"), (20, "class2")]
    with open_index(str(tmp_path / "pack")) as index:
        assert len(index) == 20
        assert index.identity == told["identity"] != told["source_identity"]
        left = {index.name(sample) for sample in range(20)}
    for path in damaged:
        path.unlink()
    with open_index(str(source)) as index:  # the source without them is the same data set
        assert index.identity == told["identity"]
        assert left == {index.name(sample) for sample in range(20)}


def test_a_shard_of_damaged_images(tmp_path: Path, source: Path) -> None:
    """A shard of which nothing is left isn't written; a class of which nothing is left is refused."""
    files = sorted(source.rglob("*.jpg"))
    for path in files[4:6]:
        path.write_bytes(b"x")
    made = pack(str(source), destination=tmp_path / "pack", stage="short32", samples_per_shard=2, skip_damaged=True)
    assert (made.samples, made.shards) == (21, 11)
    assert not (tmp_path / "pack" / "000002.tar").exists()
    with open_index(str(tmp_path / "pack")) as index:
        assert len(index) == 21
    for path in files[:8]:
        path.write_bytes(b"x")
    refused("Every image of class class0 is damaged", source=source, to=tmp_path / "other", skip_damaged=True)


def test_extreme_shapes(tmp_path: Path) -> None:
    """An image that no JPEG of the stage can hold is named like a damaged one, not a traceback."""
    source = tmp_path / "source"
    packs.save(source / "a" / "line.png", Image.new("RGB", (1350, 5)), "PNG")
    packs.save(source / "a" / "plain.png", Image.new("RGB", (40, 30)), "PNG")
    refused("1 of 2 images is damaged", source=source, to=tmp_path / "pack", stage="short250")


def test_an_unreadable_file(tmp_path: Path, source: Path) -> None:
    """A file that is gone since the index was made is not called damaged: it is named, and nothing is finished."""
    with open_index(str(source)):
        pass
    sorted(source.rglob("*.jpg"))[5].unlink()
    cached = packing.open_index

    def stale(locator: str, **_: object) -> object:
        index = cached(locator)
        read = index.read

        def failing(sample: int) -> bytes:
            if sample == 5:
                raise OSError(errno.EIO, "Input/output error")
            return read(sample)

        index.read = failing  # type: ignore[method-assign]
        return index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "open_index", stale)
        with pytest.raises(Unreadable, match=r"\(sample 5\): Input/output error"):
            pack(str(source), destination=tmp_path / "pack", stage="short32")
    assert not (tmp_path / "pack" / "pack.json").exists()


# --- places -----------------------------------------------------------------------------------------------------


def test_places_that_are_refused(tmp_path: Path, source: Path) -> None:
    """A file, a folder with something in it, one inside the source, one that can't be made: nothing is touched."""
    file = tmp_path / "file"
    file.write_text("mine")
    refused("is a file", source=source, to=file)
    refused("file: can't be written|Not a directory", source=source, to=file / "below")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    refused(r"holds something else already \(thesis.txt\)", source=source, to=mine)
    refused("lies inside the source", source=source, to=source / "pack")
    refused("lies inside the source", source=source, to=source)
    refused("can't be written", source=source, to=Path("/proc/nowhere/pack"))
    refused("nothing is there", source=tmp_path / "sourc", to=tmp_path / "pack")
    refused("--stage", source=source, to=tmp_path / "pack", stage="short")
    refused("--samples-per-shard", source=source, to=tmp_path / "pack", samples_per_shard=0)
    assert packs.content(mine) == {"thesis.txt": hashlib.sha256(b"mine").hexdigest()}
    assert not (source / "pack").exists() and not (tmp_path / "pack").exists()


def test_two_at_once(tmp_path: Path, source: Path) -> None:
    """A second pack into the same folder is refused while the first is at it."""
    (tmp_path / "pack").mkdir()
    with form.lock(tmp_path / "pack"):
        refused("another `alexnet-ddp data pack` is writing there", source=source, to=tmp_path / "pack")
    assert pack(str(source), destination=tmp_path / "pack", stage="short32").samples == 23


def test_a_full_disk(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up is told with the way out; finished shards stay and the same call goes on."""
    with monkeypatch.context() as patch:
        cut_at(patch, 2, OSError(errno.ENOSPC, "No space left on device"))
        refused("the disk .* is full", source=source, to=tmp_path / "pack", stage="short32", samples_per_shard=6)
    assert not list((tmp_path / "pack").glob(".tmp-0*"))
    assert pack(str(source), destination=tmp_path / "pack", stage="short32", samples_per_shard=6).made == 11


@pytest.mark.parametrize(("stage", "free", "fits"), [
    ("raw16", 23 * (512 + 128 + 16 * 16 * 3 + 128), True), ("raw16", 23 * (512 + 128 + 16 * 16 * 3 + 128) - 1, False),
    ("short32", 20_000, False), ("original", 20_000, False), ("short32", 10**9, True)])
def test_space_is_checked_first(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, stage: str, free: int,
                                fits: bool) -> None:
    """What can't fit is refused before a byte is written, and nothing is left behind."""
    class Usage:
        pass

    Usage.free = free  # type: ignore[attr-defined]
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: Usage)
    if fits:
        assert pack(str(source), destination=tmp_path / "pack", stage=stage).samples == 23
    else:
        (tmp_path / "pack").mkdir()  # the user's own: it stays, empty
        refused("Free some, give a folder on another disk", source=source, to=tmp_path / "pack", stage=stage)
        assert packs.content(tmp_path / "pack") == {}
        refused("Free some, give a folder", source=source, to=tmp_path / "deep" / "below" / "pack", stage=stage)
        assert not (tmp_path / "deep").exists()


# --- the machinery ----------------------------------------------------------------------------------------------


def test_in_order_is_bounded() -> None:
    """Results come in order, no more items are taken than a few a thread, and a call's error comes at its turn."""
    taken = []

    def items() -> object:
        for number in range(100):
            taken.append(number)
            yield number

    results = in_order(lambda number: number * number, items(), threads=3)  # type: ignore[arg-type,var-annotated]
    for number in range(100):
        assert next(results) == number * number
        assert len(taken) <= number + 1 + AHEAD * 3
    broken = in_order(lambda number: 1 // (5 - number), range(9), threads=2)
    assert [next(broken) for _ in range(5)] == [0, 0, 0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(broken)


@pytest.mark.parametrize(("slurm", "usable", "expected"), [("", 6, 6), ("4", 6, 4), ("8", 6, 6), ("2(x3)", 6, 6)])
def test_cores_here(monkeypatch: pytest.MonkeyPatch, slurm: str, usable: int, expected: int) -> None:
    """Threads by default: the cores there are, or fewer where Slurm gave the task fewer."""
    monkeypatch.setattr(parallel, "usable_cores", lambda: usable)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    assert parallel.cores_here() == expected


def test_the_command_is_light() -> None:
    """The module of the `data` command imports neither NumPy nor Pillow nor torch before a sub-command needs them."""
    code = "import sys; import alexnet_ddp.data.tools.commands; assert not {'numpy', 'PIL', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("name", sorted(commands.COMMANDS))
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every sub-command of `data` has help and is named in `data --help`."""
    with pytest.raises(SystemExit) as leaving:
        cli.main(["data", name, "--help"])
    assert leaving.value.code == 0
    assert f"usage: alexnet-ddp data {name} " in capsys.readouterr().out
    assert f"\n  {name} " in commands.ABOUT


@pytest.mark.parametrize(("words", "said"), [
    (["pakc"], "Did you mean 'data pack'?"), (["fly"], "There are: index, pack,"), ([], "required"),
    (["pack"], "SRC, DST"), (["pack", "/nowhere", "/nowhere/pack"], "/nowhere: nothing is"),
    (["show", "/nowhere"], "--out"),
    (["show", "/nowhere", "--out", "x.jpg"], "must end in .png"), (["pack", "a", "b", "--threads", "0"], "--threads"),
    (["pack", "a", "b", "--workers", "3"], "data.threads"), (["stats", "/nowhere"], "/nowhere"),
    (["verify", "/nowhere"], "/nowhere")])
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Mistakes on the command line of `data` are one message, with code 2."""
    assert cli.main(["data", *words]) == EXIT_USER
    out, err = capsys.readouterr()
    assert said in err and out == "" and "Traceback" not in err
