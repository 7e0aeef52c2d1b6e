"""`alexnet-ddp submit`: a run, or an array of them over seeds, handed to Slurm in one line.

    what is asked for    command line over profile                  launch.options, launch.profiles
    is it possible       run directory, time, nodes, GPUs, CPUs     launch.preflight
    freeze               code, recipe, git state                    launch.snapshot
    submit               submitit's executors                       launch.executors
    what happens then    --dry-run tells it beforehand              launch.plan
    watch                --follow                                   launch.follow

No torch is imported: it answers at once on a login node.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alexnet_ddp import config as recipes
from alexnet_ddp import seeds
from alexnet_ddp.config import Config
from alexnet_ddp.determinism import check_name
from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.runfiles import add_attempt, check_not_set_aside
from alexnet_ddp.stop import STOP_FILE, lead_time
from alexnet_ddp.words import answer
from launch import durations, executors, plan, preflight, profiles, rundir, snapshot
from launch.cluster import config as ask_config
from launch.cluster import partitions as ask_partitions
from launch.facts import Facts
from launch.follow import Followed, follow
from launch.options import parser
from launch.preflight import Cluster, Known, Request
from launch.profiles import Profile, Value
from launch.requeue import Caps

PATIENCE = 3.0  # seconds for Slurm's answer about the cluster
SUBMISSION = "slurm"  # submitit's folder in a run directory


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a user orders: everything is decided, nothing is written yet. Of several runs, `base` is their name."""

    configs: Sequence[Config]
    base: str
    facts: Sequence[Facts]
    request: Request
    limit: float | None  # seconds that the job will have; None: not known
    profile: Profile
    keys: dict[str, Value]
    options: dict[str, Any]  # plain ones of sbatch
    site: Cluster
    cluster: str
    cwd: Path
    command: str
    parallel: int | None = None
    accept_changes: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def run_dirs(self) -> list[Path]:
        return [snapshot.run_directory(config, self.cwd) for config in self.configs]

    @property
    def folder(self) -> Path:
        """submitit's. An array's lies beside its runs, so that no run's --fresh takes it away from the others."""
        if len(self.configs) == 1:
            return self.run_dirs[0] / SUBMISSION
        return self.run_dirs[0].with_name(f"{self.base}-seeds") / SUBMISSION


# --- deciding ---------------------------------------------------------------------------------------------------


def order(options: argparse.Namespace, *, command: str) -> Order:
    """What is ordered, checked. Raises UserError for what can't be."""
    cluster, cwd = options.cluster, snapshot.working_directory()
    overrides, several = seeds.split(options.overrides)
    if several is not None and options.seeds is None:
        options.overrides, options.seeds = overrides, several
    first = recipes.load(options.config, options.overrides)
    configs = [first] if options.seeds is None else _seeded(options, first)
    named = options.profile is not None or cluster == "slurm"  # the default is the site's, not this machine's
    profile, path = profiles.load(options.profile) if named else (Profile(), None)
    run_dirs = [snapshot.run_directory(config, cwd) for config in configs]
    facts, keep = rundir.look(run_dirs, configs, fresh=options.fresh, accept_changes=options.accept_changes,
                              dependency=options.dependency or "")
    for one, run_dir in zip(configs, run_dirs, strict=True):
        if options.fresh and one.init_from is not None:
            check_not_set_aside(one.init_from, run_dir, name=one.name, cwd=cwd)
    site = Cluster()
    if cluster == "slurm":
        with ThreadPoolExecutor() as asking:  # at once: a busy slurmctld takes its time over each
            partitions = asking.submit(ask_partitions, timeout=PATIENCE)
            config = asking.submit(ask_config, timeout=PATIENCE)
        site = Cluster(partitions=partitions.result(), config=config.result())
    known = Known() if options.fresh or cluster == "debug" else _known([facts[number] for number in keep])
    request = _request(options, profile, jobs=len(keep), site=site, known=known)
    notes = [f"profile {path}"] if path else []
    notes += _check(request, site, known=known, cluster=cluster)
    check_name(first.model.name, deterministic=first.deterministic, on_gpu=request.gpus > 0 and first.device != "cpu")
    if request.gpus and first.device == "cpu":
        notes.append("the recipe says device: cpu, and GPUs are asked for all the same")
    elif not request.gpus and first.device == "cuda":
        raise UserError("The recipe says device: cuda, and no GPU is asked for. Use --gpus-per-node N.")
    elif not request.gpus and first.device == "auto":
        notes.append("no GPU is asked for (--gpus-per-node N): it trains on CPUs")
    notes += _unseen_data(first, cwd)
    plain = {name: getattr(options, name) or getattr(profile, name, None)
             for name in ("partition", "account", "qos", "constraint", "nodelist", "exclude", "dependency", "mem")}
    return Order(
        configs=[configs[number] for number in keep], base=first.name, facts=[facts[number] for number in keep],
        request=request, limit=preflight.limit_of(request, site), profile=profile,
        keys=dict(map(profiles.parse_key, options.slurm)),
        options={"job_name": options.job_name or first.name, **plain},
        site=site, cluster=cluster, cwd=cwd, command=command, parallel=options.parallel,
        accept_changes=options.accept_changes, notes=notes)


