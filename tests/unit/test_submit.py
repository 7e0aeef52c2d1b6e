"""submit: the script that sbatch gets, what is refused before it, what is left behind; with Slurm's commands faked."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import harness
from alexnet_ddp import cli, seeds
from alexnet_ddp import config as recipes
from alexnet_ddp.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER, UserError
from alexnet_ddp.lease import Lease
from alexnet_ddp.runfiles import read_attempts, replace_state
from launch import executors, follow, plan, rundir, snapshot
from launch.facts import Facts
from launch.follow import Followed
from launch.preflight import Request
from launch.requeue import Caps
from launch.slurm import Queued

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchvision", "numpy", "tensorboard", "PIL")

# A fake of each command: it writes down what it was given, and answers with what lies in its .out and .code files.
FAKE = """#!/bin/bash
here=$(dirname "$0"); name=$(basename "$0")
printf '%s\\n' "$*" >> "$here/$name.calls"
env > "$here/$name.env"
[ "$name" = sbatch ] && cp "$1" "$here/script"
[ -e "$here/$name.err" ] && cat "$here/$name.err" >&2
case "$name $*" in
    "scontrol show config") cat "$here/config.out" 2>/dev/null ;;
    *) cat "$here/$name.out" 2>/dev/null ;;
esac
exit $(cat "$here/$name.code" 2>/dev/null || echo 0)
"""
PARTITION = "PartitionName=gpu Default=YES DefaultTime=02:00:00 GraceTime=60 MaxNodes=4 MaxTime=1-00:00:00 State=UP\n"


class Slurm:
    """A cluster of fakes. `put(name, text)` sets what a command answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "srun", "sinfo", "scontrol", "squeue"):
            (folder / name).write_text(FAKE)
            (folder / name).chmod(0o755)
        self.put("sbatch", "Submitted batch job 77\n")
        self.put("scontrol", PARTITION)
        self.put("config", "SlurmctldParameters     = preempt_send_user_signal\nPreemptType = preempt/partition_prio\n")
        self.put("sinfo", "gpu|4|64|512000|idle|gpu:a100:8\n")
        self.put("squeue", "")

    def put(self, name: str, text: str, *, code: int = 0, error: str = "") -> None:
        for kind, words in (("out", text), ("code", str(code)), ("err", error)):
            draft = self.folder / f"{name}.{kind}.new"
            draft.write_text(words)
            draft.replace(self.folder / f"{name}.{kind}")  # a fake that runs just now reads one or the other

    def queue(self, *jobs: tuple[str, str]) -> None:
        """What squeue answers, as launch.slurm asks: jobs with their states."""
        self.put("squeue", "".join(f"{job}|{job.partition('_')[0]}|{state}|gpu|N/A||None|a\n" for job, state in jobs))

    @property
    def script(self) -> str:
        return (self.folder / "script").read_text()

    @property
    def submitted(self) -> int:
        calls = self.folder / "sbatch.calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def environment(self, name: str) -> dict[str, str]:
        lines = (self.folder / f"{name}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    fakes = Slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fakes.folder}:/usr/bin:/bin")
    return fakes


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of any job, without a user's profiles, in an empty folder; test_snapshot.py is about git."""
    monkeypatch.setattr(snapshot, "git_state", lambda home: (None, b""))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PWD", str(tmp_path / "work"))


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "work" / "small.yaml"
    path.write_text(f"data: {{train: {tmp_path}/images}}\nepochs: 4\nschedule: {{name: step}}\n"
                    "checkpoint: {epochs: null}\n")
    return str(path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "work" / "runs" / "small"


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which there is no command at all."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def run(*words: str, code: int = EXIT_FINISHED) -> tuple[str, str]:
        got = cli.main(["submit", *words])
        out, err = capsys.readouterr()
        assert got == code, err
        return out, err
    return run


Said = Callable[..., tuple[str, str]]


def refusal(said: Said, *words: str) -> str:
    """What a refused command says: once, with code 2, and without a traceback."""
    out, err = said(*words, code=EXIT_USER)
    assert out == ""
    assert err.count("alexnet-ddp: error: ") == 1
    return err.partition("alexnet-ddp: error: ")[2].strip()


def keys(script: str) -> dict[str, str | None]:
    """The options that a script gives to sbatch."""
    found: dict[str, str | None] = {}
    for line in re.findall(r"^#SBATCH --(.*)$", script, flags=re.MULTILINE):
        key, equals, value = line.partition("=")
        assert key not in found
        found[key] = value if equals else None
    return found


def anonymous(text: str) -> str:
    """Without the times that are a snapshot's name."""
    return re.sub(r"\d{8}-\d{6}-\d{6}", "TIME", text)


def trained(run_dir: Path, config: str, *, status: str = "preempted", **facts: Any) -> None:
    """A run directory as an attempt has left it, with a checkpoint at step 30."""
    place = run_dir / "checkpoints" / "step_00000030"
    place.mkdir(parents=True)
    recipe = recipes.load(config)
    (place / "manifest.json").write_text(json.dumps({"lineage": {"recipe": recipe.model_dump(mode="json")}}))
    (run_dir / "config.yaml").write_text(recipes.dump(recipe))
    replace_state(run_dir, {"status": status, "job": "70", "step": 30, "total_steps": 100, **facts})


# --- quick, without torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [["--dry-run"], []], ids=["dry-run", "submitted"])
def test_no_torch(fake_slurm: Slurm, recipe: str, more: list[str]) -> None:
    """Neither a dry run nor a submission imports torch, or anything else that takes seconds."""
    code = ("import sys\nfrom alexnet_ddp.cli import main\ncode = main(['submit', *sys.argv[1:]])\n"
            f"print([name for name in {HEAVY} if name in sys.modules])\nsys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code, recipe, "--nodes", "2", *more], capture_output=True, text=True,
                          timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == EXIT_FINISHED, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert fake_slurm.submitted == (not more)


# --- the script -------------------------------------------------------------------------------------------------


def test_script(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said, tmp_path: Path) -> None:
    """sbatch gets size, limits, and signal with lead time; always requeue, append and chdir."""
    words = ("-N 2 --gpus-per-node 4 -c 8 --mem 64G -t 4h -p gpu -A us -q high -C a100 -J job -w g1,g2 -x g3 "
             "-d afterok:5 --slurm mail-type=END --slurm exclusive")
    said(recipe, *words.split())
    assert keys(fake_slurm.script) == {
        "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "8", "mem": "64G", "time": "240",
        "partition": "gpu", "account": "us", "qos": "high", "constraint": "a100", "job-name": "job",
        "nodelist": "g1,g2", "exclude": "g3", "dependency": "afterok:5", "mail-type": "END", "exclusive": None,
        "requeue": None, "open-mode": "append", "signal": "USR2@120", "chdir": str(tmp_path / "work"),
        "output": f"{run_dir}/slurm/%j_0_log.out"}  # no wckey, which submitit would add
    srun = re.search(r"^srun .*$", fake_slurm.script, flags=re.MULTILINE)
    assert srun is not None
    assert srun[0] == (f"srun --unbuffered --output {run_dir}/slurm/%j_%t_log.out --kill-on-bad-exit=1 "
                       '--open-mode=append --export=ALL --cpus-per-task=8 $BLOCK "$TASK_PYTHON" -P -u '
                       f"-m submitit.core._submit {run_dir}/slurm")
    lines = fake_slurm.script.splitlines()
    assert "export SRUN_CPUS_PER_TASK=8" in lines
    assert lines[-5:] == ["status=$?", *lines[-4:-2],
                          '"$PYTHON" -P -m launch.attempts end "$SNAPSHOT" --exit-code "$status"', 'exit "$status"']


def test_bash_takes_it(fake_slurm: Slurm, recipe: str, said: Said, tmp_path: Path) -> None:
    """The script runs in bash to its end and leaves with srun's code; odd values and paths arrive as they are."""
    (tmp_path / "site.yaml").write_text("setup: [\"export FROM_SETUP='a b'\"]\nenv: {ODD: \"it's $HOME & more\"}\n"
                                        "srun_args: ['--comment=a b', '--where=$HERE']\n")
    os.environ["HERE"] = "filled in"
    try:
        said(recipe, f"runs={tmp_path}/odd runs", "--profile", f"{tmp_path}/site.yaml", "--time", "1h")
    finally:
        del os.environ["HERE"]
    fake_slurm.put("srun", "", code=75)
    done = subprocess.run(["bash", str(fake_slurm.folder / "script")], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "g[1-2]"})
    assert done.returncode == EXIT_STOPPED, done.stderr
    got = fake_slurm.environment("srun")
    assert got["FROM_SETUP"] == "a b"
    assert got["ODD"] == "it's $HOME & more"
    assert got["PYTHONPATH"].startswith(f"{tmp_path}/odd runs/small/snapshots/")
    words = (fake_slurm.folder / "srun.calls").read_text()
    assert "--comment=a b --where=filled in env --block-signal=HUP,INT,TERM,USR1,USR2 " in words
    told = [record["event"] for record in read_attempts(tmp_path / "odd runs" / "small")]
    assert told == ["submit", "begin", "end"]


def test_dry_run_tells_the_truth(fake_slurm: Slurm, recipe: str, said: Said, tmp_path: Path) -> None:
    """What --dry-run shows is what sbatch gets, but for the time in the snapshot's name; and it writes nothing."""
    for words in (["-N", "2", "--gpus-per-node", "a100:8", "-t", "12:00:00"], ["--seeds", "0,3", "--parallel", "1"]):
        out, _ = said(recipe, *words, "--dry-run")
        assert fake_slurm.submitted == 0
        assert not (tmp_path / "work" / "runs").exists()
        said(recipe, *words)
        assert anonymous(out.partition("# --- end of the script")[0].strip()) == anonymous(fake_slurm.script.strip())
        (fake_slurm.folder / "sbatch.calls").unlink()
        subprocess.run(["rm", "-r", str(tmp_path / "work" / "runs")], check=True, timeout=10)


def test_dry_run_without_slurm(no_slurm: None, recipe: str, said: Said, tmp_path: Path) -> None:
    """Script and plan are shown on a machine without any of Slurm's commands, and nothing is refused for them."""
    out, err = said(recipe, "-N", "300", "--gpus-per-node", "16", "-t", "400h", "-p", "whatever", "--dry-run")
    assert out.startswith("#!/bin/bash\n")
    assert "what happens to it (300 nodes x 16 tasks with one GPU each, 16d16h at a time)" in out
    assert "nothing was checked against the cluster" in err
    assert not (tmp_path / "work" / "runs").exists()


@pytest.mark.parametrize(("style", "words", "want"), [
    ("gpus-per-node", ["--gpus-per-node", "4"], {"gpus-per-node": "4"}),
    ("gpus-per-node", ["--gpus-per-node", "a100:4"], {"gpus-per-node": "a100:4"}),
    ("gpus-per-task", ["--gpus-per-node", "4"], {"gpus-per-task": "1"}),
    ("gpus-per-task", ["--gpus-per-node", "a100:4"], {"gpus-per-task": "a100:1"}),
    ("gres", ["--gpus-per-node", "4"], {"gres": "gpu:4"}),
    ("gres:v100", ["--gpus-per-node", "4"], {"gres": "gpu:v100:4"}),
    ("gres:v100", ["--gpus-per-node", "a100:4"], {"gres": "gpu:a100:4"}),
    ("gpus-per-node", ["--gpus-per-task", "1", "--tasks-per-node", "4"], {"gpus-per-task": "1"}),
])
def test_gpu_styles(no_slurm: None, recipe: str, said: Said, tmp_path: Path, style: str, words: list[str],
                    want: dict[str, str]) -> None:
    """Each site's way to ask for GPUs is written as that site wants it, and always with one task per GPU."""
    (tmp_path / "site.yaml").write_text(f"gpus: {style}\n")
    found = keys(said(recipe, "--dry-run", "--profile", f"{tmp_path}/site.yaml", *words)[0])
    assert {key: value for key, value in found.items() if key.startswith(("gpus", "gres"))} == want
    assert found["ntasks-per-node"] == "4"


def test_command_line_over_profile(no_slurm: None, recipe: str, said: Said, tmp_path: Path) -> None:
    """The default profile counts, and the command line wins."""
    home = tmp_path / "config" / "alexnet-ddp" / "profiles"
    home.mkdir(parents=True)
    (home / "default.yaml").write_text("partition: gpu\naccount: us\ntime: 1h\ncpus_per_task: 4\n"
                                       "slurm: {nice: 5, hold: true}\n")
    found = keys(said(recipe, "--dry-run", "-p", "long", "-t", "2h", "--slurm", "nice=9")[0])
    assert (found["partition"], found["account"], found["time"], found["cpus-per-task"]) == ("long", "us", "120", "4")
    assert found["nice"] == "9"
    assert "hold" in found


# --- time and lead time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "time_", "signal_"), [
    (["-t", "4h"], "240", "USR2@120"), (["-t", "4"], "4", "USR2@60"), (["-t", "1"], "1", "USR2@15"),
    (["-t", "90s"], "2", "USR2@22"), (["-t", "1-0", "--lead-time", "10m"], "1440", "USR2@600"),
    (["-t", "infinite"], "infinite", "USR2@120"), ([], None, "USR2@120")])
