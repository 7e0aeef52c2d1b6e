"""The group of ranks: where this process stands in it, joining, leaving, and agreeing.

Works under torchrun (one or several agents), and as a single process, with the same code: a single process is a
group of one.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from alexnet_ddp.errors import UserError

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

    @property
    def nodes(self) -> int:
        return self.size // self.local_size

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def environment_rank() -> int:
    """This process's rank before it has joined: what torchrun says, else 0. Only rank 0 speaks to the user."""
    return int(os.environ.get("RANK", "0"))


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device of a rank. Raises UserError where a GPU is asked for and none is there for it."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device=cuda asks for a GPU, but torch sees none on this machine. "
                        "Use device=auto or device=cpu, or mend the driver (nvidia-smi).")
    if local_rank >= torch.cuda.device_count():
        visible = torch.cuda.device_count()
        raise UserError(f"Each rank needs a GPU of its own: local rank {local_rank} has none, {visible} visible. "
                        f"Start at most {visible} ranks on a node.")
    return torch.device("cuda", local_rank)


def join(*, device: str, timeout: float) -> World:
    """Joins the process group of the environment (torchrun's variables; a group of one without them).

    `timeout` (seconds) bounds every collective; the watchdog ends a stalled run long before it. Raises UserError.
    """
    env = os.environ
    rank, size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
    local_rank, local_size = int(env.get("LOCAL_RANK", "0")), int(env.get("LOCAL_WORLD_SIZE", str(size)))
    if size == 1 and int(env.get("SLURM_NTASKS", "1")) > 1 and "RANK" not in env and "SLURM_STEP_ID" in env:
        raise UserError(f"srun started {env['SLURM_NTASKS']} tasks, but none of them is told its rank: they would be "
                        f"{env['SLURM_NTASKS']} runs of one. Start one torchrun per node.")
    chosen: torch.device | None = None
    mistake = ""
    try:
        chosen = pick_device(device, local_rank)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
    except UserError as error:  # told once the group stands, so that one rank says it for all
        mistake = str(error)
    on_gpu = chosen is not None and chosen.type == "cuda"
    common: dict[str, Any] = {"backend": "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                              "timeout": timedelta(seconds=timeout)}
    if on_gpu:
        common["device_id"] = chosen
    try:
        if "RANK" in env:
            dist.init_process_group(init_method="env://", **common)
        else:
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **common)
        control: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        here = (socket.gethostname(), _pid_namespace())
        told: list[Any] = [None] * size
        dist.all_gather_object(told, (mistake, here, os.getpid(), secrets.token_hex(8)), group=control)
    except (RuntimeError, ValueError) as error:
        where = f" at {env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}" if size > 1 else ""
        raise UserError(f"The {size} ranks could not meet{where}: {(str(error).splitlines() or [''])[0]}.\nEvery rank "
                        "needs the same MASTER_ADDR and MASTER_PORT, a RANK of its own below WORLD_SIZE, and a free "
                        "port; torchrun sees to all of it.") from None
    first = next((mistake for mistake, *_ in told if mistake), "")
    if first:
        raise UserError(first)
    assert chosen is not None
    return World(rank, size, local_rank, local_size, here[0], chosen, control,
                 hosts=tuple(there[0] for _, there, _, _ in told),
                 pids=tuple(pid if there == here else 0 for _, there, pid, _ in told), token=told[0][3])


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
