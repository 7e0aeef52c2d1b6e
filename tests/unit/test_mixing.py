"""Mixup and CutMix: torchvision's blends, over the global batch, whoever holds its samples."""

import itertools
from typing import cast

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from alexnet_ddp.config import Config, build
from alexnet_ddp.data import mixing
from alexnet_ddp.data.augment import Augment
from alexnet_ddp.data.index import Index
from alexnet_ddp.data.loader import Work
from alexnet_ddp.data.mixing import Mixing, beta, cutmix_box, draw_mixing, mix, with_guests
from alexnet_ddp.data.order import Order
from alexnet_ddp.data.training import Data, most_rows, training_works
from alexnet_ddp.loss import sample_losses
from alexnet_ddp.sections import AugmentSection

CPU = torch.device("cpu")
SAMPLES = 23  # by 10: two whole steps and one of 3
CLASSES = 5


# --- what is drawn for a step -----------------------------------------------------------------------------------


def test_golden_values() -> None:
    """These numbers never change: a run goes on with the shares and boxes that it was begun with."""
    both = AugmentSection(size=64, mixup=0.2, cutmix=1.0)
    assert [(found.share, found.box) for found in (draw_mixing(both, seed=3, step=step) for step in range(6))] == [
        (0.720703125, (38, 0, 64, 44)),
        (0.6875, (4, 32, 44, 64)),
        (0.41182422637939453, None),
        (0.2698831558227539, None),
        (0.20827102661132812, None),
        (0.6181640625, (18, 30, 64, 64))]


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 3.0])
def test_shares_are_beta(alpha: float) -> None:
    """Shares over steps follow Beta(alpha, alpha) (Kolmogorov and Smirnov's bound, where rounding doesn't matter),
    differ between seeds, and fit float32."""
    section = AugmentSection(mixup=alpha)
    shares = [draw_mixing(section, seed=0, step=step).share for step in range(2000)]
    points = np.linspace(0.005, 0.995, 199)
    expected = stats.beta(alpha, alpha).cdf(points)
    assert np.abs(np.searchsorted(np.sort(shares), points) / 2000 - expected).max() < 1.95 / np.sqrt(2000)
    assert all(np.float32(share) == share for share in shares)
    assert draw_mixing(section, seed=1, step=0).share != shares[0]
    assert beta(0.5, alpha) == 0.5


def test_either_by_an_even_chance() -> None:
    """With both in use each step is one or the other; what is drawn for one doesn't depend on the other."""
    both = AugmentSection(mixup=0.3, cutmix=0.7)
    alone = {None: AugmentSection(mixup=0.3), "box": AugmentSection(cutmix=0.7)}
    cuts = 0
    for step in range(2000):
        found = draw_mixing(both, seed=5, step=step)
        other = draw_mixing(alone[found.box and "box"], seed=5, step=step)
        assert (found.share, found.box) == (other.share, other.box)
        cuts += found.box is not None
    assert abs(cuts - 1000) < 4 * np.sqrt(500)


def test_boxes_are_torchvision_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's CutMix, given our share and place, makes the same box and the same adjusted share."""
    places: list[int] = []
    monkeypatch.setattr(torch, "randint", lambda high, *, size: torch.tensor([places.pop(0)]))
    random = np.random.default_rng(0)
    for size, share in itertools.product((16, 33, 224), [0.0, 1.0, *random.random(60).tolist()]):
        across, down = random.random(2).tolist()
        theirs = v2.CutMix(alpha=1.0, num_classes=CLASSES)
        theirs._dist = cast(torch.distributions.Beta, Fixed(share))
        places[:] = [int(across * size), int(down * size)]
        made = theirs.make_params([torch.zeros(2, 3, size, size)])
        left, top, right, bottom = cutmix_box(share, across, down, size=size)
        assert made["box"] == (left, top, right, bottom)
        assert made["lam_adjusted"] == 1.0 - (right - left) * (bottom - top) / size**2
    section = AugmentSection(size=64, cutmix=1.0)
    for step in range(50):  # and that is the share that counts
        found = draw_mixing(section, seed=0, step=step)
        assert found.box is not None
        inside = np.zeros((64, 64))
        inside[found.box[1]:found.box[3], found.box[0]:found.box[2]] = 1
        assert found.share == 1.0 - inside.mean()


class Fixed:
    """A distribution of one value."""

    def __init__(self, value: float) -> None:
        self.value = value

    def sample(self, _: tuple[()]) -> float:
        return self.value


