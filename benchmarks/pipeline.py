"""Input pipelines against the physical limit, interleaved in one run: the C limit, ours, every installed peer.

    python -m benchmarks.pipeline --images /data/sample.tar::train --json result.json --chart result.svg

Trials are round-robin over all cases in shuffled order, one unrecorded warm-up round first, then --rounds rounds. A
case's rate is the median over rounds; its ratio R is the median of its rates over the limit's (the C program's mode
sroi2_r, the same images and threads) of the same round; "R CPU" is the same of CPU time an image, which other work on
the machine moves less. See benchmarks.trial for what one trial counts.

Every pipeline makes batches of 128 uint8 images of 224 x 224 by RandomResizedCrop unless its row says otherwise; flips
are left to the device everywhere but in the float baseline, whose recipe flips on the host. The files are locked in the
page cache after the warm-up: nothing here measures storage. Peers that are missing are skipped with a line; they may
live in another environment (--peer-python; benchmarks/peers/requirements.txt), which needs torch and torchvision too.

nvImageCodec and DALI come under terms of NVIDIA's that forbid telling others benchmark figures of that software without
its written permission (nvidia-nvimgcodec-cu13 0.9.0: LICENSE.txt, 2.11; nvidia-dali-cuda130: see peers/dali.py). So
they are off by default (--with-nvidia), and even then their figures are printed here and written nowhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alexnet_ddp.errors import EXIT_FAILED, EXIT_FINISHED, UserError
from alexnet_ddp.words import Parser, answer
from benchmarks import limit, locked, sets
from benchmarks.trial import QUICK_RAMP, RAMP, Case, Data, Options

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("torchvision_folder", "torchvision_v2", "tfdata", "ffcv", "dali", "webdataset", "streaming", "litdata", "spdl")
REFERENCE = "C limit sroi2_r"
ROOFS = {"original": REFERENCE, "r256": REFERENCE, "raw256": "memcpy of strips"}


class Absent(Exception):
    """A pipeline that can't take part; says why."""


