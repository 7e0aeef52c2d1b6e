"""Several seeds of one recipe: `seed=0..4` or `seed=0,3,7` are runs NAME-seed0 ..., one after the other.

Each run is a process of its own (with --nproc-per-node N its own torchrun), so that a run among others is the very run
that it would be alone. What stops one stops the sequence, and the same command goes on where it stopped. Imports no
torch.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from alexnet_ddp import config as recipes
from alexnet_ddp import dialect, rules
from alexnet_ddp.changes import differences
from alexnet_ddp.config import Config
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_STOPPED, UserError
from alexnet_ddp.runfiles import read_identities, read_state
from alexnet_ddp.sinks import say
from alexnet_ddp.stop import SIGNALS

MOST = 1000  # seeds at once; Slurm's MaxArraySize is 1001 unless a site has changed it
PR_SET_PDEATHSIG = 1  # prctl(2)


def parse(text: str, *, what: str = "seed=") -> list[int]:
    """`0..4` (or `0-4`), `0,3,7` or both as numbers, in the order they are written. Raises UserError."""
    found: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"(\d{1,19})(?:(?:-|\.\.)(\d{1,19}))?", part.strip(), re.ASCII)  # a seed is below 2**63
        if not span or (span[2] and int(span[2]) < int(span[1])):
            raise UserError(f"{what} takes numbers and spans such as 0..4 or 0,2,5, got '{text}'.")
        first, last = int(span[1]), int(span[2] or span[1])
        if len(found) + last - first >= MOST:
            raise UserError(f"{what} makes a run of each seed, at most {MOST} at once, got '{text}'.")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise UserError(f"{what} names a seed twice: '{text}'. Two runs can't work in one run directory.")
    return found


def split(overrides: Sequence[str]) -> tuple[list[str], str | None]:
    """The other overrides, and what the last `seed=` says if that is several seeds; else None, and all of them."""
    values = [text.partition("=")[2].strip() for text in overrides if text.partition("=")[0].strip() == "seed"]
    if not values or not re.search(r",|\.\.|\d-\d", values[-1]):
        return [*overrides], None
    return [text for text in overrides if text.partition("=")[0].strip() != "seed"], values[-1]


def configs(path: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[Config]:
    """The recipe of each seed's run, NAME-seedN. Raises UserError."""
    name = recipes.load(path, overrides).name
    return [recipes.load(path, [*overrides, f"seed={seed}", f"name={name}-seed{seed}"]) for seed in seeds]


def is_finished(config: Config) -> bool:
    """Whether the run is over and its recipe was this one, but for fields that are free, and its training data those of
    now: then nobody need start it. One that was trained on other samples is started, and says why it can't go on."""
    if read_state(config.run_dir).get("status") != "finished":
        return False
    try:
        before = dialect.read_yaml(config.run_dir / "config.yaml")
        if any(change.effect != "free" for change in differences(before, config)):
            return False
    except UserError:
        return False
    known = read_identities(config.run_dir).get("train")
    return known is None or _identity(config.data.train) in (known, None)


def _others_held_out(config: Config) -> str:
    """A remark on a finished run whose held-out samples aren't those of now; "" without."""
    known = read_identities(config.run_dir).get("val")
    now = _identity(config.data.val) if config.data.val and known else None
    return "" if now in (known, None) else (
        f", and its accuracy is of other held-out samples than data.val={config.data.val} holds now")


@functools.cache
def _identity(place: str) -> str | None:
    """The identity fingerprint of the data there; None where they can't be looked at."""
    from alexnet_ddp.data.index import open_index  # NumPy, and perhaps a long look

    try:
        with open_index(place) as index:
            return index.identity
    except UserError:
        return None


