"""Decoding: torchvision's views, one upright image whatever the file's kind, damage named, decoders that agree."""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision import transforms

import photographs
from alexnet_ddp.data.decoding import decode, turbojpeg, views
from alexnet_ddp.data.decoding.decode import DamagedImage, create_decoder
from alexnet_ddp.data.decoding.jpeg import fraction
from alexnet_ddp.data.decoding.resize import Quality
from alexnet_ddp.data.decoding.views import ChooseView, View
from alexnet_ddp.data.index import open_index
from alexnet_ddp.data.randomness import CROP_DRAWS, key, uniform
from alexnet_ddp.errors import UserError


def installed() -> list[decode.Decoder]:
    """Pillow's, simplejpeg's, and whatever else is here."""
    found = [create_decoder("pillow"), create_decoder("simplejpeg")]
    for name in ("turbojpeg", "torchcodec", "nvimgcodec"):
        with contextlib.suppress(UserError):
            found.append(create_decoder(name))
    return found


DECODERS = installed()
BOTH = pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
SIZE = 64


def photograph(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Coloured noise whose amplitude falls as 1/frequency, up to the finest, as that of sharp photographs does."""
    random = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    strength = 1 / np.maximum(np.hypot(rows, columns), 0.5 / max(width, height))
    noise = np.fft.rfft2(random.normal(size=(3, height, width)))
    grey, red, blue = np.fft.irfft2(noise * strength, s=(height, width))
    pixels = np.stack([grey + red / 3, grey, grey + blue / 3], -1)
    return Image.fromarray((128 + 50 * pixels / max(pixels.std(), 1e-9)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 92} if kind == "JPEG" else {}), **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def central(width: int, height: int) -> View:
    return views.center(width, height, size=SIZE)


def whole(width: int, height: int) -> View:
    return views.squash(width, height, size=SIZE)


def decoded(decoder: decode.Decoder, data: bytes, choose: ChooseView = central, *, channels: int = 3,
            size: int = SIZE) -> NDArray[np.int64]:
    out = np.full((size, size, channels), 77, np.uint8)
    decoder(data, choose, out)
    return out.astype(np.int64)


# --- views ------------------------------------------------------------------------------------------------------


def test_random_resized_is_torchvision_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fed with our draws, torchvision's RandomResizedCrop gives our boxes, its central way out included."""
    fed: list[float] = []

    class Empty:
        def uniform_(self, low: float, high: float) -> torch.Tensor:
            return torch.tensor(float(low) + fed.pop(0) * (float(high) - float(low)), dtype=torch.float64)

    monkeypatch.setattr(torch, "empty", lambda _: Empty())
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.tensor([low + int(fed.pop(0) * (high - low))]))
    shapes = [(500, 375), (375, 500), (40, 400), (400, 30), (1, 1), (3, 2), (64, 64), (2000, 17)]
    fallbacks = 0
    for scale, ratio in (((0.08, 1.0), (0.75, 4 / 3)), ((0.9, 1.0), (0.75, 4 / 3)), ((0.3, 0.3), (1.0, 1.0))):
        for number, (width, height) in enumerate(shapes * 8):
            draws = uniform(key(number, width), CROP_DRAWS)
            view = views.random_resized(width, height, size=SIZE, draws=draws, scale=scale, ratio=ratio)
            # Ours has four draws a try: area, ratio, x, y. Theirs draws area and ratio until one fits, then y and x.
            fed.clear()
            for area, aspect, x, y in draws.reshape(-1, 4).tolist():
                fed += [area, aspect]
                pixels = width * height * (scale[0] + area * (scale[1] - scale[0]))
                bent = ratio[0] * (ratio[1] / ratio[0]) ** aspect
                if 0 < round((pixels * bent) ** 0.5) <= width and 0 < round((pixels / bent) ** 0.5) <= height:
                    fed += [y, x]
                    break
            else:
                fallbacks += 1
            theirs = transforms.RandomResizedCrop.get_params(torch.zeros(1).expand(3, height, width), scale, ratio)
            assert not fed  # all were drawn
            assert (view.top, view.left, view.height, view.width) == theirs, (width, height, scale)
            assert (view.resized_width, view.resized_height, view.x, view.y) == (SIZE, SIZE, 0, 0)
    assert 10 < fallbacks < 150


