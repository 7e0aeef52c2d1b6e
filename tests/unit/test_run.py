"""A changed recipe or data set at a resume: what is accepted, what is said, what is refused and with which ways out."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import alexnet_ddp
from alexnet_ddp import config as recipes
from alexnet_ddp.config import Config
from alexnet_ddp.data.order import Order
from alexnet_ddp.errors import UserError
from alexnet_ddp.run import (
    RunDirectory,
    Start,
    check_data,
    check_recipe,
    git_state,
    lineage_of,
    read_start,
    why_best_anew,
    write_refused,
)
from alexnet_ddp.runfiles import check_not_set_aside, job_of, read_state
from alexnet_ddp.watchdog import Failure

ORDER = Order(1000, global_batch=10, seed=0, shards=4, identity="ab" * 32)  # 100 steps an epoch


def recipe(**changes: Any) -> Config:
    tree: dict[str, Any] = {"name": "a", "data": {"train": "/x"}, "epochs": 5,
                            "schedule": {"name": "step", "step_epochs": 2}}
    return recipes.build(recipes.apply_overrides(tree, [f"{name.replace('__', '.')}={value}"
                                                        for name, value in changes.items()]))


def lineage(config: Config) -> dict[str, Any]:
    """As a checkpoint holds it: through JSON."""
    return {"recipe": json.loads(json.dumps(config.model_dump(mode="json")))}


def checked(before: Config, now: Config, *, done: int = 250, accept: bool = False) -> list[str]:
    return check_recipe(lineage(before), now, order=ORDER, done=done, accept=accept)


def test_the_same_recipe_is_exact() -> None:
    """An unchanged recipe gives no reason against bit-equality, also after its way through YAML and JSON."""
    config = recipe()
    assert checked(config, config) == []
    again = recipes.build(recipes.yaml.safe_load(recipes.dump(config)))
    assert checked(config, again) == []


@pytest.mark.parametrize("change", ["runs=/r", "data.threads=3", "checkpoint.minutes=1", "evaluate.batch=9",
                                    "deadline=4h", "data.train=/moved", "log.tensorboard=false", "limits.step=9"])
def test_free_changes_are_silent(change: str) -> None:
    """Fields that move no bit are accepted without a word."""
    path, _, value = change.partition("=")
    assert checked(recipe(), recipe(**{path: value})) == []


@pytest.mark.parametrize("change", ["micro_batch=7", "amp=bf16", "data.decoder=pillow", "torch_threads=2",
                                    "data.assignment=owner"])
def test_bits_changes_are_said(change: str) -> None:
    """Fields that move rounding are accepted, and named as the reason why the attempt isn't exact."""
    path, _, value = change.partition("=")
    why, = checked(recipe(), recipe(**{path: value}))
    assert why.startswith(f"{path}: ")
    assert why.endswith(f"-> {value}")


@pytest.mark.parametrize("change", ["optim.lr=0.5", "seed=1", "augment.flip=0", "data.shards=8", "clip_norm=1",
                                    "schedule.gamma=0.5", "data.stored=raw256"])
def test_order_changes_are_refused(change: str) -> None:
    """Fields that make another experiment are refused with the difference and three ways out; accepted when told to."""
    path, _, value = change.partition("=")
    before, now = recipe(), recipe(**{path: value})
    with pytest.raises(UserError) as error:
        checked(before, now)
    for word in (f"{path}: ", f"-> {value}", "name=a_2", "--fresh", "--accept-changes"):
        assert word in str(error.value)
    why, = checked(before, now, accept=True)
    assert why.startswith(f"{path}: ")


@pytest.mark.parametrize("change", ["global_batch=20", "model.width=0.5", "model.num_classes=7", "init_from=runs/b"])
def test_the_net_and_the_batch_are_fixed(change: str) -> None:
    """What a checkpoint can't be carried over isn't accepted, whatever flag is given, and the flag isn't offered."""
    path, _, value = change.partition("=")
    with pytest.raises(UserError) as error:
        checked(recipe(), recipe(**{path: value}), accept=True)
    assert f"{path}: " in str(error.value)
    assert "--accept-changes" not in str(error.value)


def test_other_frozen_parts_are_another_run() -> None:
    """A changed freeze is refused whatever flag is given; the way out is a new run from the weights of this one."""
    with pytest.raises(UserError) as error:
        checked(recipe(freeze="features"), recipe(), accept=True)
    assert "freeze: ['features'] -> []" in str(error.value) and "--accept-changes" not in str(error.value)
    assert "name=a_2 init_from=runs/a@last" in str(error.value)


def test_all_refused_changes_are_listed() -> None:
    """Every refused field is told at once; free and bits changes beside them are not."""
    with pytest.raises(UserError) as error:
        checked(recipe(), recipe(optim__lr=0.5, seed=1, micro_batch=7, runs="/r"))
    assert "optim.lr: 0.01 -> 0.5" in str(error.value)
    assert "seed: 0 -> 1" in str(error.value)
    assert "micro_batch" not in str(error.value)
    assert "runs" not in str(error.value)


