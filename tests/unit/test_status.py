"""`alexnet-ddp status`: the word for a run, the table, and that nothing in a run directory can make it raise."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

import harness
from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.lease import Lease
from alexnet_ddp.runfiles import Saved, add_attempt, replace_state
from launch import facts as reading
from launch import slurm, status
from launch.facts import Beat, Facts
from launch.slurm import Past, Queued
from launch.standing import Row, judge, span

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_800_000_000.0
ALIVE, SILENT, ELSEWHERE = Beat(alive=True, age=3), Beat(alive=False, age=3), Beat(alive=None, age=30)
OLD = Beat(alive=None, age=600)


def state(status: str, **more: Any) -> dict[str, Any]:
    return {"status": status, "why": "", "exact": True, "why_not_exact": "", "step": 40, "epoch": 1, "attempt": 2,
            "total_steps": 100, "job": "12", "restart": 0, "array": None, **more}


def queued(word: str, job: str = "12", reason: str = "", raw: str | None = None, nodes: str = "") -> Queued:
    return Queued(job=job, raw=raw or job, name="run", state=word, reason=reason, partition="gpu", start_time=None,
                  nodes=nodes)


def past(word: str, job: str = "12") -> Past:
    return Past(job=job, raw=job, state=word, exit_code="1:0", end_time=None, reason="")


def begin(restart: int = 0, job: str = "12", array: str | None = None) -> dict[str, Any]:
    return {"event": "begin", "job": job, "array": array, "restart": restart, "step": 0}


def row(**more: Any) -> Row:
    return judge(Facts(run_dir=Path("runs/one"), now=NOW, **more))


def requeue(decision: str) -> dict[str, Any]:
    return {"decision": decision, "cause": "walltime", "reason": "walltime; 20 new steps saved", "time": "now"}


SUBMITTED = {"event": "submit", "job": "12", "array": None}
MINE = {"jobs": ("12",)}
WORDS: dict[str, tuple[dict[str, Any], str, str]] = {
    # on this machine, without Slurm
    "an empty folder": ({}, "new", "not trained yet"),
    "running": ({"state": state("running", job=None), "beat": ALIVE}, "running", "^$"),
    "running on another host": ({"state": state("running", job=None), "beat": ELSEWHERE}, "running", "^$"),
    "saving": ({"state": state("running", job=None), "beat": ALIVE, "saving": True}, "saving", "^$"),
    "killed": ({"state": state("running", job=None), "beat": SILENT}, "lost", "without a word"),
    "killed on another host": ({"state": state("running", job=None), "beat": OLD}, "lost", "same command"),
    "killed, its lease gone": ({"state": state("running", job=None)}, "lost", "same command"),
    "Ctrl-C": ({"state": state("preempted", job=None, why="INT")}, "preempted", "stopped by INT; the same command"),
    "failed": ({"state": state("failed", job=None, why="alexnet-ddp: rank 1 on a: boom")}, "failed", "^rank 1 on a"),
    "finished": ({"state": state("finished", step=100)}, "finished", "^$"),
    "a state of a later version": ({"state": state("resting")}, "unknown", "resting"),
    "checkpoints but no state": ({"saved": Saved(3, Path("x"), NOW)}, "unknown", "missing"),
    # with Slurm
    "submitted": ({**MINE, "attempts": [SUBMITTED], "queued": [queued("PENDING", reason="Resources")]}, "queued",
                  r"PENDING \(Resources\)"),
    "submitted again": ({"jobs": ("13", "12"), "state": state("failed"), "attempts": [begin()],
                         "queued": [queued("PENDING", job="13")]}, "queued", "job 13"),
    "submitted, Slurm has a plan": ({**MINE, "attempts": [SUBMITTED],
                                     "queued": [replace(queued("PENDING"), start_time=NOW + 3600)]}, "queued",
                                    r"PENDING; Slurm expects to start it at 20\d\d-"),
    "a task of an array waits": ({"jobs": ("12_3",), "attempts": [{**SUBMITTED, "array": "12_3"}],
                                  "queued": [queued("PENDING", job="12_3", raw="15")]}, "queued", "12_3"),
    "first start": ({**MINE, "attempts": [begin()], "queued": [queued("RUNNING")]}, "starting", "have not begun"),
    "second start": ({**MINE, "state": state("preempted"), "attempts": [begin(0), begin(1)],
                      "queued": [queued("RUNNING")]}, "starting", "have not begun"),
    "a start after a lost node": ({**MINE, "state": state("running"), "attempts": [begin(0), begin(1)], "beat": ALIVE,
                                   "queued": [queued("RUNNING")]}, "starting", "have not begun"),
    "in a job": ({**MINE, "state": state("running"), "attempts": [begin()], "beat": ELSEWHERE,
                  "queued": [queued("RUNNING")]}, "running", "^$"),
    "in a task of an array": ({"jobs": ("12_3",), "state": state("running", job="15", array="12_3"), "beat": ELSEWHERE,
                               "queued": [queued("RUNNING", job="12_3", raw="15")]}, "running", "^$"),
    "in a job that doesn't beat": ({**MINE, "state": state("running"), "beat": OLD, "queued": [queued("RUNNING")]},
                                   "running", "no sign of life for 10m"),
    "suspended": ({**MINE, "state": state("running"), "beat": OLD, "queued": [queued("SUSPENDED")]}, "suspended", ""),
    "ending": ({**MINE, "state": state("running"), "beat": ELSEWHERE, "queued": [queued("COMPLETING")]}, "ending", ""),
    "saved, the batch shell decides": ({**MINE, "state": state("preempted", why="USR2"), "attempts": [begin()],
                                        "queued": [queued("RUNNING")]}, "preempted", "^stopped by USR2$"),
    "requeued": ({**MINE, "state": state("preempted", why="USR2", requeue=requeue("requeue")),
                  "queued": [queued("PENDING", reason="BeginTime")]}, "requeued", r"PENDING \(BeginTime\)"),
    "requeued by Slurm, its node lost": ({**MINE, "state": state("running"), "attempts": [begin()], "beat": OLD,
                                          "queued": [queued("PENDING")]}, "requeued", "PENDING"),
    "requeued and held": ({**MINE, "state": state("failed"), "queued": [queued("REQUEUE_HOLD")]}, "requeued", "HOLD"),
    "cancelled while it waited": ({**MINE, "state": state("preempted", why="USR2", requeue=requeue("requeue")),
                                   "queued": [queued("CANCELLED", reason="BeginTime")]}, "preempted",
                                  "but job 12 is CANCELLED$"),
    "cancelled": ({**MINE, "state": state("preempted", why="TERM", requeue=requeue("slurm")), "queued": [],
                   "past": [past("CANCELLED")]}, "preempted", "stopped by TERM; job 12 is CANCELLED"),
    "not requeued": ({**MINE, "state": state("failed", why="a bug", requeue=requeue("stop")), "queued": []}, "failed",
                     "^a bug$"),
    "lost": ({**MINE, "state": state("running"), "beat": OLD, "queued": []}, "lost", "doesn't know job 12"),
    "lost, accounting knows": ({**MINE, "state": state("running"), "beat": OLD, "queued": [],
                                "past": [past("NODE_FAIL")]}, "lost", "job 12 is NODE_FAIL"),
    "gone without a start": ({**MINE, "attempts": [SUBMITTED], "queued": []}, "lost", "never trained"),
    # Slurm can't be asked
    "submitted, no squeue": ({**MINE, "attempts": [SUBMITTED]}, "queued", "can't be asked"),
    "in a job, no squeue": ({**MINE, "state": state("running"), "beat": ELSEWHERE}, "running", "^$"),
    "silent, no squeue": ({**MINE, "state": state("running"), "beat": OLD}, "lost", "can't be asked"),
    "requeued, no squeue": ({**MINE, "state": state("preempted", requeue=requeue("requeue"))}, "requeued", "be asked"),
    "requeued, no squeue, cancelled": ({**MINE, "state": state("preempted", requeue=requeue("requeue")),
                                        "past": [past("CANCELLED")]}, "preempted", "CANCELLED"),
}


# --- the judgement ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WORDS)
def test_word_and_why(case: str) -> None:
    """The state of a run in every situation, in the right word and with its reason."""
    known, word, why = WORDS[case]
    found = row(**known)
    assert (found.state, bool(re.search(why, found.why))) == (word, True), found.why


def test_progress_is_the_newest_known() -> None:
    """Step, epoch, speed and time left come from the newest of state, metrics of this attempt, and checkpoint."""
    records = [{"kind": "train", "step": step, "epoch": 3, "attempt": 2, "time": NOW + 2 * step,
                "images_per_second": 800.0} for step in (50, 60)]
    saved = Saved(40, Path(), NOW - 90)
    found = row(state=state("running", job=None), records=records, beat=ALIVE, epochs=5, saved=saved)
    assert (found.step, found.total_steps, found.epoch, found.epochs, found.images_per_second) == (60, 100, 4, 5, 800)
    assert (found.seconds_left, found.checkpoint_step, found.checkpoint_age) == (80.0, 40, 90.0)
    earlier = row(state=state("running", attempt=3, job=None), records=records, beat=ALIVE)
    assert (earlier.step, earlier.images_per_second) == (40, None), "what an earlier attempt reached was lost"
    over = row(state=state("finished", step=100), records=records, epochs=5)
    assert (over.step, over.seconds_left, over.images_per_second) == (100, None, None)


def test_exactness_and_requeues_are_told() -> None:
    """An inexact run says why; the last decision, the restarts and the nodes are told beneath the table's row."""
    found = row(jobs=("12",), state=state("running", exact=False, why_not_exact="decoder a -> b",
                                          requeue=requeue("requeue"), restart=4),
                attempts=[begin(4)], queued=[queued("RUNNING", nodes="n[1-2]")], beat=ELSEWHERE)
    assert (found.exact, found.why_not_exact, found.restarts) == (False, "decoder a -> b", 4)
    told = status.table([found])
    for words in ("not exact: decoder a -> b", "restarted 4 times, on n[1-2]",
                  "last end: walltime; requeued: 20 new steps saved"):
        assert words in told


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (86399, "23h59m"),
                                               (86400, "1d00h"), (10 * 86400 + 3600, "10d01h")])
