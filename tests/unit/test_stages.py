"""Stored stages: the deterministic step between an original and what a run reads."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from alexnet_ddp.data.decoding.decode import DamagedImage
from alexnet_ddp.data.decoding.stages import Stage, parse_stage, to_stage


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours with an edge in them."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.where(x > y, 200, 40)], -1).astype(np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def turned(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


def test_stages() -> None:
    """short256 is a JPEG of short side 256, raw256 its central 256 x 256 pixels, original the bytes themselves."""
    data = encoded(photograph(400, 300), exif=turned(6))
    assert to_stage(data, Stage("original")) is data
    short = Image.open(io.BytesIO(to_stage(data, Stage("short", 256))))
    raw = np.frombuffer(to_stage(data, Stage("raw", 256)), np.uint8).reshape(256, 256, 3)
    assert (short.format, short.size, short.getexif().get(0x0112, 1)) == ("JPEG", (256, 341), 1)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).resize((256, 341), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(short).astype(int) - np.asarray(upright)).mean() < 5.0  # JPEG's own loss
    assert np.array_equal(raw, np.asarray(upright.crop((0, 42, 256, 298))))
    for stage in (Stage("short", 256), Stage("raw", 256), Stage("max", 200)):
        assert to_stage(data, stage) == to_stage(data, stage)
        assert to_stage(encoded(photograph(256, 256), "PNG"), stage)
        with pytest.raises(DamagedImage):
            to_stage(data[:900], stage)


def test_max_never_enlarges() -> None:
    """maxN bounds the longer side and leaves smaller images at their size."""
    for size, side, expected in (((400, 300), 200, (200, 150)), ((120, 90), 200, (120, 90)),
                                 ((90, 400), 200, (45, 200))):
        made = Image.open(io.BytesIO(to_stage(encoded(photograph(*size)), Stage("max", side))))
        assert made.size == expected


def test_small_and_grey_images() -> None:
    """Smaller images are enlarged to shortN and rawN, and a grey image still is grey."""
    data = encoded(photograph(100, 50).convert("L"))
    short = Image.open(io.BytesIO(to_stage(data, Stage("short", 256))))
    assert short.size == (512, 256)
    raw = np.frombuffer(to_stage(data, Stage("raw", 160)), np.uint8).reshape(160, 160, 3)
    for pixels in (np.asarray(short.convert("RGB")).astype(int), raw.astype(int)):
        assert np.ptp(pixels, axis=-1).max() <= 2


def test_words() -> None:
    """A stage's word and its parts stand for each other; other words are refused."""
    for word in ("original", "short256", "max500", "raw160"):
        assert str(parse_stage(word)) == word
    assert parse_stage("raw160").record_bytes == 160 * 160 * 3
    assert parse_stage("short256").record_bytes is None
    for word in ("raw", "raw0", "raw5", "short-1", "png", "original256", "raw99999", ""):
        with pytest.raises(ValueError, match="a stage is"):
            parse_stage(word)


def test_a_line_isn_t_grown_to_gigabytes() -> None:
    """An image of 1 x 60,000 pixels as short256 would take 12 GB on the way; as max500 it is small."""
    line = encoded(Image.new("RGB", (1, 60_000), "red"))
    for word in ("short256", "raw256"):
        with pytest.raises(DamagedImage, match="resized to 256 x 15360000 pixels are more than"):
            to_stage(line, parse_stage(word))
    assert to_stage(line, parse_stage("max500"))


def test_a_line_that_no_jpeg_can_hold() -> None:
    """An image of 1 x 300 as short256 has 76,800 rows, more than a JPEG's 65,500: damaged, as data.on_error says it."""
    with pytest.raises(DamagedImage, match="resized to 256 x 76800 pixels"):
        to_stage(encoded(Image.new("RGB", (1, 300), "red")), Stage("short", 256))
