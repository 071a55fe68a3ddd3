"""The shipped configuration, rules and dashboard against a real Prometheus that scrapes real endpoints."""

import json
import re
from pathlib import Path

import pytest

from monitoring.exporters.endpoint import node_name
from monitoring.exporters.prometheus import PrometheusSink
from monitoring.exporters.reading import Cached, Reading
from monitoring.exporters.service import ExporterConfig, open_endpoint
from monitoring.metrics import CATALOG, GPUS, SLURM
from pipeline.heartbeat import Heartbeat, Phase

ROOT = Path(__file__).parents[2] / "monitoring"
DASHBOARDS = [json.loads(path.read_text()) for path in sorted((ROOT / "grafana" / "dashboards").iterdir())]
PANELS = [panel for dashboard in DASHBOARDS for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="module")
def ranks(checkout):
    heartbeats = [Heartbeat(), Heartbeat()]
    for heartbeat in heartbeats:
        heartbeat.begin(0)
        heartbeat.enter(Phase.forward)
        heartbeat.finish(1)
    # Somebody is in a phase that the other has not entered.
    heartbeats[0].begin(1)
    directory = checkout / "runs" / "a"
    sinks = [
        PrometheusSink(directory, run="a", rank=r, world_size=2, address="127.0.0.1", port=0, live=heartbeat.live)
        for r, heartbeat in enumerate(heartbeats)
    ]
    for sink in sinks:
        sink.write(1, dict.fromkeys(CATALOG, 1.0))
    yield sinks
    for sink in sinks:
        sink.close()


@pytest.fixture(scope="module")
def exporters(checkout):
    """Both exporters, as if there were GPUs and a queue."""
    readings = {}
    for kind, catalog in (("gpu", GPUS), ("slurm", SLURM)):
        readings[kind] = reading = Reading(catalog)
        for metric in catalog.values():
            reading.add(metric.name, 1.0, *(f"a {label}" for label in metric.labels))
    config = ExporterConfig(runs=str(checkout / "runs"))
    endpoints = [open_endpoint(Cached(lambda kind=kind: readings[kind], 1), config, kind) for kind in readings]
    yield endpoints
    for endpoint in endpoints:
        endpoint.close()


@pytest.fixture(scope="module")
def scraped(server, ranks, exporters):
    """The server once both ranks were scraped twice: a rate needs two samples."""
    server.wait("count_over_time(coldpress_step[1m]) >= 3", 2)
    return server


def test_every_rank_is_found_through_its_target_file(scraped):
    found = {(s["metric"]["run"], s["metric"]["rank"]) for s in scraped.query('up{job="coldpress"} == 1')}
    assert found == {("a", "0"), ("a", "1")}
    assert not scraped.query('{__name__=~"coldpress_.*", exported_instance!=""}')


def test_exporters_are_no_ranks(scraped, exporters):
    found = {(s["metric"]["job"], s["metric"]["instance"]) for s in scraped.query('up{job!="coldpress"} == 1')}
    node = node_name()
    assert found == {("coldpress-gpu", f"{node}:gpu"), ("coldpress-slurm", f"{node}:slurm")}
    assert {s["metric"]["run"] for s in scraped.query('count by (run) (up{job="coldpress"})')} == {"a"}
    assert scraped.query("coldpress_node_gpu_up")[0]["metric"]["node"] == node


def test_a_report_arrives_with_its_value(scraped, ranks):
    for rank, sink in enumerate(ranks):
        sink.write(100 + rank, {**dict.fromkeys(CATALOG, 1.0), "loss": 0.25})
    scraped.wait("coldpress_loss == 0.25", 2)
    steps = {s["metric"]["rank"]: s["value"][1] for s in scraped.query("coldpress_step")}
    assert steps == {"0": "100", "1": "101"}


def test_every_rule_is_evaluated_without_error(scraped):
    rules = [rule for group in scraped.get("api/v1/rules")["groups"] for rule in group["rules"]]
    assert len(rules) == 24
    scraped.wait("run_stage:coldpress_samples:rate5m", 1)
    rules = [rule for group in scraped.get("api/v1/rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}


@pytest.mark.parametrize("panel", PANELS, ids=lambda p: p["title"])
def test_every_panel_has_data_and_its_legend_names_each_line(panel, scraped):
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "1m").replace("$run", "a|b")
        assert "$" not in expression
        # Rules of rules take a moment more.
        series = [s["metric"] for s in scraped.some(expression)]
        labels = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
        legends = {tuple(s[label] for label in labels) for s in series}
        assert len(legends) == len(series)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda d: d["uid"])
def test_restarts_can_be_asked_for(dashboard, scraped):
    [restarts] = dashboard["annotations"]["list"]
    expression = restarts["target"]["expr"].replace("$run", "a")
    # A query that is wrong is an error and not an empty answer.
    assert scraped.query(expression) == []
    assert scraped.query(expression.removesuffix("> 0"))


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda d: d["uid"])
def test_the_run_variable_lists_the_runs(dashboard, scraped):
    [variable] = [v for v in dashboard["templating"]["list"] if v["name"] == "run"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
    assert scraped.get(f"api/v1/label/{label}/values", **{"match[]": metric}) == ["a"]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda d: d["uid"])
def test_panels_have_their_own_id_and_place(dashboard):
    everything = dashboard["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in everything)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert {p["datasource"]["uid"] for p in PANELS} == {"${datasource}"}


def test_who_is_behind_and_where_is_seen(scraped):
    [behind] = scraped.query("rank:coldpress_phases_behind > 0")
    assert behind["metric"]["rank"] == "1"
    phases = {s["metric"]["rank"]: s["metric"]["phase"] for s in scraped.query("coldpress_phase")}
    assert phases == {"0": "data", "1": "report"}


def test_a_killed_rank_is_down_and_a_closed_one_is_gone(scraped, ranks, exporters, checkout):
    ranks[1].endpoint.stop()  # as a kill does: the target file stays
    scraped.wait('up{run="a", rank="1"} == 0', 1)
    ranks[0].close()
    scraped.wait('up{run="a"}', 1)
    for exporter in exporters:
        exporter.close()
    assert [p.name for p in (checkout / "runs" / ".targets").iterdir()] == ["a-1.json"]