# --- the blend --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [None, (3, 0, 20, 11), (5, 5, 5, 5), (0, 0, 24, 24)])
@pytest.mark.parametrize("kind", [torch.channels_last, torch.contiguous_format])
def test_blends_are_torchvision_s(box: tuple[int, int, int, int] | None, kind: torch.memory_format) -> None:
    """A whole batch: torchvision's MixUp and CutMix give the same pixels to the bit, and the loss of their soft labels
    is ours."""
    pixels = torch.randn(7, 3, 24, 24).contiguous(memory_format=kind)
    labels, before = torch.arange(7) % CLASSES, pixels.clone()
    share = 0.7109375 if box is None else 1.0 - (box[2] - box[0]) * (box[3] - box[1]) / 24**2
    own, guests = with_guests(Mixing(share, box), np.arange(40, 47), first=40, count=7)
    assert len(guests) == 0
    found, targets = mix(pixels, labels, own)
    theirs = (v2.MixUp if box is None else v2.CutMix)(alpha=1.0, num_classes=CLASSES)
    params = {"labels": labels, "batch_size": 7, "lam": share, "box": box, "lam_adjusted": share}
    assert torch.equal(found, theirs.transform(pixels, params))
    assert found.is_contiguous(memory_format=kind) and torch.equal(pixels, before)
    logits = torch.randn(7, CLASSES)
    for smoothing in (0.0, 0.1):
        wanted = torch.nn.functional.cross_entropy(logits, theirs.transform(labels, params), reduction="none",
                                                   label_smoothing=smoothing)
        torch.testing.assert_close(sample_losses(logits, targets, smoothing=smoothing), wanted)


@pytest.mark.parametrize("box", [None, (1, 1, 7, 4)])
def test_damaged_partners(box: tuple[int, int, int, int] | None) -> None:
    """An image whose partner (its own micro-batch's or a guest) is damaged stays as it is, with its own label alone;
    the others are blended as ever."""
    pixels, labels = torch.randn(5, 3, 8, 8), torch.arange(5)
    mixing, guests = with_guests(Mixing(0.75, box), np.arange(14, 18), first=10, count=20)
    assert guests.tolist() == [13]
    whole, targets = mix(pixels, labels, mixing)
    damaged = np.array([False, True, False, False, True])  # the second own one, and the guest
    found, told = mix(pixels, labels, mixing, damaged=damaged)
    assert targets.others is not None and told.others is not None
    assert (targets.others.tolist(), told.others.tolist()) == ([4, 0, 1, 2], [0, 0, 2, 2])
    for row in (0, 2):  # those that come after them
        torch.testing.assert_close(found[row], pixels[row])
    for row in (1, 3):
        assert torch.equal(found[row], whole[row])
    logits = torch.randn(4, 5)
    plain = torch.nn.functional.cross_entropy(logits, labels[:4], reduction="none")
    torch.testing.assert_close(sample_losses(logits, told, smoothing=0.0)[[0, 2]], plain[[0, 2]])


def test_nothing_to_mix() -> None:
    """Without mixing pixels and labels pass as they are; a rank without samples gets an empty blend."""
    pixels, labels = torch.randn(3, 3, 8, 8), torch.arange(3)
    found, targets = mix(pixels, labels, None)
    assert found is pixels and targets.labels is labels and targets.shares is None
    for box in (None, (1, 1, 4, 4)):
        nobody, guests = with_guests(Mixing(0.5, box), np.arange(0), first=10, count=4)
        found, targets = mix(pixels[:0], labels[:0], nobody)
        assert found.shape == (0, 3, 8, 8) and len(guests) == len(targets.labels) == 0
        assert targets.others is not None and targets.shares is not None and len(targets.shares) == 0


# --- guests -----------------------------------------------------------------------------------------------------


def made(config: Config, *, world: int, first: int = 0) -> dict[int, list[Work]]:
    """A run's works by step, of all ranks."""
    order = Order(SAMPLES, global_batch=config.global_batch, seed=config.seed, shards=config.data.shards,
                  identity="ab" * 32)
    data, steps = Data(cast(Index, range(SAMPLES)), None, order), {}
    for rank in range(world):
        for work in training_works(config, data, first_step=first, rank=rank, world=world):
            steps.setdefault(work.step, []).append(work)
    return steps


def recipe(**changes: object) -> Config:
    tree = {"data": {"train": "/x", "shards": 12}, "global_batch": 10, "micro_batch": 3, "epochs": 2, "seed": 4,
            "augment": {"size": 16, "mixup": 0.4, "cutmix": 1.0, "erasing": 0.5, "policy": "randaugment"}}
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        (tree[section] if section else tree)[name] = value  # type: ignore[index]
    return build(tree)


