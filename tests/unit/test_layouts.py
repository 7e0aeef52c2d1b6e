"""Layouts and locators: what is accepted, and the one clear message for each that is not."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from alexnet_ddp import config as recipes
from alexnet_ddp.data.index import Index, open_index, summary
from alexnet_ddp.data.training import open_data
from alexnet_ddp.errors import UserError
from stores import make_tar, tar_bytes


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALEXNET_DDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def folder(root: str, *names: str) -> str:
    """Files of one byte; a name that ends in / is an empty directory."""
    for name in names:
        path = Path(root, name)
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(b"x")
    return root


def tar(path: str, *names: str, **contents: bytes) -> str:
    """Members of one byte, or of `contents` by stem; a name that ends in / is a directory."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            data = contents.get(name.replace(".", "_"), b"x")
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def refusal(locator: str) -> str:
    with pytest.raises(UserError) as caught:
        open_index(locator)
    message = str(caught.value)
    assert message.count("\n") <= 3
    return message


def names(index: Index) -> list[str]:
    return [index.name(sample) for sample in range(len(index))]


# What is accepted


def test_links_in_folders_are_followed() -> None:
    """Links to files, class directories and roots count as what they point to."""
    folder("store", "a/1.jpg", "b/2.jpg")
    Path("root").mkdir()
    os.symlink("../store/a", "root/cat")
    Path("root/dog").mkdir()
    os.symlink("../../store/b/2.jpg", "root/dog/7.jpg")
    os.symlink("root", "link")
    index = open_index("link")
    assert names(index) == ["cat/1", "dog/7"] and index.read(1) == b"x"


@pytest.mark.parametrize("make", [folder, tar])
def test_clutter_is_passed_over_and_other_files_are_counted(make) -> None:
    """Hidden files, ._ files and __MACOSX leave no trace; files of other kinds are counted in a note."""
    clutter = ("__MACOSX/a/._1.jpg", ".git/x/1.jpg", "a/._1.jpg", "a/.hidden.png", "lost+found/", ".DS_Store")
    index = open_index(make("data.tar", "a/1.jpg", "a/notes.txt", "a/2.TXT", "b/1.png", "b/2.webp", *clutter))
    assert names(index) == ["a/1", "b/1"]
    assert index.notes == ["3 other files are ignored (2 .txt, 1 .webp)"]


def test_members_that_lead_out_of_the_tar_are_told() -> None:
    """Members with `..` in their path are passed over, and a note and the refusal of an empty tar say how many."""
    index = open_index(tar("data.tar", "a/1.jpg", "b/1.jpg", "../c/1.jpg", "a/../../2.jpg", "../notes.txt"))
    assert names(index) == ["a/1", "b/1"]
    said = "3 tar members passed over: '..' in the path, which leads out of the archive"
    assert index.notes == [said] and f"note      {said}" in summary(index)
    assert open_index("data.tar").notes == [said]  # from the cache
    assert "1 tar member passed over: '..'" in refusal(tar("out.tar", "../a/1.jpg"))
    tar("shards/0.tar", "a/1.jpg", "../1.jpg")
    tar("shards/1.tar", "b/1.jpg", "../2.jpg")
    assert open_index("shards").notes[0].startswith("2 tar members")
    inner = tar_bytes({"1.jpg": b"x", "../2.jpg": b"x"})
    assert open_index(str(make_tar(Path("nested.tar"), {"a.tar": inner, "b.tar": inner}))).notes == [
        said.replace("3", "2")]


@pytest.mark.parametrize("make", [folder, tar])
def test_images_beside_the_classes_are_noted(make) -> None:
    """An image that lies beside the class directories is left out, and a note says so."""
    index = open_index(make("data.tar", "preview.jpg", "a/1.jpg", "b/1.jpg"))
    assert names(index) == ["a/1", "b/1"]
    assert index.notes == ["1 images beside the class directories are left out"]


def test_a_single_class_is_accepted_with_a_note() -> None:
    """One class is no error; where its directories look like classes the note says what to give instead."""
    assert open_index(folder("one", "a/1.jpg")).notes == ["only one class was found, a"]
    deep = open_index(folder("deep", "ILSVRC/cat/1.jpg", "ILSVRC/dog/1.jpg"))
    assert names(deep) == ["ILSVRC/cat/1", "ILSVRC/dog/1"]
    assert deep.notes[0].endswith("if its directories are the classes, give deep/ILSVRC")


