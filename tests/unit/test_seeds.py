"""Several seeds: which runs they are, which are passed over; and what runs have reached, side by side."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import harness
from alexnet_ddp import cli, results, seeds
from alexnet_ddp import config as recipes
from alexnet_ddp.data.index import open_index
from alexnet_ddp.errors import UserError
from alexnet_ddp.runfiles import replace_state


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"runs": str(tmp_path / "runs"), "data": {"train": "/x", "val": "/y"}}))
    return str(path)


def made(config: recipes.Config, top1: list[float], *, status: str = "finished", **more: Any) -> Path:
    """The directory of a run that was evaluated so often, as far as a report reads it."""
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(recipes.dump(config))
    replace_state(config.run_dir, {"status": status, "step": 10 * len(top1), "total_steps": 30})
    with (config.run_dir / "metrics.jsonl").open("w") as file:
        for number, value in enumerate(top1, 1):
            record = {"kind": "evaluate", "step": 10 * number, "top1": value, "top5": value + 0.1, "loss": 1 - value,
                      **more}
            file.write(json.dumps({"kind": "train", "step": 10 * number, "loss": 1.0}) + "\n")
            file.write(json.dumps(record) + "\n")
    return config.run_dir


def three(recipe: str, *overrides: str) -> list[recipes.Config]:
    return seeds.configs(recipe, overrides, [0, 3, 7])


# --- which runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "rest", "text"), [
    (["a=1", "seed=0..4"], ["a=1"], "0..4"), (["seed=0,3,7", "b=2"], ["b=2"], "0,3,7"),
    (["seed=1", "seed=0..1"], [], "0..1"), (["seed=5"], ["seed=5"], None),
    (["seed=0..4", "seed=5"], ["seed=0..4", "seed=5"], None), ([], [], None),
    (["seeds=0..4"], ["seeds=0..4"], None), (["seed=-1"], ["seed=-1"], None)])
def test_several_seeds_are_told_from_one(words: list[str], rest: list[str], text: str | None) -> None:
    """seed=0..4 and seed=0,3,7 are taken out of the overrides; a single seed, also a wrong one, stays with them."""
    assert seeds.split(words) == (rest, text)


def test_recipes_of_seeds(recipe: str) -> None:
    """Each seed's recipe has the seed and the name NAME-seedN, by the file's name or the one given."""
    assert {one.seed: one.name for one in three(recipe)} == {0: "small-seed0", 3: "small-seed3", 7: "small-seed7"}
    assert three(recipe, "name=x")[1].name == "x-seed3"


def test_finished_runs_are_passed_over(recipe: str) -> None:
    """A run is passed over when it is finished with this recipe; not with more epochs, unfinished, or never begun."""
    config = three(recipe)[0]
    assert not seeds.is_finished(config)
    made(config, [0.5])
    assert seeds.is_finished(config) and seeds.is_finished(recipes.load(recipe, ["name=small-seed0", "log.trace=true"]))
    assert not seeds.is_finished(recipes.load(recipe, ["name=small-seed0", "epochs=100"]))
    replace_state(config.run_dir, {"status": "preempted"})
    assert not seeds.is_finished(config)


@pytest.mark.parametrize(("words", "environment", "says"), [
    (["seed=0..2"], {"RANK": "0"}, "already a rank"), (["seed=0..2"], {"SLURM_STEP_ID": "0"}, "already a rank"),
    (["seed=0..2", "--overfit", "4"], {}, "--overfit is one run"), (["seed=2..0"], {}, "got '2..0'"),
    (["seed=1,1"], {}, "names a seed twice"), (["seed=0..99999999999999999999"], {}, "takes numbers and spans"),
    (["seed=0..9999999999999999999"], {}, "at most 1000 at once")])
def test_refused(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str],
                 environment: dict[str, str], says: str) -> None:
    """Several seeds under torchrun or srun, with --overfit, backwards or twice: refused in words."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", recipe, *words]) == 2
    assert says in capsys.readouterr().err


