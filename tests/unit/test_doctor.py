"""`alexnet-ddp doctor slurm`: what is said of a recorded cluster, and of clusters that are set up otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.findings import Finding
from launch import cluster, doctor
from launch.findings import Qos, Site, findings, parse_qos

RECORDED = Path(__file__).parent / "recorded" / "slurm_22_05"
CONFIG = cluster.parse_config((RECORDED / "config.txt").read_text())
LOW, HIGH = cluster.parse_partitions((RECORDED / "partitions.txt").read_text())


def told(site: Site) -> dict[str, Finding]:
    """Findings by topic; no topic comes twice."""
    found = findings(site)
    by_topic = {finding.topic: finding for finding in found}
    assert len(by_topic) == len(found)
    return by_topic


def site(*, low: dict[str, object] | None = None, qos: list[Qos] | None = None, **changes: str) -> Site:
    """The recorded cluster with some settings replaced."""
    return Site({**CONFIG, **changes}, [replace(LOW, **(low or {})), HIGH], qos)  # type: ignore[arg-type]


def test_recorded_cluster() -> None:
    """Of the recorded cluster: user signal, a short grace, a quick requeue, no accounting, no binding."""
    found = told(site())
    assert {topic: finding.level for topic, finding in found.items()} == {
        "time limit of low, high": "ok", "EnforcePartLimits=NO": "note", "CPUs": "note", "processes": "ok",
        "preemption in low": "note", "preemption in high": "ok", "KillWait": "note", "a lost node": "ok",
        "JobRequeue=1": "ok", "requeue delay": "ok", "accounting": "note"}
    low = found["preemption in low"]
    assert low.meaning.startswith("the user signal and a GraceTime of 20 s")
    assert "20 s: checkpoint.minutes=5" in low.advice
    assert found["time limit of low, high"].advice == "--time 1-00:00:00 or less"
    assert "waits 5 s at least (cred_expire)" in found["requeue delay"].meaning
    assert "1 hour after its end" in found["accounting"].meaning


@pytest.mark.parametrize(("signal", "grace", "mode", "level", "words", "advice"), [
    (True, 300, "REQUEUE", "ok", "the user signal and a GraceTime of 300 s", ""),
    (True, 29, "REQUEUE", "note", "the user signal and a GraceTime of 29 s", "checkpoint.minutes=5"),
    (False, 300, "REQUEUE", "ok", "TERM (no preempt_send_user_signal; TERM serves as well) and a GraceTime", ""),
    (False, 0, "REQUEUE", "warn", "TERM only, GraceTime 0 s, then KILL after KillWait (5 s)", "checkpoint.minutes=5"),
    (True, 0, "REQUEUE", "warn", "the user signal and TERM at once, GraceTime 0 s", "checkpoint.minutes=5"),
    (True, 300, "CANCEL", "note", "Slurm itself would cancel it (PreemptMode=CANCEL)", ""),
    (False, 0, "CANCEL", "warn", "checkpoints hold. Slurm itself would cancel it", "checkpoint.minutes=5"),
    (True, 300, "SUSPEND,GANG", "note", "suspended in memory, with its GPUs", ""),
    (True, 300, "OFF", "ok", "none", ""),
])
def test_preemption(signal: bool, grace: float, mode: str, level: str, words: str, advice: str) -> None:
    """Every way to be preempted: what comes, how long there is, and whether only periodic checkpoints hold."""
    parameters = "cloud_dns,preempt_send_user_signal" if signal else "cloud_dns"
    found = told(site(low={"grace": float(grace), "preempt_mode": mode}, SlurmctldParameters=parameters))
    low = found["preemption in low"]
    assert low.level == level
    assert words in low.meaning
    assert advice in low.advice and bool(advice) == bool(low.advice)


def test_user_signal_of_newer_slurm() -> None:
    """The user signal is found under both of its names, and not within another word."""
    assert site().user_signal
    assert site(SlurmctldParameters="(null)", PreemptParameters="youngest_first,send_user_signal").user_signal
    assert not site(SlurmctldParameters="no_preempt_send_user_signal", PreemptParameters="(null)").user_signal


def test_no_preemption() -> None:
    """A cluster that doesn't preempt says so once."""
    found = told(site(PreemptType="preempt/none", PreemptMode="OFF"))
    assert found["preemption"].level == "ok"
    assert not [topic for topic in found if topic.startswith("preemption in")]


def test_preemption_by_quality_of_service() -> None:
    """By QOS, its own mode and grace count, those of the partition don't; unknown ones are a reason for caution."""
    qos = parse_qos("normal|cluster|00:00:00\nscavenger|requeue|00:05:00\nspot|requeue|00:05:00\nhigh|off|00:00:00\n|")
    found = told(site(qos=qos, PreemptType="preempt/qos"))
    assert found["preemption in QOS normal"].level == "warn"
    assert "300 s" in found["preemption in QOS scavenger, spot"].meaning
    assert found["preemption in QOS high"].meaning.startswith("none")
    unknown = told(site(PreemptType="preempt/qos"))["preemption"]
    assert (unknown.level, "checkpoint.minutes" in unknown.advice) == ("note", True)


