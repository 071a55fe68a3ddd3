"""The shipped configuration, rules and dashboard against a real Prometheus that scrapes real endpoints."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from monitoring.exporters.prometheus import PrometheusSink
from monitoring.metrics import CATALOG

ROOT = Path(__file__).parents[2] / "monitoring"
DASHBOARD = json.loads((ROOT / "grafana" / "dashboards" / "training.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
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


@pytest.fixture(scope="module")
def server(checkout, program):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        program("prometheus"),
        f"--config.file={checkout / 'monitoring' / 'prometheus' / 'prometheus.yml'}",
        f"--storage.tsdb.path={checkout / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (checkout / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        yield Server(port)
        process.terminate()


@pytest.fixture(scope="module")
def ranks(checkout):
    sinks = [
        PrometheusSink(checkout / "runs" / "a", run="a", rank=r, world_size=2, address="127.0.0.1", port=0)
        for r in (0, 1)
    ]
    for sink in sinks:
        sink.write(1, dict.fromkeys(CATALOG, 1.0))
    yield sinks
    for sink in sinks:
        sink.close()


@pytest.fixture(scope="module")
def scraped(server, ranks):
    """The server once both ranks were scraped twice: a rate needs two samples."""
    server.wait("count_over_time(coldpress_step[1m]) >= 3", 2)
    return server


def test_every_rank_is_found_through_its_target_file(scraped):
    found = {(s["metric"]["run"], s["metric"]["rank"]) for s in scraped.query('up{job="coldpress"} == 1')}
    assert found == {("a", "0"), ("a", "1")}
    assert not scraped.query('{__name__=~"coldpress_.*", exported_instance!=""}')


def test_a_report_arrives_with_its_value(scraped, ranks):
    for rank, sink in enumerate(ranks):
        sink.write(100 + rank, {"loss": 0.25})
    scraped.wait("coldpress_loss == 0.25", 2)
    steps = {s["metric"]["rank"]: s["value"][1] for s in scraped.query("coldpress_step")}
    assert steps == {"0": "100", "1": "101"}


def test_every_rule_is_evaluated_without_error(scraped):
    rules = [rule for group in scraped.get("api/v1/rules")["groups"] for rule in group["rules"]]
    assert len(rules) == 6
    scraped.wait("run:coldpress_samples:rate5m", 1)
    rules = [rule for group in scraped.get("api/v1/rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}


@pytest.mark.parametrize("panel", PANELS, ids=lambda p: p["title"])
def test_every_panel_has_data_and_its_legend_names_each_line(panel, scraped):
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "1m").replace("$run", "a|b")
        assert "$" not in expression
        series = [s["metric"] for s in scraped.query(expression)]
        assert series, expression
        labels = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
        legends = {tuple(s[label] for label in labels) for s in series}
        assert len(legends) == len(series)


def test_the_run_variable_lists_the_runs(scraped):
    [variable] = [v for v in DASHBOARD["templating"]["list"] if v["name"] == "run"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
    assert scraped.get(f"api/v1/label/{label}/values", **{"match[]": metric}) == ["a"]


def test_panels_have_their_own_id_and_place():
    everything = DASHBOARD["panels"]
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


def test_a_killed_rank_is_down_and_a_closed_one_is_gone(scraped, ranks, checkout):
    ranks[1]._stop()  # as a kill does: the target file stays
    scraped.wait('up{run="a", rank="1"} == 0', 1)
    ranks[0].close()
    scraped.wait('up{run="a"}', 1)
    assert [p.name for p in (checkout / "runs" / ".targets").iterdir()] == ["a-1.json"]
