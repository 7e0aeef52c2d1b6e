"""Preflight: what is impossible is refused with rule, found and fix; what isn't known to be is not."""

import re
from dataclasses import replace

import pytest

from launch import cluster, preflight
from launch.preflight import Cluster, Known, Request

HOUR = 3600.0

# As `scontrol show partition -o` (shortened) and `sinfo -h -e -o NODES` print them.
PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL Default=YES DefaultTime=01:00:00 GraceTime=60 MaxNodes=4 MaxTime=1-00:00:00 \
Nodes=g[1-6] PriorityTier=1 State=UP TotalNodes=6
PartitionName=cpu AllowGroups=ALL Default=NO DefaultTime=NONE GraceTime=0 MaxNodes=UNLIMITED MaxTime=UNLIMITED \
Nodes=c[1-2] PriorityTier=1 State=UP TotalNodes=2
PartitionName=old AllowGroups=ALL Default=NO DefaultTime=NONE GraceTime=0 MaxNodes=UNLIMITED MaxTime=02:00:00 \
Nodes=o1 PriorityTier=1 State=DOWN TotalNodes=1
"""
NODES = """\
gpu|4|64|512000|mixed|gpu:a100:8(S:0-1)
gpu|1|64|512000|drained|gpu:a100:8(S:0-1)
gpu|1|32|256000|idle|gpu:v100:4
cpu|2|48|192000|idle|(null)
old|1|8|32000|down*|gpu:2
"""
SITE = Cluster(
    partitions=[replace(partition, nodes=tuple(cluster.parse_nodes(NODES)[partition.name]))
                for partition in cluster.parse_partitions(PARTITIONS)],
    config={"MaxArraySize": "4", "JobRequeue": "1"})
NOTHING = Cluster()


def refused(request: Request, cluster: Cluster = SITE, known: Known | None = None) -> list[str]:
    return [str(refusal) for refusal in preflight.check(request, cluster, known=known).refusals]


# --- what is fine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [
    Request(),
    Request(nodes=4, gpus=8, tasks=8, cpus=8, limit=24 * HOUR),
    Request(gpus=4, tasks=4, gpu_type="v100", cpus=8),
    Request(gpus=1, gpus_per_task=1),
    Request(nodes=2, tasks=48, partitions=("cpu",), limit=1000 * HOUR, memory=192000.0),
    Request(nodes=2, tasks=4, partitions=("gpu", "cpu"), limit=48 * HOUR),  # cpu alone takes it, and that will do
    Request(nodes=5, limit=48 * HOUR, qos="long"),  # a QOS may lift the partition's limits
    Request(limit=135.0),
    Request(jobs=4),
], ids=str)
def test_possible(request_: Request) -> None:
    """What the cluster can do is not refused; nodes that are down just now count, for they come back."""
    assert refused(request_) == []


@pytest.mark.parametrize("request_", [
    Request(nodes=4000, gpus=80, tasks=80, gpu_type="h900", cpus=100, memory=1e9),
    Request(partitions=("whatever",), limit=10000 * HOUR), Request(jobs=100000)], ids=str)
def test_nothing_known(request_: Request) -> None:
    """Where Slurm can't be asked, nothing about the cluster is refused, and nothing is said."""
    assert preflight.check(request_, NOTHING) == preflight.Verdict()


# --- what is not ------------------------------------------------------------------------------------------------

