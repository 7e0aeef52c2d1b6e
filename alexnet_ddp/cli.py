"""The command `alexnet-ddp`. Nothing heavy is imported before a command needs it: `--help` answers at once."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable

from alexnet_ddp import __version__
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER, UserError
from alexnet_ddp.words import Parser, answer

ABOUT = """alexnet-ddp: the ImageNet trainer that survives a cluster.

usage: alexnet-ddp COMMAND ...        (the same as python -m alexnet_ddp COMMAND ...)

  train CONFIG [key=value ...]        train, or go on with, the run that CONFIG names
  submit CONFIG [key=value ...]       the same on a SLURM cluster, requeued and resumed with nobody watching
  status [RUN ...]                    where runs stand, and why
  doctor slurm                        what this cluster's settings mean for a run
  report RUN [RUN ...]                accuracy of runs side by side; mean and deviation over seeds
  evaluate MODEL [data.val=...]       how often a trained net is right, exactly; --crops 10, --per-class, --confusion
  validate MODEL [data.val=...]       the same as evaluate
  predict MODEL IMAGE|FOLDER|TAR ...  the likeliest classes of photographs, as a table, JSON lines or CSV
  export MODEL [--format F]           a trained net as an ONNX file and the like, once its logits are the checkpoint's
  quantize MODEL --scheme int8-...    int8 linear layers: accuracy, size and latency before and after
  prune MODEL --amount 0.2            the least weights at zero, the same table; --finetune CONFIG trains it on
  features MODEL DATA --layer fc7 --out FILE   what a layer makes of photographs, for other learners; a linear probe
  visualize RUN                       first-layer kernels, training curves and worst mistakes as pictures
  models                              the nets there are;  models show NAME: layers, sizes, parameters, MACs
  compare MODEL [MODEL ...]           nets side by side: accuracy, size, latency, throughput, memory
  data index WHERE                    what lies in a folder, tar or shards
  data pack SRC DST                   the same images smaller or as bare pixels, in checksummed tars
  data verify WHERE                   a pack's checksums; --decode: every image in full
  data stats WHERE                    sizes, class balance, mean, deviation and PCA of the colours
  data show CONFIG --out FILE.png     a contact sheet of what the net really sees
  data doctor WHERE                   how many GPUs this machine's storage, memory and cores can feed
  data download cifar10 DST           fetch CIFAR-10 and lay it out as folders of images
  data demo DST                       draw pictures of up to twelve kinds of figure, without a network
  demo                                train on two ranks on data made on the spot, stop, go on, prove it exact

On N GPUs:   torchrun --standalone --nproc-per-node=N -m alexnet_ddp train CONFIG
        or   alexnet-ddp train CONFIG --nproc-per-node N
Several seeds, one run after the other:   alexnet-ddp train CONFIG seed=0..4      (submit: a job each)

Exit codes: 0 finished, 75 stopped and resumable, 2 user error, 1 failed, 69 the hosts of a job don't reach each other,
130 second Ctrl-C. A bare torchrun turns every code but 0 into 1; so under it a rank that stops exits 0, and state.json
in the run directory is the truth (a signal to torchrun itself reaches the ranks, which save; torchrun then exits 1).

alexnet-ddp COMMAND --help says more."""

def train(words: list[str]) -> int:
    from alexnet_ddp.invocation import train as command

    return command(words)


def models(words: list[str]) -> int:
    parser = Parser(prog="alexnet-ddp models", description="The nets there are; show NAME: layers and costs.")
    parser.add_argument("action", nargs="?", choices=["list", "show"], default="list")
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("options", nargs="*", metavar="key=value", help="a recipe's model.*, without model. in front, "
                        "and image_size (a recipe's augment.size)")
    options = parser.parse_args(words)

    from alexnet_ddp.models import zoo

    if options.action == "list":
        print("\n".join(zoo.names()))
        return EXIT_FINISHED
    if options.name is None:
        raise UserError("models show takes a NAME, such as alexnet_single.")

    from alexnet_ddp.config import build, parse_override

    wanted = {".".join(path): value for path, value in map(parse_override, options.options)}
    size = {"size": wanted.pop("image_size")} if "image_size" in wanted else {}
    recipe = build({"model": {**wanted, "name": options.name}, "augment": size, "data": {"train": "-"}})
    options_of_model = {option: getattr(recipe.model, option) for option in zoo.OPTIONS}
    print(zoo.show(recipe.model.name, image_size=recipe.augment.size, **options_of_model))
    return EXIT_FINISHED


def data(words: list[str]) -> int:
    from alexnet_ddp.data.tools.commands import main as command

    return command(words)


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


def report(words: list[str]) -> int:
    from alexnet_ddp.results import main as command

    return command(words)


def compare(words: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in training: threads that spin take the cores from others

    from alexnet_ddp.trained.comparison import main as command

    return command(words)


def evaluate(words: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in training: threads of torch beside those that decode

    from alexnet_ddp.trained.accuracy import main as command

    return command(words)


def validate(words: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from alexnet_ddp.trained.accuracy import main as command

    return command(words, name="validate")


def predict(words: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from alexnet_ddp.trained.prediction_table import main as command

    return command(words)


def export(words: list[str]) -> int:
    from alexnet_ddp.trained.export_command import main as command

    return command(words)


def quantize(words: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from alexnet_ddp.trained.quantization import main as command

    return command(words)


def prune(words: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from alexnet_ddp.trained.pruning import main as command

    return command(words)


def features(words: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from alexnet_ddp.trained.feature_command import main as command

    return command(words)


def visualize(words: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from alexnet_ddp.trained.gallery_command import main as command

    return command(words)


def doctor(words: list[str]) -> int:
    from launch.doctor import main as command

    return command(words)


COMMANDS: dict[str, Callable[[list[str]], int]] = {"train": train, "submit": submit, "status": status,
                                                   "report": report,
                                                   "doctor": doctor, "models": models, "data": data, "demo": demo,
                                                   "export": export,
                                                   "compare": compare,
                                                   "evaluate": evaluate, "validate": validate, "predict": predict,
                                                   "quantize": quantize, "prune": prune,
                                                   "features": features, "visualize": visualize}


def main(words: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; a user's mistake is one clear message, once."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help", "help"):
        print(ABOUT)
        return EXIT_FINISHED if words else EXIT_USER
    if words[0] in ("-V", "--version", "version"):
        print(f"alexnet-ddp {__version__}")
        return EXIT_FINISHED
    return answer(_command, words)


def _command(words: list[str]) -> int:
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        raise UserError(f"There is no command '{words[0]}'." + (f" Did you mean '{near[0]}'?" if near else
                        f" There are: {', '.join(COMMANDS)}."))
    return COMMANDS[words[0]](words[1:])