def test_a_common_directory_in_a_tar_needs_no_path_inside() -> None:
    """Without a path inside a tar, the directory that a member lies in is its class, whatever lies above."""
    path = tar("x.tar", "./top/train/", "./top/train/a/", "./top/train/a/1.jpg", "top//train/b/2.jpg")
    assert names(open_index(path)) == names(open_index(f"{path}::top/train/")) == ["a/1", "b/2"]


def test_long_and_odd_names() -> None:
    """Names longer than a tar header holds, and bytes that aren't UTF-8, are kept and printable."""
    long = "a/" + "x" * 200
    raw = os.fsdecode(b"b/\xff\xfe")
    for make in (folder, tar):
        index = open_index(make(f"{make.__name__}.tar", f"{long}.jpg", f"{raw}.jpg"))
        assert names(index) == [long, "b/\\xff\\xfe"] and index.read(1) == b"x"


def shard(path: str, *labels: tuple[str, object]) -> str:
    """WebDataset: (key, label): an int makes a .cls, anything else a .json."""
    members = {}
    for key, label in labels:
        members[f"{key}.jpg"] = b"x"
        if isinstance(label, int):
            members[f"{key}.cls"] = f"{label}\n".encode()
        elif label is not None:
            members[f"{key}.json"] = label if isinstance(label, bytes) else json.dumps(label).encode()
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_numbered_shards_sort_as_numbers() -> None:
    """Classes known by number, in .cls or .json, are named by it and sorted as numbers; keys are names."""
    path = shard("x.tar", ("k1", 10), ("k2", 9), ("k3", {"label": 100}), ("d/k4", {"cls": 9}))
    index = open_index(path)
    assert index.classes == ["9", "10", "100"]
    assert names(index) == ["9/d/k4", "9/k2", "10/k1", "100/k3"]
    assert index.where(0).startswith(f"{Path(path).absolute()}: d/k4.jpg at offset ")


def test_named_shards_sort_by_name() -> None:
    """Class names in .json win over numbers and sort by name, as in a folder."""
    path = shard("x.tar", ("k1", {"label": 0, "class_name": "dog"}), ("k2", {"label": 1, "class": "cat"}))
    assert names(open_index(path)) == ["cat/k2", "dog/k1"]


def test_json_without_labels_is_no_shard() -> None:
    """A .json beside an image that holds no label leaves the directories as the classes."""
    path = shard("x.tar", ("a/1", {"width": 3}), ("b/2", None))
    assert names(open_index(path)) == ["a/1", "b/2"]


# What is refused


def test_missing_paths_show_what_is_there() -> None:
    """A path that isn't there names the nearest parent that is, what it holds, and the nearest name."""
    folder("data/imagenet/train", "a/1.jpg")
    message = refusal("data/imagnet/train")
    assert "data/imagnet/train: nothing is there" in message
    assert f"{Path('data').absolute()} exists and holds: imagenet." in message
    assert f"Did you mean {Path('data/imagenet').absolute()}?" in message
    assert "nothing is there" in refusal("data/imagenet::train2") and "nothing is there" in refusal("data/*.tar")


def test_flat_images_need_labels() -> None:
    """Images without class directories are refused with the way out, in a folder, a tar, a path inside."""
    for locator in (folder("val", "1.jpg", "2.jpg"), tar("v.tar", "1.jpg", "2.jpg")):
        message = refusal(locator)
        assert f"{locator}: 2 images lie in it without class directories" in message and "CLASS/image" in message
    inside = tar("both.tar", "train/a/1.jpg", "val/1.jpg")
    assert "both.tar::val: 1 images lie in it without class directories" in refusal(f"{inside}::val")


def test_a_root_one_level_off_is_led_to_the_right_one() -> None:
    """train/ and val/ in place of classes are refused; the message gives the locators to use."""
    message = refusal(folder("data", "train/a/1.jpg", "val/a/1.jpg", "devkit/readme.txt"))
    assert "it holds train, val" in message and "Give data/train or data/val instead" in message
    assert "Give one of: x.tar::test (1 images), x.tar::train (2 images)" in refusal(
        tar("x.tar", "train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg")
    )
    assert "Give flat.tar::train or flat.tar::val instead" in refusal(tar("flat.tar", "train/1.jpg", "val/1.jpg"))
    assert "Give y.tar::test or y.tar::train instead" in refusal(f"{tar('y.tar', 'train/a/1.jpg', 'test/a/1.jpg')}::")
    assert "Give w.tar::train or w.tar::val" in refusal(shard("w.tar", ("train/1", 0), ("val/1", 0)))