def test_spans(seconds: float, text: str) -> None:
    """A length of time in six characters."""
    assert span(seconds) == text


@pytest.mark.parametrize(("told", "count"), [
    ({"train": 3, "evaluate": 1}, 4), ({"train": 0, "evaluate": 0}, 0), (None, None), (7, None), ({}, None),
    ({"train": "x"}, 0)])
def test_damaged_images_are_counted(told: object, count: int | None) -> None:
    """Images left out of training and evaluation are one number, with a line where they are listed; null: not known."""
    found = row(state=state("running", damaged=told))
    assert found.damaged == count
    assert [f"damaged images left out: {count}, " in line for line in status.notes(found)].count(True) == bool(count)


# --- printing ---------------------------------------------------------------------------------------------------


def big(name: str = "alexnet_single_a_very_long_name_with_an_end_seed3") -> Row:
    return replace(
        row(state=state("preempted", why="USR2 " * 40, step=449_999, total_steps=450_360), jobs=("123456789_1234",),
            epochs=90, saved=Saved(1, Path(), NOW - 10 * 86400)),
        name=name, images_per_second=123456.0, seconds_left=863000.0, attempt=123, restarts=99)


@pytest.mark.parametrize("width", [91, 100, 140])
def test_table_fits(width: int) -> None:
    """However long the names, reasons and numbers, no line is wider than the table, and the ends of names stay."""
    told = status.table([big(), row(), big("b" * 200)], width=width)
    assert max(map(len, told.splitlines())) <= width
    assert "seed3" in told and told.splitlines()[1].endswith("_1234")
    assert told.splitlines()[0].split() == list(status.HEADINGS)


