"""What a doctor finds: a fact's meaning and what to do about it, and the page that tells it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

WIDTH = 100  # columns of a doctor's page


@dataclass(frozen=True)
class Finding:
    """What a fact means, and what to do because of it ("" for nothing)."""

    level: Literal["ok", "note", "warn"]
    topic: str
    meaning: str
    advice: str = ""


ok, note, warn = partial(Finding, "ok"), partial(Finding, "note"), partial(Finding, "warn")


def lines(findings: Iterable[Finding], *, verb: str, width: int) -> list[str]:
    """Each finding as level, topic and meaning, then its advice behind `verb` (at most four letters), wrapped at
    `width` columns; a word that is longer, such as a path, stands by itself."""
    told = []
    for one in findings:
        told += _wrapped(f"{one.level:4}  {one.topic}: {one.meaning}", "", 6, width)
        if one.advice:
            told += _wrapped(f"{verb:4} {one.advice}", " " * 6, 11, width)
    return told


def _wrapped(text: str, first: str, later: int, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * later, break_long_words=False,
                         break_on_hyphens=False)
