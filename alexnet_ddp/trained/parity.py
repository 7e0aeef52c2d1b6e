"""Parity: whether another form of a net gives its logits, on pictures, before anybody believes the file."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from alexnet_ddp.data.decoding.decode import DamagedImage
from alexnet_ddp.data.tools import demo
from alexnet_ddp.errors import UserError
from alexnet_ddp.trained.model import Model
from alexnet_ddp.trained.pictures import find_pictures

BATCHES = (1, 2, 7)
TOLERANCE = 1e-4  # of a logit, absolute, in fp32
HALF_TOLERANCE = 1e-2  # of the largest logit (or of 1, where that is more): fp16 has eleven bits, a net many sums
FP16_LARGEST = 65504.0


@dataclass(frozen=True)
class Parity:
    """Of two nets on the same images.

    difference  the largest between two logits
    largest     the largest logit, either sign
    bound       that `difference` mustn't reach
    agreed      of `images`, those with the same answer
    pictures    for people: what was shown
    """

    difference: float
    largest: float
    bound: float
    agreed: int
    images: int
    pictures: str

    @property
    def holds(self) -> bool:
        return self.difference < self.bound  # also False for nan

    def __str__(self) -> str:
        batches = f"{', '.join(map(str, BATCHES[:-1]))} and {BATCHES[-1]}"
        return (f"largest difference of a logit {self.difference:.1e} (below {self.bound:.0e} is asked for; the "
                f"largest logit is {self.largest:.3g}), same answer on {self.agreed} of {self.images}, at batch "
                f"{batches}, on {self.pictures}")


def compare(model: Model, other: Callable[[Tensor], Tensor], *, pixels: Tensor, pictures: str, tolerance: float,
            relative: float = 0.0) -> Parity:
    """`model.net` and `other` on `pixels` (float32 [sum of BATCHES, channels, size, size]), in batches of BATCHES.

    The bound is `tolerance`, or `relative` times the largest logit where that is more. Raises UserError where the net
    itself gives no finite logits.
    """
    assert len(pixels) == sum(BATCHES)
    with torch.no_grad():
        ours = torch.cat([model.net(part).float() for part in pixels.split(BATCHES)])
        theirs = torch.cat([other(part).float() for part in pixels.split(BATCHES)])
    if not ours.isfinite().all():
        raise UserError(f"{model.where} gives logits that aren't finite on {pictures}. Export another checkpoint.")
    if theirs.shape != ours.shape:
        raise UserError(f"The exported net gives {list(theirs.shape)} logits, not {list(ours.shape)}.")
    largest = float(ours.abs().max())
    difference = float((ours - theirs).abs().max())  # nan where theirs is nan
    return Parity(difference, largest, max(tolerance, relative * largest),
                  int((ours.argmax(1) == theirs.argmax(1)).sum()), len(ours), pictures)


def refuse_overflow(model: Model, pixels: Tensor) -> None:
    """Raises UserError where weights, or what layers give on `pixels`, don't fit fp16: beyond 65504 it is infinite.

    Looked at in fp32, layer by layer: CPUs compute fp16 in wider numbers and would hide it.
    """
    found: list[tuple[str, float]] = [(f"the weights {name}", float(tensor.abs().max())) for name, tensor in
                                      model.net.state_dict().items() if tensor.is_floating_point() and tensor.numel()]

    def watched(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(_module: nn.Module, _inputs: tuple[Tensor, ...], given: Tensor) -> None:
            if isinstance(given, Tensor) and given.numel():
                found.append((f"what {name} gives", float(given.abs().max())))

        return look

    hooks = [module.register_forward_hook(watched(name)) for name, module in model.net.named_modules()
             if not list(module.children())]
    try:
        with torch.no_grad():
            model.net(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    if beyond := next((item for item in found if not item[1] <= FP16_LARGEST), None):
        what, largest = beyond
        raise UserError(f"{model.where} can't be exported with --half: {what} reaches {largest:.3g}, and fp16 ends at "
                        f"{FP16_LARGEST:.0f}. Leave out --half.")


# --- pictures ---------------------------------------------------------------------------------------------------


def show(model: Model, images: Sequence[str] = ()) -> tuple[Tensor, str, list[str]]:
    """What the net sees in the pictures that parity is shown on: float32 [sum of BATCHES, channels, size, size].

    Those in `images` (files, folders, tars); else of the recipe's data.val; else drawn ones, as of `data demo`. With
    what they are, for people, and notes. Raises UserError where `images` holds none that can be read.
    """
    wanted = sum(BATCHES)
    notes: list[str] = []
    if images:
        return _shown(model, _read(model, images, wanted), f"pictures of {', '.join(images)}", notes)
    if place := model.config.data.val:
        try:
            return _shown(model, _read(model, [place], wanted), f"photographs of data.val ({place})", notes)
        except UserError as error:
            notes.append(f"parity is shown on drawn pictures (--images names others), since data.val can't be: {error}")
    return _shown(model, drawn(model, wanted), "pictures drawn as by `data demo`", notes)


def _shown(model: Model, found: list[Tensor], what: str, notes: list[str]) -> tuple[Tensor, str, list[str]]:
    wanted = sum(BATCHES)
    said = f"{len(found)} {what}" + (", repeated" if len(found) < wanted else "")
    return model.pixels(torch.stack([found[number % len(found)] for number in range(wanted)])), said, notes


def drawn(model: Model, count: int) -> list[Tensor]:
    """The demo's figures, the same ones everywhere: uint8 [size, size, channels]."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        held = io.BytesIO()
        Image.fromarray(demo.draw(demo.CLASSES[number % len(demo.CLASSES)], rng)).save(held, "jpeg", quality=90)
        found.append(_seen(model, held.getvalue()))
    return found


def _seen(model: Model, data: bytes) -> Tensor:
    """Raises DamagedImage."""
    preprocessing = model.preprocessing
    out = np.empty((preprocessing.size, preprocessing.size, preprocessing.channels), np.uint8)
    preprocessing.decoder()(data, preprocessing.choose()[0], out)
    return torch.from_numpy(out)


def _read(model: Model, places: Sequence[str], wanted: int) -> list[Tensor]:
    """Pictures from all over `places`. Raises UserError where none can be read."""
    pictures = find_pictures(places, stored="original")  # _seen decodes them; a raw stage has no JPEG
    found, why = [], ""
    for number in np.linspace(0, len(pictures) - 1, num=min(wanted, len(pictures))).round().astype(int):
        try:
            found.append(_seen(model, pictures.read(int(number))))
        except DamagedImage as error:
            why = f"{pictures.where(int(number))}: {error}"
    if not found:
        raise UserError(f"None of the pictures in {', '.join(places)} can be read, such as {why}.")
    return found
