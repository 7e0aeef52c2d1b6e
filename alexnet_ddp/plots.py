"""Pictures by matplotlib, which is an extra: refused early where it isn't, and the same bytes each time. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alexnet_ddp.errors import UserError

FORMATS = (".png", ".svg")


def check(out: str, *, flag: str, otherwise: str = "") -> None:
    """Raises UserError for a picture that can't be drawn: of another kind, without matplotlib, or in no folder.

    `flag`: that names the file. `otherwise`: what there is without it.
    """
    path = Path(out).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{flag} takes a name that ends in {' or '.join(FORMATS)}, got '{out}'.")
    problem = errno.EISDIR if path.is_dir() else errno.ENOENT if not path.parent.is_dir() else 0
    if problem or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag} {out} can't be written: {os.strerror(problem or errno.EACCES)}. Name another file.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(f"{flag} needs matplotlib: pip install 'alexnet-ddp[plots]'.{otherwise}") from None


@contextlib.contextmanager
def figure(path: Path, *, flag: str, size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib Figure of `size` inches to draw on, which is then written. Raises UserError where it can't be."""
    import matplotlib
    from matplotlib.figure import Figure

    path = path.expanduser()
    with matplotlib.rc_context({"svg.hashsalt": "alexnet-ddp", "svg.fonttype": "none"}):  # text stays text
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn
        try:
            drawn.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise UserError(f"{flag} {path} can't be written: {error.strerror or error}.") from None
