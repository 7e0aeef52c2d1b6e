"""A contact sheet: what the net really sees of the first samples of an epoch, or of one sample over epochs.

The pixels come the trainer's own way: its works, its feed and its augmentation; then normalisation is undone.
Nothing is drawn or cropped here.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from alexnet_ddp import config as recipes
from alexnet_ddp.config import Config
from alexnet_ddp.damage import made
from alexnet_ddp.data.augment import GREY, Augment
from alexnet_ddp.data.decoding.decode import create_decoder, open_upright
from alexnet_ddp.data.decoding.stages import CHANNELS
from alexnet_ddp.data.feed import Feed
from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.loader import Batch, Work
from alexnet_ddp.data.packs.parallel import cores_here
from alexnet_ddp.data.policy import NAMES, Policy
from alexnet_ddp.data.records import StoredRecords
from alexnet_ddp.data.training import Data, most_rows, open_data, training_works
from alexnet_ddp.errors import UserError
from alexnet_ddp.sections import AugmentSection

SMALLEST = 160  # pixels a side of a picture on the sheet; smaller ones are shown enlarged by a whole factor
GAP, LINE = 10, 16  # pixels between cells, and a line of text
BETWEEN = "  \N{MIDDLE DOT}  "  # parts of a caption
PAPER, INK, FAINT, BOX = (250, 250, 248), (25, 25, 25), (110, 110, 110), (255, 210, 0)

U8 = NDArray[np.uint8]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shown:
    """One sample as the net sees it in one epoch."""

    sample: int
    name: str  # class/stem
    epoch: int
    stored: Image.Image  # upright, before the crop
    box: tuple[float, float, float, float]  # left, top, right, bottom of what is shown of it
    crop: U8  # [size, size, channels], as it leaves the host
    seen: U8  # the same after the device's share
    draws: tuple[str, ...]  # flip, operations of a policy, angle, erased box, partner

    @property
    def cut(self) -> str:
        left, top, right, bottom = (round(value) for value in self.box)
        return f"{right - left}x{bottom - top} at {left},{top} of {self.stored.width}x{self.stored.height}"


def open_recipe(what: str, overrides: list[str]) -> Config:
    """The recipe of a file, of a run's directory, or a default one on the data that `what` names. Raises UserError.

    model.num_classes becomes that of the data: it doesn't change what is seen, and needn't be right to look at them.
    """
    path = Path(what).expanduser()
    if path.suffix in (".yaml", ".yml"):
        config = recipes.load(path, overrides)
    elif (path / "config.yaml").is_file():
        config = recipes.load(path / "config.yaml", overrides)
    else:
        with open_index(what) as index:
            tree = {"data": {"train": what, "stored": index.stage}}
        config = recipes.build(recipes.apply_overrides(tree, overrides))
    try:
        with open_index(config.data.train) as index:
            model = config.model.model_copy(update={"num_classes": len(index.classes)})
    except UserError as error:
        raise UserError(f"data.train={error}") from None
    # No validation data, and works of one sample each: neither changes what is seen.
    return config.model_copy(update={"data": config.data.model_copy(update={"val": None}), "model": model,
                                     "micro_batch": 1})


def show(config: Config, *, count: int = 16, epoch: int = 0, sample: int | None = None,
         with_stages: bool = False) -> Image.Image:
    """The sheet: the first `count` samples of `epoch`, or `sample` in `count` epochs from `epoch` on.

    `config` is open_recipe's. `with_stages` shows each as stored (with the box of the crop), as cropped, and as seen.
    Raises UserError.
    """
    if count < 1 or epoch < 0:
        raise UserError(f"--count must be at least 1 and --epoch at least 0, got {count} and {epoch}.")
    config = config.model_copy(update={"epochs": max(config.epochs, epoch + count)})
    data = open_data(config)
    try:
        if sample is None:
            epoch_on = training_works(config, data, first_step=epoch * data.order.steps_per_epoch, rank=0, world=1)
            works: Iterator[Work] = islice(epoch_on, min(count, data.order.samples))
        else:
            works = _over_epochs(config, data, sample=sample, epochs=range(epoch, epoch + count))
        shown = list(_see(config, data, works))
    finally:
        data.close()
    augment = config.augment
    what = f"sample {sample} in epochs {epoch} to {epoch + count - 1}" if sample is not None else \
        f"first {len(shown)} of {data.order.samples:,} samples in epoch {epoch}"
    title = f"{config.data.train}: {what}"
    drawn = [f"data.stored={config.data.stored}", f"crop={augment.crop}", f"size={augment.size}",
             f"resize={augment.resize}", f"flip={augment.flip:g}", f"rotation={augment.rotation:g}",
             f"color_jitter={list(augment.color_jitter)}", f"pca_lighting={augment.pca_lighting:g}",
             *(f"{name}={getattr(augment, name)}" for name in ("policy", "erasing", "mixup", "cutmix")
               if getattr(augment, name) not in ("none", 0)), f"seed={config.seed}"]
    if with_stages:
        drawn.append("left: as stored, middle: as cropped, right: as seen")
    return _sheet(shown, title=title, facts=drawn, with_stages=with_stages, with_epoch=sample is not None)


def _over_epochs(config: Config, data: Data, *, sample: int, epochs: range) -> Iterator[Work]:
    """The work of one sample in each epoch, found at its place in that epoch's order."""
    order = data.order
    for epoch in epochs:
        ids = order.samples_at(epoch, np.arange(order.samples))
        places = np.flatnonzero((ids if data.train_ids is None else data.train_ids[ids]) == sample)
        if not len(places):
            raise UserError(f"--sample must be an id of the training data, 0 to {len(data.train) - 1:,}, got {sample}."
                            if not 0 <= sample < len(data.train) else
                            f"--sample {sample} is not among the {order.samples:,} samples of data.limit.")
        step, turn = divmod(int(places[0]), order.global_batch)
        works = training_works(config, data, first_step=epoch * order.steps_per_epoch + step, rank=0, world=1)
        yield next(islice(works, turn, None))


