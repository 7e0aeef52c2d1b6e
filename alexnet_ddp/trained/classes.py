"""What classes are called: by their data (folder names, WordNet ids) and by people."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from alexnet_ddp.data.index.sources import listed
from alexnet_ddp.errors import UserError


@cache
def imagenet() -> dict[str, str]:
    """WordNet ids of the 1000 classes of ILSVRC 2012-2017, in the order of torchvision's weights (sorted), with the
    names that torchvision gives them."""
    from torchvision.models import AlexNet_Weights

    ids = resources.files("alexnet_ddp.trained").joinpath("imagenet_synsets.txt").read_text().split()
    names = list(AlexNet_Weights.IMAGENET1K_V1.meta["categories"])
    return dict(zip(ids, names, strict=True))


def spoken(classes: Sequence[str]) -> list[str]:
    """Names for people: those of ImageNet's where all classes are its WordNet ids, else the classes themselves."""
    known = imagenet() if classes and classes[0].startswith("n") else {}
    return [known[name] for name in classes] if all(name in known for name in classes) else list(classes)


def mapped(labels: NDArray[np.int32], *, of: Sequence[str], to: Sequence[str], source: str) -> NDArray[np.int32]:
    """Labels by the classes `of` some data, as labels by the classes `to` of a net: int32 [n].

    The data may have fewer classes than the net, in any order. Raises UserError where a class isn't the net's.
    """
    place = {name: number for number, name in enumerate(to)}
    if unknown := [name for name in of if name not in place]:
        raise UserError(f"{source} has {len(unknown)} of {len(of)} classes that the net doesn't know: "
                        f"{listed(unknown)}. The net's {len(to)} classes are {listed(list(to))}. Name data whose class "
                        "folders are called like those of its training data.")
    return np.array([place[name] for name in of], np.int32)[labels]
