"""The segments of a JPEG file up to its first scan, read by the letter of the standard.

libjpeg, and Pillow with it, forgives a damaged header that the decoders of a GPU refuse; whoever wants to keep
a file byte for byte has to look himself.
"""

import re
from typing import NamedTuple

BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # tables and a reserved marker lie between
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_BARE = frozenset({0x00, 0x01, *range(0xD0, _SCAN)})  # markers that have no length and no place in a header
# Within a scan 0xFF stands before 0x00 and restart markers only; anything else ends the scan.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")


class JpegHeader(NamedTuple):
    """``frame``: which marker 0xC0 to 0xCF announces the image; ``scan``: offset of the first scan's marker.

    height, width: pixels of the decoded image.
    """

    frame: int
    scan: int
    height: int
    width: int


def read_header(encoded: bytes) -> JpegHeader | None:
    """Return the header, or None unless one whole segment follows another from the first byte to the first scan."""
    if encoded[:2] != bytes((0xFF, _START)):
        return None
    at = 2
    frames: list[int] = []
    while at + 4 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == 0xFF:  # any number of these may stand before a marker
            at += 1
            continue
        if marker in _BARE:
            return None
        if marker == _SCAN:
            return _header(encoded, frames[0], at) if len(frames) == 1 else None
        if marker in _FRAMES:
            frames.append(at)
        # A length below two, its own, leads to its own bytes, which are no marker.
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return None


def _header(encoded: bytes, frame: int, scan: int) -> JpegHeader | None:
    length, height, width = (int.from_bytes(encoded[frame + at : frame + at + 2], "big") for at in (2, 5, 7))
    components = encoded[frame + 9]
    # Threads of DALI's decoder have crashed over other numbers of components.
    if not (height and width and components in (1, 3, 4) and length == 8 + 3 * components):
        return None
    return JpegHeader(encoded[frame + 1], scan, height, width)


def has_end(encoded: bytes, header: JpegHeader) -> bool:
    """Tell whether an end marker follows the first scan; a file that was cut, or ends in zeros, has none."""
    return encoded.rfind(bytes((0xFF, _END))) > header.scan


def count_scans(encoded: bytes, first: int) -> int:
    """Count the scans from the one at offset ``first`` to the end marker; a decoder passes over the image for each."""
    scans, at = 1, first + 2
    while (found := _MARKER.search(encoded, at)) and found[0][1] != _END:
        scans += found[0][1] == _SCAN
        at = found.end() + int.from_bytes(encoded[found.end() : found.end() + 2], "big")
    return scans