def _see(config: Config, data: Data, works: Iterator[Work]) -> Iterator[Shown]:
    """Through loader, transfer and augmentation, as the trainer does it."""
    channels, section = config.model.in_channels, config.augment
    augment, records = Augment(section, channels=channels, device=CPU), StoredRecords(data.train, config.data.stored)
    feed = Feed(config, records, data.train.labels, create_decoder(config.data.decoder, quality=section.resize),
                crop=section.crop, device=CPU, threads=cores_here())
    policy = Policy(section, device=CPU) if section.policy != "none" else None
    with feed.loader(rows=most_rows(config, world=1)) as loader:
        for batch in loader.run(works):
            work, sample = batch.work, int(batch.work.samples[0])
            view = batch.views[0].tolist()
            images, labels = feed.transfer(batch)
            mixed, _ = made(batch, augment(images, work.draws), labels)
            seen = unnormalise(mixed, section, channels=channels)
            name, epoch = data.train.name(sample), work.step // data.order.steps_per_epoch
            if 0 in batch.reasons:
                yield Shown(sample, name, epoch, Image.new("RGB", (section.size, section.size), FAINT),
                            (0, 0, section.size, section.size), images[0].numpy(), seen[0],
                            (f"damaged, has no weight: {batch.reasons[0]}",))
                continue
            left, top, width, height, resized_width, resized_height, x, y = view
            across, down = width / resized_width, height / resized_height
            box = (left + x * across, top + y * down,
                   left + (x + section.size) * across, top + (y + section.size) * down)
            yield Shown(sample, name, epoch, _stored(records, sample), box, images[0].numpy(), seen[0],
                        _drawn(batch, section, policy))


def _drawn(batch: Batch, section: AugmentSection, policy: Policy | None) -> tuple[str, ...]:
    """What was drawn for a batch's only own sample, in the order of the operations."""
    work = batch.work
    assert work.draws is not None
    words = ["flipped"] if section.flip > 0 and bool(work.draws.flip[0]) else []
    if policy is not None:
        numbers, strengths = policy.chosen(work.draws.policy[0])
        words += [f"{NAMES[number]} {strength:.3g}" if strength else NAMES[number]
                  for number, strength in zip(numbers.tolist(), strengths.tolist(), strict=True)]
    if section.rotation > 0:
        words.append(f"turned {float(work.draws.angle[0]):+.1f}\N{DEGREE SIGN}")
    if work.draws.erased[0].any():
        top, left, height, width = work.draws.erased[0].tolist()
        words.append(f"erased {width}x{height} at {left},{top}")
    if work.mixing is not None and not batch.damaged[work.mixing.partners[0]]:  # with those nothing is blended
        partner = int(work.samples[work.mixing.partners[0]])
        kind = "mixup" if work.mixing.box is None else "CutMix"
        words.append(f"{1.0 - work.mixing.share:.0%} of id {partner} ({kind})")
    return tuple(words)