TABLE = [
    (Request(gpus=4, tasks=2), "There is one task per GPU; found 2 tasks and 4 GPUs a node. "
     "Leave out --tasks-per-node, or ask for --gpus-per-node 2."),
    (Request(gpus=4, tasks=2, gpus_per_task=2), "A rank trains on one GPU, so a task has one; found --gpus-per-task 2. "
     "Use --gpus-per-node N"),
    (Request(limit=60.0, lead=50.0), "A job needs its lead time (50s) and 15 s to start in; found --time 1m. "
     "Use --time 2m or more (Slurm counts in minutes), or a shorter --lead-time."),
    (Request(lead=3600.0), "A job needs its lead time (1h) and 15 s to start in; found the default of partition gpu, "
     "1h."),
    (Request(limit=25 * HOUR), "Jobs in partition gpu end after 1-00:00:00 (MaxTime); found --time 1-01:00:00. "
     "Use --time 1-00:00:00: the run comes back after it, as often as it takes."),
    (Request(nodes=5), "Jobs in partition gpu have at most 4 nodes (MaxNodes); found --nodes 5. Use --nodes 4, or "
     "another partition."),
    (Request(nodes=3, partitions=("cpu",), gpus=9, tasks=9), "Partition cpu has 2 nodes; found --nodes 3. "
     "Use --nodes 2, or another partition."),
    (Request(gpus=16, tasks=16), "Partition gpu has no nodes with 16 GPUs each; found --gpus-per-node 16 on 1 node. "
     "The most that a node has is 8 GPUs: use more --nodes with fewer GPUs each."),
    (Request(partitions=("cpu",), gpus=1), "Partition cpu has no nodes with 1 GPU each; found --gpus-per-node 1 on "
     "1 node. Its nodes have no GPUs: use another partition."),
    (Request(nodes=2, gpus=4, tasks=4, gpu_type="v100"), "Partition gpu has 1 node with GPUs of type v100; found the "
     "type v100 on 2 nodes. Use --nodes 1 or fewer, or ask less of each."),
    (Request(gpus=1, gpu_type="h100"), "Partition gpu has no nodes with GPUs of type h100; found the type h100 on "
     "1 node. The types there are: a100, v100."),
    (Request(gpus=8, tasks=8, cpus=16), "Partition gpu has no nodes with 128 CPUs each; found --cpus-per-task 16 for "
     "each of 8 tasks on 1 node. The most that a node has is 64 CPUs: use --cpus-per-task 8 or less."),
    (Request(tasks=65), "Partition gpu has no nodes with 65 CPUs each; found one CPU for each of 65 tasks on 1 node. "
     "The most that a node has is 64 CPUs: use more --nodes with fewer tasks each."),
    (Request(partitions=("cpu",), memory=300000.0), "Partition cpu has no nodes with 300000 MB of memory each; found "
     "--mem 300000M on 1 node. The most that a node has is 192000 MB."),
    (Request(gpus=4, tasks=4, gpu_type="v100", cpus=16), "Partition gpu has no nodes with 4 GPUs and GPUs of type v100 "
     "and 64 CPUs; found --nodes 1 that ask for all of it. Ask less of each node."),
    (Request(partitions=("gpus",)), "A job goes to a partition of the cluster; found --partition gpus. "
     "Did you mean gpu?"),
    (Request(partitions=("x",)), "A job goes to a partition of the cluster; found --partition x. There are: gpu, cpu, "
     "old."),
    (Request(jobs=5), "A job array of this cluster has at most 4 tasks (MaxArraySize); found 5 seeds. Submit them in "
     "parts."),
]


@pytest.mark.parametrize(("request_", "said"), TABLE, ids=[said[:50] for _, said in TABLE])
def test_impossible(request_: Request, said: str) -> None:
    """Each rule refuses what breaks it, and only that: with what was found and what to write instead."""
    answers = refused(request_)
    assert len(answers) == 1
    assert answers[0].startswith(said)


def test_no_default_partition() -> None:
    """A cluster without a default partition wants one named."""
    site = Cluster(partitions=[replace(partition, default=False) for partition in SITE.partitions or ()])
    assert refused(Request(), site) == [
        "This cluster has no default partition, so a job has to name one; found none. Use --partition, or partition: "
        "in a profile. There are: gpu, cpu, old."]


