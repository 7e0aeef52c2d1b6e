"""What the header of an image says: its format, size and the kinds that are worth telling a user about."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from alexnet_ddp.data.decoding.decode import DamagedImage

TURNING = (5, 6, 7, 8)  # EXIF orientations that swap width and height
KINDS = ("grey", "CMYK", "palette", "transparent", "16-bit", "turned by EXIF", "PNG")  # in the order they are told
ENLARGED = "enlarged"  # counted beside KINDS in a pack: smaller than its stage


@dataclass(frozen=True)
class Facts:
    """Of one image. Width and height in pixels, upright."""

    format: str  # JPEG | PNG
    mode: str  # Pillow's: L, RGB, CMYK, P, RGBA ...
    width: int
    height: int
    orientation: int  # EXIF's, 1 for upright
    transparent: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of KINDS that it is."""
        holds = {
            "grey": self.mode in ("1", "L", "LA") or self.mode.startswith("I"),
            "CMYK": self.mode == "CMYK",
            "palette": self.mode in ("P", "PA"),
            "transparent": self.transparent,
            "16-bit": self.mode.startswith("I"),
            "turned by EXIF": self.orientation != 1,
            "PNG": self.format == "PNG",
        }
        return tuple(kind for kind in KINDS if holds[kind])


def look(data: bytes) -> Facts:
    """Reads the header only. Raises DamagedImage where there is none of a JPEG or PNG."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            # In a PNG the block may come after the pixels, which Pillow would decode for it.
            orientation = image.getexif().get(0x0112, 1) if image.format == "JPEG" or "exif" in image.info else 1
            width, height = image.size[::-1] if orientation in TURNING else image.size
            return Facts(str(image.format), image.mode, width, height, orientation,
                         image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info)
    except Exception as error:  # Pillow raises a dozen kinds for bad bytes
        if not data:
            raise DamagedImage("no bytes") from None
        what = "not a JPEG or PNG" if "cannot identify image" in str(error) else str(error) or type(error).__name__
        raise DamagedImage(what) from None


def told(found: Mapping[str, int]) -> str:
    """`23 grey, 1 CMYK`, for messages; "none" without any."""
    return ", ".join(f"{found[kind]:,} {kind}" for kind in KINDS if found.get(kind)) or "none"


