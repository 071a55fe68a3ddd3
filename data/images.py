"""What becomes of an image at sharding: kept byte for byte, re-encoded, or rejected with the reason.

The picture is always the one that Pillow shows of the file, which is what published ImageNet runs were trained
on: the first frame, the orientation of the stored pixels (an EXIF rotation is ignored, kept or re-encoded),
transparency dropped.

Kept: gray and RGB JPEGs of the three coding processes that decoders of all devices know. Progressive ones are
among them, though GPUs decode them outside the JPEG engine: Pillow cannot make them baseline without loss.
Re-encoded to baseline RGB: CMYK, all other formats, and JPEGs that only a forgiving decoder reads. 16-bit gray
PNGs are scaled to 8 bits, as their format defines black and white; deeper or undefined ranges are rejected.
Rejected: what does not decode, and JPEGs whose data libjpeg calls corrupt, though Pillow and DALI shrug and show
half a picture. A few stray bytes after the last code, which cameras and editors leave, cost no pixel and are kept.
"""

import io
import math
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data.jpeg import BASELINE, EXTENDED, PROGRESSIVE, JpegHeader, count_scans, has_end, read_header

KEPT = "kept"
# Listed, because Pillow knows dozens more, one of which starts an interpreter of PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_SIDE = 65_500  # libjpeg's limit
MAX_SCANS = 200  # encoders write about ten; each costs a pass over the image
PILLOW_MAX_PIXELS = 178_956_970  # Pillow opens nothing larger
_EXIF_ORIENTATION = 0x0112
_CORRUPT = ("Corrupt JPEG data", "Premature end")
_STRAY_BYTES = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_MAX_STRAY_BYTES = 16
_SHALLOW_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})


class RejectedError(Exception):
    """An image that cannot be trained on; the message says why."""


@dataclass(frozen=True)
class ImagePolicy:
    """What `coldpress shard` does to images; the fields are its options of the same names.

    shorter_side: pixels to which larger images are scaled down, 0 = none; quality: of JPEGs that are encoded anew,
    1 to 100; max_pixels, max_aspect_ratio: images beyond are rejected by their header, before they are decoded.
    A decoded image takes 4 to 10 bytes a pixel; a view of evaluation of a 100:1 image, 20 MB.
    """

    shorter_side: int = 0
    quality: int = 95
    max_pixels: int = 2**26
    max_aspect_ratio: float = 100.0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("shorter_side", 0, MAX_SIDE),
            ("quality", 1, 100),
            ("max_pixels", 1, PILLOW_MAX_PIXELS),
            ("max_aspect_ratio", 1, MAX_SIDE),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and least <= value <= most):
                default = type(self).__dataclass_fields__[name].default
                raise ValueError(f"shard.{name}: must be {least} to {most}, not {value}; the default is {default}.")


class Jpeg(NamedTuple):
    """An image as it goes into a shard; ``treatment`` begins with KEPT or says why it was encoded anew."""

    content: bytes
    width: int
    height: int
    treatment: str


def as_jpeg(encoded: bytes, policy: ImagePolicy = ImagePolicy()) -> Jpeg:
    """Return the same bytes if they are a gray or RGB JPEG, else a new RGB one; decode them once.

    An image whose shorter side exceeds ``policy.shorter_side`` pixels is scaled down to it; 0 keeps every size.
    Raises RejectedError for what is no image, does not decode completely, or exceeds the limits of the policy;
    ValueError when memory ends, which is not the image's fault.
    """
    if not encoded:
        raise RejectedError("empty file")
    try:
        with warnings.catch_warnings(action="ignore"), _open(encoded, policy) as image:
            header = _check_scans(encoded) if image.format in ("JPEG", "MPO") else None
            tested = header is not None and _test_decode(encoded, image.mode)
            if 0 < policy.shorter_side < min(image.size):
                return _encode(_scale(_as_rgb(image), policy.shorter_side), policy, "scaled down")
            if header and header.frame in (BASELINE, EXTENDED, PROGRESSIVE) and image.mode in ("RGB", "L"):
                return _keep(encoded, image, header, tested)
            treatment = f"re-encoded {_kind(image, header)}"
            return _encode(_as_rgb(image), policy, treatment)
    except RejectedError:
        raise
    except MemoryError:
        raise ValueError("shard.workers: memory ended while an image was decoded; use fewer workers.") from None
    except Exception as error:  # damaged files make Pillow's plugins raise almost anything
        raise RejectedError(_reason(error)) from None


