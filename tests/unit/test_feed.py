"""Raw records and the device's memory for them: the same pixels by every way, and what a log says held a run up."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from alexnet_ddp.config import Config, build
from alexnet_ddp.data import raw
from alexnet_ddp.data.caches.device_cache import DeviceCache
from alexnet_ddp.data.decoding import views
from alexnet_ddp.data.decoding.decode import create_decoder
from alexnet_ddp.data.decoding.stages import Stage
from alexnet_ddp.data.decoding.views import View
from alexnet_ddp.data.feed import Feed, device_cache, slot_shape, training_records, what_binds
from alexnet_ddp.data.loader import Times
from alexnet_ddp.data.order import Order
from alexnet_ddp.data.randomness import CROP_DRAWS, key, uniform
from alexnet_ddp.data.training import Data, largest_part, open_data, training_works
from alexnet_ddp.errors import UserError

CPU = torch.device("cpu")
SIDE, SIZE = 64, 56  # of raw records and of views: 64 = 56 / 0.875
IMAGES = 23


# --- the device's views of raw records --------------------------------------------------------------------------


def records(count: int, side: int = SIDE) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def numbers(shown: list[View]) -> NDArray[np.int32]:
    return np.array(shown, np.int32)


@pytest.mark.parametrize("channels", [1, 3])
def test_resized_on_the_device_is_pillow_s(channels: int) -> None:
    """Raw records are cropped and resized on the device as Pillow's BILINEAR does it: within 1/255 in every value
    (2/255 in grey, which Pillow rounds once more), enlarged and reduced, whole and in parts."""
    pixels = records(8)
    shown = [views.random_resized(SIDE, SIDE, size=SIZE, draws=draws, scale=(0.05, 1.0), ratio=(0.5, 2.0))
             for draws in uniform(key(np.arange(5)), CROP_DRAWS)]
    shown += [views.squash(SIDE, SIDE, size=SIZE), View(3, 5, 1, 1, SIZE, SIZE, 0, 0),
              View(2, 1, 60, 63, 2 * SIZE, 3 * SIZE, 7, 99)]
    found = raw.show(torch.from_numpy(pixels), numbers(shown), size=SIZE, channels=channels).numpy()
    assert found.dtype == np.uint8
    assert found.shape == (8, SIZE, SIZE, channels)
    for image, view, mine in zip(pixels, shown, found, strict=True):
        part = Image.fromarray(image).crop((view.left, view.top, view.left + view.width, view.top + view.height))
        part = part.resize((view.resized_width, view.resized_height), Image.Resampling.BILINEAR)
        part = part.crop((view.x, view.y, view.x + SIZE, view.y + SIZE)).convert("RGB" if channels == 3 else "L")
        theirs = np.asarray(part).reshape(SIZE, SIZE, channels).astype(int)
        assert np.abs(mine - theirs).max() <= (1 if channels == 3 else 2), view


def test_cuts_are_exact() -> None:
    """Views that only cut give the records' own bytes, from whole records and from strips of their rows alike."""
    pixels = records(6)
    shown = [views.random_crop(SIDE, SIDE, size=SIZE, draws=draws) for draws in uniform(key(np.arange(6)), CROP_DRAWS)]
    strips = np.stack([image[view.y:view.y + SIZE] for image, view in zip(pixels, shown, strict=True)])
    whole = raw.show(torch.from_numpy(pixels), numbers(shown), size=SIZE, channels=3)
    assert len({(view.x, view.y) for view in shown}) > 3
    for image, view, mine in zip(pixels, shown, whole.numpy(), strict=True):
        assert np.array_equal(mine, image[view.y:view.y + SIZE, view.x:view.x + SIZE])
    assert torch.equal(raw.show(torch.from_numpy(strips), numbers(shown), size=SIZE, channels=3), whole)


def test_no_records() -> None:
    """An empty batch stays one, of the right shape."""
    empty = torch.zeros((0, SIDE, SIDE, 3), dtype=torch.uint8)
    assert raw.show(empty, numbers([]).reshape(0, 8), size=SIZE, channels=1).shape == (0, SIZE, SIZE, 1)


def test_neighbours_don_t_matter() -> None:
    """A record's view is the same, to the bit, alone and in a batch that is resized in pieces."""
    pixels = torch.from_numpy(records(raw.PIECE + 3, 16))
    shown = [views.random_resized(16, 16, size=12, draws=draws, scale=(0.1, 1.0), ratio=(0.75, 4 / 3))
             for draws in uniform(key(np.arange(len(pixels))), CROP_DRAWS)]
    together = raw.show(pixels, numbers(shown), size=12, channels=3)
    for at in (0, raw.PIECE - 1, raw.PIECE, raw.PIECE + 2):
        alone = raw.show(pixels[at:at + 1], numbers(shown[at:at + 1]), size=12, channels=3)
        assert torch.equal(alone[0], together[at])


