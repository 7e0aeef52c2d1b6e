"""Damaged images and reads that fail: left out by the loader, without weight in a step, each named once; retried."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

import harness
from alexnet_ddp.damage import DamagedFile, Kind, Met, left_out, made
from alexnet_ddp.data.decoding.decode import DamagedImage, create_decoder
from alexnet_ddp.data.decoding.stages import Stage
from alexnet_ddp.data.decoding.views import View
from alexnet_ddp.data.index import Index, open_index
from alexnet_ddp.data.loader import Batch, Loader, Slot, SlotPool, Work
from alexnet_ddp.data.mixing import Mixing
from alexnet_ddp.data.records import WAITS, Records, StoredRecords
from alexnet_ddp.errors import Unreadable, UserError
from alexnet_ddp.loss import Targets

SIZE = 8
I64 = np.int64


class Storage:
    """An index of raw or encoded records of which `damaged` ones can't be decoded and reads of `failing` ones fail
    so many times."""

    def __init__(self, *, damaged: tuple[int, ...] = (), failing: dict[int, int] | None = None,
                 stage: str = "original") -> None:
        self.stage, self.damaged, self.failing = stage, damaged, failing or {}
        self.labels = np.arange(50, dtype=np.int32)
        self.calls: list[str] = []

    def read(self, sample: int) -> bytes:
        self.calls.append(f"read {sample}")
        if self.failing.get(sample, 0) > 0:
            self.failing[sample] -= 1
            raise OSError(5, "Input/output error")
        if sample in self.damaged:
            raise DamagedImage("not a JPEG or PNG")
        return bytes([sample + 1]) * (3 * SIZE * SIZE)

    def read_into(self, sample: int, out: np.ndarray, start: int = 0) -> None:
        out.reshape(-1)[...] = np.frombuffer(self.read(sample), np.uint8)[start:start + out.size]

    def reopen(self, sample: int) -> None:
        self.calls.append(f"reopen {sample}")

    def where(self, sample: int) -> str:
        return f"/images/{sample}.jpg"


class Bare:
    """Storage as Records."""

    def __init__(self, storage: Storage, stage: Stage) -> None:
        self.stage, self.read, self.where, self.read_into = stage, storage.read, storage.where, storage.read_into

    def copy_into(self, samples: np.ndarray, starts: np.ndarray, out: torch.Tensor) -> bool:
        return False


class Painter:
    """A decoder of records that are one colour."""

    name, version = "painter", "1"

    def __call__(self, data: bytes, choose: object, out: np.ndarray) -> View:
        out[...] = data[0]
        return View(1, 1, 1, 1, SIZE, SIZE, 0, 0)


class Kept:
    """A device that keeps every record it was ever sent."""

    def __init__(self) -> None:
        self.there: set[int] = set()

    def absent(self, samples: np.ndarray) -> np.ndarray:
        absent = np.array([sample not in self.there for sample in samples.tolist()], np.bool_)
        self.there |= set(samples.tolist())
        return absent


def work(step: int, samples: list[int]) -> Work:
    return Work(step, 0, 1, np.array(samples, I64), lambda row: lambda width, height: View(
        0, 0, width, height, SIZE, SIZE, 0, 0))


def loader(storage: Storage, *, raw: bool = False, kept: Kept | None = None, on_error: str = "skip") -> Loader:
    records = Bare(storage, Stage("raw", SIZE) if raw else Stage("original"))
    return Loader(cast(Records, records), storage.labels, Painter(), rows=40, shape=(SIZE, SIZE, 3), threads=2,
                  prefetch=2, resident=kept, on_error=on_error)  # type: ignore[arg-type]


# --- the loader -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
def test_damaged_images_are_black_and_named_by_row(raw: bool) -> None:
    """Encoded and raw: rows of damaged images are black in slots used before, told with their reasons; others whole."""
    with loader(Storage(damaged=(3, 21)), raw=raw) as load:
        parts = [[*range(20)], [21, 22, 3, 23], [5, 6]] * 4  # more batches than slots
        for batch in load.run(work(step, part) for step, part in enumerate(parts)):
            bad = [row for row, sample in enumerate(parts[batch.work.step]) if sample in (3, 21)]
            assert batch.reasons == dict.fromkeys(bad, "not a JPEG or PNG")
            assert np.flatnonzero(batch.damaged).tolist() == bad
            assert batch.images[:, 0, 0, 0].tolist() == [0 if row in bad else sample + 1 for row, sample in
                                                         enumerate(parts[batch.work.step])]
            assert not batch.images[bad].any()
            if not raw:
                assert not batch.views[bad].any()
            batch.release()


def test_damaged_records_that_the_device_keeps_stay_damaged() -> None:
    """A damaged raw record is read once and then kept, black, on the device: every later batch still tells of it."""
    storage = Storage(damaged=(3,))
    with loader(storage, raw=True, kept=Kept()) as load:
        found = []
        for batch in load.run(work(step, part) for step, part in enumerate([[1, 3], [2, 3, 1], [3, 2]])):
            found.append(sorted(batch.reasons))
            assert np.flatnonzero(batch.damaged).tolist() == sorted(batch.reasons)
            batch.release()
    assert found == [[1], [1], [0]]
    assert storage.calls.count("read 3") == 1


def test_a_policy_for_images_is_none_for_storage() -> None:
    """Under skip a record that can't be read still ends the run, named; under fail so does a damaged image."""
    with loader(Storage(failing={2: 100})) as load, pytest.raises(Unreadable, match=r"/images/2\.jpg \(sample 2\)"):
        next(load.run(iter([work(0, [1, 2])])))
    with (loader(Storage(damaged=(2,)), on_error="fail") as load,
          pytest.raises(UserError, match=r"/images/2\.jpg \(sample 2\).*\n.*data.on_error=skip")):
        next(load.run(iter([work(0, [1, 2])])))


