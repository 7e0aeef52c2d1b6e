"""The roof of raw records: the bytes of 224 x 224 crops copied from a set in memory into batch slots, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.trial import Case, Data, Options

NEEDS = ("numpy",)
RECORD, CROP = 256 * 256 * 3, 224 * 224 * 3  # bytes
PIECE = 16  # crops a copy: 2.4 MB at once, so that Python's share vanishes
SLOTS = 5


def cases() -> list[Case]:
    return [Case("memcpy of the crops' bytes", "limit", ("raw256",), "none", "none: memcpy")]


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    """Contiguous copies from random places of as many bytes as the set has, two batches under way."""
    memory = np.ones(data.images * RECORD, np.uint8)
    slots = np.ones((SLOTS, options.batch * CROP), np.uint8)
    draws = np.random.default_rng(0)

    def copy(slot: int, first: int, at: int) -> None:
        piece = slots[slot, first * CROP:(first + PIECE) * CROP]
        np.copyto(piece, memory[at:at + piece.size])

    def submit(turn: int) -> list:
        at = draws.integers(0, memory.size - PIECE * CROP, -(-options.batch // PIECE)).tolist()
        return [pool.submit(copy, turn % SLOTS, row * PIECE, place) for row, place in enumerate(at)]

    with ThreadPoolExecutor(options.threads) as pool:
        ahead = [submit(turn) for turn in range(SLOTS - 1)]
        turn = SLOTS - 1
        try:
            while True:
                for piece in ahead.pop(0):
                    piece.result()
                yield options.batch
                ahead.append(submit(turn))
                turn += 1
        finally:
            for pieces in ahead:
                for piece in pieces:
                    piece.cancel()
