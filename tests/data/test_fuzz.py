"""Flip, cut and splice bytes of images, source tars and sharded sets: every case ends in a count or a clear error.

Cases run by the dozen in a child process, so that a crash, a hang or a burst of memory names its seed. To repeat one:
`python tests/data/test_fuzz.py KIND SEED 1 FOLDER`, with KIND as below.
"""

import faulthandler
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SECONDS_PER_CASE = 30  # a hundred times what a case takes
MOST_BYTES = 2 * 2**30  # of resident memory; torch and DALI alone take about a third


# --- Damage


def damage(rng: random.Random, content: bytes, other: bytes = b"") -> bytes:
    """Return the bytes with one to three pieces flipped, cut, spliced, blanked or overwritten."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(DAMAGES)(rng, content, other or content)
    return content


def damage_within(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Damage an archive in some place of it, be it a header or content."""
    if rng.random() < 0.3:
        return damage(rng, content, other)
    start = rng.randrange(len(content))
    end = start + rng.choice((100, 1000, 5000))
    return content[:start] + damage(rng, content[start:end], other) + content[end:]


def flip(rng: random.Random, content: bytes, other: bytes) -> bytes:
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if content else 0):
        # Headers decide most, so half of the flips are among the first bytes.
        at = rng.randrange(min(len(content), 600) if rng.random() < 0.5 else len(content))
        flipped[at] ^= rng.randrange(1, 256)
    return bytes(flipped)


def cut_end(rng: random.Random, content: bytes, other: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)] + rng.choice((b"", b"\xff\xd9", bytes(512)))


def cut_out(rng: random.Random, content: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at + rng.choice((1, 7, 512, 5000)) :]


def splice(rng: random.Random, content: bytes, other: bytes) -> bytes:
    at, start = rng.randrange(len(content) + 1), rng.randrange(len(other) + 1)
    return content[:at] + other[start : start + rng.choice((1, 30, 512, 5000))] + content[at:]


def graft(rng: random.Random, content: bytes, other: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]


def blank(rng: random.Random, content: bytes, other: bytes) -> bytes:
    at, size = rng.randrange(len(content) + 1), rng.choice((4, 64, 512, 4096))
    return content[:at] + bytes([rng.choice((0, 255))]) * len(content[at : at + size]) + content[at + size :]


def enlarge(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Overwrite a few bytes, of a size field as it may be, by the largest or smallest numbers there are."""
    number = rng.choice(
        (b"\xff\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"77777777777", b"\x80" * 8)
    )
    at = rng.randrange(min(len(content), 700) + 1)
    return content[:at] + number + content[at + len(number) :]


DAMAGES = (flip, flip, flip, cut_end, cut_out, splice, graft, blank, enlarge)


# --- Sound material


@cache
def sound_images() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((56, 40), Image.Resampling.BICUBIC)
    deep = Image.fromarray(rng.integers(0, 65536, (20, 30), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    jpegs = [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"subsampling": "4:1:1"}, {"exif": exif}]
    return (
        *(_encoded(picture.convert(mode), "JPEG", **options) for mode in ("RGB", "L", "CMYK") for options in jpegs),
        *(_encoded(picture, "TIFF", compression=how) for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg")),
        *(_encoded(picture, form) for form in ("PNG", "WEBP", "BMP", "PPM", "GIF")),
        *(_encoded(picture, form, **more) for form in ("GIF", "PNG", "WEBP", "TIFF", "MPO")),
        _encoded(picture.convert("RGBA"), "PNG"),
        _encoded(picture, "WEBP", lossless=True),
        _encoded(deep, "PNG"),
    )


def _encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def sound_tar(folder: Path) -> bytes:
    """Return a tar of class folders that holds every sound image."""
    path = folder / "source.tar"
    if not path.exists():
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for number, image in enumerate(sound_images()):
                info = tarfile.TarInfo(f"class{number % 3}/{'long' * (30 * (number % 2))}{number}.jpg")
                info.size = len(image)
                tar.addfile(info, io.BytesIO(image))
    return path.read_bytes()


def sound_set(folder: Path) -> Path:
    """Return a sharded set of 3 classes in shards of 9."""
    from data.shard import ShardConfig, run

    shards = folder / "sound"
    if not shards.exists():
        (folder / "in.tar").write_bytes(sound_tar(folder))
        run(ShardConfig(str(folder / "in.tar"), str(shards), samples_per_shard=9, workers=1))
    return shards


def damaged_set(rng: random.Random, folder: Path, names: str) -> tuple[Path, str]:
    """Return a copy of the sound set in which one file that matches ``names`` is damaged, and that file's name."""
    sound, copy = sound_set(folder), folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sound, copy)
    victim, other = rng.choice(sorted(copy.glob(names))), rng.choice(sorted(copy.glob(names)))
    victim.write_bytes(damage_within(rng, victim.read_bytes(), other.read_bytes()))
    return copy, victim.name


