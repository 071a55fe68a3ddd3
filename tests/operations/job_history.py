"""What Slurm says about a job, from its submission to its end, and what was done to it meanwhile."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from slurm.cluster import SlurmCluster

INTERVAL = 0.2  # seconds; a question costs slurmctld next to nothing


@dataclass(frozen=True)
class Event:
    """Something that happened, at a Unix time; a blow has the step at which it hit the run."""

    time: float
    text: str
    step: int | None = None


class JobHistory:
    """`with JobHistory(cluster, job) as history:`; without an accounting database, asking is how one knows."""

    def __init__(self, cluster: SlurmCluster, job: str) -> None:
        self.job = job
        self.events: list[Event] = []
        self._cluster = cluster
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> JobHistory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def note(self, text: str, step: int | None = None) -> None:
        """Write down what happened now."""
        self.events.append(Event(time.time(), text, step))

    def _follow(self) -> None:
        said = ""
        while not self._ended.is_set():
            facts = self._cluster.job(self.job)
            now = f"job {facts['JobState']}"
            now += f" on {facts['NodeList']}" if facts["JobState"] == "RUNNING" else ""
            if now != said:
                self.note(now)
                said = now
            self._ended.wait(INTERVAL)
