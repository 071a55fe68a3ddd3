import csv
import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data import pack
from data import shard as shard_module
from data.ledger import LEDGER_NAME, Ledger
from data.manifest import MANIFEST_NAME, Manifest
from data.rejected import REJECTED_NAME, count_reasons
from data.shard import ShardConfig, run
from data.sources import scan

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "../shared/data/photos128.tar"


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


def read_back(directory: Path) -> list[dict]:
    """Return every sample as webdataset reads it, undecoded, in order."""
    tars = sorted(str(path) for path in directory.glob("*.tar"))
    return list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))


def test_webdataset_reads_every_source_image_back(drawn_folder, drawn_shards):
    manifest = Manifest.load(drawn_shards)
    samples = read_back(drawn_shards)
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(48)]
    for sample in samples:
        facts = json.loads(sample["json"])
        assert sample["jpg"] == (drawn_folder / facts["path"]).read_bytes()
        assert manifest.classes[int(sample["cls"])] == facts["path"].split("/")[0]
        assert (facts["width"], facts["height"]) == (48, 48)
    assert len({json.loads(sample["json"])["path"] for sample in samples}) == 48


@pytest.mark.skipif(not PHOTOS.exists(), reason="the photographs are not here")
def test_photographs_come_back_bit_for_bit(tmp_path):
    run(ShardConfig(str(PHOTOS), str(tmp_path / "out"), samples_per_shard=50, workers=2))
    with tarfile.open(PHOTOS) as tar:
        originals = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    samples = read_back(tmp_path / "out")
    assert {json.loads(sample["json"])["path"]: sample["jpg"] for sample in samples} == originals


def test_the_index_is_the_one_of_wds2idx(drawn_shards, tmp_path):
    for tar in sorted(drawn_shards.glob("*.tar")):
        theirs = tmp_path / "theirs.idx"
        tool = Path(sys.executable).with_name("wds2idx")
        subprocess.run([tool, tar, theirs], check=True, capture_output=True)
        assert tar.with_suffix(".idx").read_bytes() == theirs.read_bytes()


def test_tars_are_plain_and_anonymous(drawn_shards):
    with tarfile.open(drawn_shards / "train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.pax_headers == {}
            assert len(member.name) <= 100
            assert member.name.count(".") == 1
            assert member.offset_data - member.offset == 512


def test_the_order_follows_from_names_and_seed(drawn_folder, drawn_shards, tmp_path):
    paths = [json.loads(sample["json"])["path"] for sample in read_back(drawn_shards)]
    assert paths == sorted(paths, key=lambda path: splitmix(splitmix(0, 0), name_hash(path)) >> 32)
    run(ShardConfig(str(drawn_folder), str(tmp_path / "out"), seed=1, workers=1))
    assert [json.loads(sample["json"])["path"] for sample in read_back(tmp_path / "out")] == sorted(
        paths, key=lambda path: splitmix(splitmix(0, 1), name_hash(path)) >> 32
    )


def name_hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "little")


