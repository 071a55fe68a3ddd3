"""The Grafana dashboards: `python -m monitoring.dashboards` writes the JSON that Grafana provisions."""

from __future__ import annotations

import json
from pathlib import Path

from monitoring.panel import Dashboard, Panel, Row, of_run
from monitoring.panels import DASHBOARDS

DIRECTORY = Path(__file__).parent / "grafana" / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 3


def build(dashboard: Dashboard) -> dict[str, object]:
    """Return a dashboard as Grafana reads it."""
    panels: list[dict[str, object]] = []
    top = 0
    for row in dashboard.rows:
        panels.append(_row(row, len(panels) + 1, top))
        top += 1
        for number, panel in enumerate(row.panels):
            line, column = divmod(number, COLUMNS)
            panels.append(_panel(panel, len(panels) + 1, column * WIDTH, top + line * HEIGHT))
        top += HEIGHT * -(-len(row.panels) // COLUMNS)
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["coldpress"],
        "id": None,
        # The oldest that Grafana 10 and later know.
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_restarts()]},
        "templating": {"list": [_datasource(), _runs(many=dashboard.many)]},
        "panels": panels,
    }


def _row(row: Row, number: int, top: int) -> dict[str, object]:
    place = {"h": 1, "w": 24, "x": 0, "y": top}
    return {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(panel: Panel, number: int, left: int, top: int) -> dict[str, object]:
    defaults: dict[str, object] = {"unit": panel.unit}
    if panel.stacked:
        defaults["custom"] = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": left, "y": top},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for i, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _restarts() -> dict[str, object]:
    """Return the marks of restarts, which explain a gap in every panel."""
    return {
        "name": "Restarts",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "orange",
        "target": {"refId": "A", "expr": f"changes({of_run('restarts')}[2m:]) > 0"},
        "titleFormat": "{{run}} came back",
    }


def _datasource() -> dict[str, object]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _runs(*, many: bool) -> dict[str, object]:
    everything = {"text": ["All"], "value": ["$__all"]}
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": "label_values(coldpress_step, run)", "refId": "run"},
        "refresh": 2,
        "multi": many,
        "includeAll": many,
        "sort": 1,
        **({"allValue": ".*", "current": everything} if many else {}),
    }


def texts() -> dict[str, str]:
    """Return the content of every file by its name."""
    names = {dashboard.uid.removeprefix("coldpress-"): dashboard for dashboard in DASHBOARDS}
    return {f"{name}.json": json.dumps(build(each), indent=1) + "\n" for name, each in names.items()}


if __name__ == "__main__":
    for file, text in texts().items():
        (DIRECTORY / file).write_text(text)
