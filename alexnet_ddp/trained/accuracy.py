"""The command `evaluate`: how often a trained net is right, as a few lines, a table by class, a picture, or JSON."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_ddp import plots, tables
from alexnet_ddp.amounts import counted
from alexnet_ddp.distributed import World, first_on_node
from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.evaluate import record_of
from alexnet_ddp.hardware import cores
from alexnet_ddp.progress import Progress
from alexnet_ddp.trained import command
from alexnet_ddp.trained.evaluation import NONE, Outcomes, evaluate_model
from alexnet_ddp.trained.model import NAMELESS, Model
from alexnet_ddp.trained.tiles import Source, open_source

NAMED = 10  # damaged images that are named on the terminal; --json has them all
LEGIBLE = 60  # classes whose names can be read beside a confusion matrix
IN_CELLS = 20  # classes up to which counts are written into its cells


def main(words: list[str], *, name: str = "evaluate") -> int:
    parser = command.parser(name, "How often a trained net is right on held-out data: exact, every sample once.",
                            overrides="as in a recipe; data.val=... names the data, by default those of the run")
    parser.add_argument("--crops", type=int, default=1, metavar="1|10", help="views of an image that are averaged: "
                        "its centre, or the 2012 paper's corners and centre, mirrored too")
    parser.add_argument("--per-class", action="store_true", help="also a table by class")
    parser.add_argument("--confusion", metavar="FILE", help="draw the confusion matrix, as .png or .svg")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", metavar="N|auto",
                        help="on N ranks of this machine (torchrun inside)")
    options = parser.parse_intermixed_args(words)
    command.check_crops(options.overrides)
    if options.nproc_per_node is not None:
        return command.on_ranks("evaluate", words, ranks=options.nproc_per_node)
    if options.confusion is not None:
        plots.check(options.confusion, flag="--confusion")
    with command.group(options.device) as world:
        model = command.load_on_all(world, options.model, options.overrides)
        model.preprocessing.choose(crops=options.crops)
        began = time.perf_counter()
        with first_on_node(world, lambda: open_held_out(model)) as source:
            command.check_same(world, source.index.identity, f"{model.config.data.val} holds other images on some "
                               "hosts than on others. Name data that all of them share.")
            outcomes = _evaluate(model, source, world, crops=options.crops)
            seconds = time.perf_counter() - began
            if world.rank == 0:
                told = facts(model, source, outcomes, crops=options.crops)
                told |= {"seconds": seconds, "images_per_second": len(source) / seconds, "ranks": world.size}
                if options.json:
                    print(json.dumps(told | ({"per_class": by_class(model, outcomes)} if options.per_class else {})))
                    command.tell_notes([*model.notes, *source.notes])
                else:
                    print("\n".join(summary(told, [*model.notes, *source.notes])))
                    if options.per_class:
                        print("\n" + tables.markdown(class_table(model, outcomes), left=2))
                if options.confusion is not None:
                    draw_confusion(model, outcomes, Path(options.confusion), title=f"{model.where}\n{told['data']}")
    return EXIT_FINISHED


def open_held_out(model: Model) -> Source:
    """The data that `data.val` names; a net that doesn't know what its classes are called has them from there. Raises
    UserError."""
    place = model.config.data.val
    if place is None:
        raise UserError(f"{model.where} doesn't say what it is to be evaluated on. Name the data: data.val=FOLDER (or "
                        "a tar, shards, a pack).")
    try:
        source = open_source(place, model)
    except UserError as error:
        raise UserError(f"data.val={error}") from None
    if not model.classes:
        model.classes = tuple(source.index.classes)
        model.notes = [note for note in model.notes if note != NAMELESS]
    return source


def _evaluate(model: Model, source: Source, world: World, *, crops: int) -> Outcomes:
    threads, mine = model.config.data.threads, cores(world)
    torch.set_num_threads(model.config.torch_threads or mine)  # as in training; torchrun's ranks would have one each
    with (Progress(-(-len(source) // world.size), what="evaluate") if world.rank == 0 else
          contextlib.nullcontext()) as progress:
        return evaluate_model(model, source, world=world, crops=crops, tick=progress.update if progress else None,
                              threads=mine if threads == "auto" else threads)


def facts(model: Model, source: Source, outcomes: Outcomes, *, crops: int) -> dict[str, Any]:
    """What --json prints; counts and accuracies by the names that metrics.jsonl has for them."""
    index = source.index
    record = {name: None if isinstance(value, float) and not math.isfinite(value) else value
              for name, value in record_of(outcomes.evaluation).items()}
    return {"model": model.where, **{name: model.facts.get(name) for name in ("path", "sha256", "step")},
            "data": str(index.source), "identity": index.identity, "classes": model.num_classes,
            "data_classes": len(index.classes), "crops": crops,
            "preprocessing": model.preprocessing.plain(), "stored": source.stored, **record,
            "damaged_images": [{"sample": sample, "where": index.where(sample), "reason": reason}
                               for sample, reason in outcomes.reasons.items()]}


def summary(told: dict[str, Any], notes: Sequence[str]) -> list[str]:
    """Lines for a person."""
    samples, damaged = told["samples"], told["damaged_images"]
    rows = [("model", told["model"]),
            ("data", f"{told['data']}: {counted(samples, 'image')} of "
                     f"{counted(told['data_classes'], 'class', 'classes')}"),
            ("crops", "1, the centre" if told["crops"] == 1 else "10, softmax averaged"),
            ("top-1", f"{told['top1']:8.3%}   {told['correct1']:,} right")]
    if told["classes"] > 5:
        rows.append(("top-5", f"{told['top5']:8.3%}   {told['correct5']:,} right"))
    rows.append(("loss", "not a number" if told["loss"] is None else f"{told['loss']:8.5f}   mean cross-entropy"))
    if damaged:
        rows.append(("damaged", f"{counted(len(damaged), 'image')}, counted as wrong:"))
        rows += [("", f"{one['where']}: {one['reason']}") for one in damaged[:NAMED]]
        if len(damaged) > NAMED:
            rows.append(("", f"and {len(damaged) - NAMED:,} more; --json has them all"))
    rows.append(("speed", f"{told['images_per_second']:,.0f} images a second on {counted(told['ranks'], 'rank')} "
                          f"({told['seconds']:.1f} s)"))
    rows += [("note", note) for note in notes]
    return [f"{name:<9}{value}" for name, value in rows]


def by_class(model: Model, outcomes: Outcomes) -> list[dict[str, Any]]:
    """Of every class of the net: its names, its samples, how many are right, and what it is most often taken for."""
    names, spoken, columns = model.classes, model.spoken, outcomes.per_class()
    return [{"class": names[number], "name": spoken[number],
             **{name: int(columns[name][number]) for name in ("samples", "correct1", "correct5")},
             "mistaken": None if columns["mistaken"][number] == NONE else names[columns["mistaken"][number]]}
            for number in range(model.num_classes)]


def class_table(model: Model, outcomes: Outcomes) -> list[list[str]]:
    """The same as cells, of the classes that the data have, the worst first."""
    told = [row for row in by_class(model, outcomes) if row["samples"]]
    spoken = dict(zip(model.classes, model.spoken, strict=False))
    rows = [["class", "mistaken for", "images", "top-1", "top-5"]]
    for row in sorted(told, key=lambda row: row["correct1"] / row["samples"]):
        name = row["class"] if row["class"] == row["name"] else f"{row['class']} {row['name']}"
        mistaken = "-" if row["mistaken"] is None else spoken.get(row["mistaken"], row["mistaken"])
        rows.append([name, mistaken, f"{row['samples']:,}",
                     *(f"{row[f'correct{top}'] / row['samples']:.2%}" for top in (1, 5))])
    return rows


def draw_confusion(model: Model, outcomes: Outcomes, path: Path, *, title: str) -> None:
    """The confusion matrix as a picture: rows are true classes, shares of a row are shades. Raises UserError."""
    counts, classes = outcomes.confusion(), model.num_classes
    shares = counts / np.maximum(1, np.bincount(outcomes.labels, minlength=classes))[:, None]
    evaluation = outcomes.evaluation
    with plots.figure(path, flag="--confusion", size=(min(14.0, 4.5 + 0.25 * classes),) * 2) as drawn:
        axis = drawn.subplots()
        picture = axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
        if classes <= LEGIBLE:
            called = [plots.caption(name, room=40) for name in model.spoken]
            axis.set_xticks(range(classes), called, rotation=90, fontsize=7)
            axis.set_yticks(range(classes), called, fontsize=7)
        if classes <= IN_CELLS:
            for row, column in np.argwhere(counts):
                axis.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=6,
                          color="white" if shares[row, column] > 0.5 else "black")
        axis.set(xlabel="the net's answer", ylabel="true class")
        left_out = len(outcomes) - int(counts.sum())
        more = f", {counted(left_out, 'image')} without an answer" if left_out else ""
        reached = f"top-1 {evaluation.top1:.2%} of {counted(len(outcomes), 'image')}{more}"
        axis.set_title(f"{plots.caption(title, room=300)}\n{reached}", fontsize=8)
        drawn.colorbar(picture, shrink=0.7, label="share of the true class")
    print(f"confusion matrix: {path}", file=sys.stderr)
