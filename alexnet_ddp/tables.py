"""Tables as Markdown that reads well as it is."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows of cells, the first the heads; the first `left` columns are flush left, the others right. Pure."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    drawn = ["| " + " | ".join(cell.ljust(width) if place < left else cell.rjust(width)
                               for place, (cell, width) in enumerate(zip(row, widths, strict=True))) + " |"
             for row in rows]
    drawn.insert(1, "|" + "|".join("-" * (width + 2) if place < left else "-" * (width + 1) + ":"
                                   for place, width in enumerate(widths)) + "|")
    return "\n".join(drawn)
