"""What Slurm says of the cluster: its configuration, its partitions and their nodes. As tolerant as launch.slurm."""

from __future__ import annotations

import re
from dataclasses import dataclass

from launch.slurm import PATIENCE, plain, said, seconds, whole, words_of


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config`: one `Key = value` a line."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = re.match(r"^\s*([A-Za-z][\w\[\]]*)\s+=\s?(.*)$", line)
        if match:
            found.setdefault(match[1], match[2].strip())
    return found


def config(*, timeout: float = PATIENCE) -> dict[str, str] | None:
    """The cluster's configuration; None: Slurm can't be asked."""
    text = said(["scontrol", "show", "config"], timeout)
    return parse_config(text) or None if text is not None else None


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike."""

    count: int
    cpus: int  # of one node
    memory: int  # MB of one node
    gpus: int  # of one node
    gpu_types: tuple[str, ...]
    state: str


@dataclass(frozen=True)
class Partition:
    """A partition. Lengths of time are seconds; None: unlimited or unknown."""

    name: str
    default: bool
    up: bool
    max_time: float | None
    default_time: float | None
    max_nodes: int | None
    preempt_mode: str  # OFF, REQUEUE, CANCEL, SUSPEND ...; empty: unknown
    grace: float  # GraceTime
    over_time: str  # OverTimeLimit of its own in minutes, empty: the cluster's
    tier: int  # PriorityTier
    nodes: tuple[Nodes, ...] = ()


def parse_partitions(text: str) -> list[Partition]:
    """The lines of `scontrol show partition -o`."""
    found = []
    for line in text.splitlines():
        words = words_of(line.strip())
        if "PartitionName" in words:
            found.append(Partition(
                name=words["PartitionName"],
                default=words.get("Default") == "YES",
                up=words.get("State", "UP") == "UP",
                max_time=seconds(words.get("MaxTime", "")),
                default_time=seconds(words.get("DefaultTime", "")),
                max_nodes=whole(words.get("MaxNodes", "")),
                preempt_mode=plain(words.get("PreemptMode", "")),
                grace=float(whole(words.get("GraceTime", "")) or 0),
                over_time=plain(words.get("OverTimeLimit", "")),
                tier=whole(words.get("PriorityTier", "")) or 0))
    return found


def gpus(gres: str) -> tuple[int, tuple[str, ...]]:
    """GPUs of a node and their types, of `gpu:a100:4(S:0-1),shard:16`."""
    count, types = 0, []
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = item.strip().split(":")
        if name == "gpu":
            number = rest.pop() if rest and rest[-1].isdigit() else "1"
            count += int(number)
            types += [kind for kind in rest[:1] if kind not in types and kind != "no_consume"]
    return count, tuple(types)


NODES = "%R|%D|%c|%m|%T|%G"


def parse_nodes(text: str) -> dict[str, list[Nodes]]:
    """The lines of `sinfo -h -e -o NODES`, by partition."""
    found: dict[str, list[Nodes]] = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|", 5)]
        if len(parts) == 6:
            name, count, cpus, memory, state, gres = parts
            number, types = gpus(gres)
            found.setdefault(name, []).append(Nodes(whole(count) or 0, whole(cpus) or 0, whole(memory) or 0,
                                                    number, types, state.lower()))
    return found


def partitions(*, timeout: float = PATIENCE) -> list[Partition] | None:
    """The cluster's partitions with their nodes (none, where sinfo doesn't tell); None: Slurm can't be asked."""
    text = said(["scontrol", "show", "partition", "-o", "-a"], timeout)
    if text is None:
        return None
    nodes = parse_nodes(said(["sinfo", "-h", "-a", "-e", "-o", NODES], timeout) or "")
    return [Partition(**{**vars(partition), "nodes": tuple(nodes.get(partition.name, ()))})
            for partition in parse_partitions(text)]
