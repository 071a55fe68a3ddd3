"""Checkpoints on disk: how one is published, which of them are whole, and what becomes of the others.

A checkpoint is written under a temporary name, synced, listed with checksums, renamed, and only then named as the
latest: whatever kills the run, what looks like a checkpoint is one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STATE_NAME = "state.json"
MANIFEST_NAME = "MANIFEST.json"
LATEST_NAME = "latest"
PREFIX = "step_"
TEMPORARY = ".tmp-"
DAMAGED = "damaged-"
# Beside each file that a process has written: its size and checksum, until the manifest has them.
_LISTING = ".listing"

log = logging.getLogger(__name__)


def checkpoints(directory: Path) -> list[Path]:
    """Return every published checkpoint below a directory, oldest first, valid or not."""
    return sorted(c for c in directory.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", c.name))


def name_of(step: int) -> str:
    """Return the name of the checkpoint after a step."""
    return f"{PREFIX}{step:08d}"


def temporary_of(checkpoint: Path) -> Path:
    """Return where a checkpoint is written until it is published."""
    return checkpoint.with_name(TEMPORARY + checkpoint.name)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(PREFIX))


def content_of(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself, nothing if that cannot be read."""
    try:
        content: dict[str, Any] = json.loads((checkpoint / STATE_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return content


def progress_of(checkpoint: Path) -> float:
    """Return the share of its run's budget that was spent when a checkpoint was saved, 0 if it does not tell."""
    return float(content_of(checkpoint).get("progress", 0.0))


def newest_valid(directory: Path) -> Path | None:
    """Return the newest checkpoint whose every file has its listed size and checksum, None if there are none.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    candidates = checkpoints(directory)
    for candidate in reversed(candidates):
        damage = find_damage(candidate)
        if damage is None:
            return candidate
        log.warning("checkpoint %s is damaged (%s); trying the one before", candidate, damage)
    damaged = len(candidates) + len(list(directory.glob(f"{DAMAGED}*")))
    if damaged:
        raise ValueError(
            f"{directory}: none of its {damaged} checkpoints is whole; "
            "mend the file system, or say overwrite=true to start anew."
        )
    return None


def asked_for(directory: Path, word: str) -> Path:
    """Return the checkpoint that a user names: `latest` is the newest whole one, a number that after this step.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    if word == "latest":
        found = newest_valid(directory)
        if found is None:
            raise ValueError(f"checkpoint: no valid checkpoint in {directory}; train first, or say checkpoint=init.")
        return found
    if not word.isdigit():
        raise ValueError(f"checkpoint must be latest, init or a step number, got {word}.")
    chosen = directory / name_of(int(word))
    damage = find_damage(chosen) if chosen.exists() else "there is none"
    if damage:
        there = ", ".join(str(step_of(checkpoint)) for checkpoint in checkpoints(directory))
        raise ValueError(f"checkpoint: step {word} is not usable ({damage}); steps there: {there or 'none'}.")
    return chosen


def set_aside(directory: Path, newest: Path) -> None:
    """Rename the damaged checkpoints that are newer than the newest valid one, so that they can be looked at."""
    for checkpoint in checkpoints(directory):
        if checkpoint.name > newest.name:
            aside = _free(checkpoint.with_name(f"{DAMAGED}{checkpoint.name}"))
            checkpoint.rename(aside)
            log.warning("set aside as %s; delete it when you have looked at it", aside)


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, None when nothing is.

    Raises:
        ValueError: it cannot be read today, which says nothing of what is in it.
    """
    try:
        listing = json.loads((checkpoint / MANIFEST_NAME).read_text())
        # A network file system leaves .nfs files where somebody still has open what was deleted.
        there = {path.name for path in checkpoint.iterdir() if not path.name.startswith(".nfs")}
        if strangers := there - listing.keys() - {MANIFEST_NAME}:
            return f"{min(strangers)} is not listed"
        for name, expected in listing.items():
            if describe(checkpoint / name) != expected:
                return f"{name} changed"
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return str(error)
    except OSError as error:
        raise ValueError(f"{checkpoint} cannot be read ({error}); mend the file system, then try again.") from error
    return None


def clear_leftovers(directory: Path) -> None:
    """Delete what a life that was killed has left half written."""
    for leftover in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)


def seal(path: Path) -> None:
    """Sync a written file, and note size and checksum beside it for the manifest."""
    sync(path)
    write(path.with_name(path.name + _LISTING), json.dumps(describe(path)))


def publish(final: Path, names: Iterable[str], content: dict[str, Any]) -> None:
    """Make a checkpoint of sealed files of these names, durable and whole or not there at all."""
    temporary, listing = temporary_of(final), {}
    # Asked for by name: what a network file system lists of a directory may be old.
    for name in names:
        note = temporary / (name + _LISTING)
        listing[name] = json.loads(note.read_text())
        note.unlink()
    write(temporary / STATE_NAME, json.dumps(content, indent=1))
    listing[STATE_NAME] = describe(temporary / STATE_NAME)
    write(temporary / MANIFEST_NAME, json.dumps(listing, indent=1))
    sync(temporary)
    if final.exists():
        # A damaged one that could not be set aside; named so that a death between the two lines is cleaned up.
        final.rename(final.with_name(f"{TEMPORARY}old-{final.name}"))
    temporary.rename(final)
    sync(final.parent)


def name_latest(final: Path) -> None:
    """Write down which checkpoint is the newest, for people; a resume looks for itself."""
    latest = final.with_name(LATEST_NAME)
    write(latest.with_suffix(".tmp"), final.name)
    os.replace(latest.with_suffix(".tmp"), latest)
    sync(final.parent)


def describe(path: Path) -> dict[str, Any]:
    """Return the size and the SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def write(path: Path, text: str) -> None:
    """Write a small file durably."""
    path.write_text(text)
    sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(path: Path) -> Path:
    """Return the path, with a number if there is one of this name."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in range(2, 1000))
    return path if not path.exists() else next(each for each in numbered if not each.exists())
