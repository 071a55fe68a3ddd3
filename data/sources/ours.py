"""A set that coldpress wrote, as a source: whole as its manifest says, or not at all."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data.manifest import LEDGER_NAME, MANIFEST_NAME, Manifest, Shard, index_path
from data.publishing import file_sha256
from data.rejected import REJECTED_NAME

_OUR_WORDS = (b'"schema_version"', b'"index_sha256"')  # one flipped byte leaves one of them


def refuse_unfinished(folder: Path) -> None:
    """Raise ValueError for a set that an interrupted command left."""
    if (folder / LEDGER_NAME).exists() and not (folder / MANIFEST_NAME).exists():
        raise ValueError(
            f"shard.source: {folder} is an unfinished set of shards; finish it with the command that began it, or "
            "give its own source."
        )


def whole_set(folder: Path, tars: list[Path]) -> Manifest | None:
    """Return the manifest of a set of ours after comparing every tar with it; None for tars of others.

    Raises ValueError when the manifest is damaged, or a tar is missing, not listed, or of other bytes.
    """
    if not _is_ours(folder / MANIFEST_NAME):
        return None
    manifest = Manifest.load(folder)
    listed, present = {shard.name for shard in manifest.shards}, {tar.name for tar in tars}
    for names, what in ((listed - present, "is missing"), (present - listed, f"is not in its {MANIFEST_NAME}")):
        if names:
            raise _not_whole(folder, f"{min(names)} {what}")
    _refuse_other_bytes(folder, manifest)
    return manifest


def files_beside(manifest: Manifest) -> frozenset[str]:
    """Return the names of what coldpress writes beside the tars of a set."""
    indexes = (index_path(Path(shard.name)).name for shard in manifest.shards)
    return frozenset((*indexes, MANIFEST_NAME, REJECTED_NAME, LEDGER_NAME))


def _is_ours(path: Path) -> bool:
    """Tell our manifest, damaged or not, from a file of that name that others write."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return True
    return any(word in content for word in _OUR_WORDS)


def _refuse_other_bytes(folder: Path, manifest: Manifest) -> None:
    # Sharding decodes every image, which takes twenty times as long as this.
    for shard in manifest.shards:
        size = (folder / shard.name).stat().st_size
        if size != shard.bytes:
            raise _not_whole(folder, f"{shard.name} has {size} bytes, {MANIFEST_NAME} says {shard.bytes}")
    threads = len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=manifest.bytes, desc="checking", unit="B", disable=None) as bar,
    ):
        checksums = pool.map(file_sha256, [folder / shard.name for shard in manifest.shards])
        for shard, checksum in zip(manifest.shards, checksums, strict=True):
            _refuse_other_checksum(folder, shard, checksum)
            bar.update(shard.bytes)


def _refuse_other_checksum(folder: Path, shard: Shard, checksum: str) -> None:
    if checksum != shard.sha256:
        raise _not_whole(folder, f"the bytes of {shard.name} are not those that {MANIFEST_NAME} names")


def _not_whole(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"shard.source: {folder} is not a whole set: {what}; copy it again, or give its own source "
        f"(`coldpress verify shards={folder}` lists what is wrong)."
    )
