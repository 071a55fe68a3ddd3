"""Command: derive everything a manifest says from the tars themselves, and compare."""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data.ledger import LEDGER_NAME
from data.manifest import INDEX_VERSION, MANIFEST_NAME, Manifest, Shard, index_path
from data.shard import REJECTED_NAME
from data.workers import run_tasks


class VerificationError(Exception):
    """The shards are not what their manifest says; the message names every finding."""


@dataclass
class VerifyConfig:
    """shards: a folder written by `coldpress shard`; workers: processes, 0 = all cores."""

    shards: str
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"verify.workers: must be at least 0, not {self.workers}.")


@dataclass(frozen=True)
class ShardCheck:
    """One shard to look at; ``classes`` is their number, 0 for an unlabelled set."""

    path: str
    shard: Shard
    classes: int


@dataclass
class ShardReport:
    """What was seen in a shard and where it disagrees with the manifest or its index."""

    name: str
    samples: int = 0
    bytes: int = 0
    keys: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def find(self, finding: str) -> None:
        self.findings.append(f"{self.name}: {finding}")


def run(config: VerifyConfig) -> None:
    """Check every shard, print a table and a verdict.

    Raises ValueError when there is no finished set, VerificationError when anything disagrees.
    """
    directory = Path(config.shards)
    manifest = Manifest.load(directory)
    reports = list(_reports(directory, manifest, config.workers))
    findings = [finding for report in reports for finding in report.findings]
    findings += [*_total_findings(manifest, reports), *_stray_findings(directory, manifest)]
    print(_table(directory, manifest, reports, len(findings)))
    if findings:
        listed = "\n".join(f"  {finding}" for finding in findings)
        raise VerificationError(f"verify.shards: {directory} has {len(findings)} finding(s):\n{listed}")
    print(f"verified: {manifest.samples} samples in {len(manifest.shards)} shards agree with {MANIFEST_NAME}")


def _reports(directory: Path, manifest: Manifest, workers: int) -> Iterator[ShardReport]:
    checks = [ShardCheck(str(directory / shard.name), shard, len(manifest.classes)) for shard in manifest.shards]
    with tqdm(total=manifest.samples, unit="sample", disable=None) as bar:
        for report in run_tasks(check_shard, checks, workers):
            bar.update(report.samples)
            yield report


def check_shard(check: ShardCheck) -> ShardReport:
    """Compare a tar and its index with the manifest's record and with each other."""
    tar, report = Path(check.path), ShardReport(check.shard.name)
    for file, checksum in ((tar, check.shard.sha256), (index_path(tar), check.shard.index_sha256)):
        if not file.is_file():
            report.find(f"{file.name} is missing")
            return report
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != checksum:
                report.find(f"SHA-256 of {file.name} is not the manifest's")
    report.bytes = tar.stat().st_size
    if report.bytes != check.shard.bytes:
        report.find(f"{report.bytes} bytes, the manifest says {check.shard.bytes}")
    try:
        _check_samples(tar, check, report)
    except (tarfile.TarError, OSError) as error:
        report.find(f"not a readable tar ({error})")
    return report


def _check_samples(tar: Path, check: ShardCheck, report: ShardReport) -> None:
    """Read the tar as any tar reader would; check its samples, and its index line by line."""
    rows = []
    with tarfile.open(tar, "r:") as archive:
        for key, members in _samples(archive):
            rows.append(" ".join(f"{_extension(m)} {m.offset_data} {m.size} {m.name}" for m in members))
            report.keys.append(key)
            _check_members(archive, key, members, check.classes, report)
            if len(rows) == 1 + check.shard.samples // 2:
                _check_decodes(archive, key, members, report)
    report.samples = len(rows)
    if report.samples != check.shard.samples:
        report.find(f"{report.samples} samples, the manifest says {check.shard.samples}")
    _check_index(index_path(tar), rows, report)


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Yield (key, adjacent members of that key)."""
    for key, members in groupby(archive, key=lambda member: member.name.partition(".")[0]):
        yield key, list(members)


def _extension(member: tarfile.TarInfo) -> str:
    return member.name.partition(".")[2]


def _check_members(
    archive: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], classes: int, report: ShardReport
) -> None:
    extensions = [_extension(member) for member in members]
    expected = ["cls", "jpg", "json"] if classes else ["jpg", "json"]
    if extensions != expected:
        report.find(f"sample {key} has members {', '.join(extensions)} instead of {', '.join(expected)}")
    elif classes:
        label = _read(archive, members[0])
        if not label.isdigit() or int(label) >= classes:
            report.find(f"sample {key} has label {label!r}, there are {classes} classes")


def _check_decodes(archive: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], report: ShardReport) -> None:
    for member in members:
        if _extension(member) == "jpg":
            try:
                Image.open(io.BytesIO(_read(archive, member))).load()
            except Exception as error:  # damaged files make Pillow raise almost anything
                report.find(f"sample {key} does not decode ({type(error).__name__})")


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    return b"" if stream is None else stream.read()


def _check_index(path: Path, rows: list[str], report: ShardReport) -> None:
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    expected = [f"{INDEX_VERSION} {len(rows)}", *rows]
    differing = [at for at, (line, row) in enumerate(zip(lines, expected, strict=False)) if line != row]
    if len(lines) != len(expected):
        report.find(f"{path.name} has {len(lines)} lines, the tar asks for {len(expected)}")
    if differing:
        report.find(f"{path.name} differs from the tar in {len(differing)} lines, the first is {differing[0] + 1}")


def _total_findings(manifest: Manifest, reports: list[ShardReport]) -> Iterator[str]:
    """Yield what only the whole set shows: totals and keys that occur twice."""
    for name in ("samples", "bytes"):
        seen, said = sum(getattr(report, name) for report in reports), getattr(manifest, name)
        if seen != said:
            yield f"{MANIFEST_NAME}: {said} {name}, the shards hold {seen}"
    known: set[str] = set()
    for report in sorted(reports, key=lambda report: report.name):
        for key in report.keys:
            if key in known:
                yield f"{report.name}: key {key} occurs twice"
            known.add(key)


def _stray_findings(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Yield files that readers of the folder might take for data."""
    listed = {shard.name for shard in manifest.shards}
    listed |= {index_path(Path(name)).name for name in listed} | {MANIFEST_NAME, REJECTED_NAME, LEDGER_NAME}
    for stray in sorted(entry.name for entry in directory.iterdir() if entry.name not in listed):
        if stray.endswith((".tar", ".idx", ".tmp")):
            yield f"{stray}: not in the manifest"


def _table(directory: Path, manifest: Manifest, reports: list[ShardReport], findings: int) -> str:
    rows = {
        "shards": f"{len(reports)} in {directory}",
        "classes": len(manifest.classes) or "none (unlabelled)",
        "samples": sum(report.samples for report in reports),
        "bytes": sum(report.bytes for report in reports),
        "fingerprint": manifest.fingerprint[:16],
        "findings": findings,
    }
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())
