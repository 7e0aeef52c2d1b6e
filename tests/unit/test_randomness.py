"""Random numbers: the same for ever, evenly spread, and functions of nothing but what they are for."""

import itertools

import numpy as np
import pytest
import torch

from alexnet_ddp.data import randomness
from alexnet_ddp.data.randomness import CROP_DRAWS, Draws, draw, dropout_rows, key, normal, uniform

STRENGTHS = {"flip": 0.5, "rotation": 10.0, "color_jitter": (0.2, 0.2, 0.2, 0.1), "pca_lighting": 0.1}
FIELDS = tuple(Draws.__dataclass_fields__)


def assert_same(a: Draws, b: Draws) -> None:
    for name in FIELDS:
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_mixing_is_the_published_splitmix64() -> None:
    """The stream of seed 1234567 is the one published with splitmix64, so the hash is the one it says it is."""
    stream = np.uint64(1234567) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, 6, dtype=np.uint64)
    assert randomness.mix(stream).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423,
                                               4593380528125082431, 16408922859458223821]


def test_golden_values() -> None:
    """These numbers never change: a checkpoint of any age goes on with the draws that it was begun with."""
    assert int(key(0)) == 16294208416658607535
    assert int(key(1, 2, 3)) == 15020427595393229491
    assert int(key(7, "flip")) == 10242746908901198630
    assert int(key(2**63 - 1, 5, "crop", 1_281_166)) == 1998335515026286580
    assert uniform(key(0, "x"), 3).tolist() == [0.8618138924982842, 0.5051690062118175, 0.7397430209933319]
    assert normal(key(0, "x"), 2) == pytest.approx([-0.1281307725063348, 0.5299662738569638], rel=1e-14)
    drawn = draw(np.array([0, 1, 99]), seed=3, epoch=2, **STRENGTHS)
    assert drawn.crop[:, :3].tolist() == [
        [0.2119221450034272, 0.7961296836563451, 0.3446376364609548],
        [0.35389876062603987, 0.13526353988007722, 0.7953848342907561],
        [0.12696602726357287, 0.39241389870012, 0.6806998153167412]]
    assert drawn.flip.tolist() == [True, True, False]
    assert drawn.angle.tolist() == [3.6150994300842285, -5.245160102844238, -6.570465087890625]
    assert drawn.jitter.tolist() == [
        [1.1645411252975464, 0.9313194751739502, 0.9444103837013245, -0.0660773292183876],
        [0.8600243330001831, 0.9057171940803528, 1.190146803855896, 0.044326260685920715],
        [1.0186187028884888, 1.0198160409927368, 0.9547778367996216, 0.06822431087493896]]
    assert drawn.jitter_order.tolist() == [[0, 2, 3, 1], [2, 3, 1, 0], [2, 1, 0, 3]]
    assert drawn.lighting.ravel() == pytest.approx(
        [0.030603311955928802, 0.055094894021749496, -0.019009286537766457, -0.158399760723114, -0.05937880277633667,
         0.038187842816114426, -0.026997188106179237, -0.02502240426838398, 0.025692572817206383], rel=1e-6)
    assert dropout_rows(np.array([0, 1, 99]), seed=3, step=7).tolist() == [2537670306, 1566022155, 1567469016]


def test_a_draw_depends_on_its_sample_alone() -> None:
    """Whatever else is drawn, in which order, pieces and integer types: each sample's draws are the same."""
    samples = np.arange(1000, 1100)
    whole = draw(samples, seed=5, epoch=7, **STRENGTHS)
    shuffled = np.random.default_rng(0).permutation(100)
    mixed = draw(samples[shuffled], seed=5, epoch=7, **STRENGTHS)
    for at in (slice(0, 1), slice(13, 40), slice(99, 100), slice(50, 50)):
        assert_same(draw(samples[at], seed=5, epoch=7, **STRENGTHS), whole[at])
    for name in FIELDS:
        assert np.array_equal(getattr(mixed, name), getattr(whole, name)[shuffled]), name
    for kind in (np.int32, np.int64, np.uint16, np.uint64):
        assert_same(draw(samples.astype(kind), seed=5, epoch=7, **STRENGTHS), whole)
    assert_same(draw(np.repeat(samples, 2)[::2], seed=5, epoch=7, **STRENGTHS), whole)  # strided
    keys = dropout_rows(samples, seed=5, step=7)
    assert np.array_equal(dropout_rows(samples[shuffled].astype(np.int32), seed=5, step=7), keys[shuffled])


