"""Amounts in words: never 0 of a large unit, never `1 shards`."""

import pytest

from alexnet_ddp.amounts import counted, human_bytes
from alexnet_ddp.data.caches.cache import CacheProgress


@pytest.mark.parametrize(("count", "told"), [
    (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1_000, "1.0 kB"), (12_345, "12.3 kB"), (150_528, "151 kB"),
    (4_200_000, "4.2 MB"), (489e6, "489 MB"), (31.5e9, "31.5 GB"), (252e9, "252 GB"), (1.5e12, "1,500 GB")])
def test_bytes(count: float, told: str) -> None:
    """In the largest unit of which there is one, one decimal below 100."""
    assert human_bytes(count) == told


def test_numbers_with_nouns() -> None:
    """One is singular, all others plural, thousands are set apart."""
    assert [counted(number, "shard") for number in (0, 1, 2, 5120)] == ["0 shards", "1 shard", "2 shards",
                                                                        "5,120 shards"]
    assert (counted(1, "class", "classes"), counted(3, "class", "classes")) == ("1 class", "3 classes")


def test_a_small_cache_is_not_0_gb() -> None:
    """What a cache says of itself suits its size."""
    assert str(CacheProgress(held=3, samples=5, bytes=2_500, refetched=0, full=True)) == \
        "3 of 5 records (60%), 2.5 kB, full"
    assert "37.0 GB" in str(CacheProgress(held=5, samples=5, bytes=37 * 10**9, refetched=0, full=False))
