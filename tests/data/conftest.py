"""Images for the tests of views: drawn ones everywhere, photographs where they lie beside the repository."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

PHOTOS = Path(__file__).parents[2] / "../shared/data/photos128.tar"


def jpeg(picture: Image.Image) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def clouds(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Draw colored clouds with detail at every scale and with black and white in them."""
    levels = np.zeros((height, width, 3))
    for cells in (3, 8, 20, 60):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        levels += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) - 128) / cells**0.3
    return Image.fromarray(np.clip(128 + levels, 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def drawn_pictures() -> list[NDArray[np.uint8]]:
    """Return 6 color images and a gray one, of different sizes, as JPEG."""
    rng = np.random.default_rng(0)
    sizes = [(120, 160), (200, 133), (97, 300), (64, 64), (250, 250), (131, 177)]
    return [jpeg(clouds(rng, *size)) for size in sizes] + [jpeg(clouds(rng, 90, 150).convert("L"))]


@pytest.fixture(scope="session")
def photographs() -> list[NDArray[np.uint8]]:
    if not PHOTOS.exists():
        pytest.skip("the photographs are not here")
    with tarfile.open(PHOTOS) as tar:
        files = [tar.extractfile(member) for member in tar if member.isfile()]
        return [np.frombuffer(file.read(), np.uint8) for file in files if file]


@pytest.fixture(scope="session", params=["drawn", "photos"])
def pictures(request: pytest.FixtureRequest) -> list[NDArray[np.uint8]]:
    """Return encoded color and gray images of different sizes."""
    if request.param == "drawn":
        drawn: list[NDArray[np.uint8]] = request.getfixturevalue("drawn_pictures")
        return drawn
    photographs: list[NDArray[np.uint8]] = request.getfixturevalue("photographs")
    return photographs[:16]
