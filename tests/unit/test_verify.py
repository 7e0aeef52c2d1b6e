"""`data verify`: whatever is wrong with a pack or an image is found and named, and nothing else is."""

import json
import re
from pathlib import Path

import pytest

import harness
import packs
from alexnet_ddp import cli
from alexnet_ddp.data.packs.pack import pack
from alexnet_ddp.data.packs.verify import verify
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A pack of 9 images in 3 shards."""
    source = harness.make_images(tmp_path / "source", samples=9)
    pack(str(source), destination=tmp_path / "pack", stage="short32", samples_per_shard=3)
    return tmp_path / "pack"


@pytest.mark.parametrize("stage", ["original", "short32", "max20", "raw16"])
@pytest.mark.parametrize("decode", [False, True])
def test_a_sound_pack(tmp_path: Path, stage: str, decode: bool) -> None:
    """A pack as it was made is well, of every stage, with --decode and without."""
    pack(str(packs.every_kind(tmp_path / "source")), destination=tmp_path / "pack", stage=stage, samples_per_shard=4)
    report = verify(str(tmp_path / "pack"), decode=decode)
    assert report.is_well, report.summary()
    assert (report.samples, report.shards) == (10, 3)
    assert report.decoded == (10 if decode and stage != "raw16" else 0)
    told = report.summary()
    assert "sha256 of 3 shards compared" in told
    if stage == "raw16":
        assert "there is nothing to decode" in told and "--decode" not in told
    elif decode:
        assert "10 images in full" in told and "--decode" not in told and told.endswith("all is well")
    else:
        assert "--decode reads every image in full" in told and told.endswith("without decoding")


def test_every_byte_counts(packed: Path) -> None:
    """One changed bit anywhere in a shard is found, and the shard named."""
    shard = packed / "000001.tar"
    data = shard.read_bytes()
    for place in (0, 600, len(data) // 2, len(data) - 1):
        shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
        report = verify(str(packed))
        assert report.problems and report.problems[0].where == str(shard)
        assert "sha256" in report.problems[0].why
    shard.write_bytes(data)
    assert verify(str(packed)).is_well


def test_missing_cut_and_foreign_shards(packed: Path) -> None:
    """A missing shard, a short one, and one too many are problems, all named at once."""
    (packed / "000000.tar").unlink()
    short = packed / "000001.tar"
    short.write_bytes(short.read_bytes()[:-512])
    (packed / "mine.tar").write_bytes(b"")
    named = {Path(one.where).name: one.why for one in verify(str(packed)).problems}
    assert "can't be read" in named["000000.tar"]
    assert "must have" in named["000001.tar"]
    assert "isn't in pack.json" in named["mine.tar"]


@pytest.mark.parametrize(("change", "said"), [
    ({"identity": "0" * 64}, "hold other samples|says identity"), ({"samples": 8}, "says samples 8"),
    ({"classes": 4}, "says classes 4")])
def test_pack_json_is_checked(packed: Path, change: dict[str, object], said: str) -> None:
    """What pack.json says of the samples is compared with what the shards hold."""
    told = json.loads((packed / "pack.json").read_text())
    (packed / "pack.json").write_text(json.dumps({**told, **change}))
    assert any(re.search(said, one.why) for one in verify(str(packed)).problems)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 2}', '{"schema": 1}', "no name", "no sums"])
def test_a_pack_json_that_isn_t_one(packed: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A pack.json that is cut short, foreign or lacks something is one message, for verify and for pack."""
    told = json.loads((packed / "pack.json").read_text())
    if text == "no name":
        del told["shards"][0]["name"]
    if text == "no sums":
        told["shards"] = {"000000.tar": 5}
    (packed / "pack.json").write_text(json.dumps(told) if text.startswith("no ") else text)
    for words in (["verify", str(packed)], ["pack", str(packed.parent / "source"), str(packed), "--stage", "short32"]):
        assert cli.main(["data", *words]) == EXIT_USER
        assert "pack.json: " in capsys.readouterr().err


def test_counts_of_shards(packed: Path) -> None:
    """Each shard must hold as many samples as pack.json says."""
    told = json.loads((packed / "pack.json").read_text())
    told["shards"][0]["samples"], told["shards"][1]["samples"] = 2, 4
    (packed / "pack.json").write_text(json.dumps(told))
    problems = verify(str(packed)).problems
    assert [one.why for one in problems] == ["holds 3 samples, must hold 2", "holds 3 samples, must hold 4"]


def test_every_image_is_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--decode names each damaged or empty file with its sample, notes a PNG called .jpg, and counts the kinds."""
    source = packs.every_kind(tmp_path / "source")
    files = sorted((source / "a").glob("*.jpg"))
    files[0].write_bytes(files[0].read_bytes()[:-200])
    files[1].write_bytes(b"")
    assert cli.main(["data", "verify", str(source), "--decode", "--json"]) == EXIT_USER
    told = json.loads(capsys.readouterr().out)
    assert not told["well"] and told["decoded"] == told["samples"] == 10
    assert [(one["where"], one["sample"]) for one in told["problems"]] == [(str(files[0]), 0), (str(files[1]), 2)]
    assert "truncated" in told["problems"][0]["why"].lower() and told["problems"][1]["why"] == "no bytes"
    assert [one["why"].partition(" by")[0] for one in told["notes"]] == ["is a PNG"]
    assert told["found"] == {"grey": 2, "palette": 1, "transparent": 1, "16-bit": 1, "turned by EXIF": 1, "PNG": 5}


def test_one_shard_is_one(tmp_path: Path) -> None:
    """One shard and one sample are told as one."""
    packs.save(tmp_path / "source" / "a" / "0.jpg", packs.pixels(20, 20))
    pack(str(tmp_path / "source"), destination=tmp_path / "pack", stage="short16")
    told = verify(str(tmp_path / "pack")).summary()
    assert "sha256 of 1 shard compared" in told and ": 1 sample\n" in told


def test_places_in_a_tar(tmp_path: Path) -> None:
    """A damaged image in a pack of originals is named with shard, member and offset."""
    source = harness.make_images(tmp_path / "source", samples=6)
    pack(str(source), destination=tmp_path / "pack", stage="original")
    shard = tmp_path / "pack" / "000000.tar"
    data = bytearray(shard.read_bytes())
    data[512:512 + 3] = b"xxx"
    shard.write_bytes(data)
    report = verify(str(tmp_path / "pack"), decode=True)
    assert [one.where for one in report.problems] == [str(shard), f"{shard}: class0/00000.jpg at offset 512"]
    assert report.problems[1].why == "not a JPEG or PNG"


def test_without_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder, empty files are found without decoding, and the report says what was not looked at."""
    source = harness.make_images(tmp_path / "source", samples=6)
    assert cli.main(["data", "verify", str(source)]) == EXIT_FINISHED
    assert "without --decode only empty files are found" in capsys.readouterr().out
    empty = sorted(source.rglob("*.jpg"))[3]
    empty.write_bytes(b"")
    assert cli.main(["data", "verify", str(source)]) == EXIT_USER
    out = capsys.readouterr().out
    assert f"{empty} (sample 3): no bytes" in out and "1 damaged" in out
