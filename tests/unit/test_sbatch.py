"""slurm/*.sbatch: the lines of launch.batch, and what they do with a Slurm of a few scripts on PATH."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from alexnet_ddp.errors import EXIT_FINISHED, EXIT_STOPPED, EXIT_USER
from alexnet_ddp.runfiles import read_attempts, read_state
from launch import batch, snapshot

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
NAMES = ["nodes.sbatch", "one_node.sbatch", "seeds.sbatch", "torchrun.sbatch"]

scripts = pytest.mark.parametrize("name", NAMES)

# srun: tells what it was given, does what the test wants the ranks to do, and leaves with their code.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$FAKE/srun.$((++n))"
echo "PYTHONPATH=$PYTHONPATH" > "$FAKE/environment"
{ranks}
"""
# scontrol: knows the job as running, and keeps what it was asked to do.
SCONTROL = """#!/bin/bash
echo "$@" >> "$FAKE/scontrol"
[ "$1" = show ] && echo "JobId=12 JobName=x UserId=ada(1000) GroupId=ada(1000) JobState=RUNNING Reason=None Requeue=1 \
Restarts=${SLURM_RESTART_COUNT:-0} TimeLimit=08:00:00 EndTime=2036-01-01T00:00:00 PreemptTime=None Partition=gpu"
exit 0
"""
# What rank 0 would have written when the ranks agreed to stop.
STOPPED = """cat > "$FAKE/runs/one/state.json" <<END
{{"status": "preempted", "why": "USR2", "step": 5, "job": "$SLURM_JOB_ID", "restart": ${{SLURM_RESTART_COUNT:-0}}}}
END
exit 75"""

Start = Callable[..., subprocess.CompletedProcess[str]]


def lines(name: str) -> list[str]:
    return (ROOT / "slurm" / name).read_text().splitlines()


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a script as Slurm would, its first lines edited as a user would edit them."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "recipe.yaml").write_text((ROOT / "configs" / "demo.yaml").read_text())

    def put(name: str, text: str) -> None:
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(name: str, *, ranks: str = "exit 0", restart: int = 0, config: str = "recipe.yaml",
            edit: Callable[[str], str] = str, **environment: str) -> subprocess.CompletedProcess[str]:
        put("srun", SRUN.replace("{ranks}", ranks.replace("{{", "{").replace("}}", "}")))
        put("scontrol", SCONTROL)
        text = (ROOT / "slurm" / name).read_text()
        for pattern, value in ((r"^CONFIG=.*$", f"CONFIG={config}"), (r"^PYTHON=.*$", f"PYTHON={sys.executable}"),
                               (r"data\.train=\S+ data\.val=[^\s)]+", "runs=runs name=one")):
            text, count = re.subn(pattern, value, text, flags=re.MULTILINE)
            assert count == 1, pattern
        (tmp_path / name).write_text(edit(text))
        known = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PYTHONPATH"))}
        given = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "FAKE": str(tmp_path), "SLURM_GPUS_ON_NODE": "8",
                 "SLURM_CPUS_PER_TASK": "3", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                 "PYTHONPATH": str(ROOT), **environment}
        if restart:
            given["SLURM_RESTART_COUNT"] = str(restart)
        return subprocess.run(["bash", str(tmp_path / name)], cwd=tmp_path, env=known | given, capture_output=True,
                              text=True, timeout=100)

    return run


# --- the text ---------------------------------------------------------------------------------------------------


def test_these_are_all_scripts() -> None:
    """Every script in slurm/ is tested here."""
    assert [script.name for script in SCRIPTS] == NAMES


@scripts
def test_lines_are_those_of_submit(name: str) -> None:
    """The lines around srun are those that `alexnet-ddp submit` writes, in order, and nothing comes after them."""
    text = "\n".join(lines(name))
    before, after = "\n".join(batch.OPEN), "\n".join(batch.after())
    assert text.count(before) == text.count(after) == 1
    assert text.index(before) < text.index("\nsrun ") < text.index(after)
    between = text[text.index(before) + len(before):text.index(after)]
    assert len(between.strip().splitlines()) == 2, "srun is one command of two lines"
    assert text.endswith(after)


