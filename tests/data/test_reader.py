"""Samples are read whole, and a damaged one is named."""

import errno
import io
import itertools
import os
import re
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.manifest import Manifest, SampleIndex
from data.reader import Damage, Reader, Sample
from data.shard import ShardConfig, run


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


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
    monkeypatch.setattr("data.open_files._MOST_OPEN", 1)
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
    assert re.search(rf"^{path}: sample \w+\.jpg is not .*its checksum is another.*coldpress verify", only(damaged))


def test_a_tar_cut_after_the_start_is_named(copied_shards: Path) -> None:
    reader, index = open_set(copied_shards)
    with index.paths[0].open("r+b") as tar:
        tar.truncate(int(index.offset[0]) + 10)
    assert re.search(r"sample \w+\.jpg is not .*\d+ of \d+ bytes", only(reader.read([0])))


@pytest.mark.parametrize("label", [b"x", b"9"])
@pytest.mark.usefixtures("unsealed")
def test_a_class_that_does_not_exist_is_damage(copied_shards: Path, label: bytes) -> None:
    reader, index = open_set(copied_shards)
    overwrite(copied_shards, index, 3, int(index.label_offset[3] - index.offset[3]), label)
    assert f"(class {label.decode()})" in only(reader.read([3]))


@pytest.mark.usefixtures("unsealed")
def test_an_image_larger_than_any_that_was_packed_is_damage(copied_shards: Path) -> None:
    reader, index = open_set(copied_shards)
    (sample,) = reader.read([3])
    assert isinstance(sample, Sample)
    frame = sample.image.tobytes().find(b"\xff\xc0")
    overwrite(copied_shards, index, 3, frame + 5, b"\xff\xdc\xff\xdc")
    assert "(65500 x 65500 pixels, more than any that was packed)" in only(reader.read([3]))


@given(place=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_no_changed_bit_of_label_image_or_facts_goes_unnoticed(drawn_shards: Path, place: float, bit: int) -> None:
    _, index = open_set(drawn_shards)
    tar = bytearray(index.paths[0].read_bytes())
    # From the label's first byte to the last digit of the checksum, headers and padding left out.
    start, label, image = (int(each[0]) for each in (index.label_offset, index.label_size, index.size))
    jpg = int(index.offset[0])
    facts = jpg + -(-image // 512) * 512 + 512
    end = facts + bytes(tar[facts : facts + 512]).index(b",")
    regions = [*range(start, start + label), *range(jpg, jpg + image), *range(facts, end)]
    at = regions[int(place * (len(regions) - 1))]
    tar[at] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy.tar")
        copy.write_bytes(tar)
        damaged = Reader(replace(index, paths=(copy, *index.paths[1:]))).read([0])
    assert isinstance(damaged[0], Damage)


def test_long_facts_are_read_whole(tmp_path: Path) -> None:
    folder = tmp_path / "source" / ("c" * 200) / ("d" * 200) / ("e" * 200)
    folder.mkdir(parents=True)
    (folder / f"{'f' * 200}.jpg").write_bytes(jpeg(20, 30))
    run(ShardConfig(str(tmp_path / "source"), str(tmp_path / "shards"), workers=1))
    reader, _ = open_set(tmp_path / "shards")
    assert isinstance(reader.read([0])[0], Sample)


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO])
def test_a_disk_that_stutters_is_asked_again(drawn_shards: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Some reads fail once, and every read gives at most 600 bytes."""
    pread, calls = os.pread, itertools.count()

    def stutter(descriptor: int, size: int, offset: int) -> bytes:
        if next(calls) % 97 == 3:
            raise OSError(error, os.strerror(error))
        return pread(descriptor, min(size, 600), offset)

    reader, index = open_set(drawn_shards)
    expected = [each.image.tobytes() for each in reader.read(range(len(index))) if isinstance(each, Sample)]
    monkeypatch.setattr(os, "pread", stutter)
    monkeypatch.setattr("data.open_files._WAITS", (0.0, 0.0))
    read = Reader(index).read(range(len(index)))
    assert [each.image.tobytes() for each in read if isinstance(each, Sample)] == expected


def test_a_disk_that_fails_for_good_is_named(drawn_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, _ = open_set(drawn_shards)

    def fail(error: int) -> None:
        def pread(*_: int) -> bytes:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "pread", pread)

    monkeypatch.setattr("data.open_files._WAITS", (0.0, 0.0))
    fail(errno.ETIMEDOUT)
    with pytest.raises(ValueError, match=r"train-000000\.tar: Connection timed out; check the file system"):
        reader.read([0])
    fail(errno.EIO)
    assert "(it cannot be read from the disk)" in only(reader.read([0]))


def test_a_failing_copy_gives_way_to_the_original(copied_shards: Path, tmp_path: Path) -> None:
    _, index = open_set(copied_shards)
    short = tmp_path / "short.tar"
    short.write_bytes(index.paths[0].read_bytes()[:5000])
    originals = Reader(index).read(range(20))
    spoilt = tmp_path / "spoilt.tar"
    spoilt.write_bytes(index.paths[0].read_bytes().replace(b"\xff\xd8", b"\0\0"))
    for place in (tmp_path / "missing.tar", short, spoilt):
        moved = Reader(index, [place, *index.paths[1:]].__getitem__).read(range(20))
        assert [each.image.tobytes() for each in moved] == [each.image.tobytes() for each in originals]  # type: ignore[union-attr]


def test_a_shard_that_is_gone_is_named(copied_shards: Path) -> None:
    reader, index = open_set(copied_shards)
    index.paths[1].unlink()
    with pytest.raises(ValueError, match=rf"{index.paths[1].name}: No such file or directory; check the file system"):
        reader.read([int(index.counts[0])])
