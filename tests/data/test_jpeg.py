"""Headers are read by the letter of the standard: a size, or None, whatever the bytes."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.jpeg import read_header


def jpeg(width: int, height: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 200)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def size(data: bytes) -> tuple[int, int] | None:
    header = read_header(data)
    return None if header is None else (header.height, header.width)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + b"x" * 999}, {"comment": b"\xff\xc0"}]
)
def test_size_is_that_of_the_decoded_image(options: dict[str, object]) -> None:
    assert size(jpeg(123, 45, **options)) == (45, 123)


def test_size_survives_fill_bytes_and_an_embedded_thumbnail() -> None:
    data, thumbnail = jpeg(30, 20), jpeg(4, 3)
    segment = b"\xff\xff\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    assert size(data[:2] + segment + data[2:]) == (20, 30)


@given(data=st.one_of(st.binary(max_size=60).map(lambda tail: b"\xff\xd8" + tail), st.binary(max_size=60)))
@settings(max_examples=300, deadline=None)
def test_anything_else_has_a_size_or_none(data: bytes) -> None:
    found = size(data)
    assert found is None or min(found) > 0


@given(at=st.integers(0, 700), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_leaves_a_size_or_none(at: int, value: int) -> None:
    data = bytearray(jpeg(30, 20))
    data[at % len(data)] = value
    found = size(bytes(data))
    assert found is None or min(found) > 0


@pytest.mark.parametrize("cut", [0, 1, 2, 10, 100, 160])
def test_a_cut_header_has_no_size(cut: int) -> None:
    data = jpeg(30, 20)
    assert data.find(b"\xff\xc0") > 150
    assert size(data[:cut]) is None


@pytest.mark.parametrize("side", [5, 7])
def test_an_image_without_extent_has_no_size(side: int) -> None:
    data = jpeg(30, 20)
    frame = data.find(b"\xff\xc0") + side
    assert size(data[:frame] + b"\0\0" + data[frame + 2 :]) is None
