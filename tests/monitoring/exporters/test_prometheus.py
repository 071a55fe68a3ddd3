import json
import subprocess
import urllib.request

import pytest

from monitoring.exporters.prometheus import PrometheusSink
from monitoring.histogram import histogram
from monitoring.live import Live
from monitoring.metrics import CATALOG, LIVE, PHASE_SECONDS, PREFIX, STEP_SECONDS


@pytest.fixture
def sink(tmp_path):
    sink = PrometheusSink(tmp_path / "a", run="a", rank=0, world_size=1, address="127.0.0.1", port=0)
    yield sink
    sink.close()


def live():
    steps, phases = histogram(STEP_SECONDS), histogram(PHASE_SECONDS)
    phases.labels("data")
    for seconds in (0.002, 0.01, 0.011, 1000.0):
        steps.observe(seconds)
    numbers = {"phase_timestamp_seconds": 5.0, "phases_total": 7.0, "waiting": 1.0}
    return Live("forward", numbers, (phases, steps))


@pytest.fixture
def live_sink(tmp_path):
    sink = PrometheusSink(tmp_path / "b", run="b", rank=0, world_size=1, address="127.0.0.1", port=0, live=live)
    yield sink
    sink.close()


def scrape(sink):
    return urllib.request.urlopen(f"http://127.0.0.1:{sink.endpoint.port}/metrics").read().decode()


def names(text):
    return {line.split("{")[0].split()[0] for line in text.splitlines() if not line.startswith("#")}


def test_before_the_first_report_only_counters_are_known(sink):
    text = scrape(sink)
    counters = {PREFIX + metric.name for metric in CATALOG.values() if metric.kind == "counter"}
    assert names(text) == {"coldpress_run_info", "coldpress_start_timestamp_seconds", *counters}
    # What grows from nothing to one does not grow, to Prometheus.
    assert "coldpress_checkpoint_failures_total 0.0" in text


def test_every_metric_of_the_catalogue_is_exposed_with_its_kind_and_help(sink):
    sink.write(7, {name: 2.0 for name in CATALOG if name != "step"})
    text = scrape(sink)
    assert names(text) == {"coldpress_run_info", *(PREFIX + name for name in CATALOG)}
    for metric in CATALOG.values():
        assert f"# TYPE {PREFIX}{metric.name} {metric.kind}" in text
        assert f"# HELP {PREFIX}{metric.name} {metric.help}" in text
    assert "coldpress_step 7.0" in text


def test_a_partial_report_keeps_the_other_values(sink):
    sink.write(1, {"loss": 2.0, "steps_total": 1.0})
    sink.write(2, {"loss": 3.0})
    text = scrape(sink)
    assert "coldpress_loss 3.0" in text
    assert "coldpress_steps_total 1.0" in text
    assert "coldpress_step 2.0" in text


def test_promtool_has_nothing_to_say_against_the_names(sink, program):
    sink.write(7, {name: 2.0 for name in CATALOG if name != "step"})
    check = [program("promtool"), "check", "metrics"]
    result = subprocess.run(check, input=scrape(sink), text=True, capture_output=True)
    complaints = [line for line in result.stderr.splitlines() if line.strip()]
    # A total budget is not a counter, and the name says what it is.
    assert complaints == ['coldpress_budget_total non-counter metrics should not have "_total" suffix']


def test_every_scrape_asks_where_the_process_is(live_sink, program):
    text = scrape(live_sink)
    for metric in LIVE.values():
        assert f"# TYPE {PREFIX}{metric.name} {metric.kind}" in text
    assert 'coldpress_phase{phase="forward"} 1.0' in text
    assert "coldpress_phases_total 7.0" in text
    lines = [line.split() for line in text.splitlines() if line.startswith("coldpress_step_duration_seconds")]
    counts = {name.removeprefix("coldpress_step_duration_seconds"): float(value) for name, value in lines}
    # By hand: a bound belongs to its bucket.
    assert counts['_bucket{le="0.001"}'] == 0
    assert counts['_bucket{le="0.003"}'] == 1
    assert counts['_bucket{le="0.01"}'] == 2
    assert counts['_bucket{le="0.03"}'] == 3
    assert counts['_bucket{le="60.0"}'] == 3
    assert counts['_bucket{le="+Inf"}'] == counts["_count"] == 4
    assert counts["_sum"] == pytest.approx(1000.023)
    assert 'coldpress_phase_duration_seconds_count{phase="data"} 0.0' in text
    result = subprocess.run([program("promtool"), "check", "metrics"], input=text, text=True, capture_output=True)
    assert not result.stderr.strip()


def test_info_says_what_is_running(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    sink = PrometheusSink(tmp_path / "a", run="a", rank=0, world_size=8, address="127.0.0.1", port=0)
    [line] = [line for line in scrape(sink).splitlines() if line.startswith("coldpress_run_info{")]
    sink.close()
    assert 'job_id="42"' in line
    assert 'restart="3"' in line
    assert 'world_size="8"' in line


def test_a_wildcard_address_is_published_as_the_node(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    sink = PrometheusSink(tmp_path / "a", run="a", rank=5, world_size=8, address="0.0.0.0", port=0)
    [entry] = json.loads((tmp_path / ".targets" / "a-5.json").read_text())
    sink.close()
    assert entry["targets"] == [f"n7:{sink.endpoint.port}"]
    assert entry["labels"] == {"run": "a", "rank": "5", "node": "n7", "instance": "n7:5"}


def test_a_smaller_life_forgets_the_ranks_of_a_killed_larger_one(tmp_path):
    targets = tmp_path / ".targets"
    targets.mkdir()
    for name in ("a-0", "a-1", "a-2", "a-b-2", "a-x"):
        (targets / f"{name}.json").write_text("[]")
    sink = PrometheusSink(tmp_path / "a", run="a", rank=0, world_size=2, address="127.0.0.1", port=0)
    assert sorted(p.stem for p in targets.iterdir()) == ["a-0", "a-1", "a-b-2", "a-x"]
    sink.close()
    assert sorted(p.stem for p in targets.iterdir()) == ["a-1", "a-b-2", "a-x"]


def test_a_term_that_left_the_loss_is_no_longer_shown(sink):
    sink.write(1, {"loss": 2.0, "loss_tap1": 1.5, "loss_tap2": 0.5})
    sink.write(2, {"checkpoint_seconds": 1.0})
    assert {"coldpress_loss_tap1", "coldpress_loss_tap2"} <= names(scrape(sink))
    sink.write(3, {"loss": 0.5, "loss_tap2": 0.5})
    shown = names(scrape(sink))
    assert "coldpress_loss_tap1" not in shown
    assert {"coldpress_loss_tap2", "coldpress_checkpoint_seconds"} <= shown
