"""Whatever happens to an endpoint, who trains beside it does not notice."""

import shutil
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from monitoring.exporters import endpoint
from monitoring.exporters.endpoint import Endpoint, own_address
from monitoring.exporters.prometheus import PrometheusSink
from monitoring.live import Live
from monitoring.sinks import MonitorConfig, build_sinks

# Longer than anything here takes, shorter than a scraper that never reads would stay.
PATIENCE = 20


@pytest.fixture
def live():
    """What the process says when it is asked; a test puts an error in its place."""
    return [Live("forward", {"waiting": 0.0}, ())]


@pytest.fixture
def sink(tmp_path, live):
    def ask():
        if isinstance(live[0], Exception):
            raise live[0]
        return live[0]

    sink = PrometheusSink(tmp_path / "a", run="a", rank=0, world_size=1, address="127.0.0.1", port=0, live=ask)
    yield sink
    within(sink.close)


def within(action):
    """Do it, and assert that it comes to an end."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def scrape(sink):
    url = f"http://127.0.0.1:{sink.endpoint.port}/metrics"
    return urllib.request.urlopen(url, timeout=PATIENCE).read().decode()


def test_a_scrape_that_fails_is_the_scrapers_alone(sink, live, capfd):
    said, live[0] = live[0], RuntimeError("a heartbeat that stumbles")
    for step in (1, 2):
        with pytest.raises(urllib.error.HTTPError, match="500"):
            scrape(sink)
        sink.write(step, {"loss": 1.0})
    live[0] = said
    assert "coldpress_step 2.0" in scrape(sink)
    assert "a heartbeat that stumbles" in capfd.readouterr().err


def test_scrapers_that_never_ask_or_never_read_hold_nobody_up(sink):
    silent = [socket.create_connection(("127.0.0.1", sink.endpoint.port)) for _ in range(20)]
    for number, connection in enumerate(silent):
        # The half of a request, or a whole one whose answer nobody takes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n" + (b"\r\n" if number % 2 else b""))
    sink.write(5, {"loss": 1.0})
    assert "coldpress_step 5.0" in scrape(sink)
    # Nor does the end of a run wait for them.
    within(sink.close)
    for connection in silent:
        connection.close()


@pytest.mark.parametrize("ruin", ["gone", "a file", "another's"])
def test_what_becomes_of_the_target_directory_meanwhile(sink, tmp_path, ruin):
    targets = tmp_path / ".targets"
    if ruin == "another's":
        (targets / "a-0.json").write_text("[]")
    else:
        shutil.rmtree(targets)
    if ruin == "a file":
        targets.write_text("")
    sink.write(5, {"loss": 1.0})
    assert "coldpress_step 5.0" in scrape(sink)
    sink.close()
    if ruin == "another's":
        assert (targets / "a-0.json").read_text() == "[]"


@pytest.mark.parametrize(
    "address", ["192.0.2.1", "no.such.host.invalid", "a" * 70 + ".b", "a\0b"], ids=["far", "unknown", "long", "odd"]
)
def test_an_address_that_is_none_is_a_warning(tmp_path, address, caplog):
    directory = tmp_path / "a"
    directory.mkdir()
    config = MonitorConfig(address=address)
    sink = build_sinks(config, directory, run="a", rank=1, local_rank=1, world_size=2, resume_step=0)
    sink.write(1, {"loss": 1.0})
    sink.close()
    assert [record.levelname for record in caplog.records if "no metrics endpoint" in record.message] == ["WARNING"]


@pytest.mark.parametrize(
    ("node", "known_as", "address"),
    [
        ("", None, "127.0.0.1"),
        ("n7", "10.0.0.7", "10.0.0.7"),
        # As Debian has it, and as no name server knows it: whoever reaches the node may ask.
        ("n7", "127.0.1.1", "0.0.0.0"),
        ("n7", None, "0.0.0.0"),
    ],
)
def test_an_endpoint_answers_where_its_cluster_looks(node, known_as, address, monkeypatch):
    def resolve(name):
        assert name == node
        if known_as is None:
            raise socket.gaierror("no such name")
        return known_as

    monkeypatch.setenv("SLURMD_NODENAME", node)
    monkeypatch.setattr(endpoint.socket, "gethostbyname", resolve)
    assert own_address() == address


def test_no_thread_to_answer_with_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("monitoring.exporters.endpoint.start_http_server", refuse)
    directory = tmp_path / "a"
    directory.mkdir()
    sink = build_sinks(MonitorConfig(), directory, run="a", rank=1, local_rank=1, world_size=2, resume_step=0)
    sink.write(1, {"loss": 1.0})
    sink.close()
    assert "can't start new thread; the run goes on without" in caplog.text


def test_a_target_that_cannot_be_written_leaves_no_port_open(tmp_path, monkeypatch):
    opened = []
    stop = Endpoint.stop
    monkeypatch.setattr(Endpoint, "stop", lambda self: (opened.append(self.port), stop(self)))
    (tmp_path / ".targets").write_text("")
    with pytest.raises(OSError, match=r"\.targets"):
        PrometheusSink(tmp_path / "a", run="a", rank=0, world_size=1, address="127.0.0.1", port=0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", opened[0]), timeout=PATIENCE)


def test_writing_does_not_wait_for_a_scrape_under_way(sink, live):
    reached, released = threading.Event(), threading.Event()

    class Slow(dict):
        def items(self):
            reached.set()
            assert released.wait(PATIENCE)
            return super().items()

    live[0] = Live("forward", Slow(waiting=0.0), ())
    texts = []
    scraper = threading.Thread(target=lambda: texts.append(scrape(sink)))
    scraper.start()
    assert reached.wait(PATIENCE)
    began = time.monotonic()
    sink.write(9, {"loss": 1.0})
    assert time.monotonic() - began < PATIENCE / 2
    released.set()
    scraper.join(PATIENCE)
    assert "coldpress_waiting 0.0" in texts[0]
