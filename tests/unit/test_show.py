"""`data show`: the pixels on the sheet are those that the trainer gives its net."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bad_inputs
import harness
from alexnet_ddp import cli
from alexnet_ddp import config as recipes
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.decoding.decode import create_decoder
from alexnet_ddp.data.feed import Feed
from alexnet_ddp.data.mixing import mix
from alexnet_ddp.data.packs.pack import pack
from alexnet_ddp.data.records import StoredRecords
from alexnet_ddp.data.tools import show
from alexnet_ddp.data.training import most_rows, open_data, training_works
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER, UserError

pytestmark = pytest.mark.usefixtures("own_cache")

DRAWN = {"augment__rotation": 10.0, "augment__color_jitter": [0.4, 0.4, 0.4, 0.1], "augment__pca_lighting": 0.1}

BLENDED = {"augment__policy": "randaugment", "augment__erasing": 0.5}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return harness.make_images(tmp_path / "source", samples=23)


def shown(recipe: Path, *overrides: str, epoch: int, count: int) -> list[show.Shown]:
    """What is on the sheet, before it is laid out."""
    config = show.open_recipe(str(recipe), list(overrides))
    data = open_data(config)
    works = training_works(config, data, first_step=epoch * data.order.steps_per_epoch, rank=0, world=1)
    seen = list(show._see(config, data, (next(works) for _ in range(count))))
    data.close()
    return seen


def trained_on(recipe: Path, *, epoch: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Ids, crops and normalised pixels of an epoch's first step, with the recipe's own micro-batches."""
    config = recipes.load(recipe)
    data = open_data(config)
    feed = Feed(config, StoredRecords(data.train, config.data.stored), data.train.labels,
                create_decoder(config.data.decoder, quality=config.augment.resize), crop=config.augment.crop,
                device=torch.device("cpu"), threads=1)
    augment = Augment(config.augment, channels=config.model.in_channels, device=torch.device("cpu"))
    ids: list[int] = []
    crops, pixels = [], []
    step = epoch * data.order.steps_per_epoch
    with feed.loader(rows=most_rows(config, world=1)) as loader:
        for batch in loader.run(training_works(config, data, first_step=step, rank=0, world=1)):
            if batch.work.step > step:
                break
            ids += batch.work.samples[batch.work.own].tolist()
            images, labels = feed.transfer(batch)
            crops.append(images[batch.work.own])
            pixels.append(mix(augment(images, batch.work.draws), labels, batch.work.mixing)[0])
    data.close()
    return ids, torch.cat(crops), torch.cat(pixels)


@pytest.mark.parametrize("changes", [{}, DRAWN, {**DRAWN, "model__in_channels": 1}, {"augment__crop": "random"},
                                     {"data__stored": "raw64"}, {"data__limit": 12},
                                     {**DRAWN, **BLENDED, "augment__mixup": 0.4}, {**BLENDED, "augment__cutmix": 1.0}])
def test_it_is_what_the_net_sees(tmp_path: Path, source: Path, changes: dict[str, object]) -> None:
    """Ids, crops and augmented pixels of the first samples of an epoch are the trainer's, within half a step of 255."""
    recipe = harness.tiny_recipe(tmp_path, train=source, **changes)
    ids, crops, pixels = trained_on(recipe, epoch=1)
    seen = shown(recipe, epoch=1, count=len(ids))
    assert [one.sample for one in seen] == ids
    config = recipes.load(recipe)
    mean, std = np.array(config.augment.mean), np.array(config.augment.std)
    if config.model.in_channels == 1:
        mean, std = np.array([show.GREY]) @ mean, np.array([show.GREY]) @ std
    for row, one in enumerate(seen):
        assert one.epoch == 1
        assert np.array_equal(one.crop, crops[row].numpy())
        wanted = (pixels[row].permute(1, 2, 0).double().numpy() * std + mean) * 255
        assert np.abs(one.seen - wanted.clip(0, 255)).max() <= 0.51


def test_what_was_drawn_is_told(tmp_path: Path, source: Path) -> None:
    """A caption names the policy's operations, the erased box and the partner with its share."""
    recipe = harness.tiny_recipe(tmp_path, train=source, augment__policy="trivial", augment__erasing=1.0,
                                 augment__cutmix=1.0, augment__flip=1.0)
    seen = shown(recipe, epoch=0, count=10)
    for one, before in zip(seen, [seen[-1], *seen], strict=False):  # by the order of the step, which wraps
        flipped, operation, erased, mixed = one.draws
        assert flipped == "flipped" and operation.split()[0] in show.NAMES
        assert erased.startswith("erased ") and " at " in erased
        assert f"% of id {before.sample} (CutMix)" in mixed


def test_the_box(tmp_path: Path, source: Path) -> None:
    """The box that is drawn is the part of the stored image that the crop shows."""
    recipe = harness.tiny_recipe(tmp_path, train=source, augment__crop="center", augment__flip=0.0)
    for one in shown(recipe, epoch=0, count=6):
        left, top, right, bottom = one.box
        side = min(one.stored.size) * 0.875
        assert right - left == pytest.approx(side, abs=1.5) and bottom - top == pytest.approx(side, abs=1.5)
        assert (left + right) / 2 == pytest.approx(one.stored.width / 2, abs=1.5)
        cut = one.stored.resize((64, 64), Image.Resampling.BILINEAR, box=tuple(one.box))
        assert np.abs(np.asarray(cut).astype(int) - one.seen).mean() < 6