def test_table_has_no_control_characters() -> None:
    """A name or a reason with escape sequences in it can't draw on the terminal."""
    told = status.table([replace(row(state=state("failed", why="a\x1b[2Jb\rc")), name="x\x1b[31m")])
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", told)


def test_json_keys_are_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json is a list of objects whose keys are those of docs/slurm.md."""
    (tmp_path / "runs" / "one").mkdir(parents=True)
    replace_state(tmp_path / "runs" / "one", state("finished"))
    assert status.main(["--json", "--runs", str(tmp_path / "runs")]) == EXIT_FINISHED
    (told,) = json.loads(capsys.readouterr().out)
    assert list(told) == [field.name for field in fields(Row)]
    page = (ROOT / "docs" / "slurm.md").read_text()
    assert [key for key in told if f"`{key}`" not in page] == []


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of runs, and a PATH without Slurm."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def look(runs: Path, *names: str) -> dict[str, Row]:
    found = reading.find(names, runs=runs)
    return {one.name: one for one in map(judge, reading.gather(found, reading.Cluster()))}


def put_run(runs: Path, name: str, told: dict[str, Any]) -> Path:
    (runs / name / "checkpoints").mkdir(parents=True)
    replace_state(runs / name, told)
    return runs / name


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"status": 3, "step": "x", "epoch": [], "job": {"a": 1}}',
    b'{"status": "running", "step": NaN, "total_steps": 0, "attempt": true, "requeue": [1]}',
    b'{"status": "failed", "why": {"a": 1}, "exact": "yes", "requeue": {"decision": 5, "reason": null}, "job": 7}',
    b'{"status": "preempted", "step": 1e400, "total_steps": ' + b"9" * 500 + b', "restart": "x"}',
])
@pytest.mark.parametrize("name", ["state.json", "attempts.jsonl", "metrics.jsonl", "lease.json", "config.yaml"])
def test_broken_files_never_raise(runs: Path, name: str, content: bytes) -> None:
    """Whatever stands in a run's files, there is a row, and it can be printed both ways."""
    run = put_run(runs, "one", state("running"))
    (run / name).write_bytes(content + b"\n" + content + b'\n{"kind": "train"}\n')
    if name == "state.json":
        (run / name).write_bytes(content)
    (found,) = look(runs).values()
    assert status.table([found])
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["name"] == "one"


