"""Command: jobs and nodes as Slurm's controller sees them, for Prometheus; one process a cluster."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from monitoring.exporters.reading import Cached, Reading
from monitoring.exporters.service import ExporterConfig, serve
from monitoring.metrics import SLURM

log = logging.getLogger(__name__)

PROGRAMS = ("squeue", "sinfo")
# The state of an array's job is its own. A reason may go on behind a comma, and a name may hold anything.
JOBS = ("squeue", "--noheader", "--states=all", "--array", "--format=%T|%P|%r")
RESTARTS = ("squeue", "--noheader", "--Format=RestartCnt:20")
NODES = ("sinfo", "--noheader", "--Node", "--format=%N|%T")
# Slurm's marks behind the state of a node; this one says that it does not answer.
SILENT = "*"
# Reasons are some hundred words and sentences of Slurm's own; what goes on with a comma or a bracket is about this job.
REASON = re.compile(r"[A-Za-z_ ]*[A-Za-z]")


@dataclass
class SlurmExporterConfig(ExporterConfig):
    """The exporter of a cluster's queue."""

    # However many scrapes there are, the controller is asked three questions in this time.
    every_seconds: float = 30.0
    # Whose restarts are counted: the name that slurm/train.sbatch gives to its jobs.
    job_name: str = "coldpress"
    # An answer that takes longer counts as none. Prometheus waits for 10 seconds.
    timeout_seconds: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.timeout_seconds <= 60:
            raise ValueError(f"timeout_seconds must be in (0, 60], got {self.timeout_seconds:g}; 3 is usual.")


def run(config: SlurmExporterConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ValueError: Slurm's clients are not installed here.
    """
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        raise ValueError(f"no {' or '.join(missing)} on the PATH; start slurm-exporter where Slurm's clients are.")
    reader = SlurmReader(config.job_name, config.timeout_seconds)
    serve(Cached(reader.read, config.every_seconds), config, "slurm")


class SlurmReader:
    """Asks the controller; without its answer there are no numbers but that there was none."""

    def __init__(self, job_name: str, timeout: float) -> None:
        self._job_name, self._timeout = job_name, timeout
        self._up = True

    def read(self) -> Reading:
        """Return what Slurm says now."""
        began, reading = time.monotonic(), Reading(SLURM)
        try:
            jobs = self._ask(*JOBS)
            restarts = self._ask(*RESTARTS, f"--name={self._job_name}")
            nodes = self._ask(*NODES)
        except (OSError, subprocess.SubprocessError) as error:
            self._say(error)
        else:
            self._up = True
            _add_jobs(reading, jobs)
            reading.add("slurm_job_restarts", sum(int(line) for line in restarts))
            _add_nodes(reading, nodes)
        reading.add("slurm_up", float(self._up))
        reading.add("slurm_read_timestamp_seconds", time.time())
        reading.add("slurm_read_seconds", time.monotonic() - began)
        return reading

    def _ask(self, *command: str) -> list[str]:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=self._timeout, check=True)
        return answer.stdout.splitlines()

    def _say(self, error: Exception) -> None:
        said = getattr(error, "stderr", None) or error
        if self._up:
            log.warning("Slurm does not answer: %s", str(said).strip())
        self._up = False


def _add_jobs(reading: Reading, lines: Iterable[str]) -> None:
    jobs = [line.split("|", 2) for line in lines]
    for (state, partition), number in Counter((state, partition) for state, partition, _ in jobs).items():
        reading.add("slurm_jobs", number, state.lower(), partition)
    reasons = Counter(_plain(reason) for state, _, reason in jobs if state == "PENDING")
    for reason, number in reasons.items():
        reading.add("slurm_jobs_pending", number, reason)


def _add_nodes(reading: Reading, lines: Iterable[str]) -> None:
    # A node has a line for each of its partitions.
    nodes = dict(line.split("|", 1) for line in lines)
    for state, number in Counter(_plain(state) for state in nodes.values()).items():
        reading.add("slurm_nodes", number, state)
    reading.add("slurm_nodes_not_responding", sum(SILENT in state for state in nodes.values()))


def _plain(text: str) -> str:
    """Return what a reason or a state begins with, without what it says of one job or node."""
    found = REASON.match(text)
    return found[0] if found else "other"