def forge(shards: Path) -> None:
    """Make the manifest agree with the files as they are: what then is wrong, no checksum tells."""
    from data.manifest import Manifest

    manifest, entries = Manifest.load(shards), []
    for entry in manifest.shards:
        tar = shards / entry.name
        sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (tar, tar.with_suffix(".idx"))]
        entries.append(replace(entry, bytes=tar.stat().st_size, sha256=sums[0], index_sha256=sums[1]))
    replace(manifest, shards=tuple(entries), bytes=sum(entry.bytes for entry in entries)).write(shards)


def assert_clear(error: Exception, *, start: str = "", end: str = "", within: str = "") -> None:
    """Check that an error says something, of something, in printable words."""
    text = str(error)
    assert len(text) > 5, repr(error)
    assert text.startswith(start), text
    assert text.endswith(end), text
    assert within in text, text
    assert all(character.isprintable() or character == "\n" for character in text), repr(text)


# --- Cases: each takes a seed and a folder, and returns how it ended


def image_case(seed: int, folder: Path) -> str:
    """An image is rejected, or becomes a JPEG that DALI decodes to the size that goes into the shard."""
    from data.images import ImagePolicy, RejectedError, as_jpeg

    rng = random.Random(seed)
    content = damage(rng, rng.choice(sound_images()), rng.choice(sound_images()))
    try:
        jpeg = as_jpeg(content, ImagePolicy(shorter_side=rng.choice((0, 0, 24))))
    except RejectedError as reason:
        assert_clear(reason)
        return "rejected"
    assert decoded_shape(jpeg.content) == (jpeg.height, jpeg.width, 3)
    return jpeg.treatment.split()[0].strip(",")


@cache
def _decoder() -> tuple[list[np.ndarray], Callable[[], np.ndarray]]:
    from nvidia.dali import fn, pipeline_def, types

    given: list[np.ndarray] = []

    def graph():
        encoded = fn.external_source(
            source=lambda: [given[-1]], num_outputs=None, dtype=types.UINT8, ndim=1, batch=True
        )
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)

    pipe = pipeline_def(graph, batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)()
    pipe.build()
    return given, lambda: np.array(pipe.run()[0][0])


def decoded_shape(jpeg: bytes) -> tuple[int, ...]:
    given, decode = _decoder()
    given[:] = [np.frombuffer(jpeg, np.uint8)]
    return decode().shape


def shard_case(seed: int, folder: Path) -> str:
    """A damaged source is refused in a sentence, or ends in a set that `verify` finds sound."""
    from data.shard import ShardConfig, run
    from data.verify import VerifyConfig
    from data.verify import run as verify

    rng = random.Random(seed)
    sound = sound_tar(folder)
    source, output = folder / "damaged.tar", folder / "out"
    source.write_bytes(damage_within(rng, sound, sound))
    shutil.rmtree(output, ignore_errors=True)
    try:
        run(ShardConfig(str(source), str(output), samples_per_shard=9, workers=1, max_rejected=1000))
    except ValueError as error:
        assert_clear(error, start="shard.", end=".")
        return "refused"
    verify(VerifyConfig(str(output), deep=True, workers=1))
    return "rejected some" if (output / "rejected.csv").exists() else "sharded"


def verify_case(seed: int, folder: Path) -> str:
    """Whatever changed in a set is found, and the file is named."""
    from data.verify import VerificationError, VerifyConfig, run

    rng = random.Random(seed)
    sound = sound_set(folder)
    shards, name = damaged_set(rng, folder, rng.choice(("*.tar", "*.idx", "manifest.json")))
    same = (sound / name).read_bytes() == (shards / name).read_bytes()
    forged = name != "manifest.json" and rng.random() < 0.4
    if forged:
        forge(shards)
    try:
        run(VerifyConfig(str(shards), deep=rng.random() < 0.5, workers=1))
    except VerificationError as error:
        assert_clear(error, start="verify.shards: ", within=Path(name).stem)
        return "found"
    assert same or forged, f"damage of {name} was not found"
    return "sound" if same else "plausible"


