"""What users get wrong, one by one: how to make it, and what must be said about it. No case leaves anything behind."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import harness


@dataclass(frozen=True)
class Case:
    """One mistake: the words to add to a good command (given a folder with train/ and val/), and what must be said."""

    words: Callable[[Path], list[str]]
    says: tuple[str, ...]  # all of it, in the one message
    new_run: bool = False  # where a run that has begun would be refused because the recipe has changed


def _plain(*words: str) -> Callable[[Path], list[str]]:
    return lambda _: list(words)


def _empty_class(folder: Path) -> list[str]:
    changed = shutil.copytree(folder / "train", folder / "empty_class", dirs_exist_ok=True)
    (changed / "class7").mkdir(exist_ok=True)
    return [f"data.train={changed}"]


def _fewer_classes(folder: Path) -> list[str]:
    changed = folder / "fewer_classes"
    if not changed.exists():
        shutil.copytree(folder / "val", changed)
        shutil.rmtree(changed / "class2")
    return [f"data.val={changed}"]


def _dangling_link(folder: Path) -> list[str]:
    changed = folder / "dangling"
    if not changed.exists():
        shutil.copytree(folder / "train", changed)
        (changed / "class1" / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return [f"data.train={changed}"]


def _half_a_tar(folder: Path) -> list[str]:
    whole, half = folder / "whole.tar", folder / "half.tar"
    subprocess.run(["tar", "cf", str(whole), "-C", str(folder), "train"], check=True)
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2 + 100])
    return [f"data.train={half}::train"]


def _file_for_runs(folder: Path) -> list[str]:
    (folder / "a_file").write_text("")
    return [f"runs={folder / 'a_file'}"]


# Refused before a step is taken.
REFUSED: dict[str, Case] = {
    "unknown key": Case(_plain("learning_rate=0.1"), ("unknown key 'learning_rate'", "optim.lr")),
    "unknown nested key": Case(_plain("optim.momentun=0.9"), ("'optim.momentun'", "did you mean 'optim.momentum'")),
    "wrong type": Case(_plain("epochs=ten"), ("epochs: must be a whole number", "'ten'")),
    "out of range": Case(_plain("global_batch=0"), ("global_batch", "got 0")),
    "wrong choice": Case(_plain("amp=bf61"), ("amp", "did you mean 'bf16'")),
    "not key=value": Case(_plain("fresh"), ("key=value", "'fresh'")),
    "flag from elsewhere": Case(_plain("--batch-size=12"), ("global_batch",)),
    "two mistakes": Case(_plain("epochs=0", "optim.lr=-1"), ("2 mistakes", "epochs", "optim.lr")),
    "missing training data": Case(_plain("data.train=/nowhere/train"), ("data.train=/nowhere", "nothing is there")),
    "missing validation data": Case(_plain("data.val=/nowhere/val"), ("data.val=/nowhere", "nothing is there")),
    "empty class": Case(_empty_class, ("hold images", "class7")),
    "other classes in validation": Case(_fewer_classes, ("same classes", "class2")),
    "wrong number of classes": Case(_plain("model.num_classes=10"), ("model.num_classes", "Use model.num_classes=3")),
    "link to nowhere": Case(_dangling_link, ("gone.jpg", "link")),
    "half a tar": Case(_half_a_tar, ("half.tar", "cut short")),
    "unknown net": Case(_plain("model.name=alexnet_singel"), ("did you mean 'alexnet_single'",), new_run=True),
    "image too small": Case(_plain("augment.size=32"), ("at least 63 pixels", "augment.size"), new_run=True),
    "no GPU here": Case(_plain("device=cuda"), ("device=cuda asks for a GPU", "device=cpu")),
    "owner of odd shards": Case(_plain("data.assignment=owner", "data.shards=3"), ("Use data.shards=4",)),
    "a sample alone in a batch norm": Case(
        _plain("model.name=torchvision:shufflenet_v2_x0_5", "model.width=1", "augment.size=32", "micro_batch=1",
               "data.assignment=owner"),
        ("sees one value of each", "data.assignment=owner on 2 ranks makes some", "micro_batch"), new_run=True),
    "a mean that never moves": Case(
        _plain("ema.decay=0.9", "ema.steps=1000"), ("ema.steps must be at most", "got 1000"), new_run=True),
    "runs is a file": Case(_file_for_runs, ("can't be used", "runs=")),
}


def truncate_one(folder: Path, name: str) -> Path:
    """A copy of the images below `folder` with one JPEG cut short; returns that JPEG."""
    changed = folder.with_name(name)
    shutil.copytree(folder, changed)
    damaged = sorted((changed / "class1").iterdir())[-1]
    damaged.write_bytes(damaged.read_bytes()[:300])
    return damaged


def damage(folder: Path, *, samples: int) -> dict[str, str]:
    """Spoils so many images below `folder`, spread over it, in every way there is, in turn.

    Returns what a decoder says of each (a regular expression), by path. Garbage is in the lower part, where a region
    decoder may not look.
    """
    images, told = sorted(folder.glob("*/*.jpg")), {}
    for number in range(samples):
        image = images[number * len(images) // samples]
        data = image.read_bytes()
        half = data[: len(data) // 2]
        spoilt, reason = (
            (half, "truncated"),
            (half + random.Random(number).randbytes(len(half)) + b"\xff\xd9", "broken data|cannot load"),
            (bytes(len(data)), "not a JPEG or PNG"), (b"GIF89a " + data, "not a JPEG or PNG"),
            (b"", "no bytes"))[number % 5]
        image.write_bytes(spoilt)
        told[str(image)] = reason
    return told


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs at `folder`; skips the test where mounting isn't allowed (a file system that even root can't fill)."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NOT PROVED HERE: bad disks need the right to mount a tmpfs ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes all that is free on the file system of `folder`; returns the file that holds it."""
    ballast = folder / "ballast"
    file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (65536, 4096, 1):
            try:
                while os.write(file, b"x" * size):
                    pass
            except OSError:
                continue
    finally:
        os.close(file)
    return ballast


def make_material(folder: Path) -> Path:
    """train/, val/ and a good recipe for them; returns the recipe."""
    return harness.tiny_recipe(folder, train=harness.make_images(folder / "train", samples=23),
                               val=harness.make_images(folder / "val", samples=40, seed=1))


def messages(output: str) -> list[str]:
    """The lines that say what ended a run."""
    ours = re.compile(r"alexnet-ddp: (error: |rank \d+ on \S+ failed at )")
    return [line for line in output.splitlines() if ours.match(line)]
