"""Where this process stands in a job: read from what Slurm, or submitit's local executor, tells it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from alexnet_ddp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Place:
    """A task's place. `local_size` counts the tasks on its own node; `hosts` are the nodes' names in order."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int
    hosts: tuple[str, ...]
    counts: tuple[int, ...]  # tasks by node
    job: str
    restart: int

    @property
    def name(self) -> str:
        """Of this start of the job: never the same again."""
        return f"{self.job}.{self.restart}"

    @property
    def host_of_rank(self) -> list[str]:
        """In Slurm's block distribution; for messages."""
        return [host for host, count in zip(self.hosts, self.counts, strict=True) for _ in range(count)]


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that the environment tells; None outside of a job's tasks. Raises UserError."""
    if "SUBMITIT_LOCAL_GLOBALID" in environment:
        rank, size = int(environment["SUBMITIT_LOCAL_GLOBALID"]), int(environment["SUBMITIT_LOCAL_NTASKS"])
        return Place(rank=rank, size=size, local_rank=rank, local_size=size, node=0, hosts=("localhost",),
                     counts=(size,), job=f"local-{environment['SUBMITIT_LOCAL_JOB_ID']}", restart=0)
    if "SLURM_JOB_ID" not in environment or "SLURM_PROCID" not in environment:
        return None
    nodelist = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    node = int(environment.get("SLURM_NODEID", "0"))
    counts = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE") or environment["SLURM_TASKS_PER_NODE"])
    return Place(rank=int(environment["SLURM_PROCID"]), size=sum(counts), local_rank=int(environment["SLURM_LOCALID"]),
                 local_size=counts[node], node=node, hosts=hosts_of(nodelist), counts=tuple(counts),
                 job=environment["SLURM_JOB_ID"], restart=int(environment.get("SLURM_RESTART_COUNT") or 0))


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as [2, 2, 2, 1]. Raises UserError."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not found:
            raise UserError(f"Slurm's tasks per node are numbers such as 2(x3),1, got '{text}'.")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def hosts_of(nodelist: str) -> tuple[str, ...]:
    """Slurm's `a[1-3,7],b09` as ('a1', 'a2', 'a3', 'a7', 'b09'). Raises UserError.

    Needs no `scontrol show hostnames`, which a container lacks.
    """
    hosts: list[str] = []
    parts = re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist)
    for part in parts:
        names = [""]
        for text, group in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            endings = [text] if text else [number for span in group.split(",") for number in _numbers(span, nodelist)]
            names = [name + ending for name in names for ending in endings]
        hosts += names
    if ",".join(parts) != nodelist or not hosts or not all(re.fullmatch(r"[\w.-]+", host) for host in hosts):
        raise UserError(f"A Slurm node list looks like a[1-3,7],b09; got '{nodelist}'.")
    return tuple(hosts)


def _numbers(span: str, nodelist: str) -> list[str]:
    """`08-11` as 08, 09, 10, 11: Slurm keeps the width."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", span.strip())
    if not found:
        raise UserError(f"A Slurm node list looks like a[1-3,7],b09; got '{nodelist}'.")
    first, last = found[1], found[2] or found[1]
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