@scripts
def test_warning_requeue_and_log(name: str) -> None:
    """Each script asks for the warning, the requeue and an appended log; the lead time is the snapshot's default."""
    asked = {line for line in lines(name) if line.startswith("#SBATCH")}
    assert {"#SBATCH --signal=USR2@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= asked
    assert [line for line in asked if "signal" in line] == ["#SBATCH --signal=USR2@120"]


@scripts
def test_only_the_head_needs_editing(name: str) -> None:
    """What a user sets stands above the line that says so; bash accepts the script."""
    text = lines(name)
    (border,) = [number for number, line in enumerate(text) if line.startswith("# From here on")]
    settings = [number for number, line in enumerate(text) if re.match(r"#SBATCH|[A-Z_]+=", line)]
    below = {text[number].partition("=")[0] for number in settings if number > border}
    assert below == {"SNAPSHOT", "BLOCK"}
    assert max(map(len, text)) <= 120
    assert subprocess.run(["bash", "-n", str(ROOT / "slurm" / name)], capture_output=True).returncode == 0


def test_readme_tells_of_all() -> None:
    """slurm/README.md links every script, the picture and the docs, and all its links lead somewhere."""
    page = ROOT / "slurm" / "README.md"
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert {*NAMES, "timeline.svg", "../docs/slurm.md"} <= set(links)
    assert all((page.parent / link).exists() for link in links)
    ElementTree.parse(page.parent / "timeline.svg")


# --- what they do -----------------------------------------------------------------------------------------------


@scripts
def test_what_srun_starts(name: str, start: Start, tmp_path: Path) -> None:
    """srun gets the ranks (or an agent a node) with blocked signals, the cores asked for, and the frozen code."""
    done = start(name, SLURM_ARRAY_TASK_ID="3")
    assert done.returncode == EXIT_FINISHED, done.stderr
    run = tmp_path / "runs" / ("one" if name != "seeds.sbatch" else "alexnet_single-seed3")
    (place,) = (path for path in (run / "snapshots").iterdir())
    words = (tmp_path / "srun.1").read_text().splitlines()
    at = words.index("env")
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=3"} <= set(words[:at])
    agent = ["launch.agent", str(place), "--nproc-per-node", "8"]
    assert words[at:] == ["env", f"--block-signal={batch.SIGNALS}", sys.executable, "-P", "-u", "-m",
                          *(agent if name == "torchrun.sbatch" else ["launch.job", str(place)])]
    assert (name == "torchrun.sbatch") == ("--ntasks-per-node=1" in words)
    assert (tmp_path / "environment").read_text().startswith(f"PYTHONPATH={place}:")
    if name == "seeds.sbatch":
        assert "\nseed: 3\n" in (place / "recipe.yaml").read_text()


def test_stopped_and_requeued(start: Start, tmp_path: Path) -> None:
    """A warning: the job is requeued once srun is back, keeps srun's code, and starts again from the same snapshot."""
    done = start("one_node.sbatch", ranks=STOPPED)
    assert done.returncode == EXIT_STOPPED, done.stderr
    run = tmp_path / "runs" / "one"
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 12"
    assert read_state(run)["requeue"]["decision"] == "requeue"
    assert done.stderr.splitlines()[-1].startswith("alexnet-ddp: job 12 start 0 ended at step 0")
    (tmp_path / "recipe.yaml").write_text("being: [edited\n")
    again = start("one_node.sbatch", restart=1, ranks="exit 0")
    assert again.returncode == EXIT_FINISHED, again.stderr
    assert [(told["event"], told["job"], told["restart"]) for told in read_attempts(run)] == [
        ("begin", "12", 0), ("end", "12", 0), ("begin", "12", 1), ("end", "12", 1)]
    assert len(list((run / "snapshots").iterdir())) == 1
    (place,) = (run / "snapshots").iterdir()
    assert (tmp_path / "srun.1").read_text().splitlines()[-1] == str(place)


def test_bug_is_not_requeued(start: Start, tmp_path: Path) -> None:
    """Ranks that fail by a bug: the job ends with their code, and Slurm is not asked to bring it back."""
    done = start("nodes.sbatch", ranks="exit 1")
    assert done.returncode == 1
    assert "requeue" not in (tmp_path / "scontrol").read_text()
    assert read_state(tmp_path / "runs" / "one")["requeue"]["decision"] == "stop"


def test_mistake_in_the_recipe(start: Start, tmp_path: Path) -> None:
    """A recipe that is refused ends the job at once, with its reason, before srun and without a requeue."""
    done = start("one_node.sbatch", config="missing.yaml")
    assert (done.returncode, "missing.yaml" in done.stderr) == (EXIT_USER, True)
    assert not (tmp_path / "srun.1").exists() and not (tmp_path / "scontrol").exists()


def test_task_of_an_array_is_requeued_alone(start: Start, tmp_path: Path) -> None:
    """A task of the array over seeds asks for its own requeue, by its number in the array."""
    stopped = STOPPED.replace("runs/one", "runs/alexnet_single-seed3")
    done = start("seeds.sbatch", ranks=stopped, SLURM_JOB_ID="15", SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="3")
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 12_3"


def test_signals_do_not_end_the_shell(start: Start, tmp_path: Path) -> None:
    """TERM and USR2 to the batch shell itself while srun runs: it decides all the same, with srun's code."""
    done = start("one_node.sbatch", ranks="kill -TERM $PPID; kill -USR2 $PPID; sleep 0.2; " + STOPPED)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert read_attempts(tmp_path / "runs" / "one")[-1]["event"] == "end"


def test_in_a_container(start: Start, tmp_path: Path) -> None:
    """With another Python in the tasks, they block signals by our own module and srun gets its container."""
    def edit(text: str) -> str:
        text = re.sub(r"^TASK_PYTHON=.*$", "TASK_PYTHON=python3", text, flags=re.MULTILINE)
        return re.sub(r"^SRUN_ARGS=.*$", 'SRUN_ARGS=("--container-image=a b.sqsh")', text, flags=re.MULTILINE)

    done = start("one_node.sbatch", edit=edit)
    assert done.returncode == EXIT_FINISHED, done.stderr
    words = (tmp_path / "srun.1").read_text().splitlines()
    assert "--container-image=a b.sqsh" in words
    assert words[words.index("python3"):][:7] == ["python3", "-P", "-m", "launch.block", "python3", "-P", "-u"]


def test_snapshot_of_another_job_is_not_taken(start: Start, tmp_path: Path) -> None:
    """A new job freezes anew, though the run has a snapshot already."""
    start("one_node.sbatch")
    start("one_node.sbatch", SLURM_JOB_ID="13")
    jobs = [snapshot.load(path).job for path in sorted((tmp_path / "runs" / "one" / "snapshots").iterdir())]
    assert jobs == ["12", "13"]
