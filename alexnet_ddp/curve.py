"""The learning rate over a whole run, shown before it is trained: a table, a picture in the terminal, one in a file."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_ddp import plots
from alexnet_ddp.config import Config
from alexnet_ddp.errors import UserError
from alexnet_ddp.schedule import learning_rate

STEPS = 20_000_000  # a rate each, some ten seconds and a gigabyte
ROWS = 20  # of the table, more or less
WIDTH, HEIGHT = 64, 12  # characters of the picture
BLOCKS, ASCII = " ▁▂▃▄▅▆▇█", " #"  # cells from empty to full


def show(config: Config, *, samples: int | None, out: str | None) -> None:
    """Prints the schedule of a recipe, and draws it in `out` where that is given. Raises UserError.

    `samples`: training images, for where the data aren't at hand; None: they are counted.
    """
    if out is not None:
        plots.check(out, flag="--out", otherwise=" Without --out the curve is shown in the terminal.")
    samples = min(samples_of(config) if samples is None else samples, config.data.limit or sys.maxsize)
    steps_per_epoch = -(-samples // config.global_batch)
    if config.epochs * steps_per_epoch > STEPS:
        raise UserError(f"--print-schedule computes the rate of every step, at most {STEPS:,}, got "
                        f"{config.epochs * steps_per_epoch:,} ({config.epochs} epochs of {samples:,} images in batches "
                        f"of {config.global_batch}). Use a smaller --samples, or epochs=...")
    rates = [learning_rate(step, base=config.optim.lr, schedule=config.schedule, steps_per_epoch=steps_per_epoch,
                           epochs=config.epochs) for step in range(config.epochs * steps_per_epoch)]
    title = (f"{config.name}: schedule.name={config.schedule.name}, {config.epochs} epochs of {steps_per_epoch} steps "
             f"of {config.global_batch} images")
    if out is not None:
        draw(rates, Path(out), steps_per_epoch=steps_per_epoch, title=title)
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
        blocks = BLOCKS
    except UnicodeEncodeError:
        blocks = ASCII
    print("\n".join([title, "", *table(rates, steps_per_epoch=steps_per_epoch), "",
                     *picture(rates, epochs=config.epochs, blocks=blocks)]))


def samples_of(config: Config) -> int:
    """Training images there are. Raises UserError where they can't be counted."""
    from alexnet_ddp.data.index import open_index  # NumPy, and perhaps a long look

    try:
        with open_index(config.data.train) as index:
            counted = len(index)
    except UserError as error:
        raise UserError(f"data.train={error}\nWhere the data aren't at hand, say how many images they are: "
                        "--samples 1281167") from None
    return counted


def table(rates: Sequence[float], *, steps_per_epoch: int) -> list[str]:
    """Lines of step, epochs done before it and rate: wherever the rate changes, or where it does always, a choice."""
    shown = [step for step in range(len(rates)) if step == 0 or rates[step] != rates[step - 1]]
    if len(shown) > ROWS:
        every = max(1, round(len(rates) / steps_per_epoch / ROWS)) * steps_per_epoch
        turns = [step for step in range(1, len(rates) - 1)  # the last step of a rise or a fall, and jumps
                 if rates[step - 1] != rates[step] and
                 (rates[step] - rates[step - 1]) * (rates[step + 1] - rates[step]) <= 0]
        shown = sorted({*range(0, len(rates), every), *turns[:ROWS], len(rates) - 1})
    lines, told = [f"{'step':>9}  {'epochs done':>11}  learning rate"], ""
    for step in shown:
        rate = f"{rates[step]:.6g}"
        if rate != told:
            lines.append(f"{step:>9}  {math.floor(100 * step / steps_per_epoch) / 100:>11.2f}  {rate}")
        told = rate
    return lines


def picture(rates: Sequence[float], *, epochs: int, blocks: str = BLOCKS) -> list[str]:
    """The curve as columns of characters, from 0 to the highest rate; epochs from left to right."""
    top, levels = max(rates), len(blocks) - 1
    columns = [rates[int((column + 0.5) * len(rates) / WIDTH)] / top * HEIGHT for column in range(WIDTH)]
    lines = []
    for row in reversed(range(HEIGHT)):  # a rate above zero always shows
        cells = [blocks[max(min(1, row == 0), min(levels, round((height - row) * levels)))] for height in columns]
        label = f"{top:.3g}" if row == HEIGHT - 1 else f"{top / 2:.3g}" if row == HEIGHT // 2 - 1 else ""
        lines.append(f"{label:>9} |{''.join(cells)}")
    lines.append(f"{'0':>9} +{'-' * WIDTH}")
    lines.append(f"{'epochs':>9}  0{f'{epochs / 2:g}':^{WIDTH - 1 - len(str(epochs))}}{epochs}")
    return lines


def draw(rates: Sequence[float], path: Path, *, steps_per_epoch: int, title: str) -> None:
    """The curve as a picture, .png or .svg. Raises UserError where it can't be written."""
    with plots.figure(path, flag="--out", size=(8, 3.5)) as figure:
        axis = figure.subplots()
        axis.plot([step / steps_per_epoch for step in range(len(rates))], rates, linewidth=1.2)
        axis.set(xlabel="epochs", ylabel="learning rate", xlim=(0, len(rates) / steps_per_epoch), ylim=(0, None))
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