class Process:
    """benchmarks.trial with one module, kept for the whole run."""

    def __init__(self, python: str, module: str, *, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self._errors = log, log.open("wb")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2",
                       "OMP_WAIT_POLICY": "PASSIVE"}  # as `alexnet-ddp train` sets it; no peer is slower for it
        self._process = subprocess.Popen([python, "-m", "benchmarks.trial", module], cwd=ROOT, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                                         env=environment)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Raises Absent with the error that it answers, or that it died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Absent(f"its process ended ({self._process.wait()}); see {self.log}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Absent(f"{found['error']} (see {self.log})")
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


class Bench:
    """The cases that take part, and their trials."""

    def __init__(self, options: argparse.Namespace, work: Path, data: dict[str, Data]) -> None:
        self.options, self.data = options, data
        self.trial_options = Options(options.threads, options.batch, str(work))
        self.cases: list[tuple[Case, str]] = []  # with the set
        self.skipped: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.trials: dict[tuple[str, str], list[dict[str, float]]] = {}
        self._work = work
        self._files = locked.Files()
        self._of: dict[str, Process] = {}
        self._all: list[Process] = []
        self._program: Path | None = None

    def collect(self) -> None:
        """Builds the limit and asks every pipeline for its cases."""
        try:
            self._program = limit.build(self._work / "limit")
            self._add([Case(f"C limit {mode}", "limit", ("original", "r256"),
                            "antialias" if mode.endswith("_r") else "none", "libjpeg-turbo in C")
                       for mode in dict.fromkeys(["sroi2_r", *self.options.limit_modes])], always=True)
        except limit.NoLimit as error:
            self.skipped["C limit"] = f"{error}; there are no ratios to R without it"
        for module in ("benchmarks.ours", "benchmarks.roof",
                       *(f"benchmarks.peers.{name}" for name in self.options.peers)):
            self._collect_from(module)
        if unknown := [word for word in self.options.cases if not any(word in case.name for case, _ in self.cases)]:
            raise UserError(f"--cases: none has '{unknown[0]}' in its name. There are: "
                            + "; ".join(sorted({case.name for case, _ in self.cases})) + ".")

    def _collect_from(self, module: str) -> None:
        name = module.rpartition(".")[2]
        if name == "dali" and not self.options.with_nvidia:
            self.skipped[name] = "its terms forbid publishing figures: --with-nvidia runs it and prints them only here"
            return
        python = self.options.peer_python if ".peers." in module else sys.executable
        process = Process(python, module, log=self._work / "logs" / f"{name}.log")
        self._all.append(process)
        try:
            found = process.ask(do="cases")
        except Absent as error:
            self.skipped[name] = self._missing(process.log) or str(error)
            return
        if found["absent"]:
            self.skipped[name] = f"not installed: {', '.join(found['absent'])}"
            return
        self.versions |= found["versions"]
        cases = [Case(**{**case, "sets": tuple(case["sets"])}) for case in found["cases"]]
        self._of |= {case.name: process for case in cases}
        self._add([case for case in cases if self.options.with_nvidia or not case.nvidia], always=name == "roof")

    @staticmethod
    def _missing(log: Path) -> str:
        """`not installed: x`, where that is why a module could not be imported."""
        lines = [line for line in log.read_text(errors="replace").splitlines() if "ModuleNotFoundError" in line]
        return f"not installed: {lines[-1].rpartition(' ')[2]}" if lines else ""

    def _add(self, cases: list[Case], *, always: bool = False) -> None:
        for case in cases:
            if always or not self.options.cases or any(word in case.name for word in self.options.cases):
                self.cases += [(case, name) for name in case.sets if name in self.data]

    def round(self, *, seconds: float, seed: int, keep: bool) -> None:
        """One trial of every case, in an order of its own. What fails takes no further part."""
        order = random.Random(seed).sample(self.cases, len(self.cases))
        for number, (case, name) in enumerate(order, 1):
            print(f"\r{'round ' + str(seed) if keep else 'warm-up'}: {number}/{len(order)} {name} {case.name:60.60}",
                  end="", file=sys.stderr, flush=True)
            try:
                found = self._trial(case, name, seconds)
            except (Absent, limit.NoLimit) as error:
                self.skipped[f"{name} {case.name}"] = str(error)
                self.cases.remove((case, name))
                self.trials.pop((name, case.name), None)
                continue
            if keep:
                self.trials.setdefault((name, case.name), []).append(
                    {"rate": found["images"] / found["seconds"], "cpu_ms": found["cpu"] / found["images"] * 1000})
        print("\r" + " " * 90 + "\r", end="", file=sys.stderr)

    def _trial(self, case: Case, name: str, seconds: float) -> dict[str, float]:
        if case.name.startswith("C limit"):
            assert self._program is not None
            return limit.run(self._program, self._work / name / "unique.txt", mode=case.name.rpartition(" ")[2],
                             seconds=seconds, threads=self.options.threads)
        return self._of[case.name].ask(do="trial", case=asdict(case), data=asdict(self.data[name]),
                                       options=asdict(self.trial_options), seconds=seconds,
                                       ramp=QUICK_RAMP if self.options.quick else RAMP)

    def lock(self) -> str:
        """Keeps the sets, converted ones too, and the pipelines' programs in memory; says what went wrong, or ""."""
        wrong = self._files.lock(self._work)
        for process in {self._of[case.name] for case, _ in self.cases if case.name in self._of}:
            with contextlib.suppress(Absent):  # its next trial says so
                wrong = wrong or process.ask(do="lock")["wrong"]
        return wrong

    def rows(self) -> list[dict[str, Any]]:
        """The result, a row a case and set, quickest first within a set."""
        found = []
        for case, name in self.cases:
            trials = self.trials[name, case.name]
            rates = [trial["rate"] for trial in trials]
            roof = self.trials.get((name, ROOFS[name]))
            ratios = [rate / other["rate"] for rate, other in zip(rates, roof, strict=True)] if roof else []
            costs = [other["cpu_ms"] / trial["cpu_ms"] for trial, other in zip(trials, roof, strict=True)
                     if trial["cpu_ms"]] if roof else []
            found.append({
                "set": name, "case": case.name, "family": case.family, "resize": case.resize, "decoder": case.decoder,
                "output": case.output, "stored": case.stored, "nvidia": case.nvidia, "rate": statistics.median(rates),
                "ratio": statistics.median(ratios) if ratios else None,
                "ratio_range": [min(ratios), max(ratios)] if ratios else None,
                "cpu_ratio": statistics.median(costs) if costs else None,
                "cpu_ms": statistics.median(trial["cpu_ms"] for trial in trials), "rates": rates})
        return sorted(found, key=lambda row: (list(self.data).index(row["set"]), -row["rate"]))

    def close(self) -> None:
        for process in self._all:
            process.close()
        self._files.close()


def page(rows: list[dict[str, Any]], skipped: dict[str, str]) -> str:
    """The result as text."""
    lines = []
    for name in dict.fromkeys(row["set"] for row in rows):
        lines += ["", f"{name}  (R: {ROOFS[name]})",
                  f"  {'img/s':>8} {'R':>6} {'min-max':>11} {'CPU ms':>7} {'R CPU':>6}  pipeline"]
        for row in rows:
            if row["set"] == name:
                cost = f"{row['cpu_ratio']:6.2f}" if row["cpu_ratio"] is not None else "     -"
                ratio = f"{row['ratio']:6.2f}" if row["ratio"] is not None else "     -"
                low_high = "{:.2f}-{:.2f}".format(*row["ratio_range"]) if row["ratio_range"] else "-"
                told = [row["case"], f"resize {row['resize']}", row["decoder"]]
                told += [row["output"]] * (row["output"] != "uint8") + [row["stored"]] * (row["stored"] != "as given")
                lines.append(f"  {row['rate']:8,.0f} {ratio} {low_high:>11} {row['cpu_ms']:7.3f} {cost}  "
                             + "; ".join(told))
    lines += [""] + [f"skipped: {what}: {why}" for what, why in skipped.items()]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0],
            "python": platform.python_version(), "system": platform.platform(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}