@pytest.mark.parametrize(("changes", "seconds", "source", "level"), [
    ({"AuthInfo": "(null)"}, 120, "cred_expire", "note"),
    ({"AuthInfo": "socket=/run/munge.socket.2,cred_expire=300"}, 300, "cred_expire", "note"),
    ({"AuthInfo": "cred_expire=30"}, 30, "cred_expire", "ok"),
    ({"AuthInfo": "(null)", "SchedulerParameters": "bf_interval=3,requeue_delay=10"}, 10, "requeue_delay", "ok"),
])
def test_requeue_delay(changes: dict[str, str], seconds: int, source: str, level: str) -> None:
    """How long a requeued job waits, from where the Slurm at hand has it; 120 s by default."""
    found = told(site(**changes))["requeue delay"]
    assert (f"{seconds} s at least ({source})" in found.meaning, found.level) == (True, level)


@pytest.mark.parametrize(("changes", "topic", "level", "words"), [
    ({"JobRequeue": "0"}, "JobRequeue=0", "ok", "`submit` and the scripts do"),
    ({"RequeueExit": "1-9,18"}, "RequeueExit", "warn", "ends with 1, 2, also one"),
    ({"RequeueExitHold": "75"}, "RequeueExitHold", "warn", "requeues and holds a job that ends with 75"),
    ({"KillWait": "30 sec"}, "KillWait", "ok", "30 s from TERM to KILL"),
    ({"OverTimeLimit": "10 min"}, "OverTimeLimit", "ok", "by 10 min"),
    ({"OverTimeLimit": "UNLIMITED"}, "OverTimeLimit", "ok", "by UNLIMITED"),
    ({"SlurmdTimeout": "0 sec"}, "a lost node", "note", "never given up"),
    ({"TaskPlugin": "task/cgroup,task/affinity"}, "CPUs", "ok", "one, where nothing was"),
    ({"ProctrackType": "proctrack/linuxproc"}, "processes", "note", "proctrack/linuxproc"),
    ({"AccountingStorageType": "accounting_storage/slurmdbd"}, "accounting", "ok", "long after its end"),
    ({"PrivateData": "jobs,usage"}, "PrivateData", "note", "your own jobs alone"),
    ({"SelectTypeParameters": "CR_CORE_MEMORY"}, "memory", "note", "all of its nodes'"),
    ({"SelectTypeParameters": "CR_CPU_MEMORY", "DefMemPerNode": "UNLIMITED", "DefMemPerCPU": "4000"}, "memory", "note",
     "4000"),
    ({"JobSubmitPlugins": "lua"}, "job_submit", "note", "(lua)"),
    ({"MaxArraySize": "1"}, "job arrays", "warn", "--seeds"),
    ({"GresTypes": "(null)"}, "GPUs", "warn", "schedules none"),
])
def test_settings(changes: dict[str, str], topic: str, level: str, words: str) -> None:
    """Each setting that matters to a run is told with what it means; it is not told of the recorded cluster."""
    found = told(site(**changes))[topic]
    assert (found.level, words in found.meaning) == (level, True), found.meaning
    assert found != told(site()).get(topic)


@pytest.mark.parametrize(("limit", "words", "time"), [
    (86400.0, "1 day", "1-00:00:00"), (2 * 86400.0, "2 days", "2-00:00:00"), (5400.0, "90 minutes", "01:30:00"),
    (14400.0, "4 hours", "04:00:00")])
def test_time_limits(limit: float, words: str, time: str) -> None:
    """A partition's limit is told in words, and as --time takes it; one that is down tells of none."""
    found = told(Site({}, [replace(LOW, max_time=limit), replace(HIGH, up=False)]))["time limit of low"]
    assert found.meaning.startswith(f"{words}. ")
    assert found.advice == f"--time {time} or less"
    assert told(Site({}, [replace(LOW, max_time=None)]))["time limit of low"].meaning.startswith("none")


def test_nothing_known_raises_nothing() -> None:
    """A configuration that tells nothing, or rubbish, is told of all the same."""
    assert findings(Site({}))
    assert doctor.page(Site(dict.fromkeys(CONFIG, "?!=,"), [], []))


def test_page_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints partitions and findings in 100 columns, from Slurm's commands; without them it teaches."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="login node"):
        doctor.main(["slurm"])
    body = '#!/bin/bash\nwhile read -r line; do echo "$line"; done <"{}"\n'
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[ "$2" = config ] && file=config || file=partitions\n'
                                       + body.format(f"{RECORDED}/$file.txt").removeprefix("#!/bin/bash\n"))
    (tmp_path / "sinfo").write_text(body.format(RECORDED / "nodes.txt"))
    for name in ("scontrol", "sinfo"):
        (tmp_path / name).chmod(0o755)
    assert doctor.main(["slurm"]) == EXIT_FINISHED
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["Slurm 22.05.8, cluster lab", "  partition low (default): 4 x (8 CPUs, 2 GPUs)",
                         "  partition high: 4 x (8 CPUs, 2 GPUs)"]
    assert max(map(len, lines)) <= 100
    with pytest.raises(UserError, match="alexnet-ddp doctor --help"):
        doctor.main(["disk"])