def test_times(no_slurm: None, recipe: str, said: Said, words: list[str], time_: str | None, signal_: str) -> None:
    """The lead time is two minutes, at most a quarter of the time; without --time the site's default counts."""
    found = keys(said(recipe, "--dry-run", *words)[0])
    assert (found.get("time"), found["signal"]) == (time_, signal_)


def test_default_time_of_the_partition(fake_slurm: Slurm, recipe: str, said: Said) -> None:
    """Without --time, the partition's own default decides how long the warning may be."""
    fake_slurm.put("scontrol", PARTITION.replace("DefaultTime=02:00:00", "DefaultTime=00:02:00"))
    out, _ = said(recipe, "--dry-run")
    assert keys(out)["signal"] == "USR2@30"
    assert "2m at a time" in out


# --- refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "answer"), [
    (["-t", "1", "--lead-time", "50s"], "A job needs its lead time (50s) and 15 s to start in"),
    (["-t", "25h"], "end after 1-00:00:00 (MaxTime)"),
    (["--gpus-per-node", "9"], "Partition gpu has no nodes with 9 GPUs each"),
    (["--gpus-per-node", "8", "-c", "9"], "Partition gpu has no nodes with 72 CPUs each"),
    (["-N", "5"], "at most 4 nodes (MaxNodes)"),
    (["-p", "gpus"], "Did you mean gpu?"),
    (["--gpus-per-node", "4", "--tasks-per-node", "8"], "There is one task per GPU"),
    (["-N", "9", "-t", "99h"], "This can't run as it is asked for:\n  - "),
    (["device=cuda"], "The recipe says device: cuda, and no GPU is asked for. Use --gpus-per-node N."),
    (["--gpus-per-node", "1", "deterministic=true", "model.name=torchvision:alexnet"], "Use alexnet_torchvision"),
    (["--mem", "lots"], "Memory is written 64G or 512000M, got 'lots'."),
    (["--lead-time", "20h"], "--lead-time is between 1 s and 65535 s, got 20h."),
    (["--lead-time", "0"], "--lead-time is between 1 s and 65535 s, got 0."),
    (["--slurm", "signal=USR1@60"], "'signal' can't be set here: the lead time is set by --lead-time"),
    (["--slurm", "no-requeue"], "'no-requeue' can't be set here: every job may be requeued"),
    (["--slurm", "open-mode=truncate"], "'open-mode' can't be set here"),
    (["--seeds", "0-2", "--cluster", "local"], "--cluster local has none"),
    (["--seeds", "0-2", "seed=5"], "leave out seed=..."),
    (["-N", "2", "--cluster", "local"], "--cluster local has one node"),
    (["-N", "two"], "argument -N/--nodes: takes a number above 0, got 'two'"),
    (["--gpus-per-node", "a100"], "argument --gpus-per-node: takes a number above 0, got 'a100'"),
    (["--signal", "USR1@60"], "--signal can't be set here: the lead time"),
    (["-n", "8"], "-n can't be set here: there is one task per GPU"),
    (["--reservation", "x"], "Any key of sbatch is passed on by --slurm reservation=VALUE"),
    (["--batch-size", "256"], "use global_batch=..."),
    (["epohcs=5"], "did you mean 'epochs'?"),
])
def test_refused(fake_slurm: Slurm, recipe: str, said: Said, tmp_path: Path, words: list[str], answer: str) -> None:
    """What can't be is refused before anything is written or submitted, with what to write instead."""
    assert answer in refusal(said, recipe, *words)
    assert fake_slurm.submitted == 0
    assert not (tmp_path / "work" / "runs").exists()


