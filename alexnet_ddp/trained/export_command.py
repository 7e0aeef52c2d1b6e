"""The command `export`."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import get_args

from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.models.source import find
from alexnet_ddp.trained.command import MODEL_HELP, overrides_among, tell_notes
from alexnet_ddp.trained.export import SUFFIXES, Exported, Format, export
from alexnet_ddp.trained.model import Model, load_model
from alexnet_ddp.trained.parity import HALF_TOLERANCE, TOLERANCE
from alexnet_ddp.trained.repository import publish, rollback
from alexnet_ddp.words import Parser


def stem(spec: str, model: Model) -> str:
    """What a model is called where nobody has said it: a run by its name, a file by its own, a net by its name."""
    source = find(spec)
    name = {"best": model.config.name, "checkpoint": model.config.name, "torchvision": source.name,
            "net": source.name}.get(source.kind) or source.path.name.partition(".")[0]
    return re.sub(r"[^\w.-]+", "_", name)


def parser() -> Parser:
    made = Parser(prog="alexnet-ddp export", description="A trained net as a file that others run. Before it gets its "
                  "name it is opened, and its logits are compared with the checkpoint's.")
    made.add_argument("model", metavar="MODEL", nargs="?", help=f"{MODEL_HELP}; not with --rollback")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="as in a recipe, where weights don't say it")
    made.add_argument("--format", choices=get_args(Format), default="onnx", help="default: onnx")
    made.add_argument("--half", action="store_true", help="weights and sums in fp16; it takes and gives float32 still")
    made.add_argument("--dynamic-batch", action="store_true", help="any number of images at a time, not one")
    made.add_argument("--out", metavar="FILE", help="default: the model's name, in this folder")
    made.add_argument("--force", action="store_true", help="replace a file that is there already")
    made.add_argument("--images", metavar="PLACE", nargs="+", default=[], help="pictures to show parity on: files, "
                      "folders, tars (default: data.val, else drawn ones)")
    made.add_argument("--tolerance", type=float, metavar="X", help="largest difference of a logit (default: "
                      f"{TOLERANCE:g}; with --half {HALF_TOLERANCE:g} of the largest logit)")
    made.add_argument("--repo", metavar="DIR", help="write the net (onnx, any batch) as the next version of a model in "
                      "a repository of NVIDIA Triton Inference Server")
    made.add_argument("--name", metavar="NAME", help="what the model is called there (default: the model's name)")
    made.add_argument("--rollback", action="store_true", help="with --repo and --name, without MODEL: serve what "
                      "was served before")
    return made


def main(words: list[str]) -> int:
    if any(word.startswith("--ro") and "--rollback".startswith(word) for word in words):  # or its beginning
        return _rollback(words)
    options = parser().parse_intermixed_args(words)
    swallowed, options.images = overrides_among(options.images)  # --images takes all words that follow it
    options.overrides += swallowed
    if options.model is None:
        raise UserError("export takes a MODEL. See: alexnet-ddp export --help")
    if options.repo is None and options.name is not None:
        raise UserError("--name is a model's in a repository: use it with --repo DIR, or --out FILE for a file.")
    if options.repo is not None and (options.out or options.format != "onnx"):
        raise UserError("A repository holds ONNX files under names and numbers of its own. With --repo leave out "
                        "--out, and --format but for onnx.")
    model = load_model(options.model, options.overrides)
    if options.repo is not None:
        return _publish(model, options)
    out = Path(options.out or stem(options.model, model) + SUFFIXES[options.format])
    if options.format == "safetensors" and options.dynamic_batch:
        raise UserError("safetensors holds weights and no graph: any batch goes. Leave out --dynamic-batch.")
    done = export(model, out, format=options.format, precision="fp16" if options.half else "fp32",
                  batch=None if options.dynamic_batch else 1, images=options.images, replace=options.force,
                  tolerance=options.tolerance)
    tell(model, done)
    return EXIT_FINISHED


def _publish(model: Model, options: Namespace) -> int:
    done = publish(model, Path(options.repo), name=options.name or stem(options.model, model), images=options.images,
                   precision="fp16" if options.half else "fp32", tolerance=options.tolerance)
    tell(model, done.exported)
    before = f", version {done.before} was before; --rollback goes back" if done.before else ""
    print(f"{done.name}: version {done.version} is to be served{before}. A running server takes it when it is told to "
          "load the model.")
    return EXIT_FINISHED


def _rollback(words: list[str]) -> int:
    """Which needs no model."""
    made = Parser(prog="alexnet-ddp export", description="Back to the version that was served before.")
    made.add_argument("--rollback", action="store_true")
    made.add_argument("--repo", metavar="DIR", required=True)
    made.add_argument("--name", metavar="NAME", required=True)
    options = made.parse_args(words)
    before, now = rollback(Path(options.repo), name=options.name)
    print(f"{options.name}: version {now} is to be served, no longer version {before}, which is kept. A running server "
          "takes it when it is told to load the model.")
    return EXIT_FINISHED


def tell(model: Model, done: Exported) -> None:
    """What was written, for people."""
    tell_notes(done.notes)
    print(f"{model.where} -> {done.path} ({done.bytes / 1e6:.2f} MB)")
    print(f"parity: {done.parity}")
