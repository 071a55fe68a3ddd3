"""The dashboards are what the code says, and what Grafana's own types allow."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from monitoring import dashboards

TYPES = Path(__file__).parent / "types"
COMPILER = TYPES / "node_modules" / ".bin" / "tsc"


@pytest.mark.parametrize("name", list(dashboards.texts()))
def test_files_are_what_the_code_says(name):
    assert (dashboards.DIRECTORY / name).read_text() == dashboards.texts()[name]
    assert {path.name for path in dashboards.DIRECTORY.iterdir()} == set(dashboards.texts())


@pytest.fixture
def compiler():
    if not COMPILER.exists():
        reason = f"Grafana's types are not installed; run npm ci in {TYPES}"
        # Without node there is nothing to install them with.
        expected = os.environ.get("CI") == "true" and shutil.which("npm")
        pytest.fail(reason) if expected else pytest.skip(reason)
    return COMPILER


# A literal: what is imported from a JSON file has wider types. What an annotation asks is the data source's business.
SOURCE = """\
import {{ AnnotationQuery, Dashboard, DataQuery }} from '@grafana/schema';

interface PrometheusQuery extends DataQuery {{ expr: string }}
interface Annotation extends AnnotationQuery<PrometheusQuery> {{ titleFormat: string }}
interface Typed extends Omit<Dashboard, 'annotations'> {{ annotations: {{ list: Annotation[] }} }}
export const it: Typed = {dashboard};
"""


def check(compiler, tmp_path, dashboard):
    (tmp_path / "node_modules").symlink_to(TYPES / "node_modules")
    (tmp_path / "dashboard.ts").write_text(SOURCE.format(dashboard=json.dumps(dashboard)))
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--moduleResolution", "nodenext"]
    command = [compiler, *options, "dashboard.ts"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.parametrize("name", list(dashboards.texts()))
def test_grafanas_own_types_agree(name, compiler, tmp_path):
    dashboard = json.loads(dashboards.texts()[name])
    result = check(compiler, tmp_path, dashboard)
    assert result.returncode == 0, result.stdout


def test_they_would_find_a_key_that_is_not_there(compiler, tmp_path):
    [name, *_] = dashboards.texts()
    dashboard = json.loads(dashboards.texts()[name])
    dashboard["panels"][1]["gridPoss"] = dashboard["panels"][1].pop("gridPos")
    assert "gridPoss" in check(compiler, tmp_path, dashboard).stdout
