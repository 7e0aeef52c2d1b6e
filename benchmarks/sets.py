"""The benchmark's image sets, made once in a work folder from one source: originals, r256 and raw256.

    SET/folder/CLASS/NAME-K.jpg    every image K = 0 .. repeat-1 times (hard links): epochs are long enough to measure
    SET/images.tar                 the same in one tar
    SET/pack                       what `alexnet-ddp data pack` makes of the originals
    SET/unique.txt                 paths of the images once each, for the limit program
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alexnet_ddp.data.decoding import stages
from alexnet_ddp.data.index import Index, open_index
from alexnet_ddp.progress import Progress
from benchmarks.trial import Data

STAGES = {"original": "original", "r256": "short256", "raw256": "raw256"}


def prepare(images: str, work: Path, *, names: list[str], repeat: int, limit: int | None, threads: int
            ) -> dict[str, Data]:
    """The wanted sets, made where they aren't there yet. Raises UserError."""
    with open_index(images, cache_dir=work / "index") as index:
        wanted = {"identity": index.identity, "storage": index.storage, "repeat": repeat, "limit": limit,
                  "versions": stages.VERSIONS}
        known = work / "sets.json"
        if not known.exists() or json.loads(known.read_text()) != wanted:
            for name in STAGES:
                shutil.rmtree(work / name, ignore_errors=True)
            shutil.rmtree(work / "converted", ignore_errors=True)
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(json.dumps(wanted))
        count = min(len(index), limit or len(index))
        samples = [row * len(index) // count for row in range(count)]
        for name in {"original", *names} - {"raw256"}:
            if not (work / name / "unique.txt").exists():
                _make(index, samples, work / name, stage=STAGES[name], repeat=repeat, threads=threads)
    return {name: Data(name, folder=str(work / ("original" if name == "raw256" else name) / "folder"),
                       tar="" if name == "raw256" else str(work / name / "images.tar"), pack=_pack(work, name),
                       images=count * repeat) for name in names}


def _make(index: Index, samples: list[int], folder: Path, *, stage: str, repeat: int, threads: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    wanted = stages.parse_stage(stage)

    def write(sample: int) -> list[Path]:
        name = folder / "folder" / index.name(sample)
        name.parent.mkdir(parents=True, exist_ok=True)
        paths = [name.with_name(f"{name.name}-{copy}.jpg") for copy in range(repeat)]
        paths[0].write_bytes(stages.to_stage(index.read(sample), wanted))
        for path in paths[1:]:
            os.link(paths[0], path)
        return paths

    unique, every = [], []
    with ThreadPoolExecutor(threads) as pool, Progress(len(samples), what=f"{folder.name}: making") as progress:
        for paths in pool.map(write, samples):
            unique.append(str(paths[0]))
            every.extend(paths)
            progress.update()
    # dereference: a hard link is stored as a file of its own
    with tarfile.open(folder / "images.tar", "w", format=tarfile.USTAR_FORMAT, dereference=True) as tar:
        for path in sorted(every):
            tar.add(path, arcname=str(path.relative_to(folder / "folder")))
    (folder / "unique.txt").write_text("\n".join(unique) + "\n")


def _pack(work: Path, name: str) -> str:
    """The set's pack, made by the command that a user would give; "" where that fails, with what it said."""
    pack = work / name / "pack"
    if not (pack / "pack.json").exists():
        line = [sys.executable, "-m", "alexnet_ddp", "data", "pack", str(work / "original" / "folder"), str(pack),
                "--stage", STAGES[name]]
        done = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"no {name} pack: {done.stderr.strip()[-500:]}", file=sys.stderr)
            return ""
    return str(pack)
