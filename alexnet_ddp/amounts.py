"""Amounts as a person reads them: bytes in a unit that suits them, a number with its noun."""

from __future__ import annotations

UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))  # of 1000, as disks are sold and data.cache_gb is counted


def human_bytes(count: float) -> str:
    """`252 GB`, `31.5 GB`, `12.0 kB`, `512 bytes`: in the largest unit of which there is one, one decimal below 100. So
    nothing but nothing is told as 0."""
    for unit, size in UNITS:
        if count >= size:
            return f"{count / size:,.{0 if count >= 100 * size else 1}f} {unit}"
    return counted(round(count), "byte")


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 shard`, `2 shards`, `1,000 classes` (`plural` where it isn't noun + s)."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