def test_all_reasons_at_once() -> None:
    """Two rules that are broken are told together."""
    answers = refused(Request(nodes=2, gpus=9, tasks=9, limit=100 * HOUR))
    assert [re.search(r"MaxTime|9 GPUs", answer)[0] for answer in answers] == ["MaxTime", "9 GPUs"]  # type: ignore[index]


@pytest.mark.parametrize(("lead", "needed", "ok"), [(120, None, True), (120, 120, True), (120, 119.5, True),
                                                     (120, 120.5, False), (5, 13.2, False)])
def test_lead_time_of_a_known_run(lead: float, needed: float | None, ok: bool) -> None:
    """A lead time shorter than the run's own steps and saves need is refused, with the one that does."""
    answers = refused(Request(lead=lead), NOTHING, Known(step=0.4, save=3.5, needed=needed))
    assert bool(answers) != ok
    if not ok and needed is not None:
        assert f"Use --lead-time {int(needed) + 1}s or more" in answers[0]
        assert "slowest step took 0.4 s and the last save 3.5 s" in answers[0]


# --- defaults and notes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "lead"), [(None, 120), (float("inf"), 120), (24 * HOUR, 120), (480, 120), (479, 119),
                                             (60, 15), (4, 1), (1, 1)])
def test_default_lead(limit: float | None, lead: float) -> None:
    """Two minutes, but at most a quarter of the time."""
    assert preflight.default_lead(limit) == lead


@pytest.mark.parametrize(("limit", "needed", "lead"), [(24 * HOUR, 185.0, 185), (24 * HOUR, 13.0, 120), (60, 20.0, 20),
                                                       (60, 31.0, 15), (None, 300.0, 300)])
def test_default_lead_of_a_known_run(limit: float | None, needed: float, lead: float) -> None:
    """It is longer where the run is known to need it, up to half of the time; beyond that the check refuses."""
    assert preflight.default_lead(limit, needed=needed) == lead


@pytest.mark.parametrize(("request_", "limit"), [
    (Request(limit=5.0), 5.0), (Request(), HOUR), (Request(partitions=("cpu",)), None),
    (Request(partitions=("old",)), 2 * HOUR), (Request(partitions=("old", "gpu")), HOUR)])
def test_limit(request_: Request, limit: float | None) -> None:
    """Without --time a job has the partition's DefaultTime, or its MaxTime; none is known where both are unlimited."""
    assert preflight.limit_of(request_, SITE) == limit
    assert preflight.limit_of(request_, NOTHING) == request_.limit


def test_notes() -> None:
    """One CPU a rank, a partition that is down and JobRequeue=0 are worth a word, with the numbers of the nodes."""
    assert preflight.check(Request(gpus=8, tasks=8), SITE).notes == [
        "without --cpus-per-task a rank gets one CPU, and decoding images takes more: the nodes of partition gpu have "
        "8 for each GPU (--cpus-per-task 8)"]
    assert preflight.check(Request(gpus=8, tasks=8, cpus=8), SITE).notes == []
    site = replace(SITE, config={"JobRequeue": "0"})
    assert preflight.check(Request(partitions=("old",), cpus=1), site).notes == [
        "partition old is not up: the job waits until it is",
        "this cluster requeues no job by default (JobRequeue=0); this one says --requeue"]


@pytest.mark.parametrize(("text", "megabytes"), [
    ("64G", 65536), ("64GB", 65536), ("512000", 512000), ("512000M", 512000), ("1T", 1048576), ("1.5g", 1536),
    ("2048K", 2), ("0", None)])
def test_memory(text: str, megabytes: float | None) -> None:
    """Slurm's units of memory; 0 is all there is, of which nothing is to be checked."""
    assert preflight.megabytes(text) == megabytes


@pytest.mark.parametrize("text", ["lots", "", "G", "64X"])
def test_no_memory(text: str) -> None:
    """Anything else is a mistake."""
    with pytest.raises(ValueError):
        preflight.megabytes(text)
