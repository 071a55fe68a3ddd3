"""The checkpoints of a run that goes on: each one as it is published, until the run has ended."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint_files import checkpoints, find_damage
from pipeline.distributed import from_main, on_main
from pipeline.run_directory import state_of

INTERVAL = 10.0  # seconds between two looks
# A job that follows another is often there first.
LONGEST_START = 900.0
ENDED = ("finished", "failed")

log = logging.getLogger(__name__)


def wait_for_run(directory: Path) -> None:
    """Wait until there is a run.

    Raises:
        ValueError: there is none after a quarter of an hour.
    """
    end = time.monotonic() + LONGEST_START
    if not state_of(directory):
        log.info("waiting for a run in %s", directory)
    while not state_of(directory):
        if time.monotonic() > end:
            raise ValueError(f"run: no run in {directory} after {LONGEST_START / 60:g} minutes; start it first.")
        time.sleep(INTERVAL)


def as_published(directory: Path, done: Callable[[str], bool]) -> Iterator[Path]:
    """Yield each checkpoint of a run that is not done, oldest first, and stop when the run has ended.

    Every process must iterate. What is yielded is a copy that stays while it is looked at: the run deletes its own.
    """
    seen: set[str] = set()
    place = directory / "eval" / ".following"
    while True:
        found = from_main(on_main(lambda: _next(directory, place, seen, done)))
        assert found is not None
        if found.copy is not None:
            yield found.copy
            on_main(lambda: shutil.rmtree(place, ignore_errors=True))
        elif found.ended:
            return
        else:
            time.sleep(INTERVAL)


@dataclass(frozen=True)
class _Found:
    """A copy of a checkpoint, if there is a new one; otherwise whether no more will come."""

    copy: Path | None
    ended: bool = False


def _next(directory: Path, place: Path, seen: set[str], done: Callable[[str], bool]) -> _Found:
    """Look for the oldest checkpoint that is neither done nor was seen before."""
    # Asked first: what a run leaves at its end is there by then.
    state = state_of(directory)
    for checkpoint in checkpoints(directory / "checkpoints"):
        if checkpoint.name in seen or done(checkpoint.name):
            continue
        seen.add(checkpoint.name)
        if pinned := _pin(checkpoint, place):
            return _Found(pinned)
    if state in ENDED:
        log.info("the run has %s", state)
    return _Found(None, state in ENDED)


def _pin(checkpoint: Path, place: Path) -> Path | None:
    """Return a copy of a checkpoint, None if it has gone meanwhile or is damaged."""
    pinned = place / checkpoint.name
    shutil.rmtree(place, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, pinned, copy_function=_link)
    except OSError:
        # Deleted while it was copied: it was none of those that are kept.
        return None
    damage = find_damage(pinned)
    if damage:
        log.warning("%s is left out: %s", checkpoint, damage)
    return None if damage else pinned


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except PermissionError:  # a file system without links
        shutil.copyfile(source, target)
