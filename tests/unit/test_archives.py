"""ImageNet's archives as published: tars within a tar, and validation images labelled by the devkit."""

import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

import photographs
from alexnet_ddp.data.index import check_pair, open_index, summary
from alexnet_ddp.errors import UserError
from stores import KIT, devkit, make_devkit, make_folder, make_tar, nested, settle, tar_bytes

pytestmark = pytest.mark.usefixtures("own_cache")

WNIDS = ["n01440764", "n01443537", "n01484850"]
TRAIN = {f"{wnid}/{wnid}_{number}.JPEG": f"{wnid} {number}".encode() * 50
         for wnid in WNIDS for number in (10026, 9, 300)}
TRUTH = [3, 1, 1, 2, 3, 2]  # classes of the validation images by number, from 1, in the devkit's order
IN_KIT = ["n01484850", "n01440764", "n01443537"]  # the devkit's order isn't that of the ids
VAL = {f"ILSVRC2012_val_{number:08d}.JPEG": b"image %d" % number for number in range(1, len(TRUTH) + 1)}
VAL_NAMES = sorted(f"{IN_KIT[label - 1]}/ILSVRC2012_val_{number:08d}" for number, label in enumerate(TRUTH, start=1))


def names(locator: Path | str) -> list[str]:
    with open_index(str(locator)) as index:
        return [index.name(sample) for sample in range(len(index))]


