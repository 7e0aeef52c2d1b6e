"""Lengths of time, as Slurm and people write them."""

import math

import pytest

from alexnet_ddp.errors import UserError
from launch import durations

MINUTE, HOUR, DAY = 60, 3600, 86400

TABLE = {
    # Slurm's own list (man sbatch, --time): minutes first, but hours first after a day
    "0": 0, "45": 45 * MINUTE, "1440": DAY, "45:30": 45 * MINUTE + 30, "90:00": 90 * MINUTE,
    "4:00:00": 4 * HOUR, "04:00:00": 4 * HOUR, "0:0:5": 5, "100:00:01": 100 * HOUR + 1,
    "1-0": DAY, "1-12": DAY + 12 * HOUR, "1-12:30": DAY + 12 * HOUR + 30 * MINUTE,
    "7-00:00:00": 7 * DAY, "1-02:03:04": DAY + 2 * HOUR + 3 * MINUTE + 4,
    # people's
    "90s": 90, "45m": 45 * MINUTE, "4h": 4 * HOUR, "2d": 2 * DAY, "1d12h": 36 * HOUR, "1h30m": 90 * MINUTE,
    "1.5h": 90 * MINUTE, "0.5s": 0.5, "1h0m5s": HOUR + 5, "4H": 4 * HOUR, " 4h ": 4 * HOUR,
    "infinite": math.inf, "UNLIMITED": math.inf,
}


@pytest.mark.parametrize(("text", "seconds"), TABLE.items())
def test_formats(text: str, seconds: float) -> None:
    """Every format that Slurm documents, and people's own, mean what they mean there."""
    assert durations.seconds(text) == seconds


def test_a_number() -> None:
    """YAML reads `time: 45` as a number: minutes, as Slurm has it."""
    assert durations.seconds(45) == 45 * MINUTE


@pytest.mark.parametrize("text", ["", "4 h", "h", "4h30", "-1", "1:2:3:4", "1-2:3:4:5", "1-", "-1-2", "4:", "1-12h",
                                  "1.5", "٤h", "4h 30m", "nan", "1:-2", "4hh"])
def test_what_is_none(text: str) -> None:
    """Anything else is refused with the formats there are, and what was found."""
    with pytest.raises(UserError, match="A length of time is written 90s, 45m, 4h") as refused:
        durations.seconds(text)
    assert str(refused.value).endswith(f"got '{text}'.")


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0:00:00"), (1, "0:00:01"), (0.2, "0:00:01"), (59, "0:00:59"), (60, "0:01:00"), (3599.5, "1:00:00"),
    (14400, "4:00:00"), (86399, "23:59:59"), (86400, "1-00:00:00"), (129605, "1-12:00:05"), (math.inf, "infinite")])
def test_slurm(seconds: float, text: str) -> None:
    """Slurm reads back what is written for it, and never a shorter time."""
    assert durations.slurm(seconds) == text
    assert durations.seconds(text) == (math.ceil(seconds) if seconds < math.inf else seconds)


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0s"), (0.4, "0.4s"), (5, "5s"), (59.6, "1m"), (60, "1m"), (90, "1m30s"), (120, "2m"), (3600, "1h"),
    (3605, "1h0m5s"), (14400, "4h"), (129600, "1d12h"), (86405, "1d0h0m5s"), (604800, "7d"), (math.inf, "no limit")])
def test_words(seconds: float, text: str) -> None:
    """People read the same time that is meant."""
    assert durations.words(seconds) == text
    if 1 <= seconds < math.inf:
        assert durations.seconds(text) == round(seconds)
