"""What the commands on trained nets have in common: their words, and the group of ranks they run in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from alexnet_ddp import distributed
from alexnet_ddp.distributed import World, everywhere
from alexnet_ddp.trained.model import Model, load_model
from alexnet_ddp.words import Parser

PATIENCE = 600.0  # seconds that a rank waits for the others

MODEL_HELP = ("a run directory (RUN, RUN@last, RUN@step_N), a checkpoint, a file of weights or an exported net, "
              "torchvision:NAME, or a net's name")


def parser(name: str, description: str, *, overrides: str = "as in a recipe, such as data.val=/data/val") -> Parser:
    """`alexnet-ddp NAME MODEL [key=value ...] [--device D]`; parse it with parse_intermixed_args."""
    made = Parser(prog=f"alexnet-ddp {name}", description=description)
    made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    made.add_argument("overrides", metavar="key=value", nargs="*", help=overrides)
    made.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda where it is")
    return made


@contextlib.contextmanager
def group(device: str) -> Iterator[World]:
    """The ranks that torchrun started, or a group of one. Raises UserError on all ranks alike."""
    world = distributed.join(device=device, timeout=PATIENCE)
    try:
        yield world
    finally:
        distributed.leave()


def load_on_all(world: World, spec: str, overrides: Sequence[str]) -> Model:
    """The model on every rank's device; a UserError of one is raised by all."""
    return everywhere(world, lambda: load_model(spec, overrides, device=world.device))
