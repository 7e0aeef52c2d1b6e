"""All that a cluster can do to a run, on a real Slurm (tests/scenarios.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scenarios import ALL, Scenario

if TYPE_CHECKING:
    from campaign import Campaign

pytest_plugins = ["campaign"]


@pytest.mark.drill
@pytest.mark.slurm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.__name__)
def test_run_survives(scenario: Scenario, campaign: Campaign) -> None:
    """Disturbed as the scenario says, the run ends with the undisturbed one's weights, and nothing of it is left."""
    campaign.result(scenario)