def _stored(records: StoredRecords, sample: int) -> Image.Image:
    data, stage = records.read(sample), records.stage
    if stage.kind == "raw":
        return Image.frombytes("RGB", (stage.pixels, stage.pixels), data)
    return open_upright(data, channels=CHANNELS)


def unnormalise(pixels: torch.Tensor, section: AugmentSection, *, channels: int) -> U8:
    """float32 [n, c, s, s] as Augment gives it -> uint8 [n, s, s, c]."""
    mean, std = np.asarray(section.mean), np.asarray(section.std)
    if channels == 1:
        mean, std = np.asarray([GREY]) @ mean, np.asarray([GREY]) @ std
    values = pixels.permute(0, 2, 3, 1).to(torch.float64).numpy() * std + mean
    return (values * 255.0).round().clip(0, 255).astype(np.uint8)


# --- the sheet --------------------------------------------------------------------------------------------------


def _sheet(shown: list[Shown], *, title: str, facts: list[str], with_stages: bool, with_epoch: bool) -> Image.Image:
    side = shown[0].seen.shape[0]
    side *= max(1, -(-SMALLEST // side))
    pictures = 3 if with_stages else 1
    bold, font = ImageFont.load_default(14), ImageFont.load_default(11)
    width = pictures * side + (pictures - 1) * GAP // 2
    told = [_wrapped([one.cut, *one.draws], font, width) for one in shown]
    height = side + (2 + max(map(len, told))) * LINE + 4
    columns = max(1, round((len(shown) * height / width) ** 0.5))
    columns = min(len(shown), max(columns, -(-600 // (width + GAP))))  # room for the title
    rows = -(-len(shown) // columns)
    across = max(600, columns * (width + GAP) + GAP)
    lines = _wrapped(facts, font, across - 2 * GAP)
    head = 2 * GAP + LINE + 4 + len(lines) * LINE
    sheet = Image.new("RGB", (across, head + rows * (height + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), _fitted(title, bold, across - 2 * GAP), fill=INK, font=bold)
    for turn, line in enumerate(lines):
        pen.text((GAP, GAP + LINE + 4 + turn * LINE), line, fill=FAINT, font=font)
    for place, one in enumerate(shown):
        x, y = GAP + place % columns * (width + GAP), head + place // columns * (height + GAP)
        parts = [_with_box(one, side), _picture(one.crop), _picture(one.seen)] if with_stages else [_picture(one.seen)]
        for turn, part in enumerate(parts):
            if part.width < side and (turn or not with_stages):  # a small net's: whole pixels, to be seen as they are
                part = part.resize((side, side), Image.Resampling.NEAREST)
            left = x + turn * (side + GAP // 2)
            sheet.paste(part, (left + (side - part.width) // 2, y + (side - part.height) // 2))
        folder, _, stem = one.name.partition("/")
        epoch = f"epoch {one.epoch}{BETWEEN}" if with_epoch else ""
        captions = [(f"{epoch}{folder}", INK), (f"{stem}{BETWEEN}id {one.sample}", INK),
                    *((line, FAINT) for line in told[place])]
        for turn, (text, colour) in enumerate(captions):
            pen.text((x, y + side + 2 + turn * LINE), _fitted(text, font, width), fill=colour, font=font)
    return sheet


def _picture(pixels: U8) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def _with_box(one: Shown, side: int) -> Image.Image:
    """The stored image within side x side, with the box that the net sees of it."""
    shrink = side / max(one.stored.size)
    size = max(1, round(one.stored.width * shrink)), max(1, round(one.stored.height * shrink))
    picture = one.stored.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    left, top, right, bottom = (value * shrink for value in one.box)
    edges = [max(0, left), max(0, top), min(size[0] - 1, right - 1), min(size[1] - 1, bottom - 1)]
    ImageDraw.Draw(picture).rectangle(edges, outline=BOX, width=2)
    return picture


def _wrapped(words: list[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> list[str]:
    """The words in lines that fit into `room` pixels."""
    lines: list[str] = []
    for word in words:
        if lines and font.getlength(lines[-1] + BETWEEN + word) <= room:
            lines[-1] += BETWEEN + word
        else:
            lines.append(_fitted(word, font, room))
    return lines


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    """As much of the text as there is room for, in pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."


def save(sheet: Image.Image, path: Path) -> None:
    """As PNG, whole or not at all. Raises UserError."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, got {path}.")
    file = io.BytesIO()
    sheet.save(file, "PNG")
    draft = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(file.getvalue())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"{path}: can't be written: {error.strerror}.") from None
