"""`alexnet-ddp data doctor WHERE`: how quick storage and decoding are here, what fits where, and what to do.

Reads only. The speeds are of a random sample of the records, on this machine as busy as it is now; data.verdict has the
rules, data.speeds the measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from alexnet_ddp.amounts import counted, human_bytes
from alexnet_ddp.data.tools.verdict import ASSUMED_GPU_RATE, Facts, Room, findings
from alexnet_ddp.errors import EXIT_FINISHED, UserError
from alexnet_ddp.findings import WIDTH, Finding, lines
from alexnet_ddp.words import Parser

SAMPLED = 20_000  # most records that are read
DECODED = 512  # most records that are decoded again and again
SHORT, RAW_SIDES = 256, (256, 160)  # pixels of the stages that are weighed
CONVERTED = 48  # records that are converted to short256
SHARE = 0.9  # of what is free that a cache takes


def measure(where: str, *, config_path: str | None = None, threads: int | None = None, seconds: float = 5.0,
            gpu_rate: float | None = None) -> Facts:
    """Takes about five times `seconds`. Raises UserError, also for a damaged image that it meets."""
    import numpy as np

    from alexnet_ddp.config import Config, load
    from alexnet_ddp.data.decoding.decode import create_decoder
    from alexnet_ddp.data.decoding.stages import parse_stage, to_stage
    from alexnet_ddp.data.index import open_index
    from alexnet_ddp.data.records import StoredRecords
    from alexnet_ddp.data.tools import speeds

    config = load(config_path, []) if config_path else Config()
    cores = len(os.sched_getaffinity(0))
    recipe_threads = config.data.threads if config_path and isinstance(config.data.threads, int) else None
    threads = threads or recipe_threads or cores
    with open_index(where) as index:
        stage = parse_stage(index.stage)
        chance = np.random.default_rng()
        samples = chance.choice(len(index), min(len(index), SAMPLED), replace=False)
        try:
            read = speeds.reading(index, samples, threads=threads, seconds=seconds)
        except OSError as error:
            raise UserError(f"{where}: can't be read: {error}.") from None
        decoder = create_decoder(config.data.decoder, quality=config.augment.resize)
        few, records = samples[:DECODED], StoredRecords(index, index.stage)
        one, every = (speeds.loading(records, decoder, few, index.labels, config, threads=count, seconds=seconds)
                      for count in (1, threads))
        sizes, packed = {str(stage): int(read.record_bytes * len(index))}, None
        short = _short_side([index.read(sample) for sample in few[:CONVERTED].tolist()]) if stage.kind != "raw" else 0
        if stage.kind == "original" and short > SHORT:
            kept = speeds.Kept(parse_stage(f"short{SHORT}"), few[:CONVERTED],
                               lambda sample: to_stage(index.read(sample), parse_stage(f"short{SHORT}")))
            packed = speeds.loading(kept, decoder, few[:CONVERTED], index.labels, config, threads=threads,
                                    seconds=seconds)
            sizes |= {"short256": int(kept.record_bytes * len(index))}
        if stage.kind != "raw":  # photographs in the usual sizes, small pictures in their own
            raw = [parse_stage(f"raw{side}") for side in RAW_SIDES if side <= short] or [parse_stage(f"raw{short}")]
            sizes |= {str(one): (one.record_bytes or 0) * len(index) for one in raw}
        made = "a copy of the record's pixels" if stage.kind == "raw" else \
            f"{decoder.name} {decoder.version}, {config.augment.crop} {config.augment.size}, {config.augment.resize}"
        gpus, gpu_memory, rate, source = _gpus(config, asked=gpu_rate, seconds=seconds)
        disk, ram = _rooms(config.data.cache_dir)
        return Facts(where=where, kind="pack" if index.source.pack else index.source.kind, stage=str(stage),
                     samples=len(index), record_bytes=read.record_bytes, cores=cores, threads=threads, decoder=made,
                     warm=read.warm, cold=read.cold, still_cached=read.cached, one_thread=one, all_threads=every,
                     sizes=sizes, packed=packed, disk=disk, ram=ram, gpu_memory=gpu_memory, gpus=gpus, gpu_rate=rate,
                     gpu_rate_from=source, recipe_threads=recipe_threads)


def _short_side(images: list[bytes]) -> int:
    """Pixels of the shorter side: the median over some images."""
    from alexnet_ddp.data.packs.facts import look

    return max(10, int(statistics.median(min(found.width, found.height) for found in map(look, images))))


def _rooms(cache_dir: str | None) -> tuple[Room | None, Room | None]:
    """(disk, ram): what a cache could take."""
    from alexnet_ddp.data.caches.space import MEMORY_SYSTEMS, default_base, file_system, room

    def of(path: Path) -> Room | None:
        while not path.exists() and path != path.parent:
            path = path.parent
        return Room(int(SHARE * room(path)), str(path)) if os.access(path, os.W_OK) else None

    disk = Path(cache_dir) if cache_dir else default_base("disk")
    in_memory = file_system(disk) in MEMORY_SYSTEMS
    return None if in_memory else of(disk), of(disk if in_memory and cache_dir else default_base("ram"))


def _gpus(config: object, *, asked: float | None, seconds: float
          ) -> tuple[int, int, float, Literal["measured", "given", "assumed"]]:
    """(GPUs, bytes free on them, images/s that one takes, where that is from)."""
    import torch

    from alexnet_ddp.data.tools import speeds

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    free = int(SHARE * sum(torch.cuda.mem_get_info(number)[0] for number in range(gpus)))
    if asked is not None:
        return gpus, free, asked, "given"
    if gpus:
        return gpus, free, speeds.gpu_rate(config, seconds=seconds), "measured"  # type: ignore[arg-type]
    return 0, 0, ASSUMED_GPU_RATE, "assumed"


def page(facts: Facts, *, width: int = WIDTH) -> str:
    """The data set in a line, then every finding, with what to set, in at most `width` columns."""
    gpus = counted(facts.gpus, "GPU") if facts.gpus else "no GPU"
    head = (f"{facts.where} ({facts.kind}, {facts.stage}): {counted(facts.samples, 'image')}, "
            f"{human_bytes(facts.sizes[facts.stage])}; {counted(facts.cores, 'core')}, {gpus}")
    return "\n".join([head, "", *lines(findings(facts), verb="do", width=width)])


def told(facts: Facts, found: list[Finding]) -> str:
    """The same for programs."""
    return json.dumps({"facts": asdict(facts), "supply": facts.supply,
                       "feeds": facts.supply / facts.gpu_rate if facts.knows_demand else None,
                       "findings": [asdict(finding) for finding in found]}, indent=1)


def _positive(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got '{word}'")
    return value


def main(words: list[str]) -> int:
    """Prints what was found. Raises UserError."""
    parser = Parser(prog="alexnet-ddp data doctor", description="Measures on a sample how quick storage and decoding "
                    "are here, says which caches would fit, how many GPUs this machine can feed, what binds, and what "
                    "to do. Reads only; takes about five times --seconds.")
    parser.add_argument("where", metavar="WHERE", help="folder, file.tar, file.tar::inside, shards or a pack")
    parser.add_argument("--config", metavar="CONFIG", help="recipe whose decoder, crop, threads and caches are meant")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads that read and decode (default: the "
                        "recipe's, else all cores)")
    parser.add_argument("--seconds", type=_positive, default=5.0, help="of each measurement (default: 5)")
    parser.add_argument("--gpu-rate", type=_positive, metavar="IMG_PER_S", help="what one GPU takes; default: measured "
                        f"where there is a GPU, else {ASSUMED_GPU_RATE:,.0f} is told as an assumption")
    parser.add_argument("--json", action="store_true", help="facts and findings as JSON")
    options = parser.parse_args(words)
    facts = measure(options.where, config_path=options.config, seconds=options.seconds, gpu_rate=options.gpu_rate,
                    threads=None if options.threads is None else max(1, int(options.threads)))
    print(told(facts, findings(facts)) if options.json else page(facts))
    return EXIT_FINISHED