def test_foreign_folders_never_raise(runs: Path) -> None:
    """Folders where files should be, files where folders should be, links to nowhere: there is a row."""
    for name in ("state.json", "attempts.jsonl", "metrics.jsonl", "lease.json", "config.yaml"):
        (runs / "folders" / name).mkdir(parents=True)
    (runs / "files").mkdir()
    for name in ("checkpoints", "snapshots", "slurm"):
        (runs / "files" / name).write_text("not a folder")
    place = runs / "links" / "checkpoints" / "step_00000001"
    place.mkdir(parents=True)
    (place / "manifest.json").symlink_to(runs / "nowhere")
    (runs / "links" / "state.json").symlink_to(runs / "nowhere")
    (runs / "a file").write_text("x")
    for name in ("folders", "files", "links"):
        assert status.table(list(look(runs, name).values()))


def test_without_names_all_runs(runs: Path) -> None:
    """Without RUN every folder that is a run's is listed, but none that is foreign or was put aside by --fresh."""
    for name in ("b", "a", "a.old-1"):
        put_run(runs, name, state("finished"))
    (runs / "notes").mkdir()
    (runs / "waiting" / "snapshots").mkdir(parents=True)
    assert list(look(runs)) == ["a", "b", "waiting"]
    assert list(look(runs, "a.old-1", str(runs / "b"))) == ["a.old-1", "b"]


def test_a_name_that_is_none(runs: Path) -> None:
    """A RUN that isn't there is a user's mistake, with the nearest name."""
    put_run(runs, "alexnet_single", state("finished"))
    with pytest.raises(UserError, match="Did you mean alexnet_single"):
        look(runs, "alexnet_singel")


def test_lease_of_a_living_and_a_dead_process(runs: Path) -> None:
    """A lease held here is alive; that of a process that was killed is not, at once."""
    run = put_run(runs, "one", state("running", job=None))
    lease = Lease.acquire(run, job=None, restart=0)
    assert look(runs)["one"].state == "running"
    lease.release()
    script = ("import sys, time; from alexnet_ddp.lease import Lease; from pathlib import Path; "
              "Lease.acquire(Path(sys.argv[1]), job=None, restart=0); print('held', flush=True); time.sleep(60)")
    held = subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, cwd=ROOT)
    assert held.stdout is not None and held.stdout.readline() == b"held\n"
    assert look(runs)["one"].state == "running"
    held.send_signal(signal.SIGKILL)
    held.wait()
    assert look(runs)["one"].state == "lost"


def test_jobs_of_a_run(runs: Path) -> None:
    """A run's jobs are those submitted, begun and in state.json, newest first; else those of submitit's folder."""
    run = put_run(runs, "one", state("failed", job=None))
    (run / "slurm").mkdir()
    for name, when in (("7_submission.sh", 1), ("9_submission.sh", 2), ("x_submission.sh", 3)):
        (run / "slurm" / name).write_text("")
        os.utime(run / "slurm" / name, (when, when))
    assert reading.gather([run], reading.Cluster())[0].jobs == ("9", "7")
    add_attempt(run, "begin", job="15", array="12_3", restart=0, step=0)
    add_attempt(run, "submit", job="20", array=None)
    assert reading.gather([run], reading.Cluster())[0].jobs == ("20", "12_3")