# --- the step ---------------------------------------------------------------------------------------------------


def test_damaged_rows_are_the_mean_image_without_weight() -> None:
    """left_out makes the rows zeros, whatever they held, and their weights 0; the others keep pixels and labels."""
    pixels = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    pixels[1] = torch.nan
    found, targets = left_out(pixels, Targets(torch.arange(4)), damaged=np.array([False, True, False, True]))
    assert torch.equal(found[[0, 2]], pixels[[0, 2]]) and not found[[1, 3]].any()
    assert targets.weights is not None and targets.weights.tolist() == [1, 0, 1, 0]
    assert targets.labels.tolist() == [0, 1, 2, 3]
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_blended_with_a_damaged_image() -> None:
    """With mixup and CutMix, images whose partners (also guests) are damaged keep their pixels and labels, the
    damaged ones have no weight, and the others are blended as ever."""
    pixels, labels = torch.rand(5, 3, 4, 4), torch.arange(5)
    for mixing in (Mixing(0.75, None, np.array([4, 0, 1, 2])), Mixing(0.75, (1, 1, 3, 3), np.array([4, 0, 1, 2]))):
        batch = Batch(replace(work(0, [7, 8, 9, 3, 21]), guests=1, mixing=mixing), cast(Slot, None), np.arange(5),
                      np.arange(5), cast(SlotPool, None))
        plain, expected = made(batch, pixels, labels)
        assert expected.weights is None and expected.shares is not None
        for row in (1, 4):
            batch.damaged[row], batch.reasons[row] = True, "zeros"
        found, targets = made(batch, pixels, labels)
        assert targets.weights is not None and targets.shares is not None
        assert targets.weights.tolist() == [1, 0, 1, 1] and not found[1].any()
        assert targets.others is not None and targets.others[[0, 2, 3]].tolist() == [0, 2, 2]
        assert targets.labels.tolist() == [0, 1, 2, 3] and len(found) == 4
        torch.testing.assert_close(found[[0, 2]], pixels[[0, 2]])
        assert torch.equal(found[3], plain[3])


# --- damaged.jsonl ----------------------------------------------------------------------------------------------


def test_each_image_is_listed_once_and_cut_back(tmp_path: Path) -> None:
    """Met again, and by several ranks, an image has one line, with its first step; a resume keeps what was seen."""
    path = tmp_path / "damaged.jsonl"
    with open_index(str(harness.make_images(tmp_path / "train", samples=6)), cache_dir=tmp_path / "cache") as index:
        indexes: dict[Kind, Index] = {"train": index, "evaluate": index}
        file = DamagedFile(path, step=0, evaluated_step=0, indexes=indexes)
        met = [Met("train", 5, 9, "cut"), Met("train", 2, 3, "zeros"), Met("train", 5, 4, "cut"),
               Met("evaluate", 5, 5, "cut")]
        new = file.add(met, attempt=1)
        assert [(one["kind"], one["sample"], one["step"]) for one in new] == [
            ("train", 2, 3), ("train", 5, 4), ("evaluate", 5, 5)]
        assert new[0]["file"] == index.where(2) and new[0]["offset"] is None and new[0]["name"] == index.name(2)
        assert file.add(met, attempt=1) == []
        assert [json.loads(line) for line in path.read_text().splitlines()] == new
    for step, evaluated, kept in ((5, 5, 3), (4, 0, 2), (3, 0, 1), (2, 0, 0)):
        path.write_text("".join(json.dumps(one) + "\n" for one in new))
        file = DamagedFile(path, step=step, evaluated_step=evaluated, indexes=indexes)
        assert file.count("train") + file.count("evaluate") == kept == len(path.read_text().splitlines())