@pytest.mark.parametrize(("width", "height"), [(256, 256), (73, 73), (40, 400), (1, 1)])
def test_all_at_once_are_the_same_views(width: int, height: int) -> None:
    """Views drawn for a whole batch of images of one size are, number for number, those drawn one by one."""
    draws = uniform(key(np.arange(300), width), CROP_DRAWS)
    for scale, ratio in (((0.08, 1.0), (0.75, 4 / 3)), ((0.9, 1.0), (0.75, 4 / 3)), ((1.0, 1.0), (0.3, 0.4))):
        together = views.random_resized_all(width, height, size=SIZE, draws=draws, scale=scale, ratio=ratio)
        assert together.tolist() == [list(views.random_resized(
            width, height, size=SIZE, draws=row, scale=scale, ratio=ratio)) for row in draws]
    together = views.random_crop_all(width, height, size=SIZE, draws=draws)
    assert together.tolist() == [list(views.random_crop(width, height, size=SIZE, draws=row))
                                 for row in draws]


def test_views_stay_inside() -> None:
    """Every view of every shape, one pixel high or wide too, lies inside the image and holds the whole square."""
    ends = np.array([0.0, 1 - 2.0**-53])
    for width, height in ((1, 1), (1, 500), (2000, 1), (224, 224), (256, 256), (257, 256), (500, 375), (63, 64)):
        for size in (16, 64, 224):
            shown = [views.center(width, height, size=size), views.squash(width, height, size=size)]
            for draws in (*(np.full(CROP_DRAWS, end) for end in ends), uniform(key(width), CROP_DRAWS)):
                shown.append(views.random_crop(width, height, size=size, draws=draws))
                shown.append(views.random_resized(width, height, size=size, draws=draws, scale=(0.08, 1.0),
                                                  ratio=(0.75, 4 / 3)))
            for view in shown:
                assert 0 <= view.left <= view.left + view.width <= width
                assert 0 <= view.top <= view.top + view.height <= height
                assert 0 <= view.x <= view.x + size <= view.resized_width
                assert 0 <= view.y <= view.y + size <= view.resized_height
                assert min(view.width, view.height) >= 1


def test_random_crop_reaches_all_places() -> None:
    """The 2012 crop comes from a short side of 256 for 224, and its corners are reached."""
    corners = [views.random_crop(500, 375, size=224, draws=np.full(CROP_DRAWS, end)) for end in (0.0, 1 - 2.0**-53)]
    assert [(view.resized_width, view.resized_height) for view in corners] == [(341, 256)] * 2
    assert [(view.x, view.y) for view in corners] == [(0, 0), (341 - 224, 256 - 224)]


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (256, 256), (300, 299), (257, 601), (100, 80),
                                               (800, 600)])
def test_center_is_resize_256_and_center_crop_224(width: int, height: int) -> None:
    """The evaluated view is torchvision's Resize(256) and CenterCrop(224) of the PIL image: mean within 1/255."""
    image = photograph(width, height)
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])

    def choose(wide: int, high: int) -> View:
        return views.center(wide, high, size=224)

    lossless = decoded(DECODERS[0], encoded(image, "PNG"), choose, size=224)
    assert np.array_equal(lossless, np.asarray(theirs(image)))  # the same library: to the bit
    data = encoded(image)
    expected = np.asarray(theirs(Image.open(io.BytesIO(data)).convert("RGB"))).astype(np.int64)
    for decoder in DECODERS:
        assert np.abs(decoded(decoder, data, choose, size=224) - expected).mean() < 1.0


def random_view(draws: NDArray[np.float64], *, size: int = SIZE) -> ChooseView:
    return lambda width, height: views.random_resized(width, height, size=size, draws=draws, scale=(0.08, 1.0),
                                                      ratio=(0.75, 4 / 3))