def test_what_a_slot_holds() -> None:
    """Only the rows that a cut shows are sent, unless views resize, another short side is meant, or records stay."""
    stage = Stage("raw", 256)
    assert slot_shape(stage, crop="random", size=224, channels=3, whole=False) == (224, 256, 3)
    assert slot_shape(stage, crop="center", size=224, channels=1, whole=False) == (224, 256, 3)
    assert slot_shape(stage, crop="random", size=224, channels=3, whole=True) == (256, 256, 3)
    assert slot_shape(stage, crop="random_resized", size=224, channels=3, whole=False) == (256, 256, 3)
    assert slot_shape(stage, crop="random", size=192, channels=3, whole=False) == (256, 256, 3)
    assert slot_shape(Stage("short", 256), crop="random", size=224, channels=1, whole=False) == (224, 224, 1)


# --- the device's memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [3, 12, 100])
def test_what_is_kept_is_what_was_sent(room: int) -> None:
    """Each record is sent once while there is room, in every epoch beyond it, and always comes out as it is."""
    pixels = torch.from_numpy(records(12, 4))
    mine = np.array([5, 90, 7, 33, 2, 61, 14, 8, 77, 50, 21, 3])  # ids in no order
    cache = DeviceCache(mine, side=4, most_rows=5, device=CPU, limit=(room + 5) * 48)
    assert cache.capacity == min(room, 12)
    sent_at_all = []
    for epoch in range(3):
        order = np.random.default_rng(epoch).permutation(12)
        for rows in np.split(order, [5, 6, 11]):
            samples = mine[rows]
            sent = np.flatnonzero(cache.absent(samples))
            sent_at_all.append(len(sent))
            found = cache.exchange(samples, sent, pixels[rows][sent])
            assert torch.equal(found, pixels[rows])
    per_epoch = np.array(sent_at_all).reshape(3, 4).sum(1)
    assert per_epoch[0] == 12
    assert per_epoch[1:].tolist() == [12 - min(room, 12)] * 2
    assert cache.share == min(room, 12) / 12


@pytest.mark.parametrize("room", [2, 6])
def test_guests_pass_through(room: int) -> None:
    """Samples of other ranks are sent whenever they come, take nobody's place, and come out as they are."""
    pixels = torch.from_numpy(records(12, 4))
    mine = np.array([2, 4, 6, 8, 10, 11])
    cache = DeviceCache(mine, side=4, most_rows=6, device=CPU, limit=(room + 6) * 48)
    for epoch in range(3):
        for samples in (np.array([4, 2, 6, 3, 5]), np.array([10, 0, 1]), np.array([11, 8]), np.array([7, 9])):
            absent = cache.absent(samples)
            assert absent[~np.isin(samples, mine)].all()
            assert epoch == 0 or absent[np.isin(samples, mine[:room])].sum() == 0
            sent = np.flatnonzero(absent)
            assert torch.equal(cache.exchange(samples, sent, pixels[samples][sent]), pixels[samples])
    assert cache.share == room / 6


def test_room_for_nothing_is_refused() -> None:
    """A limit under a batch and a record is refused, with what to change."""
    with pytest.raises(UserError, match=r"a larger data\.cache_gb"):
        DeviceCache(np.arange(10), side=64, most_rows=8, device=CPU, limit=8 * 64 * 64 * 3)


def test_a_rank_without_samples_keeps_none() -> None:
    """Of fewer samples than ranks some rank has none: nothing to keep, and nothing to refuse."""
    cache = DeviceCache(np.arange(0), side=4, most_rows=5, device=CPU, limit=None)
    nobody = np.arange(0)
    assert cache.capacity == 0 and cache.share == 1.0 and not len(cache.absent(nobody))
    assert cache.exchange(nobody, nobody, torch.zeros((0, 4, 4, 3), dtype=torch.uint8)).shape == (0, 4, 4, 3)


