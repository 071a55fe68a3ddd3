import re
import subprocess
from pathlib import Path

import pytest
import yaml

from monitoring.metrics import CATALOG, PREFIX

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
    assert used <= {PREFIX + name for name in CATALOG}