def test_classes_at_several_depths_need_a_path_inside() -> None:
    """A tar whose images lie at different depths is refused with the paths to choose from."""
    path = tar("x.tar", "a/1.jpg", "b/more/2.jpg")
    assert "Give one of: x.tar:: (1 images), x.tar::b (1 images)" in refusal(path)
    assert names(open_index(f"{path}::")) == ["a/1", "b/more/2"]


def test_a_path_that_is_not_in_the_tar() -> None:
    """A path inside that no image lies below is refused with those that exist."""
    path = tar("x.tar", "train/a/1.jpg", "test/a/1.jpg")
    assert "no image lies below val there.\nGive one of: x.tar::test, x.tar::train." in refusal(f"{path}::val")
    assert "no image lies below tra there" in refusal(f"{path}::tra")


def test_empty_classes_are_named() -> None:
    """A class directory without images is refused by name, also with files of other kinds."""
    for locator in (
        folder("data", "a/1.jpg", "b/", "c/x/"),
        tar("x.tar", "a/", "a/1.jpg", "b/", "c/", "c/x/"),
    ):
        assert "2 hold none: b, c." in refusal(locator)
    assert "1 hold none: b." in refusal(folder("webp", "a/1.jpg", "b/1.webp"))


def test_places_without_images_tell_what_they_hold() -> None:
    """Neither images nor classes: the message counts what is there instead."""
    assert "no images there (.jpg, .jpeg, .jpe or .png); found: no files at all" in refusal(folder("none", "a/"))
    assert "found: 2 .webp, 1 .txt" in refusal(tar("x.tar", "a/1.webp", "a/2.webp", "a/3.txt"))
    assert "no images there" in refusal(tar("empty.tar"))
    nested = refusal(tar("nested.tar", "n01440764.tar.gz", "n01443537.tar.gz"))
    assert "found: 2 .gz" in nested and "unpack the outer one and `gunzip` them" in nested
    assert "found: 1 .npy" in (raw := refusal(tar("raw.tar", "a/1.npy"))) and "folder that holds its pack.json" in raw


def test_samples_that_share_a_name_are_both_named() -> None:
    """Two files of one class and name, in another format or another shard, are refused with both places."""
    message = refusal(folder("data", "a/1.jpg", "a/1.png", "b/1.jpg"))
    assert "data/a/1.jpg\n" in message and "data/a/1.png\n" in message
    tar("shards/0.tar", "a/1.jpg")
    tar("shards/1.tar", "a/1.jpg")
    message = refusal("shards")
    assert "0.tar: a/1.jpg at offset 512" in message and "1.tar: a/1.jpg at offset 512" in message


def test_empty_images_in_tars_are_for_the_policy_to_judge() -> None:
    """Image files of zero bytes in a tar are refused, named, before a run under data.on_error=fail, where sizes cost
    nothing; under skip they are samples, as in a folder."""
    place = tar("x.tar", "a/1.jpg", "a/2.jpg", "b/1.jpg", **{"a/2_jpg": b""})
    tree: dict[str, Any] = {"model": {"num_classes": 2}, "data": {"train": place}}
    with pytest.raises(UserError, match=r"data.train: 1 image of no bytes: .*a/2.jpg.*\n.*data.on_error=skip"):
        open_data(recipes.build(tree))
    data = open_data(recipes.build(recipes.apply_overrides(tree, ["data.on_error=skip"])))
    assert names(data.train) == ["a/1", "a/2", "b/1"]
    data.close()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_tars_are_refused(kind: bytes) -> None:
    """A link has no bytes of its own in a tar: refused with the options that store them."""
    with tarfile.open("x.tar", "w") as archive:
        member = tarfile.TarInfo("a/1.jpg")
        member.type, member.linkname = kind, "a/2.jpg"
        archive.addfile(member)
    assert "--dereference --hard-dereference" in refusal("x.tar")


def test_broken_and_circular_links_in_folders_are_refused() -> None:
    """A link to nothing, or to a directory above itself, is named."""
    folder("broken", "a/1.jpg")
    os.symlink("nowhere.jpg", "broken/a/2.jpg")
    assert "a/2.jpg: is a link to something that isn't there" in refusal("broken")
    folder("circle", "a/1.jpg")
    os.symlink("..", "circle/a/up")
    assert "circle/a/up: is a link to a directory that contains it" in refusal("circle")


