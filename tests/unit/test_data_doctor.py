"""`data doctor`: its rules on made-up facts, its measurements on real files, its words."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import harness
import photographs
from alexnet_ddp.cli import main as cli
from alexnet_ddp.config import Config
from alexnet_ddp.data.decoding.decode import create_decoder
from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.packs.pack import pack
from alexnet_ddp.data.records import StoredRecords
from alexnet_ddp.data.tools import doctor, speeds
from alexnet_ddp.data.tools.verdict import Facts, Room, Speed, findings
from alexnet_ddp.findings import WIDTH, Finding


def speed(rate: float) -> Speed:
    return Speed(rate, rate * 0.95, rate * 1.05, 5)


GB = 10**9
IMAGENET = {"original": 140 * GB, "short256": 38 * GB, "raw256": 252 * GB, "raw160": 98 * GB}
FACTS = Facts(where="/data/train", kind="folder", stage="original", samples=1_281_167, record_bytes=110_000.0, cores=16,
              threads=16, decoder="turbojpeg", warm=speed(50_000), cold=speed(20_000), still_cached=0.0,
              one_thread=speed(1_000), all_threads=speed(15_000), sizes=IMAGENET, packed=speed(40_000),
              disk=Room(10 * GB, "/tmp"), ram=Room(10 * GB, "/dev/shm"), gpus=1, gpu_rate=60_000.0,
              gpu_rate_from="measured")


def told(facts: Facts) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings(facts)}


def advice(facts: Facts) -> list[str]:
    return [finding.advice for finding in findings(facts) if finding.topic.endswith("try")]


def test_decoding_binds_and_packing_comes_first() -> None:
    """Where storage is quicker than decoding and nothing fits, decoding binds and the advice is the short256 pack."""
    found = told(FACTS)
    assert found["what binds"].meaning.startswith("decoding: 60 cores")
    assert "enough for 0.25 GPUs" in found["feeds"].meaning
    assert advice(FACTS) == ["alexnet-ddp data pack /data/train PACK --stage short256; then data.train=PACK "
                             "data.stored=short256"]


def test_storage_binds() -> None:
    """Where first reads are slower than decoding, storage binds; a cache is advised once the set fits, else packing."""
    slow = replace(FACTS, cold=speed(2_000))
    assert told(slow)["what binds"].meaning.startswith("storage: first reads give 2,000")
    assert "--stage short256" in advice(slow)[0] and "--stage original" in advice(slow)[1]
    fits = replace(slow, disk=Room(200 * GB, "/scratch"), sizes={"original": 140 * GB})
    assert advice(fits)[0] == "data.cache=disk data.assignment=owner"


@pytest.mark.parametrize(("change", "wanted"), [
    ({"gpu_memory": 300 * GB, "gpus": 8}, "data.stored=raw256 data.cache=gpu data.assignment=owner"),
    ({"gpu_memory": 100 * GB}, "data.stored=raw160 data.cache=gpu data.assignment=owner"),
    ({"ram": Room(400 * GB, "/dev/shm")}, "data.stored=raw256 data.cache=ram data.assignment=owner"),
    ({"disk": Room(400 * GB, "/nvme")}, "alexnet-ddp data pack /data/train PACK --stage raw256; then data.train=PACK "
                                        "data.stored=raw256"),
])
def test_the_quickest_cache_that_fits_is_advised_first(change: dict, wanted: str) -> None:
    """GPU memory before memory before disk, raw256 before raw160, each only where the whole set goes in."""
    assert advice(replace(FACTS, **change))[0] == wanted


def test_jpeg_pack_learns_of_pixels() -> None:
    """From a pack of JPEGs no raw stage can be made: where one would fit, the originals are named as its source."""
    pack = replace(FACTS, stage="short256", packed=None, ram=Room(400 * GB, "/dev/shm"),
                   sizes={"short256": 38 * GB, "raw256": 252 * GB})
    assert advice(pack) == ["alexnet-ddp data pack ORIGINALS PACK --stage raw256; then data.train=PACK "
                            "data.stored=raw256"]


def test_no_advice_where_input_is_not_the_wall() -> None:
    """A machine that feeds its GPUs is told so, and nothing else to do."""
    easy = replace(FACTS, gpu_rate=10_000.0)
    assert advice(easy) == [] and "what binds" not in told(easy)
    assert told(easy)["feeds"].level == "ok"


def test_more_gpus_than_input_feeds() -> None:
    """With eight GPUs of which input feeds two, fewer ranks are advised, last."""
    many = replace(FACTS, gpus=8, gpu_rate=8_000.0, packed=speed(16_000))
    assert advice(many) == ["--nproc-per-node 2 (the run goes on with any number of ranks)"]


@pytest.mark.parametrize(("source", "words"), [("measured", "measured on this machine"), ("given", "not measured"),
                                               ("assumed", "is an assumption: what AlexNet's step would take")])
def test_demand_says_where_it_is_from(source: str, words: str) -> None:
    """The GPU's rate is never told without saying whether it was measured, given or assumed."""
    assert words in told(replace(FACTS, gpu_rate_from=source))["feeds"].meaning