def chart(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Bars of the ratios to R, a panel a set. Raises UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--chart needs matplotlib: pip install 'alexnet-ddp[plots]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "alexnet-ddp", "svg.fonttype": "none"})  # text stays text
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["set"] for row in rows))
    groups = [[row for row in rows if row["set"] == name][::-1] for name in names]
    figure, axes = pyplot.subplots(len(names), 1, squeeze=False, layout="constrained",
                                   figsize=(11, 1.2 + 0.27 * sum(map(len, groups)) + 0.7 * len(names)),
                                   height_ratios=[len(group) + 2 for group in groups])
    for axis, name, group in zip(axes[:, 0], names, groups, strict=True):
        relative = all(row["ratio"] is not None for row in group)
        values = [row["ratio"] if relative else row["rate"] for row in group]
        colours = [{"limit": "0.45", "ours": "tab:blue"}.get(row["family"], "tab:orange") for row in group]
        spread = [[max(0.0, value - row["ratio_range"][0]) for value, row in zip(values, group, strict=True)],
                  [max(0.0, row["ratio_range"][1] - value) for value, row in zip(values, group, strict=True)]
                  ] if relative else None
        bars = axis.barh([f"{row['case']} ({row['resize']}{', ' + row['output'] if row['output'] != 'uint8' else ''})"
                          for row in group], values, color=colours, xerr=spread, error_kw={"lw": 0.8, "ecolor": "0.2"})
        axis.bar_label(bars, labels=[f" {row['rate']:,.0f}/s" for row in group], padding=4, fontsize=7)
        axis.tick_params(labelsize=7)
        axis.set_title(f"{name}: ratio to {ROOFS[name]}" if relative else f"{name}: images a second", fontsize=9)
        axis.margins(x=0.12, y=0.5 / len(group))
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.pipeline", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, metavar="WHERE", help="photographs: FOLDER, FILE.tar or "
                        "FILE.tar::sub/path, with a folder a class")
    parser.add_argument("--work", type=Path, help="keep the prepared sets here (default: a folder that is removed)")
    parser.add_argument("--sets", nargs="+", choices=list(sets.STAGES), default=list(sets.STAGES))
    parser.add_argument("--cases", nargs="+", default=[], metavar="WORD", help="only cases with one of these in their "
                        "name; the limit runs always")
    parser.add_argument("--limit-modes", nargs="*", default=[], metavar="MODE", help="more modes of the C program: "
                        "huff full roi sroi2 full_r ...")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads or worker processes")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one trial, after a second of ramp")
    parser.add_argument("--repeat", type=int, default=6, help="how often a set holds each image (longer epochs)")
    parser.add_argument("--limit", type=int, help="use only so many of the images")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), metavar="NAME",
                        help=f"which to run, none for none (default: all: {' '.join(PEERS)})")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="the Python that has the peers")
    parser.add_argument("--with-nvidia", action="store_true", help="run NVIDIA's software too; never written down")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path, help="FILE.svg or .png (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="one round of 0.5 s, 64 images: does it work?")
    parser.add_argument("--list", action="store_true", help="list the cases and leave")
    return parser


