"""What the harness knows of a run directory by looking at names only, and which checkpoints it has damaged itself."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from chaos.damage import DAMAGES
from chaos.small_disk import SmallDisk
from chaos.tiny_run import NAME

_Mark = tuple[str, int, int]


class RunFiles:
    """The files of one chain's run."""

    def __init__(self, runs: Path, disk: SmallDisk | None = None) -> None:
        self.runs = runs
        self.directory = runs / NAME
        self._checkpoints = self.directory / "checkpoints"
        self._damaged: set[_Mark] = set()
        self._disk = disk

    @property
    def small_disk(self) -> SmallDisk:
        """Return the disk of its own that the run is on."""
        assert self._disk is not None
        return self._disk

    def whole(self) -> list[Path]:
        """Return the published checkpoints that were not damaged, oldest first."""
        return [path for path in sorted(self._checkpoints.glob("step_*")) if _mark(path) not in self._damaged]

    def resumes_at(self) -> int:
        """Return the step that the next life has to begin with."""
        return max((int(path.name.removeprefix("step_")) for path in self.whole()), default=0)

    def damage(self, kind: str, draw: Random) -> bool:
        """Damage one file of the newest checkpoint, if another one is left to go on from."""
        if len(self.whole()) < 2:
            return False
        newest = self.whole()[-1]
        DAMAGES[kind](draw.choice(sorted(path for path in newest.rglob("*") if path.is_file())), draw)
        self._damaged.add(_mark(newest))
        return True

    def lose_latest(self, draw: Random) -> bool:
        """Lose the name of the newest checkpoint, or have another one in its place."""
        latest = self._checkpoints / "latest"
        if not latest.exists():
            return False
        if draw.random() < 0.5:
            latest.unlink()
        else:
            latest.write_text(draw.choice(("", "step_99999999", "\x00" * 13)))
        return True

    def unpublished(self) -> list[Path]:
        """Return what was being written when nobody went on writing."""
        return sorted(self._checkpoints.glob(".tmp-*"))

    def saving(self, since: float) -> bool:
        """Tell whether a checkpoint is being written that nobody had begun before."""
        return any(_changed(path) >= since for path in self.unpublished())

    def unnamed(self) -> bool:
        """Tell whether the newest checkpoint is published but not yet named as the latest."""
        latest = self._checkpoints / "latest"
        return bool(self.whole()) and (not latest.exists() or latest.read_text() != self.whole()[-1].name)

    def losses(self) -> list[tuple[int, float]]:
        """Return step and loss of every row of the metrics."""
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        return [(row["step"], row["loss"]) for row in rows]


def _mark(checkpoint: Path) -> _Mark:
    # A damaged one may be written anew under its name.
    status = checkpoint.stat()
    return checkpoint.name, status.st_ino, status.st_mtime_ns


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
