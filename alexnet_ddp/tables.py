"""Tables as Markdown that reads well as it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO


def markdown(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows of cells, the first the heads; the first `left` columns are flush left, the others right. Pure."""
    rows = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]  # names that aren't ours
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    drawn = ["| " + " | ".join(cell.ljust(width) if place < left else cell.rjust(width)
                               for place, (cell, width) in enumerate(zip(row, widths, strict=True))) + " |"
             for row in rows]
    drawn.insert(1, "|" + "|".join("-" * (width + 2) if place < left else "-" * (width + 1) + ":"
                                   for place, width in enumerate(widths)) + "|")
    return "\n".join(drawn)


def tell(text: str, *, file: TextIO | None = None) -> None:
    """Prints text (on standard output) that may hold characters its encoding hasn't got, as under LC_ALL=C."""
    out = file or sys.stdout
    encoding = out.encoding or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("\N{PLUS-MINUS SIGN}", "+/-").encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=out, flush=True)
