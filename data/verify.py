"""Command: derive everything a manifest says from the tars themselves, and compare."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.manifest import LEDGER_NAME, MANIFEST_NAME, Manifest, index_path
from data.rejected import REJECTED_NAME, count_rejected
from data.shuffle_quality import LEAST_QUALITY, ShuffleQuality, measure
from data.verify_shard import ShardCheck, ShardReport, check_shard
from data.workers import run_tasks

_REMEDY = "; delete the damaged files, and the `coldpress shard` command of this set writes them again"


class VerificationError(Exception):
    """The shards are not what their manifest says; the message names every finding."""


@dataclass
class VerifyConfig:
    """shards: a folder written by `coldpress shard`; deep: decode every image instead of one per shard.

    workers: processes, 0 = all cores.
    """

    shards: str
    deep: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"verify.workers: must be at least 0, not {self.workers}; 0 takes all cores.")


def run(config: VerifyConfig) -> None:
    """Check every shard, print a table and a verdict.

    Raises ValueError when there is no finished set, VerificationError when anything disagrees.
    """
    directory = Path(config.shards)
    manifest = _load(directory)
    reports = _reports(directory, manifest, config)
    findings = [*_shard_findings(reports), *_total_findings(manifest, reports), *_key_findings(reports)]
    findings += [*_rejected_findings(directory, manifest), *_stray_findings(directory, manifest)]
    quality = measure(*(np.concatenate([getattr(r, name) for r in reports]) for name in ("labels", "folders")))
    print(_table(directory, manifest, reports, quality, len(findings)))
    if findings:
        raise _failure(directory, findings, _REMEDY)
    if quality.score < LEAST_QUALITY:
        print(_shuffle_warning(directory, quality))
    print(f"verified: {manifest.samples} samples in {len(manifest.shards)} shards agree with {MANIFEST_NAME}")


def _load(directory: Path) -> Manifest:
    try:
        manifest = Manifest.load(directory)
    except ValueError as error:
        if not (directory / MANIFEST_NAME).is_file():
            raise
        # All else is checked against the manifest: without a sound one there is no more to say.
        raise _failure(directory, [str(error)]) from None
    if not manifest.shards:
        raise _failure(directory, [f"{MANIFEST_NAME}: lists no shards"])
    return manifest


def _failure(directory: Path, findings: list[str], remedy: str = "") -> VerificationError:
    listed = "\n".join(f"  {finding}" for finding in findings)
    return VerificationError(f"verify.shards: {directory} has {len(findings)} finding(s){remedy}:\n{listed}")


def _reports(directory: Path, manifest: Manifest, config: VerifyConfig) -> list[ShardReport]:
    classes = len(manifest.classes)
    checks = [ShardCheck(str(directory / shard.name), shard, classes, config.deep) for shard in manifest.shards]
    reports = []
    with (
        closing(run_tasks(check_shard, checks, config.workers)) as results,
        tqdm(total=manifest.samples, unit="sample", disable=None) as bar,
    ):
        for report in results:
            bar.update(report.samples)
            reports.append(report)
    return sorted(reports, key=lambda report: report.name)


def _shard_findings(reports: list[ShardReport]) -> Iterator[str]:
    for report in reports:
        yield from report.findings
        if report.more:
            yield f"{report.name}: {report.more} more"


def _total_findings(manifest: Manifest, reports: list[ShardReport]) -> Iterator[str]:
    """Yield totals that are not those of the shards."""
    # What a shard holds is compared with its own record; a shard in pieces need not be told of here once more.
    seen = {name: sum(getattr(shard, name) for shard in manifest.shards) for name in ("samples", "bytes")}
    if all(report.whole for report in reports):
        seen |= {name: max(getattr(report, name) for report in reports) for name in ("max_height", "max_width")}
    for name, value in seen.items():
        if value != getattr(manifest, name):
            yield f"{MANIFEST_NAME}: {getattr(manifest, name)} {name}, the shards hold {value}"
    treated = sum(manifest.treatments.values())
    if treated != manifest.samples:
        yield f"{MANIFEST_NAME}: treatments of {treated} samples, there are {manifest.samples}"
    for name, times in Counter(shard.name for shard in manifest.shards).items():
        if times > 1:
            yield f"{MANIFEST_NAME}: lists {name} {times} times"


def _key_findings(reports: list[ShardReport]) -> Iterator[str]:
    """Yield keys that occur twice, at the place of each but the first."""
    keys = np.concatenate([report.keys for report in reports])
    places = np.repeat(np.arange(len(reports)), [len(report.keys) for report in reports])
    order = np.argsort(keys, kind="stable")
    twice = order[1:][(keys[order[1:]] == keys[order[:-1]]) & (keys[order[1:]] >= 0)]
    for at in twice.tolist():
        yield f"{reports[places[at]].name}: key {keys[at]:09d} occurs twice"


def _rejected_findings(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Yield where the list of rejected images is not the manifest's."""
    path = directory / REJECTED_NAME
    if not path.is_file():
        if manifest.rejected:
            yield f"{REJECTED_NAME}: missing, there were {manifest.rejected} rejected images"
    elif not manifest.rejected:
        yield f"{REJECTED_NAME}: not in the manifest"
    elif hashlib.sha256(content := path.read_bytes()).hexdigest() != manifest.rejected_sha256:
        yield f"{REJECTED_NAME}: SHA-256 is not the manifest's"
    elif (rows := count_rejected(content)) != manifest.rejected:
        yield f"{MANIFEST_NAME}: {manifest.rejected} rejected, {REJECTED_NAME} lists {rows}"


def _stray_findings(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Yield files that readers of the folder might take for data."""
    listed = {shard.name for shard in manifest.shards}
    listed |= {index_path(Path(name)).name for name in listed} | {MANIFEST_NAME, REJECTED_NAME, LEDGER_NAME}
    for stray in sorted(entry.name for entry in directory.iterdir() if entry.name not in listed):
        if stray.endswith((".tar", ".idx", ".tmp")):
            yield f"{stray}: not in the manifest"


def _shuffle_warning(directory: Path, quality: ShuffleQuality) -> str:
    alike = "class" if quality.classes <= quality.folders else "source folder"
    return (
        f"warning: shuffle quality {quality.score:.2f} is below {LEAST_QUALITY}: neighbors are of one {alike} more "
        "often than in a random order, and so will samples of a batch be; "
        f"`coldpress shard source={directory} output=...` shuffles them anew."
    )


def _table(
    directory: Path, manifest: Manifest, reports: list[ShardReport], quality: ShuffleQuality, findings: int
) -> str:
    runs = f" (class runs of {quality.run:.2f}, {quality.random_run:.2f} if random)" if manifest.classes else ""
    rows = {
        "shards": f"{len(reports)} in {directory}",
        "classes": len(manifest.classes) or "none (unlabelled)",
        "samples": sum(report.samples for report in reports),
        "decoded": sum(report.decoded for report in reports),
        "bytes": sum(report.bytes for report in reports),
        "largest": f"{max(r.max_width for r in reports)} wide, {max(r.max_height for r in reports)} high",
        "fingerprint": manifest.fingerprint[:16],
        "shuffle": f"{quality.score:.2f}{runs}",
        "rejected": manifest.rejected,
        "findings": findings,
    }
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())
