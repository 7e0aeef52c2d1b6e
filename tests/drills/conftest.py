"""Benches that the tests of a file share, so that each undisturbed twin runs once."""

from collections.abc import Callable
from typing import Any

import pytest

from twins import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    """bench(world=2, **changes of the recipe by dotted key): made at the first call, the same one afterwards."""
    made: dict[str, Bench] = {}

    def get(*, world: int, **changes: Any) -> Bench:
        key = f"{world} {sorted(changes.items())}"
        if key not in made:
            made[key] = Bench(tmp_path_factory.mktemp("bench"), world=world, changes=changes)
        return made[key]

    return get