def test_no_gpu_no_verdict() -> None:
    """Without a GPU that is said first, nothing is said of how many are fed, and advice is given whatever input gives;
    with a rate that was given there is a verdict on GPUs of that rate."""
    for supply in (15_000, 900_000):
        none = replace(FACTS, gpus=0, gpu_rate_from="assumed", cold=speed(1e6), all_threads=speed(supply),
                       packed=speed(2 * supply))
        found = findings(none)
        verdict = [finding for finding in found if finding.topic in ("GPU", "feeds", "the slower part", "what binds")]
        assert [finding.topic for finding in verdict] == ["GPU", "feeds", "the slower part"]
        assert verdict[0].meaning.startswith("none was found here")
        assert {finding.level for finding in verdict} == {"note"} and "isn't known" in verdict[1].meaning
        assert "feed one GPU" not in " ".join(finding.meaning for finding in found)
        assert len(advice(none)) == 1
        assert json.loads(doctor.told(none, found))["feeds"] is None
        assert doctor.page(none).splitlines()[0].endswith("16 cores, no GPU")
    given = told(replace(none, gpu_rate_from="given", gpu_rate=1e6))
    assert "GPU" in given and "enough for 0.9 GPUs" in given["feeds"].meaning and given["feeds"].level == "warn"


def test_another_stage_is_another_experiment() -> None:
    """Advice that changes what is stored says that no run goes on from one to the other; a cache of it as it is
    doesn't."""
    said = "one that was begun with data.stored=original can't switch"
    for change in ({}, {"gpu_memory": 300 * GB}, {"ram": Room(400 * GB, "/dev/shm")}, {"disk": Room(400 * GB, "/nvme")},
                   {"cold": speed(2_000), "disk": Room(200 * GB, "/scratch")}):
        for finding in findings(replace(FACTS, **change)):
            if finding.topic.endswith("try"):
                stays = "data.stored=original" in finding.advice or "data.stored" not in finding.advice
                assert (said in finding.meaning) != stays, finding


def test_doubts_are_told() -> None:
    """Reads from memory alone, records still cached, unsteady speeds, taken cores and too few threads are said."""
    assert "nothing is known of a first pass" in " ".join(
        told(replace(FACTS, cold=None, still_cached=1.0))["storage"].meaning.split())
    assert "40% of the records were still in memory" in told(replace(FACTS, still_cached=0.4))["storage"].meaning
    assert "noise" in told(replace(FACTS, cold=Speed(20_000, 9_000, 31_000, 5))) and "noise" not in told(FACTS)
    assert "6.0 times one thread's" in told(replace(FACTS, all_threads=speed(6_000)))["decoding"].meaning
    assert told(replace(FACTS, recipe_threads=4))["data.threads"].advice == "data.threads=auto"


# --- measured -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.make_images(tmp_path_factory.mktemp("pictures") / "train", samples=60)


