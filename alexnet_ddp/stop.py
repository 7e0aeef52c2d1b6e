"""What asks a run to stop: signals, a STOP file in the run directory, a deadline. All end in one flag.

A handler sets the flag and nothing else; the ranks agree on it at a step boundary (`distributed.Agreement`). A second
INT (Ctrl-C) quits at once, also while the main thread waits in a collective that will never end. This module imports
no torch, so the handlers stand before the seconds that importing torch takes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from alexnet_ddp.errors import EXIT_INTERRUPTED

SIGNALS = ("INT", "TERM", "HUP", "USR1", "USR2")
CAUSES = ("", *SIGNALS, "STOP file", "deadline")  # a cause travels between ranks as its place here
STOP_FILE = "STOP"


class StopRequests:
    """Collects the requests that reach this process."""

    def __init__(self) -> None:
        self.signal = ""  # name of the first signal that came
        self._next_look = 0.0  # monotonic seconds

    def install(self) -> StopRequests:
        """Takes over the stop signals. An ignored HUP (nohup) stays ignored."""
        for name in SIGNALS:
            number = getattr(signal, f"SIG{name}")
            if not (name == "HUP" and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self._handle)
        quit_on_second_interrupt()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [getattr(signal, f"SIG{name}") for name in SIGNALS])
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name[3:]

    def cause(self, *, run_dir: Path | None = None, seconds_left: float | None = None, lead: float = 0.0) -> str:
        """Why to stop, or "". The STOP file and the deadline are rank 0's to look at: others leave them out.

        Args:
            run_dir: where to look for the STOP file, at most once a second.
            seconds_left: until the deadline; `lead` is how long leaving takes (seconds).
        """
        if self.signal:
            return self.signal
        if seconds_left is not None and seconds_left <= lead:
            return "deadline"
        now = time.monotonic()
        if run_dir is not None and now >= self._next_look:
            self._next_look = now + 1.0
            if (run_dir / STOP_FILE).exists():
                return "STOP file"
        return ""


def quit_on_second_interrupt(last_act: Callable[[], None] = lambda: None) -> None:
    """From now on the second INT makes this process leave at once, saving nothing, after `last_act`.

    Python runs a handler only once the main thread is back from the library it is in, which may be never; the number
    of the signal is written into this pipe at once, and a thread reads it.
    """
    numbers, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def watch() -> None:
        interrupts = 0
        while interrupts < 2:
            interrupts += os.read(numbers, 16).count(signal.SIGINT)
        last_act()
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=watch, name="interrupts", daemon=True).start()


def deadline_from(*, limit: float | None, started: float, environment: dict[str, str] | None = None) -> float | None:
    """Unix time at which this attempt must be gone, the earlier of the recipe's and Slurm's; None without either.

    `limit` is in seconds after `started` (unix time); Slurm 23.02 and newer export SLURM_JOB_END_TIME.
    """
    environment = dict(os.environ) if environment is None else environment
    ends = [started + limit] if limit is not None else []
    slurm = environment.get("SLURM_JOB_END_TIME", "")
    if slurm.isdigit():
        ends.append(float(slurm))
    return min(ends, default=None)


def lead_time(*, step: float, save: float) -> float:
    """Seconds before a deadline at which a run must begin to leave: two steps to agree, a save, and margin."""
    return 2.0 * step + 3.0 * save + 2.0