def test_lines_of_other_data_and_of_no_ones_go(tmp_path: Path) -> None:
    """Another data.val inherits no damage of the one before, whose lines go, also those of a version that wrote no
    identity; lines by other hands, with fields missing or of another kind, are no traceback."""
    path = tmp_path / "damaged.jsonl"
    with (open_index(str(harness.make_images(tmp_path / "a", samples=6)), cache_dir=tmp_path / "cache") as old,
          open_index(str(harness.make_images(tmp_path / "b", samples=9)), cache_dir=tmp_path / "cache") as new):
        file = DamagedFile(path, step=0, evaluated_step=0, indexes={"train": old, "evaluate": old})
        held_out, whole = file.add([Met("train", 5, 2, "cut"), Met("evaluate", 5, 2, "cut")], attempt=1)
        assert old.name(5) != new.name(5) and old.name(0) == new.name(0)
        unsigned = [{name: value for name, value in {**held_out, "sample": sample, "name": old.name(sample)}.items()
                     if name != "identity"} for sample in (0, 5)]
        odd: list[object] = [{**whole, "step": "2"}, {**whole, "step": None}, {**whole, "sample": [5]}, [2], "x",
                             {"kind": "train", "step": 2, "sample": 1}, {**whole, "kind": ["train"]},
                             {**whole, "kind": "other"}, {**whole, "sample": 4, "reason": 7}]
        path.write_text("".join(json.dumps(line) + "\n" for line in [whole, held_out, *odd, *unsigned]))
        for indexes, kept in (({"train": old}, [0, 5, 5]), ({"train": old, "evaluate": new}, [0])):
            file = DamagedFile(path, step=2, evaluated_step=2, indexes=cast(dict[Kind, Index], indexes))
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert sorted(line["sample"] for line in lines if line["kind"] == "evaluate") == kept
            assert file.count("train") == 1 and "cut" in file.named("train")


# --- reads that fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", [False, True])
def test_reads_are_tried_again_with_growing_pauses(into: bool) -> None:
    """A read that fails up to four times succeeds after pauses that add up to WAITS, its file opened anew each time;
    the fifth failure is raised. Only the first is told."""
    def read(records: StoredRecords, sample: int) -> int:
        if not into:
            return records.read(sample)[0]
        out = np.zeros((SIZE, SIZE, 3), np.uint8)
        records.read_into(sample, out)
        return int(out[0, 0, 0])

    for failures in range(6):
        storage, pauses, told = Storage(failing={7: failures}, stage=f"raw{10 + SIZE}"), list[float](), list[str]()
        records = StoredRecords(cast(Index, storage), f"raw{10 + SIZE}", say=told.append, pause=pauses.append)
        if failures <= len(WAITS):
            assert read(records, 7) == 8
        else:
            with pytest.raises(OSError, match="Input/output error"):
                read(records, 7)
        tries = min(failures, len(WAITS))
        assert pauses == list(WAITS[:tries])
        assert storage.calls == ["read 7", *["reopen 7", "read 7"] * tries]
        assert len(told) == (failures > 0) and all("/images/7.jpg can't be read (Input/output error)" in line
                                                   for line in told)
    assert 3 < sum(WAITS) < 5 and list(WAITS) == sorted(WAITS)


def test_a_stale_descriptor_is_replaced(tmp_path: Path) -> None:
    """A tar whose kept descriptor has gone bad is read again by a new one, under the same number."""
    import tarfile

    harness.make_images(tmp_path / "images" / "train", samples=3)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "images", arcname=".")
    with open_index(str(tmp_path / "data.tar"), cache_dir=tmp_path / "cache") as index:
        whole = index.read(1)
        descriptor, = index._tars._descriptors.values()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, descriptor, inheritable=False)  # what a file server that forgot the file does to reads
        os.close(nothing)
        with pytest.raises(OSError, match="only 0 of"):
            index.read(1)
        pauses = list[float]()
        assert StoredRecords(index, "original", pause=pauses.append).read(1) == whole
        assert pauses == [WAITS[0]] and list(index._tars._descriptors.values()) == [descriptor]
        assert not os.get_inheritable(descriptor)


def test_damage_below_a_view_is_not_looked_for(tmp_path: Path) -> None:
    """Garbage in the last quarter: decoders of whole images find it in every view, a region decoder where it looks."""
    image = harness.make_images(tmp_path / "train", samples=1, classes=1, size=400) / "class0" / "00000.jpg"
    data = image.read_bytes()
    garbage = np.random.default_rng(0).bytes(len(data) // 4)
    data = data[:len(data) * 3 // 4] + garbage + b"\xff\xd9"
    out = np.zeros((SIZE, SIZE, 3), np.uint8)

    def top(width: int, height: int) -> View:
        return View(0, 0, 32, 32, SIZE, SIZE, 0, 0)

    def whole(width: int, height: int) -> View:
        return View(0, 0, width, height, SIZE, SIZE, 0, 0)

    for view in (top, whole):
        with pytest.raises(DamagedImage):
            create_decoder("pillow")(data, view, out)
    if create_decoder("auto").name == "turbojpeg":
        create_decoder("turbojpeg")(data, top, out)
        with pytest.raises(DamagedImage):
            create_decoder("turbojpeg")(data, whole, out)
