"""All benchmarks in one report, each by a command of its own."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.bench import BENCHMARKS, run
from pipeline.benchmarks import suite
from pipeline.benchmarks.report import heading, write_json
from pipeline.benchmarks.suite import fitting
from pipeline.compose import load

SMALL = ["what=all", "model.name=vit_tiny_patch16_224", "model.image_size=32", "model.patch_size=8", "model.depth=2"]
SMALL += ["engine.precision=fp32", "batch_size=4", "rounds=1"]
LOCALMIM = ["method=localmim", "method.taps=[1,2]", "method.doublings=[1,0]", "method.decoder_dim=32"]


@pytest.mark.parametrize(
    ("words", "more", "fewer"),
    [
        ([], set(), set()),
        (["data.shards=somewhere"], {"loader"}, set()),
        (["method=localmim"], {"targets"}, {"loop"}),
        (["engine=fsdp2"], set(), {"freezing", "checkpoint"}),
    ],
)
def test_what_fits_the_settings(words: list[str], more: set[str], fewer: set[str]) -> None:
    always = set(BENCHMARKS) - {"loader", "targets"}
    assert set(fitting(load("bench", words))) == always - fewer | more


def test_reports_of_all_in_one_and_what_has_become_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A method that cannot be compressed has its step measured, too; who has an earlier report is held against it."""
    monkeypatch.setattr(suite, "fitting", lambda _: ["step"])
    old, output = tmp_path / "old.json", tmp_path / "all.json"
    words = [*SMALL, *LOCALMIM, f"output={output}", f"compare={old}"]
    # A step that nobody takes so fast, and a benchmark that is not there today.
    row = {
        "case": "patch   8 dropout 0.00",
        "milliseconds": 1e-6,
        "speedup": 1.0,
        "speedup_low": 0.0,
        "speedup_high": 9.0,
    }
    settings = asdict(load("bench", [word for word in words if not word.startswith("compare=")]))
    reports = {"step": {"rows": [row]}, "loop": {"rows": []}}
    write_json(old, heading("all", settings, "coldpress bench what=all") | {"reports": reports})
    assert run(load("bench", words), words) == 1
    content = json.loads(output.read_text())
    assert content["exit_codes"] == {"step": 1}
    (cell,) = content["reports"]["step"]["rows"]
    assert (cell["patch_size"], cell["dropout"], cell["promised"]) == (8, 0, 1)
    assert [line.split()[:5] for line in content["reports"]["step"]["compared"][1:]] == [
        ["worse", "patch", "8", "dropout", "0.00:"]
    ]
    assert "what=step" in content["reports"]["step"]["command"]
    assert content["command"].startswith("coldpress bench what=all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all-step.png", "all.json", "old.json"]
    assert "1 of 1 benchmarks measured; not well: step" in capsys.readouterr().out