def refusal(locator: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        open_index(str(locator))
    return str(caught.value)


def test_a_tar_of_tars_is_the_folder_it_would_unpack_to(tmp_path: Path) -> None:
    """Inner tars are read where they lie: identity, ids, labels and bytes of the unpacked folder, from one file."""
    shuffled = dict(random.Random(1).sample(sorted(TRAIN.items()), len(TRAIN)))
    folder = open_index(str(make_folder(tmp_path / "folder", TRAIN)))
    stores = {
        "outer": make_tar(tmp_path / "ILSVRC2012_img_train.tar", nested(shuffled)),
        "pax": make_tar(tmp_path / "pax.tar", nested(shuffled), format=tarfile.PAX_FORMAT),
        "below": f"{make_tar(tmp_path / 'below.tar', nested(shuffled, below='./top/train/'))}",
    }
    both = nested(TRAIN, below="train/") | nested(TRAIN, below="val/")
    stores["inside"] = f"{make_tar(tmp_path / 'both.tar', both)}::train"
    half = list(shuffled.items())
    for number, part in enumerate((half[:5], half[5:])):
        make_tar(tmp_path / f"parts/train-{number}.tar", nested(dict(part)))
    stores |= {"braces": f"{tmp_path}/parts/train-{{0..1}}.tar", "glob": f"{tmp_path}/parts/train-*.tar",
               "shards": tmp_path / "parts"}
    for kind, locator in stores.items():
        for again in range(2):
            with open_index(str(locator)) as index:
                assert index.cache.startswith("read from") or not again, kind
                assert index.identity == folder.identity and index.classes == WNIDS, kind
                assert [index.read(n) for n in range(len(index))] == [folder.read(n) for n in range(len(folder))], kind
                out = np.empty(4, np.uint8)
                index.read_into(3, out, 2)
                assert out.tobytes() == folder.read(3)[2:6]


def test_a_folder_of_class_tars(tmp_path: Path) -> None:
    """The outer archive unpacked, the inner ones not: each tar is a class, with the same identity and bytes."""
    for name, data in nested(TRAIN).items():
        (tmp_path / "unpacked").mkdir(exist_ok=True)
        (tmp_path / "unpacked" / name).write_bytes(data)
    folder = open_index(str(make_folder(tmp_path / "folder", TRAIN)))
    with open_index(f"{tmp_path}/unpacked") as index:
        assert index.identity == folder.identity
        assert [index.read(n) for n in range(len(index))] == [folder.read(n) for n in range(len(folder))]
        assert index.where(4) == f"{tmp_path}/unpacked/n01443537.tar: n01443537_300.JPEG at offset 3584"
    # Tars called like this that hold class directories are shards like any others.
    make_tar(tmp_path / "dirs/n01440764.tar", {"cat/1.jpg": b"x", "dog/2.jpg": b"y"})
    assert names(tmp_path / "dirs") == ["cat/1", "dog/2"]


def test_offsets_are_those_of_the_outer_file(tmp_path: Path) -> None:
    """A message names the inner tar, the member and the offset in the outer file at which its bytes lie."""
    tar = make_tar(tmp_path / "outer.tar", nested(TRAIN, below="train/"))
    with open_index(str(tar)) as index:
        place, _, offset = index.where(4).rpartition(" at offset ")
        assert place == f"{tar}: train/n01443537.tar/n01443537_300.JPEG"
        assert tar.read_bytes()[int(offset) :].startswith(index.read(4))


def test_photographs_in_a_tar_of_tars(tmp_path: Path) -> None:
    """Real photographs, sixty classes: the nested archive equals folder and flat tar in identity and every byte."""
    with tarfile.open(photographs.archive("imagenet-sample.tar")) as tar:
        members = [member for member in tar if member.isreg()][:60]
        samples = {member.name.removeprefix("train/"): tar.extractfile(member).read() for member in members}
    folder = open_index(str(make_folder(tmp_path / "folder", samples)))
    outer = open_index(str(make_tar(tmp_path / "outer.tar", nested(samples))))
    flat = open_index(f"{make_tar(tmp_path / 'flat.tar', samples)}::")
    assert len(folder.classes) == 60 and folder.identity == outer.identity == flat.identity
    for sample in range(60):
        data = folder.read(sample)
        assert data[:2] == b"\xff\xd8" and data == outer.read(sample) == flat.read(sample)
        assert folder.name(sample) == outer.name(sample)


def test_damage_in_an_inner_tar_is_told_with_the_outer_offset(tmp_path: Path) -> None:
    """An inner tar that is cut short, damaged or no tar at all is named, with the offset in the outer file."""
    inner = tar_bytes({"1.JPEG": b"x" * 600, "2.JPEG": b"y" * 600})
    good = nested(TRAIN)
    cases = {
        "cut.tar": (inner[:2000], "n02.tar: is cut short: it ends at offset"),
        "head.tar": (inner[:1536] + b"\xff" * 3 + inner[1539:], "n02.tar: the header at offset 2048 is damaged"),
        "text.tar": (b"some text " * 200, "n02.tar: not a tar archive, or damaged at offset 512"),
        "joined.tar": (inner * 2, "n02.tar: more data follows the end mark at offset"),
    }
    for name, (data, message) in cases.items():
        tar = make_tar(tmp_path / name, {"n02.tar": data} | good)
        assert f"{tar}: {message}" in refusal(tar)


def test_images_of_no_bytes_are_samples(tmp_path: Path) -> None:
    """What holds no bytes, also in an inner tar, is a sample as in a folder, read as nothing, and known at once."""
    tar = make_tar(tmp_path / "a.tar", nested({"n01/1.JPEG": b"", "n01/2.JPEG": b"x"}))
    with open_index(str(tar), cache_dir=tmp_path / "cache") as index:
        assert [index.read(sample) for sample in range(len(index))] == [b"", b"x"] and index.empty.tolist() == [0]
        assert "1 image of no bytes" in summary(index) and "n01.tar/1.JPEG" in summary(index)


def test_class_tars_without_images_are_named(tmp_path: Path) -> None:
    """An inner tar, or a class tar of a folder, that holds no image is refused: its class would be lost in silence."""
    empty = {"n09999999.tar": tar_bytes({"readme.txt": b"x"})}
    assert "1 hold none: n09999999." in refusal(make_tar(tmp_path / "outer.tar", nested(TRAIN) | empty))
    for name, data in (nested(TRAIN) | empty).items():
        (tmp_path / "unpacked").mkdir(exist_ok=True)
        (tmp_path / "unpacked" / name).write_bytes(data)
    assert "1 hold none: n09999999." in refusal(tmp_path / "unpacked")


def test_compressed_class_tars_beside_plain_ones_are_named(tmp_path: Path) -> None:
    """A class tar that can't be read for being compressed isn't passed over, which would lose its class."""
    mixed = nested(TRAIN) | {"n09999999.tar.gz": b"squeezed"}
    assert "1 compressed archives lie beside its class tars" in refusal(make_tar(tmp_path / "outer.tar", mixed))


def test_a_folder_of_the_published_archives_names_them(tmp_path: Path) -> None:
    """The folder they were downloaded to isn't taken for shards of one set: the message says which to give."""
    make_tar(tmp_path / "dl/ILSVRC2012_img_train.tar", nested(TRAIN))
    make_tar(tmp_path / "dl/ILSVRC2012_img_val.tar", VAL)
    message = refusal(tmp_path / "dl")
    assert f"give {tmp_path}/dl/ILSVRC2012_img_train.tar or {tmp_path}/dl/ILSVRC2012_img_val.tar itself" in message


# Validation images


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar", ""])
def test_val_is_labelled_by_the_devkit(tmp_path: Path, suffix: str) -> None:
    """Flat validation images, tar or folder, get the devkit's WordNet ids, and pair with the training archive."""
    make_devkit(tmp_path, devkit(IN_KIT, TRUTH), suffix=suffix)
    tar = make_tar(tmp_path / "ILSVRC2012_img_val.tar", VAL)
    folder = make_folder(tmp_path / "val", VAL)
    in_classes = make_folder(tmp_path / "sorted", {
        f"{IN_KIT[label - 1]}/ILSVRC2012_val_{number:08d}.JPEG": VAL[f"ILSVRC2012_val_{number:08d}.JPEG"]
        for number, label in enumerate(TRUTH, start=1)})
    reference = open_index(str(in_classes))
    for locator in (tar, folder, make_tar(tmp_path / "below.tar", {f"val/{name}": data for name, data in VAL.items()})):
        for again in range(2):
            with open_index(str(locator)) as index:
                assert index.cache.startswith("read from") == bool(again)
                assert [index.name(n) for n in range(len(index))] == VAL_NAMES
                assert index.identity == reference.identity
                assert [index.read(n) for n in range(len(index))] == [reference.read(n) for n in range(len(reference))]
                assert any(note.startswith(f"labels from {tmp_path}/{KIT}") for note in index.notes)
                check_pair(open_index(str(make_tar(tmp_path / "train.tar", nested(TRAIN)))), index)
    assert f"{folder}/ILSVRC2012_val_00000004.JPEG" == open_index(str(folder)).where(0)


def test_without_the_devkit_the_message_says_what_to_put_where(tmp_path: Path) -> None:
    """Flat validation images alone are refused: the file that is needed and the folder it belongs in."""
    tar = make_tar(tmp_path / "data/ILSVRC2012_img_val.tar", VAL)
    folder = make_folder(tmp_path / "data/val", VAL)
    for place in (tar, folder):
        message = refusal(place)
        assert f"{place}: 6 validation images of ILSVRC2012 without class directories" in message
        assert "Put ILSVRC2012_devkit_t12.tar.gz" in message and f"into {tmp_path}/data." in message
    make_devkit(tmp_path / "data", devkit(IN_KIT, TRUTH))
    assert names(tar) == names(folder) == VAL_NAMES
    assert "6 images lie in it without class" in refusal(
        make_tar(tmp_path / "data/other.tar", {f"photo{n}.JPEG": b"x" for n in range(6)}))


def test_a_changed_devkit_is_read_again(tmp_path: Path) -> None:
    """The labels follow the devkit: an index kept with another one isn't used."""
    tar = make_tar(tmp_path / "ILSVRC2012_img_val.tar", VAL)
    make_devkit(tmp_path, devkit(IN_KIT, TRUTH))
    first = names(tar)
    make_devkit(tmp_path, devkit(IN_KIT, [1, 1, 2, 2, 3, 3]))
    assert first == VAL_NAMES != names(tar)


def test_devkits_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Images missing or too many, a stranger among them, a kit without a file, cut short or of another set."""
    kit = devkit(IN_KIT, TRUTH)

    def message(files: dict[str, bytes] = VAL, *, kit: dict[str, bytes] = kit, spoil: bytes | None = None,
                suffix: str = ".tar.gz") -> str:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        path = make_devkit(place, kit, suffix=suffix)
        if spoil is not None:
            path.write_bytes(spoil)
            settle(path)
        return refusal(make_tar(place / "ILSVRC2012_img_val.tar", files))

    some = dict(list(VAL.items())[:4])
    assert "labels 6 validation images, but 2 of them are missing: ILSVRC2012_val_00000005, " in message(some)
    assert "but 1 more are there: ILSVRC2012_val_00000007" in message(VAL | {"ILSVRC2012_val_00000007.JPEG": b"x"})
    assert "cat lies among the validation images" in message(VAL | {"cat.JPEG": b"x"})
    assert "can't be read as the development kit" in message(spoil=b"\x1f\x8b nonsense")
    assert "can't be read as the development kit" in message(spoil=make_devkit(tmp_path / "k", kit).read_bytes()[:300])
    truth, meta = f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt", f"{KIT}/data/meta.mat"
    for suffix in (".tar.gz", ""):
        without = {name: data for name, data in kit.items() if name != truth}
        assert "lacks data/ILSVRC2012_validation_ground_truth.txt" in message(kit=without, suffix=suffix)
    assert "holds class 9, which meta.mat doesn't list" in message(kit=devkit(IN_KIT, [9] * 6))
    assert "holds class 4, which meta.mat doesn't list" in message(kit=devkit(IN_KIT, [4] * 6))  # an ancestor
    assert "must hold a class number a line" in message(kit=kit | {truth: b"one\n"})
    assert "holds no line" in message(kit=kit | {truth: b""})
    assert "meta.mat can't be read" in message(kit=kit | {meta: b"nonsense" * 40})
