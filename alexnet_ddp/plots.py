"""Pictures by matplotlib, which is an extra: refused early where it isn't, and the same bytes each time. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from alexnet_ddp.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")


def check(out: str, *, flag: str, otherwise: str = "") -> None:
    """Raises UserError for a picture that can't be drawn: of another kind, without matplotlib, or in no folder.

    `flag`: that names the file. `otherwise`: what there is without it.
    """
    path = Path(os.path.expanduser(out))
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{flag} takes a name that ends in {' or '.join(FORMATS)}, got '{out}'.")
    problem = errno.EISDIR if path.is_dir() else errno.ENOENT if not path.parent.is_dir() else 0
    if problem or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag} {out} can't be written: {os.strerror(problem or errno.EACCES)}. Name another file.")
    require(f"{flag} needs", otherwise=otherwise)


def require(who: str, *, otherwise: str = "") -> None:
    """Raises UserError where matplotlib isn't here; `who` needs it, with the verb."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(f"{who} matplotlib: pip install 'alexnet-ddp[plots]'.{otherwise}") from None


@contextlib.contextmanager
def figure(path: Path, *, flag: str, size: tuple[float, float]) -> Iterator[Figure]:
    """A Figure of `size` inches to draw on, which is then written. Raises UserError where it can't be."""
    drawn = blank(*size)
    yield drawn
    try:
        write(drawn, Path(os.path.expanduser(path)))
    except OSError as error:
        raise UserError(f"{flag} {path} can't be written: {error.strerror or error}.") from None


def blank(width: float, height: float) -> Figure:
    """A Figure, in inches. Not pyplot's, which would keep it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write(drawn: Figure, path: Path, *, dpi: int = 100) -> None:
    """PNG or SVG by the name's ending; `dpi`: pixels an inch. Raises OSError."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "alexnet-ddp", "svg.fonttype": "none"}):  # text stays text
        drawn.savefig(path, dpi=dpi, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def caption(text: str, *, room: int, keep: Literal["beginning", "end"] = "beginning") -> str:
    """At most `room` characters of a text that isn't ours, to be drawn: `$` would begin a formula. Pure."""
    text = " ".join(text.split())
    if len(text) > room:
        text = f"{text[:room - 3]}..." if keep == "beginning" else f"...{text[3 - room:]}"
    return text.replace("$", r"\$")
