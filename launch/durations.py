"""Lengths of time, as Slurm and people write them, to seconds and back. Pure."""

from __future__ import annotations

import math
import re

from alexnet_ddp.errors import UserError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
ENDLESS = ("infinite", "unlimited")
HOW = ("A length of time is written 90s, 45m, 4h or 1d12h, or as Slurm has it: 45 (minutes), 45:00 (minutes:seconds), "
       "4:00:00, 1-12 (days-hours), 1-12:00 or 1-12:00:00")

# sbatch's own list: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and
# days-hours:minutes:seconds. Two numbers are minutes and seconds, but after a day they are hours and minutes.
SLURM = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?", re.ASCII)


def seconds(text: str | int) -> float:
    """Seconds of a length of time in any of these formats; inf for `infinite` and `unlimited`. Raises UserError."""
    text = str(text).strip().lower()
    if text in ENDLESS:
        return math.inf
    if re.fullmatch(r"(?:\d+(?:\.\d+)?[smhd])+", text, re.ASCII):
        return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([smhd])", text))
    found = SLURM.fullmatch(text)
    if not found:
        raise UserError(f"{HOW}; got '{text}'.")
    a, b, c = (int(found[name] or 0) for name in "abc")
    if found["days"]:
        return 86400.0 * int(found["days"]) + 3600 * a + 60 * b + c
    return 3600.0 * a + 60 * b + c if found["c"] else 60.0 * a + b


def slurm(length: float) -> str:
    """Slurm's way to write so many seconds: `4:00:00`, `1-12:00:00`; `infinite`.

    Parts of a second are rounded up, so that a limit is never shorter than what was asked for.
    """
    if math.isinf(length):
        return "infinite"
    minutes, rest = divmod(math.ceil(length), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-{hours:02d}" if days else f"{hours}") + f":{minutes:02d}:{rest:02d}"


def words(length: float) -> str:
    """How people write so many seconds, to the second: `2m`, `1d12h`, `1h0m5s`; `no limit`."""
    if math.isinf(length):
        return "no limit"
    if length < 10 and length != int(length):
        return f"{length:.1f}s"
    left = round(length)
    parts: list[str] = []
    for unit, size in reversed(UNITS.items()):
        number, left = divmod(left, size)
        if number or (parts and left):
            parts.append(f"{number}{unit}")
    return "".join(parts) or "0s"
