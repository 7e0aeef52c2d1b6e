"""Packs as the index reads them: the source's ids and identity, bare pixels, and what is refused."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from alexnet_ddp.data.index import open_index, summary
from alexnet_ddp.errors import UserError
from stores import make_folder, make_tar, settle, tar_bytes

pytestmark = pytest.mark.usefixtures("own_cache")

SIDE = 12
CLASSES = ("Zebra", "ant", "äffin")
STEMS = ("10", "9", "a.b", "more/1")
NAMES = [f"{label}/{stem}" for label in CLASSES for stem in STEMS]
PIXELS = {name: np.random.default_rng(place).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
          for place, name in enumerate(NAMES)}


def npy(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def make_pack(folder: Path, shards: list[dict[str, bytes]], *, stage: str, identity: str,
              changes: dict[str, object] | None = None) -> Path:
    """Written by hand as the format says; `changes` are to pack.json."""
    names = [f"{number:06d}.tar" for number in range(len(shards))]
    for name, members in zip(names, shards, strict=True):
        make_tar(folder / name, members, format=tarfile.PAX_FORMAT)
    told = {
        "schema": 1, "stage": stage, "identity": identity, "source_identity": identity,
        "samples": sum(map(len, shards)), "classes": len(CLASSES), "made_with": "hands",
        "shards": [{"name": name, "samples": len(members), "bytes": (folder / name).stat().st_size, "sha256": ""}
                   for name, members in zip(names, shards, strict=True)],
        "damaged": [],
    }
    (folder / "pack.json").write_text(json.dumps(told | (changes or {})))
    settle(folder)
    return folder


@pytest.fixture
def identity(tmp_path: Path) -> str:
    return open_index(str(make_folder(tmp_path / "source", {f"{name}.jpg": b"x" for name in NAMES}))).identity


def raw_members(names: list[str] = NAMES) -> dict[str, bytes]:
    return {f"{name}.npy": npy(PIXELS[name]) for name in names}


def raw_pack(folder: Path, identity: str, changes: dict[str, object] | None = None) -> Path:
    parts = [raw_members(NAMES[:5]), raw_members(NAMES[5:])]
    return make_pack(folder, parts, stage=f"raw{SIDE}", identity=identity, changes=changes)


def refusal(folder: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        open_index(str(folder))
    return str(caught.value)


def test_a_raw_pack_gives_bare_pixels(tmp_path: Path, identity: str) -> None:
    """The source's identity and ids; a record is its pixels without NumPy's header, whole or any part, and the cache
    gives the same."""
    pack = raw_pack(tmp_path / "pack", identity)
    for again in range(2):
        with open_index(str(pack)) as index:
            assert index.cache.startswith("read from") == bool(again)
            assert (index.stage, index.identity, index.classes) == (f"raw{SIDE}", identity, list(CLASSES))
            assert str(index.source) == str(pack)
            assert [index.name(n) for n in range(len(index))] == NAMES
            slot = np.zeros((2, SIDE, SIDE, 3), np.uint8)
            for sample, name in enumerate(NAMES):
                assert index.read(sample) == PIXELS[name].tobytes()
                index.read_into(sample, slot[1])
                assert np.array_equal(slot[1], PIXELS[name]) and not slot[0].any()
            index.read_into(3, slot[0, :2], SIDE * 3)
            assert np.array_equal(slot[0, :2], PIXELS[NAMES[3]][1:3])
            with pytest.raises(OSError, match="bytes are there"):
                index.read_into(3, slot[1], 1)


@pytest.mark.parametrize("stage", ["original", "short256", "max500"])
def test_a_pack_of_images(tmp_path: Path, identity: str, stage: str) -> None:
    """JPEG packs: stage, identity and bytes, with the extension of the source for originals."""
    members = {f"{name}.{'JPEG' if stage == 'original' else 'jpg'}": name.encode() * 3 for name in NAMES}
    with open_index(str(make_pack(tmp_path / "pack", [members], stage=stage, identity=identity))) as index:
        assert (index.stage, index.identity) == (stage, identity)
        assert [index.read(n) for n in range(len(index))] == list(members.values())


def test_a_pack_is_called_one(tmp_path: Path, identity: str) -> None:
    """`data index` calls a pack a pack, with its stage and shards, and a tar a tar."""
    with open_index(str(raw_pack(tmp_path / "pack", identity))) as index:
        assert f"{tmp_path / 'pack'} (pack of stage raw{SIDE}, 2 shards)" in summary(index)
    with open_index(str(make_tar(tmp_path / "plain.tar", {"a/1.jpg": b"x"}))) as index:
        assert f"{tmp_path / 'plain.tar'} (tar)" in summary(index)
        assert "balance   1 sample in each class" in summary(index) and "smallest" not in summary(index)


def test_classes_keep_the_order_of_the_source(tmp_path: Path) -> None:
    """Numbered classes sort as numbers in shards; their pack has the same labels although 10 sorts before 9."""
    members = {}
    for key, label in (("k1", 10), ("k2", 9), ("k3", 100)):
        members |= {f"{key}.jpg": key.encode(), f"{key}.cls": b"%d" % label}
    source = open_index(str(make_tar(tmp_path / "x.tar", members)))
    packed = {f"{source.name(n)}.jpg": source.read(n) for n in range(3)}
    pack = open_index(str(make_pack(tmp_path / "pack", [packed], stage="original", identity=source.identity)))
    assert pack.classes == ["9", "10", "100"] and pack.identity == source.identity
    assert [pack.read(n) for n in range(3)] == [source.read(n) for n in range(3)]


def test_class_names_that_look_like_splits(tmp_path: Path) -> None:
    """In a pack a class may be called train or test: nothing is guessed from names."""
    members = {"test/1.jpg": b"1", "train/2.jpg": b"2"}
    shards = {"1.jpg": b"1", "1.json": b'{"class_name": "test"}', "2.jpg": b"2", "2.json": b'{"class_name": "train"}'}
    source = open_index(str(make_tar(tmp_path / "x.tar", shards)))
    pack = open_index(str(make_pack(tmp_path / "pack", [members], stage="original", identity=source.identity)))
    assert pack.classes == ["test", "train"]


def test_packs_that_are_not_whole_are_refused(tmp_path: Path, identity: str) -> None:
    """A shard that is missing, of another size or not in pack.json, and a pack that isn't finished, are named."""
    pack = raw_pack(tmp_path / "a", identity)
    (pack / "000001.tar").unlink()
    assert refusal(pack).startswith(f"{pack}: 000001.tar is missing, which pack.json names")
    pack = raw_pack(tmp_path / "b", identity)
    with open(pack / "000001.tar", "ab") as file:
        file.write(bytes(512))
    assert "000001.tar must have " in refusal(pack) and "pack.json, got " in refusal(pack)
    pack = raw_pack(tmp_path / "c", identity)
    make_tar(pack / "000002.tar", {"Zebra/x.jpg": b"x"})
    assert "000002.tar isn't one of the pack's shards" in refusal(pack)
    for number, left in enumerate((".tmp-000002.tar", ".done-000000.json")):
        pack = raw_pack(tmp_path / f"unfinished{number}", identity)
        (pack / "pack.json").unlink()
        (pack / left).write_bytes(b"")
        assert refusal(pack) == f"{pack}: an unfinished pack: run the same `alexnet-ddp data pack` again."
    assert "has no path inside: give" in refusal(f"{raw_pack(tmp_path / 'd', identity)}::Zebra")
    assert "give the folder that holds its pack.json" in refusal(f"{tmp_path}/d/*.tar")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": "0" * 64}, "the shards beside it hold other samples than it says"),
        ({"schema": 2}, "must have schema 1, got 2"),
        ({"stage": "raw"}, "isn't what `alexnet-ddp data pack` writes"),
        ({"stage": "../raw12"}, "isn't what `alexnet-ddp data pack` writes"),
        ({"shards": [{"name": "000000.tar"}]}, "isn't what `alexnet-ddp data pack` writes"),
        ({"shards": []}, "isn't what `alexnet-ddp data pack` writes"),
        ({"shards": [{"name": "../x.tar", "bytes": 3}]}, "isn't what `alexnet-ddp data pack` writes"),
        ({"stage": "raw13"}, "at offset 512 must be uint8 [13, 13, 3] behind a NumPy header of 128 bytes"),
        ({"stage": "short256"}, "no images there"),
    ],
)
def test_a_pack_json_that_is_not_right(changes: dict, message: str, tmp_path: Path, identity: str) -> None:
    """What pack.json says must be its format, and true of the shards."""
    assert message in refusal(raw_pack(tmp_path / "pack", identity, changes))