def seen(works: list[Work], section: AugmentSection) -> dict[int, tuple[bytes, int, float]]:
    """Of each own sample: its blended pixels, its partner, and its share, by mix itself, of images that are made from
    the sample's id, cropped by its view."""
    found = {}
    augment = Augment(section, channels=3, device=CPU)
    for work in works:
        assert work.draws is not None and work.mixing is not None
        images = np.zeros((len(work.samples), 16, 16, 3), np.uint8)
        for row, sample in enumerate(work.samples.tolist()):
            view = work.choose(row)(60, 50)
            noise = np.random.default_rng(sample).integers(0, 256, (50, 60, 3), dtype=np.uint8)
            part = noise[view.top:view.top + view.height, view.left:view.left + view.width]
            images[row] = part[np.arange(16) * len(part) // 16][:, np.arange(16) * part.shape[1] // 16]
        pixels, targets = mix(augment(torch.from_numpy(images), work.draws), torch.from_numpy(work.samples),
                              work.mixing)
        assert targets.others is not None and targets.shares is not None
        assert targets.labels.tolist() == work.samples[work.own].tolist()
        for sample, image, other, share in zip(targets.labels.tolist(), pixels, targets.others.tolist(),
                                               targets.shares.tolist(), strict=True):
            assert sample not in found
            found[sample] = (image.numpy().tobytes(), other, share)
    return found


@pytest.mark.parametrize("assignment", ["contiguous", "owner"])
def test_who_holds_a_sample_doesn_t_matter(assignment: str) -> None:
    """1 to 4 ranks, micro-batches of 1, 3 and 10, either assignment, from any step on: every sample of every step is
    blended with the one before it in the step's order, to the same pixels."""
    config = recipe(micro_batch=10)
    order = Order(SAMPLES, global_batch=10, seed=4, shards=12, identity="ab" * 32)
    reference = {step: seen(works, config.augment) for step, works in made(config, world=1).items()}
    shares = set()
    for step, found in reference.items():
        batch = order.batch(step).tolist()
        assert {sample: other for sample, (_, other, _) in found.items()} == dict(
            zip(batch, [batch[-1], *batch[:-1]], strict=True))
        shares |= {share for _, _, share in found.values()}
    assert len(shares) == len(reference) == 6  # one a step
    for world, micro_batch, first in ((1, 1, 0), (2, 3, 1), (3, 10, 0), (4, 3, 0), (12, 1, 4)):
        config = recipe(micro_batch=micro_batch, data__assignment=assignment)
        steps = made(config, world=world, first=first)
        assert sorted(steps) == list(range(first, 6))
        for step, works in steps.items():
            assert all(len(work.samples) <= most_rows(config, world=world) for work in works)
            assert all(len(np.unique(work.samples)) == len(work.samples) for work in works)
            assert seen(works, config.augment) == reference[step], (world, micro_batch, step)


def test_guests_are_few() -> None:
    """Contiguous parts have one guest a micro-batch, none where it is the whole step; without mixing there are none."""
    for works in made(recipe(), world=2).values():
        assert {work.guests for work in works if len(work.samples) > work.guests} == {1}
    assert {work.guests for works in made(recipe(micro_batch=10), world=1).values() for work in works} == {0}
    plain = recipe(augment__mixup=0.0, augment__cutmix=0.0)
    works = [work for works in made(plain, world=2).values() for work in works]
    assert {(work.guests, work.mixing) for work in works} == {(0, None)}
    assert most_rows(plain, world=2) == 3 and most_rows(recipe(), world=2) == 4
    assert most_rows(recipe(data__assignment="owner"), world=2) == 6
    assert most_rows(recipe(data__assignment="owner", micro_batch=8), world=2) == 10
    assert most_rows(recipe(micro_batch=10), world=1) == 10


def test_the_seed_of_works_is_the_mixing_s() -> None:
    """Every work of a step has the step's share and box, drawn with the run's seed."""
    config = recipe()
    for step, works in made(config, world=3).items():
        wanted = draw_mixing(config.augment, seed=4, step=step)
        for work in works:
            assert work.mixing is not None
            assert (work.mixing.share, work.mixing.box) == (wanted.share, wanted.box)
    assert mixing.partners_of(np.array([20, 21, 22]), first=20, count=3).tolist() == [22, 20, 21]
    assert mixing.partners_of(np.array([22]), first=22, count=1).tolist() == [22]  # a step of one sample