def test_only_the_end_of_metrics_is_read(runs: Path) -> None:
    """Of a long metrics file the last records are read, a line that is cut is left out."""
    run = put_run(runs, "one", state("running", job=None))
    lines = [json.dumps({"kind": "train", "step": step, "attempt": 2, "time": NOW + step, "pad": "x" * 200})
             for step in range(5000)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "train", "step": 99999')
    records = reading.gather([run], reading.Cluster())[0].records
    assert [record["step"] for record in records] == list(range(4980, 5000))


def test_slurm_is_asked_once_for_all_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One squeue for all runs, accounting only for what the queue doesn't know, and no second look within seconds."""
    asked: list[tuple[str, frozenset[str]]] = []

    def queue(jobs: Any, *, timeout: float) -> list[Queued]:
        asked.append(("squeue", frozenset(jobs)))
        return [queued("RUNNING", job="1"), queued("PENDING", job="2")]

    def history(jobs: Any, *, timeout: float) -> list[Past]:
        asked.append(("sacct", frozenset(jobs)))
        return [past("CANCELLED", job="3")]

    monkeypatch.setattr(slurm, "queue", queue)
    monkeypatch.setattr(slurm, "history", history)
    for name in ("1", "2", "3"):
        add_attempt(put_run(runs, f"run{name}", state("preempted", job=name)), "begin", job=name, restart=0)
    cluster, found = reading.Cluster(), reading.find([], runs=runs)
    rows = [judge(one) for _ in range(2) for one in reading.gather(found, cluster)][:3]
    assert asked == [("squeue", {"1", "2", "3"}), ("sacct", {"3"})]
    assert [one.job_state for one in rows] == ["RUNNING", "PENDING", "CANCELLED"]
    monkeypatch.setattr(reading, "ASK_EVERY", 0.0)
    reading.gather(found, cluster)
    assert asked[2:] == [("squeue", {"1", "2", "3"})], "accounting doesn't change its mind about what is over"


# --- the command ------------------------------------------------------------------------------------------------


def command(*words: str, runs: Path) -> list[str]:
    script = "import sys; from launch.status import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", script, *words, "--runs", str(runs)]


def test_imports_no_torch(runs: Path) -> None:
    """`status` and `doctor` import neither torch nor numpy: they answer at once on a login node."""
    script = "import sys, launch.status, launch.doctor; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert told.stdout.strip() == "[]", told.stderr


def test_watch_prints_what_changes(runs: Path) -> None:
    """Without a terminal --watch prints a row when it changes, with neither colours nor carriage returns."""
    put_run(runs, "still", state("finished", step=100))
    run = put_run(runs, "moving", state("preempted", job=None, why="INT"))
    watching = subprocess.Popen(command("--watch", runs=runs), stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                preexec_fn=harness.listen)
    assert watching.stdout is not None
    try:
        told = [watching.stdout.readline() for _ in range(4)]
        assert [line.split()[0] for line in told] == ["RUN", "moving", "stopped", "still"]
        time.sleep(0.5)
        replace_state(run, state("finished", job=None, step=100))
        assert watching.stdout.readline().split()[:3] == ["moving", "finished", "100/100"]
        watching.send_signal(signal.SIGINT)
        rest, _ = watching.communicate(timeout=20)
        assert (rest, watching.returncode) == ("", EXIT_FINISHED)
    finally:
        watching.kill()
        watching.wait()


def test_a_reader_that_leaves(runs: Path) -> None:
    """`status | head -1` ends without a traceback."""
    for number in range(500):
        put_run(runs, f"run{number:03}", state("preempted", job=None, why="INT " * 40))
    told = subprocess.Popen(command(runs=runs), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert told.stdout is not None and told.stderr is not None
    assert told.stdout.readline().startswith(b"RUN")
    told.stdout.close()
    assert (told.stderr.read(), told.wait(timeout=60)) == (b"", EXIT_FINISHED)


def test_mistakes_teach() -> None:
    """An unknown flag, and two that exclude each other, are user errors that name the command's help."""
    for words in (["--colour"], ["--watch", "--json"]):
        with pytest.raises(UserError, match="alexnet-ddp status --help"):
            status.main(words)
