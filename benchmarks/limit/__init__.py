"""The physical limit: a C program around libjpeg-turbo that decodes from memory into a batch slot, built on demand.

R, which every pipeline is measured by, is the rate of its mode `sroi2_r`: each crop's part of the image decoded at the
best of the scales 1/8, 1/4, 1/2 and 1, resized with antialiasing to 224 x 224 and flipped.
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = (HERE / "jpeglimit.c", HERE / "resize224.h")
MOST_FILES, MOST_THREADS = 20_000, 64  # the program's arrays


class NoLimit(Exception):
    """The program can't be built or run here; says what to install."""


def build(folder: Path) -> Path:
    """The program, built in `folder` unless it is there. Raises NoLimit."""
    name = "jpeglimit-" + hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:12]
    program = folder / name
    if program.exists():
        return program
    if platform.machine() not in ("x86_64", "AMD64"):
        raise NoLimit(f"the limit program's resize is written for x86-64 with AVX2, this is {platform.machine()}")
    if shutil.which("gcc") is None:
        raise NoLimit("the limit program needs a C compiler: apt-get install gcc libc6-dev libjpeg62-turbo-dev")
    folder.mkdir(parents=True, exist_ok=True)
    line = ["gcc", "-O3", "-march=native", str(SOURCES[0]), "-o", str(program), "-ljpeg", "-lm", "-lpthread"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        if "jpeglib.h" in done.stderr or "-ljpeg" in done.stderr:
            raise NoLimit("the limit program needs libjpeg-turbo's headers: apt-get install libjpeg62-turbo-dev "
                          "(Ubuntu: libjpeg-turbo8-dev)")
        raise NoLimit(f"gcc refuses the limit program: {done.stderr.strip().splitlines()[-1]}")
    return program


def run(program: Path, files: Path, *, mode: str, seconds: float, threads: int) -> dict[str, float]:
    """One trial over the files that `files` lists, a path a line: images, wall seconds, CPU seconds (loading incl.)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [str(program), str(files), mode, str(seconds), str(threads)]
    done = subprocess.run(line, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise NoLimit(f"the limit program ended with {done.returncode}: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    if found["bad"]:
        raise NoLimit(f"the limit program could not decode {found['bad']} images")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"images": found["ips"] * seconds, "seconds": seconds, "cpu": cpu}
