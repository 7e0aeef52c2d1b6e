"""Where real photographs lie for tests, if they do: ALEXNET_DDP_DATA, else shared/data beside the checkout.

    imagenet-sample.tar   train/<synset>/*.JPEG, 700 photographs, one a class
    cifar10-jpeg.tar      train|test/<class>/*.jpg, all of CIFAR-10
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("ALEXNET_DDP_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def archive(name: str) -> Path:
    """The archive's path; the test is skipped, saying so, where it isn't."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is neither in ALEXNET_DDP_DATA nor in shared/data beside the checkout")
    return path
