"""One small net, trained once, for all tests of what comes after training."""

import pytest

from trained_nets import Trained, train_small


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_small(tmp_path_factory.mktemp("trained"))
