"""All benchmarks in one report, each by a command of its own."""

import json
from pathlib import Path

import pytest

from pipeline.bench import BENCHMARKS, run
from pipeline.benchmarks import suite
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


def test_reports_of_all_in_one_and_those_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A method that cannot be compressed has its step measured, too; what is refused stops no other."""
    monkeypatch.setattr(suite, "fitting", lambda _: ["zebra", "step"])
    output = tmp_path / "all.json"
    words = [*SMALL, *LOCALMIM, f"output={output}"]
    assert run(load("bench", words), words) == 1
    content = json.loads(output.read_text())
    assert content["exit_codes"] == {"zebra": 2, "step": 0}
    (cell,) = content["reports"]["step"]["rows"]
    assert (cell["patch_size"], cell["dropout"], cell["promised"]) == (8, 0, 1)
    assert "what=step" in content["reports"]["step"]["command"]
    assert content["command"].startswith("coldpress bench what=all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all-step.png", "all.json"]
    assert "1 of 2 benchmarks measured; not well: zebra" in capsys.readouterr().out
