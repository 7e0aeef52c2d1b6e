"""The group of ranks: where this process stands in it, joining, leaving, and agreeing.

Works under torchrun (one or several agents), in a Slurm job (launch.job tells each task its rank in torchrun's
variables), and as a single process, with the same code: a single process is a group of one.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from alexnet_ddp.errors import DeviceFailed, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place. `control` is a gloo group of its own for small host-side messages."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    device: torch.device
    control: dist.ProcessGroup
    hosts: tuple[str, ...]  # host name by rank
    pids: tuple[int, ...]  # process id by rank; 0 where this process can't see it (another host or container)
    token: str  # of this start of the group; the same on all ranks
    nodes: int  # hosts may differ in their numbers of ranks

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def environment_rank() -> int:
    """This process's rank before it has joined: what torchrun says, else 0. Only rank 0 speaks to the user."""
    return int(os.environ.get("RANK", "0"))


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def cores_of_a_rank(affinity: int, *, local_size: int, environment: Mapping[str, str]) -> int:
    """Cores for the threads of one rank: pure.

    Slurm binds each task to cores of its own, which `affinity` (the cores this process may use) then counts, or binds
    none and says how many a task has. Ranks that share one task (torchrun's), or a machine, share its cores evenly.
    """
    of_task = environment.get("SLURM_CPUS_PER_TASK", "")
    if not of_task.isdigit():
        return max(1, affinity // local_size)
    sharing = local_size if "TORCHELASTIC_RUN_ID" in environment else 1
    return max(1, min(affinity, int(of_task)) // sharing)


def gpu_of_a_rank(visible: int, *, local_rank: int, local_size: int) -> int:
    """Which of the `visible` GPUs is this rank's: pure. Raises UserError where there are too few.

    With --gpus-per-node every task sees all of its node's, with --gpus-per-task often only its own.
    """
    if visible >= local_size:
        return local_rank
    if visible == 1:
        return 0  # its own; if it is another rank's as well, that shows by its UUID
    raise UserError(f"Each rank needs a GPU of its own: {local_size} ranks on this node, {visible} GPUs visible. Start "
                    f"at most {visible} ranks on a node, or ask for {local_size} GPUs a node.")


def shared_gpu(hosts: Sequence[str], gpus: Sequence[str]) -> str:
    """What is wrong when two ranks of one host have one GPU, "" if none do: pure. `gpus` are UUIDs, "" for no GPU."""
    owners: dict[tuple[str, str], int] = {}
    for rank, (host, gpu) in enumerate(zip(hosts, gpus, strict=True)):
        first = owners.setdefault((host, gpu), rank)
        if gpu and first != rank:
            return (f"Ranks {first} and {rank} on {host} have the same GPU ({gpu}); each rank needs one of its own. "
                    "Start as many ranks on a node as it has GPUs for them: in a Slurm job as many tasks as "
                    "--gpus-per-node, or --gpus-per-task=1; on a single machine a smaller --nproc-per-node.")
    return ""


def pick_device(wanted: str, *, local_rank: int, local_size: int) -> torch.device:
    """The device of a rank. Raises UserError where a GPU is asked for and none is there for it."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device=cuda asks for a GPU, but torch sees none on this machine. "
                        "Use device=auto or device=cpu, or mend the driver (nvidia-smi).")
    device = torch.device("cuda", gpu_of_a_rank(torch.cuda.device_count(), local_rank=local_rank,
                                                local_size=local_size))
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # the first use of a GPU that is broken, or another's alone
    except RuntimeError as error:
        raise DeviceFailed(f"{device} can't be used: {(str(error).splitlines() or [''])[0]}.") from None
    return device


@dataclass(frozen=True)
class Place:
    """What a rank tells the others when they meet."""

    host: str
    pid_namespace: str
    pid: int
    local_rank: int
    token: str
    gpu: str = ""  # UUID
    mistake: str = ""
    kind: str = ""  # of the mistake


def join(*, device: str, timeout: float) -> World:
    """Joins the process group of the environment (torchrun's variables; a group of one without them).

    `timeout` (seconds) bounds every collective; the watchdog ends a stalled run long before it. Raises UserError.
    """
    env = os.environ
    rank, size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
    # Started by hand without a word about nodes, all ranks are on one.
    local_rank, local_size = int(env.get("LOCAL_RANK", str(rank))), int(env.get("LOCAL_WORLD_SIZE", str(size)))
    if size == 1 and int(env.get("SLURM_NTASKS", "1")) > 1 and "RANK" not in env and "SLURM_STEP_ID" in env:
        raise UserError(f"srun started {env['SLURM_NTASKS']} tasks, but none of them is told its rank: they would be "
                        f"{env['SLURM_NTASKS']} runs of one. Use alexnet-ddp submit, or one of slurm/*.sbatch.")
    chosen, wrong = torch.device("cpu"), UserError()
    try:
        chosen = pick_device(device, local_rank=local_rank, local_size=local_size)
    except UserError as error:  # told once all have met, so that one rank says it for all
        wrong = error
    on_gpu = chosen.type == "cuda"
    gpu = str(torch.cuda.get_device_properties(chosen).uuid) if on_gpu else ""
    mine = Place(socket.gethostname(), _pid_namespace(), os.getpid(), local_rank, secrets.token_hex(8), gpu,
                 str(wrong), wrong.kind)
    try:
        store = _meet(rank, size=size, timeout=timeout)
        places = _tell(store, rank, size=size, mine=mine)
        _refuse_mistakes(places)  # before any library takes hold of a GPU that is another rank's
        dist.init_process_group(
            store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout),
            backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=chosen if on_gpu else None)
        control: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        dist.barrier(group=control)
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        where = f" at {env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}" if size > 1 else ""
        raise UserError(f"The {size} ranks could not meet{where}: {(str(error).splitlines() or [''])[0]}.\nEvery rank "
                        "needs the same MASTER_ADDR and MASTER_PORT, a RANK of its own below WORLD_SIZE, and a free "
                        "port; torchrun sees to all of it.") from None
    seen = [place.pid if (place.host, place.pid_namespace) == (mine.host, mine.pid_namespace) else 0
            for place in places]
    return World(rank, size, local_rank, local_size, mine.host, chosen, control, pids=tuple(seen),
                 hosts=tuple(place.host for place in places), token=places[0].token,
                 nodes=sum(place.local_rank == 0 for place in places))


def _meet(rank: int, *, size: int, timeout: float) -> dist.Store:
    """The store that all ranks share: rank 0's, or that of torchrun's agent.

    In a Slurm job rank 0 has been listening since the ranks found each other (launch.rendezvous): its socket becomes
    the store's, so that nobody can take the port in between.
    """
    if size == 1:
        return dist.HashStore()
    env = os.environ
    if not 0 <= rank < size or not env.get("MASTER_ADDR") or not env.get("MASTER_PORT", "").isdigit():
        raise ValueError("rank, address or port is missing or wrong")
    listener = env.pop("ALEXNET_STORE_FD", None)
    store = dist.TCPStore(
        env["MASTER_ADDR"], int(env["MASTER_PORT"]), size, timeout=timedelta(seconds=timeout), wait_for_workers=False,
        is_master=rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        master_listen_fd=int(listener) if listener and rank == 0 else None)
    return dist.PrefixStore(f"ranks/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _tell(store: dist.Store, rank: int, *, size: int, mine: Place) -> list[Place]:
    """Every rank's place, by rank."""
    store.set(f"place/{rank}", json.dumps(asdict(mine)))
    return [Place(**json.loads(store.get(f"place/{other}"))) for other in range(size)]


def _refuse_mistakes(places: Sequence[Place]) -> None:
    """Raises the first rank's mistake, the same on all ranks."""
    for rank, place in enumerate(places):
        if place.mistake:
            where = "" if places[0].mistake else f"Rank {rank} on {place.host}: "
            raise (DeviceFailed if place.kind == DeviceFailed.kind else UserError)(where + place.mistake)
    shared = shared_gpu([place.host for place in places], [place.gpu for place in places])
    if shared:
        raise UserError(shared)


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def leave() -> None:
    """Leaves the group in good order; called only when all ranks do."""
    if dist.is_initialized():
        dist.destroy_process_group()


def everywhere(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on every rank; if a rank makes out a user's mistake, all raise the first rank's message."""
    result: T | None = None
    mistake = ""
    try:
        result = work()
    except UserError as error:
        mistake = str(error)
    told: list[Any] = [None] * world.size
    dist.all_gather_object(told, mistake, group=world.control)
    for rank, message in enumerate(told):
        if message:
            place = "" if told[0] else f"Rank {rank} on {world.hosts[rank]}: "
            raise UserError(place + message)
    return result  # type: ignore[return-value]


def on_rank_0(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 alone and gives its (picklable) result to all; its UserError is raised by all."""
    box: list[Any] = [None, ""]
    if world.rank == 0:
        try:
            box[0] = work()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, group=world.control)
    if box[1]:
        raise UserError(box[1])
    result: T = box[0]
    return result


def first_on_node(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on each node's local rank 0 first (it fills the node's cache), then on the node's others."""
    first: list[T] = []
    everywhere(world, lambda: first.append(work()) if world.local_rank == 0 else None)
    return everywhere(world, lambda: first[0] if first else work())


@dataclass(frozen=True)
class Agreed:
    """What all ranks know together, one boundary after it was said."""

    stop: int = 0  # place in stop.CAUSES, 0 for none: the lowest rank's
    stop_rank: int = -1
    save: bool = False
    waits: tuple[float, ...] = ()  # seconds each rank waited for data in its last step


class Agreement:
    """One small asynchronous all-reduce per boundary, read at the next one, so that it costs no wait."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._words = torch.zeros(world.size, 3, dtype=torch.int64)
        self._work: dist.Work | None = None

    def exchange(self, *, stop: int = 0, save: bool = False, wait: float = 0.0) -> Agreed:
        """Says this rank's part and returns what was said by all at the boundary before."""
        agreed = self.settle()
        self._words = torch.zeros(self._world.size, 3, dtype=torch.int64)
        self._words[self._world.rank] = torch.tensor([stop, int(save), int(wait * 1e6)])
        self._work = dist.all_reduce(self._words, group=self._world.control, async_op=True)
        return agreed

    def settle(self) -> Agreed:
        """Waits for what is under way and returns it; every rank must call it at the same place."""
        if self._work is None:
            return Agreed()
        self._work.wait()
        self._work = None
        stops, saves, waits = self._words.unbind(1)
        asking = stops.nonzero().flatten().tolist()
        return Agreed(stop=int(stops[asking[0]]) if asking else 0, stop_rank=asking[0] if asking else -1,
                      save=bool(saves.any()), waits=tuple(wait / 1e6 for wait in waits.tolist()))


def numeric_fingerprint(world: World, *, decoder: str, micro_batch: int, assignment: str, amp: str,
                        deterministic: bool) -> dict[str, Any]:
    """What the bits of a result depend on besides the recipe: equal fingerprints give equal bits."""
    where: dict[str, Any] = {
        "torch": str(torch.__version__), "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(), "ranks": world.size, "nodes": world.nodes,
        "device": torch.cuda.get_device_name(world.device) if world.on_gpu else "cpu",
        "decoder": decoder, "micro_batch": micro_batch, "assignment": assignment, "amp": amp,
    }
    if world.on_gpu:
        where["deterministic"] = deterministic
        where["cuda"] = torch.version.cuda
    return where
