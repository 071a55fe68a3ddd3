"""What is made of the lines of Slurm's clients; tests/slurm has the clients themselves."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from monitoring.exporters.reading import Cached
from monitoring.exporters.slurm_exporter import SlurmExporterConfig, SlurmReader
from monitoring.metrics import PREFIX

SQUEUE = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
*RestartCnt*) printf '0                   \\n3                   \\n' ;;
*) cat <<'LINES'
RUNNING|main|None
RUNNING|main|None
PENDING|main|ReqNodeNotAvail, UnavailableNodes:n[1-7]
PENDING|main|ReqNodeNotAvail, Reserved for maintenance
PENDING|a,b|Resources
PENDING|main|launch failed requeued held (n7)
PENDING|main|(null)
COMPLETED|main|None
LINES
esac
"""
SINFO = """#!/bin/sh
echo "$@" >> "$CALLS"
cat <<'LINES'
n1|idle
n1|idle
n2|down*
n3|mixed-
n4|idle~
n5|allocated
LINES
"""


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """A directory of clients, the first on the PATH; what they were asked is in `calls`."""
    for name, text in (("squeue", SQUEUE), ("sinfo", SINFO)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path


def said(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    lines = [line.rpartition(" ") for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]
    return {name.removeprefix(PREFIX + "slurm_"): float(value) for name, _, value in lines}


def test_jobs_reasons_and_nodes_are_counted(clients):
    found = said(Cached(SlurmReader("coldpress", 10).read, 30))
    assert found.pop("read_timestamp_seconds") > 1e9
    assert 0 <= found.pop("read_seconds") < 10
    assert found == {
        "up": 1,
        'jobs{partition="main",state="running"}': 2,
        'jobs{partition="main",state="pending"}': 4,
        'jobs{partition="a,b",state="pending"}': 1,
        'jobs{partition="main",state="completed"}': 1,
        'jobs_pending{reason="ReqNodeNotAvail"}': 2,
        'jobs_pending{reason="Resources"}': 1,
        'jobs_pending{reason="launch failed requeued held"}': 1,
        'jobs_pending{reason="other"}': 1,
        "job_restarts": 3,
        'nodes{state="idle"}': 2,
        'nodes{state="down"}': 1,
        'nodes{state="mixed"}': 1,
        'nodes{state="allocated"}': 1,
        "nodes_not_responding": 1,
    }


def test_the_controller_is_not_asked_at_every_scrape(clients):
    collector = Cached(SlurmReader("coldpress", 10).read, 30)
    for _ in range(5):
        said(collector)
    assert len((clients / "calls").read_text().splitlines()) == 3


@pytest.mark.parametrize("ending", ["echo nobody there >&2; exit 1", "exec sleep 60"], ids=["fails", "hangs"])
def test_a_controller_that_is_down_is_the_only_number(clients, ending, caplog):
    reader = SlurmReader("coldpress", 0.5)
    (clients / "sinfo").write_text(f"#!/bin/sh\n{ending}\n")
    for _ in range(2):
        found = said(Cached(reader.read, 30))
        assert found.keys() == {"up", "read_timestamp_seconds", "read_seconds"}
        assert found["up"] == 0
    assert len(caplog.records) == 1
    assert "Slurm does not answer: " in caplog.text
    (clients / "sinfo").write_text(SINFO)
    assert said(Cached(reader.read, 30))["up"] == 1


@pytest.mark.parametrize("seconds", [0, 61])
def test_an_impossible_timeout_is_refused(seconds):
    with pytest.raises(ValueError, match=rf"^timeout_seconds must be in \(0, 60\], got {seconds}; 3 is usual\.$"):
        SlurmExporterConfig(timeout_seconds=seconds)
