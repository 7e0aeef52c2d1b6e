"""What runs have reached, side by side: `alexnet-ddp report RUN ...`, and the end of `train CONFIG seed=0..4`.

Runs whose recipes differ in nothing but the seed (and fields that are free, as docs/fields.md has it) are a group: mean
and standard deviation over its finished runs, by n - 1. Read from metrics.jsonl, state.json and config.yaml; imports no
torch.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alexnet_ddp import config as recipes
from alexnet_ddp import dialect, tables
from alexnet_ddp.changes import flatten
from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.runfiles import METRICS, read_identities, read_state
from alexnet_ddp.sinks import read_records, say
from alexnet_ddp.words import Parser

MEASURES = ("top1", "top5", "loss")
IDENTITY = "identity of data."  # of an experiment's fields: a fingerprint of the samples, by `train` and `val`
MEASURED = ("evaluate.crop", "evaluate.crops")  # free on resume, but what is measured hangs on them


@dataclass(frozen=True)
class Result:
    """What one run has reached. `best` and `last` are its best and its last evaluation, by metrics.jsonl's names."""

    run_dir: str
    name: str
    seed: int
    status: str  # as state.json tells it, "new" where there is none
    step: int | None
    total_steps: int | None
    best: dict[str, Any] | None
    last: dict[str, Any] | None
    experiment: dict[str, Any]  # what a group has in common, by dotted name

    @property
    def finished(self) -> bool:
        return self.status == "finished"


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (by n - 1; None for one run) of a metric over the finished runs of a group."""

    n: int
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds. `best` and `last`: metric -> its spread."""

    runs: list[Result]
    differs: dict[str, Any]  # the fields in which the groups differ, with this one's values
    best: dict[str, Spread] = field(default_factory=dict)
    last: dict[str, Spread] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read(run_dir: Path) -> Result:
    """A run's result. Raises UserError for a directory that isn't a run's, or whose recipe can't be read."""
    path = run_dir / "config.yaml"
    try:
        recipe = recipes.stored(dialect.read_yaml(path, what="recipe of the run"))
    except (ValidationError, AttributeError, TypeError) as error:
        said = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, said['loc']))}: {said['msg']}" if said else str(error)
        raise UserError(f"{path} is no recipe of this program ({why}). Bring back the file: the run's checkpoints hold "
                        "it in manifest.json.") from None
    state = read_state(run_dir)
    evaluations = [record for record in read_records(run_dir / METRICS) if record["kind"] == "evaluate"
                   and isinstance(record.get("top1"), int | float)]
    flat = flatten(recipe.model_dump(mode="json"))
    chosen = {path for path, info in recipes.fields() if info.json_schema_extra["resume"] != "free"} | set(MEASURED)
    experiment = {path: flat[path] for path in flat if path in chosen and path != "seed"}
    return Result(str(run_dir), run_dir.name, recipe.seed, str(state.get("status") or "new"), state.get("step"),
                  state.get("total_steps"), best_of(evaluations), evaluations[-1] if evaluations else None,
                  experiment | _data(run_dir))