def loader_case(seed: int, folder: Path) -> str:
    """A damaged set is refused, or trained on with its broken samples replaced and counted."""
    import torch

    from data.loader import Loader, LoaderConfig
    from data.views import ViewSpec

    rng = random.Random(seed)
    late = rng.random() < 0.5
    shards, name = damaged_set(rng, folder, "*.tar" if late or rng.random() < 0.7 else "*")
    damaged = (shards / name).read_bytes()
    if late:
        # The file changes under a loader that has checked it.
        shutil.copy(sound_set(folder) / name, shards / name)
    elif rng.random() < 0.7 and name != "manifest.json":
        forge(shards)
    limit = rng.choice((0, 3, 100))
    try:
        loader = Loader(
            LoaderConfig(str(shards), device="cpu", threads=1, max_bad_samples=limit),
            [ViewSpec(16)],
            seed=seed,
            batch_size=8,
            device=torch.device("cpu"),
        )
    except ValueError as error:
        assert_clear(error, end=".", within=Path(name).stem)
        return "refused"
    if late:
        (shards / name).write_bytes(damaged)
    try:
        return _one_epoch(loader, limit)
    finally:
        loader.close()


def _one_epoch(loader, limit: int) -> str:
    places: list[int] = []
    try:
        for batch in loader.batches(0, loader.num_samples):
            places += batch.index.tolist()
            assert all(bool(view.isfinite().all()) for view in batch.views)
    except ValueError as error:
        assert_clear(error, start="data.", end=".")
        return "too many"
    assert places == list(range(loader.num_samples))
    assert loader.bad_samples <= limit
    return "replaced" if loader.bad_samples else "unharmed"


CASES = {"image": image_case, "shard": shard_case, "verify": verify_case, "loader": loader_case}


# --- The child, and the tests that start it


def main(kind: str, first: str, cases: str, folder: str) -> None:
    """Run cases, each under a watchdog; leave the seed of the one that runs, and in the end the counts."""
    ends: Counter[str] = Counter()
    for seed in range(int(first), int(first) + int(cases)):
        (Path(folder) / "seed").write_text(str(seed))
        faulthandler.dump_traceback_later(SECONDS_PER_CASE, exit=True)
        ends[CASES[kind](seed, Path(folder))] += 1
    faulthandler.cancel_dump_traceback_later()
    peak = peak_bytes()
    assert peak < MOST_BYTES, f"{peak} bytes of memory"
    (Path(folder) / "ends.json").write_text(json.dumps(ends))


def peak_bytes() -> int:
    """Return the largest resident memory of this process; getrusage would count that of the parent, too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def fuzz(kind: str, cases: int, folder: Path) -> dict[str, int]:
    """Run seeds 0, 1, ... in a child process; return how many ended how."""
    with (folder / "log.txt").open("w") as log:
        child = subprocess.run(
            [sys.executable, __file__, kind, "0", str(cases), str(folder)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    if child.returncode:
        seed, said = (folder / "seed").read_text(), (folder / "log.txt").read_text(errors="replace")
        pytest.fail(f"{kind} case, seed {seed}: exit code {child.returncode}\n{said[-3000:]}")
    return json.loads((folder / "ends.json").read_text())


# Every way to end must be met: a fuzz whose cases all end alike looks at nothing.
ENDS = {
    "image": {"kept", "re-encoded", "rejected", "scaled"},
    "shard": {"refused", "rejected some", "sharded"},
    "verify": {"found"},
    "loader": {"refused", "too many", "replaced", "unharmed"},
}


@pytest.mark.parametrize(("kind", "cases"), [("image", 800), ("shard", 120), ("verify", 250), ("loader", 100)])
def test_damage_ends_in_a_count_or_a_clear_error(kind, cases, tmp_path):
    ends = fuzz(kind, cases, tmp_path)
    assert sum(ends.values()) == cases
    assert ends.keys() >= ENDS[kind]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "cases"), [("image", 3000), ("shard", 600), ("verify", 1000), ("loader", 400)])
def test_much_damage_ends_in_a_count_or_a_clear_error(kind, cases, tmp_path):
    assert sum(fuzz(kind, cases, tmp_path).values()) == cases


if __name__ == "__main__":
    main(*sys.argv[1:])