def _open(encoded: bytes, policy: ImagePolicy) -> Image.Image:
    """Read the header and refuse what must not be decoded."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        raise RejectedError(_unidentified(encoded)) from None
    except Image.DecompressionBombError:
        raise RejectedError(f"too many pixels: over {PILLOW_MAX_PIXELS}, max_pixels={policy.max_pixels}") from None
    width, height = image.size
    if min(width, height) < 1:
        raise RejectedError(f"no pixels: {width}x{height}")
    if width * height > policy.max_pixels:
        raise RejectedError(f"too many pixels: {width}x{height}, max_pixels={policy.max_pixels}")
    if max(width, height) > policy.max_aspect_ratio * min(width, height):
        raise RejectedError(f"too long and thin: {width}x{height}, max_aspect_ratio={policy.max_aspect_ratio:g}")
    if max(width, height) > MAX_SIDE:
        raise RejectedError(f"too long: {width}x{height}, a JPEG has sides of at most {MAX_SIDE}")
    return image


def _unidentified(encoded: bytes) -> str:
    if encoded[:2] == b"\xff\xd8":
        return "broken: the header of the JPEG is damaged, or of a kind that is not supported"
    if encoded[:512].lstrip()[:1] == b"<":
        return "not an image: markup (HTML, XML or SVG)"
    if not any(encoded):
        return "not an image: zeros"
    return f"not an image of a supported format ({', '.join(FORMATS)}), or its header is damaged"


def _check_scans(encoded: bytes) -> JpegHeader | None:
    """Return the header of a JPEG, None if it is irregular; refuse a cut file and one of endless scans."""
    header = read_header(encoded)
    if header and not has_end(encoded, header):
        raise RejectedError("truncated: the JPEG has no end marker")
    if count_scans(encoded, header.scan if header else 0) > MAX_SCANS:
        raise RejectedError(f"too many scans: over {MAX_SCANS}, each of which a decoder passes over the image for")
    return header


def _test_decode(encoded: bytes, mode: str) -> bool:
    """Read every code of a JPEG, with pixels at an eighth of the size only; return whether libjpeg knows its kind.

    Raises RejectedError for corrupt data.
    """
    color = "CMYK" if mode == "CMYK" else "GRAY"
    try:
        simplejpeg.decode_jpeg(encoded, color, fastdct=True, min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        message = str(error)
        stray = _STRAY_BYTES.search(message)
        if message.startswith(_CORRUPT) and not (stray and int(stray[1]) <= _MAX_STRAY_BYTES):
            raise RejectedError(f"corrupt: {message.removeprefix('Corrupt JPEG data: ')}") from None
        return stray is not None
    return True


def _keep(encoded: bytes, image: Image.Image, header: JpegHeader, tested: bool) -> Jpeg:
    (width, height), rotated = image.size, _is_rotated(image)
    if not tested:
        image.draft("L", (max(1, width // 8), max(1, height // 8)))
        image.load()
    facts = [KEPT, *["progressive"] * (header.frame == PROGRESSIVE), *["EXIF rotation ignored"] * rotated]
    return Jpeg(encoded, width, height, ", ".join(facts))


def _is_rotated(image: Image.Image) -> bool:
    if "exif" not in image.info:
        return False
    try:
        return bool(image.getexif().get(_EXIF_ORIENTATION, 1) != 1)
    except Exception:  # Pillow raises almost anything; what cannot be read rotates nothing
        return False


def _kind(image: Image.Image, header: JpegHeader | None) -> str:
    """Say what kind of file it is that cannot be kept."""
    if image.format in ("JPEG", "MPO"):
        return f"{image.mode} JPEG" if image.mode not in ("RGB", "L") else "irregular JPEG"
    animated = " (first frame)" if getattr(image, "n_frames", 1) > 1 else ""
    deep = "16-bit " if image.mode == "I;16" else ""
    return f"{deep}{image.format}{animated}"


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.format == "PNG" and image.mode == "I;16":
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode not in _SHALLOW_MODES:
        raise RejectedError(f"too many bits: {image.format} of mode {image.mode}; scale its values to 8 bits yourself")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale(image: Image.Image, shorter_side: int) -> Image.Image:
    factor = shorter_side / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


def _encode(image: Image.Image, policy: ImagePolicy, treatment: str) -> Jpeg:
    out = io.BytesIO()
    # Pillow would hand on a comment of the original.
    image.save(out, "JPEG", quality=policy.quality, subsampling="4:4:4", comment=b"")
    return Jpeg(out.getvalue(), image.width, image.height, treatment)


def _reason(error: Exception) -> str:
    """Say it in the user's words; Pillow's own may hold addresses that differ from run to run."""
    message = str(error).partition("<_io")[0].strip() or type(error).__name__
    if "truncated" in message.lower():
        return "truncated: its data ends early"
    return f"broken: its data does not decode ({message})"