def best_of(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first evaluation with the highest top-1, the running mean's where there is one: as the run keeps its best,
    which begins anew where a mean was switched on or off."""
    deciding = "ema_top1" if evaluations and isinstance(evaluations[-1].get("ema_top1"), int | float) else "top1"
    alike = [record for record in evaluations if ("ema_top1" in record) == (deciding == "ema_top1")]
    return max(alike, key=lambda record: record.get(deciding) or 0.0, default=None)


def _data(run_dir: Path) -> dict[str, str]:
    """Fingerprints of what was trained and evaluated on, of a run that has a checkpoint."""
    return {f"{IDENTITY}{key}": value[:12] for key, value in read_identities(run_dir).items()}


def group(results: Sequence[Result]) -> list[Group]:
    """Runs by their experiment, in the order in which they come: recipe and data, since accuracies on other held-out
    images have no mean. A run without a checkpoint doesn't know its data: it belongs to the first of its recipe. Pure.
    """
    alike: list[list[Result]] = []
    for result in results:
        fits = (runs for runs in alike if all(_same_experiment(result.experiment, run.experiment) for run in runs))
        found = next(fits, None)
        if found is None:
            alike.append([result])
        else:
            found.append(result)
    first = [{path: value for run in reversed(runs) for path, value in run.experiment.items()} for runs in alike]
    paths = [path for path in dict.fromkeys(path for one in first for path in one)
             if any(one.get(path) != first[0].get(path) for one in first)]
    return [_group(runs, {path: one.get(path) for path in paths}) for runs, one in zip(alike, first, strict=True)]


def _same_experiment(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all fields are the same, of identities those that both know."""
    return all(one.get(path) == other.get(path) for path in one.keys() | other.keys()
               if not path.startswith(IDENTITY) or (path in one and path in other))


def _group(runs: list[Result], differs: dict[str, Any]) -> Group:
    finished = [run for run in runs if run.finished and run.best is not None and run.last is not None]
    notes = []
    if unfinished := [run for run in runs if not run.finished]:
        notes.append("Not finished, so left out of the mean: " + ", ".join(
            f"{run.name} ({run.status}{_progress(run)})" for run in unfinished) + ".")
    if silent := [run.name for run in runs if run.finished and run.best is None]:
        notes.append(f"Never evaluated (data.val): {', '.join(silent)}.")
    if len(finished) == 1:
        notes.append("One run has no standard deviation: train more seeds (seed=0..4).")
    for seed in dict.fromkeys(run.seed for run in runs):
        if len(same := [run.name for run in runs if run.seed == seed]) > 1:
            notes.append(f"Of the same seed, {seed}, so not independent: {', '.join(same)}.")
    return Group(runs, differs, _spreads([run.best for run in finished]), _spreads([run.last for run in finished]),
                 notes)


def _progress(run: Result) -> str:
    return "" if run.step is None or not run.total_steps else f", step {run.step} of {run.total_steps}"


def _spreads(evaluations: Sequence[dict[str, Any] | None]) -> dict[str, Spread]:
    """Over the metrics that all of them have; a loss that isn't finite is null in metrics.jsonl."""
    found = {}
    for metric in (*MEASURES, *(f"ema_{metric}" for metric in MEASURES)):
        values = [record.get(metric) for record in evaluations if record is not None]
        numbers = [value for value in values if isinstance(value, int | float)]
        if numbers and len(numbers) == len(values):
            found[metric] = Spread(len(numbers), statistics.fmean(numbers),
                                   statistics.stdev(numbers) if len(numbers) > 1 else None)
    return found


# --- printing: pure ---------------------------------------------------------------------------------------------


def markdown(groups: Sequence[Group]) -> str:
    """A table for each group, in Markdown that reads well as it is."""
    blocks = []
    if len(groups) > 1:
        names = ", ".join(groups[0].differs)
        blocks.append(f"These runs are of {len(groups)} recipes: they differ in more than the seed ({names}).")
    return "\n\n".join([*blocks, *map(_table, groups)])


def _table(one: Group) -> str:
    metrics = [metric for metric in (*MEASURES, *(f"ema_{metric}" for metric in MEASURES))
               if any(run.best and metric in run.best for run in one.runs)] or list(MEASURES)
    heads = {"top1": "top-1 %", "top5": "top-5 %", "loss": "loss"}
    titles = [f"{'EMA ' if metric.startswith('ema_') else ''}{heads[metric.removeprefix('ema_')]}"
              for metric in metrics]
    lines = [["run", "seed", *(f"best {title}" for title in titles), "at step", *(f"last {title}" for title in titles)]]
    for run in one.runs:
        lines.append([run.name if run.finished else f"{run.name} ({run.status})", str(run.seed),
                      *(_cell(metric, (run.best or {}).get(metric)) for metric in metrics),
                      str(run.best["step"]) if run.best else "-",
                      *(_cell(metric, (run.last or {}).get(metric)) for metric in metrics)])
    if n := max((spread.n for spread in one.best.values()), default=0):
        words = "mean ± standard deviation" if n > 1 else "mean"
        lines.append([f"{words}, n = {n}", "", *(_mean(metric, one.best.get(metric)) for metric in metrics), "",
                      *(_mean(metric, one.last.get(metric)) for metric in metrics)])
    told = [", ".join(f"{path}: {value}" for path, value in one.differs.items()) + ":", ""] if one.differs else []
    return "\n".join([*told, tables.markdown(lines), *(["", *one.notes] if one.notes else [])])


def _cell(metric: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.4f}" if metric.endswith("loss") else f"{100 * value:.2f}"


def _mean(metric: str, spread: Spread | None) -> str:
    if spread is None:
        return "-"
    deviation = "" if spread.deviation is None else f" ± {_cell(metric, spread.deviation)}"
    return _cell(metric, spread.mean) + deviation


# --- the command ------------------------------------------------------------------------------------------------


def report(run_dirs: Sequence[Path], *, as_json: bool = False, say: Callable[[str], None] = say) -> str:
    """The table of these runs, or a JSON list of groups. Runs that can't be read (one that hasn't begun, say) are told
    and left out. Raises UserError when none can."""
    found, unread = list[Result](), list[UserError]()
    for run_dir in run_dirs:
        try:
            found.append(read(run_dir))
        except UserError as error:
            unread.append(error)
    if not found:
        raise unread[0]
    for why in unread:
        say(f"left out of the report: {why}")
    groups = group(found)
    return json.dumps([asdict(one) for one in groups], indent=1) if as_json else markdown(groups)


def main(words: list[str]) -> int:
    """Prints the report of the runs asked for. Raises UserError."""
    from alexnet_ddp import seeds

    parser = Parser(prog="alexnet-ddp report", description="Accuracy of runs side by side, with mean and standard "
                    "deviation over the seeds of a recipe, as a Markdown table.")
    parser.add_argument("names", metavar="RUN", nargs="+",
                        help="a run's name or directory; NAME of NAME-seed0 ... stands for all of them")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run directories (default: runs)")
    parser.add_argument("--json", action="store_true", help="a list of groups with their runs, spreads and notes")
    options = parser.parse_args(words)
    found = [run_dir for name in options.names for run_dir in seeds.run_dirs(name, runs=options.runs)]
    if len({run_dir.resolve() for run_dir in found}) < len(found):
        raise UserError(f"A run is named twice: {' '.join(options.names)}. Name each once.")
    tables.tell(report(found, as_json=options.json,
                       say=lambda line: tables.tell(f"alexnet-ddp: {line}", file=sys.stderr)))
    return EXIT_FINISHED
