"""Check one shard: its tar against its index, the manifest's record and the form that `coldpress shard` writes."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.images import KEPT, MAX_SIDE, PILLOW_MAX_PIXELS, ImagePolicy, RejectedError, as_jpeg
from data.manifest import INDEX_VERSION, Shard, index_path, sample_checksum
from data.ustar import HashedTar, Member, TarDamageError

MOST_FINDINGS = 20  # that a shard lists; a broken one has thousands
# Sharding may have had any limits; what counts here is that the image would be kept.
_ANY_SIZE = ImagePolicy(max_pixels=PILLOW_MAX_PIXELS, max_aspect_ratio=MAX_SIDE)
_DIGITS = frozenset("0123456789")


@dataclass(frozen=True)
class ShardCheck:
    """One shard to look at; ``classes`` is their number, 0 for an unlabelled set; ``deep``: decode every image."""

    path: str
    shard: Shard
    classes: int
    deep: bool


@dataclass
class ShardReport:
    """What was seen in a shard and where it disagrees with the manifest or its index.

    Of the samples in order: keys and labels (-1: none), int64; folders: hashes of where each came from, uint64.
    """

    name: str
    samples: int = 0
    bytes: int = 0
    max_height: int = 0
    max_width: int = 0
    decoded: int = 0
    keys: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    folders: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    findings: list[str] = field(default_factory=list)
    more: int = 0
    whole: bool = False  # read to the end of its last sample

    def find(self, finding: str, file: str = "") -> None:
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(f"{file or self.name}: {finding}")
        else:
            self.more += 1


@dataclass
class Facts:
    """What the small members of a sample say; -1, 0 and "" where they say nothing."""

    key: int = -1
    label: int = -1
    path: str = ""
    height: int = 0
    width: int = 0


def check_shard(check: ShardCheck) -> ShardReport:
    """Read a tar once; compare it and its index with the manifest's record and with each other."""
    tar, report = Path(check.path), ShardReport(check.shard.name)
    try:
        rows = _check_tar(tar, check, report)
    except FileNotFoundError:
        report.find("missing")
        rows = None
    except OSError as error:
        report.find(f"cannot be read ({error.strerror})")
        rows = None
    try:
        _check_index(index_path(tar), check.shard, rows, report)
    except FileNotFoundError:
        report.find("missing", index_path(tar).name)
    except OSError as error:
        report.find(f"cannot be read ({error.strerror})", index_path(tar).name)
    return report


def _hashed(text: str) -> int:
    """Return 64 bits that identify a folder of the source."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _check_tar(tar: Path, check: ShardCheck, report: ShardReport) -> list[str] | None:
    """Return the rows that the index should have, None when the tar could not be read to its end."""
    report.bytes = tar.stat().st_size
    if report.bytes != check.shard.bytes:
        report.find(f"{report.bytes} bytes, the manifest says {check.shard.bytes}")
    rows: list[str] = []
    facts: list[Facts] = []
    with tar.open("rb", buffering=2**20) as file:
        archive = HashedTar(file, report.bytes)
        try:
            for key, members in groupby(archive.members(), key=lambda member: member.name.partition(".")[0]):
                _check_sample(key, list(members), check, rows, facts, report)
            report.whole = True
        except TarDamageError as damage:
            report.find(f"not a readable tar: {damage}")
        if archive.sha256() != check.shard.sha256:
            report.find("SHA-256 is not the manifest's")
    _summarize(facts, report)
    if report.samples != check.shard.samples:
        report.find(f"{report.samples} samples, the manifest says {check.shard.samples}")
    return rows if report.whole else None


def _check_sample(
    key: str, members: list[Member], check: ShardCheck, rows: list[str], facts: list[Facts], report: ShardReport
) -> None:
    """Check one sample; append its index row and its facts."""
    rows.append(" ".join(f"{_extension(m)} {m.offset} {len(m.content)} {m.name}" for m in members))
    said = Facts()
    facts.append(said)
    if not (key and _DIGITS.issuperset(key) and len(key) < 19):
        report.find(f"sample {key!r} has a key that is not a number")
        return
    said.key = int(key)
    extensions = [_extension(member) for member in members]
    expected = ["cls", "jpg", "json"] if check.classes else ["jpg", "json"]
    if extensions != expected:
        report.find(
            f"sample {key} has members {', '.join(map(_printable, extensions))} instead of {', '.join(expected)}"
        )
        return
    if check.classes:
        _check_label(key, members[0].content, check.classes, said, report)
    _check_facts(key, members, said, report)
    if check.deep or len(rows) == 1 + check.shard.samples // 2:
        _check_decodes(key, members[-2].content, said, report)


def _extension(member: Member) -> str:
    return member.name.partition(".")[2]


def _printable(name: str) -> str:
    """Escape what could steer a terminal."""
    return name.encode("unicode_escape").decode("ascii")


def _check_label(key: str, label: bytes, classes: int, said: Facts, report: ShardReport) -> None:
    if label.isdigit() and len(label) < 10 and int(label) < classes:
        said.label = int(label)
    else:
        report.find(f"sample {key} has label {label[:40]!r}, there are {classes} classes")


def _check_facts(key: str, members: list[Member], said: Facts, report: ShardReport) -> None:
    *label, image, content = (member.content for member in members)
    try:
        facts: Any = json.loads(content)
        checksum = int(facts["crc32"])
        said.path, said.height, said.width = str(facts["path"]), int(facts["height"]), int(facts["width"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        report.find(f"sample {key} has no path, height, width and crc32 in its json")
        return
    if checksum != sample_checksum(b"".join(label), image):
        report.find(f"sample {key} does not have the checksum in its json")


def _check_decodes(key: str, content: bytes, said: Facts, report: ShardReport) -> None:
    report.decoded += 1
    try:
        jpeg = as_jpeg(content, _ANY_SIZE)
    except RejectedError as reason:
        report.find(f"sample {key} does not decode ({reason})")
        return
    if not jpeg.treatment.startswith(KEPT):
        report.find(f"sample {key} is not a regular gray or RGB JPEG")
    if (jpeg.width, jpeg.height) != (said.width, said.height):
        report.find(f"sample {key} has {jpeg.width}x{jpeg.height} pixels, its json says {said.width}x{said.height}")


def _summarize(facts: list[Facts], report: ShardReport) -> None:
    report.samples = len(facts)
    report.max_height = max((each.height for each in facts), default=0)
    report.max_width = max((each.width for each in facts), default=0)
    report.keys = np.array([each.key for each in facts], np.int64)
    report.labels = np.array([each.label for each in facts], np.int64)
    report.folders = np.array([_hashed(each.path.rpartition("/")[0]) for each in facts], np.uint64)


def _check_index(path: Path, shard: Shard, rows: list[str] | None, report: ShardReport) -> None:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        report.find("SHA-256 is not the manifest's", path.name)
    if rows is not None:
        _compare_index(path.name, content, [f"{INDEX_VERSION} {len(rows)}", *rows], report)


def _compare_index(name: str, content: bytes, expected: list[str], report: ShardReport) -> None:
    """Compare an index with the lines that its tar asks for."""
    lines = content.decode("ascii", "replace").splitlines()
    differing = list(_differing(lines, expected))
    if len(lines) != len(expected):
        report.find(f"{len(lines)} lines, the tar asks for {len(expected)}", name)
    if differing:
        report.find(f"differs from the tar in {len(differing)} lines, the first is {differing[0] + 1}", name)


def _differing(lines: list[str], expected: list[str]) -> Iterator[int]:
    return (at for at, (line, row) in enumerate(zip(lines, expected, strict=False)) if line != row)
