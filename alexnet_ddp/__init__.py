"""alexnet-ddp: the ImageNet trainer that survives a cluster.

Importing this package imports no torch, so that `--help` and `submit` answer at once on a login node.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "load_model", "read_features"]


def __getattr__(name: str) -> Any:
    if name == "create_model":
        from alexnet_ddp.models import create_model

        return create_model
    if name == "load_model":
        from alexnet_ddp.trained.model import load_model

        return load_model
    if name == "read_features":
        from alexnet_ddp.trained.feature_file import read_features

        return read_features
    raise AttributeError(f"module 'alexnet_ddp' has no attribute {name!r}")
