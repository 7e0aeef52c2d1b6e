"""The command `alexnet-ddp`. Nothing heavy is imported before a command needs it: `--help` answers at once."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from alexnet_ddp import __version__
from alexnet_ddp.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_USER, UserError

ABOUT = """alexnet-ddp: the ImageNet trainer that survives a cluster.

usage: alexnet-ddp COMMAND ...        (the same as python -m alexnet_ddp COMMAND ...)

  train CONFIG [key=value ...]        train, or go on with, the run that CONFIG names
  submit CONFIG [key=value ...]       the same on a SLURM cluster, requeued and resumed with nobody watching
  status [RUN ...]                    where runs stand, and why
  doctor slurm                        what this cluster's settings mean for a run
  models                              the nets there are;  models show NAME: layers, sizes, parameters, MACs
  data index WHERE                    what lies in a folder, tar or shards
  data download cifar10 DST           fetch CIFAR-10 and lay it out as folders of images
  demo                                train on two ranks on data made on the spot, stop, go on, prove it exact

On N GPUs:   torchrun --standalone --nproc-per-node=N -m alexnet_ddp train CONFIG
        or   alexnet-ddp train CONFIG --nproc-per-node N

Exit codes: 0 finished, 75 stopped and resumable, 2 user error, 1 failed, 130 second Ctrl-C. A bare torchrun
turns every code but 0 into 1; so under it a rank that stops exits 0, and state.json in the run directory is the
truth (a signal to torchrun itself reaches the ranks, which save; torchrun then exits 1).

alexnet-ddp COMMAND --help says more."""

# Flags people know from other trainers, and what to write here.
ELSEWHERE = {
    "--batch-size": "use global_batch=..., the total over all ranks; torchvision's and timm's is per GPU",
    "-b": "use global_batch=..., the total over all ranks; torchvision's and timm's is per GPU",
    "--lr": "use optim.lr=..., for the global batch as it is",
    "--epochs": "use epochs=...",
    "--workers": "use data.threads=...: images are decoded by threads",
    "-j": "use data.threads=...: images are decoded by threads",
    "--resume": "leave it out: a run whose directory has a checkpoint is resumed; --fresh starts over",
    "--seed": "use seed=...",
    "--data": "use data.train=... and data.val=...",
    "--amp": "use amp=bf16 or amp=fp16",
    "--output-dir": "use runs=... (the folder of all runs) and name=...",
    "--name": "use name=...",
    "--gpus": "use --nproc-per-node N",
}


OVERFIT_LOSS = 0.1  # mean cross-entropy at which a few samples count as learned by heart


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors that teach."""

    def error(self, message: str) -> NoReturn:
        for flag, advice in ELSEWHERE.items():
            if message.startswith("unrecognized arguments:") and any(
                    word.partition("=")[0].replace("_", "-") == flag for word in message.split()[2:]):
                raise UserError(f"{flag} is not known here: {advice}.")
        raise UserError(f"{message}. See: {self.prog} --help")


def train(words: list[str]) -> int:
    parser = Parser(prog="alexnet-ddp train", description="Trains the run that CONFIG names, or goes on with it.")
    parser.add_argument("config", metavar="CONFIG", help="a recipe, such as configs/alexnet_single.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted overrides, such as optim.lr=0.02")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", metavar="N|auto",
                        help="start N ranks on this machine (torchrun inside)")
    parser.add_argument("--fresh", action="store_true", help="start over; the old run directory is kept, renamed")
    parser.add_argument("--accept-changes", action="store_true", help="go on although the recipe has changed")
    parser.add_argument("--overfit", metavar="N", type=int, help="first sanity check: learn N samples by heart")
    parser.add_argument("--print-config", action="store_true", help="print the effective recipe and leave")
    options = parser.parse_intermixed_args(words)

    from alexnet_ddp import config as recipes

    overrides = [*options.overrides]
    if options.overfit is not None:
        # What the user asks for comes last, and wins.
        overrides = overfit(options.overfit, recipes.load(options.config, overrides).name) + overrides
    config = recipes.load(options.config, overrides)
    fresh = options.fresh or options.overfit is not None
    if options.print_config:
        print(recipes.dump(config), end="")
        return EXIT_FINISHED
    if options.nproc_per_node is not None:
        from launch.agent import launch, ranks_wanted

        if "RANK" in os.environ:
            raise UserError("--nproc-per-node starts the ranks itself, and this is already a rank of torchrun. "
                            "Leave out the one or the other.")
        ranks = ranks_wanted(options.nproc_per_node)
        flags = [flag for flag, given in (("--fresh", fresh), ("--accept-changes", options.accept_changes)) if given]
        code = launch(["train", options.config, *overrides, *flags], ranks=ranks, run_dir=config.run_dir)
        return overfit_verdict(config.run_dir, options.overfit) if options.overfit and not code else code

    from alexnet_ddp.stop import StopRequests

    requests = StopRequests().install()  # before torch is imported, which takes seconds
    # OpenMP's threads spin while they wait, by default: beside decode threads that costs ten times the speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is told by us, in one line without C++ stacks
    if "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ:  # srun alexnet-ddp train ...
        from launch.job import enter

        enter()

    from alexnet_ddp.train import train as train_run

    code = train_run(config, requests=requests, fresh=fresh, accept_changes=options.accept_changes)
    if options.overfit and not code and os.environ.get("RANK", "0") == "0":
        return overfit_verdict(config.run_dir, options.overfit)
    if code == EXIT_STOPPED and "TORCHELASTIC_RUN_ID" in os.environ:
        return EXIT_FINISHED  # torchrun would kill the other ranks and call it a failure
    return code


