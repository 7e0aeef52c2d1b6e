"""Runs of several seeds by one command, stopped in the first; gone on with in tests/drills/test_seeds.py."""

from __future__ import annotations

from pathlib import Path

from twins import stop_in_the_first


def test_a_stop_in_the_first_stops_them_all(tmp_path: Path) -> None:
    """TERM in the first of two runs is passed on once: saved, 75, the second not begun, and how to go on is told."""
    stop_in_the_first(tmp_path)