def test_training_longer() -> None:
    """Other epochs are accepted, exactly, while all rates used so far are the same; a begun cosine is refused."""
    assert checked(recipe(), recipe(epochs=50)) == []
    assert checked(recipe(schedule__name="constant"), recipe(schedule__name="constant", epochs=2)) == []
    cosine = {"schedule__name": "cosine", "schedule__warmup_epochs": 1}
    assert checked(recipe(**cosine), recipe(**cosine, epochs=50), done=101) == []  # in the warmup, and the peak
    with pytest.raises(UserError, match="epochs: 5 -> 50"):
        checked(recipe(**cosine), recipe(**cosine, epochs=50), done=102)
    assert checked(recipe(**cosine), recipe(**cosine, epochs=50), accept=True) == ["epochs: 5 -> 50"]


def test_older_recipes() -> None:
    """In a recipe of another version a lacking field has its default, and one that is gone is passed over."""
    old = lineage(recipe())
    del old["recipe"]["optim"]["nesterov"], old["recipe"]["limits"]
    old["recipe"]["optim"]["forgotten"], old["recipe"]["gone"] = 3, {"away": 1}

    def check(now: Config) -> list[str]:
        return check_recipe(old, now, order=ORDER, done=250, accept=False)

    assert check(recipe()) == []
    assert check(recipe(micro_batch=7)) == ["micro_batch: 128 -> 7"]
    assert check(recipe(epochs=50)) == []
    with pytest.raises(UserError, match="optim.nesterov: False -> True"):
        check(recipe(optim__nesterov="true"))


def test_other_training_data_are_refused() -> None:
    """Other names or labels in data.train are refused by fingerprint; other validation data are said."""
    was = {"identities": {"train": "a" * 64, "val": "b" * 64}}
    assert check_data(was, was["identities"]) == []
    assert check_data(was, {"train": "a" * 64, "val": "c" * 64}) == ["data.val holds other samples"]
    with pytest.raises(UserError, match=r"data\.train holds other samples") as error:
        check_data(was, {"train": "c" * 64, "val": "b" * 64})
    assert "aaaaaaaaaaaa" in str(error.value)
    assert "cccccccccccc" in str(error.value)


def test_state_json(tmp_path: Path) -> None:
    """state.json keeps what it knew, is replaced in one piece, and one that can't be read counts as none."""
    config = recipe(runs=str(tmp_path))
    directory = RunDirectory(config, fresh=False)
    directory.write_state("running", step=3, best=None)
    directory.write_state("preempted", why="USR1")
    directory.close()
    state = read_state(config.run_dir)
    assert (state["status"], state["why"], state["step"]) == ("preempted", "USR1", 3)
    assert [file.name for file in config.run_dir.iterdir() if ".new" in file.name or ".tmp" in file.name] == []
    for text in ("", "{", "[]", '"word"'):
        (config.run_dir / "state.json").write_text(text)
        assert read_state(config.run_dir) == {}
    assert read_state(tmp_path / "none") == {}


JOB = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2", "SLURM_ARRAY_JOB_ID": "75", "SLURM_ARRAY_TASK_ID": "0"}


def test_job() -> None:
    """The job, its restart and its place in an array, as Slurm's variables tell; Slurm sets no count at a first start.
    """
    assert job_of(JOB).facts == {"job": "77", "restart": 2, "array": "75_0"}
    assert job_of({"SLURM_JOB_ID": "8"}).facts == {"job": "8", "restart": 0, "array": None}
    assert job_of({"ALEXNET_LOCAL_JOB": "local-7.3"}).facts == {"job": "local-7", "restart": 3, "array": None}
    assert job_of({}).facts == {"job": None, "restart": 0, "array": None}


def test_failure_in_state_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """state.json tells a failure with its kind and its job, and the next attempt's state tells of none."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    config = recipe(runs=str(tmp_path))
    RunDirectory(config, fresh=False).write_failed(Failure(1, "n2", 4, "its process is gone", "dead", reported_by=0))
    state = read_state(config.run_dir)
    assert (state["status"], state["job"], state["restart"], state["array"]) == ("failed", "77", 2, "75_0")
    assert state["failure"] == {"rank": 1, "host": "n2", "step": 4, "cause": "its process is gone", "kind": "dead"}
    assert state["why"].endswith("rank 1 on n2 failed at step 4: its process is gone (reported by rank 0)")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    directory = RunDirectory(config, fresh=False)
    directory.write_state("running", step=0)
    directory.close()
    state = read_state(config.run_dir)
    assert (state["status"], state["why"], state["failure"], state["restart"]) == ("running", "", None, 3)


def test_refused_in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake found while an attempt is set up stands in state.json for its job; outside of a job nothing is touched.
    """
    config, mistake = recipe(runs=str(tmp_path)), UserError("data.train=/x: nothing is there.\nName a folder.")
    write_refused(config, None, mistake)
    assert not config.run_dir.exists()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write_refused(config, None, mistake)
    state = read_state(config.run_dir)
    assert (state["status"], state["job"], state["restart"], state["attempt"]) == ("failed", "77", 0, 0)
    assert state["why"] == str(mistake) and state["failure"]["cause"] == " ".join(str(mistake).split())
    assert (state["failure"]["rank"], state["failure"]["kind"]) == (0, "user")
    assert not (config.run_dir / "lease.json").exists()


