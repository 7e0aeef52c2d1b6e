"""The benchmarks work: they count right, their ratios are per round, nothing of NVIDIA's is written, they run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import harness
import photographs
from alexnet_ddp.data.index import open_index
from alexnet_ddp.errors import UserError
from benchmarks import gpu_input, limit, pipeline, trial
from benchmarks.trial import Case, Data


def test_trial_counts_between_two_arrivals() -> None:
    """A trial drops the ramp, counts whole batches between two arrivals, and takes CPU seconds of the same time."""
    def batches() -> Iterator[int]:
        while True:
            time.sleep(0.01)
            yield 7

    found = trial.measure(batches(), seconds=0.1, ramp=0.03)
    assert found["images"] % 7 == 0 and found["seconds"] >= 0.1 and 0 <= found["cpu"] < found["seconds"]
    assert found["images"] / found["seconds"] <= 7 / 0.01


def test_cpu_of_child_processes_is_counted() -> None:
    """CPU seconds are those of the whole tree: a child that spins shows, while it lives."""
    before = trial.cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.monotonic() + 30
        while trial.cpu_seconds() - before < 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[pipeline.Bench]:
    """Two pipelines and the limit, with three rounds in which the machine slowed down to half."""
    options = pipeline.parser().parse_args(["--images", "nowhere", "--quick"])
    made = pipeline.Bench(options, tmp_path, {"original": Data("original", "", "", "", 1)})
    for name, family, nvidia, rates in (("C limit sroi2_r", "limit", False, [2000, 1500, 1000]),
                                        ("ours fast", "ours", False, [1800, 1200, 900]),
                                        ("theirs", "DALI", True, [1000, 750, 500])):
        made.cases.append((Case(name, family, ("original",), "fast", "any", nvidia=nvidia), "original"))
        made.trials["original", name] = [{"rate": float(rate), "cpu_ms": 1.0} for rate in rates]
    yield made
    made.close()


def test_ratios_are_of_the_same_round(bench: pipeline.Bench) -> None:
    """A ratio is the median over rounds of rate / limit's rate, which a machine that slows down leaves alone."""
    rows = {row["case"]: row for row in bench.rows()}
    assert rows["ours fast"]["ratio"] == 0.9 and rows["ours fast"]["ratio_range"] == [0.8, 0.9]
    assert rows["ours fast"]["rate"] == 1200 and rows["theirs"]["ratio"] == 0.5
    page = pipeline.page(list(rows.values()), {"ffcv": "not installed: ffcv"})
    assert "0.90   0.80-0.90" in page and "skipped: ffcv: not installed" in page


def test_figures_of_nvidia_are_never_written(bench: pipeline.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """With --with-nvidia the figures are printed; the JSON holds none of them, and names no such row."""
    monkeypatch.setattr(bench, "collect", lambda: None)
    monkeypatch.setattr(bench, "round", lambda **_: None)
    bench.versions = {"nvidia-dali-cuda130": "1", "torch": "2"}
    options = argparse.Namespace(**{**vars(bench.options), "json": tmp_path / "r.json", "with_nvidia": True})
    assert pipeline._run(bench, options) == 0
    assert "theirs" in capsys.readouterr().out
    text = options.json.read_text()
    assert [row["case"] for row in json.loads(text)["rows"]] == ["C limit sroi2_r", "ours fast"]
    assert "theirs" not in text and "nvidia" not in text


def test_chart(bench: pipeline.Bench, tmp_path: Path) -> None:
    """The chart is an SVG that names the rows it is given."""
    pytest.importorskip("matplotlib", reason="the extra `plots` isn't installed: no chart was drawn")
    pipeline.chart([row for row in bench.rows() if not row["nvidia"]], tmp_path / "c.svg", title="a machine")
    text = (tmp_path / "c.svg").read_text()
    assert text.startswith("<?xml") and "ours fast" in text and "theirs" not in text


def test_pipelines_run_in_processes_of_their_own(tmp_path: Path) -> None:
    """A module is asked for its cases and trials over its process; one that is missing says so, and ends no run."""
    options = pipeline.parser().parse_args(["--images", "nowhere", "--quick", "--peers", "ffcv", "--sets", "raw256",
                                            "--threads", "1", "--batch", "16"])
    made = pipeline.Bench(options, tmp_path, {"raw256": Data("raw256", "", "", "", 20)})
    try:
        for module in ("benchmarks.roof", "benchmarks.peers.ffcv_that_is_missing"):
            made._collect_from(module)
        made.round(seconds=0.05, seed=1, keep=True)
        rows = made.rows()
    finally:
        made.close()
    assert {row["case"] for row in rows} == {"memcpy of strips", "memcpy of whole records"}
    assert all(row["rate"] > 0 and row["ratio"] > 0 for row in rows)
    assert made.skipped["ffcv_that_is_missing"].startswith("not installed")


def test_limit_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C program builds and decodes photographs; without a compiler the message says what to install."""
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        with pytest.raises(limit.NoLimit, match="apt-get install gcc"):
            limit.build(tmp_path)
    where = f"{photographs.archive('imagenet-sample.tar')}::train"
    try:
        program = limit.build(tmp_path)
    except limit.NoLimit as reason:
        pytest.skip(str(reason))
    files = []
    with open_index(where, cache_dir=tmp_path) as index:
        for sample in range(0, 700, 100):
            files.append(tmp_path / f"{sample}.jpg")
            files[-1].write_bytes(index.read(sample))
    (tmp_path / "list").write_text("\n".join(map(str, files)) + "\n")
    found = limit.run(program, tmp_path / "list", mode="sroi2_r", seconds=0.05, threads=1)
    assert found["images"] >= 1 and found["cpu"] > 0


def test_gpu_benchmark_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one command for a GPU runs through on a CPU: three sources a batch size, ratios to synthetic, JSON."""
    torch.set_num_threads(1)
    assert gpu_input.run(["--device", "cpu", "--quick", "--json", str(tmp_path / "g.json")]) == 0
    rows = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert [(row["batch"], row["source"]) for row in rows] == [(batch, source) for batch in (4, 8)
                                                               for source in ("synthetic", "ram", "gpu")]
    assert all(row["rate"] > 0 for row in rows) and all(row["kept"] == 1.0 for row in rows if row["source"] == "gpu")
    assert [row["ratio"] for row in rows if row["source"] == "synthetic"] == [1.0, 1.0]


def test_gpu_benchmark_refuses_a_pack_of_another_size(tmp_path: Path) -> None:
    """--images that holds no raw records of the wanted size is refused with what it holds."""
    pictures = harness.make_images(tmp_path / "train", samples=24)
    with pytest.raises(UserError, match="must be a pack of raw73 for --size 64, .* holds original"):
        gpu_input.run(["--device", "cpu", "--quick", "--images", str(pictures)])