# --- the same pixels by every way -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Photographs of two classes; the index's cache stays in the test's directory."""
    root = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        path = root / "train" / f"class_{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (9, 11, 3), dtype=np.uint8))
        small.resize((90 + number, 70 + 2 * number), Image.Resampling.BICUBIC).save(path, quality=92)
    before = os.environ.get("ALEXNET_DDP_CACHE")
    os.environ["ALEXNET_DDP_CACHE"] = str(root / "index")
    yield root
    if before is None:
        del os.environ["ALEXNET_DDP_CACHE"]
    else:
        os.environ["ALEXNET_DDP_CACHE"] = before


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in tmpfs."""
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def recipe(folder: Path, *, cache: str, stored: str, crop: str, epochs: int = 2) -> Config:
    return build({"name": "feed", "runs": str(folder / "runs"), "model": {"num_classes": 2}, "epochs": epochs,
                  "global_batch": 6, "micro_batch": 4,
                  "data": {"train": str(folder / "train"), "stored": stored, "shards": 6, "assignment": "owner",
                           "cache": cache, "threads": 2, "cache_dir": str(folder / "kept")},
                  "augment": {"size": SIZE, "crop": crop}})


def seen(config: Config, *, rank: int, world: int, first: int = 0, last: int | None = None) -> dict[tuple, bytes]:
    """(step, sample) -> pixels that the rank's net would be given."""
    data: Data = open_data(config)
    rows = largest_part(config, world=world)
    source = training_records(config, data, rank=rank, world=world, neighbours=range(world), say=lambda line: None)
    kept = device_cache(config, data, rank=rank, world=world, most_rows=rows, device=CPU)
    feed = Feed(config, source, data.train.labels, create_decoder("auto"), crop=config.augment.crop, device=CPU,
                threads=2, kept=kept)
    found: dict[tuple, bytes] = {}
    with feed.loader(rows=rows) as loader:
        for batch in loader.run(training_works(config, data, first_step=first, rank=rank, world=world)):
            work = batch.work
            if last is not None and work.step >= last:
                break
            images, labels = feed.transfer(batch)
            feed.check()
            assert images.shape == (len(work.samples), SIZE, SIZE, 3)
            assert labels.tolist() == data.train.labels[work.samples].tolist()
            for sample, image in zip(work.samples.tolist(), images, strict=True):
                found[work.step, sample] = image.numpy().tobytes()
    if last is None and kept is not None:
        assert feed.cached == 1.0
    feed.close(finished=False)
    data.close()
    return found


@pytest.mark.parametrize(("stored", "crop"), [("raw64", "random"), ("raw64", "random_resized"), ("raw40", "random"),
                                              ("short80", "random_resized"), ("original", "random")])
def test_no_cache_changes_a_pixel(folder: Path, tmp_path: Path, memory: Path, stored: str, crop: str) -> None:
    """Over {none, disk, ram, gpu}, on 1, 2 and 3 ranks and with a switch in mid-epoch, every step shows every sample
    of its batch once, with the same pixels."""
    steps = 2 * -(-IMAGES // 6)
    caches = ["none", "disk", "ram", *(["gpu"] if stored.startswith("raw") else [])]
    reference = seen(recipe(folder, cache="none", stored=stored, crop=crop), rank=0, world=1)
    order = Order(IMAGES, global_batch=6, seed=0, shards=6,
                  identity=open_data(recipe(folder, cache="none", stored=stored, crop=crop)).order.identity)
    assert sorted(reference) == sorted((step, sample) for step in range(steps) for sample in order.batch(step))
    assert len(set(reference.values())) > IMAGES  # two epochs show other crops
    for cache in caches:
        base = memory if cache == "ram" else tmp_path
        config = recipe(folder, cache=cache, stored=stored, crop=crop)
        config = config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": str(base)})})
        for parts in ([(0, steps, 2)], [(0, 2, 3), (2, 6, 1), (6, steps, 2)]):  # first step, last, ranks
            found: dict[tuple, bytes] = {}
            for first, last, world in parts:
                for rank in range(world):
                    mine = seen(config, rank=rank, world=world, first=first, last=last)
                    assert not found.keys() & mine.keys()
                    found |= mine
            assert found == reference, (cache, parts)


def test_a_tmpfs_is_asked_for_ram(folder: Path) -> None:
    """A cache that nothing can be kept for is refused when the recipe is read, with the way out."""
    from alexnet_ddp.rules import check

    for changes, said in (({"assignment": "contiguous"}, "data.assignment=owner"), ({"stored": "original"}, "raw256")):
        config = recipe(folder, cache="gpu", stored="raw64", crop="random")
        with pytest.raises(UserError, match=said):
            check(config.model_copy(update={"data": config.data.model_copy(update=changes)}))


# --- what a log says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "word"), [
    (Times(0.0, 9.0, 9.0, 9.0), "step"), (Times(0.4, 1.0, 1.0, 1.0), "step"),
    (Times(6.0, 9.0, 2.0, 0.0), "storage"), (Times(6.0, 2.0, 9.0, 1.0), "decode"),
    (Times(6.0, 1.0, 1.0, 5.0), "copy"),
])
def test_what_binds(times: Times, word: str) -> None:
    """The step binds while it hardly waits, else whatever the input spent its time on."""
    assert what_binds(times, seconds=10.0) == word
