"""`alexnet-ddp doctor slurm`: what this cluster's configuration means for a run, and what to set because of it.

Reads only: no job is started, nothing is changed. launch.findings has the rules.
"""

from __future__ import annotations

import shutil
import textwrap

from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.findings import WIDTH, lines
from alexnet_ddp.words import Parser
from launch import cluster, slurm
from launch.cluster import Partition
from launch.findings import Site, findings, parse_qos

QOS = ["sacctmgr", "-nP", "show", "qos", "format=Name,PreemptMode,GraceTime"]


def read_site() -> Site:
    """What Slurm says of itself. Raises UserError where it can't be asked."""
    config = cluster.config()
    if config is None:
        found = "it gives no answer here" if shutil.which("scontrol") else "there is no such command here"
        raise UserError(f"doctor slurm reads `scontrol show config`, and {found}. Run it on a login node of the "
                        "cluster.")
    qos = slurm.ask(QOS)
    return Site(config, cluster.partitions() or (), parse_qos(qos.text) if qos is not None and qos.code == 0 else None)


def page(site: Site, *, width: int = WIDTH) -> str:
    """The cluster in a few lines, then every finding, with what to set, in at most `width` columns."""
    head = [f"Slurm {site.word('SLURM_VERSION') or '?'}, cluster {site.word('ClusterName') or '?'}"]
    for partition in site.partitions:
        head += textwrap.wrap(_nodes(partition), width, initial_indent="  ", subsequent_indent="      ")
    return "\n".join([*head, "", *lines(findings(site), verb="set", width=width)])


def _nodes(partition: Partition) -> str:
    """A partition and its nodes, those alike counted together whatever their state."""
    counts: dict[str, int] = {}
    for nodes in partition.nodes:
        types = f" {'/'.join(nodes.gpu_types)}" if nodes.gpu_types else ""
        kind = f"{nodes.cpus} CPUs, {nodes.gpus}{types} GPUs" if nodes.gpus else f"{nodes.cpus} CPUs"
        counts[kind] = counts.get(kind, 0) + nodes.count
    marks = [mark for mark, shown in (("default", partition.default), ("down", not partition.up)) if shown]
    told = "; ".join(f"{count} x ({kind})" for kind, count in counts.items())
    return f"partition {partition.name}{' (' + ', '.join(marks) + ')' if marks else ''}: {told or 'nodes unknown'}"


def main(words: list[str]) -> int:
    """Prints what was found. Raises UserError."""
    parser = Parser(prog="alexnet-ddp doctor", description="slurm: what this cluster's configuration means for a run, "
                    "and what to set because of it. Reads only.")
    parser.add_argument("what", choices=["slurm"])
    parser.parse_args(words)
    print(page(read_site()))
    return EXIT_FINISHED