def run(words: list[str]) -> int:
    options = parser().parse_args(words)
    if options.quick:
        options.rounds, options.seconds = 1, 0.5
        options.limit, options.repeat = options.limit or 64, min(options.repeat, 4)
    for name in ("threads", "batch", "rounds", "repeat"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be 1 or more, got {getattr(options, name)}.")
    with tempfile.TemporaryDirectory(prefix="alexnet-bench-") as scratch:
        work = (options.work or Path(scratch)).resolve()
        data = sets.prepare(options.images, work, names=options.sets, repeat=options.repeat, limit=options.limit,
                            threads=options.threads)
        bench = Bench(options, work, data)
        try:
            return _run(bench, options)
        finally:
            bench.close()


def _run(bench: Bench, options: argparse.Namespace) -> int:
    bench.collect()
    if options.list:
        print("\n".join(f"{name:9} {case.name}" for case, name in bench.cases))
        return EXIT_FINISHED
    where, began = machine(), time.monotonic()
    bench.round(seconds=0.3, seed=0, keep=False)
    unlocked = bench.lock()
    for number in range(1, options.rounds + 1):
        bench.round(seconds=options.seconds, seed=number, keep=True)
    rows = bench.rows()
    print(page(rows, bench.skipped))
    if unlocked:
        print(f"not locked in memory, so some of this may be the disk's speed: {unlocked}")
    conditions = {**where, "threads": options.threads, "batch": options.batch, "rounds": options.rounds,
                  "seconds": options.seconds, "images": {name: set_.images for name, set_ in bench.data.items()},
                  "locked": not unlocked, "load_after": os.getloadavg()[0], "took_s": round(time.monotonic() - began)}
    print(f"\n{conditions}")
    public = [row for row in rows if not row["nvidia"]]
    if options.json:
        told = {"conditions": conditions, "versions": {name: version for name, version in bench.versions.items()
                                                       if "nvidia" not in name},
                "rows": [{key: value for key, value in row.items() if key != "nvidia"} for row in public],
                "skipped": bench.skipped}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if options.chart:
        chart(public, options.chart, title=f"{where['cpu']}, {options.threads} threads, medians of {options.rounds}")
    return EXIT_FINISHED if rows else EXIT_FAILED


def main() -> int:
    return answer(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