def test_compressed_archives_say_how_to_decompress() -> None:
    """A compressed archive, by name or by its first bytes, is refused with the command that helps."""
    plain = Path(tar("x.tar", "a/1.jpg")).read_bytes()
    for name in ("x.tar.gz", "x.tgz", "disguised.tar"):
        Path(name).write_bytes(gzip.compress(plain))
        assert "is compressed" in refusal(name) and "`gunzip " in refusal(name)
    Path("x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
    assert "`unzstd -k x.tar.zst`" in refusal("x.tar.zst")
    Path("x.zip").write_bytes(b"PK\x03\x04 rest")
    assert "`unzip x.zip`" in refusal("x.zip")
    Path("shards").mkdir()
    Path("shards/0.tar.gz").write_bytes(gzip.compress(plain))
    assert "shards/0.tar.gz is compressed" in refusal("shards")


def test_what_is_no_tar() -> None:
    """Other files are refused as such, whether they are called .tar or not."""
    Path("picture.jpg").write_bytes(b"\xff\xd8\xff")
    assert "must be a folder of class directories or a .tar file" in refusal("picture.jpg")
    Path("text.tar").write_bytes(b"some text " * 200)
    assert "not a tar archive, or damaged at offset 0" in refusal("text.tar")
    Path("nothing.tar").write_bytes(b"")
    assert "not a tar archive, or damaged at offset 0" in refusal("nothing.tar")


def test_tars_cut_short_are_refused_wherever_they_end() -> None:
    """Cut at any 64 bytes, a tar is refused with its name and the offset at which it ends."""
    whole = Path(tar("whole.tar", "a/1.jpg", "a/" + "l" * 120 + ".jpg", "b/2.jpg", **{"b/2_jpg": b"y" * 700}))
    data = whole.read_bytes().rstrip(b"\0")
    end = -(-len(data) // 512) * 512  # the end mark begins here
    for size in range(64, end + 1, 64):
        Path("cut.tar").write_bytes(whole.read_bytes()[:size])
        message = refusal("cut.tar")
        assert "cut.tar: " in message and "offset" in message, size
        assert f"is cut short: it ends at offset {size}, " in message or "damaged at offset" in message, size
    Path("cut.tar").write_bytes(whole.read_bytes()[: end - 512])
    assert f"{end - 512}, inside b/2.jpg, which begins at offset {end - 1024}" in refusal("cut.tar")
    Path("cut.tar").write_bytes(whole.read_bytes()[: end + 1024])
    assert len(open_index("cut.tar")) == 3


def test_damage_inside_a_tar_is_not_taken_for_its_end() -> None:
    """A damaged header or a second archive behind the first is refused: the rest would be lost."""
    data = bytearray(Path(tar("x.tar", "a/1.jpg", "a/2.jpg", "b/3.jpg")).read_bytes())
    data[1024 + 3] ^= 1
    Path("damaged.tar").write_bytes(data)
    assert "the header at offset 1024 is damaged" in refusal("damaged.tar")
    Path("joined.tar").write_bytes(Path("x.tar").read_bytes() * 2)
    assert "more data follows the end mark" in refusal("joined.tar")


def test_missing_shards_are_named() -> None:
    """A brace range with holes names the missing shards; a range that runs backwards is refused."""
    tar("s/a-08.tar", "a/1.jpg")
    tar("s/a-10.tar", "a/2.jpg")
    message = refusal("s/a-{08..12}.tar")
    assert "3 of its 5 shards are missing: s/a-09.tar, s/a-11.tar, s/a-12.tar." in message
    assert "runs backwards: write {08..12}" in refusal("s/a-{12..08}.tar")
    assert "nothing is there" in refusal("s/b-{0..3}.tar")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b"{not json", r"x.tar: k2.json: can't be read as JSON"),
        (None, "every image of a shard needs a label"),
        ({"width": 3}, "every image of a shard needs a label"),
        ({"label": True}, "every image of a shard needs a label"),
        ({"class_name": "cat"}, "named everywhere or numbered everywhere"),
        (-1, "has label -1, but labels must be 0 or more"),
    ],
)
def test_shards_with_bad_labels_are_refused(label: object, message: str) -> None:
    """A label that is missing, negative, unreadable or of another kind is refused with its sample."""
    found = refusal(shard("x.tar", ("k1", 3), ("k2", label)))
    assert message in found and "x.tar" in found and ("k2" in found or "k1" in found)


def test_a_class_file_that_holds_no_integer() -> None:
    """A .cls that isn't an integer is quoted."""
    path = tar("x.tar", "1.jpg", "1.cls", **{"1_cls": b"cat"})
    assert "1.cls: must hold the class as an integer, got b'cat'" in refusal(path)
