"""What differs beyond both spreads, in which direction, and what cannot be compared."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench import run
from pipeline.benchmarks import regressions
from pipeline.benchmarks.regressions import Baseline, changes, verdict
from pipeline.benchmarks.report import Column, Report, heading, write_json
from pipeline.benchmarks.timing import Spread
from pipeline.cli import dispatch
from pipeline.compose import load

COLUMNS = (
    Column("case", "case"),
    Column("frozen", "frozen layers", "d"),
    Column("ms", "ms/step", ".1f", better="less"),
    Column("speedup", "speed-up", ".2f", better="more"),
    Column("promised", "promised", ".2f"),
    Column("mib", "MiB", ".0f", better="less"),
)
TARGETS = ["what=targets", "method=localmim", "model.name=vit_tiny_patch16_224", "model.image_size=32"]
TARGETS += ["model.patch_size=8", "model.depth=2", "method.taps=[1,2]", "method.doublings=[1,0]"]
TARGETS += ["method.decoder_dim=32", "engine.precision=fp32", "batch_size=4", "rounds=2"]


def row(frozen: int = 0, ms: tuple[float, ...] = (9, 10, 11), speedup: tuple[float, ...] = (2.0,), **more: Any) -> Any:
    fields = Spread.of(ms).fields("ms") | Spread.of(speedup).fields("speedup")
    return {"case": "patch  8", "frozen": frozen, "promised": 3.0, **fields, **more}


def said(before: Any, after: Any) -> list[tuple[str, bool]]:
    return [(str(each), each.worse) for each in changes(COLUMNS, before, after)]


def test_spreads_that_overlap_are_no_change() -> None:
    assert said([row()], [row()]) == []
    assert said([row(ms=(9, 10, 11))], [row(ms=(11, 12, 13))]) == []


def test_less_is_better_of_times_and_more_of_ratios() -> None:
    slower = "patch 8, 0: ms/step 10.0 [9.0-11.0] -> 12.5 [12.0-13.0]"
    faster = "patch 8, 0: ms/step 12.5 [12.0-13.0] -> 10.0 [9.0-11.0]"
    assert said([row()], [row(ms=(12, 12.5, 13))]) == [(slower, True)]
    assert said([row(ms=(12, 12.5, 13))], [row()]) == [(faster, False)]
    ratio = "patch 8, 0: speed-up 2.00 [1.90-2.10] -> 1.50 [1.40-1.60]"
    assert said([row(speedup=(1.9, 2, 2.1))], [row(speedup=(1.4, 1.5, 1.6))]) == [(ratio, True)]
    assert said([row(speedup=(1.4, 1.5, 1.6))], [row(speedup=(1.9, 2, 2.1))])[0][1] is False


def test_what_has_no_spread_may_differ_by_rounding() -> None:
    assert said([row(mib=1000)], [row(mib=1005)]) == []
    assert said([row(mib=1000)], [row(mib=1020)]) == [("patch 8, 0: MiB 1000 [995-1005] -> 1020 [1015-1025]", True)]
    # A figure that only one of them has.
    assert said([row()], [row(mib=1020)]) == said([row(mib=1000)], [row(mib=None)]) == []


def test_rows_are_found_by_what_they_are_about() -> None:
    before = [row(0), row(1, ms=(5, 5, 5)), row(3, ms=(1, 1, 1))]
    after = [row(1, ms=(6, 6, 6)), row(0), row(2, ms=(99, 99, 99))]
    assert [text for text, _ in said(before, after)] == ["patch 8, 1: ms/step 5.0 [5.0-5.0] -> 6.0 [6.0-6.0]"]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Return the report of a benchmark of the settings below."""
    path = tmp_path / "old.json"
    Report(COLUMNS, [row()]).write(path, "step", {"model": {"depth": 2}, "rounds": 7, "output": "old.json"})
    return path


def test_verdict_names_what_is_worse_and_what_is_better(report: Path) -> None:
    baseline = Baseline(report, {"model": {"depth": 2}, "rounds": 3, "output": "new.json", "compare": "old.json"})
    found = changes(COLUMNS, baseline.rows("step"), [row(ms=(20, 20, 20), speedup=(9.0,))])
    first, *lines = verdict(baseline, found).splitlines()
    assert first.startswith(f"Against {report} of 20")
    assert first.endswith("beyond both spreads: 1 worse, 1 better.")
    assert [line.split(":")[0].split() for line in lines] == [
        ["worse", "patch", "8,", "0"],
        ["better", "patch", "8,", "0"],
    ]


def test_other_settings_and_other_machines_are_refused(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"was measured with model\.depth=2, this is model\.depth=3; compare runs of"):
        Baseline(report, {"model": {"depth": 3}})
    facts = regressions.machine_facts() | {"cpu": "abacus"}
    monkeypatch.setattr(regressions, "machine_facts", lambda: facts)
    with pytest.raises(ValueError, match=r"is of another machine \(cpu: .* there, abacus here\); compare runs of one"):
        Baseline(report, {"model": {"depth": 2}})


def test_what_is_no_report_is_refused(report: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as a report"):
        Baseline(tmp_path / "nowhere.json", {})
    (tmp_path / "text.json").write_text("no JSON")
    with pytest.raises(ValueError, match="cannot be read as a report"):
        Baseline(tmp_path / "text.json", {})
    report.write_text(json.dumps(json.loads(report.read_text()) | {"schema_version": 1}))
    with pytest.raises(ValueError, match="must have schema_version 2, got 1; measure it with this release"):
        Baseline(report, {})


def test_one_of_several_reports(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    write_json(path, heading("all", {}, "coldpress bench what=all") | {"reports": {"step": {"rows": [row()]}}})
    baseline = Baseline(path, {})
    assert "step" in baseline
    assert "loop" not in baseline
    assert len(baseline.rows("step")) == 1
    with pytest.raises(ValueError, match="has step, not what=loop; measure that first"):
        baseline.rows("loop")


def test_a_command_that_has_become_slower_ends_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert run(load("bench", [*TARGETS, f"output={old}"])) == 0
    content = json.loads(old.read_text())
    for each in content["rows"]:
        # As if targets by scale had been a hundred times as slow, and ours as they are.
        factor = 100 if each["case"] != "one pass" else 1
        each |= {key: factor * each[key] for key in ("ratio", "ratio_low", "ratio_high")}
    old.write_text(json.dumps(content))
    assert dispatch(["bench", *TARGETS, f"output={new}", f"compare={old}"]) == 1
    assert "1 worse, 0 better" in capsys.readouterr().out
    assert any("by scale and color: over one pass" in line for line in json.loads(new.read_text())["compared"])


def test_settings_are_compared_before_anything_is_measured(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(report.read_text())
    content |= {"what": "targets", "settings": asdict(load("bench", TARGETS)) | {"batch_size": 8}}
    content["settings"]["engine"]["precision"] = "fp32"
    report.write_text(json.dumps(content, default=lambda each: each.name))
    assert dispatch(["bench", *TARGETS, f"compare={report}"]) == 2
    assert "was measured with batch_size=8, this is batch_size=4" in capsys.readouterr().err
