"""Progress of long jobs: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts up to `total` (None: unknown); use as a context manager. On stderr unless told otherwise."""

    def __init__(self, total: int | None, *, what: str, unit: str = "images", done: int = 0,
                 file: TextIO | None = None) -> None:
        self._file = sys.stderr if file is None else file
        self._what, self._unit, self._total, self._done = what, unit, total, done
        self._began, self._first, self._spoke = time.monotonic(), done, time.monotonic()
        on_terminal = self._file.isatty()
        self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", file=self._file,
                         dynamic_ncols=True) if on_terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            rate = (self._done - self._first) / max(1e-9, self._spoke - self._began)
            whole = "" if self._total is None else f" of {self._total:,} ({self._done / max(1, self._total):.0%})"
            line = f"{self._what}: {self._done:,}{whole} {self._unit}, {rate:,.0f} a second"
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