def test_lead_time_of_a_known_run(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """A run whose own saves take longer than the lead time gets a longer one; too short a one is refused."""
    trained(run_dir, recipe, step_seconds=1.0, save_seconds=60.0)
    assert keys(said(recipe, "-t", "4h", "--dry-run")[0])["signal"] == "USR2@184"
    assert keys(said(recipe, "-t", "4h", "--fresh", "--dry-run")[0])["signal"] == "USR2@120"
    assert "Use --lead-time 184s or more" in refusal(said, recipe, "-t", "4h", "--lead-time", "183s")
    assert "Use --lead-time 184s or more" in refusal(said, recipe, "-t", "5")


def test_profile_that_gives_up_requeueing(fake_slurm: Slurm, recipe: str, said: Said, tmp_path: Path) -> None:
    """A profile that takes the right to requeue away, or its warning, is refused with the reason."""
    for text in ("requeue: false", "signal: B:USR1@60", "open-mode: truncate"):
        (tmp_path / "site.yaml").write_text(f"slurm: {{{text}}}\n")
        assert "can't be set here" in refusal(said, recipe, "--profile", f"{tmp_path}/site.yaml")


def test_data_that_is_not_seen(no_slurm: None, recipe: str, said: Said, tmp_path: Path) -> None:
    """Data that the login node doesn't see are worth a word; patterns are left to the nodes."""
    note = f"note: data.train={tmp_path}/images isn't there on this machine; the nodes must have it."
    assert note in said(recipe, "--dry-run")[1]
    for there in (f"{recipe}::sub/folder", f"{tmp_path}/shard-*.tar", f"{tmp_path}/{{000..009}}.tar"):
        assert "isn't there" not in said(recipe, f"data.train={there}", "--dry-run")[1]
    words = [recipe, f"data.train={recipe}", "--dry-run"]
    assert f"note: init_from={tmp_path}/a isn't there on this machine" in said(*words, f"init_from={tmp_path}/a@7")[1]
    for there in (recipe, f"{tmp_path}@last", "torchvision:alexnet"):
        assert "isn't there" not in said(*words, f"init_from={there}")[1]


def test_no_sbatch(no_slurm: None, recipe: str, said: Said, tmp_path: Path) -> None:
    """On a machine without sbatch it says what can be done there, and leaves nothing behind."""
    assert "no sbatch on this machine's PATH" in refusal(said, recipe)
    assert list((tmp_path / "work").glob("runs/*/*")) == []


def test_sbatch_refuses(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """Slurm's own refusal is told once, and nothing of the submission is left: no snapshot, no script, no pickle."""
    fake_slurm.put("sbatch", "", code=1, error="sbatch: error: invalid partition specified: gpu\n")
    answer = refusal(said, recipe)
    assert answer.startswith("Slurm refused the job: invalid partition specified: gpu.")
    assert not run_dir.exists()


def test_sbatch_refuses_a_fresh_start(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """When a --fresh submission is refused, the old run is back in its place."""
    trained(run_dir, recipe)
    fake_slurm.put("sbatch", "", code=1, error="sbatch: error: no\n")
    refusal(said, recipe, "--fresh")
    assert (run_dir / "checkpoints" / "step_00000030" / "manifest.json").exists()
    assert [path.name for path in run_dir.parent.iterdir()] == ["small"]


# --- the run directory ------------------------------------------------------------------------------------------


def test_what_is_left(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """It leaves a snapshot that remembers the command, submitit's files, an entry for `status`."""
    out, _ = said(recipe, "--time", "4h", "optim.lr=0.5")
    [frozen] = (run_dir / "snapshots").iterdir()
    known = snapshot.load(frozen)
    assert known.command == f"alexnet-ddp submit {recipe} --time 4h optim.lr=0.5"
    assert (known.lead, known.run_dir, known.cwd, known.job) == (120.0, run_dir, run_dir.parents[1], None)
    assert recipes.load(frozen / "recipe.yaml").optim.lr == 0.5
    assert str(frozen) in fake_slurm.script
    [told] = read_attempts(run_dir)
    assert {**told, "time": ""} == {"event": "submit", "time": "", "job": "77", "array": None, "snapshot": frozen.name,
                                    "command": known.command}
    assert (run_dir / "slurm" / "77_submitted.pkl").exists()
    assert (run_dir / "slurm" / "77_submission.sh").read_text() == fake_slurm.script
    for word in ("submitted job 77: one task, 4h at a time", "runs/small, begins anew", "runs/small/slurm/77_0_log.out",
                 "status: alexnet-ddp status runs/small", "scancel 77", "touch runs/small/STOP"):
        assert word in out


def test_goes_on(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """A run that was stopped is submitted again as it was, and it is said where it goes on."""
    trained(run_dir, recipe)
    assert "runs/small, goes on from step 30" in said(recipe)[0]


@pytest.mark.parametrize(("recipe_line", "more"), [
    ("", "More epochs (epochs=8)"), ("cosine", "schedule.name=cosine ends with its run")])
def test_finished(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said, recipe_line: str, more: str) -> None:
    """A finished run is said to be finished, with how to go on; that is no error, and nothing is submitted."""
    if recipe_line:
        Path(recipe).write_text(Path(recipe).read_text().replace("name: step", "name: cosine"))
    trained(run_dir, recipe, status="finished")
    out, err = said(recipe)
    assert out == ""
    assert "is finished: 4 epochs" in err
    assert more in err
    assert fake_slurm.submitted == 0


def test_longer(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """More epochs train a finished run longer."""
    trained(run_dir, recipe, status="finished")
    said(recipe, "epochs=8")
    assert fake_slurm.submitted == 1


def test_changed_recipe(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """A change that the job would refuse is refused now; what may be accepted can be, and is passed on."""
    trained(run_dir, recipe)
    answer = refusal(said, recipe, "optim.lr=0.5", "checkpoint.minutes=5")
    assert "optim.lr: 0.01 -> 0.5" in answer
    assert "checkpoint" not in answer
    assert "--accept-changes" in answer
    for fixed in ("global_batch=512", "freeze=features", "init_from=runs/other"):
        assert "--accept-changes" not in refusal(said, recipe, fixed, "--accept-changes")
    said(recipe, "optim.lr=0.5", "--accept-changes")
    [frozen] = (run_dir / "snapshots").iterdir()
    assert snapshot.load(frozen).accept_changes


def test_longer_cosine(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """More epochs of a cosine would change the rates there have been."""
    Path(recipe).write_text(Path(recipe).read_text().replace("name: step", "name: cosine"))
    trained(run_dir, recipe)
    assert "epochs: 4 -> 8" in refusal(said, recipe, "epochs=8")


def test_owned_by_a_job(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """A run whose job runs is not submitted twice, nor put aside; but a job after that one may be."""
    said(recipe)
    fake_slurm.queue(("77", "RUNNING"))
    answer = refusal(said, recipe)
    assert f"Job 77 (running) works in {run_dir}" in answer
    assert refusal(said, recipe, "--fresh") == answer
    said(recipe, "-d", "afterany:77")
    fake_slurm.queue(("77", "CANCELLED"))
    said(recipe)
    assert fake_slurm.submitted == 3


@pytest.mark.parametrize(("state", "free"), [("PENDING", False), ("COMPLETING", False), ("REQUEUE_HOLD", False),
                                             ("NODE_FAIL", False), ("COMPLETED", True), ("FAILED", True)])
def test_who_owns(tmp_path: Path, state: str, free: bool) -> None:
    """A job that waits, or that Slurm may bring back, owns its run; one that is over, or of another run, doesn't."""
    facts = Facts(run_dir=tmp_path, now=0.0, jobs=("77",), queued=[queued(state)])
    with contextlib.nullcontext() if free else pytest.raises(UserError, match="works in"):
        rundir.check_free(facts, dependency="afterany:5:770")
    for dependency in ("afterany:77", "singleton"):
        rundir.check_free(facts, dependency=dependency)
    rundir.check_free(replace(facts, jobs=("78",)), dependency="")


def test_owned_by_a_process(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """A run that somebody trains without Slurm is left to them; a lease whose job is gone is not in the way."""
    lease = Lease.acquire(run_dir, job=None, restart=0)
    try:
        assert "works in" in refusal(said, recipe)
        lease_file = run_dir / "lease.json"
        held = json.loads(lease_file.read_text())
    finally:
        lease.release()
    lease_file.write_text(json.dumps({**held, "host": "g1", "job": "70"}))
    trained(run_dir, recipe, host="g1")
    said(recipe)


def test_stop_file(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """A STOP file that was left would stop the job at its start: it is to be removed first."""
    trained(run_dir, recipe)
    (run_dir / "STOP").touch()
    assert f"rm {run_dir}/STOP" in refusal(said, recipe)


def test_fresh(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """--fresh puts the old run aside at submission, says where, and the job itself knows nothing of it."""
    trained(run_dir, recipe, status="finished")
    (run_dir.parent / "small.old-1").mkdir()
    out, err = said(recipe, "--fresh", "optim.lr=0.5")
    assert f"the old run was kept as {run_dir}.old-2" in err
    assert (run_dir.parent / "small.old-2" / "checkpoints" / "step_00000030").exists()
    assert "begins anew" in out
    assert sorted(path.name for path in run_dir.iterdir()) == ["attempts.jsonl", "slurm", "snapshots"]
    assert "--fresh" not in fake_slurm.script
    said(recipe, "name=new", "--fresh")  # there is nothing to put aside
    for source in (f"{run_dir}@last", f"{run_dir}/best.safetensors"):  # the job would look for it in vain
        assert "--fresh sets aside" in refusal(said, recipe, "--fresh", f"init_from={source}")
    assert run_dir.is_dir()


# --- arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "numbers"), [("0", [0]), ("0-4", [0, 1, 2, 3, 4]), ("0,2,5", [0, 2, 5]),
                                               ("7, 1-2", [7, 1, 2]), ("3-3", [3]), ("1..3,7", [1, 2, 3, 7])])
def test_seeds(text: str, numbers: list[int]) -> None:
    """Numbers and spans, in the order they are written."""
    assert seeds.parse(text) == numbers


@pytest.mark.parametrize("text", ["0-100000", "", "a", "4-1", "1-", "-1", "1...3", "3..1", "0,0", "0-3,2"])
def test_no_seeds(text: str) -> None:
    """Anything else is refused, and a seed given twice, whose two jobs would share a run directory."""
    with pytest.raises(UserError, match="--seeds"):
        seeds.parse(text, what="--seeds")


def test_array(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """--seeds is one job array: a run directory, a snapshot and a log for each seed, by its place in the array."""
    out, _ = said(recipe, "--seeds", "0,3,5", "--parallel", "2", "-t", "1h")
    assert fake_slurm.submitted == 1
    found, runs = keys(fake_slurm.script), run_dir.parent
    assert found["array"] == "0-2%2"
    assert found["job-name"] == "small"
    assert found["output"] == f"{runs}/small-seeds/slurm/%A_%a_0_log.out"
    frozen = [next((runs / f"small-seed{seed}" / "snapshots").iterdir()) for seed in (0, 3, 5)]
    assert f"SNAPSHOTS=({' '.join(map(str, frozen))})" in fake_slurm.script.splitlines()
    for number, (seed, path) in enumerate(zip((0, 3, 5), frozen, strict=True)):
        frozen_recipe = recipes.load(path / "recipe.yaml")
        assert (frozen_recipe.seed, frozen_recipe.name) == (seed, f"small-seed{seed}")
        run = runs / f"small-seed{seed}"
        [told] = read_attempts(run)
        assert (told["job"], told["array"]) == ("77", f"77_{number}")
        (runs / "small-seeds" / "slurm" / f"77_{number}_0_log.out").write_text(f"log {seed}")
        assert (run / "slurm" / f"77_{number}_0_log.out").read_text() == f"log {seed}"
        assert (runs / "small-seeds" / "slurm" / f"77_{number}_submitted.pkl").exists()
    assert "submitted job 77, a job array of 3: one task, 1h at a time" in out


def test_array_by_an_override(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """seed=0..2 says the same as --seeds 0-2: a job a seed."""
    out, _ = said(recipe, "seed=0..2")
    assert "a job array of 3" in out and keys(fake_slurm.script)["array"].startswith("0-2")
    assert [next((run_dir.parent / f"small-seed{seed}" / "snapshots").iterdir()).exists() for seed in range(3)]


def test_array_of_one(fake_slurm: Slurm, recipe: str, said: Said) -> None:
    """A single seed is a plain job."""
    out, _ = said(recipe, "--seeds", "4")
    assert "array" not in keys(fake_slurm.script)
    assert "runs/small-seed4" in out


def test_array_leaves_finished_out(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """Of an array submitted again, the seeds that are finished are said to be, and left out."""
    path = run_dir.parent / "small-seed1"
    (path.parent).mkdir()
    said(recipe, "--seeds", "0-2", "--dry-run")
    (run_dir.parents[1] / "one.yaml").write_text(Path(recipe).read_text() + "seed: 1\nname: small-seed1\n")
    trained(path, str(run_dir.parents[1] / "one.yaml"), status="finished")
    _, err = said(recipe, "--seeds", "0-2")
    assert "small-seed1 is finished" in err
    assert keys(fake_slurm.script)["array"] == "0-1%2"
    assert "small-seed1" not in fake_slurm.script


# --- the environment of sbatch ----------------------------------------------------------------------------------


def test_variables_that_overrule(fake_slurm: Slurm, recipe: str, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables by which sbatch would overrule what the script says are not given to it; others are."""
    for name, value in (("SIGNAL", "B:USR1@5"), ("NO_REQUEUE", "1"), ("OPEN_MODE", "t"), ("WAIT", "1"),
                        ("PARTITION", "x"), ("TIMELIMIT", "3"), ("GRES", "gpu:1"), ("ACCOUNT", "mine"),
                        ("RESERVATION", "r")):
        monkeypatch.setenv(f"SBATCH_{name}", value)
    said(recipe, "-p", "gpu", "-t", "1h", "--gpus-per-node", "2")
    got = {name: value for name, value in fake_slurm.environment("sbatch").items() if name.startswith("SBATCH_")}
    assert got == {"SBATCH_ACCOUNT": "mine", "SBATCH_RESERVATION": "r"}
    assert os.environ["SBATCH_SIGNAL"] == "B:USR1@5"


def test_from_inside_a_job(fake_slurm: Slurm, recipe: str, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitted from inside a job, nothing of that job reaches the new one; where the cluster is, does."""
    for name, value in (("SLURM_JOB_ID", "5"), ("SLURM_NTASKS", "3"), ("SLURM_CONF", "/x/slurm.conf"), ("RANK", "0"),
                        ("SUBMITIT_EXECUTOR", "slurm")):
        monkeypatch.setenv(name, value)
    said(recipe)
    got = fake_slurm.environment("sbatch")
    assert {name for name in got if name.startswith(("SLURM_", "SUBMITIT_", "RANK"))} == {"SLURM_CONF"}
    assert os.environ["SLURM_NTASKS"] == "3"


# --- the plan ---------------------------------------------------------------------------------------------------


def config_of(**checkpoint: Any) -> recipes.Config:
    return recipes.build({"data": {"train": "d"}, "global_batch": 100,
                          "checkpoint": {"minutes": None, "epochs": None, **checkpoint}})


@pytest.mark.parametrize(("checkpoint", "rate", "said_"), [
    ({"minutes": 10}, 2000.0, "at most 10 min (checkpoint.minutes) of training. 10 min are 1,200,000 images at the "
     "2,000 a second that it last made."),
    ({"minutes": 10}, None, "How many images that is will be known once the run has trained."),
    ({"steps": 50}, 2000.0, "at most 50 steps (checkpoint.steps; 5,000 images) of training."),
    ({"epochs": 2}, None, "at most 2 epochs (checkpoint.epochs) of training."),
    ({"minutes": 5, "epochs": 1}, None, "at most 5 min (checkpoint.minutes), or 1 epoch (checkpoint.epochs), which"),
    ({}, None, "costs all that was trained: set checkpoint.minutes."),
])
def test_interval_cost(checkpoint: dict[str, Any], rate: float | None, said_: str) -> None:
    """What an end without a warning costs: the interval, in images where the run's rate is known."""
    assert said_ in " ".join(plan.interval_cost(config_of(**checkpoint), rate=rate))


def test_rate() -> None:
    """The rate is the mean of the newest records that have one."""
    assert plan.rate_of([{"images_per_second": 100.0}, {"loss": 1}, {"images_per_second": 300}]) == 200
    assert plan.rate_of([]) is None


def test_plan(fake_slurm: Slurm, recipe: str, run_dir: Path, said: Said) -> None:
    """The plan names signal, lead, who requeues, caps, this cluster's preemption, and what a lost interval costs."""
    trained(run_dir, recipe)
    record = {"kind": "train", "step": 30, "images_per_second": 500.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    out = said(recipe, "-t", "4h", "--dry-run")[0]
    for words in ("4h at a time; USR2 to all ranks 2m before its end", "asks `scontrol requeue`",
                  "this cluster has preempt_send_user_signal", f"at most {Caps().failures} in a row",
                  f"{Caps().stalled} attempts in a row without a new step", "300,000 images at the 500 a second",
                  "scancel", "goes on from step 30", "nothing was submitted"):
        assert words in out


@pytest.mark.parametrize(("site", "words"), [
    (None, "USR2 where the cluster sends it"),
    ({"PreemptType": "preempt/none"}, "This cluster preempts no jobs."),
    ({"PreemptType": "preempt/qos"}, "TERM (this cluster sends no user signal)"),
    ({"PreemptType": "preempt/qos", "PreemptParameters": "send_user_signal,reorder_count=2,preempt_send_user_signal"},
     "USR2 (this cluster has"),
])
def test_plan_of_preemption(site: dict[str, str] | None, words: str) -> None:
    """What a preemption looks like is said for this very cluster where it can be asked."""
    lines = plan.requeue_plan(Request(), config_of(minutes=10), caps=Caps(), cluster="slurm", limit=None, site=site,
                              rate=None)
    assert words in "\n".join(lines)


# --- following --------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks and questions come a hundred times as often."""
    for name in ("LOOK", "ASK", "ASK_SOON"):
        monkeypatch.setattr(follow, name, getattr(follow, name) / 100)


@pytest.fixture
def later() -> Iterator[Callable[[float, Callable[[], object]], None]]:
    """Does something in so many seconds, in the background."""
    timers: list[threading.Timer] = []

    def do(seconds: float, act: Callable[[], object]) -> None:
        timers.append(threading.Timer(seconds, act))
        timers[-1].start()

    yield do
    for timer in timers:
        timer.cancel()
        timer.join()


Later = Callable[[float, Callable[[], object]], None]


def test_follow(fake_slurm: Slurm, tmp_path: Path, quick: None, later: Later,
                capfd: pytest.CaptureFixture[str]) -> None:
    """The log is shown as it grows, over a lost node and a requeue, until the job is over."""
    run = Followed(tmp_path, tmp_path / "log", "77")

    def attempt(text: str, *, state: str, **told: Any) -> None:
        with run.log.open("a") as file:
            file.write(text)
        replace_state(tmp_path, told)
        fake_slurm.queue(("77", state))

    fake_slurm.queue(("77", "PENDING"))
    later(0.3, lambda: attempt("first\n", state="RUNNING", status="running"))
    later(0.4, lambda: attempt("lost ", state="NODE_FAIL", status="running"))
    later(0.5, lambda: attempt("node\n", state="PENDING", status="running"))
    later(0.6, lambda: attempt("second\n", state="RUNNING", status="running"))
    later(0.7, lambda: attempt("end", state="COMPLETED", status="finished"))
    assert follow.follow([run]) == EXIT_FINISHED
    out, err = capfd.readouterr()
    assert out == "first\nlost node\nsecond\nend"
    assert err.startswith("alexnet-ddp: job 77 is pending\n")


def queued(state: str) -> Queued:
    return Queued("77", "77", "a", state, "", "gpu", None, "")


def test_what_is_over(tmp_path: Path) -> None:
    """A job that looks dead is over at once where that is final, and after a while where Slurm may bring it back."""
    for state, final in (("PENDING", False), ("RUNNING", False), ("COMPLETING", False), ("CONFIGURING", False),
                         ("COMPLETED", True), ("CANCELLED", True), ("FAILED", True), ("TIMEOUT", True)):
        run = Followed(tmp_path, tmp_path / "log", "77")
        run.judge(queued(state), now=0.0)
        assert run.over == final, state
    run = Followed(tmp_path, tmp_path / "log", "77")
    for now, state, over in ((0, "NODE_FAIL", False), (29, "NODE_FAIL", False), (30, "PENDING", False),
                             (31, "PREEMPTED", False), (60, "PREEMPTED", False), (62, "NODE_FAIL", True)):
        run.judge(queued(state), now=now)
        assert run.over == over, (now, state)
    run = Followed(tmp_path, tmp_path / "log", "77")
    run.judge(None, now=0.0)  # Slurm doesn't know it any more
    assert run.over


@pytest.mark.parametrize(("told", "code"), [
    ({"status": "finished"}, EXIT_FINISHED), ({"status": "preempted"}, EXIT_STOPPED),
    ({"status": "failed"}, EXIT_FAILED), ({}, EXIT_FAILED),
    ({"status": "failed", "failure": {"kind": "user"}}, EXIT_USER),
    ({"status": "failed", "requeue": {"cause": "user error"}}, EXIT_USER)])
def test_exit_code(tmp_path: Path, told: dict[str, Any], code: int) -> None:
    """A followed run's exit code is that of `alexnet-ddp train`."""
    replace_state(tmp_path, told)
    assert Followed(tmp_path, tmp_path / "log", "77").exit_code() == code


def test_follow_several(fake_slurm: Slurm, tmp_path: Path, quick: None, capfd: pytest.CaptureFixture[str]) -> None:
    """Several logs are shown line by line with their run's name; one that is over doesn't end the others."""
    runs = []
    for number in range(2):
        run = tmp_path / f"run{number}"
        run.mkdir()
        replace_state(run, {"status": "finished"})
        (run / "log").write_text(f"a{number}\nb{number}")
        runs.append(Followed(run, run / "log", f"77_{number}", label=run.name))
    fake_slurm.queue(("77_0", "COMPLETED"), ("77_1", "COMPLETED"))
    assert follow.follow(runs) == EXIT_FINISHED
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["run0| a0", "run0| b0", "run1| a1", "run1| b1"]


def test_follow_without_a_queue(fake_slurm: Slurm, tmp_path: Path, quick: None, later: Later) -> None:
    """Where Slurm can't be asked, the run's own word on its end counts: the last decision of the batch shell."""
    fake_slurm.put("squeue", "", code=1, error="squeue: error: Unable to contact slurm controller\n")
    replace_state(tmp_path, {"status": "failed", "requeue": {"decision": "requeue", "job": "77"}})
    later(0.5, lambda: replace_state(tmp_path, {"status": "failed", "requeue": {"decision": "stop", "job": "77"}}))
    began = time.monotonic()
    assert follow.follow([Followed(tmp_path, tmp_path / "log", "77")]) == EXIT_FAILED
    assert time.monotonic() - began >= 0.4


def test_interrupt_stops_following_only(fake_slurm: Slurm, recipe: str, run_dir: Path) -> None:
    """Ctrl-C ends the following with 130 and says that the job goes on; nothing is cancelled."""
    fake_slurm.queue(("77", "RUNNING"))
    process = subprocess.Popen([sys.executable, "-m", "launch.submit", recipe, "--follow"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               preexec_fn=harness.listen)
    assert process.stdout is not None
    for line in process.stdout:
        if "STOP" in line:
            break
    while not (fake_slurm.folder / "squeue.calls").exists() and process.poll() is None:
        time.sleep(0.05)  # it is following once it asks for the job
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == EXIT_INTERRUPTED
    assert err.splitlines()[-1] == "alexnet-ddp: no longer following; job 77 goes on. To stop it: scancel 77"
    assert not (fake_slurm.folder / "scancel.calls").exists()


# --- this machine -----------------------------------------------------------------------------------------------


def test_detached() -> None:
    """What is started in the background is in a session of its own, and holds none of our streams open."""
    def start() -> str:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
        return str(child.pid)

    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    pid = int(executors.detached(start))
    try:
        assert os.getsid(pid) != os.getsid(0)
        assert all(os.readlink(f"/proc/{pid}/fd/{stream}") == "/dev/null" for stream in (0, 1, 2))
        assert follow._lives(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_detached_failure() -> None:
    """What keeps it from starting is told."""
    def fail() -> str:
        raise OSError("no more processes")

    with pytest.raises(UserError, match="can't be started on this machine: OSError: no more processes"):
        executors.detached(fail)


def test_local(recipe: str, run_dir: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine submitit's local executor gets the frozen code, the size, the times, and blocked signals."""
    seen: dict[str, Any] = {}

    class Executor:
        def __init__(self, folder: Path, *, python: str) -> None:
            seen.update(folder=folder, python=python, path=os.environ["PYTHONPATH"])

        def update_parameters(self, **parameters: Any) -> None:
            seen.update(parameters)

        def submit(self, task: executors.Task) -> Any:
            seen.update(snapshots=task.snapshots, job=os.environ.get("SLURM_JOB_ID"))
            return argparse.Namespace(job_id=4321)

    monkeypatch.setattr(executors.submitit, "LocalExecutor", Executor)
    monkeypatch.setattr(executors, "detached", lambda act: act())
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    out, _ = said(recipe, "--cluster", "local", "--gpus-per-node", "2", "--time", "10m", "--lead-time", "30s")
    [frozen] = map(str, (run_dir / "snapshots").iterdir())
    assert seen == {
        "folder": run_dir / "slurm", "path": f"{frozen}:/mine", "snapshots": [frozen], "job": None,
        "python": f"{sys.executable} -P -m launch.block {sys.executable} -P", "timeout_min": 10.0, "signal_delay_s": 30,
        "tasks_per_node": 2, "gpus_per_node": 2, "visible_gpus": [2, 3], "stderr_to_stdout": True}
    assert os.environ["PYTHONPATH"] == "/mine"
    assert "submitted process 4321 on this machine: 1 node x 2 tasks with one GPU each, 10m at a time" in out
    assert "runs/small/slurm/4321_0_log.out" in out


def test_local_dry_run(no_slurm: None, recipe: str, said: Said) -> None:
    """The plan for this machine says who starts it again; there is no script."""
    out, err = said(recipe, "--cluster", "local", "--tasks-per-node", "2", "--dry-run")
    assert "#SBATCH" not in out
    assert "submitit's local executor starts them again" in out
    assert "Slurm" not in err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit leaves its logs open
def test_debug(recipe: str, run_dir: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """--cluster debug runs in this process, on the snapshot's recipe, and leaves with the run's code."""
    seen: list[str] = []

    class Task:
        def __init__(self, snapshots: list[str]) -> None:
            self.snapshots = snapshots

        def __call__(self) -> int:
            seen.extend([*self.snapshots, os.environ.get("SLURM_JOB_ID", "none")])
            raise SystemExit(EXIT_STOPPED)

    monkeypatch.setattr(executors, "Task", Task)
    monkeypatch.setenv("SLURM_JOB_ID", "5")  # an interactive allocation isn't this run's
    said(recipe, "--cluster", "debug", code=EXIT_STOPPED)
    [frozen] = (run_dir / "snapshots").iterdir()
    assert seen == [str(frozen), "none"]