def test_purposes_don_t_touch_each_other() -> None:
    """Another strength of one augmentation leaves every other draw, the crop too, as it was."""
    samples = np.arange(50)
    whole = draw(samples, seed=0, epoch=0, **STRENGTHS)
    plain = draw(samples, seed=0, epoch=0, flip=0.0, rotation=0.0, color_jitter=(0, 0, 0, 0), pca_lighting=0.0)
    assert np.array_equal(whole.crop, plain.crop)
    assert np.array_equal(plain.jitter_order, np.tile(np.arange(4), (50, 1)))  # nothing to be ordered
    one = draw(samples, seed=0, epoch=0, **{**STRENGTHS, "color_jitter": (0.1, 0, 0, 0)})
    assert np.array_equal(whole.jitter_order, one.jitter_order)
    assert np.array_equal(draw(samples, seed=0, epoch=0, **STRENGTHS, crop=2).crop, whole.crop[:, :2])
    assert not plain.flip.any()
    assert not plain.angle.any()
    assert not plain.lighting.any()
    assert np.array_equal(plain.jitter, np.tile(np.float32([1, 1, 1, 0]), (50, 1)))
    assert not plain.erased.any()
    assert plain.policy.shape == (50, 0, 3)
    more = draw(samples, seed=0, epoch=0, **STRENGTHS, erasing=0.5, size=64, policy_ops=3)
    for name in set(FIELDS) - {"erased", "policy"}:
        assert np.array_equal(getattr(more, name), getattr(whole, name)), name
    one = draw(samples, seed=0, epoch=0, **STRENGTHS, erasing=1.0, size=64, policy_ops=1)
    assert np.array_equal(one.policy, more.policy[:, :1])
    assert np.array_equal(one.erased[more.erased.any(1)], more.erased[more.erased.any(1)])
    twice = draw(samples, seed=0, epoch=0, **{**STRENGTHS, "rotation": 20.0})
    assert twice.angle == pytest.approx(2 * whole.angle)


def test_seeds_epochs_and_samples_differ() -> None:
    """Another seed, epoch, sample or purpose gives other numbers, also for neighbours and at the ends of the range."""
    seeds, epochs, samples = (0, 1, 2**31, 2**63 - 1), (0, 1, 89), np.array([0, 1, 2, 14_000_000, 2**31])
    found = [key(seed, epoch, purpose, samples) for seed, epoch, purpose
             in itertools.product(seeds, epochs, ("crop", "flip", "rotation", "jitter", "lighting", "dropout"))]
    assert len(np.unique(found)) == len(found) * len(samples)
    assert key(1, 2) != key(2, 1)


