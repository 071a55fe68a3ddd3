"""Tables line up, and JSON says on what machine."""

import json
from enum import Enum
from pathlib import Path

from pipeline.benchmarks.machine import machine_facts
from pipeline.benchmarks.report import SCHEMA_VERSION, Column, Report

COLUMNS = (Column("case", "case"), Column("ms", "ms", ".1f"))
ROWS = [{"case": "ours", "ms": 7.25, "rounds": [1]}, {"case": "a peer of theirs", "ms": 12.0}, {"case": "a part"}]


class Fruit(Enum):
    pear = 1


def test_table_aligns_text_left_and_numbers_right() -> None:
    assert Report(COLUMNS, ROWS, ["A note."]).table().split("\n") == [
        "case                ms",
        "ours               7.2",
        "a peer of theirs  12.0",
        "a part",
        "",
        "A note.",
    ]


def test_json_holds_rows_facts_settings_and_machine(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    Report(COLUMNS, ROWS, ["A note."], {"images": {"samples": 3}}).write(file, "loader", {"fruit": Fruit.pear})
    content = json.loads(file.read_text())
    assert content["schema_version"] == SCHEMA_VERSION
    assert content["what"] == "loader"
    assert content["rows"] == ROWS
    assert content["notes"] == ["A note."]
    assert content["images"] == {"samples": 3}
    assert content["settings"] == {"fruit": "pear"}
    assert content["machine"].keys() == machine_facts().keys()
    assert content["date"].endswith("+00:00")


def test_machine_facts_are_known() -> None:
    facts = machine_facts()
    assert facts["cpu"]
    assert 1 <= facts["usable_cores"] <= facts["cores"]
    assert facts["memory_gib"] > 0
    assert all(facts["packages"].values()), facts["packages"]
