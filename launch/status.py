"""`alexnet-ddp status`: where every run stands, from its directory and, where there is one, from Slurm's queue.

    launch.facts       run directory + queue -> Facts
    launch.standing    Facts -> Row                        pure
    table              rows -> text of 100 columns         pure
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from alexnet_ddp.errors import EXIT_FINISHED
from alexnet_ddp.words import Parser
from launch.facts import Cluster, find, gather
from launch.standing import Row, judge, span

WIDTH = 100  # columns of the table
EVERY = 2.0  # seconds between two looks of --watch


# --- printing: pure ---------------------------------------------------------------------------------------------

HEADINGS = ("RUN", "STATE", "STEP", "DONE", "EPOCH", "IMG/S", "LEFT", "SAVED", "TRY", "EXACT", "JOB")
LEFT_ALIGNED = (0, 1, 10)
DECISIONS = {"requeue": "requeued", "stop": "not requeued", "slurm": "left to Slurm"}


def cells(row: Row) -> tuple[str, ...]:
    """A row's cells, as HEADINGS has them; SAVED is the newest checkpoint's age."""
    def of(part: int | None, whole: int | None) -> str:
        return "-" if part is None else f"{part}/{whole}" if whole is not None else str(part)

    done = f"{100 * row.step // row.total_steps}%" if row.step is not None and row.total_steps else "-"
    return (row.name, row.state, of(row.step, row.total_steps), done, of(row.epoch, row.epochs),
            "-" if row.images_per_second is None else f"{row.images_per_second:.0f}",
            "-" if row.seconds_left is None else span(row.seconds_left),
            "-" if row.checkpoint_age is None else span(row.checkpoint_age),
            "-" if row.attempt is None else str(row.attempt),
            {True: "yes", False: "no", None: "-"}[row.exact], row.job or "-")


def notes(row: Row) -> list[str]:
    """What a row's cells have no room for."""
    lines = [row.why] if row.why else []
    if row.why_not_exact:
        lines.append(f"not exact: {row.why_not_exact}")
    if row.damaged:
        lines.append(f"damaged images left out: {row.damaged:,}, listed in {row.run_dir}/damaged.jsonl")
    if row.state not in ("running", "saving", "finished") and row.checkpoint_step not in (None, row.step):
        lines.append(f"the newest checkpoint is that of step {row.checkpoint_step}")
    times = {0: "", 1: "restarted once"}.get(row.restarts or 0, f"restarted {row.restarts} times")
    lines += [", ".join(filter(None, [times, f"on {row.nodes}" if row.nodes else ""]))] if times or row.nodes else []
    if row.requeue and row.state != "finished":
        cause, decision = row.requeue["cause"], row.requeue["decision"]
        reason = row.requeue["reason"].removeprefix(cause).lstrip(";, ")  # it mostly begins with the cause
        lines.append(f"last end: {cause}; {DECISIONS.get(decision, decision)}: {reason}")
    return lines


def layout(lines: Sequence[Sequence[str]], *, width: int) -> tuple[list[int], str]:
    """Widths of the columns and the gap between them, so that all fits `width`: names and jobs give way."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= width else " "
    for column, least in ((0, 12), (-1, 9), (2, 8)):
        over = sum(widths) + len(gap) * (len(widths) - 1) - width
        widths[column] = min(widths[column], max(least, widths[column] - max(0, over)))
    return widths, gap


def draw(line: Sequence[str], widths: Sequence[int], gap: str) -> str:
    fitted = [_cut(cell, room).ljust(room) if column in LEFT_ALIGNED else _cut(cell, room).rjust(room)
              for column, (cell, room) in enumerate(zip(line, widths, strict=True))]
    return gap.join(fitted).rstrip()


def table(rows: Sequence[Row], *, width: int = WIDTH, only: Sequence[Row] | None = None) -> str:
    """Rows as a table of at most `width` columns, what else is to be said beneath each of them.

    With `only`, without the heading and only those of the rows, in the columns of all.
    """
    widths, gap = layout([HEADINGS, *map(cells, rows)], width=width)
    lines = [draw(HEADINGS, widths, gap)] if only is None else []
    for row in rows if only is None else only:
        lines.append(draw(cells(row), widths, gap)[:width])
        for note in notes(row):
            printable = "".join(letter if letter.isprintable() else "?" for letter in note)
            lines += textwrap.wrap(printable, width, initial_indent="    ", subsequent_indent="      ")
    return "\n".join(lines)


def _cut(text: str, room: int) -> str:
    """`text` in at most `room` printable characters, cut in the middle: the ends tell names from each other."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(text) <= room:
        return text
    head = (room - 2) // 2
    return f"{text[:head]}..{text[len(text) - (room - 2 - head):]}"


# --- the command ------------------------------------------------------------------------------------------------


def watch(names: Sequence[str], *, runs: Path) -> NoReturn:
    """Prints until it is interrupted: a terminal is drawn anew, elsewhere the rows that have changed are printed."""
    cluster, live, before = Cluster(), sys.stdout.isatty(), dict[str, Row]()
    named = find(names, runs=runs) if names else None  # --fresh may move one away meanwhile
    while True:
        rows = [judge(facts) for facts in gather(named or find([], runs=runs), cluster)]
        if live:
            shown = table(rows) if rows else f"No runs in {runs} yet."
            print(f"\x1b[H\x1b[J{time.strftime('%H:%M:%S')}, every {EVERY:g} s; Ctrl-C leaves\n{shown}", flush=True)
        else:
            changed = [row for row in rows if settled(row) != before.get(row.run_dir)]
            if changed:
                print(table(rows, only=changed if before else None), flush=True)
            before = {row.run_dir: settled(row) for row in rows}
        time.sleep(EVERY)


def settled(row: Row) -> Row:
    """A row without what changes by the mere passing of time."""
    return dataclasses.replace(row, checkpoint_age=None, seconds_left=None)


def main(words: list[str]) -> int:
    """Prints the runs asked for. Raises UserError."""
    parser = Parser(prog="alexnet-ddp status", description="Where runs stand: state, progress, speed, job, checkpoint.")
    parser.add_argument("names", metavar="RUN", nargs="*", help="a run's name or directory (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run directories (default: runs)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="look again every two seconds, until Ctrl-C")
    how.add_argument("--json", action="store_true", help="a list of objects; docs/slurm.md has their keys")
    options = parser.parse_args(words)
    try:
        if options.watch:
            watch(options.names, runs=options.runs)
        rows = [judge(facts) for facts in gather(find(options.names, runs=options.runs), Cluster())]
        if options.json:
            print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        else:
            print(table(rows) if rows else f"No runs in {options.runs} yet.")
        sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # the reader has seen enough: nothing may be left for the interpreter to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FINISHED
