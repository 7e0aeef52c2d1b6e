"""The roof of raw records: as many bytes as our loader sends, copied from memory into batch slots, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from benchmarks.trial import Case, Data, Options

NEEDS = ("numpy",)
RECORD = 256 * 256 * 3  # bytes
STRIP = 224 * 256 * 3  # bytes of the rows that a crop shows
PIECE = 16  # images a copy: 2.8 MB at once, so that Python's share vanishes
SLOTS = 5


def cases() -> list[Case]:
    return [Case("memcpy of strips", "limit", ("raw256",), "none", "none: memcpy", extra={"bytes": STRIP}),
            Case("memcpy of whole records", "limit", ("raw256",), "none", "none: memcpy", extra={"bytes": RECORD})]


def batches(case: Case, data: Data, options: Options) -> Iterator[int]:
    """Contiguous copies from random places of as many bytes as the set has, four batches under way."""
    size = case.extra["bytes"]
    memory = np.ones(data.images * RECORD, np.uint8)
    slots = np.ones((SLOTS, options.batch * size), np.uint8)
    draws = np.random.default_rng(0)

    def copy(slot: int, first: int, at: int) -> None:
        piece = slots[slot, first * size:(first + PIECE) * size]
        np.copyto(piece, memory[at:at + piece.size])

    def submit(turn: int) -> list[Future[None]]:
        at = draws.integers(0, memory.size - PIECE * size, -(-options.batch // PIECE)).tolist()
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
