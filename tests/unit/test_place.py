"""Where a task stands in a job: node lists, tasks per node, and what Slurm and submitit's local executor tell."""

import pytest

from alexnet_ddp.errors import UserError
from launch.place import hosts_of, place_of, tasks_per_node

SLURM = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
         "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_STEP_NODELIST": "n[2-3]", "SLURM_TASKS_PER_NODE": "8(x3)",
         "SLURM_STEP_TASKS_PER_NODE": "3,2"}


@pytest.mark.parametrize(("text", "hosts"), [
    ("n1", ["n1"]),
    ("n1,n2", ["n1", "n2"]),
    ("a[1-3,7],b09", ["a1", "a2", "a3", "a7", "b09"]),
    ("gpu[008-011]", ["gpu008", "gpu009", "gpu010", "gpu011"]),
    ("gpu[9-11]", ["gpu9", "gpu10", "gpu11"]),
    ("rack[0-1]node[01-02]", ["rack0node01", "rack0node02", "rack1node01", "rack1node02"]),
    ("n[1,3]-ib.cluster.org,login-2", ["n1-ib.cluster.org", "n3-ib.cluster.org", "login-2"]),
    ("n[5]", ["n5"]),
    ("c1[1-2],c20", ["c11", "c12", "c20"]),
])
def test_node_lists(text: str, hosts: list[str]) -> None:
    """Slurm's node lists are read as `scontrol show hostnames` would: order, width of numbers, several groups."""
    assert list(hosts_of(text)) == hosts


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n[1-3]]", "n 1", "$(reboot)", "n[]"])
def test_what_is_no_node_list(text: str) -> None:
    """Anything else is refused, and shown."""
    with pytest.raises(UserError, match="node list"):
        hosts_of(text)


@pytest.mark.parametrize(("text", "counts"), [
    ("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1(x2)", [1, 1]), ("8,7", [8, 7])])
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    """Slurm's short form of tasks per node is written out."""
    assert tasks_per_node(text) == counts


def test_bad_tasks_per_node() -> None:
    """Anything else is refused, and shown."""
    with pytest.raises(UserError, match="got 'many'"):
        tasks_per_node("many")


def test_place_in_a_step() -> None:
    """The step's nodes and tasks count, not the job's; uneven nodes are known."""
    place = place_of(SLURM)
    assert place is not None
    assert (place.rank, place.size, place.local_rank, place.local_size, place.node) == (3, 5, 0, 2, 1)
    assert place.hosts == ("n2", "n3")
    assert place.host_of_rank == ["n2", "n2", "n2", "n3", "n3"]
    assert place.name == "12.0"


def test_place_after_a_requeue() -> None:
    """Each start of a job has a name of its own."""
    place = place_of({**SLURM, "SLURM_RESTART_COUNT": "2"})
    assert place is not None
    assert place.name == "12.2"


def test_place_without_a_step() -> None:
    """In the batch shell and outside of a job there is no place."""
    assert place_of({}) is None
    assert place_of({"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1"}) is None


def test_place_in_submitits_local_executor() -> None:
    """Submitit's local executor tells rank and size in variables of its own."""
    place = place_of({"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_JOB_ID": "77"})
    assert place is not None
    assert (place.rank, place.size, place.local_rank, place.local_size) == (1, 2, 1, 2)
    assert place.name == "local-77.0"
