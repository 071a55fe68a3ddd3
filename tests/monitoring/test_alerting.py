"""From a run that stands still to the message: real Prometheus, real Alertmanager, a receiver of our own."""

import json
import queue
import re
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from monitoring.exporters.prometheus import PrometheusSink
from pipeline.heartbeat import Heartbeat

HERE = Path(__file__).parents[2] / "monitoring"


@pytest.fixture(scope="module")
def messages():
    """What arrives at the receivers, and the port on which they listen."""
    arrived = queue.Queue()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            arrived.put((self.path, content))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield arrived, receiver.server_port
        receiver.shutdown()


@pytest.fixture(scope="module")
def alertmanager(messages, program, serving, tmp_path_factory):
    """The port of an Alertmanager with the shipped configuration; only the clocks are faster."""
    directory = tmp_path_factory.mktemp("alertmanager")
    text = (HERE / "prometheus" / "alertmanager.yml").read_text()
    text = text.replace("127.0.0.1:9095", f"127.0.0.1:{messages[1]}")
    text, replaced = re.subn(r"group_(wait|interval): \w+", r"group_\1: 200ms", text)
    assert replaced == 2
    (directory / "alertmanager.yml").write_text(text)
    command = [
        program("alertmanager"),
        f"--config.file={directory / 'alertmanager.yml'}",
        f"--storage.path={directory}",
        "--cluster.listen-address=",
    ]
    with serving(directory / "log", lambda port: [*command, f"--web.listen-address=127.0.0.1:{port}"]) as port:
        yield port


@pytest.fixture(scope="module")
def checkout(checkout, alertmanager):
    """The same checkout with this Alertmanager, and without the minute that a stall must last."""
    config, rules = (checkout / "monitoring" / "prometheus" / name for name in ("prometheus.yml", "rules.yml"))
    text, replaced = re.subn("127.0.0.1:9093", f"127.0.0.1:{alertmanager}", config.read_text())
    assert replaced == 1
    config.write_text(text)
    rules.write_text(rules.read_text().replace("for: 1m", "for: 0s"))
    return checkout


def message(messages, alert, status, patience=40):
    """Return the first message that says this of an alert, and its path; groups come in any order."""
    end = time.monotonic() + patience
    while True:
        for path, content in list(messages[0].queue):
            for each in content["alerts"]:
                if (each["labels"]["alertname"], each["status"]) == (alert, status):
                    return path, each
        assert time.monotonic() < end, list(messages[0].queue)
        time.sleep(0.1)


def test_a_stall_is_paged_with_who_and_what_to_do_and_called_off_when_it_ends(messages, server, checkout):
    now = time.time()
    heartbeats = [Heartbeat(), Heartbeat()]
    heartbeats[0].begin(0)
    sinks = [
        PrometheusSink(checkout / "runs" / "a", run="a", rank=r, world_size=2, address="127.0.0.1", port=0, live=h.live)
        for r, h in enumerate(heartbeats)
    ]
    for sink in sinks:
        sink.write(7, {"last_step_timestamp_seconds": now - 1000})
    path, stalled = message(messages, "TrainingStalled", "firing")
    assert path == "/pages"
    assert stalled["annotations"]["summary"].startswith("run a has reported no step for 16m")
    assert stalled["annotations"]["action"]
    path, behind = message(messages, "TrainingRankBehind", "firing")
    assert (path, behind["labels"]["rank"]) == ("/pages", "1")
    for sink in sinks:
        sink.write(8, {"last_step_timestamp_seconds": time.time()})
    message(messages, "TrainingStalled", "resolved")
    for sink in sinks:
        sink.close()


def test_amtool_agrees(program):
    command = [program("amtool"), "check-config", HERE / "prometheus" / "alertmanager.yml"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_containers_mount_and_read_is_there():
    services = yaml.safe_load((HERE / "compose.yaml").read_text())["services"]
    volumes = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    assert all((HERE / volume).is_dir() for volume in volumes if volume.startswith("."))
    files = [o.split("=/coldpress/")[1] for s in services.values() for o in s.get("command", []) if "=/coldpress/" in o]
    assert len(files) == 2
    assert all((HERE.parent / file).is_file() for file in files)
