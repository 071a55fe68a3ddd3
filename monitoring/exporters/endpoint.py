"""An HTTP endpoint for Prometheus, and the file by which it is found."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

TARGETS = ".targets"
AUTO = "auto"
LOOPBACK = "127.0.0.1"
WILDCARDS = ("0.0.0.0", "::")
# What Debian's /etc/hosts has for a host's own name: nobody else finds it there.
OF_ITSELF = (LOOPBACK, "127.0.1.1")


class Endpoint:
    """Serves what a collector says at each scrape, on threads of its own.

    The target file goes when the endpoint is closed and stays when the process is killed: alerts on what is lost look
    for it.
    """

    def __init__(self, collector: Collector, address: str, port: int, target: Path, labels: Mapping[str, str]) -> None:
        """Open the endpoint, on any free port when `port` is 0 or taken, and publish it with these labels.

        Raises:
            OSError: the address is not one of this machine, or the target file cannot be written.
        """
        address = own_address() if address == AUTO else address
        registry = CollectorRegistry()
        registry.register(collector)
        self._server, self._thread = _serve(registry, address, port)
        self.port: int = self._server.server_port
        host = node_name() if address in WILDCARDS else address
        self._target = target
        self._content = json.dumps([{"targets": [f"{host}:{self.port}"], "labels": dict(labels)}])
        try:
            _publish(target, self._content)
        except OSError:
            self.stop()
            raise

    def close(self) -> None:
        """Take the target back and stop; a successor's target of the same name stays."""
        with suppress(OSError, UnicodeError):
            if self._target.read_text() == self._content:
                self._target.unlink()
        self.stop()

    def stop(self) -> None:
        """Answer no more, as if the process were gone."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def node_name() -> str:
    """Return the name of this node, Slurm's if it has one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def own_address() -> str:
    """Return loopback, or the address by which a Slurm cluster knows this node; the wildcard if none is known."""
    if not (name := os.environ.get("SLURMD_NODENAME")):
        return LOOPBACK
    try:
        found = socket.gethostbyname(name)
    except OSError:
        return WILDCARDS[0]
    return WILDCARDS[0] if found in OF_ITSELF else found


def _serve(registry: CollectorRegistry, address: str, port: int) -> tuple[WSGIServer, threading.Thread]:
    try:
        return start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        log.warning("port %d is taken, the metrics endpoint takes another", port)
        return start_http_server(0, addr=address, registry=registry)


def _publish(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that Prometheus' *.json does not match.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content)
    # Prometheus runs as another user.
    temporary.chmod(0o644)
    os.replace(temporary, path)
