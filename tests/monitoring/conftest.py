"""Real programs, and the shipped configuration under a real Prometheus."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "monitoring"
# Debian's name for it.
DEBIAN = {"alertmanager": "prometheus-alertmanager", "amtool": "prometheus-alertmanager"}


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """Return the path of a program, or skip; CI must have it."""

    def find(name: str) -> str:
        path = shutil.which(name) or shutil.which(DEBIAN.get(name, name))
        if path is None:
            reason = f"{name} is not installed (Debian package {DEBIAN.get(name, 'prometheus')})"
            pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
        return path

    return find


# Prometheus forwards a new target file within 5 seconds.
PATIENCE = 30


class Server:
    """A running Prometheus."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path, **query):
        with urllib.request.urlopen(f"{self.url}/{path}?{urllib.parse.urlencode(query)}", timeout=5) as reply:
            return json.load(reply)["data"]

    def query(self, expression):
        return self.get("api/v1/query", query=expression)["result"]

    def wait(self, expression, count):
        end = time.monotonic() + PATIENCE
        while len(found := self._try(expression)) != count:
            assert time.monotonic() < end, (expression, found, self._try("up"))
            time.sleep(0.2)
        return found

    def some(self, expression):
        end = time.monotonic() + PATIENCE
        while not (found := self._try(expression)):
            assert time.monotonic() < end, expression
            time.sleep(0.2)
        return found

    def _try(self, expression):
        try:
            return self.query(expression)
        except OSError:  # not yet listening
            return []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The shipped files beside an empty runs/, as in a checkout; only the clocks are faster."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "prometheus", root / "monitoring" / "prometheus")
    config = root / "monitoring" / "prometheus" / "prometheus.yml"
    text, replaced = re.subn(r"(scrape|evaluation)_interval: 15s", r"\1_interval: 500ms", config.read_text())
    assert replaced == 2
    config.write_text(text)
    (root / "runs" / ".targets").mkdir(parents=True)
    return root


@contextmanager
def serving(log, command):
    """Start a program on a free port of loopback, which `command` is asked with; the port, until it is ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as out, subprocess.Popen(command(port), stdout=out, stderr=out) as process:
        yield port
        process.terminate()


@pytest.fixture(scope="session", name="serving")
def serving_fixture():
    return serving


@pytest.fixture(scope="module")
def server(checkout, program):
    command = [
        program("prometheus"),
        f"--config.file={checkout / 'monitoring' / 'prometheus' / 'prometheus.yml'}",
        f"--storage.tsdb.path={checkout / 'tsdb'}",
    ]
    with serving(checkout / "log", lambda port: [*command, f"--web.listen-address=127.0.0.1:{port}"]) as port:
        yield Server(port)
