"""What a process says of itself at any moment, also where its main thread is held up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import Histogram


@dataclass(frozen=True)
class Live:
    """Where a process is, and how long its steps and their phases have taken."""

    phase: str
    # By names of the catalogue.
    numbers: Mapping[str, float]
    durations: Sequence[Histogram]
