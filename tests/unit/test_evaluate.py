"""Evaluation: places of labels with ties and NaN, tiles dealt to ranks, and the view that is evaluated."""

import itertools
import random

import numpy as np
import pytest
import torch

from alexnet_ddp.data.decoding.views import View, center, squash
from alexnet_ddp.evaluate import TILE, label_ranks, tiles_of, view_of, works
from alexnet_ddp.sections import AugmentSection, EvaluateSection


def reference(logits: list[float], label: int) -> int:
    """The place of a label when classes are sorted by falling logit, equal ones by rising number."""
    order = sorted(range(len(logits)), key=lambda number: (-logits[number], number))
    return order.index(label)


def test_places_of_labels() -> None:
    """Against sorting, for random logits with many ties, infinities among them: a tie goes to the lower class."""
    draw = random.Random(0)
    values = [-1.0, 0.0, 0.5, 0.5, 2.0, float("inf"), float("-inf")]
    rows = [draw.choices(values, k=7) for _ in range(500)]
    labels = [draw.randrange(7) for _ in rows]
    found = label_ranks(torch.tensor(rows), torch.tensor(labels))
    assert found.dtype == torch.int64
    assert found.tolist() == [reference(row, label) for row, label in zip(rows, labels, strict=True)]


def test_ties_go_to_the_lower_class() -> None:
    """When all logits are equal the label's place is its own number, so chance is not overstated."""
    assert label_ranks(torch.zeros(6, 6), torch.arange(6)).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("classes", [2, 3, 5, 1000])
def test_nan_is_never_right(classes: int) -> None:
    """A row with one NaN anywhere is neither top-1 nor top-5, also with fewer than five classes; other rows are."""
    logits = torch.zeros(3, classes)
    logits[:, 0] = 9.0
    logits[0, 0] = float("nan")
    logits[1, -1] = float("nan")
    places = label_ranks(logits, torch.zeros(3, dtype=torch.int64))
    assert (places[:2] >= 5).all()
    assert places[2] == 0
    assert (label_ranks(torch.full((1, classes), float("nan")), torch.tensor([1])) >= 5).all()


def test_no_rows() -> None:
    """An empty fetch has no places."""
    assert label_ranks(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def choose(width: int, height: int) -> View:
    return View(0, 0, width, height, 8, 8, 0, 0)


@pytest.mark.parametrize("samples", [1, 31, 32, 33, 64, 1003])
def test_works_count_every_sample_once(samples: int) -> None:
    """On 1 to 7 ranks and for any batch: equally many fetches on every rank, each sample in one, in whole tiles."""
    for world, batch in itertools.product(range(1, 8), (1, 2, 4, 7, 100)):
        ranks = [list(works(samples, batch=batch, rank=rank, world=world, choose=[choose])) for rank in range(world)]
        assert len({len(fetches) for fetches in ranks}) == 1
        counted = np.concatenate([work.samples[work.mask] for fetches in ranks for work in fetches])
        assert sorted(counted.tolist()) == list(range(samples))
        tiles: list[int] = []
        for work in itertools.chain(*ranks):
            assert len(work.samples) % TILE == 0
            assert len(work.samples) <= batch * TILE
            assert work.mask is not None
            assert work.samples[~work.mask].tolist() == [0] * int((~work.mask).sum())  # padding
            for at in range(0, len(work.samples), TILE):
                tile = work.step + at // TILE
                inside = work.mask[at:at + TILE]
                ids = work.samples[at:at + TILE][inside]
                assert ids.tolist() == list(range(tile * TILE, min(samples, tile * TILE + TILE)))  # its own samples
                tiles.append(tile)
        assert sorted(tiles) == list(range(tiles_of(samples)))  # every tile has one owner


@pytest.mark.parametrize(("crop", "trained", "expected"), [
    ("auto", "random_resized", center), ("auto", "random", center), ("auto", "squash", squash),
    ("center", "squash", center), ("squash", "center", squash),
])
def test_view_follows_training(crop: str, trained: str, expected: object) -> None:
    """auto squashes exactly where training squashes; otherwise the recipe's word holds."""
    section = AugmentSection(crop=trained, size=64)  # type: ignore[arg-type]
    view = view_of(EvaluateSection(crop=crop), section)(500, 375)  # type: ignore[arg-type]
    assert view == expected(500, 375, size=64)  # type: ignore[operator]