@pytest.mark.parametrize("what", ["samples", "epochs", "seeds", "draws"])
def test_uniform(what: str) -> None:
    """Draws are evenly spread and unrelated along samples, epochs, seeds and draws: chi-square and correlation."""
    n = 2**16
    counts = np.arange(n, dtype=np.uint64)
    draws = {"samples": lambda: uniform(key(0, 0, "crop", counts), 2),
             "epochs": lambda: uniform(key(0, counts, "crop"), 2),
             "seeds": lambda: uniform(key(counts, 0, "crop"), 2),
             "draws": lambda: uniform(key(0, "crop"), 2 * n).reshape(n, 2)}[what]()
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    bins = np.histogram2d(draws[:, 0], draws[:, 1], bins=16, range=((0, 1), (0, 1)))[0]
    chi_square = ((bins - n / 256) ** 2 / (n / 256)).sum()
    assert 170 < chi_square < 350  # 255 degrees of freedom: mean 255, standard deviation 22.6
    for a, b in ((draws[:-1, 0], draws[1:, 0]), (draws[:, 0], draws[:, 1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(n)


def test_normal_moments() -> None:
    """Normal draws have mean 0, variance 1, no skew, and a normal's tails, within four standard errors of 2**17."""
    draws = normal(key(0, "lighting", np.arange(2**15)), 4).ravel()
    n = len(draws)
    assert abs(draws.mean()) < 4 / np.sqrt(n)
    assert abs(draws.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs((draws**3).mean()) < 4 * np.sqrt(15 / n)
    assert abs((draws**4).mean() - 3) < 4 * np.sqrt(96 / n)
    assert np.isfinite(draws).all()


def test_ranges_are_torchvision_s() -> None:
    """Over 20,000 samples flips come as often as asked; angles, factors and shifts fill torchvision's ranges."""
    n = 20_000
    jitter = (0.4, 0.3, 1.5, 0.5)
    drawn = draw(np.arange(n), seed=1, epoch=3, flip=0.3, rotation=30.0, color_jitter=jitter, pca_lighting=0.1)
    assert drawn.crop.shape == (n, CROP_DRAWS)
    assert abs(drawn.flip.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)
    ranges = [(-30.0, 30.0, drawn.angle), (0.6, 1.4, drawn.jitter[:, 0]), (0.7, 1.3, drawn.jitter[:, 1]),
              (0.0, 2.5, drawn.jitter[:, 2]), (-0.5, 0.5, drawn.jitter[:, 3])]  # no factor below 0
    for low, high, found in ranges:
        margin = (high - low) / 1000
        assert np.float32(low) <= found.min() < low + margin
        assert high - margin < found.max() <= np.float32(high)
        assert abs(found.mean() - (low + high) / 2) < 4 * (high - low) / np.sqrt(12 * n)
    assert abs(drawn.lighting.std() - 0.1) < 0.002
    assert draw(np.arange(9), seed=0, epoch=0, **{**STRENGTHS, "flip": 1.0}).flip.all()


def test_all_orders_of_jitter_are_equally_likely() -> None:
    """Each of the 24 orders of the four colour operations comes as often as the others."""
    drawn = draw(np.arange(24_000), seed=1, epoch=3, **STRENGTHS)
    orders, counts = np.unique(drawn.jitter_order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # 23 degrees of freedom
    assert (np.sort(drawn.jitter_order, axis=1) == np.arange(4)).all()


def test_golden_values_of_erasing_and_policy() -> None:
    """These numbers never change, like those above."""
    drawn = draw(np.array([0, 1, 99]), seed=3, epoch=2, **STRENGTHS, erasing=0.9, size=64, policy_ops=2)
    assert drawn.erased.tolist() == [[15, 12, 43, 25], [11, 20, 31, 16], [10, 49, 33, 11]]
    assert drawn.policy.tolist() == [[[10, 1, 1], [7, 10, -1]], [[1, 20, 1], [8, 22, -1]], [[13, 21, 1], [11, 27, 1]]]


def test_operations_are_equally_likely() -> None:
    """Each of the 14 operations, 31 bins and 2 signs comes as often as the others, whatever the others are."""
    found = draw(np.arange(31_000), seed=1, epoch=0, **STRENGTHS, policy_ops=2).policy
    cells = np.ravel_multi_index((found[:, 0, 0], found[:, 1, 0]), (14, 14)), np.ravel_multi_index(
        (found[:, 0, 1], found[:, 0, 2] // 2 + 1), (31, 2))
    for cell, count in zip(cells, (196, 62), strict=True):
        counts = np.bincount(cell, minlength=count)
        expected = len(found) / count
        assert len(counts) == count
        assert ((counts - expected) ** 2 / expected).sum() < count + 5 * np.sqrt(2 * count)


@pytest.mark.parametrize("size", [16, 224])
def test_erased_boxes_are_torchvision_s(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """torchvision's RandomErasing, fed with our uniform draws in its order, takes the same boxes: all but one in a
    thousand, whose side its float32 rounds the other way by one pixel."""
    from torchvision.transforms.v2 import RandomErasing, _augment

    n = 500
    draws = uniform(key(0, "erasing", np.arange(n)), 1 + 4 * randomness.ERASING_TRIES)
    found = randomness.erased_boxes(draws, 1.0, size=size)
    stream: list[float] = []

    class Torch:
        """torch, with our numbers for its own."""

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        def empty(self, _: int) -> "Torch":
            return self

        def uniform_(self, low: float, high: float) -> torch.Tensor:
            return torch.tensor([float(low) + stream.pop(0) * (float(high) - float(low))])

        def randint(self, low: int, high: int, *, size: tuple[int]) -> torch.Tensor:
            return torch.tensor([low + int(stream.pop(0) * (high - low))])

    monkeypatch.setattr(_augment, "torch", Torch())
    erasing, expected = RandomErasing(), []
    for row in range(n):
        tries = draws[row, 1:].reshape(-1, 4).tolist()
        stream[:] = []
        for share, ratio, down, across in tries:  # a try that doesn't fit draws no place
            height, width = (np.sqrt(size * size * (0.02 + share * 0.31) * np.exp(
                sign * (np.log(0.3) + ratio * np.log(11)))) for sign in (1, -1))
            fits = round(height) < size and round(width) < size
            stream.extend([share, ratio, down, across] if fits else [share, ratio])
        made = erasing.make_params([torch.zeros(3, size, size)])
        expected.append([made["i"], made["j"], made["h"], made["w"]])
    differing = np.abs(found - np.array(expected)).max(1)
    assert (differing > 0).sum() <= n // 500 and differing.max() <= 1
    chance = randomness.erased_boxes(draws, 0.25, size=size)
    assert np.array_equal(chance, np.where(draws[:, :1] < 0.25, found, 0))
    assert 0.15 < chance.any(1).mean() < 0.35


def test_dropout_rows() -> None:
    """Dropout keys are 32 bits, use the whole range, and differ between steps and between an epoch's samples."""
    rows = dropout_rows(np.arange(50_000), seed=0, step=0)
    assert rows.dtype == np.int64
    assert 0 <= rows.min() < 2**20
    assert 2**32 - 2**20 < rows.max() < 2**32
    assert len(np.unique(rows)) > 49_990  # the birthday paradox takes one in three such sets
    assert (rows != dropout_rows(np.arange(50_000), seed=0, step=1)).mean() > 0.999
