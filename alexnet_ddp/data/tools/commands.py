"""The command `alexnet-ddp data`. Nothing heavy is imported before a sub-command needs it."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from alexnet_ddp.errors import EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_USER, UserError
from alexnet_ddp.words import Parser

ABOUT = """usage: alexnet-ddp data COMMAND ...

  index WHERE                      what lies in a folder, tar or shards: samples, classes, identity
  pack SRC DST                     the samples in one stored stage, as a few checksummed tars; goes on after a kill
  verify WHERE                     a pack's checksums; --decode: every image of any source, in full
  stats WHERE                      sizes, class balance, kinds; mean, deviation and PCA of the colours
  show CONFIG|WHERE --out FILE.png a contact sheet of what the net really sees
  doctor WHERE                     how many GPUs this machine's storage, memory and cores can feed
  download cifar10 DST             fetch CIFAR-10 and lay it out as folders of images
  demo DST                         draw pictures of up to twelve kinds of figure, without a network

WHERE and SRC: a folder of class directories, a tar, tar::inside, shards or a pack (see docs/data.md).
alexnet-ddp data COMMAND --help says more."""

WHERE = "folder, file.tar, file.tar::inside, shards or a pack"


def main(words: list[str]) -> int:
    """Runs a sub-command and returns its exit code. Raises UserError; SystemExit after --help."""
    if words and words[0] in ("-h", "--help", "help"):
        print(ABOUT)
        raise SystemExit(EXIT_FINISHED)
    if not words:
        raise UserError(f"A sub-command is required: {', '.join(COMMANDS)}. See: alexnet-ddp data --help")
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        raise UserError(f"There is no command 'data {words[0]}'." + (f" Did you mean 'data {near[0]}'?" if near else
                        f" There are: {', '.join(COMMANDS)}."))
    try:
        return COMMANDS[words[0]](words[1:])
    except KeyboardInterrupt:
        print(f"alexnet-ddp: interrupted: the same command {'goes on' if words[0] == 'pack' else 'starts over'}",
              file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser(name: str, about: str, *, more: str = "") -> Parser:
    return Parser(prog=f"alexnet-ddp data {name}", description=about, epilog=more,
                  formatter_class=argparse.RawDescriptionHelpFormatter)


def _threads(parser: Parser) -> None:
    parser.add_argument("--threads", default="auto", metavar="N",
                        help="threads that read and decode (default: auto, all cores this process may use)")


def _number_of_threads(word: str) -> int | None:
    """None for auto."""
    if word == "auto":
        return None
    if not word.isdigit() or not 1 <= int(word) <= 1024:
        raise UserError(f"--threads must be auto or a number from 1 to 1024, got '{word}'.")
    return int(word)


class Report(Protocol):
    """What a command that looks at a source has found."""

    @property
    def is_well(self) -> bool: ...
    def facts(self) -> dict[str, Any]: ...
    def summary(self) -> str: ...


def _report(parser: Parser, words: list[str], command: Callable[[argparse.Namespace, int | None], Report]) -> int:
    """Looks at WHERE by `command`, prints what it found, and returns the exit code for that."""
    parser.add_argument("where", metavar="WHERE", help=WHERE)
    parser.add_argument("--json", action="store_true", help="print it as JSON, with all there is")
    _threads(parser)
    options = parser.parse_args(words)
    report = command(options, _number_of_threads(options.threads))
    print(json.dumps(report.facts(), indent=1) if options.json else report.summary())
    return EXIT_FINISHED if report.is_well else EXIT_USER


def index(words: list[str]) -> int:
    parser = _parser("index", "What the program sees there. The table of samples is kept for the next start.")
    parser.add_argument("where", metavar="WHERE", help=WHERE)
    options = parser.parse_args(words)

    from alexnet_ddp.data.index import open_index, summary

    with open_index(options.where) as opened:
        print(summary(opened))
    return EXIT_FINISHED


def download(words: list[str]) -> int:
    parser = _parser("download", "Fetches CIFAR-10 by torchvision's downloader and writes it as folders of PNG files.")
    parser.add_argument("what", metavar="cifar10")
    parser.add_argument("destination", metavar="DST", nargs="?", default="data/cifar10",
                        help="folder to make (default: data/cifar10)")
    options = parser.parse_args(words)
    if options.what != "cifar10":
        raise UserError(f"data download knows cifar10, got '{options.what}'. ImageNet is had from image-net.org, with "
                        "an account.")

    from alexnet_ddp.data.tools.download import download_cifar10

    print(f"CIFAR-10 lies in {download_cifar10(Path(options.destination))}")
    return EXIT_FINISHED


def demo(words: list[str]) -> int:
    parser = _parser("demo", "Draws JPEGs of kinds of figure and texture on the spot: DST/train and DST/val.")
    parser.add_argument("destination", metavar="DST", nargs="?", default="data/demo",
                        help="folder to make (default: data/demo)")
    parser.add_argument("--classes", type=int, default=12, metavar="N", help="kinds, 2 to 12 (default: 12)")
    parser.add_argument("--per-class", type=int, default=250, metavar="N",
                        help="pictures of a kind to train on; 50 more are held out (default: 250)")
    options = parser.parse_args(words)

    from alexnet_ddp.data.tools.demo import make_demo

    made = make_demo(Path(options.destination).expanduser(), classes=options.classes, train_per_class=options.per_class)
    print(f"{made}: {options.classes} classes, {options.per_class} pictures of each to train on, 50 held out")
    return EXIT_FINISHED


def pack(words: list[str]) -> int:
    parser = _parser(
        "pack", "Packs the samples of SRC in one stored stage into the folder DST: tar shards and a pack.json with "
        "their\nsha256. Labels, names and sample ids stay, so that a run may use either.",
        more="The same source gives the same bytes, with any number of threads. Killed at any moment, the same command "
        "goes on.\nUse it with data.train=DST data.stored=STAGE.")
    parser.add_argument("source", metavar="SRC", help=WHERE + " (of originals)")
    parser.add_argument("destination", metavar="DST", help="a new or empty folder, or that of an interrupted pack")
    parser.add_argument("--stage", default="short256",
                        help="shortN: short side N, JPEG quality 90 | maxN: at most N a side, the same | rawN: the "
                        "central N x N pixels of short side N, uint8 | original: the files' own bytes "
                        "(default: short256)")
    parser.add_argument("--samples-per-shard", type=int, default=None, metavar="N",
                        help="samples of the source in a shard (default: 5120: ImageNet in 251 shards)")
    _threads(parser)
    parser.add_argument("--skip-damaged", action="store_true",
                        help="leave damaged images out and list them in pack.json; ids and identity are then the "
                        "pack's own, so that no run goes on from the source to the pack")
    options = parser.parse_args(words)
    threads = _number_of_threads(options.threads)

    from alexnet_ddp.data.packs.pack import SAMPLES
    from alexnet_ddp.data.packs.pack import pack as command

    packed = command(options.source, destination=Path(options.destination).expanduser(), stage=options.stage,
                     samples_per_shard=SAMPLES if options.samples_per_shard is None else options.samples_per_shard,
                     threads=threads, skip_damaged=options.skip_damaged)
    print(packed.summary())
    return EXIT_FINISHED


def verify(words: list[str]) -> int:
    parser = _parser("verify", "Compares a pack's shards with the sizes, sha256 sums, counts and identity in its "
                     "pack.json.\nWith --decode every image of any source is decoded in full.",
                     more="Exit code 0 only if all is well, 2 if anything is damaged.")
    parser.add_argument("--decode", action="store_true", help="decode every image and name those that are damaged")

    def command(options: argparse.Namespace, threads: int | None) -> Report:
        from alexnet_ddp.data.packs.verify import verify

        return verify(options.where, decode=options.decode, threads=threads)

    return _report(parser, words, command)


def stats(words: list[str]) -> int:
    parser = _parser("stats", "Image sizes, bytes, class balance, kinds of images, and the colours' mean, standard "
                     "deviation\nand principal components, exactly, over every pixel of the images looked at.",
                     more="Exit code 2 if images were damaged; they are named and left out of the figures.")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="look at N samples, taken evenly")

    def command(options: argparse.Namespace, threads: int | None) -> Report:
        from alexnet_ddp.data.tools.stats import stats

        return stats(options.where, limit=options.limit, threads=threads)

    return _report(parser, words, command)


def show(words: list[str]) -> int:
    parser = _parser("show", "A contact sheet (PNG) of what the net really sees: the trainer's own samples, crops and "
                     "augmentation.", more="Without a recipe the defaults are used: `data show photos.tar "
                     "augment.crop=random --out sheet.png`.")
    parser.add_argument("what", metavar="CONFIG|WHERE", help="a recipe, a run's directory, or " + WHERE)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the recipe")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="where the picture goes")
    parser.add_argument("--count", type=int, default=16, help="samples, or epochs with --sample (default: 16)")
    parser.add_argument("--epoch", type=int, default=0, help="the epoch, or the first one, from 0 (default: 0)")
    parser.add_argument("--sample", type=int, default=None, metavar="ID", help="this sample in --count epochs")
    parser.add_argument("--stages", action="store_true", help="three pictures each: as stored with the box of the "
                        "crop, as cropped, and after flip, rotation and colours")
    options = parser.parse_intermixed_args(words)
    if not options.out.lower().endswith(".png"):
        raise UserError(f"--out must end in .png, got {options.out}.")

    from alexnet_ddp.data.tools import show as sheets

    config = sheets.open_recipe(options.what, options.overrides)
    sheet = sheets.show(config, count=options.count, epoch=options.epoch, sample=options.sample,
                        with_stages=options.stages)
    sheets.save(sheet, Path(options.out).expanduser())
    print(f"{sheet.width} x {sheet.height} pixels in {options.out}")
    return EXIT_FINISHED


def doctor(words: list[str]) -> int:
    from alexnet_ddp.data.tools.doctor import main as command

    return command(words)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "index": index, "pack": pack, "verify": verify, "stats": stats, "show": show, "doctor": doctor,
    "download": download, "demo": demo}
