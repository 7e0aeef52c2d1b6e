"""Draws alexnets.svg, the four nets side by side, from the nets themselves: python docs/pictures/alexnets.py"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from alexnet_ddp.models import create_model
from alexnet_ddp.models.block import ConvBlock
from alexnet_ddp.models.dropout import KeyedDropout
from alexnet_ddp.models.lrn import LocalResponseNorm
from alexnet_ddp.models.zoo import OURS, describe

PICTURE = Path(__file__).with_suffix(".svg")
LEFT, STEP, BOX, TOP, ROW = 150, 104, 88, 56, 104  # pixels: first box, box to box, a box, first row, row to row
COLOURS = {"LRN": "#e0a458", "BN": "#7fb069", "pool": "#6a8caf", "dropout": "#b56576"}
TITLES = ["block 1", "block 2", "block 3", "block 4", "block 5", "hidden 1", "hidden 2", "logits"]


def layers(net: nn.Module) -> list[list[nn.Module]]:
    """A net's layers in eight groups: five blocks, two hidden layers, the logits; dropout beside its neighbour."""
    flat = [m for part in ("features", "classifier") for m in net.get_submodule(part).modules()
            if not isinstance(m, nn.Sequential | ConvBlock)]
    groups: list[list[nn.Module]] = []
    waiting: list[nn.Module] = []
    for number, layer in enumerate(flat):
        follows = isinstance(flat[number - 1], nn.ReLU)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            groups.append([*waiting, layer])
            waiting = []
        elif isinstance(layer, KeyedDropout) and not (follows and isinstance(groups[-1][0], nn.Linear)):
            waiting.append(layer)  # in front of the layer that comes
        else:
            groups[-1].append(layer)
    return groups


def marks(group: list[nn.Module]) -> list[str]:
    """What stands beside a convolution or a linear layer and its ReLU, in order."""
    place = "dropout before" if isinstance(group[0], KeyedDropout) else "dropout after"
    kinds = {LocalResponseNorm: "LRN", nn.BatchNorm2d: "BN", nn.MaxPool2d: "pool", KeyedDropout: place}
    return [kinds[type(layer)] for layer in group if type(layer) in kinds]


def text(x: float, y: float, words: str, *, size: int = 12, colour: str = "#222222", anchor: str = "middle") -> str:
    return f'  <text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, height: float, group: list[nn.Module], *, share: int, told: bool) -> list[str]:
    """A group of layers; `share`: into how many towers its outputs are divided."""
    main = next(layer for layer in group if isinstance(layer, nn.Conv2d | nn.Linear))
    lines = [f'  <rect x="{x}" y="{y}" width="{BOX}" height="{height}" fill="#eef2f6" stroke="#7a8793"/>']
    if isinstance(main, nn.Conv2d):
        kernel, stride = main.kernel_size[0], main.stride[0]
        words = f"{main.out_channels // share}, {kernel}x{kernel}" + (f"/{stride}" if stride > 1 else "")
    else:
        words = str(main.out_features)
    lines.append(text(x + BOX / 2, y + 16, words))
    shown = marks(group)
    width = (BOX - 8) / max(1, len(shown))
    for number, mark in enumerate(shown):
        lines.append(f'  <rect x="{x + 4 + number * width:g}" y="{y + height - 16}" width="{width - 2:g}" height="12" '
                     f'fill="{COLOURS[mark.split()[0]]}"/>')
        lines.append(text(x + 3 + (number + 0.5) * width, y + height - 6, mark, size=9, colour="#ffffff"))
    if told:
        lines.append(text(x + BOX / 2, y + 29, "ReLU after BN" if "BN" in shown else "ReLU", size=9, colour="#667077"))
    return lines


def line(x: float, y: float, to_y: float) -> str:
    return f'  <line x1="{x + BOX}" y1="{y}" x2="{x + STEP}" y2="{to_y}" stroke="#7a8793"/>'


def row(name: str, y: float) -> list[str]:
    with torch.device("meta"):
        net = create_model(name)
    count = sum(layer.parameters for layer in describe(net, image_size=224))
    lines = [text(12, y + 34, name, size=13, anchor="start"),
             text(12, y + 52, f"{count:,}", size=11, colour="#667077", anchor="start")]
    groups, towers = layers(net), 2 if name == "alexnet_paper" else 1
    lanes = [y + 3, y + 49] if towers == 2 else [y + 14]
    height = 42 if towers == 2 else 58
    for number, group in enumerate(groups):
        x = LEFT + number * STEP
        split = 2 if towers == 2 and number < 5 else 1
        ys = lanes if split == 2 else [y + 14]
        for each in ys:
            lines += box(x, each, 42 if split == 2 else 58, group, share=split, told=split == 1 and number < 7)
        if number < 7:
            after = lanes if towers == 2 and number < 4 else [y + 14]
            crossing = number in (1, 4) or split == 1  # into block 3, into the classifier
            middle = height / 2 if split == 2 else 29
            for a in ys:
                for b in after:
                    if crossing or a == b:
                        lines.append(line(x, a + middle, b + (height / 2 if len(after) == 2 else 29)))
    return lines


def draw() -> str:
    width, height = LEFT + 8 * STEP, TOP + len(OURS) * ROW + 16
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
             "  <title>The four AlexNets, layer by layer</title>",
             f'  <rect width="{width}" height="{height}" fill="#ffffff"/>']
    for number, title in enumerate(TITLES):
        lines.append(text(LEFT + number * STEP + BOX / 2, 36, title, colour="#667077"))
    for number, name in enumerate(OURS):
        lines += row(name, TOP + number * ROW)
    words = ("Kernels (of a tower), their size / stride; hidden units. Beside the ReLU, from left to right as they "
             "come: LRN after it, BN before it, 3x3/2 max pool, dropout before or after.")
    lines.append(text(12, height - 14, words, size=11, colour="#667077", anchor="start"))
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw())
