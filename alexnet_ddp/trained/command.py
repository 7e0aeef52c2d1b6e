"""What the commands on trained nets have in common: their words, and the group of ranks they run in."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

import torch.distributed as dist

from alexnet_ddp import distributed
from alexnet_ddp.distributed import World, first_on_node
from alexnet_ddp.errors import UserError
from alexnet_ddp.trained.model import Model, load_model
from alexnet_ddp.words import Parser

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")
PATIENCE = 600.0  # seconds that a rank waits for the others

MODEL_HELP = ("a run directory (RUN, RUN@last, RUN@step_N), a checkpoint, a file of weights or an exported net, "
              "torchvision:NAME, or a net's name")


def parser(name: str, description: str, *, overrides: str = "as in a recipe, such as data.val=/data/val",
           metavar: str = "key=value") -> Parser:
    """`alexnet-ddp NAME MODEL [key=value ...] [--device D]`; parse it with parse_intermixed_args."""
    made = Parser(prog=f"alexnet-ddp {name}", description=description)
    made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    made.add_argument("overrides", metavar=metavar, nargs="*", help=overrides)
    made.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda where it is")
    return made


def overrides_among(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are key=value, and the others; a file that is called so is a file."""
    overrides = [word for word in words if OVERRIDE.match(word) and not os.path.exists(word)]
    return overrides, [word for word in words if word not in overrides]


def check_crops(overrides: Sequence[str]) -> None:
    """Raises UserError where the number of crops is asked for as in a recipe: of commands it is a flag."""
    for text in overrides:
        if text.partition("=")[0] in ("crops", "evaluate.crops"):
            raise UserError(f"{text}: the number of crops is a flag here: --crops 10 (or 1). In training there is one.")


@contextlib.contextmanager
def group(device: str) -> Iterator[World]:
    """The ranks that torchrun started, or a group of one. Raises UserError on all ranks alike."""
    world = distributed.join(device=device, timeout=PATIENCE)
    try:
        yield world
    finally:
        distributed.leave()


def load_on_all(world: World, spec: str, overrides: Sequence[str]) -> Model:
    """The model on every rank's device, fetched once a node. Raises UserError on all ranks alike, also where they have
    read different weights: those of a run that is training, or files of their own."""
    model = first_on_node(world, lambda: load_model(spec, overrides, device=world.device))
    check_same(world, model.facts.get("sha256"), f"The ranks have read different weights of {spec}: it has changed "
               "meanwhile, or the hosts have files of their own. Start again, or name a checkpoint (RUN@step_N).")
    return model


def check_same(world: World, value: object, otherwise: str) -> None:
    """Raises UserError, `otherwise`, on all ranks where one has another value."""
    told: list[object] = [None] * world.size
    dist.all_gather_object(told, value, group=world.control)
    if any(other != told[0] for other in told):
        raise UserError(otherwise)


def on_ranks(name: str, words: Sequence[str], *, ranks: str) -> int:
    """`alexnet-ddp NAME WORDS` on so many ranks of this machine (a number, or auto); returns the exit code.

    `words` may hold --nproc-per-node, which the ranks aren't told. Raises UserError.
    """
    from launch.agent import launch, ranks_wanted

    if "RANK" in os.environ:
        raise UserError("--nproc-per-node starts the ranks itself, and this is already a rank of torchrun. Leave out "
                        "the one or the other.")
    left, skip = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag.startswith("--n") and "--nproc-per-node".startswith(flag.replace("_", "-")):  # or its beginning
            skip = not equals
        elif skip:
            skip = False
        else:
            left.append(word)
    return launch([name, *left], ranks=ranks_wanted(ranks))


def tell_notes(notes: Iterable[str]) -> None:
    """On stderr, so that what a command prints stays what it prints."""
    for note in notes:
        print(f"alexnet-ddp: note: {note}", file=sys.stderr, flush=True)
