"""Samples are read whole, and a damaged one is named."""

import io
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.manifest import Manifest, SampleIndex
from data.reader import Damage, Reader, Sample


@pytest.fixture
def copied_shards(drawn_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn_shards, tmp_path / "shards"))


def open_set(directory: Path) -> tuple[Reader, SampleIndex]:
    index = SampleIndex.load(directory, Manifest.load(directory))
    return Reader(index), index


def test_samples_are_the_packed_ones(drawn_shards: Path) -> None:
    reader, index = open_set(drawn_shards)
    samples = reader.read(range(len(index)))
    for sample in samples:
        with Image.open(io.BytesIO(sample.image.tobytes())) as picture:
            assert picture.size == (sample.width, sample.height) == (48, 48)
    assert sorted(sample.label for sample in samples) == sorted([0, 1, 2, 3] * 12)


def test_threads_share_a_reader_with_fewer_open_tars_than_shards(
    drawn_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.reader._OPEN_TARS", 1)
    reader, index = open_set(drawn_shards)
    expected = [sample.image.tobytes() for sample in reader.read(range(len(index)))]
    seen: list[bool] = []

    def check(seed: int) -> None:
        ids = np.random.default_rng(seed).integers(0, len(index), 300).tolist()
        seen.append([sample.image.tobytes() for sample in reader.read(ids)] == [expected[k] for k in ids])

    threads = [threading.Thread(target=check, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 6


def overwrite(directory: Path, index: SampleIndex, sample: int, at: int, content: bytes) -> Path:
    path = directory / index.paths[index.shard[sample]].name
    with path.open("r+b") as tar:
        tar.seek(int(index.offset[sample]) + at)
        tar.write(content)
    return path


def only(read: list[Sample | Damage]) -> str:
    (damage,) = read
    assert isinstance(damage, Damage)
    return damage.message


def test_an_overwritten_sample_is_named_beside_a_sound_one(copied_shards: Path) -> None:
    reader, index = open_set(copied_shards)
    path = overwrite(copied_shards, index, 13, 0, b"<html>")
    sound, *damaged = reader.read([12, 13])
    assert isinstance(sound, Sample)
    assert re.search(rf"^{path}: sample \w+\.jpg is not .*no header of a JPEG.*coldpress verify", only(damaged))


def test_a_tar_cut_after_the_start_is_named(copied_shards: Path) -> None:
    reader, index = open_set(copied_shards)
    with index.paths[0].open("r+b") as tar:
        tar.truncate(int(index.offset[0]) + 10)
    assert re.search(r"sample \w+\.jpg is not .*10 of \d+ bytes", only(reader.read([0])))


@pytest.mark.parametrize("label", [b"x", b"9"])
def test_a_class_that_does_not_exist_is_damage(copied_shards: Path, label: bytes) -> None:
    reader, index = open_set(copied_shards)
    overwrite(copied_shards, index, 3, int(index.label_offset[3] - index.offset[3]), label)
    assert f"(class {label.decode()})" in only(reader.read([3]))


def test_an_image_larger_than_any_that_was_packed_is_damage(copied_shards: Path) -> None:
    reader, index = open_set(copied_shards)
    (sample,) = reader.read([3])
    assert isinstance(sample, Sample)
    frame = sample.image.tobytes().find(b"\xff\xc0")
    overwrite(copied_shards, index, 3, frame + 5, b"\xff\xdc\xff\xdc")
    assert "(65500 x 65500 pixels, more than any that was packed)" in only(reader.read([3]))


def test_a_failing_copy_gives_way_to_the_original(copied_shards: Path, tmp_path: Path) -> None:
    _, index = open_set(copied_shards)
    short = tmp_path / "short.tar"
    short.write_bytes(index.paths[0].read_bytes()[:5000])
    originals = Reader(index).read(range(20))
    for place in (tmp_path / "missing.tar", short):
        moved = Reader(index, [place, *index.paths[1:]].__getitem__).read(range(20))
        assert [each.image.tobytes() for each in moved] == [each.image.tobytes() for each in originals]  # type: ignore[union-attr]


def test_a_shard_that_is_gone_is_named(copied_shards: Path) -> None:
    reader, index = open_set(copied_shards)
    index.paths[1].unlink()
    with pytest.raises(ValueError, match=rf"{index.paths[1].name}: No such file or directory; check the file system"):
        reader.read([int(index.counts[0])])
