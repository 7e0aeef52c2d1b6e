"""The command line of `alexnet-ddp submit`: sbatch's own short flags, and a word on those that are submit's to set."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from alexnet_ddp.errors import UserError
from alexnet_ddp.words import ELSEWHERE, Parser
from launch.profiles import NOT_FREE

SHORT = {"-n": "ntasks", "-G": "gpus", "-o": "output", "-e": "error", "-a": "array", "-D": "chdir"}



class SubmitParser(Parser):
    """Knows what people write for sbatch."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            flag = message.split()[2].partition("=")[0]
            name = SHORT.get(flag[:2] if not flag.startswith("--") else flag, flag.lstrip("-"))
            if name in NOT_FREE:
                raise UserError(f"{flag} can't be set here: {NOT_FREE[name]}.")
            if flag.startswith("--") and flag.replace("_", "-") not in ELSEWHERE:
                raise UserError(f"{flag} is not known here. Any key of sbatch is passed on by --slurm {name}=VALUE. "
                                f"See: {self.prog} --help")
        super().error(message)


def parser() -> argparse.ArgumentParser:
    p = SubmitParser(
        prog="alexnet-ddp submit", allow_abbrev=False,
        description="Hands the run that CONFIG names to Slurm: one task per GPU, and back after every time limit, "
        "preemption or lost node until it is finished.",
        epilog="T is 90s, 45m, 4h or 1d12h, or as Slurm has it: 45 (minutes), 4:00:00, 1-12:00:00.")
    p.add_argument("config", metavar="CONFIG", help="a recipe, such as configs/alexnet_single.yaml")
    p.add_argument("overrides", metavar="key=value", nargs="*", help="dotted overrides, such as optim.lr=0.02")
    size = p.add_argument_group("how large")
    size.add_argument("-N", "--nodes", metavar="N", type=_count, default=1)
    size.add_argument("--gpus-per-node", metavar="[TYPE:]N", type=_gpus, default=("", 0), help="one task each")
    size.add_argument("--gpus-per-task", metavar="1", type=_count, help="for sites that want it so; with the next one")
    size.add_argument("--tasks-per-node", metavar="N", type=_count, help="of a CPU run; else one per GPU")
    size.add_argument("-c", "--cpus-per-task", metavar="N", type=_count, help="for decoding images, mostly")
    size.add_argument("--mem", metavar="SIZE", help="memory of a node, such as 64G")
    size.add_argument("-t", "--time", metavar="T", help="of one job; the run takes as many as it needs")
    where = p.add_argument_group("where, as sbatch has it")
    for short, name in (("-p", "partition"), ("-A", "account"), ("-J", "job-name"), ("-q", "qos"), ("-C", "constraint"),
                        ("-w", "nodelist"), ("-x", "exclude"), ("-d", "dependency")):
        where.add_argument(short, f"--{name}", metavar=name.upper().replace("-", "_"))
    where.add_argument("--slurm", metavar="KEY=VALUE", action="append", default=[], help="any other key of sbatch")
    where.add_argument("--profile", metavar="NAME|FILE", help="a site's habits; see slurm/profiles/")
    where.add_argument("--cluster", choices=["slurm", "local", "debug"], default="slurm",
                       help="local: this machine, in the background; debug: this process")
    how = p.add_argument_group("how")
    how.add_argument("--seeds", metavar="0..4|0,2,5", help="a job array: runs NAME-seed0 ...; or seed=0..4")
    how.add_argument("--parallel", metavar="N", type=_count, help="tasks of the array at a time")
    how.add_argument("--lead-time", metavar="T",
                     help="from the warning to the end; default 120s, at most a quarter of the time, more where a run "
                     "is known to need it")
    how.add_argument("--dry-run", action="store_true", help="show script and requeue plan; submit and write nothing")
    how.add_argument("--follow", action="store_true", help="show rank 0's log until the run is over")
    how.add_argument("--fresh", action="store_true", help="start over; the old run directory is kept, renamed")
    how.add_argument("--accept-changes", action="store_true", help="go on although the recipe has changed")
    return p


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"takes a number above 0, got '{text}'")
    return int(text)


def _gpus(text: str) -> tuple[str, int]:
    kind, _, number = text.rpartition(":")
    return kind, 0 if number == "0" and not kind else _count(number)
