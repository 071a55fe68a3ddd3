"""Real servers on loopback, with the shipped configuration, thrown away after use."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MONITORING = Path(__file__).parents[2] / "monitoring"
# Prometheus forwards a new target file within 5 seconds.
PATIENCE = 30


class Server:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **query: Any) -> Any:
        """Return the data of an answer. Raises OSError for an error, too."""
        with urllib.request.urlopen(f"{self.url}/{path}?{urllib.parse.urlencode(query)}", timeout=5) as reply:
            return json.load(reply)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an expression, now."""
        return list(self.get("api/v1/query", query=expression)["result"])

    def history(self, expression: str, begin: float, end: float, step: float) -> list[dict[str, Any]]:
        """Return the series of an expression over a time."""
        return list(self.get("api/v1/query_range", query=expression, start=begin, end=end, step=step)["result"])

    def wait(self, expression: str, count: int) -> list[dict[str, Any]]:
        """Return the series once there are so many."""
        return self._until(expression, lambda found: len(found) == count)

    def some(self, expression: str) -> list[dict[str, Any]]:
        """Return the series once there are any."""
        return self._until(expression, lambda found: bool(found))

    def _until(self, expression: str, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        end = time.monotonic() + PATIENCE
        while not enough(found := self._try(expression)):
            assert time.monotonic() < end, (expression, found, self._try("up"))
            time.sleep(0.2)
        return found

    def _try(self, expression: str) -> list[dict[str, Any]]:
        try:
            return self.query(expression)
        except OSError:  # not yet listening
            return []


def lay_out(root: Path, clock: str) -> Path:
    """Put the shipped files beside an empty runs/, as in a checkout, with faster clocks; return the configuration."""
    shutil.copytree(MONITORING / "prometheus", root / "monitoring" / "prometheus")
    config = root / "monitoring" / "prometheus" / "prometheus.yml"
    text, replaced = re.subn(r"(scrape|evaluation)_interval: 15s", rf"\1_interval: {clock}", config.read_text())
    assert replaced == 2
    config.write_text(text)
    (root / "runs" / ".targets").mkdir(parents=True)
    return config


@contextmanager
def serving(log: Path, command: Callable[[int], Sequence[str | Path]]) -> Iterator[int]:
    """Start a program on a free port of loopback, which `command` is asked with; the port, until it is ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as out, subprocess.Popen(command(port), stdout=out, stderr=out) as process:
        try:
            yield port
        finally:
            process.terminate()


@contextmanager
def prometheus(program: str, config: Path, place: Path) -> Iterator[Server]:
    """Start a Prometheus that keeps its things in `place`."""
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={place / 'tsdb'}"]
    with serving(place / "log", lambda port: [*command, f"--web.listen-address=127.0.0.1:{port}"]) as port:
        yield Server(port)
