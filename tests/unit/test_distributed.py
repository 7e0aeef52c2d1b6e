"""Where a rank stands: its GPU, its cores, its peers; and how ranks meet at a socket that listens already."""

from __future__ import annotations

import pytest

import pieces
from alexnet_ddp.distributed import Place, _refuse_mistakes, cores_of_a_rank, gpu_of_a_rank, shared_gpu
from alexnet_ddp.errors import DeviceFailed, UserError


@pytest.mark.parametrize(("visible", "local_rank", "local_size", "gpu"), [
    (8, 0, 8, 0), (8, 7, 8, 7),  # --gpus-per-node, --gres: every task sees all
    (8, 2, 4, 2),  # more than are needed
    (1, 0, 1, 0),
    (1, 3, 4, 0), (1, 0, 4, 0),  # --gpus-per-task: each sees its own
    (2, 1, 4, None), (3, 3, 4, None), (7, 0, 8, None),  # too few to go round
])
def test_gpu_of_a_rank(visible: int, local_rank: int, local_size: int, gpu: int | None) -> None:
    """The GPU of a rank for every way in which a cluster hands GPUs out; too few are refused with both numbers."""
    if gpu is not None:
        assert gpu_of_a_rank(visible, local_rank=local_rank, local_size=local_size) == gpu
        return
    with pytest.raises(UserError, match=f"{local_size} ranks on this node, {visible} GPUs visible.*at most {visible}"):
        gpu_of_a_rank(visible, local_rank=local_rank, local_size=local_size)


@pytest.mark.parametrize(("hosts", "gpus", "names"), [
    ("n1 n1 n2 n2", "a b c d", ()),
    ("n1 n1 n2 n2", "a b a b", ()),  # another host's is another GPU
    ("n1 n1", "- -", ()),  # on CPUs
    ("n1 n1 n2 n2", "a b c c", ("Ranks 2 and 3 on n2", "(c)")),
    ("n1 n2 n1 n2", "a b a c", ("Ranks 0 and 2 on n1", "(a)")),
])
def test_two_ranks_on_one_gpu(hosts: str, gpus: str, names: tuple[str, ...]) -> None:
    """Two ranks of a host with the same UUID are named, with the host, the UUID and the way out."""
    told = shared_gpu(hosts.split(), [gpu.replace("-", "") for gpu in gpus.split()])
    assert bool(told) == bool(names)
    assert all(name in told for name in (*names, *(("--gpus-per-task=1",) if names else ())))


def place(host: str = "n1", *, gpu: str = "", mistake: str = "", kind: str = "user") -> Place:
    return Place(host=host, pid_namespace="", pid=1, local_rank=0, token="t", gpu=gpu, mistake=mistake, kind=kind)


def test_mistakes_are_told_alike_on_all_ranks() -> None:
    """The first rank's mistake is raised, named unless rank 0 has it too; a GPU that is broken keeps its kind."""
    _refuse_mistakes([place(), place("n2")])
    with pytest.raises(UserError, match="^Rank 1 on n2: no GPU$"):
        _refuse_mistakes([place(), place("n2", mistake="no GPU"), place("n2", mistake="no GPU")])
    with pytest.raises(UserError, match="^no GPU$"):
        _refuse_mistakes([place(mistake="no GPU"), place("n2", mistake="no GPU")])
    with pytest.raises(DeviceFailed, match="^Rank 1 on n2: cuda:0 can't be used"):
        _refuse_mistakes([place(), place("n2", mistake="cuda:0 can't be used: ECC", kind="device")])
    with pytest.raises(UserError, match="Ranks 0 and 1 on n1 have the same GPU"):
        _refuse_mistakes([place(gpu="a"), place(gpu="a")])


@pytest.mark.parametrize(("affinity", "local_size", "environment", "cores"), [
    (64, 8, {}, 8),  # a machine's ranks share it
    (2, 3, {}, 1),
    (8, 8, {"SLURM_CPUS_PER_TASK": "8"}, 8),  # each task bound to cores of its own
    (64, 8, {"SLURM_CPUS_PER_TASK": "8"}, 8),  # and where the site binds none
    (4, 2, {"SLURM_CPUS_PER_TASK": "8"}, 4),  # fewer than were asked for
    (64, 8, {"SLURM_CPUS_PER_TASK": "64", "TORCHELASTIC_RUN_ID": "x"}, 8),  # one task, whose agent has 8 ranks
    (4, 8, {"SLURM_CPUS_PER_TASK": "4", "TORCHELASTIC_RUN_ID": "x"}, 1),
    (6, 2, {"SLURM_CPUS_PER_TASK": ""}, 3),
])
def test_cores_of_a_rank(affinity: int, local_size: int, environment: dict[str, str], cores: int) -> None:
    """A rank's cores: its task's own, or its share of what it has in common with others; never none."""
    assert cores_of_a_rank(affinity, local_size=local_size, environment=environment) == cores


def test_ranks_meet_at_a_socket_that_listens_already() -> None:
    """Rank 0 hands over a socket that holds the port: the ranks meet, sum, and use the watchdog's store through it."""
    found = pieces.on_ranks(pieces.meet_and_sum, world=2, listening=True)
    assert found == [(3.0, "told by 0"), (3.0, "told by 0")]


def test_uneven_nodes() -> None:
    """Three ranks, two on one node and one on another, are on two nodes, whatever the first node's number of ranks."""
    environments = [{"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": size} for local, size in ("02", "12", "01")]
    assert pieces.on_ranks(pieces.nodes_of, world=3, environments=environments) == [2, 2, 2]
    assert pieces.on_ranks(pieces.nodes_of, world=2) == [1, 1]  # started by hand without a word about nodes
