"""Pytest's side of the Slurm scenarios: one cluster a session, two lanes of two nodes, and a table of times at the end.

A scenario mostly waits for Slurm, so two run at a time; a test waits for its own and tells how it went. Nothing is
installed or started unless ALEXNET_TEST_SLURM=1 is set; otherwise one loud line says what was not run.
ALEXNET_SLURM_LANES=1 runs one scenario at a time: for measurements.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster import Cluster
from scenarios import Bench, Lane, Scenario, Times, slurms_own_floor, undisturbed

ASKED = os.environ.get("ALEXNET_TEST_SLURM") == "1"
LOUD = "Slurm was NOT tested: ALEXNET_TEST_SLURM=1 allows its packages to be installed and started (make test-slurm)"
LANES = (("n1", "n2"), ("n3", "n4"))


class Campaign:
    """The scenarios of a session, in the order of their tests, as many at a time as there are lanes."""

    def __init__(self, scenarios: list[Scenario], *, folder: Path) -> None:
        self.folder, self.began, self.over = folder, time.monotonic(), False
        self.cluster, self.bench = Cluster(), Bench(folder)
        self.times: dict[str, tuple[Times, float]] = {}
        self._waiting: queue.Queue[Scenario] = queue.Queue()
        self._results: dict[Scenario, Future[Times]] = {}
        for scenario in [undisturbed, slurms_own_floor, *scenarios]:
            self._results[scenario] = Future()
            self._waiting.put(scenario)

    def __enter__(self) -> Campaign:
        self.cluster.up()
        lanes = LANES[:int(os.environ.get("ALEXNET_SLURM_LANES", len(LANES)))]
        self._threads = [threading.Thread(target=self._work, args=(Lane(self.cluster, self.bench, nodes),), daemon=True)
                         for nodes in lanes]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.cluster.down()
        for thread in self._threads:
            thread.join(30)

    def _work(self, lane: Lane) -> None:
        while not self.over and not self._waiting.empty():
            try:
                scenario = self._waiting.get_nowait()
            except queue.Empty:  # the other lane was quicker
                return
            began = time.monotonic()
            try:
                times = scenario(lane)
            except BaseException as error:  # it is the test's to raise
                self._results[scenario].set_exception(error)
                if scenario is undisturbed:
                    self.bench.undisturbed.set_exception(error)
                with contextlib.suppress(AssertionError):  # it did what it could
                    if not self.over:
                        lane.clear()
            else:
                self.times[scenario.__name__] = (times, time.monotonic() - began)
                self._results[scenario].set_result(times)

    def result(self, scenario: Scenario) -> Times:
        """Waits for a scenario; raises what it raised."""
        return self._results[scenario].result()

    def report(self) -> list[str]:
        """The measured times as a Markdown table, which is also written beside the runs, with a JSON twin."""
        lines = ["| what happened | requeued | pending | running again | first new step | scenario in all |",
                 "|---|---|---|---|---|---|"]
        for name, (times, seconds) in self.times.items():
            cells = [f"{value:.1f}" if value is not None else "-" for value in asdict(times).values()]
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} | {seconds:.0f} |")
        (self.folder / "times.md").write_text("\n".join(lines) + "\n")
        (self.folder / "times.json").write_text(json.dumps(
            {name: {**asdict(times), "seconds": seconds} for name, (times, seconds) in self.times.items()}, indent=1))
        return lines


_told: list[str] = []


@pytest.fixture(scope="session")
def campaign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    if not ASKED:
        pytest.skip(LOUD)
    chosen = [item.callspec.params["scenario"] for item in request.session.items
              if "campaign" in getattr(item, "fixturenames", ())]
    with Campaign(list(dict.fromkeys(chosen)), folder=tmp_path_factory.mktemp("slurm")) as running:
        yield running
        _told[:] = [f"Slurm, seconds from the disturbance on (also in {running.folder}/times.md):", *running.report(),
                    f"{time.monotonic() - running.began:.0f} s in all"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = any(LOUD in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    for line in _told or ([LOUD] if skipped else []):
        terminalreporter.write_line(line, red=not _told, bold=not _told)
