"""The command `features`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from alexnet_ddp.distributed import everywhere, first_on_node
from alexnet_ddp.errors import EXIT_FINISHED
from alexnet_ddp.trained import command
from alexnet_ddp.trained.feature_file import DTYPES, read_features
from alexnet_ddp.trained.feature_work import PART, plan
from alexnet_ddp.trained.features import assemble, claim, compute, open_photographs, told
from alexnet_ddp.trained.probe import check_probe, linear_probe
from alexnet_ddp.words import Parser

ABOUT = """Writes what a layer of a net makes of photographs, for another learner. DATA: class folders, a tar, shards
or a pack, of any classes. Under torchrun the ranks share the work; after a kill the same command goes on, on any number
of ranks, to the same bits. A damaged image keeps its place: zeros, and false in `whole`. Read the file with
alexnet_ddp.read_features(FILE), or any reader of safetensors."""


def main(words: list[str]) -> int:
    """Runs the command. Raises UserError."""
    parser = Parser(prog="alexnet-ddp features", description=ABOUT)
    parser.add_argument("model", metavar="MODEL", help=command.MODEL_HELP)
    parser.add_argument("data", metavar="DATA", help="photographs, such as /data/val or cifar.tar::test")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="as in a recipe, such as data.decoder=pillow")
    parser.add_argument("--layer", required=True, help="avgpool (what the classifier is given: flattened convolutional "
                        "features), fc6 or fc7 (its hidden layers, after the ReLU), or the name of any module")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--part", type=int, default=PART, metavar="N",
                        help=f"images that are written at once, and that a kill can cost each rank (default: {PART})")
    parser.add_argument("--linear-probe", metavar="TRAIN.safetensors",
                        help="fit a logistic regression to these features of training images, made by the same net and "
                        "layer, and say how many of DATA it gets right (scikit-learn)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda where it is")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", metavar="N|auto",
                        help="on N ranks of this machine (torchrun inside)")
    options = parser.parse_intermixed_args(words)
    if options.nproc_per_node is not None:
        return command.on_ranks("features", words, ranks=options.nproc_per_node)
    with ExitStack() as held:
        with command.group(options.device) as world:
            model = command.load_on_all(world, options.model, options.overrides)
            if world.rank == 0:
                command.tell_notes(model.notes)
            source = first_on_node(world, lambda: open_photographs(options.data, model))
            with source:
                work = everywhere(world, lambda: plan(model, source, layer=options.layer, out=options.out,
                                                      dtype=options.dtype, part=options.part))
                if options.linear_probe:
                    everywhere(world, lambda: check_probe(options.linear_probe, work.task,
                                                          classes=source.index.classes))
                claim(work, held, world=world)
                compute(work, model, source, world=world)
        if world.rank == 0:  # the others needn't wait for it
            print(told(work, assemble(work, source), source))
            if options.linear_probe:
                print(linear_probe(read_features(options.linear_probe), read_features(options.out)).told)
    return EXIT_FINISHED