def test_a_pack_json_that_is_no_json(tmp_path: Path, identity: str) -> None:
    """A file of that name that isn't JSON, or isn't an object, is named."""
    pack = raw_pack(tmp_path / "pack", identity)
    for text in ("{", "[1]", "3"):
        (pack / "pack.json").write_text(text)
        assert f"{pack}/pack.json: isn't what" in refusal(pack)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros((SIDE, SIDE, 3), np.int8)), "must be uint8 [12, 12, 3]"),
        (npy(np.zeros((SIDE, SIDE), np.uint8)), "must be uint8 [12, 12, 3]"),
        (npy(np.asfortranarray(np.zeros((SIDE, SIDE, 3), np.uint8))), "must be uint8 [12, 12, 3]"),
        (npy(PIXELS[NAMES[0]]) + b"x", "must have 560 bytes, got 561"),
        (b"\x93NUMPY\x02\x00" + npy(PIXELS[NAMES[0]])[8:], "must be uint8 [12, 12, 3]"),
        (b"short", "must be uint8 [12, 12, 3]"),
    ],
)
def test_a_raw_record_that_is_not_as_promised(data: bytes, message: str, tmp_path: Path, identity: str) -> None:
    """One member of another type, shape, order, format or length in a raw pack is refused by name and offset."""
    members = raw_members() | {f"{NAMES[7]}.npy": data}
    pack = make_pack(tmp_path / "pack", [members], stage=f"raw{SIDE}", identity=identity)
    found = refusal(pack)
    assert f"000000.tar: {NAMES[7]}.npy at offset " in found and message in found


def test_a_pack_made_again_under_its_index_is_indexed_again(tmp_path: Path, identity: str) -> None:
    """The kept index isn't used once pack.json or a shard has changed."""
    pack = raw_pack(tmp_path / "pack", identity)
    open_index(str(pack))
    assert open_index(str(pack)).cache.startswith("read from")
    (pack / "pack.json").write_text((pack / "pack.json").read_text() + "\n")
    settle(pack / "pack.json")
    assert open_index(str(pack)).cache.startswith("written to")


def test_a_shards_folder_with_plain_names_is_no_pack(tmp_path: Path) -> None:
    """Without pack.json and sidecars, tars named like a pack's are shards like any others."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s/000000.tar").write_bytes(tar_bytes({"a/1.jpg": b"x", "b/2.jpg": b"y"}))
    with open_index(f"{tmp_path}/s") as index:
        assert index.stage == "original" and index.classes == ["a", "b"]