def splitmix(state: int, word: int) -> int:
    """Fold a word into a state as splitmix64 does, in Python's unbounded integers."""
    state = ((state ^ word) + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def test_neighbors_are_of_independent_classes(tmp_path):
    # A set sorted by class has runs as long as its classes; a fair deck of 4 has neighbors of one class in 1 of 4.
    for label in "abcd":
        (tmp_path / "in" / label).mkdir(parents=True)
        for number in range(500):
            (tmp_path / "in" / label / f"{number}.jpg").write_bytes(b"")
    source = scan(tmp_path / "in")
    labels = [image.label for image in source.take(source.shuffled(seed=5))]
    same = sum(a == b for a, b in itertools.pairwise(labels))
    assert sorted(labels) == sorted(list(range(4)) * 500)
    assert abs(same / 1999 - 0.25) < 5 * (0.25 * 0.75 / 1999) ** 0.5


def test_the_number_of_workers_leaves_no_trace(drawn_folder, drawn_shards, tmp_path):
    run(ShardConfig(str(drawn_folder), str(tmp_path / "out"), samples_per_shard=10, workers=2))
    assert content(tmp_path / "out") == content(drawn_shards)


def test_the_manifest_counts_what_was_written(drawn_shards):
    manifest = Manifest.load(drawn_shards)
    assert manifest.classes == ("disc", "ring", "square", "triangle")
    assert [shard.samples for shard in manifest.shards] == [10, 10, 10, 10, 8]
    assert [shard.bytes for shard in manifest.shards] == [
        (drawn_shards / shard.name).stat().st_size for shard in manifest.shards
    ]
    assert manifest.bytes == sum(shard.bytes for shard in manifest.shards)


def test_a_flat_source_has_no_labels(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(encoded(noise(), "PNG"))
    run(ShardConfig(str(tmp_path / "in"), str(tmp_path / "out"), workers=1))
    assert Manifest.load(tmp_path / "out").classes == ()
    assert "cls" not in read_back(tmp_path / "out")[0]


def test_another_shorter_side_is_another_set(drawn_folder, tmp_path):
    run(ShardConfig(str(drawn_folder), str(tmp_path / "out"), shorter_side=24, workers=1))
    with pytest.raises(ValueError, match="shorter_side"):
        run(ShardConfig(str(drawn_folder), str(tmp_path / "out"), shorter_side=32, workers=1))


@pytest.fixture
def damaged(drawn_folder, tmp_path) -> Path:
    """Return a copy of the drawn folder with two files that are no images."""
    folder = Path(shutil.copytree(drawn_folder, tmp_path / "damaged"))
    (folder / "disc" / "broken.jpg").write_bytes(b"no image")
    (folder / "ring" / "empty.jpg").write_bytes(b"")
    return folder


def test_too_many_rejected_images_fail_without_a_manifest(damaged, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"2 images are rejected, 1 may be \(.*\.csv.*max_rejected=2"):
        run(ShardConfig(str(damaged), str(output), samples_per_shard=10, workers=1, max_rejected=1))
    assert not (output / MANIFEST_NAME).exists()
    run(ShardConfig(str(damaged), str(output), samples_per_shard=10, workers=1, max_rejected=2))
    assert Manifest.load(output).samples == 48
    rows = list(csv.DictReader((output / REJECTED_NAME).open()))
    assert [row["path"] for row in rows] == ["disc/broken.jpg", "ring/empty.jpg"]
    assert [row["reason"].split(" of")[0] for row in rows] == ["not an image", "empty file"]
    assert not (output / LEDGER_NAME).exists()


def test_a_shard_without_a_sample_is_left_out(damaged, tmp_path):
    output = tmp_path / "out"
    run(ShardConfig(str(damaged), str(output), samples_per_shard=1, workers=1, max_rejected=2))
    manifest = Manifest.load(output)
    assert len(manifest.shards) == 48 == len(list(output.glob("*.tar"))) == len(list(output.glob("*.idx")))


def test_a_source_that_does_not_decode_at_all_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="not one image"):
        run(ShardConfig(str(tmp_path / "in"), str(tmp_path / "out"), workers=1, max_rejected=1))
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_the_same_command_again_says_that_it_is_done(drawn_folder, tmp_path, capsys):
    config = ShardConfig(str(drawn_folder), str(tmp_path / "out"), samples_per_shard=10, workers=1)
    run(config)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    run(config)
    assert "holds this set already: 48 samples in 5 shards" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("change", [{"seed": 3}, {"samples_per_shard": 11}, {"prefix": "val"}])
def test_a_finished_output_of_another_plan_is_refused(drawn_folder, drawn_shards, change):
    options = {"samples_per_shard": 10, "workers": 1} | change
    with pytest.raises(ValueError, match=f"other options or another source .{next(iter(change))}="):
        run(ShardConfig(str(drawn_folder), str(drawn_shards), **options))


def test_another_source_into_a_finished_output_is_refused(damaged, drawn_shards):
    with pytest.raises(
        ValueError, match=r"another source \(source_fingerprint: not the names, labels, sizes and times"
    ):
        run(ShardConfig(str(damaged), str(drawn_shards), samples_per_shard=10, workers=1))


def test_a_folder_of_other_things_is_left_alone(drawn_folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty; choose a new or empty folder"):
        run(ShardConfig(str(drawn_folder), str(tmp_path), workers=1))
    assert list(content(tmp_path)) == ["thesis.tex"]


def test_an_output_that_cannot_be_a_folder_is_refused(drawn_folder, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"^shard\.output: cannot write to"):
            run(ShardConfig(str(drawn_folder), str(output), workers=1))


def test_two_commands_do_not_share_an_output(tmp_path):
    first, second = (Ledger(tmp_path / "out", {"seed": 0}) for _ in range(2))
    with first, pytest.raises(ValueError, match="another command is writing"):
        second.__enter__()
    with second:
        pass


@pytest.mark.parametrize(
    "bad",
    [
        {"prefix": "a.b"},
        {"prefix": ""},
        {"prefix": "x" * 41},
        {"samples_per_shard": -1},
        {"bytes_per_shard": -1},
        {"shorter_side": -1},
        {"quality": 101},
        {"seed": -1},
        {"workers": -1},
        {"max_rejected": -1},
    ],
)
def test_options_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=rf"^shard\.{next(iter(bad))}: must be"):
        ShardConfig("in", "out", **bad)


def test_a_full_disk_is_one_sentence_and_can_be_continued(drawn_folder, drawn_shards, tmp_path, monkeypatch):
    output = tmp_path / "out"
    config = ShardConfig(str(drawn_folder), str(output), samples_per_shard=10, workers=1)
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device") as error:
        run(config)
    monkeypatch.undo()
    assert str(error.value).startswith("shard.output: cannot write")
    left = {path.name for path in output.iterdir()}
    assert "train-000000.tar" in left
    assert MANIFEST_NAME not in left
    assert not any(name.endswith(".tmp") for name in left)
    run(config)
    assert content(output) == content(drawn_shards)


def test_a_kept_shard_is_not_written_again_and_a_damaged_one_is(drawn_folder, drawn_shards, tmp_path):
    output = tmp_path / "out"
    config = ShardConfig(str(drawn_folder), str(output), samples_per_shard=10, workers=1, max_rejected=0)
    _interrupt_before_the_manifest(config)
    kept, damaged_tar = output / "train-000001.tar", output / "train-000002.tar"
    damaged_tar.write_bytes(damaged_tar.read_bytes()[:-1] + b"x")
    inodes = {path.name: path.stat().st_ino for path in (kept, damaged_tar)}
    run(config)
    assert kept.stat().st_ino == inodes[kept.name]
    assert content(output) == content(drawn_shards)


def _interrupt_before_the_manifest(config: ShardConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert not (Path(config.output) / MANIFEST_NAME).exists()


def test_an_unfinished_output_of_another_plan_is_refused(drawn_folder, tmp_path):
    config = ShardConfig(str(drawn_folder), str(tmp_path / "out"), samples_per_shard=10, workers=1)
    _interrupt_before_the_manifest(config)
    config.seed = 9
    with pytest.raises(ValueError, match=r"other options or another source \(seed=0"):
        run(config)
    config.seed = 0
    run(config)  # the refused command has let go of the output


@pytest.fixture
def finished(damaged, tmp_path) -> ShardConfig:
    """Return the command of a set that is finished, with two rejected images."""
    config = ShardConfig(str(damaged), str(tmp_path / "out"), samples_per_shard=10, workers=1, max_rejected=2)
    run(config)
    return config


@pytest.mark.parametrize(
    "victims",
    [
        ["train-000003.tar"],
        ["train-000003.idx"],
        [REJECTED_NAME],
        ["train-000000.tar", "train-000004.idx", REJECTED_NAME],
    ],
)
@pytest.mark.parametrize("loss", ["missing", "cut", "folder"])
def test_the_same_command_again_mends_a_finished_set(finished, victims, loss, capsys):
    output = Path(finished.output)
    whole = content(output)
    for name in victims:
        (output / name).unlink()
        if loss == "cut":
            (output / name).write_bytes(whole[name][:-1])
    kept = {name: (output / name).stat().st_ino for name in whole.keys() - set(victims)}
    capsys.readouterr()
    if loss == "folder":
        (output / LEDGER_NAME).mkdir()  # of a command that was killed while it mended
    run(finished)
    assert content(output) == whole
    assert {name: (output / name).stat().st_ino for name in kept} == kept
    printed = capsys.readouterr().out
    assert all(name in printed for name in victims)
    assert f"{len(victims)} files written again; {output} holds this set already: 48 samples" in printed


def test_what_is_mended_is_what_it_was_or_nothing(finished, monkeypatch):
    output = Path(finished.output)
    whole = content(output)
    (output / REJECTED_NAME).unlink()
    (output / "train-000002.tar").unlink()
    real = pack.as_jpeg
    monkeypatch.setattr(pack, "as_jpeg", lambda *given: real(*given)._replace(width=47))  # another decoder
    with pytest.raises(ValueError, match=r"is damaged, and written again it is another file"):
        run(finished)
    monkeypatch.undo()
    left = content_of_files(output)
    assert left == {name: whole[name] for name in left}
    run(finished)
    assert content(output) == whole


def content_of_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_a_finished_set_is_not_written_to(finished):
    before = Path(finished.output).stat().st_mtime_ns
    run(finished)
    assert Path(finished.output).stat().st_mtime_ns == before


def test_a_set_finished_meanwhile_is_kept(drawn_folder, drawn_shards, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    real = shard_module.Ledger.__enter__

    def finish_first(ledger):
        monkeypatch.setattr(shard_module.Ledger, "__enter__", real)
        run(ShardConfig(str(drawn_folder), str(output), samples_per_shard=10, workers=1))
        return ledger.__enter__()

    monkeypatch.setattr(shard_module.Ledger, "__enter__", finish_first)
    with pytest.raises(ValueError, match="other options or another source"):
        run(ShardConfig(str(drawn_folder), str(output), samples_per_shard=10, seed=7, workers=1))
    assert content_of_files(output) == content(drawn_shards)


SLOW_PACKING = """
import time
from data import images, pack

def slow(task):
    time.sleep(0.1)
    return pack.keep_or_pack(task)
"""
COMMAND = """
import sys
import slow_packing
from data import shard

shard.keep_or_pack = slow_packing.slow
shard.run(shard.ShardConfig(sys.argv[1], sys.argv[2], samples_per_shard=3, workers=2))
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_was_stopped_goes_on_to_the_same_bytes(drawn_folder, tmp_path, sign):
    output, whole = tmp_path / "out", tmp_path / "whole"
    run(ShardConfig(str(drawn_folder), str(whole), samples_per_shard=3, workers=1))
    process = _start(tmp_path, drawn_folder, output)
    _wait_until(lambda: len(list(output.glob("*.tar"))) >= 2)
    os.killpg(process.pid, sign) if sign == signal.SIGINT else process.kill()
    assert process.wait(timeout=30) != 0
    assert 2 <= len(list(output.glob("*.tar"))) < 16
    assert not (output / MANIFEST_NAME).exists()
    assert "SpawnProcess" not in (tmp_path / "stderr.txt").read_text()  # only the parent reacts to Ctrl-C
    _wait_until(lambda: not _alive(process.pid))  # the workers leave with their parent
    run(ShardConfig(str(drawn_folder), str(output), samples_per_shard=3, workers=1))
    assert content(output) == content(whole)


def _start(tmp_path: Path, source: Path, output: Path) -> subprocess.Popen:
    """Start a sharding of 16 slow shards in a process group of its own."""
    (tmp_path / "slow_packing.py").write_text(SLOW_PACKING)
    with (tmp_path / "stderr.txt").open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, source, output],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
            stderr=stderr,
            start_new_session=True,
        )


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _alive(group: int) -> list[int]:
    """Return the processes of a group that are not merely waiting to be reaped."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of_group) == group and state != "Z":
            alive.append(int(path.parent.name))
    return alive


def test_a_scan_and_a_shard_of_the_same_tar_agree(drawn_folder, drawn_shards, tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(drawn_folder, "images")
    assert len(scan(tmp_path / "in.tar")) == 48
    run(ShardConfig(str(tmp_path / "in.tar"), str(tmp_path / "out"), samples_per_shard=10, workers=1))
    ours = {sample["jpg"] for sample in read_back(tmp_path / "out")}
    assert ours == {sample["jpg"] for sample in read_back(drawn_shards)}


@pytest.mark.parametrize("size", [0, 1, 511, 512, 123_456_789])
def test_headers_are_those_of_tarfile(size):
    info = tarfile.TarInfo("000000123.jpg")
    info.size, info.mode = size, 0o444
    assert pack._header(info.name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_shards_hold_as_many_source_bytes_as_they_may(drawn_folder, tmp_path):
    sizes = {str(path.relative_to(drawn_folder)): path.stat().st_size for path in drawn_folder.glob("*/*")}
    limit = 3 * max(sizes.values())
    for workers in (1, 2):
        config = ShardConfig(str(drawn_folder), str(tmp_path / str(workers)), bytes_per_shard=limit, workers=workers)
        run(config)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    shards: dict[str, list[int]] = {}
    for sample in read_back(tmp_path / "1"):
        shards.setdefault(sample["__url__"], []).append(sizes[json.loads(sample["json"])["path"]])
    dealt = list(shards.values())
    assert sum(map(len, dealt)) == 48
    assert all(sum(shard) <= limit for shard in dealt)
    assert all(sum(shard) + following[0] > limit for shard, following in itertools.pairwise(dealt))


def test_a_shard_that_is_exactly_full_is_not_cut_short(tmp_path):
    image = encoded(noise(), "JPEG")
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(image)
    run(ShardConfig(str(tmp_path / "in"), str(tmp_path / "out"), bytes_per_shard=2 * len(image), workers=1))
    assert [shard.samples for shard in Manifest.load(tmp_path / "out").shards] == [2, 2, 2]


def test_an_image_larger_than_a_shard_has_one_of_its_own(drawn_folder, tmp_path):
    run(ShardConfig(str(drawn_folder), str(tmp_path / "out"), bytes_per_shard=1, workers=1))
    assert [shard.samples for shard in Manifest.load(tmp_path / "out").shards] == [1] * 48


def test_samples_and_bytes_per_shard_exclude_each_other():
    with pytest.raises(ValueError, match=r"shard\.bytes_per_shard: 9 beside samples_per_shard=5; give one of them"):
        ShardConfig("in", "out", samples_per_shard=5, bytes_per_shard=9)


def test_the_default_is_a_thousand_samples_per_shard(drawn_folder, tmp_path):
    run(ShardConfig(str(drawn_folder), str(tmp_path / "out"), workers=1))
    assert Manifest.load(tmp_path / "out").options["samples_per_shard"] == 1000
    run(ShardConfig(str(drawn_folder), str(tmp_path / "out"), samples_per_shard=1000, workers=1))  # the same set


def test_what_a_scan_rejects_is_listed_and_counted(drawn_folder, tmp_path, capsys):
    tar = tmp_path / "in.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(drawn_folder, ".")
        for name in ("../x.jpg", "/y.jpg", os.fsdecode(b"disc/\xff.jpg"), "ring/cut1.jpg", "ring/cut2.jpg"):
            image = encoded(noise(), "JPEG")
            image = image[: len(image) // 2 + len(name)] if "cut" in name else image
            info = tarfile.TarInfo(name)
            info.size = len(image)
            archive.addfile(info, io.BytesIO(image))
        link = tarfile.TarInfo(os.fsdecode(b"ring/\xfe.jpg"))
        link.type, link.linkname = tarfile.SYMTYPE, os.fsdecode(b"\xfd")
        archive.addfile(link)
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"5 images are rejected, 4 may be \(2 its name leads out"):
        run(ShardConfig(str(tar), str(output), workers=1, max_rejected=4))
    capsys.readouterr()
    run(ShardConfig(str(tar), str(output), workers=1, max_rejected=5))
    printed = capsys.readouterr().out
    rows = list(csv.reader((output / REJECTED_NAME).open(encoding="utf-8")))
    assert [path for path, _ in rows] == [
        "path",
        "../x.jpg",
        "/y.jpg",
        "ring/cut1.jpg",
        "ring/cut2.jpg",
        r"ring/\udcfe.jpg",
    ]
    counts = dict(line.rsplit(maxsplit=1) for line in printed.splitlines() if line.startswith("  "))
    assert counts == {
        "  kept": "49",
        "  its name leads out of the archive": "2",
        "  symbolic link": "1",
        "  truncated": "2",
    }
    kept = {json.loads(sample["json"])["path"] for sample in read_back(output)}
    assert os.fsdecode(b"disc/\xff.jpg") in kept


def test_a_source_of_rejected_things_only_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"1 images are rejected, 0 may be \(1 a link that leads nowhere\)"):
        run(ShardConfig(str(tmp_path / "in"), str(tmp_path / "out"), workers=1))
    with pytest.raises(ValueError, match="not one image"):
        run(ShardConfig(str(tmp_path / "in"), str(tmp_path / "out"), workers=1, max_rejected=1))


def test_files_too_large_for_memory_are_rejected_unread(drawn_folder, tmp_path):
    folder = Path(shutil.copytree(drawn_folder, tmp_path / "in"))
    with (folder / "disc" / "huge.jpg").open("wb") as file:
        file.truncate(pack.MAX_ENCODED_BYTES + 1)
    run(ShardConfig(str(folder), str(tmp_path / "out"), workers=1, max_rejected=1))
    rows = list(csv.DictReader((tmp_path / "out" / REJECTED_NAME).open()))
    assert rows == [{"path": "disc/huge.jpg", "reason": f"its file is larger than {pack.MAX_ENCODED_BYTES} bytes"}]


def test_many_reasons_are_summed_up():
    rejected = [(str(n), f"width {n} (at {n})") for n in range(5)] + [(str(n), "x" * n) for n in range(1, 40)]
    counted = count_reasons(rejected)
    assert counted[0] == ("width N", 5)
    assert counted[-1] == ("other reasons", 39 - 11)
    assert sum(count for _, count in counted) == len(rejected)


def test_ten_lines_tell_rate_and_time_left_where_there_is_no_terminal(drawn_folder, tmp_path, capsys):
    run(ShardConfig(str(drawn_folder), str(tmp_path / "out"), samples_per_shard=1, workers=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 48 images" in line]
    assert len(lines) == 10
    assert all(re.fullmatch(r"\d+ of 48 images, \d+ images/s, \d\d:\d\d left", line) for line in lines)
    assert lines[-1].startswith("48 of 48")
    assert lines[-1].endswith("00:00 left")


def test_quality_is_that_of_the_options(drawn_folder, tmp_path):
    for quality in (60, 95):
        run(ShardConfig(str(drawn_folder), str(tmp_path / str(quality)), shorter_side=24, quality=quality, workers=1))
    small, large = (sum(len(sample["jpg"]) for sample in read_back(tmp_path / name)) for name in ("60", "95"))
    assert small < 0.8 * large
    with pytest.raises(ValueError, match=r"quality=60"):
        run(ShardConfig(str(drawn_folder), str(tmp_path / "60"), shorter_side=24, quality=61, workers=1))


def test_limits_of_the_options_reject(drawn_folder, tmp_path):
    options = {"max_pixels": 48 * 48 - 1}
    with pytest.raises(ValueError, match="48 images are rejected"):
        run(ShardConfig(str(drawn_folder), str(tmp_path / "out"), workers=1, **options))


def test_only_a_list_of_classes_of_a_labelled_set(drawn_folder, tmp_path):
    (tmp_path / "list").write_text("ring\nsquare\n")
    run(ShardConfig(str(drawn_folder), str(tmp_path / "out"), classes=str(tmp_path / "list"), workers=1))
    assert Manifest.load(tmp_path / "out").classes == ("ring", "square")
    labels = [(json.loads(s["json"])["path"].split("/")[0], s["cls"]) for s in read_back(tmp_path / "out")]
    assert set(labels) == {("ring", b"0"), ("square", b"1")}
    with pytest.raises(ValueError, match="source_fingerprint"):
        run(ShardConfig(str(drawn_folder), str(tmp_path / "out"), workers=1))


MEMORY = """
import itertools, resource, sys
from pathlib import Path
from data.sources import Listing, Source
from data.sources.entries import Found

def entries(count):
    for number in range(count):
        yield Found(f"n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG", "x.tar", number, 1, 1)

if __name__ == "__main__":
    for count in (10_000, 300_000):
        source = Source(Listing(entries(count), Path(".")), None, frozenset())
        source.take(source.shuffled(0)[:1000])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_scan_takes_few_bytes_per_image(tmp_path):
    (tmp_path / "memory.py").write_text(MEMORY)
    command, environment = [sys.executable, tmp_path / "memory.py"], os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    small, large = map(int, result.stdout.split())
    assert (large - small) * 1024 / 290_000 < 64