@pytest.mark.parametrize("decoder", DECODERS[1:], ids=lambda decoder: decoder.name)
def test_decoders_show_the_same(decoder: decode.Decoder) -> None:
    """Every decoder shows Pillow's views, and at full size Pillow's pixels within 1/255; a decode at a fraction differs
    by at most 2/255 on average."""
    differences = []
    for number, (width, height) in enumerate([(500, 375), (375, 500), (1024, 768), (131, 97), (64, 64), (1600, 90)]):
        data = encoded(photograph(width, height, seed=number), subsampling=number % 3)
        draws = uniform(key(np.arange(6), number), CROP_DRAWS)
        for choose in (central, whole, *(random_view(row) for row in draws)):
            outs = [np.zeros((SIZE, SIZE, 3), np.uint8) for _ in range(2)]
            view, theirs = decoder(data, choose, outs[0]), DECODERS[0](data, choose, outs[1])
            assert view == theirs
            difference = np.abs(outs[0].astype(int) - outs[1])
            if fraction(view, parts=2) == 1 or decoder.name in ("nvimgcodec", "torchcodec"):
                assert difference.max() <= 1, (width, height, view)
            differences.append(difference.mean())
    assert np.mean(differences) <= 2.0
    assert max(differences) <= 3.5  # where a decode at a fraction has just twice the pixels it needs


