"""The analysis of a real run's checkpoints: nothing in the run changes, and a stopped analysis goes on."""

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import analyze, train
from pipeline.analysis.results import read
from pipeline.analyze import nearest
from pipeline.cli import dispatch
from pipeline.compose import load

MODEL = [
    "model.name=vit_tiny_patch16_224",
    "model.image_size=32",
    "model.patch_size=8",
    "model.embed_dim=48",
    "model.depth=2",
    "model.num_heads=3",
    "model.reference_length=17",
    "engine.precision=fp32",
]
GRID = ["patch_sizes=[8,16]", "dropouts=[0,0.5]", "samples=32", "sub_batch=8"]


@pytest.fixture(scope="module")
def runs(drawn_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a compressed run of 8 steps with a checkpoint at each quarter."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["run=a", f"runs={runs}", f"data.shards={drawn_shards}", "method=moco", "method.hidden_dim=64", *MODEL]
    words += ["method.out_dim=32", "batch_size=8", "budget.value=8", "budget.unit=steps", "probe.share=0"]
    words += ["checkpoint.milestones=[0.25,0.5,0.75]", "compression=constant", "compression.dropout=0.5"]
    assert train.run(load("train", words), words) == 0
    return runs


def digest(run: Path) -> dict[str, str]:
    files = [p for p in sorted(run.rglob("*")) if p.is_file() and "analysis" not in p.parts]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_an_analysis_measures_every_milestone_and_changes_nothing_else(
    runs: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = digest(runs / "a")
    config = load("analyze", ["run=a", f"runs={runs}", *GRID])
    analyze.run(config)
    assert digest(runs / "a") == before
    assert "least CA-MSE" in capsys.readouterr().out
    schedule = str(runs / "a" / "analysis" / "schedule.yaml")
    (command,) = [line for line in Path(schedule).read_text().splitlines() if line.startswith("# coldpress analyze")]
    words = command.removeprefix("# coldpress analyze ").split()
    assert replace(load("analyze", words), runs=config.runs) == config
    staged = load(
        "train", ["run=b", "method=moco", "budget.value=8", "compression=staged", f"compression.file={schedule}"]
    )
    assert staged.compression.stages[-1].until == 1.0
    assert {stage.patch_size for stage in staged.compression.stages} <= {8, 16}
    result = runs / "a" / "analysis" / "gradient_error.json"
    found = read(result)
    names = [panel.checkpoint for panel in found.panels]
    assert names == ["init", "step_00000002", "step_00000004", "step_00000006", "step_00000008"]
    assert [panel.progress for panel in found.panels] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for panel in found.panels:
        assert [(cell.patch_size, cell.dropout) for cell in panel.cells] == [(8, 0.0), (8, 0.5), (16, 0.0), (16, 0.5)]
        none, *others = panel.cells
        # At the very end too, all parameters learn: a rate of zero there is no freezing.
        assert (panel.frozen_layers, panel.budget) == (0, 8 * none.cost)
        assert (none.squared_bias, none.cost, none.query_tokens) == (0.0, 4.0, 17)
        assert all(cell.squared_bias_plugin > 0 and cell.cost < none.cost for cell in others)
    # Again, after a part and the result were lost: the other parts are not measured again, and it ends the same.
    text = result.read_text()
    result.unlink()
    (runs / "a" / "analysis" / "parts" / "step_00000004-1of1.json").unlink()
    with caplog.at_level(logging.INFO):
        analyze.run(config)
    assert [r.message for r in caplog.records if "sub-batches" in r.message] == [
        "analyzed step_00000004 (50%): 4 sub-batches"
    ]
    assert json.loads(result.read_text()) == json.loads(text)
    # Other samples are another analysis; cells in passes are not.
    analyze.run(load("analyze", ["run=a", f"runs={runs}", *GRID, "points=[0.5]", "cells_at_once=1"]))
    assert read(result).panels[0] == found.panels[2]
    analyze.run(load("analyze", ["run=a", f"runs={runs}", *GRID, "points=[0.5]", "seed=1"]))
    assert read(result).panels[0].cells[1] != found.panels[2].cells[1]


def test_the_nearest_checkpoint_is_taken_once_and_said_when_it_is_far(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points = nearest([0.0, 0.46, 0.54, 1.0], runs / "a" / "checkpoints")
    assert [point.name for point in points] == ["init", "step_00000004", "step_00000008"]
    assert not caplog.records
    assert [point.name for point in nearest([0.0, 0.62], tmp_path)] == ["init"]
    assert "no checkpoint near 62 %: taking init at 0.0 %; train with checkpoint.milestones=[0.62]" in caplog.text


def test_a_damaged_checkpoint_is_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a" / "checkpoints", tmp_path / "checkpoints")
    victim = max((tmp_path / "checkpoints" / "step_00000004").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"run: checkpoint .*step_00000004 is damaged"):
        nearest([0.5], tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run=b"], "run: no run in"),
        (["run=a", "patch_sizes=[9]"], "patch_sizes must divide the run's image_size=32, got 9"),
        (["run=a", "samples=100", "sub_batch=64"], "samples must be a multiple of sub_batch, at least 4 of them"),
        (["run=a", "points=[2]"], "points must be shares of the budget"),
        (["run=a", "budget=-1"], "budget must not be negative, got -1"),
        (["run=a", "cells_at_once=-1"], "cells_at_once and seed must not be negative"),
    ],
)
def test_refusals(runs: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["analyze", f"runs={runs}", *words]) == 2
    assert sentence in capsys.readouterr().err
