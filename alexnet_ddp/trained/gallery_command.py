"""The command `visualize`."""

from __future__ import annotations

from pathlib import Path

from alexnet_ddp import plots, tables
from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.models.source import find
from alexnet_ddp.runfiles import METRICS
from alexnet_ddp.sinks import read_records
from alexnet_ddp.trained import command, gallery
from alexnet_ddp.trained.evaluation import evaluate_model
from alexnet_ddp.trained.model import NOWHERE, Model, load_model
from alexnet_ddp.trained.tiles import open_source

FOLDER = "pictures"  # in a run directory
KINDS = [suffix.removeprefix(".") for suffix in plots.FORMATS]
LISTED = 10  # mistakes in the table
MOST = 500  # mistakes in a picture, five in a row: a picture's height has a limit (2**16 pixels)


def visualize(model: Model, run: Path | None, *, out: Path, kind: str = "png", most: int = 20,
              data: str | None = None) -> dict[str, Path]:
    """Draws what can be drawn, and says of the rest why it can't: `kernels`, `curves`, `mistakes` -> the file. Raises
    UserError where nothing can be, and where `data` are no data of this net.

    run   the run directory, for the curves; None where there is none
    data  held-out photographs for the mistakes; None: none are shown
    most  so many mistakes, up to MOST
    """
    _check_most(most)
    if kind not in KINDS:
        raise UserError(f"--format must be {' or '.join(KINDS)}, got '{kind}'.")
    plots.require("Pictures need")
    gallery.make_folder(out)
    drawn: dict[str, Path] = {}

    def file(name: str) -> Path:
        return out / f"{name}.{kind}"

    try:
        drawn["kernels"] = gallery.save(gallery.kernels(model), file("kernels"))
    except UserError as error:
        if run is None and data is None:
            raise
        command.tell_notes([f"no kernels: {error}"])
    if run is not None:
        try:
            figure = gallery.curves(read_records(run / METRICS), title=f"{run.name} ({model.name})")
            drawn["curves"] = gallery.save(figure, file("curves"))
        except UserError as error:
            command.tell_notes([f"no curves: {error}"])
    if data is not None:
        try:
            path = _mistakes(model, data, file("mistakes"), most=most)
        except UserError as error:
            there = ", ".join(map(str, drawn.values())) or "nothing"
            raise UserError(f"{error}\nDrawn so far: {there}. The mistakes need the held-out photographs: name them "
                            "with data.val=..., or leave mistakes out (--mistakes 0).") from None
        drawn.update({"mistakes": path} if path is not None else {})
    return drawn


def _check_most(most: int) -> None:
    if not 0 <= most <= MOST:
        raise UserError(f"--mistakes must be between 0 and {MOST}, got {most}.")


def _mistakes(model: Model, data: str, file: Path, *, most: int) -> Path | None:
    """Draws and lists the worst mistakes on `data`; None where there are none. Raises UserError."""
    with open_source(data, model) as source:
        command.tell_notes(source.notes)
        outcomes = evaluate_model(model, source)
        told = outcomes.evaluation
        worst = gallery.worst_mistakes(model, source, outcomes, most=most)
        right = f"{told.top1:.2%} of {told.samples:,} held-out images right"
        if told.damaged:
            right += f" ({told.damaged:,} damaged)"
        print(f"{data}: {right}")
        if not worst:
            command.tell_notes(["no mistakes shown: there are none"])
            return None
        title = f"{model.name}: the {len(worst)} mistakes of highest loss; {right}"
        gallery.save(gallery.mistakes(model, source, worst, title=title), file)
    rows = [["image", "class", "taken for", "probability", "loss"]]
    rows += [[one.name, one.true, one.predicted, f"{one.probability:.1%}", f"{one.loss:.2f}"] for one in worst[:LISTED]]
    print("\n" + tables.markdown(rows, left=3) + "\n")
    return file


def main(words: list[str]) -> int:
    """Runs the command. Raises UserError."""
    parser = command.parser("visualize", "Pictures of a run: the first layer's kernels (figure 3 of the 2012 paper), "
                            "training curves, and the held-out images that it is most mistaken about. Of a MODEL that "
                            "is no run the kernels, and with data.val=... the mistakes.")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: RUN/{FOLDER}")
    parser.add_argument("--format", choices=KINDS, default="png")
    parser.add_argument("--mistakes", type=int, default=20, metavar="N", help="so many of them (default: 20; 0: none)")
    options = parser.parse_intermixed_args(words)
    _check_most(options.mistakes)
    source = find(options.model)
    run = {"best": source.path, "checkpoint": source.path.parent.parent}.get(source.kind)
    if run is not None and not (run / METRICS).is_file():
        run = None  # a checkpoint by itself
    out = options.out or (run / FOLDER if run is not None else None)
    if out is None:
        raise UserError(f"{options.model} is no run directory: say with --out DIR where its pictures are to go. Its "
                        "kernels can be drawn; training curves are a run's.")
    plots.require("Pictures need")
    with command.group(options.device) as world:
        if world.size > 1:
            raise UserError("visualize works alone: start it without torchrun.")
        model = load_model(options.model, options.overrides, device=world.device)
        command.tell_notes(model.notes)
        if run is None:
            command.tell_notes([f"{options.model} is no run: no training curves"])
        data = model.config.data.val if options.mistakes else None
        if options.mistakes and (data is None or data == NOWHERE):
            data = None
            command.tell_notes(["no mistakes shown: no held-out photographs are known; name them with data.val=..."])
        drawn = visualize(model, run, out=out, kind=options.format, most=options.mistakes,
                          data=data)
    print("\n".join(f"{name:<9} {path}" for name, path in drawn.items()))
    return EXIT_FINISHED