class Queue:
    """Runs processes one after the other and passes stop signals on to the one that runs."""

    def __init__(self) -> None:
        self.signal = ""  # name of the first stop signal that came
        self._pending: list[int] = []  # signals for a process that is being started
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}  # the handlers that install() found

    def install(self) -> Queue:
        """Takes over the stop signals. An ignored HUP (nohup) stays ignored."""
        for name in SIGNALS:
            number = getattr(signal, f"SIG{name}")
            if not (name == "HUP" and signal.getsignal(number) == signal.SIG_IGN):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def restore(self) -> None:
        """Gives the stop signals back to the handlers that install() found."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that isn't Python's

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name[3:]
        if self._process is None:
            self._pending.append(number)
        else:
            self._process.send_signal(number)  # does nothing once it has been waited for

    def run(self, words: Sequence[str]) -> int:
        """`python -m alexnet_ddp WORDS` to its end; returns its exit code (128 + N when signal N ended it)."""
        safe = ["-P"] if sys.flags.safe_path else []  # it takes its code from where this process does
        # A process group of its own: a Ctrl-C on the terminal reaches this process alone, which passes it on once.
        process = subprocess.Popen([sys.executable, *safe, "-u", "-m", "alexnet_ddp", *words], process_group=0,
                                   preexec_fn=_stand_by)
        self._process = process
        for number in self._pending:
            process.send_signal(number)
        self._pending.clear()
        code = process.wait()
        self._process = None
        return code if code >= 0 else 128 - code


def _stand_by() -> None:
    """In the new process: stop signals wait until its handlers stand, and it is stopped when this one is killed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, f"SIG{name}") for name in SIGNALS])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def train(path: str, overrides: Sequence[str], *, text: str, flags: Sequence[str]) -> int:
    """Trains the runs of all seeds that aren't finished, tells how they compare, and returns the exit code.

    `text` is what `seed=` said, `flags` are those of `train` for every run. Raises UserError.
    """
    if "RANK" in os.environ or "SLURM_STEP_ID" in os.environ:
        raise UserError(f"seed={text} are runs one after the other, each of which starts its own ranks, and this is "
                        "already a rank of torchrun or srun. Use alexnet-ddp train CONFIG seed=... --nproc-per-node N "
                        "on this machine, or alexnet-ddp submit CONFIG seed=...")
    runs = configs(path, overrides, parse(text))
    queue, began = Queue().install(), time.monotonic()
    for place, config in enumerate(runs, 1):
        if "--fresh" not in flags and is_finished(config):
            say(f"run {place} of {len(runs)}: {config.run_dir} is finished{_others_held_out(config)}")
            continue
        left = None if config.deadline is None else rules.parse_duration(config.deadline) - time.monotonic() + began
        if queue.signal or (left is not None and left <= 0):
            return _stopped(queue, runs, place, flags=flags)
        say(f"run {place} of {len(runs)}: {config.run_dir}")
        words = [f"seed={config.seed}", f"name={config.name}", *([] if left is None else [f"deadline={left:.0f}s"])]
        code = queue.run(["train", path, *overrides, *words, *flags])
        if code == EXIT_STOPPED:
            return _stopped(queue, runs, place, flags=flags)
        if code:
            say(f"run {place} of {len(runs)} ended with exit code {code}; those after it were not started")
            return code
    from alexnet_ddp import results, tables

    tables.tell(results.report([config.run_dir for config in runs]))
    return EXIT_FINISHED


def _stopped(queue: Queue, runs: Sequence[Config], place: int, *, flags: Sequence[str]) -> int:
    by = f" by {queue.signal}" if queue.signal else ""
    but = " without --fresh" if "--fresh" in flags else ""
    say(f"stopped{by} at run {place} of {len(runs)}; the same command{but} goes on from there")
    return EXIT_STOPPED


def run_dirs(name: str, *, runs: Path) -> list[Path]:
    """The run directories that a name stands for: itself, a path, or else NAME-seed0 ... Raises UserError."""
    for place in (Path(name), runs / name):
        if (place / "config.yaml").is_file():
            return [place]
        found = [run for run in place.parent.glob(f"{glob.escape(place.name)}-seed*")
                 if re.fullmatch(r".*-seed\d+", run.name)]
        if found:
            return sorted(found, key=lambda run: int(run.name.rpartition("-seed")[2]))
    raise UserError(f"There is no run '{name}', neither as a path nor in {runs}, nor '{name}-seed0' ... "
                    "See: alexnet-ddp status")
