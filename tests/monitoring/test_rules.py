import re
import subprocess
from pathlib import Path

import pytest
import yaml

from monitoring.metrics import CATALOG, GPUS, LIVE, PREFIX, SLURM

HERE = Path(__file__).parents[2] / "monitoring" / "prometheus"
CHECKS = [
    ["check", "config", "prometheus.yml"],
    ["check", "rules", "rules.yml"],
    ["test", "rules", "rules_test.yml"],
]


@pytest.mark.parametrize("arguments", CHECKS, ids=" ".join)
def test_promtool_agrees(arguments, program):
    result = subprocess.run([program("promtool"), *arguments], cwd=HERE, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rules_use_names_of_the_catalogue():
    groups = yaml.safe_load((HERE / "rules.yml").read_text())["groups"]
    expressions = [rule["expr"] for group in groups for rule in group["rules"]]
    used = {name for e in expressions for name in re.findall(rf"(?<![:\w]){PREFIX}\w+", e)}
    assert used
    series = {m.name + end for m in LIVE.values() if m.kind == "histogram" for end in ("_bucket", "_sum", "_count")}
    assert used <= {PREFIX + name for name in (*CATALOG, *LIVE, *GPUS, *SLURM, *series)}


def test_every_alert_is_tested_and_says_what_to_do():
    rules = [r for g in yaml.safe_load((HERE / "rules.yml").read_text())["groups"] for r in g["rules"] if "alert" in r]
    cases = yaml.safe_load((HERE / "rules_test.yml").read_text())["tests"]
    asked = [case for test in cases for case in test["alert_rule_test"]]
    for rule in rules:
        fires = {bool(case.get("exp_alerts")) for case in asked if case["alertname"] == rule["alert"]}
        assert fires == {True, False}, rule["alert"]
        assert rule["annotations"].keys() == {"summary", "action"}