def test_print_config(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--print-config prints the recipe of each seed, as YAML documents."""
    assert cli.main(["train", recipe, "seed=0..2", "--print-config"]) == 0
    assert [one["seed"] for one in yaml.safe_load_all(capsys.readouterr().out)] == [0, 1, 2]


def test_all_finished_is_a_report(recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
                                  ) -> None:
    """Where all seeds are finished nothing is started, and the same command tells their mean."""
    monkeypatch.setattr(seeds.Queue, "install", lambda self: self)  # the signals stay the tests'
    monkeypatch.setattr(seeds.Queue, "run", lambda self, words: pytest.fail("a run was started"))
    for config in three(recipe):
        made(config, [0.5])
    assert cli.main(["train", recipe, "seed=0,3,7"]) == 0
    told = capsys.readouterr().out
    assert told.count(" is finished\n") == 3 and "mean ± standard deviation, n = 3" in told


# --- results ----------------------------------------------------------------------------------------------------


def test_mean_and_deviation_over_seeds(recipe: str) -> None:
    """Three finished seeds: mean and deviation by n - 1 of best and last evaluation, from hand-made metrics."""
    tops = ([0.2, 0.5, 0.4], [0.3, 0.4, 0.4], [0.1, 0.2, 0.6])
    found, = results.group([results.read(made(config, top)) for config, top in zip(three(recipe), tops, strict=True)])
    assert [run.seed for run in found.runs] == [0, 3, 7] and found.notes == [] and found.differs == {}
    assert [run.best["step"] for run in found.runs if run.best] == [20, 20, 30]  # the first of equals
    best, last = found.best["top1"], found.last["top1"]
    assert (best.n, best.mean, best.deviation) == (3, pytest.approx(0.5), pytest.approx(0.1))
    assert (last.mean, last.deviation) == (pytest.approx(1.4 / 3), pytest.approx(math.sqrt(0.04 / 3)))
    assert found.best["loss"].mean == pytest.approx(0.5) and found.best["top5"].mean == pytest.approx(0.6)
    told = results.markdown([found])
    assert "mean ± standard deviation, n = 3" in told and "50.00 ± 10.00" in told and "46.67 ± 11.55" in told
    lines = told.splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len({len(line) for line in lines}) == 1


def test_unfinished_single_and_silent_runs_are_told(recipe: str) -> None:
    """A run that isn't finished is shown and left out of the mean; one run has no deviation; none has no mean."""
    configs = three(recipe)
    runs = [results.read(made(configs[0], [0.5])), results.read(made(configs[1], [0.7], status="preempted"))]
    found, = results.group(runs)
    assert (found.best["top1"].n, found.best["top1"].deviation) == (1, None)
    assert "small-seed3 (preempted, step 10 of 30)" in found.notes[0] and "no standard deviation" in found.notes[1]
    assert "50.00" in results.markdown([found]) and "±" not in results.markdown([found])
    none, = results.group(runs[1:])
    assert none.best == {} and "mean" not in results.markdown([none]).replace("the mean", "")
    silent, = results.group([results.read(made(configs[2], []))])
    assert silent.best == {} and "Never evaluated" in silent.notes[0]


def test_recipes_that_differ_are_apart(recipe: str) -> None:
    """Runs that differ in more than the seed are groups of their own, with the fields named; free fields and names
    don't part them, what an evaluation measures does, and two runs of one seed are told."""
    runs = [made(config, [0.5]) for config in three(recipe)[:2]]
    runs.append(made(recipes.load(recipe, ["name=x-seed0", "optim.lr=0.5", "log.tensorboard=false"]), [0.6]))
    runs.append(made(recipes.load(recipe, ["name=y", "log.tensorboard=false", "data.threads=3"]), [0.4]))
    groups = results.group([results.read(run) for run in runs])
    assert [[run.name for run in one.runs] for one in groups] == [["small-seed0", "small-seed3", "y"], ["x-seed0"]]
    assert [one.differs for one in groups] == [{"optim.lr": 0.01}, {"optim.lr": 0.5}]
    assert groups[0].notes == ["Of the same seed, 0, so not independent: small-seed0, y."]
    told = results.markdown(groups)
    assert told.startswith("These runs are of 2 recipes: they differ in more than the seed (optim.lr).")
    assert "optim.lr: 0.5:" in told
    other = results.read(runs[0])
    moved = replace(other, experiment={**other.experiment, "evaluate.crop": "squash"})
    assert len(results.group([other, moved])) == 2


def test_a_running_mean_decides_and_is_shown(recipe: str) -> None:
    """Where the running mean of the weights was evaluated, its accuracy picks the best, and has columns of its own."""
    run = made(three(recipe)[0], [0.5, 0.4], ema_top1=0.1, ema_top5=0.2, ema_loss=2.0)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    lines[-1] = json.dumps({**record, "ema_top1": 0.9})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = results.read(run)
    assert found.best is not None and found.best["step"] == 20
    assert "best EMA top-1 %" in results.report([run]) and "90.00" in results.report([run])


def test_report_by_name(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`report NAME` stands for NAME-seed0 ... in the order of their numbers; a name that is nobody's, or named twice,
    is refused; --json holds the spreads."""
    for config in seeds.configs(recipe, [], [10, 2]):
        made(config, [0.5])
    runs = ["--runs", str(tmp_path / "runs")]
    assert cli.main(["report", "small", "--json", *runs]) == 0
    told, = json.loads(capsys.readouterr().out)
    assert [run["seed"] for run in told["runs"]] == [2, 10] and told["best"]["top1"] == {
        "n": 2, "mean": 0.5, "deviation": 0.0}
    assert cli.main(["report", str(tmp_path / "runs" / "small-seed2")]) == 0
    assert cli.main(["report", "smal", *runs]) == 2 and "There is no run 'smal'" in capsys.readouterr().err
    assert cli.main(["report", "small", "small-seed2", *runs]) == 2 and "named twice" in capsys.readouterr().err
    with pytest.raises(UserError, match="No recipe of the run"):
        results.read(tmp_path)


def test_no_torch() -> None:
    """Neither seeds nor results import torch."""
    script = "import sys, alexnet_ddp.seeds, alexnet_ddp.results; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


# --- what lies there by other hands, and other data -------------------------------------------------------------


def signed(run: Path, **identities: str) -> Path:
    """A checkpoint's manifest that says which data the run had."""
    folder = run / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"lineage": {"identities": identities}}))
    return run


