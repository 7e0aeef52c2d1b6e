"""The command `predict`: what a net takes photographs for, as a table, JSON lines or CSV, and as a picture."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from alexnet_ddp import plots
from alexnet_ddp.amounts import counted
from alexnet_ddp.distributed import pick_device
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER, UserError
from alexnet_ddp.trained import command
from alexnet_ddp.trained.model import Model, load_model
from alexnet_ddp.trained.pictures import Pictures, find_pictures
from alexnet_ddp.trained.prediction import Answer, classify, views

DRAWN = 16  # pictures on one sheet
ROOM = 28  # characters of a caption
COLUMNS = ("path", "place", "class", "name", "probability", "error")


def main(words: list[str]) -> int:
    parser = command.parser("predict", "What a net takes photographs for. Exit code 0 where any could be read, else 2.",
                            metavar="IMAGE|FOLDER|TAR|key=value", overrides="pictures: files, folders of any depth, "
                            "tars (FILE.tar::folder for a part); key=value as in a recipe, such as model.width=0.5")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes a picture (default: 5)")
    parser.add_argument("--crops", type=int, default=1, metavar="1|10", help="views of a picture that are averaged")
    parser.add_argument("--format", choices=list(PRINTERS), default="table", help="of what is printed")
    parser.add_argument("--show", metavar="FILE", help=f"draw the first {DRAWN} pictures with their bars, as .png or "
                        ".svg")
    options = parser.parse_intermixed_args(words)
    overrides, places = command.overrides_among(options.overrides)
    command.check_crops(overrides)
    if not places:
        raise UserError("predict takes pictures: files, folders or tars, after the MODEL.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("predict runs in one process: start it without torchrun.")
    if options.show is not None:
        plots.check(options.show, flag="--show")
    model = load_model(options.model, overrides, device=pick_device(options.device, local_rank=0, local_size=1))
    command.tell_notes(model.notes)
    pictures = find_pictures(places, stored=model.config.data.stored)

    began, unread = time.perf_counter(), 0
    kept: list[Answer] = []
    tell = PRINTERS[options.format]()
    for answer in classify(model, pictures, top=options.top, crops=options.crops):
        tell(answer)
        if answer.error is not None:
            unread += 1
            print(f"alexnet-ddp: {answer.where}: {answer.error}", file=sys.stderr, flush=True)
        if len(kept) < DRAWN:
            kept.append(answer)
    seconds = time.perf_counter() - began
    if options.show is not None:
        draw(model, kept, pictures, Path(options.show))
    bad = f"; {unread:,} of them can't be read" if unread else ""
    print(f"alexnet-ddp: {counted(len(pictures), 'picture')} in {seconds:.2f} s, {len(pictures) / seconds:,.0f} a "
          f"second{bad}", file=sys.stderr)
    return EXIT_FINISHED if unread < len(pictures) else EXIT_USER


# --- printed as they come ---------------------------------------------------------------------------------------


def _table() -> Callable[[Answer], None]:
    def tell(answer: Answer) -> None:
        print(answer.where if answer.error is None else f"{answer.where}: {answer.error}")
        for guess in answer.guesses:
            also = "" if guess.name == guess.label else f"  ({guess.label})"
            print(f"  {guess.probability:8.2%}  {' '.join(f'{guess.name}{also}'.split())}")

    return tell


def _json_lines() -> Callable[[Answer], None]:
    def tell(answer: Answer) -> None:
        told = {"path": answer.where, "top": [{"class": guess.label, "name": guess.name,
                                               "probability": guess.probability} for guess in answer.guesses]}
        print(json.dumps(told if answer.error is None else {"path": answer.where, "error": answer.error}), flush=True)

    return tell


def _csv() -> Callable[[Answer], None]:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)

    def tell(answer: Answer) -> None:
        if answer.error is not None:
            writer.writerow([answer.where, "", "", "", "", answer.error])
        for place, guess in enumerate(answer.guesses, start=1):
            writer.writerow([answer.where, place, guess.label, guess.name, guess.probability, ""])

    return tell


PRINTERS: dict[str, Callable[[], Callable[[Answer], None]]] = {"table": _table, "jsonl": _json_lines, "csv": _csv}


# --- drawn ------------------------------------------------------------------------------------------------------


def draw(model: Model, answers: Sequence[Answer], pictures: Pictures, path: Path) -> None:
    """The first pictures as the net sees them (one crop), each beside the bars of its classes. Raises UserError."""
    seen = views(model, pictures.first(len(answers)))
    across = 2 if len(answers) > 1 else 1
    down = -(-len(answers) // across)
    with plots.figure(path, flag="--show", size=(5.5 * across, 1.9 * down + 0.2)) as drawn:
        grid = drawn.subplots(down, 2 * across, squeeze=False, width_ratios=[1, 2] * across)
        for axis in grid.flat:
            axis.axis("off")
        for number, (answer, view) in enumerate(zip(answers, seen, strict=True)):
            left, right = grid[number // across][2 * (number % across):][:2]
            left.imshow(view[..., 0] if view.shape[-1] == 1 else view, cmap="gray", vmin=0, vmax=255)
            left.set_title(plots.caption(answer.where, room=ROOM, keep="end"), fontsize=7)
            if answer.error is not None:
                right.text(0, 0.5, plots.caption(answer.error, room=50), fontsize=7)
                continue
            right.axis("on")
            guesses = answer.guesses[::-1]
            places = range(len(guesses))
            right.barh(places, [guess.probability for guess in guesses], color="tab:blue")
            right.set_yticks(places, [plots.caption(guess.name, room=ROOM) for guess in guesses], fontsize=7)
            right.set_xlim(0, 1)
            right.tick_params(axis="x", labelsize=6)
    print(f"alexnet-ddp: {path}: {counted(len(answers), 'picture')}", file=sys.stderr)