@BOTH
@pytest.mark.parametrize("channels", [1, 3])
def test_antialias_is_pillow_s_bilinear(decoder: decode.Decoder, channels: int) -> None:
    """`resize: antialias` is Pillow's BILINEAR of the cropped box, which torchvision's recipes use: within 1/255 in
    every value where the image is decoded at full size, reduced and enlarged, down to a single pixel."""
    for number, (width, height) in enumerate([(500, 375), (90, 131), (2, 3), (1, 1)]):
        image = photograph(width, height, seed=number)
        data = encoded(image if channels == 3 else image.convert("L"), subsampling=0)
        whole_image = Image.open(io.BytesIO(data))
        for draws in uniform(key(np.arange(4), number), CROP_DRAWS):
            out = np.zeros((SIZE, SIZE, channels), np.uint8)
            view = decoder(data, random_view(draws), out)
            if fraction(view, parts=2) > 1:
                continue
            box = (view.left, view.top, view.left + view.width, view.top + view.height)
            expected = np.asarray(whole_image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            assert np.abs(out.astype(int) - expected.reshape(out.shape)).max() <= 1


@pytest.mark.parametrize("name", [decoder.name for decoder in DECODERS])
def test_fast_is_close(name: str) -> None:
    """`resize: fast` shows the same views, with at least 30 dB PSNR to antialias where nothing is reduced by half."""
    quick, exact = create_decoder(name, quality="fast"), create_decoder(name)
    assert quick.version != exact.version
    for number in range(6):
        data = encoded(photograph(400, 300, seed=number))
        outs = [np.zeros((224, 224, 3), np.uint8) for _ in range(2)]
        draws = uniform(key(number), CROP_DRAWS)
        assert quick(data, random_view(draws, size=224), outs[0]) == exact(data, random_view(draws, size=224), outs[1])
        error = ((outs[0].astype(float) - outs[1]) ** 2).mean()
        assert 10 * np.log10(255**2 / error) > 30


@pytest.mark.parametrize("name", [decoder.name for decoder in DECODERS])
def test_fast_at_a_fraction_isn_t_shifted(name: str) -> None:
    """A fast decode at a fraction of a large, smooth image shows each point where antialias does."""
    image = photograph(12, 9).resize((1920, 1440), Image.Resampling.BICUBIC)
    data = encoded(image)
    for draws in uniform(key(np.arange(5)), CROP_DRAWS):
        outs = [np.zeros((SIZE, SIZE, 3), np.uint8) for _ in range(2)]
        for out, quality in zip(outs, ("fast", "antialias"), strict=True):
            create_decoder(name, quality=quality)(data, random_view(draws), out)  # type: ignore[arg-type]
        assert np.abs(outs[0].astype(int) - outs[1]).mean() < 1.0


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_region_is_what_the_whole_holds(subsampling: int, progressive: bool) -> None:
    """turbojpeg's pixels of a region are those of a decode of the whole image, to the bit, at every fraction."""
    library = pytest.importorskip("alexnet_ddp.data.decoding.turbojpeg")
    if library.find_library() is None:
        pytest.skip("no libturbojpeg 3 here")
    turbo = library.TurboJpegLibrary()
    random = np.random.default_rng(subsampling)
    data = encoded(photograph(331, 203), subsampling=subsampling, progressive=progressive)

    def memory(height: int, width: int, channels: int) -> tuple[NDArray[np.uint8], int]:
        pixels = np.zeros((height, width, channels), np.uint8)
        return pixels, pixels.ctypes.data

    for part in (1, 2, 4, 8):
        width, height = -(-331 // part), -(-203 // part)
        all_of_it, _, _ = turbo.decode(data, box=(0, 0, width, height), fraction=part, channels=3, memory=memory)
        assert all_of_it.shape == (height, width, 3)
        for _ in range(60):
            left, right = sorted(random.choice(width + 1, 2, replace=False).tolist())
            top, bottom = sorted(random.choice(height + 1, 2, replace=False).tolist())
            pixels, x, y = turbo.decode(data, box=(left, top, right, bottom), fraction=part, channels=3, memory=memory)
            mine = pixels[top - y:bottom - y, left - x:right - x]
            assert np.array_equal(mine, all_of_it[top:bottom, left:right]), (part, left, top, right, bottom)


def test_bounds_on_photographs() -> None:
    """On ImageNet photographs at 224, random resized crops: antialias within 0.1/255 of Pillow's pixels on average and
    0.5/255 in every image; fast at a median PSNR over 35 dB; the libraries agree to the bit in antialias."""
    qualities: list[Quality] = ["antialias", "fast"]
    with open_index(f"{photographs.archive('imagenet-sample.tar')}::train") as index:
        for quality in qualities:
            decoders = [create_decoder(name, quality=quality) for name in ("simplejpeg", "turbojpeg")
                        if name == "simplejpeg" or turbojpeg.find_library()]
            means, noise = [], []
            for sample in range(0, len(index), 17):
                data, choose = index.read(sample), random_view(uniform(key(sample), CROP_DRAWS), size=224)
                expected = decoded(DECODERS[0], data, choose, size=224)
                found = [decoded(decoder, data, choose, size=224) for decoder in decoders]
                assert quality == "fast" or all(np.array_equal(other, found[0]) for other in found)
                for error in (other - expected for other in found):
                    means.append(np.abs(error).mean())
                    noise.append(10 * np.log10(255**2 / max(1e-9, (error**2).mean())))
            if quality == "antialias":
                assert np.mean(means) < 0.1 and max(means) < 0.5
            else:
                assert np.median(noise) > 35.0 and min(noise) > 20.0


def test_regions_of_photographs() -> None:
    """turbojpeg's regions of real photographs are those of a decode of the whole image, to the bit, whatever lay in the
    memory before: 20 regions each of 42 photographs, at full size and at a half."""
    if turbojpeg.find_library() is None:
        pytest.skip("no libturbojpeg 3 here")
    library, random = turbojpeg.TurboJpegLibrary(), np.random.default_rng(0)

    def memory(height: int, width: int, channels: int) -> tuple[NDArray[np.uint8], int]:
        pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
        return pixels, pixels.ctypes.data

    with open_index(f"{photographs.archive('imagenet-sample.tar')}::train") as index:
        for sample in range(0, len(index), 17):
            data = index.read(sample)
            for part in (1, 2):
                try:
                    width, height = (-(-side // part) for side in library.read_header(data))
                except turbojpeg.Declined:
                    continue
                whole, _, _ = library.decode(data, box=(0, 0, width, height), fraction=part, channels=3, memory=memory)
                for _ in range(10):
                    left, right = sorted(random.choice(width + 1, 2, replace=False).tolist())
                    top, bottom = sorted(random.choice(height + 1, 2, replace=False).tolist())
                    pixels, x, y = library.decode(data, box=(left, top, right, bottom), fraction=part, channels=3,
                                                  memory=memory)
                    assert np.array_equal(pixels[top - y:bottom - y, left - x:right - x],
                                          whole[top:bottom, left:right]), (sample, part, left, top, right, bottom)


# --- kinds of files ---------------------------------------------------------------------------------------------

UPRIGHT = photograph(180, 120)


def with_xmp(orientation: int) -> bytes:
    packet = ('<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
              '<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
              f'tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>')
    return encoded(stored(orientation), xmp=packet.encode())


def stored(orientation: int) -> Image.Image:
    """The pixels that a camera held in this orientation writes of UPRIGHT."""
    turns: dict[int, Callable[[Image.Image], Image.Image]] = {
        1: lambda image: image, 2: ImageOps.mirror, 3: lambda image: image.rotate(180), 4: ImageOps.flip,
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE), 6: lambda image: image.rotate(90, expand=True),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE), 8: lambda image: image.rotate(270, expand=True)}
    return turns[orientation](UPRIGHT)


@BOTH
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("where", ["exif", "xmp", "late exif"])
def test_all_eight_orientations(decoder: decode.Decoder, orientation: int, where: str) -> None:
    """An image stored in any of the eight orientations, told in EXIF or XMP, is shown, and its view chosen, upright."""
    if where == "xmp":
        data = with_xmp(orientation)
    else:
        data = encoded(stored(orientation), exif=exif(orientation).tobytes())
        if where == "late exif":  # after two segments of other things, as large as segments get
            start = data.index(b"Exif\0\0") - 4
            end = start + 2 + struct.unpack(">H", data[start + 2:start + 4])[0]
            other = b"\xff\xe5" + struct.pack(">H", 65_000) + bytes(64_998)
            data = data[:2] + 2 * other + data[start:end] + data[2:start] + data[end:]
    asked: list[tuple[int, int]] = []

    def choose(width: int, height: int) -> View:
        asked.append((width, height))
        return views.random_resized(width, height, size=SIZE, draws=np.full(CROP_DRAWS, 0.3), scale=(0.3, 0.3),
                                     ratio=(1.0, 1.0))

    out = np.zeros((SIZE, SIZE, 3), np.uint8)
    decoder(data, choose, out)
    expected = decoded(DECODERS[0], encoded(UPRIGHT, "PNG"), choose)
    assert asked[0] == UPRIGHT.size
    assert np.abs(out.astype(int) - expected).mean() < 4.0  # JPEG's own loss; a wrong turn gives 30


@BOTH
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"", bytes(range(20)), b"II*\0\x08\0\0\0\xff\xff\x12\x01", b"MM\0*\xff\xff\xff\xff"])
def test_damaged_exif_says_nothing_of_the_pixels(decoder: decode.Decoder, block: bytes) -> None:
    """A JPEG whose EXIF block is nonsense is shown as it is."""
    data = encoded(UPRIGHT)
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(block)) + b"Exif\0\0" + block
    assert np.array_equal(decoded(decoder, data[:2] + segment + data[2:]), decoded(decoder, data))