def test_runs_of_other_data_are_not_passed_over(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run that was trained on other samples than data.train holds now is started (and says why it can't go
    on); one evaluated on others is passed over with a remark; data that are away are no reason to start it."""
    monkeypatch.setenv("ALEXNET_DDP_CACHE", str(tmp_path / "cache"))
    words = [f"data.train={tmp_path / 'train'}", f"data.val={tmp_path / 'val'}"]
    config = three(recipe, *words)[0]
    made(config, [0.5])
    with open_index(str(harness.make_images(tmp_path / "train", samples=6))) as index:
        signed(config.run_dir, train=index.identity, val="ab" * 32)
    assert seeds.is_finished(config)
    harness.make_images(tmp_path / "val", samples=3)
    assert "is of other held-out samples" in seeds._others_held_out(config)
    harness.make_images(tmp_path / "more", samples=9)
    assert not seeds.is_finished(three(recipe, f"data.train={tmp_path / 'more'}")[0])
    assert seeds.is_finished(three(recipe, f"data.train={tmp_path / 'away'}")[0])


def test_other_data_have_no_common_mean(recipe: str) -> None:
    """Runs evaluated on other samples are groups of their own, told by the data's fingerprint; a run that doesn't know
    its data yet is shown with the first of its recipe."""
    first, second, third = three(recipe)
    runs = [made(first, [], status="new"), signed(made(second, [0.5]), train="a" * 64, val="b" * 64),
            signed(made(third, [0.7]), train="a" * 64, val="c" * 64)]
    groups = results.group([results.read(run) for run in runs])
    assert [[run.seed for run in one.runs] for one in groups] == [[0, 3], [7]]
    assert [one.best["top1"].mean for one in groups] == [0.5, 0.7]
    assert [one.differs for one in groups] == [{"identity of data.val": "b" * 12}, {"identity of data.val": "c" * 12}]


def test_a_report_over_odd_runs(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that hasn't begun, recipes that are none and evaluations without an accuracy are told and left out, and the
    rest is reported; a pattern is no name."""
    for number, config in enumerate(seeds.configs(recipe, [], [0, 1, 2, 3])):
        made(config, [0.5])
        if number:
            (config.run_dir / "config.yaml").write_text(["", "epochs: many", "model: 5", "model: null"][number])
    (tmp_path / "runs" / "small-seed4").mkdir()
    with (tmp_path / "runs" / "small-seed0" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "evaluate", "step": 30}\n{"kind": "evaluate", "step": 40, "top1": null}\n')
    assert cli.main(["report", "small", "--runs", str(tmp_path / "runs")]) == 0
    told = capsys.readouterr()
    assert "small-seed0" in told.out and "50.00" in told.out
    assert [f"left out of the report: {tmp_path}/runs/small-seed{number}/config.yaml is no recipe" in told.err
            for number in (1, 2, 3)] == [True] * 3
    assert "No recipe of the run" in told.err
    assert cli.main(["report", "small-seed1", "--runs", str(tmp_path / "runs")]) == 2
    for name in ("**", "*", "[", "small*"):
        assert cli.main(["report", name, "--runs", str(tmp_path / "runs")]) == 2
        assert f"There is no run '{name}'" in capsys.readouterr().err


def test_a_report_in_ascii(recipe: str, tmp_path: Path) -> None:
    """Where the output has no ± it is written +/-, and nothing breaks."""
    runs = [made(config, [0.5 + config.seed / 100]) for config in three(recipe)]
    done = subprocess.run([sys.executable, "-m", "alexnet_ddp", "report", *map(str, runs)], capture_output=True,
                          timeout=60, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr.decode()
    assert b"53.33 +/- 3.51" in done.stdout


def test_a_fresh_start_is_gone_on_with_without_the_flag(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said when a sequence is stopped is true: with --fresh the same command would start over."""
    for flags, said in ((["--fresh"], "the same command without --fresh goes on"), ([], "the same command goes on")):
        assert seeds._stopped(seeds.Queue(), three(recipe), 2, flags=flags) == 75
        assert f"stopped at run 2 of 3; {said} from there" in capsys.readouterr().out