def overfit(samples: int, name: str) -> list[str]:
    """Overrides that make a run learn a few samples by heart: no randomness, no regularisation."""
    if samples < 1:
        raise UserError(f"--overfit takes a number of samples above 0, got {samples}.")
    return [f"name={name}-overfit", f"data.limit={samples}", "data.val=null", f"global_batch={samples}",
            "epochs=300", "model.dropout=0", "optim.weight_decay=0", "augment.crop=center", "augment.flip=0",
            "augment.rotation=0", "augment.color_jitter=[0,0,0,0]", "augment.pca_lighting=0",
            "schedule.name=constant", "schedule.warmup_epochs=0", "log.steps=10", "checkpoint.epochs=null",
            "clip_norm=1", f"limits.loss={OVERFIT_LOSS}"]


def overfit_verdict(run_dir: Path, samples: int) -> int:
    """Says what the sanity check has shown."""
    from alexnet_ddp.sinks import read_records

    loss = read_records(run_dir / "metrics.jsonl")[-1]["loss"]
    if loss < OVERFIT_LOSS:
        print(f"alexnet-ddp: the net has learned the {samples} samples by heart (loss {loss:.3f}): net, data and "
              "optimizer work together.")
        return EXIT_FINISHED
    print(f"alexnet-ddp: the net has not learned {samples} samples by heart (loss {loss:.3f} after 300 steps, under "
          f"{OVERFIT_LOSS} wanted): look at optim.lr, at the labels, and at fewer samples first.")
    return EXIT_FAILED


def models(words: list[str]) -> int:
    parser = Parser(prog="alexnet-ddp models", description="The nets there are; show NAME: layers and costs.")
    parser.add_argument("action", nargs="?", choices=["list", "show"], default="list")
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("options", nargs="*", metavar="key=value", help="num_classes, in_channels, width, image_size")
    options = parser.parse_args(words)

    from alexnet_ddp.models import zoo

    if options.action == "list":
        print("\n".join(zoo.names()))
        return EXIT_FINISHED
    if options.name is None:
        raise UserError("models show takes a NAME, such as alexnet_single.")

    from alexnet_ddp.config import parse_override

    print(zoo.show(options.name, **{".".join(path): value for path, value in map(parse_override, options.options)}))
    return EXIT_FINISHED


def data(words: list[str]) -> int:
    parser = Parser(prog="alexnet-ddp data", description="index WHERE: what lies there; download cifar10 DST.")
    parser.add_argument("action", choices=["index", "download"])
    parser.add_argument("what", metavar="WHERE|cifar10")
    parser.add_argument("destination", metavar="DST", nargs="?", default="data/cifar10")
    options = parser.parse_args(words)
    if options.action == "index":
        from alexnet_ddp.data.index import open_index, summary

        with open_index(options.what) as index:
            print(summary(index))
        return EXIT_FINISHED

    from alexnet_ddp.data.download import download_cifar10

    if options.what != "cifar10":
        raise UserError(f"data download knows cifar10, got '{options.what}'. ImageNet is had from image-net.org, with "
                        "an account.")
    print(f"CIFAR-10 lies in {download_cifar10(Path(options.destination))}")
    return EXIT_FINISHED


def demo(words: list[str]) -> int:
    parser = Parser(prog="alexnet-ddp demo", description="The main job on data made on the spot: two ranks train, "
                    "are stopped, go on, and end in the very weights of a run that was never stopped.")
    parser.add_argument("--runs", default="runs", help="folder of run directories (default: runs)")
    options = parser.parse_args(words)

    from launch.demo import demo as run_demo

    return run_demo(options.runs)


def submit(words: list[str]) -> int:
    from launch.submit import main as command

    return command(words)


def status(words: list[str]) -> int:
    from launch.status import main as command

    return command(words)


def doctor(words: list[str]) -> int:
    from launch.doctor import main as command

    return command(words)


COMMANDS: dict[str, Callable[[list[str]], int]] = {"train": train, "submit": submit, "status": status,
                                                   "doctor": doctor, "models": models, "data": data, "demo": demo}


def main(words: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; a user's mistake is one clear message, once."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help", "help"):
        print(ABOUT)
        return EXIT_FINISHED if words else EXIT_USER
    if words[0] in ("-V", "--version", "version"):
        print(f"alexnet-ddp {__version__}")
        return EXIT_FINISHED
    try:
        if words[0] not in COMMANDS:
            near = difflib.get_close_matches(words[0], COMMANDS, n=1)
            raise UserError(f"There is no command '{words[0]}'." + (f" Did you mean '{near[0]}'?" if near else
                            f" There are: {', '.join(COMMANDS)}."))
        return COMMANDS[words[0]](words[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"alexnet-ddp: error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2.0)  # the first rank that leaves makes torchrun kill the others: let rank 0 speak first
        return error.code