def test_reading_and_loading_a_folder_and_a_tar(pictures: Path, tmp_path: Path) -> None:
    """Speeds are of all records, whose mean size is exact, from a folder as from a tar of it."""
    archive = tmp_path / "pictures.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(pictures, arcname="train")
    mean = np.mean([path.stat().st_size for path in pictures.glob("*/*")])
    for where in (pictures, f"{archive}::train"):
        with open_index(str(where), cache_dir=tmp_path / "index") as index:
            read = speeds.reading(index, np.arange(60), threads=2, seconds=0.05)
            assert read.record_bytes == pytest.approx(mean)
            assert read.warm.least > 0 and (read.cold is None or read.cold.median > 0)
            rate = speeds.loading(StoredRecords(index, "original"), create_decoder("auto"), np.arange(60), index.labels,
                                  Config.model_validate({"augment": {"size": 32}}), threads=1, seconds=0.2)
            assert rate.pieces == speeds.PIECES and rate.least > 0


def test_command(pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                 tmp_path: Path) -> None:
    """The command prints facts and findings as a page within its width, and as JSON with the rate that was given."""
    monkeypatch.setenv("ALEXNET_DDP_CACHE", str(tmp_path))
    recipe = harness.tiny_recipe(tmp_path, train=pictures)
    facts = doctor.measure(str(pictures), config_path=str(recipe), seconds=0.1, gpu_rate=1e9)
    page = doctor.page(facts)
    assert "60 images" in page and "1. try" in page
    assert all(len(line) <= WIDTH for line in page.splitlines() if str(pictures) not in line)
    assert cli(["data", "doctor", str(pictures), "--seconds", "0.05", "--gpu-rate", "7", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["facts"]["gpu_rate"] == 7 and answer["facts"]["gpu_rate_from"] == "given"
    original, raw = answer["facts"]["sizes"]  # too small for short256: pixels are weighed at their own size
    assert original == "original" and 30 <= int(raw.removeprefix("raw")) <= 60
    assert answer["facts"]["sizes"][raw] == 60 * int(raw.removeprefix("raw")) ** 2 * 3
    assert not [finding for finding in answer["findings"] if finding["topic"].endswith("try")]


@pytest.mark.parametrize("name", ["imagenet-sample.tar"])
def test_photographs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of photographs short256 is measured from a converted sample, is smaller and decodes faster than originals."""
    monkeypatch.setenv("ALEXNET_DDP_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "CONVERTED", 8)
    facts = doctor.measure(f"{photographs.archive(name)}::train", seconds=0.1)
    assert list(facts.sizes) == ["original", "short256", "raw256", "raw160"]
    assert facts.sizes["short256"] < facts.sizes["original"] and facts.sizes["raw256"] == 700 * 256 * 256 * 3
    assert facts.packed is not None and facts.packed.most > facts.all_threads.least


def test_raw_pack(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a raw pack the records are of one known size, nothing is decoded or converted, and only its stage is sized."""
    monkeypatch.setenv("ALEXNET_DDP_CACHE", str(tmp_path / "index"))
    pack(str(pictures), destination=tmp_path / "pack", stage="raw48")
    recipe = harness.tiny_recipe(tmp_path, train=tmp_path / "pack", data__stored="raw48", augment__size=32)
    facts = doctor.measure(str(tmp_path / "pack"), config_path=str(recipe), seconds=0.1)
    assert facts.stage == "raw48" and facts.record_bytes == 48 * 48 * 3 and facts.sizes == {"raw48": 60 * 48 * 48 * 3}
    assert facts.packed is None and facts.gpu_rate_from in ("assumed", "measured")
    assert "decoding" not in told(facts).get("what binds", Finding("ok", "", "")).meaning


@pytest.mark.parametrize("word", ["0", "-3", "many", "nan", "inf"])
def test_numbers_are_checked(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate or time that is no number above 0 is refused with what was given."""
    assert cli(["data", "doctor", "/nowhere", "--gpu-rate", word]) == 2
    assert f"got '{word}'" in capsys.readouterr().err