@BOTH
@pytest.mark.parametrize("kind", ["grey", "CMYK", "progressive", "4:4:4", "one pixel", "a line", "trailing bytes",
                                  "PNG", "PNG grey", "PNG palette", "PNG 16 bits", "PNG black and white"])
def test_kinds_of_images(decoder: decode.Decoder, kind: str) -> None:
    """Grey, CMYK and progressive JPEGs, PNGs of every kind and the smallest images are shown as what they show."""
    grey = UPRIGHT.convert("L")
    shown, data = {
        "grey": (grey, encoded(grey)), "CMYK": (UPRIGHT, encoded(UPRIGHT.convert("CMYK"))),
        "progressive": (UPRIGHT, encoded(UPRIGHT, progressive=True)),
        "4:4:4": (UPRIGHT, encoded(UPRIGHT, subsampling=0)),
        "one pixel": (UPRIGHT.resize((1, 1)), encoded(UPRIGHT.resize((1, 1)), subsampling=0)),
        "a line": (UPRIGHT.resize((300, 1)), encoded(UPRIGHT.resize((300, 1)), subsampling=0)),
        "trailing bytes": (UPRIGHT, encoded(UPRIGHT) + b"some more" * 9),
        "PNG": (UPRIGHT, encoded(UPRIGHT, "PNG")), "PNG grey": (grey, encoded(grey, "PNG")),
        "PNG palette": (UPRIGHT.quantize(64).convert("RGB"), encoded(UPRIGHT.quantize(64), "PNG")),
        "PNG 16 bits": (grey, encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG")),
        "PNG black and white": (grey.convert("1"), encoded(grey.convert("1"), "PNG")),
    }[kind]
    lossless = kind.startswith("PNG")
    for channels, mode in ((3, "RGB"), (1, "L")):
        expected = np.asarray(shown.convert(mode).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        found = decoded(decoder, data, whole, channels=channels)
        difference = np.abs(found - expected.reshape(SIZE, SIZE, channels)).mean()
        assert difference <= (0.6 if lossless else 4.0)


@BOTH
def test_transparent_pixels_are_white(decoder: decode.Decoder) -> None:
    """What a PNG leaves open, by an alpha channel, a palette or one transparent colour, is white, half-open mixed."""
    alpha = np.zeros((120, 180), np.uint8)
    alpha[:, 60:120], alpha[:, 120:] = 128, 255
    image = UPRIGHT.copy()
    image.putalpha(Image.fromarray(alpha))
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    found = decoded(decoder, encoded(image, "PNG"), whole)
    assert np.abs(found - np.asarray(expected.resize((SIZE, SIZE), Image.Resampling.BILINEAR))).max() <= 1
    assert (found[:, :19] == 255).all()
    flat = Image.new("RGB", (40, 40), (10, 200, 30))
    assert (decoded(decoder, encoded(flat, "PNG", transparency=(10, 200, 30)), whole) == 255).all()
    assert (decoded(decoder, encoded(flat.quantize(2), "PNG", transparency=0), whole) == 255).all()
    assert (decoded(decoder, encoded(flat, "PNG"), whole) == (10, 200, 30)).all()


JPEG, PNG = encoded(UPRIGHT), encoded(UPRIGHT, "PNG")
GIF = encoded(UPRIGHT, "GIF")


@BOTH
@pytest.mark.parametrize(("data", "said"), [
    (b"", "no bytes"), (b"This is no photograph.\n" * 9, "not a JPEG or PNG"), (b"\xff", "not a JPEG or PNG"),
    (GIF, "not a JPEG or PNG"), (JPEG[:10], "runcated"), (JPEG[:300], "runcated"),
    (JPEG[: len(JPEG) // 2], "truncated"), (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "truncated"),
    (JPEG[:-2], "truncated"), (PNG[:5000], "truncated"),
    (PNG[:20], ""), (b"\xff\xd8\xff\xd9", ""), (JPEG[:2] + b"\0" * 99, ""),
])
def test_damage_is_told(decoder: decode.Decoder, data: bytes, said: str) -> None:
    """Zero bytes, text named .jpg, other formats and files cut anywhere are DamagedImage, never a grey lower half."""
    with pytest.raises(DamagedImage) as error:
        decoded(decoder, data)
    assert said in str(error.value)
    assert str(error.value)
    assert "object at 0x" not in str(error.value)


@BOTH
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_flood_of_pixels_is_damage(decoder: decode.Decoder) -> None:
    """A file whose header claims more pixels than a photograph has is refused before memory is taken for them."""
    png, jpeg = bytearray(PNG), bytearray(JPEG)
    png[16:24] = struct.pack(">II", 10_000, 10_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5:frame + 9] = struct.pack(">HH", 10_000, 10_000)
    for data in (bytes(png), bytes(jpeg)):
        with pytest.raises(DamagedImage, match="10000 x 10000 pixels"):
            decoded(decoder, data)


@BOTH
def test_damage_leaves_the_decoder_as_it_was(decoder: decode.Decoder) -> None:
    """Whatever a thread was given before, a good photograph gives the same bits: libjpeg-turbo declined all after one
    whose header says no rows."""
    data, choose = encoded(photograph(300, 200)), random_view(uniform(key(1), CROP_DRAWS))
    expected = decoded(decoder, data, choose)
    rows = data.index(b"\xff\xc0") + 5  # of the frame's header
    no_rows = data[:rows] + bytes(2) + data[rows + 2:]
    for bad in (no_rows, data[:len(data) // 2] + b"\xff\xd9", data[:100] + b"\xff\xd9"):
        with contextlib.suppress(DamagedImage):
            decoded(decoder, bad, choose)
        assert np.array_equal(decoded(decoder, data, choose), expected)


@BOTH
def test_a_line_isn_t_grown_to_gigabytes(decoder: decode.Decoder) -> None:
    """An image of 1 x 60,000 with a short side of 73 would have 320 million pixels."""
    line = encoded(Image.new("RGB", (1, 60_000), "red"))
    with pytest.raises(DamagedImage, match="resized to 73 x 4380000 pixels are more than"):
        decoded(decoder, line, lambda width, height: views.center(width, height, size=SIZE))


def test_decoder_by_name() -> None:
    """auto is the quickest that is installed; an unknown name is refused; the version names all that moves pixels."""
    quickest = "simplejpeg" if turbojpeg.find_library() is None else "turbojpeg"
    assert create_decoder("auto").name == quickest
    assert "pillow" in create_decoder("simplejpeg").version
    with pytest.raises(UserError, match=r"data\.decoder must be"):
        create_decoder("nvjpeg")