def test_one_sample_over_epochs(tmp_path: Path, source: Path) -> None:
    """--sample shows one sample's own crop in each epoch; an id that isn't there is refused."""
    recipe = harness.tiny_recipe(tmp_path, train=source)
    config = show.open_recipe(str(recipe), [])
    config = config.model_copy(update={"epochs": 4})
    data = open_data(config)
    seen = list(show._see(config, data, show._over_epochs(config, data, sample=7, epochs=range(4))))
    data.close()
    assert [(one.sample, one.epoch) for one in seen] == [(7, epoch) for epoch in range(4)]
    assert len({one.box for one in seen}) == 4
    for epoch, one in enumerate(seen):
        twin = next(other for other in shown(recipe, "epochs=4", epoch=epoch, count=23) if other.sample == 7)
        assert np.array_equal(one.seen, twin.seen)
    with pytest.raises(UserError, match="0 to 22, got 23"):
        show.show(config, sample=23)
    with pytest.raises(UserError, match="not among the 3 samples of data.limit"):
        show.show(show.open_recipe(str(recipe), ["data.limit=3"]), sample=8)


@pytest.mark.parametrize(("words", "squares", "side"), [
    (["--count", "99", "augment.size=64", "data.limit=6"], 6, 192),  # all there are, each enlarged threefold
    (["--stages", "--epoch", "3", "--count", "2", "augment.size=64"], 4, 192),
    (["--sample", "4", "--count", "3", "augment.crop=random", "augment.size=200"], 3, 200)])
def test_the_sheet(tmp_path: Path, source: Path, words: list[str], squares: int, side: int,
                   capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe, a run's directory, a folder or a pack give a PNG of one picture a sample (three with --stages)."""
    recipe = harness.tiny_recipe(tmp_path, train=source)
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(recipe.read_text())
    pack(str(source), destination=tmp_path / "pack", stage="raw64")
    for number, what in enumerate((recipe, run, source, tmp_path / "pack")):
        out = tmp_path / "sheets" / f"{number}.png"
        assert cli.main(["data", "show", str(what), *words, "--out", str(out)]) == EXIT_FINISHED
        with Image.open(out) as sheet:
            assert f"{sheet.width} x {sheet.height} pixels" in capsys.readouterr().out
            assert sheet.format == "PNG"
            covered = (np.asarray(sheet) != show.PAPER).any(-1).sum() / side**2
        assert squares <= covered < squares * (2 if "--stages" in words else 1.3)  # beside them: captions, the stored
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]


def test_the_number_of_classes_may_be_wrong(tmp_path: Path, source: Path) -> None:
    """A recipe made for another number of classes shows its data, and so do data of one class."""
    recipe = harness.tiny_recipe(tmp_path, train=source, model__num_classes=1000)
    assert [one.sample for one in shown(recipe, epoch=0, count=3)]
    for what in (recipe, harness.make_images(tmp_path / "single", samples=4, classes=1)):
        assert cli.main(["data", "show", str(what), "--out", str(tmp_path / "sheet.png")]) == EXIT_FINISHED


def test_mistakes(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What can't be shown, or written, is one message."""
    recipe = str(harness.tiny_recipe(tmp_path, train=source))
    out = ["--out", str(tmp_path / "sheet.png")]
    for words, said in (([recipe, "augment.sise=3", *out], "did you mean"), (["nothing.yaml", *out], "No recipe at"),
                        ([recipe, "--count", "0", *out], "--count"), ([recipe, "--epoch", "-1", *out], "--epoch"),
                        ([str(tmp_path / "no"), *out], "nothing is"),
                        ([recipe, "--out", "/proc/x/y.png"], "can't be written")):
        assert cli.main(["data", "show", *words]) == EXIT_USER
        assert said in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()


def test_damaged_images_are_shown_as_such(tmp_path: Path, source: Path) -> None:
    """Under data.on_error=skip a damaged image is the mean image on the sheet, with what is wrong with it, and nothing
    is said to be blended with it; its neighbours are as ever."""
    bad_inputs.damage(source, samples=5)
    recipe = harness.tiny_recipe(tmp_path, train=source, data__on_error="skip", augment__mixup=0.4)
    seen = shown(recipe, epoch=0, count=23)
    bad = {one.sample for one in seen if any("damaged" in word for word in one.draws)}
    assert len(bad) >= 4  # garbage in the lower part may lie below a view
    grey = np.round(255 * np.asarray(recipes.load(recipe).augment.mean)).astype(int)
    for one in seen:
        assert (one.sample in bad) == bool((np.abs(one.seen.astype(int) - grey) <= 1).all())
        assert not any(f"of id {sample} (" in word for word in one.draws for sample in bad)
    out = tmp_path / "sheet.png"
    assert cli.main(["data", "show", str(recipe), "--count", "23", "--stages", "--out", str(out)]) == EXIT_FINISHED
