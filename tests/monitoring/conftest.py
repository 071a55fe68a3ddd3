"""Real programs, and the shipped configuration under a real Prometheus."""

import os
import shutil
from collections.abc import Callable

import pytest
from operations import servers

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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The shipped files beside an empty runs/, as in a checkout; only the clocks are faster."""
    root = tmp_path_factory.mktemp("checkout")
    servers.lay_out(root, "500ms")
    return root


@pytest.fixture(scope="session")
def serving():
    return servers.serving


@pytest.fixture(scope="module")
def server(checkout, program):
    config = checkout / "monitoring" / "prometheus" / "prometheus.yml"
    with servers.prometheus(program("prometheus"), config, checkout) as running:
        yield running