def _unseen_data(config: Config, cwd: Path) -> list[str]:
    """Data that this machine doesn't see: on a login node no mistake yet."""
    places = [("data.train", config.data.train), ("data.val", config.data.val)]
    begin = config.init_from or ""
    if not begin.startswith("torchvision:") and not (cwd / begin).exists():  # itself, or the run before the @
        places.append(("init_from", begin.rpartition("@")[0] or begin))
    return [f"{name}={place} isn't there on this machine; the nodes must have it" for name, place in places
            if place and not re.search(r"[*?{\[]", place) and not (cwd / place.partition("::")[0]).exists()]


def _seeded(options: argparse.Namespace, first: Config) -> list[Config]:
    if options.cluster != "slurm":
        raise UserError(f"--seeds makes a job array, and --cluster {options.cluster} has none. On this machine "
                        "alexnet-ddp train CONFIG seed=0..4 takes one run after the other.")
    if any(override.partition("=")[0].strip() == "seed" for override in options.overrides):
        raise UserError("--seeds sets the seed of each run; leave out seed=...")
    return seeds.configs(options.config, options.overrides, seeds.parse(options.seeds, what="--seeds"))


def _request(options: argparse.Namespace, profile: Profile, *, jobs: int, site: Cluster,
             known: Known) -> Request:
    kind, gpus = options.gpus_per_node
    if options.gpus_per_task is not None and not gpus:
        gpus = options.gpus_per_task * (options.tasks_per_node or 1)
    if options.cluster != "slurm" and options.nodes > 1:
        raise UserError(f"--cluster {options.cluster} has one node, got --nodes {options.nodes}.")
    partition, time = options.partition or profile.partition, options.time or profile.time
    mem = options.mem or profile.mem
    try:
        memory = preflight.megabytes(mem) if mem else None
    except ValueError:
        raise UserError(f"Memory is written 64G or 512000M, got '{mem}'.") from None
    request = Request(
        nodes=options.nodes, gpus=gpus, gpu_type=kind, gpus_per_task=options.gpus_per_task,
        tasks=options.tasks_per_node or gpus or 1, cpus=options.cpus_per_task or profile.cpus_per_task, memory=memory,
        limit=durations.seconds(time) if time else None, partitions=tuple(filter(None, (partition or "").split(","))),
        qos=options.qos or profile.qos, jobs=jobs)
    lead = (durations.seconds(options.lead_time) if options.lead_time
            else preflight.default_lead(preflight.limit_of(request, site), needed=known.needed))
    if not 1 <= lead < 65536:  # sbatch's own bound
        raise UserError(f"--lead-time is between 1 s and 65535 s, got {options.lead_time}.")
    return Request(**{**vars(request), "lead": float(math.ceil(lead))})


def _known(facts: Sequence[Facts]) -> Known:
    """How long the slowest of these runs has taken to leave."""
    step = max((rundir.number(one.state, "step_seconds") for one in facts), default=0.0)
    save = max((rundir.number(one.state, "save_seconds") for one in facts), default=0.0)
    return Known(step=step, save=save, needed=lead_time(step=step, save=save) if step or save else None)


def _check(request: Request, site: Cluster, *, known: Known, cluster: str) -> list[str]:
    """The notes of a request that is possible. Raises UserError with every reason why it isn't."""
    verdict = preflight.check(request, site, known=known)
    if verdict.refusals:
        reasons = [str(refusal) for refusal in verdict.refusals]
        raise UserError(reasons[0] if len(reasons) == 1 else "This can't run as it is asked for:\n"
                        + "\n".join(f"  - {reason}" for reason in reasons))
    if cluster == "slurm" and site.partitions is None:
        verdict.notes.append("Slurm can't be asked from here: nothing was checked against the cluster")
    return verdict.notes


# --- telling ----------------------------------------------------------------------------------------------------


def headline(wanted: Order) -> str:
    request = wanted.request
    ranks = request.nodes * request.tasks
    size = (f"{_many(request.nodes, 'node')} x {_many(request.tasks, 'task')}"
            + (f" with {'a GPU' if request.tasks == 1 else 'one GPU each'}" if request.gpus else "") if ranks > 1 else
            "one task" + (" with a GPU" if request.gpus else ""))
    if wanted.cluster == "debug":
        return "one task in this process"
    return f"{size}, {plan.limit_in_words(wanted.limit, cluster=wanted.cluster)}"


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def tell_plan(wanted: Order) -> list[str]:
    rates = [rate for rate in (plan.rate_of(one.records) for one in wanted.facts) if rate is not None]
    lines = plan.requeue_plan(wanted.request, wanted.configs[0], caps=Caps(), cluster=wanted.cluster,
                              limit=wanted.limit, site=wanted.site.config, rate=max(rates, default=None))
    return [f"what happens to it ({headline(wanted)})", *lines]


