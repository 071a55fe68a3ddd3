"""A small drawn set, sharded once for all tests of the data package."""

from pathlib import Path

import pytest

from data.drawn import draw_image_folder
from data.shard import ShardConfig, run


@pytest.fixture(scope="session")
def drawn_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a class folder of 4 classes x 12 images of 48 x 48 pixels."""
    folder = tmp_path_factory.mktemp("drawn") / "images"
    draw_image_folder(folder, classes=4, per_class=12, size=48)
    return folder


@pytest.fixture(scope="session")
def drawn_shards(drawn_folder: Path) -> Path:
    """Return the drawn folder as shards of 10, 10, 10, 10 and 8 samples; read only."""
    output = drawn_folder.parent / "shards"
    run(ShardConfig(str(drawn_folder), str(output), samples_per_shard=10, workers=1))
    return output


@pytest.fixture
def unsealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let damage pass that a checksum would find, as if it had been packed."""
    monkeypatch.setattr("data.reader.sample_checksum", lambda *_: 0)
    monkeypatch.setattr("data.reader._checksum", lambda _: 0)
