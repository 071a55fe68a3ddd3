"""A frozen run against an unfrozen one and against one of its own cost, and what is said of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.children import coldpress
from pipeline.compare_freezing import CompareFreezingConfig, ratios, run, trial, verdict
from pipeline.compose import load
from pipeline.freezing_plots import freezes, freezing_picture
from pipeline.trials import step_seconds


def configured(*words: str) -> CompareFreezingConfig:
    config: CompareFreezingConfig = load("compare-freezing", [*words])
    return config


def test_the_runs_differ_in_freezing_and_length_only() -> None:
    config = configured("shards=x")
    assert trial(config, "unfrozen", []).words == ("freeze=none", "budget.unit=steps")
    assert trial(config, "frozen", []).words == ("freeze=freezeout", "budget.unit=steps")
    assert "freeze.scaled=true" in trial(config, "frozen, scaled", []).words
    rows = [{"case": "unfrozen", "units": 100.0}, {"case": "frozen", "units": 81.5}]
    shortened = trial(config, "shortened", rows)
    assert shortened.words == ("freeze=none", "budget.unit=cost", "budget.value=81.5")
    assert shortened.experiment == "small_localmim"


def test_the_verdict_is_of_what_costs_the_same() -> None:
    accuracies = {"unfrozen": 0.9, "frozen": 0.3, "frozen, scaled": 0.25, "shortened": 0.4}
    said = verdict([{"case": case, "knn": knn} for case, knn in accuracies.items()])
    assert "is: shortened, 40.0% (frozen 30.0%, frozen, scaled 25.0%); unfrozen at full cost 90.0%" in said


def test_freezes_are_found() -> None:
    training = [
        {"loss": 1.0, "step": 10, "steps_total": 10, "step_seconds": 2.0, "frozen_layers": 0},
        {"loss": 1.0, "step": 14, "steps_total": 14, "step_seconds": 1.0, "frozen_layers": 2},
    ]
    assert freezes(training) == [14]  # type: ignore[arg-type]


def test_time_is_held_against_the_runs_own_pace() -> None:
    def row(step: int, seconds: float, frozen: int, cost: float) -> dict[str, float]:
        also = {"loss": 1.0, "loss_tap1": 0.4, "loss_tap4": 0.1, "optimizer_bytes": 2.0**20}
        return {
            "step": step,
            "steps_total": step,
            "step_seconds": seconds,
            "frozen_layers": frozen,
            "cost_total": cost,
        } | also

    # A stutter of the machine in one of three intervals.
    metrics = [row(10, 2.0, 0, 10), row(20, 9.0, 0, 20), row(30, 2.0, 0, 30), {"knn": 1.0}, row(40, 1.0, 2, 34)]
    assert step_seconds(metrics) == {0: (30, 2.0), 2: (10, 1.0)}
    found = ratios(metrics, [{"units": 40.0, "steps": 40.0}])
    assert (found["seconds"], found["cost_ratio"], found["time_ratio"]) == (70.0, 34 / 40, 70 / 80)
    assert found["realized"] == pytest.approx((10 / 80) / (6 / 40))
    assert (found["last_loss"], found["optimizer_mib"]) == (0.1, 1.0)
    assert ratios(metrics, [])["realized"] is None


def test_freezes_are_marked_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("pipeline.freezing_plots.save", lambda figure, _: drawn.append(figure))
    rows = [
        {"loss": 1.0, "step": s, "step_seconds": 1.0, "optimizer_bytes": 1.0, "frozen_layers": f}
        for s, f in ((1, 0), (2, 1), (3, 1), (4, 3))
    ]
    unfrozen = [row | {"frozen_layers": 0} for row in rows]
    saved = {"checkpoint_seconds": 1.0}
    freezing_picture({"unfrozen": [*unfrozen, saved], "frozen": [*rows, saved]}, tmp_path / "x.png")
    (figure,) = drawn
    # Two curves and two marks each.
    assert [len(axis.lines) for axis in figure.axes] == [4] * 4
    assert [float(np.asarray(line.get_xdata())[0]) for line in figure.axes[0].lines[2:]] == [2, 4]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["steps=1"], r"steps must be at least 2, got 1; 400 take minutes"),
        (["support=-1"], r"support must be a number"),
    ],
)
def test_refusals(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        configured("shards=x", *words)


def test_a_comparison(
    tmp_path: Path, drawn_shards: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["model.depth=2", "method.taps=[1,2]", "method.doublings=[1,0]", "log_every=2", "batch_size=32"]

    def on_two_blocks(command: str, *words: str) -> None:
        coldpress(command, *words, *(small if command == "train" else []))

    monkeypatch.setattr("pipeline.trials.coldpress", on_two_blocks)
    run(
        configured(
            f"shards={drawn_shards}", f"output={tmp_path / 'out'}", f"val={drawn_shards}", "steps=20", "support=0"
        )
    )
    said = capfd.readouterr().out
    assert "At the cost of the frozen run the best by k-NN is:" in said
    assert "freeze.see_whole" not in said
    rows = {row["case"]: row for row in json.loads((tmp_path / "out" / "compare-freezing.json").read_text())["rows"]}
    assert {case: row["steps"] for case, row in rows.items() if case != "shortened"} == {
        "unfrozen": 20,
        "frozen": 20,
        "frozen, scaled": 20,
    }
    frozen, shortened = rows["frozen"], rows["shortened"]
    assert frozen["cost_ratio"] < 0.95
    # The shortened run stops once it has spent as much: at most a step more.
    assert frozen["units"] <= shortened["units"] < frozen["units"] + rows["unfrozen"]["units"] / 20 + 1e-6
    assert frozen["optimizer_mib"] < 0.8 * rows["unfrozen"]["optimizer_mib"]
    assert shortened["optimizer_mib"] == rows["unfrozen"]["optimizer_mib"]
    assert (tmp_path / "out" / "compare-freezing.png").stat().st_size > 10_000
