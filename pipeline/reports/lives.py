"""The lives of a run, read from its log: when each began and ended, why, and what was lost between them.

metrics.jsonl forgets what a resume does again; train.log keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) (\w+) (.*)")
_BEGIN = re.compile(r"(\d+) process\(es\) on (.*)")
_START = re.compile(r"(?:resumed|starting) at step (\d+)$")
_REPORT = re.compile(r"\[ *(\d+)[ \]]")
_END = re.compile(r"(finished|stopped, saved) at step (\d+)")
BROKEN_OFF = "the log breaks off: killed, or its node was lost"


@dataclass
class Life:
    """One life; times are those of the log, in seconds."""

    began: float
    machine: str = ""
    first_step: int = 0
    # Of the last line, and the last step that it tells of.
    heard: float = 0.0
    last_step: int = 0
    end: str = ""
    # When each reported step was done.
    steps: dict[int, float] = field(default_factory=dict)

    def hear(self, when: float, level: str, text: str) -> None:
        """Take in one line of the log."""
        self.heard = when
        if started := _START.match(text):
            self.first_step = self.last_step = int(started[1])
        elif report := _REPORT.match(text):
            self.last_step = max(self.last_step, int(report[1]))
            # The first line that tells of it: a later one tells of a probe or a save.
            self.steps.setdefault(int(report[1]), when)
        elif ended := _END.match(text):
            self.last_step, self.end = int(ended[2]), text
        elif level == "ERROR":
            self.end = text

    def when(self, step: int) -> float:
        """Return when a step was done, between the reports around it."""
        known = [(self.first_step, self.began), *self.steps.items()]
        for (a, early), (b, late) in pairwise(known):
            if a <= step < b:
                return early + (late - early) * (step - a) / (b - a)
        return known[-1][1]


@dataclass(frozen=True)
class Loss:
    """What lies between two lives: steps that had to be done again, their time, and the time until the next began."""

    steps: int = 0
    seconds: float = 0.0
    pause: float = 0.0


def read_lives(path: Path) -> list[Life]:
    """Return the lives in a train.log, oldest first; none if there is no log."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    lives: list[Life] = []
    for found in filter(None, map(_LINE.match, lines)):
        when = datetime.fromisoformat(found[1]).timestamp() + int(found[2]) / 1000
        if begun := _BEGIN.match(found[4]):
            lives.append(Life(when, f"{begun[1]} x {begun[2]}" if begun[1] != "1" else begun[2]))
        if lives:
            lives[-1].hear(when, found[3], found[4])
    return lives


def losses(lives: Sequence[Life]) -> list[Loss]:
    """Return what was lost after each life but the last."""
    return [
        Loss(
            max(0, life.last_step - after.first_step),
            max(0.0, life.heard - life.when(after.first_step)) if life.last_step > after.first_step else 0.0,
            max(0.0, after.began - life.heard),
        )
        for life, after in pairwise(lives)
    ]
