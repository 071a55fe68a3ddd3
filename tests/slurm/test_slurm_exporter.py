"""The exporter of a cluster's queue asks a real Slurm."""

import socket
import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from monitoring.exporters.reading import Cached
from monitoring.exporters.slurm_exporter import SlurmReader
from monitoring.metrics import PREFIX

# Three answers take milliseconds; this machine may be busy.
TIMEOUT = 30
CANCELLED = 'jobs{partition="main",state="cancelled"}'


@pytest.fixture
def environment(slurm, monkeypatch):
    for name, value in slurm.environment().items():
        monkeypatch.setenv(name, value)


def said(reader):
    registry = CollectorRegistry()
    registry.register(Cached(reader.read, 1))
    lines = [line.rpartition(" ") for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]
    return {name.removeprefix(PREFIX + "slurm_"): float(value) for name, _, value in lines}


def test_jobs_by_state_reasons_restarts_and_nodes(slurm, environment, tmp_path):
    # Other tests have left jobs of their own, which have ended.
    reader = SlurmReader("counted", TIMEOUT)
    before = said(reader)
    options = ("--job-name=counted", "--output=/dev/null", "--ntasks=1", "--wrap=sleep 300")
    running = slurm.sbatch(*options, cwd=tmp_path)
    held = slurm.sbatch("--hold", "--partition=preemptible", *options, cwd=tmp_path)
    waiting = slurm.sbatch(f"--dependency=afterok:{running}", *options, cwd=tmp_path)
    requeued = slurm.sbatch("--partition=preemptible", *options, cwd=tmp_path)
    try:
        for job in (running, requeued):
            slurm.wait(job, "RUNNING")
        slurm.run("scontrol", "requeuehold", requeued)
        end = time.monotonic() + 60
        while (found := said(reader)).get('jobs_pending{reason="job requeued in held state"}') != 1:
            assert time.monotonic() < end, found
            time.sleep(0.2)
    finally:
        slurm.run("scancel", running, held, waiting, requeued)

    def more(name):
        return found.get(name, 0) - before.get(name, 0)

    assert found["up"] == 1
    assert more('jobs{partition="main",state="running"}') == 1
    assert more('jobs{partition="main",state="pending"}') == 1
    assert more('jobs{partition="preemptible",state="pending"}') == 2
    assert more("job_restarts") == 1
    assert more('jobs_pending{reason="JobHeldUser"}') == 1
    assert more('jobs_pending{reason="Dependency"}') == 1
    # What has ended is known for a while.
    while (found := said(reader)).get(CANCELLED, 0) < before.get(CANCELLED, 0) + 2:
        assert time.monotonic() < end, found
        time.sleep(0.2)
    nodes = {name: value for name, value in found.items() if name.startswith("nodes{")}
    assert sum(nodes.values()) == len(slurm.nodes)
    assert found["nodes_not_responding"] == 0


def test_a_node_that_is_down_is_one_of_that_state(slurm, environment):
    node = slurm.nodes[-1].name
    slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        assert said(SlurmReader("counted", TIMEOUT))['nodes{state="down"}'] == 1
    finally:
        slurm.run("scontrol", "update", f"nodename={node}", "state=resume")
    end = time.monotonic() + 60
    while 'nodes{state="down"}' in (found := said(SlurmReader("counted", TIMEOUT))):
        assert time.monotonic() < end, found
        time.sleep(0.2)


def test_a_controller_that_is_gone_is_down(slurm, environment, monkeypatch, tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        text = (slurm.root / "slurm.conf").read_text()
        lines = [f"SlurmctldPort={port}" if line.startswith("SlurmctldPort=") else line for line in text.splitlines()]
        (tmp_path / "slurm.conf").write_text("\n".join(lines) + "\n")
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
        began = time.monotonic()
        found = said(SlurmReader("counted", 3))
    assert found.keys() == {"up", "read_timestamp_seconds", "read_seconds"}
    assert found["up"] == 0
    assert time.monotonic() - began < 15
