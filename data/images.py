"""What becomes of an image at sharding: kept byte for byte, re-encoded, or rejected with the reason."""

import io
import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

SHALLOW_MODES = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
)
KEPT = "kept"


class RejectedError(Exception):
    """An image that does not decode; the message says why."""


@dataclass(frozen=True)
class ImagePolicy:
    """What `coldpress shard` does to images; the fields are its options of the same names.

    shorter_side: pixels to which larger images are scaled down, 0 = none; quality: of JPEGs that are encoded anew,
    1 to 100; max_pixels, max_aspect_ratio: images beyond are rejected by their header, before they are decoded.
    """

    shorter_side: int = 0
    quality: int = 95
    max_pixels: int = 2**26
    max_aspect_ratio: float = 100.0

    def __post_init__(self) -> None:
        for name, least in (("shorter_side", 0), ("quality", 1), ("max_pixels", 1), ("max_aspect_ratio", 1)):
            value = getattr(self, name)
            if not (least <= value and math.isfinite(value)):
                raise ValueError(f"shard.{name}: must be at least {least}, not {value}.")
        if self.quality > 100:
            raise ValueError(f"shard.quality: must be 1 to 100, not {self.quality}; 95 is the default.")


class Jpeg(NamedTuple):
    """An image as it goes into a shard; ``treatment`` is KEPT or says why it was encoded anew."""

    content: bytes
    width: int
    height: int
    treatment: str


def as_jpeg(encoded: bytes, policy: ImagePolicy = ImagePolicy()) -> Jpeg:
    """Return the same bytes if they are a gray or RGB JPEG, else a new RGB one.

    An image whose shorter side exceeds ``policy.shorter_side`` pixels is scaled down to it; 0 keeps every size.
    Raises RejectedError when the image does not decode completely.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(encoded)) as image:
            image.load()
            if 0 < policy.shorter_side < min(image.size):
                small = _scale(image, policy.shorter_side)
                return Jpeg(_encode(small, policy), small.width, small.height, "scaled down")
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                return Jpeg(encoded, image.width, image.height, KEPT)
            return Jpeg(_encode(image, policy), image.width, image.height, f"re-encoded {image.format}")
    except (MemoryError, RejectedError):
        raise
    except Exception as error:  # damaged files make Pillow's plugins raise almost anything
        raise RejectedError(str(error).partition("<_io")[0].strip() or type(error).__name__) from None


def _scale(image: Image.Image, shorter_side: int) -> Image.Image:
    factor = shorter_side / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    return _as_rgb(image).resize(size, Image.Resampling.BICUBIC)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode not in SHALLOW_MODES:
        raise RejectedError(f"mode {image.mode} has more than 8 bits per channel")
    return image.convert("RGB")


def _encode(image: Image.Image, policy: ImagePolicy) -> bytes:
    out = io.BytesIO()
    _as_rgb(image).save(out, "JPEG", quality=policy.quality, subsampling="4:4:4")
    return out.getvalue()
