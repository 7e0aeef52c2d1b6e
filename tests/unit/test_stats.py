"""`data stats`: exact figures, the same on any number of threads."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import harness
import packs
from alexnet_ddp import cli
from alexnet_ddp import config as recipes
from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.packs.pack import pack
from alexnet_ddp.data.tools.stats import BAND, Sums, principal, stats, sums_of
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER, UserError

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """19 small JPEGs in three classes of 7, 6 and 6."""
    return harness.make_images(tmp_path / "source", samples=19)


def pixels_of(source: Path, *, samples: list[int]) -> list[np.ndarray]:
    files = sorted(source.rglob("*.jpg"))
    return [np.asarray(Image.open(files[sample]).convert("RGB")) for sample in samples]


@pytest.mark.parametrize("limit", [None, 5])
def test_against_numpy(source: Path, limit: int | None) -> None:
    """Mean, deviation, covariance's eigenvalues and vectors, and sizes are those of NumPy on all pixels at once."""
    ids = list(range(19)) if limit is None else [number * 19 // limit for number in range(limit)]
    images = pixels_of(source, samples=ids)
    found = stats(str(source), limit=limit)
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255.0
    values, vectors = np.linalg.eigh(np.cov(pixels.T, bias=True))
    assert np.allclose(found.mean, pixels.mean(0), rtol=1e-12, atol=0)
    assert np.allclose(found.std, pixels.std(0), rtol=1e-12, atol=0)
    assert np.allclose(found.eigenvalues, values[::-1], rtol=1e-9, atol=0)
    assert np.allclose(np.abs(found.eigenvectors), np.abs(vectors.T[::-1]), rtol=0, atol=1e-9)
    heights, widths = np.array([image.shape[:2] for image in images]).T
    for spread, wanted in ((found.width, widths), (found.height, heights), (found.megapixels, heights * widths / 1e6)):
        assert (spread.least, spread.median, spread.most) == (wanted.min(), np.median(wanted), wanted.max())
    assert found.total_bytes == sum(sorted(source.rglob("*.jpg"))[sample].stat().st_size for sample in ids)
    assert (found.looked_at, found.samples, found.classes) == (len(ids), 19, 3)
    assert (found.per_class.least, found.per_class.most, found.largest) == (6, 7, "class0")


def test_words(source: Path) -> None:
    """Of a part it is said of what the figures are; classes of one size are told without favour."""
    whole, part = stats(str(source)).summary(), stats(str(source), limit=5).summary()
    assert "looked at 19, all of them" in whole and "bytes in all" not in part
    assert "class1 and 1 other have the fewest, class0 has the most)\n" in whole
    assert "looked at 5, taken evenly: what follows is of these" in part and "in those looked at" in part
    assert "class0 has the most) (of all 19)\n" in part
    for path in sorted(source.rglob("*.jpg"))[:1]:
        path.unlink()
    equal = stats(str(source)).summary()
    assert "3; 6 images in each\n" in equal and "pixels (least / median / most)" in equal


def test_threads_change_no_bit(source: Path) -> None:
    """One thread or five: the same figures to the last bit."""
    one, five = stats(str(source), threads=1).facts(), stats(str(source), threads=5).facts()
    assert json.dumps(one) == json.dumps(five)


def test_sums_are_exact() -> None:
    """Sums over more pixels than a band, all at 255 or random, are the integers themselves."""
    rng = np.random.default_rng(0)
    for pixels in (np.full((2 * BAND + 7, 3), 255, np.uint8), rng.integers(0, 256, (BAND + 1, 3), dtype=np.uint8)):
        found, wide = sums_of(pixels), pixels.astype(np.int64)
        assert np.array_equal(found.values, wide.sum(0))
        assert np.array_equal(found.products, wide.T @ wide)
    sums = Sums()  # beyond what int64 or float64 hold
    for _ in range(3):
        sums.add(np.full(3, 2**62), np.full((3, 3), 2**62), 2**55)
    assert sums.values[0] == 3 * 2**62


def test_eigenvectors_have_one_sign() -> None:
    """Largest eigenvalue first; rows of unit length whose largest part is positive; no negative rounding."""
    covariance = np.diag([1.0, 3.0, 0.0])
    values, rows = principal(covariance)
    assert np.allclose(values, [3, 1, 0]) and (values >= 0).all()
    assert np.allclose(rows, [[0, 1, 0], [1, 0, 0], [0, 0, 1]])


def test_kinds_and_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kinds are counted; damaged images are named, left out, and make the exit code 2; all damaged is refused."""
    source = packs.every_kind(tmp_path / "source")
    bad = source / "a" / "0plain.jpg"
    bad.write_bytes(b"x")
    assert cli.main(["data", "stats", str(source)]) == EXIT_USER
    out = capsys.readouterr().out
    assert f"{bad} (sample 0): not a JPEG or PNG" in out
    assert "2 grey, 1 CMYK" in out and "looked at 9, all of them" in out
    for path in source.rglob("*.*"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="not one of the 10 images"):
        stats(str(source))
    with pytest.raises(UserError, match="--limit"):
        stats(str(source), limit=0)


def test_a_raw_pack(tmp_path: Path, source: Path) -> None:
    """Of a raw pack: its own pixels, every image with the same weight."""
    pack(str(source), destination=tmp_path / "pack", stage="raw16")
    found = stats(str(tmp_path / "pack"))
    with open_index(str(tmp_path / "pack")) as index:
        pixels = np.concatenate([np.frombuffer(index.read(row), np.uint8).reshape(-1, 3) for row in range(19)]) / 255.0
    assert np.allclose(found.mean, pixels.mean(0), rtol=1e-12)
    assert np.allclose(found.std, pixels.std(0), rtol=1e-12)
    assert (found.width.least, found.height.most, found.stage) == (16, 16, "raw16")


def test_recipe_lines(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines to use it by are overrides that a recipe takes; --json prints all figures."""
    found = stats(str(source))
    config = recipes.build(recipes.apply_overrides({"data": {"train": "x"}}, found.recipe))
    assert np.allclose(config.augment.mean, found.mean, atol=1e-4)
    assert np.allclose(config.augment.std, found.std, atol=1e-4)
    assert np.allclose(config.augment.pca_eigenvalues, found.eigenvalues, atol=1e-6)
    assert np.allclose(config.augment.pca_eigenvectors, found.eigenvectors, atol=1e-4)
    assert cli.main(["data", "stats", str(source), "--json"]) == EXIT_FINISHED
    assert json.loads(capsys.readouterr().out)["mean"] == found.mean