def test_refused_leaves_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a run that another process owns, or perhaps owns, and of a finished one, is not touched."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    config, mistake = recipe(runs=str(tmp_path)), UserError("no")
    owner = RunDirectory(config, fresh=False)
    owner.write_state("running", step=3)
    before = (config.run_dir / "state.json").read_bytes()
    write_refused(config, None, mistake)
    owner.guard()
    owner.close()
    lease = {"host": "elsewhere", "boot": "b", "pid": 1, "token": "t", "job": "76", "ttl": 60.0}
    (config.run_dir / "lease.json").write_text(json.dumps(lease))
    write_refused(config, None, mistake)
    assert json.loads((config.run_dir / "lease.json").read_text()) == lease
    assert (config.run_dir / "state.json").read_bytes() == before
    (config.run_dir / "lease.json").unlink()
    directory = RunDirectory(config, fresh=False)
    directory.write_state("finished", step=9)
    write_refused(config, directory, mistake)
    assert read_state(config.run_dir)["status"] == "finished"


def test_code_of_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen copy of the code tells the commit it was frozen from, not that of the checkout which it lies in."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words],
                              check=True, capture_output=True, text=True).stdout.strip()

    copy = tmp_path / "runs" / "a" / "snapshots" / "1"
    (copy / "alexnet_ddp").mkdir(parents=True)
    (copy / "alexnet_ddp" / "__init__.py").touch()
    monkeypatch.setattr(alexnet_ddp, "__file__", str(copy / "alexnet_ddp" / "__init__.py"))
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "later")
    head = git("rev-parse", "HEAD")
    assert (git_state() or {})["commit"] == head  # without a snapshot's word it is the checkout's
    for frozen in ({"commit": "abc", "branch": "main", "changed": ["M x"]}, None):
        (copy / "snapshot.json").write_text(json.dumps({"id": "1", "git": frozen}))
        assert git_state() == frozen


def test_lineage_tells_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint tells which start of which job wrote it, in plain Python."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    told = lineage_of(recipe(), start=Start(attempt=4), numeric={}, identities={}, decoder="pillow")
    assert (told["job"], told["restart"], told["array"], told["attempt"]) == ("77", 2, "75_0", 4)
    assert json.loads(json.dumps(told)) == told


def test_fresh_keeps_the_old_run(tmp_path: Path) -> None:
    """--fresh renames a directory that has checkpoints, again and again, and deletes nothing; an empty one stays."""
    config = recipe(runs=str(tmp_path))
    for number in range(3):
        directory = RunDirectory(config, fresh=True)
        (config.run_dir / "checkpoints" / "step_00000000").mkdir(parents=True)
        (config.run_dir / "mark").write_text(str(number))
        directory.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.old-1", "a.old-2"]
    assert [(tmp_path / name / "mark").read_text() for name in ("a.old-1", "a.old-2", "a")] == ["0", "1", "2"]
    directory = RunDirectory(config, fresh=False)
    directory.close()
    assert (config.run_dir / "mark").read_text() == "2"


def test_the_best_begins_anew_where_another_accuracy_decides() -> None:
    """Other held-out samples, a running mean switched on or off: the old best is no measure any more; a recipe from
    before there were means counts as one without."""
    val = {"train": "a", "val": "b"}
    for before, now, anew in ((None, None, False), (None, 0.9, True), (0.9, 0.99, False), (0.9, None, True)):
        config = recipe(**({} if now is None else {"ema__decay": now}))
        old = recipe(**({} if before is None else {"ema__decay": before}))
        assert bool(why_best_anew({**lineage(old), "identities": val}, config, val)) == anew, (before, now)
    ancient = lineage(recipe())
    del ancient["recipe"]["ema"]
    assert not why_best_anew({**ancient, "identities": val}, recipe(), val)
    assert "data.val" in why_best_anew({**ancient, "identities": val}, recipe(), {**val, "val": "c"})


@pytest.mark.parametrize("spelling", ["@last", "", "/checkpoints/step_00000003/model.safetensors", "@step_3"])
def test_fresh_never_takes_away_what_a_run_begins_with(tmp_path: Path, spelling: str) -> None:
    """init_from in the very directory that --fresh would rename is refused, whatever its spelling; one beside it, and
    torchvision's, are not."""
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="lies in .* --fresh sets aside.*name=x_2"):
        check_not_set_aside(f"{tmp_path}/x{spelling}", tmp_path / "x", name="x")
    with pytest.raises(UserError, match="--fresh"):
        check_not_set_aside(f"x{spelling}", tmp_path / "x", name="x", cwd=tmp_path)
    config = recipe(runs=str(tmp_path), name="x", init_from=f"{tmp_path}/x{spelling}")
    with pytest.raises(UserError, match="--fresh sets aside"):
        read_start(config, fresh=True)
    for other in (f"{tmp_path}/x_old{spelling}", "torchvision:alexnet"):
        check_not_set_aside(other, tmp_path / "x", name="x", cwd=tmp_path)
