import json
import socket
import urllib.request

import pytest

from monitoring.sinks import MonitorConfig, MultiSink, NullSink, build_sinks


def open_sinks(config, directory, rank=0):
    directory.mkdir(parents=True, exist_ok=True)
    return build_sinks(config, directory, run="a", rank=rank, local_rank=rank, world_size=2, resume_step=0)


def target(directory, rank):
    [entry] = json.loads((directory.parent / ".targets" / f"{directory.name}-{rank}.json").read_text())
    return entry


def scrape(entry):
    return urllib.request.urlopen(f"http://{entry['targets'][0]}/metrics").read().decode()


def test_rank_0_reports_everywhere_and_others_to_their_endpoint(tmp_path):
    directory = tmp_path / "runs" / "a"
    sinks = [open_sinks(MonitorConfig(), directory, rank) for rank in (0, 1)]
    for rank, sink in enumerate(sinks):
        sink.write(3, {"loss": rank + 0.5})
        assert f"coldpress_loss {rank + 0.5}" in scrape(target(directory, rank))
    for sink in sinks:
        sink.close()
    [line] = (directory / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == 0.5
    assert not list((tmp_path / "runs" / ".targets").iterdir())


def test_without_prometheus_only_files_are_left(tmp_path):
    directory = tmp_path / "runs" / "a"
    for rank in (0, 1):
        sink = open_sinks(MonitorConfig(prometheus=False), directory, rank)
        sink.write(1, {"loss": 1.0})
        sink.close()
    assert [p.name for p in directory.parent.iterdir()] == ["a"]
    assert [p.name for p in directory.iterdir()] == ["metrics.jsonl"]


def test_port_is_base_plus_local_rank_and_any_when_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sink = open_sinks(MonitorConfig(port=port - 1), tmp_path / "a", rank=1)
        assert target(tmp_path / "a", 1)["targets"] != [f"127.0.0.1:{port}"]
        assert "coldpress_run_info" in scrape(target(tmp_path / "a", 1))
        sink.close()
    sink = open_sinks(MonitorConfig(port=port - 1), tmp_path / "a", rank=1)
    assert target(tmp_path / "a", 1)["targets"] == [f"127.0.0.1:{port}"]
    sink.close()


def test_an_endpoint_that_cannot_be_opened_is_one_warning(tmp_path, caplog):
    sink = open_sinks(MonitorConfig(address="192.0.2.1"), tmp_path / "a")
    sink.write(1, {"loss": 1.0})
    sink.write(2, {"loss": 1.0})
    sink.close()
    assert [r.levelname for r in caplog.records if "endpoint" in r.message] == ["WARNING"]
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 2


def test_config_refuses_an_impossible_port():
    with pytest.raises(ValueError, match=r"^monitor\.port must be in \[0, 65535\], got 70000; "):
        MonitorConfig(port=70000)


@pytest.mark.parametrize("peak", [-1.0, float("inf")])
def test_config_refuses_an_impossible_peak(peak):
    with pytest.raises(ValueError, match=rf"^monitor\.peak_teraflops must be at least 0, got {peak:g}; 0 takes "):
        MonitorConfig(peak_teraflops=peak)


@pytest.mark.parametrize("sink", [NullSink(), MultiSink([])])
def test_even_sinks_that_go_nowhere_check_names(sink):
    sink.write(1, {"loss": 1.0})
    with pytest.raises(AssertionError, match="accuracy"):
        sink.write(1, {"accuracy": 1.0})
    sink.close()
