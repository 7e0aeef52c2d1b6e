"""The command `train`: from words to a run, on the ranks it finds itself among or starts."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from alexnet_ddp.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, UserError
from alexnet_ddp.runfiles import METRICS
from alexnet_ddp.words import Parser

OVERFIT_LOSS = 0.1  # mean cross-entropy at which a few samples count as learned by heart


def train(words: list[str]) -> int:
    parser = Parser(prog="alexnet-ddp train", description="Trains the run that CONFIG names, or goes on with it.")
    parser.add_argument("config", metavar="CONFIG", help="a recipe, such as configs/alexnet_single.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted overrides, such as "
                        "optim.lr=0.02; seed=0..4 (or 0,3,7): runs NAME-seed0 ... one after the other")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", metavar="N|auto",
                        help="start N ranks on this machine (torchrun inside)")
    parser.add_argument("--fresh", action="store_true", help="start over; the old run directory is kept, renamed")
    parser.add_argument("--accept-changes", action="store_true", help="go on although the recipe has changed")
    parser.add_argument("--overfit", metavar="N", type=int, help="first sanity check: learn N samples by heart")
    parser.add_argument("--print-config", action="store_true", help="print the effective recipe and leave")
    parser.add_argument("--print-schedule", action="store_true", help="show the learning rate of the run and leave")
    parser.add_argument("--out", metavar="FILE", help="--print-schedule: also draw it, as .png or .svg")
    parser.add_argument("--samples", metavar="N", type=int,
                        help="--print-schedule: training images, where the data aren't at hand")
    options = parser.parse_intermixed_args(words)
    check_words(options)

    from alexnet_ddp import config as recipes
    from alexnet_ddp import seeds

    overrides, several = seeds.split(options.overrides)
    if several is not None and not options.print_schedule:  # which no seed moves
        return train_seeds(options, overrides, several)
    if options.overfit is not None:
        # What the user asks for comes last, and wins.
        overrides = overfit(options.overfit, recipes.load(options.config, overrides).name) + overrides
    config = recipes.load(options.config, overrides)
    fresh = options.fresh or options.overfit is not None
    if options.print_config:
        print(recipes.dump(config), end="")
        return EXIT_FINISHED
    if options.print_schedule:
        from alexnet_ddp.curve import show

        show(config, samples=options.samples, out=options.out)
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
        from launch.rendezvous import enter

        enter()

    from alexnet_ddp.train import train as train_run

    code = train_run(config, requests=requests, fresh=fresh, accept_changes=options.accept_changes)
    if options.overfit and not code and os.environ.get("RANK", "0") == "0":
        return overfit_verdict(config.run_dir, options.overfit)
    if code == EXIT_STOPPED and "TORCHELASTIC_RUN_ID" in os.environ:
        return EXIT_FINISHED  # torchrun would kill the other ranks and call it a failure
    return code


def check_words(options: argparse.Namespace) -> None:
    """Raises UserError for words that go with others only."""
    if not options.print_schedule and (options.out is not None or options.samples is not None):
        raise UserError("--out and --samples go with --print-schedule.")
    if options.samples is not None and options.samples < 1:
        raise UserError(f"--samples takes a number of images above 0, got {options.samples}.")


def train_seeds(options: argparse.Namespace, overrides: list[str], several: str) -> int:
    """`train CONFIG seed=0..4`: the runs of all these seeds. Raises UserError."""
    from alexnet_ddp import config as recipes
    from alexnet_ddp import seeds

    if options.overfit is not None:
        raise UserError(f"--overfit is one run, got seed={several}. Give it one seed.")
    if options.print_config:
        print("---\n".join(map(recipes.dump, seeds.configs(options.config, overrides, seeds.parse(several)))), end="")
        return EXIT_FINISHED
    flags = [flag for flag, given in (("--fresh", options.fresh), ("--accept-changes", options.accept_changes))
             if given]
    if options.nproc_per_node is not None:
        flags += ["--nproc-per-node", options.nproc_per_node]
    return seeds.train(options.config, overrides, text=several, flags=flags)


def overfit(samples: int, name: str) -> list[str]:
    """Overrides that make a run learn a few samples by heart: no randomness, no regularisation."""
    if samples < 1:
        raise UserError(f"--overfit takes a number of samples above 0, got {samples}.")
    return [f"name={name}-overfit", f"data.limit={samples}", "data.val=null", f"global_batch={samples}",
            "epochs=300", "model.dropout=0", "label_smoothing=0", "optim.weight_decay=0",
            "augment.crop=center", "augment.flip=0", "augment.rotation=0", "augment.color_jitter=[0,0,0,0]",
            "augment.pca_lighting=0", "augment.policy=none", "augment.erasing=0", "augment.mixup=0",
            "augment.cutmix=0", "schedule.name=constant", "schedule.warmup_epochs=0", "log.steps=10",
            "checkpoint.epochs=null", "clip_norm=10", f"limits.loss={OVERFIT_LOSS}"]


def overfit_verdict(run_dir: Path, samples: int) -> int:
    """Says what the sanity check has shown."""
    from alexnet_ddp.sinks import read_records

    loss = read_records(run_dir / METRICS)[-1]["loss"]
    loss = math.inf if loss is None else loss  # of a step that was not finite, or without an image that counts
    if loss < OVERFIT_LOSS:
        print(f"alexnet-ddp: the net has learned the {samples} samples by heart (loss {loss:.3f}): net, data and "
              "optimizer work together.")
        return EXIT_FINISHED
    print(f"alexnet-ddp: the net has not learned {samples} samples by heart (loss {loss:.3f} after 300 steps, under "
          f"{OVERFIT_LOSS} wanted): look at optim.lr, at the labels, and at fewer samples first.")
    return EXIT_FAILED