def dry_run(wanted: Order) -> int:
    """Shows what would be submitted. Writes nothing."""
    if wanted.cluster == "slurm":
        name = snapshot.new_id()
        script = _slurm_executor(wanted, [run_dir / snapshot.FOLDER / name for run_dir in wanted.run_dirs])
        print(script.script(len(wanted.configs)))
        print("# --- end of the script; the snapshot's name is the time of the submission\n")
    print("\n".join(tell_plan(wanted)))
    for run_dir, config in zip(wanted.run_dirs, wanted.configs, strict=True):
        print(f"  {'run':12s} {_short(run_dir)} (seed {config.seed}), {rundir.goes_on(run_dir)}")
    print("dry run: nothing was submitted, nothing was written.")
    return EXIT_FINISHED


def _short(path: Path) -> str:
    """A path as people would type it from here."""
    here = snapshot.working_directory()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _say(text: str) -> None:
    print(f"alexnet-ddp: {text}", file=sys.stderr, flush=True)


# --- submitting -------------------------------------------------------------------------------------------------


def _slurm_executor(wanted: Order, snapshots: Sequence[Path]) -> executors.SlurmExecutor:
    return executors.slurm(wanted.folder, request=wanted.request, profile=wanted.profile, keys=wanted.keys,
                           options=wanted.options, snapshots=snapshots, cwd=wanted.cwd, parallel=wanted.parallel)


def hand_over(wanted: Order) -> list[Followed]:
    """Freezes and submits; returns what there is to follow. Nothing is left behind when Slurm refuses."""
    made = [snapshot.freeze(config, cwd=wanted.cwd, command=wanted.command, lead=wanted.request.lead, caps={},
                            accept_changes=wanted.accept_changes) for config in wanted.configs]
    try:
        if wanted.cluster == "slurm":
            jobs = executors.submit_slurm(_slurm_executor(wanted, made), made)
        else:
            jobs = [executors.submit_local(made[0], wanted.folder, request=wanted.request, profile=wanted.profile)]
    except UserError:
        rundir.discard(made, wanted.folder)
        raise
    runs = []
    for job, path, run_dir in zip(jobs, made, wanted.run_dirs, strict=True):
        log = wanted.folder / f"{job}_0_log.out"
        number, _, task = job.partition("_")
        if wanted.cluster == "slurm":
            try:
                add_attempt(run_dir, "submit", job=number, array=job if task else None, snapshot=path.name,
                            command=wanted.command)
            except OSError as error:  # Slurm has the job already: its number must not be lost over this
                _say(f"note: job {job} is submitted, but {run_dir} can't be written ({error.strerror}).")
        if task:
            log = rundir.link(log, run_dir / SUBMISSION)
        runs.append(Followed(run_dir, log, job, label=run_dir.name if len(jobs) > 1 else ""))
    return runs


def tell_submitted(wanted: Order, runs: Sequence[Followed]) -> None:
    job = runs[0].job.partition("_")[0]
    what = f"job {job}" if wanted.cluster == "slurm" else f"process {job} on this machine"
    array = f", a job array of {len(runs)}" if len(runs) > 1 else ""
    print(f"submitted {what}{array}: {headline(wanted)}")
    for run in runs:
        title = f"{run.job}  " if len(runs) > 1 else ""
        print(f"  run     {title}{_short(run.run_dir)}, {rundir.goes_on(run.run_dir)}")
        print(f"  log     {title}{_short(run.log)}")
    print(f"  status: alexnet-ddp status {' '.join(shlex.quote(_short(run.run_dir)) for run in runs)}")
    stop = f"scancel {job}" if wanted.cluster == "slurm" else f"kill {job}"
    print(f"  stop:   {stop} (or: touch {shlex.quote(_short(runs[0].run_dir / STOP_FILE))}, which saves first)")
    sys.stdout.flush()


def main(words: list[str]) -> int:
    """Returns the exit code; with --follow, the run's. Raises UserError."""
    options = parser().parse_intermixed_args(words)
    wanted = order(options, command=shlex.join(["alexnet-ddp", "submit", *words]))
    if not wanted.configs:
        return EXIT_FINISHED  # all are finished, and it was said
    for note in wanted.notes:
        _say(f"note: {note}.")
    if options.dry_run:
        return dry_run(wanted)
    moved = rundir.set_aside(wanted.run_dirs, say=_say) if options.fresh else []
    try:
        if wanted.cluster == "debug":
            made = snapshot.freeze(wanted.configs[0], cwd=wanted.cwd, command=wanted.command, lead=wanted.request.lead,
                                   caps={}, accept_changes=wanted.accept_changes)
            return executors.run_here(made, wanted.folder)
        runs = hand_over(wanted)
    except UserError:
        rundir.put_back(moved, say=_say)
        raise
    tell_submitted(wanted, runs)
    return follow(runs, local=wanted.cluster == "local") if options.follow else EXIT_FINISHED


if __name__ == "__main__":
    os.environ.pop("RANK", None)  # this is nobody's rank: its errors are told
    sys.exit(answer(main, sys.argv[1:]))
